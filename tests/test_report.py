"""The report says what the result files say: parsed back from the page and compared."""

import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from flowctr.report import Run, _curve, metrics_table
from flowctr.report import write_report as write_report_of
from flowctr.results import read_result
from rich.console import Console
from toy import damage

DASH = "–"
NAMES = ("AUC", "gAUC", "logloss", "NE")
EDITED = (
    '{"format": 1, "expid": "one", "model": "DIN", "dataset_id": "tiny", '
    '"seed": %s, "labels": %s, "metrics": %s, "config": %s}'
)


class Page(HTMLParser):
    """Collects table cells as (text, is bold), definition lists, texts drawn in SVG, captions, and references."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.rows, self.facts, self.drawn = [], [], [], []
        self.tags, self.captions, self.references, self.plots = [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.plots += [dict(attributes)["aria-label"]] if tag == "svg" and "aria-label" in dict(attributes) else []
        if tag in ("meta", "line", "path", "rect", "use", "image"):
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(["", False])
        elif tag == "dt":
            self.facts.append(["", ""])
        elif tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1][0] += data
            self.rows[-1][-1][1] |= "b" in self.open
        elif "dt" in self.open:
            self.facts[-1][0] += data
        elif "dd" in self.open:
            self.facts[-1][1] += data
        elif "text" in self.open:
            self.drawn.append(data)
        elif "figcaption" in self.open:
            self.captions[-1] += data

    def row(self, name: str) -> list[tuple[str, bool]]:
        """The cells of a run, those of one label after the other."""
        return [(text.strip(), bold) for row in self.rows if name in row[0][0] for text, bold in row[1:]]


def values(rng: np.random.Generator, labels: list[str]) -> dict[str, float]:
    names = NAMES if len(labels) == 1 else [*(f"{label}_{name}" for label in labels for name in NAMES), *NAMES]
    return {name: float(rng.uniform(0.4, 0.9)) for name in names}


def write_run(
    folder: Path, expid: str = "InterFormer_test", labels: tuple[str, ...] = ("is_click",), **changes
) -> Path:
    rng = np.random.default_rng(abs(hash(expid)) % 1000)
    labels = list(labels)
    result = {
        "format": 1,
        "expid": expid,
        "model": "InterFormer",
        "dataset_id": "tiny",
        "seed": 7,
        "started": "2026-01-02T03:04:05+00:00",
        "command": f"python run_expid.py --expid {expid}",
        "config": {"embedding_dim": 16, "net_dropout": 0.25, "behaviors": {"watch": ["video", "author"]}},
        "labels": labels,
        "metrics": {"valid": values(rng, labels), "test": values(rng, labels)},
        "ne_base": "train",
        "curves": {
            "train": [{"step": 10 * i, "epoch": 0, "loss": 1 / (i + 1)} for i in range(1000)],
            "valid": [{"step": 100 * i, "epoch": i, **values(rng, labels)} for i in (1, 2, 3)],
        },
        "parameters": {"total": 1234567, "non_embedding": 89012},
        "speed": {"train_rows_per_second": 23456.4, "evaluate_rows_per_second": 98765.4},
        "flops_per_row": 56789.2,
        "wall_seconds": 3725.2,
        "peak_memory_bytes": {"host": 3 * 2**29, "device": None},
        "device": "cpu",
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "fuxictr": {"version": "2.3.10", "sha256": "f00d" * 16},
        "commit": "c0ffee",
        "data": {"manifest": "beef" * 16},
        "attention": None,
    } | changes
    path = folder / f"{expid}-s{result['seed']}-20260102-030405.json"
    path.write_text(json.dumps(result))
    return path


def write_attention(folder: Path, name: str, size: int = 3, names: list[str] | None = None) -> str:
    names = names or [f"token_{i}" for i in range(size)]
    weights = np.random.default_rng(size).dirichlet(np.ones(len(names)), size=len(names)).astype(np.float32)
    np.savez(folder / name, **{"layer_0.mha": weights, "layer_0.mha__rows": names, "layer_0.mha__cols": names})
    return name


def write_report(files: list[Path], folder: Path) -> Path:
    return write_report_of([(path, read_result(path)) for path in files], folder / "index.html")


def expected_cells(path: Path, prefixes: list[str]) -> list[str]:
    metrics = json.loads(path.read_text())["metrics"]
    splits = metrics["valid"], metrics["test"]
    return [f"{split[prefix + name]:.6f}" for prefix in prefixes for split in splits for name in NAMES]


def test_table_holds_the_values_of_the_results(tmp_path):
    labels = ("is_click", "long_view")
    files = [write_run(tmp_path, expid, labels) for expid in ("one", "two")]
    page = Page(write_report(files, tmp_path / "out"))
    for expid, path in zip(("one", "two"), files):
        assert [text for text, _ in page.row(expid)] == expected_cells(path, ["is_click_", "long_view_", ""])
    headers = [[text.strip() for text, _ in row] for row in page.rows]
    assert headers[:2] == [["run", "valid", "test"], list(NAMES) * 2]
    assert [row for row in headers if len(row) == 1] == [["is_click"], ["long_view"], ["mean"]]
    assert "base: train" in page.source


def test_each_data_set_has_its_own_table_and_every_run_its_color(tmp_path):
    files = [write_run(tmp_path, "one"), write_run(tmp_path, "two", ("like",), dataset_id="other")]
    page = Page(write_report(files, tmp_path))
    assert page.tags.count("table") == 2
    for expid, path in zip(("one", "two"), files):
        assert page.row(expid) == [(text, False) for text in expected_cells(path, [""])]  # nothing to compare: no bold
    assert page.plots.count("training loss against step") == 2
    drawn_in = [svg.split("</svg>")[0] for svg in page.source.split("<svg")[1:] if "training loss" in svg]
    for color, svg in enumerate(drawn_in):
        assert re.findall(r"var\(--run-\d\)", svg) == [f"var(--run-{color})"]


def test_single_runs_are_not_called_best(tmp_path):
    """A win is marked only where it is significant, which single runs do not tell."""
    nan = float("nan")
    rows = {"one": (0.7, nan, 0.5, None), "two": (0.8, 0.6, 0.4, 0.9)}
    files = [
        write_run(tmp_path, expid, metrics={"valid": dict(zip(NAMES, row)), "test": {}}) for expid, row in rows.items()
    ]
    page = Page(write_report(files, tmp_path))
    missing = [(DASH, False)] * 4
    assert page.row("one") == [("0.700000", False), ("nan", False), ("0.500000", False), (DASH, False), *missing]
    assert page.row("two") == [(f"{value:.6f}", False) for value in rows["two"]] + missing
    assert "No run is marked as best" in page.source
    assert "No run is marked as best" not in write_report(files[:1], tmp_path).read_text()


def test_single_and_multi_label_runs_compare_on_the_label_they_share(tmp_path):
    one = write_run(tmp_path, "one", ("like",))
    two = write_run(tmp_path, "two", ("click", "like"))
    page = Page(write_report([one, two], tmp_path))
    only, both = expected_cells(one, [""]), expected_cells(two, ["like_", "click_", ""])
    assert [text for text, _ in page.row("one")] == [*only, *[DASH] * 16]
    assert [text for text, _ in page.row("two")] == both
    assert "validation AUC, like against step" in page.plots and "validation AUC, mean against step" in page.plots


def test_provenance_and_configuration_are_listed(tmp_path):
    path = write_run(tmp_path, "one")
    facts = dict(Page(write_report([path], tmp_path)).facts)
    expected = {
        "command": "python run_expid.py --expid one",
        "seed": "7",
        "data set": "tiny",
        "data manifest": "beef" * 16,
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "c0ffee",
        "fuxictr version": "2.3.10",
        "fuxictr sha256": "f00d" * 16,
        "versions": "python 3.11.2, torch 2.13.0",
        "device": "cpu",
        "parameters, total": "1,234,567",
        "parameters, non-embedding": "89,012",
        "rows/s, training": "23,456",
        "rows/s, evaluation": "98,765",
        "FLOPs per row, forward": "56,789",
        "wall time": "1:02:05",
        "peak memory, host": "1.50 GiB",
        "peak memory, device": DASH,
        "NE base": "train",
        "result file": path.name,
        "attention maps": DASH,
        "embedding_dim": "16",
        "net_dropout": "0.25",
        "behaviors": '{"watch": ["video", "author"]}',
    }
    assert facts == expected


def test_result_with_only_the_required_keys_shows_dashes(tmp_path):
    path = tmp_path / "small.json"
    required = {"expid": "one", "model": "DOT", "dataset_id": "tiny", "seed": 1, "labels": ["y"], "metrics": {}}
    path.write_text(json.dumps({"format": 1, **required}))
    page = Page(write_report([path], tmp_path))
    assert page.row("one") == [(DASH, False)] * 8
    assert page.plots == []
    given = {"seed": "1", "data set": "tiny", "result file": "small.json"}
    assert all(value == given.get(name, DASH) for name, value in page.facts)


def test_texts_are_escaped(tmp_path):
    evil = '<script>alert("1")</script> & $x_1$'
    attention = write_attention(tmp_path, "maps.npz", names=["<b>$a$</b>", "&amp;", "c"])
    changes = {"model": evil, "dataset_id": evil, "command": evil, "config": {evil: evil}, "attention": attention}
    path = write_run(tmp_path, "one", (evil, "like"), **changes)
    page = Page(write_report([path], tmp_path))
    assert not {"script", "b"} & set(page.tags)
    assert ["command", evil] in page.facts and [evil, evil] in page.facts
    assert evil in [text for row in page.rows for text, _ in row]
    assert {"<b>$a$</b>", "&amp;", "c", f"validation AUC, {evil}"} <= set(page.drawn)


def test_attention_maps_are_drawn_with_few_ticks(tmp_path):
    attention = write_attention(tmp_path, "maps.npz", size=100)
    page = Page(write_report([write_run(tmp_path, "one", attention=attention)], tmp_path))
    assert "layer_0.mha" in page.captions
    assert page.plots[-1] == "heatmap of layer_0.mha: 100 queries by 100 keys"
    assert [text for text in page.drawn if text.startswith("token_")] == [f"token_{i}" for i in range(0, 100, 5)] * 2
    assert {"query", "key", "attention weight", "step", "training loss"} <= set(page.drawn)


def test_long_names_leave_room_for_an_attention_map_of_one_row(tmp_path):
    attention = write_attention(tmp_path, "maps.npz", names=["cate_history attended to"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a map is left no height
        page = Page(write_report([write_run(tmp_path, "one", attention=attention)], tmp_path))
    assert page.drawn.count("cate_history attend…") == 2


def test_missing_attention_file_is_said_and_the_rest_reported(tmp_path):
    path = write_run(tmp_path, "one", attention="gone.npz")
    page = Page(write_report([path], tmp_path))
    assert ["attention maps", "gone.npz (not found)"] in page.facts
    assert [text for text, _ in page.row("one")] == expected_cells(path, [""])


@pytest.mark.parametrize("how", ["cut", "stream", "method"])
def test_broken_attention_file_is_named(tmp_path, how):
    np.savez_compressed(tmp_path / "maps.npz", block=np.random.default_rng(0).random(300))
    if how == "cut":
        (tmp_path / "maps.npz").write_bytes(b"PK\x03\x04 cut off")
    else:
        damage(tmp_path / "maps.npz", how)
    with pytest.raises(ValueError, match=r"maps\.npz is not a file of attention maps"):
        write_report([write_run(tmp_path, attention="maps.npz")], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("AUC: 0.7", r"other\.json is not a result file: no JSON"),
        ("[1, 2]", r"other\.json is not a result file: it has no `format`"),
        ('{"AUC": 0.7}', r"other\.json is not a result file: it has no `format`"),
        ('{"format": 99}', r"other\.json has result format 99; this version of flowctr reads 1"),
        ('{"format": 1, "expid": "one", "seed": 1}', r"other\.json .* lacks model, dataset_id, labels, metrics"),
        (EDITED % ('"1"', '["y"]', "{}", "{}"), r"other\.json is not a result file of format 1: `seed` is '1', no int"),
        (
            EDITED % ("1", '"y"', "null", "[1]"),
            r"`labels` is 'y', no list; `metrics` is None, .*; `config` is \[1\]",
        ),
        (
            EDITED % ("1", "[]", '{"test": {"AUC": "high"}}', "null"),
            r"`labels` is \[\], .*; the test metrics are not",
        ),
    ],
)
def test_foreign_file_is_one_clear_error_and_the_old_page_stays(tmp_path, content, message):
    good = write_run(tmp_path)
    before = write_report([good], tmp_path).read_bytes()
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report([good, tmp_path / "other.json"], tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        write_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_page_is_small_self_contained_and_the_only_file(tmp_path):
    files = []
    for i in range(6):
        attention = write_attention(tmp_path, f"run{i}.npz", size=100)
        files.append(write_run(tmp_path, f"run{i}", ("is_click", "long_view", "is_like"), attention=attention))
    out = tmp_path / "new" / "report"
    path = write_report(files, out)
    page = Page(path)
    assert path == out / "index.html" and list(out.iterdir()) == [path]
    assert path.stat().st_size < 2e6
    assert page.references and all(reference.startswith(("#", "data:image/png;")) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "@import" not in page.source and "url(http" not in page.source
    assert write_report(files, tmp_path / "again").read_bytes() == path.read_bytes()


def test_long_curve_is_averaged_over_neighbours(tmp_path):
    train = [{"step": i, "epoch": 0, "loss": i % 7} for i in range(4000)]
    path = write_run(tmp_path, curves={"train": train})
    curve = _curve(Run(1, path, json.loads(path.read_text())), "train", "loss")
    expected = [(np.mean(range(i, i + 20)), np.mean([k % 7 for k in range(i, i + 20)])) for i in range(0, 4000, 20)]
    np.testing.assert_allclose(curve, expected)


def test_metrics_table(tmp_path):
    labels = ["is_click", "[red]like[/red]"]
    result = json.loads(write_run(tmp_path, labels=tuple(labels)).read_text())
    del result["metrics"]["test"]["gAUC"]
    table = metrics_table(result)
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    rows = [cells for cells in lines if len(cells) == 6]
    assert [column.header for column in table.columns] == ["split", "label", *NAMES]
    expected = []
    for split in ("valid", "test"):
        for label in [*labels, "mean"]:
            keys = [name if label == "mean" else f"{label}_{name}" for name in NAMES]
            shown = [result["metrics"][split].get(key) for key in keys]
            expected.append([split, label, *(DASH if value is None else f"{value:.6f}" for value in shown)])
    assert rows == expected
    assert "NE base: train" in console.file.getvalue()


def scenario_metrics(rng: np.random.Generator, labels: list[str], suffixes: list[str]) -> dict[str, float]:
    plain = values(rng, labels)
    within = {
        f"{label}_{name}@{s}": float(rng.uniform(0.4, 0.9)) for s in suffixes for label in labels for name in NAMES
    }
    return {**plain, **within, **{f"{name}@tab": float(rng.uniform(0.4, 0.9)) for name in NAMES}}


def test_scenarios_have_their_own_rows(tmp_path):
    labels, rng = ("is_click", "long_view"), np.random.default_rng(0)
    metrics = {split: scenario_metrics(rng, list(labels), ["tab", "tab=1", "tab=0"]) for split in ("valid", "test")}
    with_scenarios = write_run(tmp_path, "AutoIFS_test", labels, metrics=metrics)
    page = Page(write_report([write_run(tmp_path, labels=labels), with_scenarios], tmp_path / "report"))
    shown = {}
    for row in page.rows:
        name, *cells = (text.strip() for text, _ in row)
        shown.setdefault(name, []).append(cells)
    over_scenarios = [[f"{metrics[split][f'{m}@tab']:.6f}" for split in ("valid", "test") for m in NAMES]]
    runs = [name for name in shown if "AutoIFS_test" in name]
    assert over_scenarios[0] in shown[runs[0]], "the mean over labels and scenarios"
    assert len(shown[runs[0]]) == 6, "two labels and their mean, plain and over scenarios"
    (other,) = [name for name in shown if "InterFormer_test" in name]
    assert len(shown[other]) == 3, "no rows of dashes for a run without scenarios"
    for label in labels:
        for tab in "10":
            cells = [f"{metrics[s][f'{label}_{m}@tab={tab}']:.6f}" for s in ("valid", "test") for m in NAMES]
            assert shown[f"{label}@tab={tab}"] == [cells]


def test_kept_flows_and_earlier_stages_are_drawn(tmp_path):
    kept = {
        "scenario": "tab",
        "scenarios": ["1", "0"],
        "labels": ["is_click", "long_view"],
        "flows": ["shared to shared", "scenario to task"],
        "kept": [[[0.13, 0.27], [0.31, 0.47]], [[0.53, 0.69], [0.71, None]]],
    }
    stages = {"search": {"curves": {"train": [{"step": 4, "epoch": 1, "loss": 50.0}], "valid": []}}}
    run = write_run(tmp_path, kept_flows=kept, stages=stages, curves={})  # no ticks of curves among the shares
    page = Page(write_report([run], tmp_path / "report"))
    assert {"tab=1", "tab=0", "shared to shared", "scenario to task", "is_click", "long_view"} <= set(page.drawn)
    shown = ["0.13", "0.27", "0.53", "0.69", "0.31", "0.47", "0.71", "nan"]  # a panel per label, scenarios by flows
    assert [text for text in page.drawn if text in shown] == shown
    assert "training loss, search against step" in page.plots
