"""Checks of BARS folders: an intact one passes, and every kind of defect is found in its file and line."""

import errno
import os
import re
import shutil
from decimal import Decimal
from pathlib import Path

import bars_runs
import pytest
from flowctr import bars, validation
from flowctr.bars import (
    COLLISION,
    EXPID,
    LINK,
    MISSING,
    NUMBERS,
    REPEATED,
    SAME_DATA,
    UNKNOWN_RUN,
    UNREADABLE,
    VERSION,
)
from flowctr.submission import submit

STEM = "InterFormer_toy_tuner_config_01"
MODELS, DATASETS, TABLE = f"{STEM}/model_config.yaml", f"{STEM}/dataset_config.yaml", f"{STEM}.csv"
BARS_URL = "https://github.com/reczoo/BARS/tree/main/ranking/ctr"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The submission of a search of three trials, the best with two seeds."""
    folder = tmp_path_factory.mktemp("intact")
    return submit(str(bars_runs.write_search(folder / "model", seeds=2)), folder / "out", "Ada L")


@pytest.fixture
def copy(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "submission")


def found_in(folder: Path) -> list[tuple[str, int, str]]:
    return sorted((str(f.path.relative_to(folder)), f.line, f.kind) for f in validation.check_submission(folder))


def edit(folder: Path, name: str, old: str, new: str, last: bool = False) -> int:
    """Replaces the first or last occurrence of a text in a file and returns its line."""
    text = (folder / name).read_text()
    start = text.rindex(old) if last else text.index(old)
    (folder / name).write_text(text[:start] + new + text[start + len(old) :])
    return text[:start].count("\n") + 1


def append(folder: Path, name: str, line: str) -> int:
    """Appends a line to a file and returns its number."""
    text = f"{(folder / name).read_text()}{line}\n"
    (folder / name).write_text(text)
    return text.count("\n")


def trials(folder: Path) -> list[str]:
    """Ids of the three trials; the second is the submitted one."""
    return re.findall(r"^(\w+):", (folder / MODELS).read_text(), re.MULTILINE)


def test_an_intact_submission_has_no_defect(intact):
    assert found_in(intact) == []
    assert validation.validate([intact]) == ([intact], [])


# Old text -> new text in a file makes one defect, in the line of the text. BEST, FIRST and THIRD stand for trials' ids.
EDITS = {
    "truncated id": ("README.md", "--expid BEST", "--expid InterFormer_test_0", EXPID),
    "unknown id": ("README.md", "--expid BEST", "--expid FM_test_002_00000000", EXPID),
    "id of another trial": ("README.md", "--expid BEST", "--expid FIRST", EXPID),
    "unknown data set": (MODELS, "dataset_id: kuairand_tiny", "dataset_id: other", EXPID),
    "config that is not there": ("README.md", f"tiny/{STEM} --expid", "tiny/other --expid", LINK),
    "dead link": ("README.md", f"](./{STEM})", f"](./{STEM[:-1]})", LINK),
    "dead anchor": ("README.md", "(#environments)", "(#nowhere)", LINK),
    "link in a link": ("README.md", f"](./{STEM})", "]([x](https://example.org))", LINK),
    "leaderboard: another folder": ("leaderboard.csv", "kuairand_tiny,", "kuairand_tinier,", LINK),
    "leaderboard: number": ("leaderboard.csv", "0.695000", "0.795000", NUMBERS),
    "README: number": ("README.md", "| 1 | 0.701000", "| 1 | 0.701001", NUMBERS),
    "README: no number": ("README.md", "| 1 | 0.701000", "| 1 | ?", NUMBERS),
    "README: mean": ("README.md", "| Avg | 0.696000", "| Avg | 0.697000", NUMBERS),
    "README: deviation": ("README.md", "&#177;0.00500000", "&#177;0.01000000", NUMBERS),
    "search: number": (TABLE, "is_like_AUC: 0.710000", "is_like_AUC: 7.1e-2", NUMBERS),
    "results: no metric": ("results.csv", "is_like_NE: 0.713000 ", "is_like_NE: 0.713000x ", UNREADABLE),
    "results: no metric at the end": ("results.csv", " NE: 0.713000\n", " NE: 0.713000x\n", UNREADABLE),
    "link to mail": ("README.md", f"](./{STEM})", "](mailto:ada@ada.example)", None),
    "link to an image in it": ("README.md", f"](./{STEM})", f"](data:image/png;base64,{'A' * 5000})", None),
    "search: no result line": (TABLE, "[test]", "[tset]", UNREADABLE),
    "search: hash of another trial": (TABLE, "THIRD,[dataset_id]", "FIRST[:-12]003FIRST[-9:],[dataset_id]", COLLISION),
    "settings: hash of another trial": (MODELS, "THIRD:", "FIRST[:-12]003FIRST[-9:]:", COLLISION),
    "settings: id twice": (MODELS, "THIRD:", "FIRST:", COLLISION),
    "no version": ("environments.txt", "fuxictr: 2.3.10", "fuxictr: latest", VERSION),
    "validation is test": (
        DATASETS,
        "valid_data: data/kuairand_tiny/valid",
        "valid_data: data/kuairand_tiny/test",
        SAME_DATA,
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_found_in_its_line(copy, name):
    file, old, new, kind = EDITS[name]
    first, best, third = trials(copy)
    names = {"BEST": best, "THIRD": third, "FIRST[:-12]": first[:-12], "FIRST[-9:]": first[-9:], "FIRST": first}
    for text, expid in names.items():
        old, new = old.replace(text, expid), new.replace(text, expid)
    line = edit(copy, file, old, new)
    assert found_in(copy) == ([(file, line, kind)] if kind else [])


def test_a_truncated_id_is_told_from_an_unknown_one(copy):
    _, best, third = trials(copy)
    edit(copy, "README.md", f"--expid {best}", f"--expid {best[:-6]}")
    assert [f.message for f in validation.check_submission(copy)] == [
        f"--expid {best[:-6]} is truncated; the experiment is {best}"
    ]
    edit(copy, "README.md", f"--expid {best[:-6]}", f"--expid {third}x")
    assert [f.message for f in validation.check_submission(copy)] == [
        f"--expid {third}x is not in model_config.yaml; the nearest is {third}"
    ]


@pytest.mark.parametrize(
    "name", ["README.md", "environments.txt", "results.csv", f"{STEM}.yaml", TABLE, DATASETS, MODELS]
)
def test_a_missing_file_is_found(copy, name):
    (copy / name).unlink()
    found = found_in(copy)
    assert (name, 1, MISSING) in found
    assert {kind for file, _, kind in found if file != name} <= {LINK}  # of the README to it


@pytest.mark.parametrize(
    "name", ["README.md", "environments.txt", "results.csv", f"{STEM}.yaml", TABLE, DATASETS, MODELS, "leaderboard.csv"]
)
def test_an_empty_file_is_found(copy, name):
    (copy / name).write_text("\n")
    assert (name, 1, UNREADABLE) in found_in(copy)


def test_files_and_folders_that_must_not_be_read_are_found(copy, monkeypatch):
    """As if by a user without the right to; tests may run as root, whom nothing stops."""
    locked = {copy / "README.md", copy / "results.csv", copy / TABLE}
    read_text = Path.read_text

    def refuse(path, *arguments, **options):
        if path in locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    found = validation.check_submission(copy)
    assert {finding.path for finding in found if finding.kind == UNREADABLE} == locked
    assert f"{copy / 'results.csv'}:1: this cannot be read: Permission denied" in map(str, found)


def test_a_folder_that_must_not_be_entered_is_found_beside_the_others(copy, monkeypatch):
    inner = copy.with_name("inner")
    inner.mkdir()
    walk = os.walk

    def refuse(top, onerror):
        onerror(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(inner)))
        return walk(top)

    monkeypatch.setattr(os, "walk", refuse)
    targets, findings = validation.validate([copy.parent])
    assert targets == [copy] and [(f.path, f.kind) for f in findings] == [(inner, UNREADABLE)]
    table = validation.summary_table(targets, findings)
    assert list(table.columns[1].cells)[bars.KINDS.index(UNREADABLE)] == "1"


def test_odd_files_beside_submissions_are_passed_over(copy):
    (copy.parent / "gone.csv").symlink_to("nowhere")
    os.mkfifo(copy.parent / "pipe.csv")
    assert validation.validate([copy.parent]) == ([copy], [])


@pytest.mark.parametrize(
    ("text", "kinds"), [("Model,AUC,Running Steps\nx", [LINK, NUMBERS]), ("a\n" + "x" * 200_000, [UNREADABLE])]
)
def test_a_leaderboard_that_was_cut_or_is_no_csv_is_a_defect(copy, text, kinds):
    (copy / "leaderboard.csv").write_text(text)
    assert found_in(copy) == [("leaderboard.csv", 2, kind) for kind in kinds]


def test_keys_of_settings_need_not_be_texts(copy):
    settings = "    1: 1\n    a: 1\n    ? !!python/tuple [a, b]\n    : 2\n"
    (copy / MODELS).write_text(f"x_1_aaaaaaaa:\n{settings}y_2_aaaaaaaa:\n{settings.replace(': 1', ': 2')}")
    assert (MODELS, 6, COLLISION) in found_in(copy)


def test_a_missing_log_and_a_missing_configuration_are_found(copy):
    _, best, _ = trials(copy)
    (copy / f"{best}.log").unlink()
    assert found_in(copy) == [(f"{best}.log", 1, MISSING)]
    shutil.rmtree(copy / STEM)
    assert {(DATASETS, 1, MISSING), (MODELS, 1, MISSING), (f"{best}.log", 1, MISSING)} < set(found_in(copy))


def test_numbers_of_the_log_are_compared_with_results_and_readme(copy):
    _, best, _ = trials(copy)
    line = edit(copy, f"{best}.log", "AUC: 0.700000", "AUC: 0.710000", last=True)
    readme = (copy / "README.md").read_text()
    copied = readme[: readme.rindex("AUC: 0.700000")].count("\n") + 1
    assert found_in(copy) == [(f"{best}.log", line, NUMBERS), ("README.md", copied, NUMBERS)]


def test_a_number_of_the_results_is_compared_with_all_others(copy):
    _, best, _ = trials(copy)
    edit(copy, "results.csv", "[test] is_click_AUC: 0.700000", "[test] is_click_AUC: 0.730000")
    found = validation.check_submission(copy)
    files = sorted(finding.path.name for finding in found)
    assert files == sorted(["README.md", "README.md", "README.md", f"{best}.log", TABLE, "leaderboard.csv"])
    assert all("results.csv" in finding.message for finding in found)


def test_a_run_that_the_table_lacks_is_found(copy):
    text = (copy / "README.md").read_text()
    (copy / "README.md").write_text(re.sub(r"\| 2 \|.*\n", "", text))
    header = text[: text.index("| Runs |")].count("\n") + 1
    assert found_in(copy) == [("README.md", header, NUMBERS)]


def test_the_version_must_be_last(copy):
    line = append(copy, "environments.txt", "tqdm: 4.66")
    assert found_in(copy) == [("environments.txt", line, VERSION)]


@pytest.mark.parametrize(("old", "new", "kind"), [("", "", REPEATED), ("AUC: 0.6", "AUC: 0.5", COLLISION)])
def test_an_id_that_is_twice_in_the_search_is_found(copy, old, new, kind):
    line = append(copy, TABLE, (copy / TABLE).read_text().splitlines()[1].replace(old, new))
    assert found_in(copy) == [(TABLE, line, kind)]


def test_an_empty_readme_has_no_command_and_no_table(copy):
    (copy / "README.md").write_text("## InterFormer_kuairand_tiny\n")
    assert found_in(copy) == [("README.md", 1, EXPID), ("README.md", 1, NUMBERS)]


def test_nothing_of_a_yaml_is_executed(copy, tmp_path):
    (copy / DATASETS).write_text(f"x:\n    y: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    assert found_in(copy) == [(DATASETS, 2, UNREADABLE)]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["a: [1", "- a list", "", "\0\0", "x:\n  a: 2020-13-45", "x:\n  a: !!bool x"])
def test_a_yaml_that_cannot_be_read_is_one_defect(copy, text):
    (copy / DATASETS).write_text(text)
    assert [(file, kind) for file, _, kind in found_in(copy)] == [(DATASETS, UNREADABLE)]


# Logs

RESULT = " 20260301-100000,[command] c,[exp_id] x,[dataset_id] d,[train] N.A.,[val] {valid},[test] {test}\n"
ALL, VALID, TEST = (f"****** {part} evaluation ******" for part in ("Train/validation", "Validation", "Test"))


def logged(value: float, task: str = "") -> str:
    return f"INFO {f'[Task: {task}]' if task else ''}[Metrics] AUC: {value}"


FUXICTRS = [logged(0.1), VALID, logged(0.2), TEST, logged(0.3)]
FLOWCTRS = [logged(0.2, "c"), logged(0.1, "c"), TEST, logged(0.3, "c")]
TWO_TASKS = [logged(0.2, "c"), logged(0.5, "c, tab=1"), logged(0.4, "d")]


@pytest.mark.parametrize(
    ("log", "valid", "test", "lines"),
    [
        (FUXICTRS, "AUC: 0.2", "AUC: 0.3", []),
        (FUXICTRS, "AUC: 0.1", "AUC: 0.2", [3, 5]),
        ([ALL, logged(0.9), logged(0.2), TEST, logged(0.3)], "AUC: 0.2", "AUC: 0.3", []),  # 0.9: of training data
        (FLOWCTRS, "AUC: 0.2", "AUC: 0.3", []),  # the best evaluation of the training
        (FLOWCTRS, "AUC: 0.4", "AUC: 0.3", [2]),
        (FLOWCTRS[:2], "AUC: 0.2", "AUC: 0.2", []),  # validation is test
        (TWO_TASKS, "c_AUC: 0.2 - c_AUC@tab=1: 0.5 - AUC: 0.3", "d_AUC: 0.4", []),
        (TWO_TASKS, "c_AUC: 0.2 - c_AUC@tab=1: 0.6 - AUC: 0.3", "d_AUC: 0.5", [2, 3]),
        (["Resume after step 9", *FLOWCTRS[1:]], "AUC: 0.2", "AUC: 0.4", [4]),  # validated before
        ([*FLOWCTRS[:3]], "AUC: 0.2", "AUC: 0.3", [2]),  # cut off
        (["Start training"], "AUC: 0.2", "AUC: 0.3", [1]),
    ],
)
def test_a_log_is_compared_with_the_result_that_it_led_to(tmp_path, log, valid, test, lines):
    (tmp_path / "x.log").write_text("\n".join([*log, ""]))
    (tmp_path / "results.csv").write_text(RESULT.format(valid=valid, test=test))
    found = [finding for finding in validation.check_submission(tmp_path) if finding.kind == NUMBERS]
    assert [(finding.path.name, finding.line) for finding in found] == [("x.log", line) for line in lines]


@pytest.mark.parametrize(
    ("text", "metrics"),
    [
        ("gAUC: 0.7 - AUC: 1.2e-05 - logloss: 3E+1", {"gAUC": "0.7", "AUC": "1.2e-05", "logloss": "3E+1"}),
        ("loss: -0.5 - AUC: nan - NE: inf ", {"loss": "-0.5", "AUC": "nan", "NE": "inf"}),
        ("AUC@city=New York - East: 0.5 - AUC@city: 1", {"AUC@city=New York - East": "0.5", "AUC@city": "1"}),
        ("N.A.", {}),
    ],
)
def test_metrics_are_read_as_fuxictr_writes_them(text, metrics):
    assert bars.parse_metrics(text) == metrics


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ("0.746299", "0.746300", False),  # both have six digits
        ("0.7463", "0.746299", True),
        ("0.7463", "0.746350", True),  # a tie may be rounded either way
        ("0.7463", "0.746351", False),
        ("1.2e-05", "0.000012", True),
        ("nan", "nan", True),
        ("nan", "0.5", False),
    ],
)
def test_numbers_agree_if_rounding_explains_their_difference(a, b, agree):
    assert validation._agree(Decimal(a), Decimal(b)) == validation._agree(Decimal(b), Decimal(a)) == agree


# BARS

OLD_README = """\
## FM+_toy_x1

