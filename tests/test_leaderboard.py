"""The leaderboard says what the result files say: read back from the page, and in a browser."""

import json
import re
import shutil

import numpy as np
import pytest
from flowctr import leaderboard, results
from flowctr.leaderboard import group_runs, write_leaderboard
from flowctr.results import find_results, read_published
from test_report import DASH, NAMES, Page, values, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COLUMNS = ["experiment", "model", "seeds"]
COSTS = ["parameters, M", "non-embedding, M", "MFLOPs / row", "rows / s", "GiB", "device", "commit"]


def write_seeds(folder, expid, aucs, **changes):
    """Writes a run for each seed, with these test AUCs, and returns the files."""
    folder.mkdir(exist_ok=True)
    files = []
    for seed, auc in enumerate(aucs):
        metrics = {"valid": {}, "test": {"AUC": auc, "gAUC": auc - 0.1, "logloss": 1 - auc, "NE": None}}
        files.append(write_run(folder, expid, **{"seed": seed, "curves": {}, "metrics": metrics, **changes}))
    return files


def write_page(paths, out):
    return Page(write_leaderboard(paths, out))


def rows_of(page):
    """The page's rows as dicts, by experiment or model."""
    found, header = [], []
    for cells in page.rows:
        texts = [text.strip() for text, _ in cells]
        if texts[0] in ("experiment", "model"):
            header = texts
        else:
            found.append(dict(zip(header, texts)))
    return found


# What the table says


def test_a_row_has_mean_and_deviation_over_the_seeds(tmp_path):
    aucs, speeds, memory = [0.71, 0.74, 0.72], [1000.4, 2000.0, 1500.0], [2**30, 3 * 2**30, 2**31]
    for seed, file in enumerate(write_seeds(tmp_path / "results", "InterFormer_test", aucs)):
        result = json.loads(file.read_text())
        result["speed"]["train_rows_per_second"] = speeds[seed]
        result["peak_memory_bytes"]["device"] = memory[seed]
        result |= {"hardware": {"gpu": "A GPU"}, "commit": f"{seed // 2}123456789abcdef-dirty"}
        file.write_text(json.dumps(result))
    write_seeds(tmp_path / "results", "InterFormer_one", [0.9])
    page = write_page([tmp_path], tmp_path / "out")
    assert [text.strip() for text, _ in page.rows[0]] == [*COLUMNS, *NAMES, *COSTS]
    one, three = rows_of(page)  # the best comes first
    deviation = np.std(aucs, ddof=1)
    assert three == {
        "experiment": "InterFormer_test",
        "model": "InterFormer",
        "seeds": "3",
        "AUC": f"{np.mean(aucs):.4f} ± {deviation:.4f}",
        "gAUC": f"{np.mean(aucs) - 0.1:.4f} ± {deviation:.4f}",
        "logloss": f"{1 - np.mean(aucs):.4f} ± {deviation:.4f}",
        "NE": DASH,
        "parameters, M": "1.235",
        "non-embedding, M": "0.08901",
        "MFLOPs / row": "0.05679",
        "rows / s": "1,500",
        "GiB": "3.00",
        "device": "A GPU",
        "commit": "0123456-dirty, 1123456-dirty",
    }
    assert (one["experiment"], one["AUC"], one["seeds"], one["GiB"]) == ("InterFormer_one", "0.9000", "1", "1.50")
    assert (one["device"], one["commit"]) == ("cpu", "c0ffee")


def test_each_task_has_its_columns_and_each_data_set_its_table(tmp_path):
    labels = ("is_click", "is_like")
    two = write_run(tmp_path, "two", labels, curves={})
    other = write_run(tmp_path, "other", dataset_id="another", curves={})
    page = write_page([two, other], tmp_path / "out")
    assert page.source.index("<h2>another</h2>") < page.source.index("<h2>tiny</h2>")
    tiny = [text.strip() for text, _ in page.rows[2]]
    assert tiny[3:15] == [f"{task}{name}" for task in (*labels, "mean") for name in NAMES]
    metrics = json.loads(two.read_text())["metrics"]["test"]
    shown = [text.strip() for text, _ in page.rows[3]][3:15]
    assert shown == [f"{metrics[prefix + name]:.4f}" for prefix in ("is_click_", "is_like_", "") for name in NAMES]


