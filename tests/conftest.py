"""Shared by all tests: the test folder's helper modules import by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