[Environments](#Environments) | [Results](#Results) | [Logs](#Logs)

### Environments

### Code

    python run_expid.py --config ./FM_toy_x1_tuner_config_02 --expid FM_toy_x1_003_c13a1abf --gpu 0

### Results

Total 2 runs:

| Runs | logloss | AUC  |
|:----:|:----:|:----:|
| 1 | 0.443109 | 0.808607  |
| 2 | 0.443109 | 0.808609  |
| Avg | 0.443109 | 0.808608 |
| Std | &#177;0.00000000 | &#177;0.00000100 |

### Logs
```python
2021 INFO [Metrics] logloss: 0.443432 - AUC: 0.808186
2021 INFO [Metrics] logloss: 0.443109 - AUC: 0.808607
```
"""
OLD_LOG = """\
2021 INFO ****** Train/validation evaluation ******
2021 INFO [Metrics] logloss: 0.443432 - AUC: 0.808186
2021 INFO ******** Test evaluation ********
2021 INFO [Metrics] logloss: 0.443109 - AUC: 0.808607
"""
OLD_RESULTS = """\
seed=1, 20210901-115913,[command] python run_expid.py --config x --expid FM_toy_x1_003_3da0082a,\
[exp_id] FM_toy_x1_003_3da0082a,[dataset_id] toy_x1_9ea3bdfc,[train] N.A.,\
[val] logloss: 0.443432 - AUC: 0.808186,[test] logloss: 0.443109 - AUC: 0.808607
seed=2, 20210901-115914,[command] python run_expid.py --config x --expid FM_toy_x1_003_3da0082a,\
[exp_id] FM_toy_x1_003_3da0082a,[dataset_id] toy_x1_9ea3bdfc,[train] N.A.,\
[val] logloss: 0.443432 - AUC: 0.808186,[test] logloss: 0.443109 - AUC: 0.808609
,,,,,,
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout of BARS with one submission in the layout before FuxiCTR 2, with a spreadsheet's line ends."""
    folder = tmp_path / "BARS" / "ranking" / "ctr" / "FM" / "FM+_toy_x1"
    config = folder / "FM_toy_x1_tuner_config_02"
    config.mkdir(parents=True)
    for path, text in {
        folder / "README.md": OLD_README,
        folder / "FM_toy_x1_003_c13a1abf.log": OLD_LOG,
        folder / "results.csv": OLD_RESULTS,
        folder / "environments.txt": "[Software]\nfuxictr: 1.0.2\n\n",
        folder / "run_expid.py": "",
        config / "dataset_config.yaml": "toy_x1_9ea3bdfc:\n    target: !!python/tuple [a, b]\n",
        config / "model_config.yaml": "FM_toy_x1_003_c13a1abf:\n    dataset_id: toy_x1_9ea3bdfc\n",
    }.items():
        path.write_text(text, newline="\r\n")
    return tmp_path / "BARS"


def test_an_old_submission_has_no_defect_but_a_notice_of_its_renamed_runs(checkout):
    targets, findings = validation.validate([checkout])
    assert targets == [checkout / "ranking" / "ctr" / "FM" / "FM+_toy_x1"]
    assert [(finding.path.name, finding.line, finding.kind) for finding in findings] == [
        ("results.csv", 1, UNKNOWN_RUN)
    ]
    assert findings[0].is_notice and "FM_toy_x1_003_3da0082a: not in model_config.yaml" in str(findings[0])


def test_leaderboards_are_compared_with_the_submissions_that_they_link_to(checkout):
    leaderboard = checkout / "docs" / "toy_x1.csv"
    leaderboard.parent.mkdir()
    leaderboard.write_text(
        "Year,Model,AUC,Logloss,Running Steps\n"
        f"2010,mean,0.8086,0.443109,{BARS_URL}/FM/FM%2B_toy_x1\n"
        f"2010,first,0.808607,0.4431,{BARS_URL}/FM/FM+_toy_x1\n"
        f"2010,wrong,0.8076,0.4431,{BARS_URL}/FM/FM+_toy_x1\n"
        f"2010,dead,0.8086,0.4431,{BARS_URL}/FM/FM_toy_x1\n"
        "2010,elsewhere,0.8086,0.4431,https://example.org/FM\n"
    )
    (checkout / "docs" / "recall.csv").write_text(f"Model,Recall@20,Running Steps\nx,0.1,{BARS_URL}/none\n")
    targets, findings = validation.validate([checkout])
    assert targets[0] == leaderboard and len(targets) == 2
    assert [(f.path, f.line, f.kind) for f in findings[:-1]] == [(leaderboard, 4, NUMBERS), (leaderboard, 5, LINK)]
    assert "dead: there is no folder ranking/ctr/FM/FM_toy_x1" in findings[1].message


def test_links_into_the_checkout_are_followed(checkout):
    readme = next(checkout.rglob("README.md"))
    text = readme.read_text().splitlines()
    url = "https://github.com/reczoo/BARS/blob"
    text[1] = f"[a]({url}/main/ranking/ctr) [b]({url}/main/none) [c]({url}/0123abc/none) [d](mailto://x)"
    readme.write_text("\n".join(text))
    defects = [finding for finding in validation.check_submission(readme.parent) if not finding.is_notice]
    assert [(finding.line, finding.message) for finding in defects] == [(2, f"there is no {url}/main/none")]


def test_a_folder_without_a_submission_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        validation.validate([tmp_path / "nowhere"])
    (tmp_path / "README.md").write_text("## x\n")
    with pytest.raises(FileNotFoundError, match="there is no submission in"):
        validation.validate([tmp_path])


def test_a_submission_without_its_two_marks_is_still_one(copy):
    for name in ("results.csv", "environments.txt"):
        (copy / name).unlink()
    targets, findings = validation.validate([copy.parent / "submission"])
    assert targets == [copy]
    assert {(finding.path.name, finding.kind) for finding in findings} == {
        ("results.csv", MISSING),
        ("environments.txt", MISSING),
    }


def test_the_summary_counts_findings_and_the_places_that_have_them(copy, checkout):
    edit(copy, "environments.txt", "fuxictr: 2.3.10", "fuxictr: latest")
    edit(copy, "README.md", "| 1 | 0.701000", "| 1 | 0.701001")
    edit(copy, "README.md", "| 2 | 0.691000", "| 2 | 0.691001")
    table = validation.summary_table(*validation.validate([copy, checkout]))
    counts = dict(zip(table.columns[0].cells, zip(table.columns[1].cells, table.columns[2].cells)))
    assert table.title == "submissions: 2, leaderboards: 0"
    assert {name: count for name, count in counts.items() if count != ("0", "0")} == {
        NUMBERS: ("2", "1"),
        VERSION: ("1", "1"),
        f"{UNKNOWN_RUN} (notice)": ("1", "1"),
    }