def test_older_results_lack_what_was_not_kept(tmp_path):
    path = tmp_path / "small.json"
    required = {"expid": "one", "model": "DOT", "dataset_id": "tiny", "seed": 1, "labels": ["y"], "metrics": {}}
    path.write_text(json.dumps({"format": 1, **required}))
    (row,) = rows_of(write_page([path], tmp_path / "out"))
    given = {"experiment": "one", "model": "DOT", "seeds": "1"}
    assert row == given | dict.fromkeys([*NAMES, *COSTS], DASH)


def test_significant_wins_are_bold(tmp_path):
    """Of three experiments of several seeds; another one has a single seed, and another one other data."""
    write_seeds(tmp_path, "best", [0.80, 0.81, 0.79])
    write_seeds(tmp_path, "near", [0.70, 0.711, 0.69])
    write_seeds(tmp_path, "far", [0.60, 0.61, 0.591])
    write_seeds(tmp_path, "lucky", [0.9])
    write_seeds(tmp_path, "elsewhere", [0.95, 0.94, 0.96], data={"manifest": "feed" * 16})
    page = write_page([tmp_path], tmp_path / "out")
    bold = {row[0][0].strip(): [text.strip() for text, is_bold in row if is_bold] for row in page.rows[1:]}
    assert bold.pop("best") == ["0.8000 ± 0.0100", "0.7000 ± 0.0100", "0.2000 ± 0.0100"]  # AUC, gAUC; and a low logloss
    assert not any(bold.values()) and len(bold) == 4
    write_seeds(tmp_path, "as good", [0.80, 0.80, 0.80])
    page = write_page([tmp_path], tmp_path / "out")
    assert not any(is_bold for row in page.rows for _, is_bold in row)


def test_settings_tell_experiments_of_one_id_apart(tmp_path):
    config = {"rank": 2, "gates": {"r": 0.5}, "net_dropout": 0.1}
    write_seeds(tmp_path / "a", "one", [0.7, 0.8], config={**config, "gpu": 0, "seed": 5, "model_root": "here"})
    write_seeds(tmp_path / "b", "one", [0.6], config={**config, "gpu": 1, "rank": 4, "gates": {"r": 0.9}})
    write_seeds(tmp_path / "c", "one", [0.5], config=config, data={"manifest": "feed" * 16})
    write_seeds(tmp_path / "d", "two", [0.4], config={"other": 1})
    shown = [(row["experiment"], row["seeds"]) for row in rows_of(write_page([tmp_path], tmp_path / "out"))]
    assert shown == [
        ('one rank 2, gates {"r": 0.5}, data beefbeef', "2"),
        ('one rank 4, gates {"r": 0.9}, data beefbeef', "1"),
        ('one rank 2, gates {"r": 0.5}, data feedfeed', "1"),
        ("two", "1"),
    ]


def test_trials_of_a_search_show_what_it_searched(tmp_path):
    for number, rate in enumerate((0.1, 0.2)):
        config = {"learning_rate": rate, "epochs": 3}
        write_seeds(tmp_path, f"DIN_x1_00{number}_0a1b2c3d4e5f6071", [0.7], config=config)
    shown = [row["experiment"].partition(" ")[2] for row in rows_of(write_page([tmp_path], tmp_path / "out"))]
    assert shown == ["learning_rate 0.1", "learning_rate 0.2"]


def test_the_newest_run_of_a_seed_counts(tmp_path):
    write_seeds(tmp_path / "old", "one", [0.5, 0.6], started="2026-01-01T00:00:00+00:00")
    write_seeds(tmp_path / "new", "one", [0.7], started="2026-01-02T00:00:00+00:00")
    (experiment,) = group_runs(find_results([tmp_path]))
    assert experiment.values("is_click", "AUC").tolist() == [0.7, 0.6]


