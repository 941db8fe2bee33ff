"""The official csv splits of BARS' four sequence benchmarks, taken over after their md5 has been checked.

Each has train.csv and test.csv, made by the BARS team (https://github.com/reczoo/Datasets); KuaiVideo_x1 and
MicroVideo1.7M_x1 also have a file of pretrained item embeddings, for which no digest is published.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

from flowctr.datasets.base import Dataset, find_raw, written_together


def prepare_x1(raw: Path, out: Path, files: dict[str, str | None], download: str) -> list[Path]:
    """Checks the raw files and puts them into `out`, as hard links where the file system allows it.

    Args:
        raw: The folder with the downloaded files.
        out: The folder to put them into.
        files: The expected md5 of each file; None where none is published.
        download: Where the files can be had.

    Returns:
        The paths of the files in `out`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file has another digest.
    """
    sources = [find_raw(raw, name, download) for name in files]
    for source, expected in zip(sources, files.values()):
        found = md5(source) if expected else expected
        if found != expected:
            raise ValueError(
                f"{source} is not the official file: expected md5 {expected}, found {found}; "
                f"download it again from {download}"
            )
    paths = [out / name for name in files]
    with written_together(paths) as temporary:
        for source, target in zip(sources, temporary):
            try:
                os.link(source.resolve(), target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, target)
    return paths


def md5(path: Path) -> str:
    """Returns the hex md5 digest of a file, read in pieces."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _x1(name: str, description: str, train: str, test: str, embedding: str | None = None) -> Dataset:
    """Returns the registry's entry of one split from its name and digests."""
    download = f"https://huggingface.co/datasets/reczoo/{name}"
    files = {"train.csv": train, "test.csv": test} | ({embedding: None} if embedding else {})
    return Dataset(
        id=name.lower(),
        description=description,
        download=download,
        licence="that of the source data set, see the download page",
        files=tuple(files),
        function=partial(prepare_x1, files=files, download=download),
    )


DATASETS = [
    _x1(
        "AmazonElectronics_x1",
        "Amazon Electronics (2014), DIN's next-item protocol; 2,608,764 train and 384,806 test rows.",
        train="e9bf80b92985e463db18fdc753d347b5",
        test="57a20e82fe736dd495f2eaf0669bf6d0",
    ),
    _x1(
        "TaobaoAd_x1",
        "Taobao ad clicks, 6 to 13 May 2017, test on the last day; 21,929,911 train and 3,099,515 test rows.",
        train="eaabfc8629f23519b04593e26c7522fc",
        test="f5ae6197e52385496d46e2867c1c8da1",
    ),
    _x1(
        "KuaiVideo_x1",
        "Kuaishou micro-video clicks (China MM 2018); 10,931,092 train and 2,730,291 test rows.",
        train="16f13734411532cc313caf2180bfcd56",
        test="ba26c01caaf6c65c272af11aa451fc7a",
        embedding="item_visual_emb_dim64.h5",
    ),
    _x1(
        "MicroVideo1.7M_x1",
        "micro-video clicks of THACIL, test on unseen videos; 8,970,309 train and 3,767,308 test rows.",
        train="936e6612714c887e76226a60829b4e0a",
        test="9417a18304fb62411ac27c26c5e0de56",
        embedding="item_image_emb_dim64.h5",
    ),
]
