"""Spaces, ids, ledgers and strategies: what a search decides before and between its trials."""

import itertools
import json
import random
import re

import pytest
import yaml
from flowctr import config
from flowctr.tuning import Ledger, canonical, canonical_id, read_space
from flowctr.tuning.space import known_trials, write_configs
from flowctr.tuning.strategies import Listed, Optuna, draw, make_strategy
from hypothesis import given, settings
from hypothesis import strategies as st

EXPERIMENT = """
Base:
    model: DOT
    metrics: [AUC, logloss]
    optimizer: adam
    loss: binary_crossentropy
    learning_rate: 1e-3
    batch_size: 64
    epochs: 1
    seed: 7
    monitor: {AUC: 1, logloss: -0.5}
    model_root: ./checkpoints/

DOT_small:
    dataset_id: tiny
    early_stop_patience: 2

DOT_default:
    dataset_id: TBD
"""
DATASET = """
tiny:
    data_root: data
    data_format: csv
    train_data: data/train.csv
    valid_data: data/valid.csv
    test_data: data/valid.csv
    min_categr_count: 1
    feature_cols: [{name: [item, cate], active: true, dtype: str, type: categorical}]
    label_col: {name: click, dtype: float}
"""
SPACE = {"learning_rate": [1e-3, 1e-2], "embedding_dim": [4, 8, 16], "net_dropout": 0.1}


@pytest.fixture
def folder(tmp_path):
    """A model's folder with an experiment and a data set."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "model_config.yaml").write_text(EXPERIMENT)
    (tmp_path / "config" / "dataset_config.yaml").write_text(DATASET)
    return tmp_path


def write_space(folder, values=None, **others):
    path = folder / "config" / "tuner.yaml"
    content = {"base_expid": "DOT_small", "tuner_space": SPACE if values is None else values, **others}
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}, sort_keys=False))
    return path


def a_space(folder, values=None, **others):
    return read_space(write_space(folder, values, **others))


# ids

SETTINGS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


def shuffled(value, generator):
    """Gives an equal value whose keys are in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(item, generator)) for key, item in value.items()]
        generator.shuffle(items)
        return dict(items)
    return [shuffled(item, generator) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(max_size=4), SETTINGS, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value, generator):
    assert canonical_id(shuffled(value, generator)) == canonical_id(value)


KNOWN_IDS = {}


@settings(max_examples=20, deadline=None)
@given(st.integers())
def test_100000_random_configurations_do_not_collide(seed):
    """20 times 5,000, which differ in as little as configurations do."""
    generator = random.Random(seed)
    for _ in range(5000):
        value = {
            "max_len": generator.randrange(1000),
            "hidden_units": [generator.randrange(100) for _ in range(3)],
            "learning_rate": generator.random(),
            "option": generator.choice([True, None, 1, 1.0, "1"]),
        }
        text = canonical(value)
        assert KNOWN_IDS.setdefault(canonical_id(value), text) == text


@pytest.mark.parametrize(
    "values",
    [
        (12, 21),
        (1, 1.0, "1", True, None, "None"),
        ([1, 2], [2, 1], (1, 2), {"1": 2}, {1: 2}),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({"a": {"b": 1}}, {"a": None, "b": 1}),
        ("[1]", [1], ["1"]),
    ],
)
def test_what_differs_has_another_id(values):
    for a, b in itertools.combinations(values, 2):
        assert canonical_id({"x": a}) != canonical_id({"x": b}), (a, b)


def test_ids_are_the_same_on_every_machine():
    assert canonical({"b": [1, 1.0, None], "a": (True, "é")}) == '{"a":(true,"\\u00e9"),"b":[1,1.0,null]}'
    assert canonical_id({"b": [1, 1.0, None], "a": (True, "é")}) == "dc955815d91185c5"


# spaces


