"""What preparing, building and loading share: files that may be damaged, cut off or in use."""

import errno
import json
import logging
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(path: Path, keys: Iterable[str], remedy: str) -> dict:
    """Reads a JSON object.

    Args:
        path: An existing file.
        keys: What the object must have.
        remedy: What to do about a damaged file, for the error message.

    Raises:
        ValueError: If the file is no JSON, or no object with these keys.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__} instead of an object; {remedy}")
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}; {remedy}")
    return content


def check_csv_end(path: str | Path, separator: str = ",") -> None:
    """Checks that a csv file was not cut off in its last row, which would be read as one with empty fields.

    Raises:
        ValueError: If the file does not end with a newline and its last line has fewer fields than the first.
    """
    with open(path, "rb") as file:
        header = file.readline()
        if not header.endswith(b"\n"):  # the only line
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            last = content[content.rfind(b"\n") + 1 :]
        if not last.strip() or last.count(b'"') % 2:  # odd: ends a value of several lines, or no reader accepts it
            return
        found, expected = (re.sub(rb'"[^"]*"', b"", text).count(separator.encode()) + 1 for text in (last, header))
        if found < expected:
            file.seek(0)
            line = sum(1 for _ in file)
            raise ValueError(
                f"{path}: cut off in line {line}: it has {found} of {expected} fields and no newline; "
                "get the whole file, or delete this line"
            )


def natural_order(path: Path) -> tuple[list, str]:
    """Returns a sort key that puts part_2 before part_10."""
    pieces = re.split(r"(\d+)", path.name)
    return [int(piece) if piece.isdecimal() else piece for piece in pieces], path.name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time write to a folder, which need not exist; the others wait.

    The lock file lies beside the folder and stays there: removing it would let two processes in.
    """
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.info(f"{folder}: another process is writing it; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_of(folder: Path) -> FileLock:
    """Returns the lock of a folder and makes its parent."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock")
