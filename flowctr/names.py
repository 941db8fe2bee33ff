"""The name that somebody probably meant, for error messages."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, names: Iterable[str]) -> str:
    """Returns the name that looks most like the given one, whatever the case."""
    by_lower_case = {known.lower(): known for known in sorted(names)}
    return by_lower_case[difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0)[0]]


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """Returns a remark for an error message about an unknown name, empty if no name is close to it."""
    matches = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""