def test_texts_are_escaped(tmp_path):
    evil = '<script>alert("1")</script> & "'
    metrics = {"valid": {}, "test": values(np.random.default_rng(0), [evil, "like"])}
    changes = {"model": evil, "dataset_id": evil, "commit": evil, "metrics": metrics, "curves": {}}
    for setting in (evil, "plain"):
        folder = tmp_path / setting[:1]
        folder.mkdir()
        write_run(folder, "one", (evil, "like"), config={evil: setting}, **changes)
    page = write_page([tmp_path], tmp_path / "out")
    assert page.tags.count("script") == 2  # its own
    assert {row["experiment"] for row in rows_of(page)} == {f"one {evil} {evil}", f"one {evil} plain"}
    assert all(row["model"] == row["commit"] == evil and f"{evil}AUC" in row for row in rows_of(page))


def test_ids_are_no_paths(tmp_path):
    file = write_run(tmp_path, "one", curves={})
    file.write_text(json.dumps({**json.loads(file.read_text()), "expid": "../../one", "dataset_id": "a/b"}))
    page = write_page([file], tmp_path / "a" / "out")
    (link,) = page.references
    assert re.fullmatch(r"runs/\.\._\.\._one-[0-9a-f]{8}\.html", link) and (tmp_path / "a" / "out" / link).is_file()


# What is found


