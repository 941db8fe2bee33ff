"""The published tables are what the result files say."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_result_files_say(tables):
    page = (BENCHMARKS / "README.md").read_text()
    assert tables.filled(page) == page, "run: python benchmarks/tables.py"
    assert page.count("<!-- table: ") == page.count("<!-- end -->") == 5


def test_a_row_has_the_numbers_of_its_file(tables):
    path = next(iter(sorted(BENCHMARKS.glob("INFNet/*.json"))))
    result = json.loads(path.read_text())
    valid = result["metrics"]["valid"]
    row = f"| is_like | {valid['is_like_gAUC']:.4f} | {valid['is_like_AUC']:.4f} |"
    assert row in tables.accuracy(result["dataset_id"])


def test_result_files_name_no_path_of_a_machine():
    files = list(BENCHMARKS.glob("*/*.json"))
    assert files
    for path in files:
        config = json.loads(path.read_text())["config"]
        assert not any(str(config[key]).startswith("/") for key in ("data_root", "train_data", "test_data")), path