def test_a_grid_has_every_combination_once_and_the_last_key_changes_first(folder):
    space = a_space(folder)
    trials = [space.trial(i + 1) for i in range(len(space))]
    assert [tuple(trial.settings.values()) for trial in trials] == list(
        itertools.product([1e-3, 1e-2], [4, 8, 16], [0.1])
    )
    assert [trial.number for trial in trials] == [1, 2, 3, 4, 5, 6]
    assert all(re.fullmatch(rf"DOT_small_{t.number:03d}_[0-9a-f]{{8}}", t.expid) for t in trials)
    assert all(space.find(trial.expid) == trial for trial in trials)
    assert [space.number({"learning_rate": i, "embedding_dim": j}) for i in range(2) for j in range(3)] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    assert space.find("DOT_small_001_00000000") is None and space.find("DOT_small_007_00000000") is None


def test_a_trial_is_the_base_experiment_with_its_settings(folder):
    space = a_space(folder)
    trial = space.trial(5)
    base = {**yaml.safe_load(EXPERIMENT)["Base"], **yaml.safe_load(EXPERIMENT)["DOT_small"], "learning_rate": 1e-2}
    assert trial.model == {**base, "embedding_dim": 8, "net_dropout": 0.1}
    write_configs(space.folder, [trial])
    params = config.load(space.folder, trial.expid)
    assert params["train_data"] == str(folder / "data" / "train.csv")  # the same file as in the base's folder
    assert params["data_root"] == str(folder / "data")
    assert (params["embedding_dim"], params["learning_rate"], params["dataset_id"]) == (8, 1e-2, "tiny")


def test_ids_follow_from_the_configuration_and_not_from_the_place(folder, tmp_path_factory):
    first = a_space(folder).trial(1)
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("model_config.yaml", "dataset_config.yaml"):
        (other / "config").mkdir(exist_ok=True)
        (other / "config" / name).write_text((folder / "config" / name).read_text())
    assert a_space(other).trial(1).expid == first.expid
    path = folder / "config" / "model_config.yaml"
    path.write_text(path.read_text().replace("early_stop_patience: 2", "early_stop_patience: 4"))
    assert a_space(folder).trial(1).expid != first.expid


def test_a_data_set_of_other_settings_has_another_name(folder):
    space = a_space(folder, {"min_categr_count": [1, 12, 21], "learning_rate": [1e-3, 1e-2]})
    trials = [space.trial(i + 1) for i in range(6)]
    names = [trial.dataset["dataset_id"] for trial in trials]
    assert names[:2] == ["tiny", "tiny"]  # what the space does not change keeps its name
    assert names[2] == names[3] != names[4] == names[5]
    assert all(re.fullmatch("tiny_[0-9a-f]{8}", name) for name in names[2:])
    assert all(trial.model["dataset_id"] == name and "min_categr_count" not in trial.model for trial, name in
               zip(trials, names))  # fmt: skip
    write_configs(space.folder, trials)
    assert [config.load(space.folder, t.expid)["min_categr_count"] for t in trials] == [1, 1, 12, 12, 21, 21]


def test_fuxictrs_own_forms_are_read(folder):
    """Entries within the YAML, TBD for the data set, a list of lists, a mapping as the only value."""
    own = {"other": {**yaml.safe_load(DATASET)["tiny"], "min_categr_count": 3}}
    space = a_space(
        folder,
        {"head_hidden_units": [[64, 32]], "monitor": {"AUC": 1}, "embedding_dim": 8},
        base_expid="DOT_default",
        dataset_id="other",
        dataset_config=own,
    )
    assert len(space) == 1
    trial = space.trial(1)
    assert trial.expid.startswith("DOT_other_001_")
    assert trial.model["head_hidden_units"] == [64, 32] and trial.model["dataset_id"] == "other"
    assert trial.dataset["min_categr_count"] == 3 and trial.dataset["train_data"] == "../data/train.csv"
    assert space.value({"AUC": 0.75, "logloss": 0.5}) == 0.75
    space.check()
    model = {**yaml.safe_load(EXPERIMENT)["Base"], "dataset_id": "tiny", "epochs": 3}
    assert a_space(folder, model_config={"DOT_small": model}).trial(1).model["epochs"] == 3


def test_base_config_is_found_from_the_yaml_and_from_the_folder_above(folder):
    (folder / "searches").mkdir()
    path = folder / "searches" / "tuner.yaml"
    for base in ("../config", "config"):
        path.write_text(f"base_config: {base}\nbase_expid: DOT_small\ntuner_space: {{embedding_dim: [4, 8]}}\n")
        assert read_space(path).trial(2).model["early_stop_patience"] == 2