def test_runs_are_found_in_folders_of_folders_and_in_studies_once(tmp_path):
    deep = tmp_path / "benchmarks" / "Model" / "study" / "results"
    deep.mkdir(parents=True)
    kept = write_seeds(deep, "final", [0.8, 0.7])
    trial = json.loads(write_seeds(tmp_path / "elsewhere", "trial", [0.6])[0].read_text())
    lines = [json.loads(file.read_text()) for file in kept] + [trial]
    for line in lines:
        del line["format"], line["curves"]
    (deep.parent / "runs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (deep / "manifest.json").write_text('{"format": 3, "digest": "00"}')
    (deep / "list.json").write_text("[1, 2]")
    found = find_results([kept[1], tmp_path / "benchmarks"])
    assert [path.name for path, _ in found] == [kept[1].name, kept[0].name, "runs.jsonl"]
    assert found[-1][1] == {"format": 1, **lines[-1]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.json", "AUC: 0.7", r"other\.json is not a result file: no JSON"),
        ("other.json", '{"expid": "one", "format": 99}', r"other\.json has result format 99; .* reads 1"),
        (
            "other.json",
            '{"expid": "one", "format": 1}',
            r"other\.json .* lacks model, dataset_id, seed, labels, m",
        ),
        ("runs.jsonl", '{"expid": "one"', r"runs\.jsonl:1 is not a result: no JSON"),
        ("runs.jsonl", '{"expid": "one", "format": 2}', r"runs\.jsonl:1 has result format 2; .* reads 1"),
        ("published_results.csv", "model,AUC\nFM,0.7\n", r"lacks the columns dataset_id, task, gAUC, logloss, param"),
        (
            "published_results.csv",
            ",".join(results.PUBLISHED_COLUMNS) + "\ntiny,y,FM,0.7,much,,,paper\n",
            r"published_results\.csv:2: could not convert string to float: 'much'",
        ),
    ],
)
def test_a_broken_file_is_one_clear_error_and_the_old_page_stays(tmp_path, name, content, message):
    write_run(tmp_path, curves={})
    before = write_leaderboard([tmp_path], tmp_path / "out").read_bytes()
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_leaderboard([tmp_path], tmp_path / "out")
    assert (tmp_path / "out" / "index.html").read_bytes() == before


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="no results to report on"):
        write_leaderboard([], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no result"):
        write_leaderboard([tmp_path], tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        write_leaderboard([tmp_path / "gone.json"], tmp_path / "out")
    (tmp_path / "plain.json").write_text('{"AUC": 0.7}')
    with pytest.raises(ValueError, match=r"plain\.json is not a result file: it has no `format`"):
        write_leaderboard([tmp_path / "plain.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


PUBLISHED = """dataset_id,task,model,gAUC,AUC,logloss,parameters,source
tiny,is_click,FM,0.61,0.71,,4230000,A paper
tiny,is_like,FM,,0.81,,4230000,A paper
tiny,is_click,DIN,0.62,0.72,0.31,,Another paper
other,is_click,DIN,0.5,0.5,0.5,,A third paper
"""


def test_published_rows_stand_apart_with_their_source(tmp_path):
    (tmp_path / "published_results.csv").write_text(PUBLISHED)
    write_run(tmp_path, "two", ("is_click", "is_like"), curves={})
    page = write_page([tmp_path], tmp_path / "out")
    assert page.tags.count("table") == 2 and page.source.index("Reported elsewhere") > page.source.index(">two<")
    assert [row["source"] for row in rows_of(page) if "source" in row] == ["Another paper", "A paper"]
    header, din, fm = [[text.strip() for text, _ in row] for row in page.rows[-3:]]
    columns = [f"{task}{name}" for task in ("is_click", "is_like") for name in ("AUC", "gAUC", "logloss")]
    assert header == ["model", *columns, "parameters, M", "source"]
    assert din == ["DIN", "0.7200", "0.6200", "0.3100", *[DASH] * 3, DASH, "Another paper"]
    assert fm == ["FM", "0.7100", "0.6100", DASH, "0.8100", *[DASH] * 2, "4.23", "A paper"]
    named = write_page([tmp_path, tmp_path / "published_results.csv"], tmp_path / "again")
    assert named.rows == page.rows


def test_the_published_rows_of_this_repository_are_complete():
    published = read_published(leaderboard.Path(__file__).parent.parent / "benchmarks" / "published_results.csv")
    bars = [row for row in published if row.source.startswith("BARS")]
    assert len(bars) == 4 * 16 and all(set(row.metrics) == {"AUC", "gAUC", "logloss"} for row in bars)
    assert all(row.source and row.metrics and 0 < row.metrics["AUC"] < 1 for row in published)
    keys = [(row.dataset_id, row.task, row.model, row.source) for row in published]
    assert len(set(keys)) == len(keys)


# Plots and pages


def test_ablations_and_sweeps_are_drawn_with_their_deviation(tmp_path):
    config = {"rank": 2, "gate": 0.5}
    write_seeds(tmp_path, "A", [0.7, 0.72], config=config)
    write_seeds(tmp_path, "A_no_gates", [0.6, 0.62], config={**config, "gates": False})
    write_seeds(tmp_path, "A_001_0a1b2c3d", [0.6, 0.62], config={**config, "rank": 9})  # a trial of a search
    write_seeds(tmp_path, "A_alone", [0.6], config={**config, "gates": False})  # one seed says nothing
    for rank in (16, 4, None):
        write_seeds(tmp_path / f"rank{rank}", "A", [0.65, 0.67], config={**config, "rank": rank})
    write_seeds(tmp_path / "both", "A", [0.5, 0.52], config={"rank": 5, "gate": 0.1})  # two things differ
    page = write_page([tmp_path], tmp_path / "out")
    assert page.plots == ["ablations of A", "rank of A"]
    ticks = ("as it is", "no_gates", "001_0a1b2c3d", "alone", "2", "4", "16", "default")
    assert [text for text in page.drawn if text in ticks] == ["as it is", "no_gates", "2", "4", "16", "default"]
    assert page.drawn.count("test AUC, is_click") == 2


def test_links_lead_to_pages_that_need_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "MAX_PAGES", 2)
    curves = {"train": [{"step": 1, "epoch": 1, "loss": 0.5}, {"step": 2, "epoch": 1, "loss": 0.4}], "valid": []}
    write_seeds(tmp_path, "plain", [0.9])
    write_seeds(tmp_path, "best", [0.8, 0.7], curves=curves)
    write_seeds(tmp_path, "other", [0.6], curves=curves)
    out = tmp_path / "out"
    page = write_page([tmp_path], out)
    links = [link for link in page.references if not link.startswith("#")]
    assert [re.sub("-[0-9a-f]{8}", "", link) for link in links] == [
        *("runs/best.html", "runs/other.html", "runs/compare-tiny.html"),
    ]
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.html")} == {"index.html", *links}
    best, _, comparison = (Page(out / link) for link in links)
    assert "best, seed 0" in best.source.replace("&nbsp;", " ") and "other" not in best.source
    assert "training loss against step" in comparison.plots and "other" in comparison.source
    for linked in (page, best, comparison):
        outside = [link for link in linked.references if "//" in link]
        assert not outside and not {"link", "iframe", "object", "img"} & set(linked.tags)
        assert "@import" not in linked.source and "url(http" not in linked.source
    assert write_leaderboard([tmp_path], tmp_path / "again").read_bytes() == (out / "index.html").read_bytes()


def test_two_thousand_rows_are_less_than_three_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "MAX_PAGES", 1)
    labels = ("is_click", "is_like", "long_view")
    result = json.loads(write_run(tmp_path, "InterFormer_kuairand_pure_window", labels, curves={}).read_text())
    lines = []
    for seed in range(2):  # the widest cells: mean and deviation
        for trial in range(2000):
            config = {key: trial * 1e-3 for key in ("learning_rate", "net_dropout", "embedding_regularizer", "rank")}
            expid = f"{result['expid']}_{trial:03d}_0a1b2c3d4e5f6071"
            metrics = {"test": {name: value + 1e-6 * trial for name, value in result["metrics"]["test"].items()}}
            metrics["test"]["AUC"] += seed * 1e-3
            lines.append({**result, "expid": expid, "seed": seed, "config": config, "metrics": metrics})
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = write_leaderboard([tmp_path], tmp_path / "out")
    assert path.read_text().count("<tr>") == 2000 + 1 + 1
    assert path.stat().st_size < 3e6


# In a browser


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def board(tmp_path, browser):
    """The page of two data sets in a browser, and what it has complained of."""
    labels = ("is_click", "is_like")

    def metrics(click, like):
        by_label = {"is_click": click, "is_like": like}
        test = {f"{label}_{name}": auc for label, auc in by_label.items() for name in NAMES}
        return {"valid": {}, "test": {**test, **dict.fromkeys(NAMES, (click + like) / 2)}}

    models = (("DIN", 0.7, 0.9, 2e6), ("DCN", 0.8, 0.6, 3e8), ("AFM", 0.6, None, 1e6))
    for model, click, like, total in models:
        given = metrics(click, like) if like else {"valid": {}, "test": dict.fromkeys(NAMES, click)}
        costs = {
            "parameters": {"total": total, "non_embedding": total / 10},
            "speed": {"train_rows_per_second": 1e9 / total},
        }
        own = labels if like else labels[:1]
        write_run(tmp_path, f"{model}_a", own, model=model, metrics=given, curves={}, **costs)
    write_seeds(tmp_path, "DIN_b", [0.55, 0.65], model="DIN", dataset_id="another")
    (tmp_path / "published_results.csv").write_text(PUBLISHED)
    path = write_leaderboard([tmp_path], tmp_path / "out")
    page = browser.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    assert page.complaints == []
    page.close()


def visible_rows(page, table=".board"):
    """The texts of the cells that are shown, row by row; none of a hidden row."""
    return page.evaluate(
        """table => [...document.querySelectorAll(`${table} tbody tr`)].map(row =>
            [...row.cells].filter(cell => cell.getClientRects().length).map(cell => cell.innerText))""",
        table,
    )


def experiments(page):
    return [row[0] for row in visible_rows(page) if row]


def column(page, table, name):
    return page.locator(f"{table} thead th", has_text=re.compile(f"{name}$")).locator("visible=true").locator("button")


def test_a_click_sorts_by_a_column(board):
    (order,) = board.locator("#board-2 [aria-sort]").all()
    assert re.sub(r"\s+", " ", order.inner_text()) == "mean AUC" and order.get_attribute("aria-sort") == "descending"
    assert experiments(board) == ["DIN_b", "DIN_a", "DCN_a", "AFM_a"]  # by AUC; the one without a mean is last
    for clicks, expected in enumerate((["AFM_a", "DIN_a", "DCN_a"], ["DCN_a", "DIN_a", "AFM_a"])):
        column(board, "#board-2", "parameters, M").click()
        assert experiments(board)[1:] == expected, clicks  # as numbers: 1, 2, 300
    column(board, "#board-2", "rows / s").click()
    assert [row[-4] for row in visible_rows(board)[1:]] == ["1,000", "500", "3"]
    column(board, "#board-2", "experiment").click()
    assert experiments(board)[1:] == ["AFM_a", "DCN_a", "DIN_a"]
    for _ in range(2):  # what is missing stays last
        column(board, "#board-2", "AUC").first.click()
        assert experiments(board)[-1] == "AFM_a"
    assert board.locator("#board-2 [aria-sort]").count() == 1


def test_filters_choose_data_set_task_metric_and_text(board):
    form = board.locator("form")
    assert form.locator("output").inner_text() == "4 of 4 experiments"
    form.locator("[name=dataset]").select_option("tiny")
    assert experiments(board) == ["DIN_a", "DCN_a", "AFM_a"]
    form.locator("[name=task]").select_option("is_click")
    form.locator("[name=metric]").select_option("AUC")
    header = [text.strip() for text in board.locator("#board-2 thead th").locator("visible=true").all_inner_texts()]
    assert [re.sub(r"\s+", " ", text) for text in header] == [*COLUMNS, "is_click AUC", *COSTS]
    assert [row[3] for row in visible_rows(board) if row] == ["0.7000", "0.8000", "0.6000"]
    assert [row[:2] for row in visible_rows(board, ".published")] == [["DIN", "0.7200"], ["FM", "0.7100"]]
    form.locator("[name=task]").select_option("is_like")
    assert experiments(board) == ["DIN_a", "DCN_a"]  # the third has no such task
    form.locator("[name=search]").fill("din tiny_none")
    board.wait_for_function("document.querySelector('output').textContent.startsWith('0 ')")
    form.locator("[name=search]").fill("c0ffee dcn")
    board.wait_for_function("document.querySelector('output').textContent.startsWith('1 ')")
    assert experiments(board) == ["DCN_a"]


def test_plots_follow_the_filters(board):
    def plots():
        found = board.locator("#board-2").locator("xpath=ancestor::section").locator(".plots svg[role=img]")
        return [(svg.get_attribute("aria-label"), svg.locator("title").all_text_contents()) for svg in found.all()]

    names = ["parameters, M", "non-embedding, M", "MFLOPs / row", "rows / s"]
    assert plots() == [(f"AUC, mean against {name}", ["DIN_a: 0.8", "DCN_a: 0.7"]) for name in names]
    texts = board.locator("svg[aria-label='AUC, mean against parameters, M'] text").all_text_contents()
    assert [text for text in texts if not text.startswith("0.")][:-2] == ["2", "5", "10", "20", "50", "100", "200"]
    board.locator("[name=task]").select_option("is_click")
    board.locator("[name=metric]").select_option("gAUC")
    board.wait_for_function("document.querySelector('section:last-of-type .plots svg[aria-label^=gAUC]')")
    titles = ["DIN_a: 0.7", "DCN_a: 0.8", "AFM_a: 0.6"]
    assert plots() == [(f"gAUC, is_click against {name}", titles) for name in names]


def test_a_phone_shows_it_without_moving_the_page_sideways(board):
    board.set_viewport_size({"width": 390, "height": 844})
    assert board.evaluate("document.documentElement.scrollWidth") == 390
    assert column(board, "#board-2", "experiment").is_visible()
    assert column(board, "#board-2", "model").count() == 0  # the first metric stands in its place


def test_without_scripts_it_is_a_plain_table(tmp_path, browser):
    write_seeds(tmp_path, "one", [0.7])
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(write_leaderboard([tmp_path], tmp_path / "out").as_uri())
    (row,) = visible_rows(page)
    assert row[0] == "one" and row[3] == "0.7000" and not page.locator("form").is_visible()
    page.close()
