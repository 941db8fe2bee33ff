"""Shared by all tests: the test folder's helper modules import by name, and the root logger stays as it was."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def root_logger():
    """A run replaces the handlers of the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        with suppress(OSError):  # a log on a full disk
            handler.close()
    root.handlers, root.level = handlers, level