def test_a_folder_of_fuxictr_is_named_from_the_searchs_folder(folder):
    (folder / "config" / "model_config.yaml").write_text(EXPERIMENT + "    zoo: ../FuxiCTR/model_zoo/DOT\n")
    path = folder / "elsewhere" / "tuner.yaml"
    path.parent.mkdir()
    path.write_text(
        "base_config: config\nbase_expid: DOT_default\ndataset_id: tiny\ntuner_space: {embedding_dim: [4, 8]}\n"
    )
    space = read_space(path)
    assert (space.folder / space.trial(1).model["zoo"]).resolve() == folder / "FuxiCTR" / "model_zoo" / "DOT"
    assert space.model_dir is None  # runs write beside the YAML, not to FuxiCTR's checkout
    (folder / "config" / "model_config.yaml").write_text(EXPERIMENT)
    (folder / "run_expid.py").touch()
    path.write_text(
        "base_config: ../config\nbase_expid: DOT_default\ndataset_id: tiny\n"
        "tuner_space: {embedding_dim: [4, 8], zoo: ../FuxiCTR/model_zoo/DOT}\n"
    )
    space = read_space(path)
    assert (space.folder / space.trial(1).model["zoo"]).resolve() == folder / "FuxiCTR" / "model_zoo" / "DOT"
    assert space.model_dir is None


def test_the_value_that_ranks_is_the_monitored_one(folder):
    space = a_space(folder)
    assert space.value({"AUC": 0.8, "logloss": 0.4}) == pytest.approx(0.6) and space.sign == 1
    assert a_space(folder, {"monitor_mode": "min", "embedding_dim": [4]}).sign == -1


@pytest.mark.parametrize(
    ("values", "others", "message"),
    [
        ({}, {}, "'tuner_space' must map keys to lists of values, at least one; got {}"),
        (None, {"tuner_space": ...}, "missing key 'tuner_space'"),
        ({"embedding_dim": []}, {}, "tuner_space: 'embedding_dim' has no value"),
        ({"embedding_dim": [4, 8, 4]}, {}, "tuner_space: 'embedding_dim' lists 4 twice"),
        ({"monitor": ["AUC", "logloss"]}, {}, "'monitor' has several values"),
        ({"dataset_id": "tiny"}, {}, "'dataset_id' cannot be tuned"),
        (None, {"base_expid": "DOT_smal"}, "unknown experiment 'DOT_smal'; the nearest is 'DOT_small'"),
        (None, {"dataset_id": "tinny"}, "unknown data set 'tinny'; the nearest is 'tiny'"),
        (None, {"tuner_spcae": 1}, "unknown key 'tuner_spcae'; the nearest is 'tuner_space'"),
        (None, {"base_config": "nowhere"}, "'base_config': there is no folder"),
        (None, {"dataset_config": {"other": {}}}, "'dataset_config' has no entry 'tiny'; it holds other"),
        (None, {"dataset_config": 5}, "'dataset_config' must map ids to settings; got 5"),
        (None, {"base_config": 5}, "'base_config' must be a text; got 5"),
        (None, {"base_expid": ["DOT_small"]}, "'base_expid' must be a text; got ['DOT_small']"),
        (None, {"dataset_id": {"tiny": 1}}, "'dataset_id' must be a text; got {'tiny': 1}"),
    ],
)
def test_a_wrong_space_is_refused(folder, values, others, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        a_space(folder, values, **others)


def test_a_yaml_whose_name_would_be_its_folders_is_refused(folder):
    path = write_space(folder)
    with pytest.raises(config.ConfigError, match=r"config/tuner must end in \.yaml"):
        read_space(path.rename(path.with_suffix("")))


def test_a_yaml_whose_name_has_a_blank_is_refused(folder):
    path = write_space(folder)
    with pytest.raises(config.ConfigError, match=r"'my tuner\.yaml' has a blank, .*rename it"):
        read_space(path.rename(path.with_name("my tuner.yaml")))


@pytest.mark.parametrize("key", ["monitor", "label", "group_id", "valid_data"])
def test_trials_that_could_not_be_compared_are_refused(folder, key):
    values = {"monitor": ["AUC", "logloss"], "label": ["click", "like"], "group_id": ["user", "item"]}
    with pytest.raises(config.ConfigError, match=key):
        a_space(folder, {key: values.get(key, ["a.csv", "b.csv"]), "embedding_dim": [4]}).check()


def test_a_grid_that_is_never_run_to_its_end_is_refused_and_may_be_drawn_from(folder):
    space = a_space(folder, {"embedding_dim": list(range(1, 102)), "seed": list(range(100))})
    with pytest.raises(ValueError, match=r"has 10,100 trials, more than 10,000; leave out values, or draw some with"):
        make_strategy(space, "grid", None, None, "TPESampler")
    assert make_strategy(space, "random", 3, None, "TPESampler")


def test_all_mistakes_of_a_space_come_in_one_message(folder):
    with pytest.raises(config.ConfigError) as caught:
        a_space(folder, {"embedding_dim": []}, dataset_id="tinny", more=1)
    assert all(part in str(caught.value) for part in ("'embedding_dim' has no value", "'tinny'", "'more'"))


def test_every_value_is_checked_before_anything_runs(folder):
    space = a_space(folder, {"learning_rate": [1e-3, -1], "embeding_dim": [4], "head_hidden_units": [64, 32]})
    with pytest.raises(config.ConfigError) as caught:
        space.check()
    message = str(caught.value)
    assert message.startswith(f"4 mistakes in the trials of {space.path}:\n  - ")
    assert "'learning_rate' must be a number above 0; got -1" in message
    assert "unknown key 'embeding_dim'; the nearest valid name is 'embedding_dim'" in message
    assert "'head_hidden_units' must be" in message
    assert [path.name for path in (folder / "config").iterdir() if path.is_dir()] == []  # nothing is left


def test_a_space_without_validation_data_is_refused(folder):
    with pytest.raises(config.ConfigError, match="data set 'tiny' has no valid_data"):
        a_space(folder, {"valid_data": [None], "embedding_dim": [4]}).check()


def test_a_changed_space_is_refused_and_named(folder):
    space = a_space(folder)
    write_configs(space.folder, [space.trial(i + 1) for i in range(6)])
    assert len(known_trials(a_space(folder))) == 6
    changed = a_space(folder, {**SPACE, "embedding_dim": [4, 8.0, 16]})
    with pytest.raises(
        config.ConfigError, match=r"embedding_dim was 8 and is 8\.0 \(trial 2\); give the changed search"
    ):
        known_trials(changed)
    text = (folder / "config" / "dataset_config.yaml").read_text()
    (folder / "config" / "dataset_config.yaml").write_text(text.replace("min_categr_count: 1", "min_categr_count: 9"))
    with pytest.raises(config.ConfigError, match=r"other settings for 'tiny'.*min_categr_count was 1 and is 9"):
        known_trials(a_space(folder))


# ledgers


def a_ledger(folder, space):
    space.folder.mkdir(exist_ok=True)
    return Ledger(space.folder / "ledger.jsonl", space)


def start(ledger, trial, attempts=1, seed=7):
    ledger.record(
        trial.expid,
        seed,
        "started",
        settings=dict(trial.settings),
        attempts=attempts,
        gpu=-1,
        time="2030-01-01T00:00:00",
    )


def finish(ledger, trial, value=0.7, evaluations=(0.7,), seed=7):
    fields = {"exit_code": 0, "seconds": 1.5, "metrics": {"valid": {"AUC": value}}, "result": "r.json"}
    ledger.record(trial.expid, seed, "finished", **fields, value=value, evaluations=list(evaluations))


def test_a_ledger_gives_back_what_was_recorded(folder):
    space = a_space(folder)
    ledger = a_ledger(folder, space)
    start(ledger, space.trial(2))
    start(ledger, space.trial(1))
    finish(ledger, space.trial(2), 0.8)
    ledger.record(space.trial(1).expid, 7, "failed", exit_code=1, seconds=2.0, error="x")
    again = a_ledger(folder, space)
    assert again.runs == ledger.runs
    run = again.runs[space.trial(2).expid, 7]
    assert (run["state"], run["value"], run["settings"]["embedding_dim"], run["attempts"]) == ("finished", 0.8, 8, 1)
    assert [run["state"] for run in again.of_state("finished", "failed")] == ["failed", "finished"]  # by number
    start(again, space.trial(1), attempts=2)
    assert "error" not in again.runs[space.trial(1).expid, 7]  # a new attempt forgets the old one

    again.compact()
    lines = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [line["trial"] for line in lines] == [space.trial(1).expid, space.trial(2).expid]
    assert a_ledger(folder, space).runs == again.runs


def test_a_ledger_cut_anywhere_in_its_last_line_goes_on(folder, caplog):
    space = a_space(folder)
    ledger = a_ledger(folder, space)
    start(ledger, space.trial(1))
    whole = ledger.path.read_bytes()
    finish(ledger, space.trial(1))
    content = ledger.path.read_bytes()
    for end in range(len(whole) + 1, len(content)):
        ledger.path.write_bytes(content[:end])
        caplog.clear()
        recovered = a_ledger(folder, space)
        complete = end == len(content) - 1  # only its newline is missing
        assert recovered.runs[space.trial(1).expid, 7]["state"] == ("finished" if complete else "started")
        assert ledger.path.read_bytes() == (content if complete else whole)
        assert complete or f"{ledger.path}:2: the line was cut off by a kill and is dropped" in caplog.text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda line: line[:-5], "this is no JSON"),
        (lambda line: "[1]", "a line is a JSON object; this is [1]"),
        (lambda line: line.replace("DOT_small_001", "DOT_small_009"), "is no trial of"),
        (lambda line: line.replace('"seed": 7', '"seed": "7"'), "'seed' must be an integer; got '7'"),
        (lambda line: line.replace("started", "begun"), "'state' must be one of started, finished, pruned, failed"),
        (lambda line: line.replace('"attempts": 1', '"attempts": true'), "'attempts' is missing or of a wrong type"),
        (lambda line: line.replace('"embedding_dim": 4', '"embedding_dim": 8'), "has the settings {"),
        (lambda line: line.replace("2030-01-01T", "tomorrow "), "'time' is no date and time; got 'tomorrow 00:00:00'"),
        (lambda line: line.replace("started", "finished"), "'exit_code' is missing or of a wrong type; got None"),
        (lambda line: line.replace("started", "failed"), "'exit_code' is missing or of a wrong type; got None"),
    ],
)
def test_a_ledger_edited_by_hand_is_refused_with_its_line(folder, edit, message):
    space = a_space(folder)
    ledger = a_ledger(folder, space)
    start(ledger, space.trial(2))
    start(ledger, space.trial(1))
    start(ledger, space.trial(3))
    lines = ledger.path.read_text().splitlines()
    ledger.path.write_text("\n".join([lines[0], edit(lines[1]), lines[2]]) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{ledger.path}:2: ")) as caught:
        a_ledger(folder, space)
    assert message in str(caught.value) and "put the line back as it was" in str(caught.value)


# strategies


def test_a_larger_draw_begins_like_a_smaller_one(folder):
    space = a_space(folder, {"learning_rate": [1e-3, 1e-2], "embedding_dim": list(range(1, 50))})
    trials = draw(space, 30)
    assert [t.number for t in draw(space, 10)] == [t.number for t in trials[:10]]
    assert len({t.number for t in trials}) == 30
    assert sorted(t.number for t in draw(space, 1000)) == list(range(1, 99))
    assert [t.number for t in trials] != sorted(t.number for t in trials)


def test_a_listed_strategy_gives_what_the_ledger_does_not_have(folder):
    space = a_space(folder)
    ledger = a_ledger(folder, space)
    strategy = make_strategy(space, "grid", None, "_00", "TPESampler")
    assert strategy.propose(ledger).number == 1
    start(ledger, space.trial(1))
    start(ledger, space.trial(3))
    assert strategy.propose(ledger).number == 2
    assert [t.number for t in make_strategy(space, "grid", None, "_004_", "TPESampler").planned] == [4]
    assert Listed([]).propose(ledger) is None


def a_value(trial):
    """The best trials have embedding_dim near 30 and the larger learning rate."""
    return 1 - abs(trial.settings["embedding_dim"] - 30) / 40 + 10 * trial.settings["learning_rate"]


def test_optuna_finds_better_trials_than_a_draw(folder):
    space = a_space(folder, {"learning_rate": [1e-3, 1e-2], "embedding_dim": list(range(1, 50))})
    ledger, strategy = a_ledger(folder, space), Optuna(space, 30, "TPESampler")
    found = []
    while (trial := strategy.propose(ledger)) is not None:
        start(ledger, trial)
        finish(ledger, trial, a_value(trial))
        found.append(trial)
    assert len(found) == len({trial.expid for trial in found}) == 30
    chosen, drawn = ([a_value(t) for t in trials[15:]] for trials in (found, draw(space, 30)))
    assert sum(chosen) / 15 > sum(drawn) / 15 + 0.05

    lines = ledger.path.read_text().splitlines(keepends=True)
    for count in (3, 6, 20):  # after a kill: what it proposes follows from the ledger alone
        ledger.path.write_text("".join(lines[: 2 * count]))
        again = Optuna(space, 30, "TPESampler").propose(a_ledger(folder, space))
        assert again.expid == found[count].expid


def test_optuna_tries_all_of_a_small_space_and_minimises_if_asked(folder):
    space = a_space(folder, {"embedding_dim": [4, 8, 16], "monitor_mode": "min", "net_dropout": [0.1, 0]})
    ledger, strategy = a_ledger(folder, space), Optuna(space, 100, "TPESampler")
    assert strategy.count == 6
    while (trial := strategy.propose(ledger)) is not None:
        start(ledger, trial)
        finish(ledger, trial, trial.settings["embedding_dim"])
    assert len(ledger.runs) == 6
    assert strategy._study(ledger).best_value == 4


def test_optuna_knows_tuples_again_after_they_have_been_in_the_ledger(folder):
    path = write_space(folder, {"embedding_dim": [4, 8]})
    path.write_text(f"{path.read_text()}  head_hidden_units: [!!python/tuple [8, 4], [8]]\n")
    space = read_space(path)
    ledger, strategy = a_ledger(folder, space), Optuna(space, 4, "TPESampler")
    while (trial := strategy.propose(ledger)) is not None:
        start(ledger, trial)
        assert not strategy.is_hopeless(ledger, trial, [0.5])
        finish(ledger, trial)
    assert len(ledger.runs) == 4


def test_optuna_stops_what_falls_behind_the_median(folder):
    space = a_space(folder, {"embedding_dim": list(range(1, 21))})
    ledger, strategy = a_ledger(folder, space), Optuna(space, 20, "TPESampler")
    for number in range(1, 6):
        assert not strategy.is_hopeless(ledger, space.trial(20), [0.1, 0.1, 0.1])  # too few to compare with
        start(ledger, space.trial(number))
        finish(ledger, space.trial(number), 0.7, [0.5, 0.6, 0.7])
    assert strategy.is_hopeless(ledger, space.trial(20), [0.4, 0.55])
    assert not strategy.is_hopeless(ledger, space.trial(20), [0.4])  # not at the first evaluation
    assert not strategy.is_hopeless(ledger, space.trial(20), [0.4, 0.65])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gird", None, None), "--search must be one of grid, random, optuna; got 'gird'"),
        (("random", None, None), "say how many with --trials"),
        (("grid", 3, None), "leave --trials out"),
        (("optuna", 3, "001"), "--tag 001 chooses among trials that are known beforehand"),
        (("grid", None, "9_9"), "--tag 9_9 is in no id of the 6 trials, which are like DOT_small_001_"),
    ],
)
def test_a_wrong_strategy_is_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_strategy(a_space(folder), *arguments, "TPESampler")


def test_an_unknown_sampler_and_one_that_needs_more_than_a_seed_are_refused(folder):
    with pytest.raises(ValueError, match=r"--sampler GridSampler needs more than a seed: .*'search_space'"):
        make_strategy(a_space(folder), "optuna", 3, None, "GridSampler")
    with pytest.raises(ValueError, match="optuna has no sampler 'TPE'; the nearest is 'TPESampler'"):
        make_strategy(a_space(folder), "optuna", 3, None, "TPE")
