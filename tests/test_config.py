"""Configurations: merging, lookup, overrides, and that everything wrong is said in one message."""

import os
from pathlib import Path
from types import SimpleNamespace

import flowctr.config as config
import pytest
import yaml
from flowctr.config import ConfigError, load, load_dataset
from fuxictr.pytorch.models import BaseModel, MultiTaskModel


class Parent(MultiTaskModel):
    def __init__(self, feature_map, num_layers=2, head_activation="ReLU", **kwargs):
        super().__init__(feature_map, **kwargs)


class Toy(Parent):
    """Its keys: its own, those of Parent, MultiTaskModel and BaseModel."""

    def __init__(
        self,
        feature_map,
        hidden_units,
        embedding_dim=8,
        dropout=0,
        use_bias=True,
        flow="int",
        widths=(16, 8),
        rates=[0, 0.5],  # noqa: B006  as FuxiCTR's models have them
        target_field=[("item_id", "cate_id")],  # noqa: B006
        embedding_initializer="partial(nn.init.normal_, std=1e-4)",
        behaviors=None,
        learning_rate=1e-3,
        **kwargs,
    ):
        super().__init__(feature_map, **kwargs)


class Closed(BaseModel):
    """Takes no keyword arguments beyond its own: a key of BaseModel would be a TypeError."""

    def __init__(self, feature_map, verbose=0):
        super().__init__(feature_map, verbose=verbose)


SRC = SimpleNamespace(Toy=Toy, Closed=Closed, BaseModel=BaseModel, os=os)

MODEL_CONFIG = """
Base:
    model_root: './checkpoints/'
    num_workers: 3
    verbose: 1
    early_stop_patience: 2
    pickle_feature_encoder: True
    save_best_only: True
    eval_steps: null
    debug_mode: False
    group_id: null
    use_features: null
    feature_specs: null
    feature_config: null

Toy_test:
    model: Toy
    dataset_id: tiny
    loss: binary_crossentropy
    metrics: [AUC, gAUC, logloss, NE]
    task: binary_classification
    optimizer: adam
    learning_rate: 1e-3
    embedding_regularizer: 1
    net_regularizer: l1_l2(1e-5, 0.1)
    hidden_units: [4]
    batch_size: 128
    epochs: 2
    shuffle: True
    seed: 2019
    monitor: {AUC: 1, logloss: -1}
    monitor_mode: max
"""
DATASET_CONFIG = """
tiny:
    data_root: ../data/
    data_format: csv
    train_data: ../data/train.csv
    valid_data: /somewhere/valid.csv
    min_categr_count: 1
    group_id: user
    feature_cols:
        - {name: user, active: True, dtype: str, type: meta}
        - {name: [item, cate], active: True, dtype: str, type: categorical}
        - {name: price, active: True, dtype: float, type: numeric, normalizer: StandardScaler}
        - {name: seq_item, active: True, dtype: str, type: sequence, max_len: 5, padding: pre, share_embedding: item,
           feature_encoder: null}
        - {name: seq_cate, active: True, dtype: str, type: sequence, max_len: 5, padding: pre,
           feature_encoder: [layers.MaskedAveragePooling(), "nn.Linear(8, 8, bias=False)"]}
        - {name: image, active: True, dtype: str, type: categorical, pretrained_emb: ../data/image.h5}
    label_col: {name: click, dtype: float}
    behaviors: {watch: [seq_item, seq_cate]}
"""


@pytest.fixture
def folder(tmp_path):
    """A model folder; the config folder is in model/config."""
    path = tmp_path / "model" / "config"
    path.mkdir(parents=True)
    (path / "model_config.yaml").write_text(MODEL_CONFIG)
    (path / "dataset_config.yaml").write_text(DATASET_CONFIG)
    return path


def edit(path, *replacements):
    text = path.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def mistakes(folder, *overrides, expid="Toy_test", src=SRC):
    with pytest.raises(ConfigError) as error:
        load(folder, expid, overrides, src)
    return str(error.value)


def test_load_merges_base_experiment_and_data_set(folder):
    params = load(folder, "Toy_test", src=SRC)
    assert params["early_stop_patience"] == 2 and params["batch_size"] == 128
    edit(folder / "model_config.yaml", ("    shuffle: True\n", ""), ("    verbose: 1\n", ""))
    assert load(folder, "Toy_test", src=SRC)["shuffle"] is True  # the defaults of FuxiCTR's loader and zoo
    assert params["model_id"] == "Toy_test" and params["dataset_id"] == "tiny"
    assert params["group_id"] == "user"  # null in Base, set by the data set
    assert params["learning_rate"] == 0.001 and isinstance(params["learning_rate"], float)
    # FuxiCTR ignores an int
    assert params["embedding_regularizer"] == 1.0 and isinstance(params["embedding_regularizer"], float)
    assert params["net_regularizer"] == "l1_l2(1e-5, 0.1)"


def test_relative_paths_count_from_above_the_config_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    params = load(folder, "Toy_test", src=SRC)
    assert params["data_root"] == str(tmp_path / "data")
    assert params["train_data"] == str(tmp_path / "data" / "train.csv")
    assert params["valid_data"] == "/somewhere/valid.csv"
    assert params["feature_cols"][-1]["pretrained_emb"] == str(tmp_path / "data" / "image.h5")


def test_files_in_folders_are_found(folder):
    for stem in ("model_config", "dataset_config"):
        (folder / stem).mkdir()
        (folder / f"{stem}.yaml").rename(folder / stem / "b.yaml")
    (folder / "model_config" / "a.yaml").write_text("Other: {batch_size: 1}")
    assert load(folder, "Toy_test", src=SRC)["batch_size"] == 128
    (folder / "model_config" / "c.yaml").write_text("Toy_test: {batch_size: 1}")
    assert "is in" in mistakes(folder) and "b.yaml" in mistakes(folder) and "c.yaml" in mistakes(folder)


@pytest.mark.parametrize("place", ["", "elsewhere"])
def test_data_configs_above_the_config_folder_and_of_the_working_directory_are_found(
    folder, tmp_path, monkeypatch, place
):
    shared = tmp_path / place / "data_configs" / "tiny.yaml"
    shared.parent.mkdir(parents=True)
    (folder / "dataset_config.yaml").rename(shared)
    edit(shared, ("../data/", "data/"))
    if place:
        monkeypatch.chdir(tmp_path / place)
    params = load(folder, "Toy_test", src=SRC)
    assert params["train_data"] == str(tmp_path / place / "data" / "train.csv")
    shared.write_text("other: {}")
    assert "has no entry 'tiny'; it has other" in mistakes(folder)


def test_every_shared_data_set_of_the_repository_is_valid():
    paths = sorted((config.REPOSITORY / "data_configs").glob("*.yaml"))
    assert paths
    for path in paths:
        params = load_dataset(path.stem)
        assert params["dataset_id"] == path.stem
        assert Path(params["train_data"]).is_relative_to(config.REPOSITORY)


def test_every_experiment_of_the_repository_is_valid():
    folders = sorted(config.REPOSITORY.glob("model_zoo/*/config"))
    assert folders
    for folder in folders:
        (path,) = folder.glob("model_config.yaml")
        expids = set(yaml.load(path.read_text(), config._Loader)) - {"Base"}
        assert f"{folder.parent.name}_test" in expids
        for expid in expids:
            overrides = (
                []
                if settings_of(path.read_text(), expid)["dataset_id"] != "TBD"
                else ["dataset_id=kuairand_pure_window"]
            )
            assert load(folder, expid, overrides)["model_id"] == expid


def settings_of(text, expid):
    content = yaml.load(text, config._Loader)
    return {**content.get("Base", {}), **content[expid]}


def test_overrides(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["batch_size=7", "hidden_units=[1, 2]", "learning_rate=5e-4", "monitor.AUC=3", "train_data=here.csv"]
    params = load(folder, "Toy_test", [*overrides, "flow=a=b"], SRC)
    assert params["batch_size"] == 7 and params["hidden_units"] == [1, 2] and params["learning_rate"] == 5e-4
    assert params["monitor"] == {"AUC": 3, "logloss": -1}
    assert params["train_data"] == str(tmp_path / "here.csv")
    assert params["flow"] == "a=b"

    message = mistakes(folder, "batch_size", "=3", "batch_size.x=1", "epochs=[1", "lr=3")
    for part in (
        "5 mistakes",
        "--set takes key=value; got 'batch_size'",
        "--set takes key=value; got '=3'",
        "--set batch_size.x: 'batch_size' is not a mapping",
        "--set epochs=[1: the value is not valid YAML",
        "unknown key 'lr'; the nearest valid name is",
    ):
        assert part in message


def test_the_data_set_and_model_can_be_overridden(folder):
    edit(folder / "dataset_config.yaml", ("tiny:", "tiny2:"))
    assert load(folder, "Toy_test", ["dataset_id=tiny2"], SRC)["train_data"].endswith("train.csv")
    edit(folder / "model_config.yaml", ("model: Toy", "model: Tpy"))
    assert load(folder, "Toy_test", ["dataset_id=tiny2", "model=Toy"], SRC)["model"] == "Toy"


@pytest.mark.parametrize("name", ["type", "items", "user.id"])
def test_names_that_torch_has_for_itself_are_refused(folder, name):
    edit(folder / "dataset_config.yaml", ("{name: image, ", f"{{name: {name}, "))
    assert f"feature {name!r}: torch has no layer of that name; rename the column, such as {name}_id" in mistakes(
        folder
    )


def test_a_group_is_one_value(folder):
    edit(folder / "dataset_config.yaml", ("group_id: user", "group_id: seq_item"))
    assert "'group_id': 'seq_item' is sequence; a group is one value: take a meta column" in mistakes(folder)


@pytest.mark.parametrize(
    ("value", "is_wrong"), [("1.5", True), ("-0.1", True), ("1", True), ("0", False), ("0.3", False)]
)
def test_dropout_is_a_share(folder, value, is_wrong):
    edit(folder / "model_config.yaml", ("batch_size: 128", f"batch_size: many\n    net_dropout: {value}"))
    found = mistakes(folder)
    assert (f"'net_dropout' must be a number of at least 0, below 1; got {value}" in found) is is_wrong


def test_all_mistakes_come_in_one_message_with_the_nearest_name(folder):
    edit(
        folder / "model_config.yaml",
        ("learning_rate:", "lerning_rate:"),
        ("early_stop_patience: 2", "patience: 2"),
        ("optimizer: adam", "optimizer: adamm"),
        ("batch_size: 128", "batch_size: many"),
        ("hidden_units: [4]", "use_bias: 1"),
        ("seed: 2019", "num_layers: 2.5"),
        ("gAUC", "gauc"),
    )
    edit(
        folder / "dataset_config.yaml",
        ("padding: pre,\n", "pading: pre,\n"),
        ("dtype: float, type: numeric", "type: numric"),
    )
    message = mistakes(folder)
    for part in (
        "12 mistakes in experiment 'Toy_test'",
        "unknown key 'lerning_rate'; the nearest valid name is 'learning_rate'",
        "unknown key 'patience'; the nearest valid name is 'early_stop_patience'",
        "'optimizer' must be an optimizer of torch.optim, the nearest is 'adam'; got 'adamm'",
        "'batch_size' must be an integer above 0; got 'many'",
        "'use_bias' must be true or false; got 1",
        "'num_layers' must be an integer, like its default 2; got 2.5",
        "missing key 'hidden_units'",
        "missing key 'seed'",
        "unknown metric 'gauc'; the nearest valid name is 'gAUC'",
        "unknown key 'pading'; the nearest valid name is 'padding'",
        "feature_cols 'price': missing key 'dtype'",
        "'type' must be one of categorical, numeric, sequence, meta, embedding; got 'numric'",
    ):
        assert part in message, part


@pytest.mark.parametrize("key", [*config.REQUIRED_KEYS, "hidden_units"])
def test_a_missing_key_is_named(folder, key):
    lines = [line for line in MODEL_CONFIG.splitlines() if not line.strip().startswith(f"{key}:")]
    (folder / "model_config.yaml").write_text("\n".join(lines))
    assert f"missing key '{key}'" in mistakes(folder)


@pytest.mark.parametrize("key", ["data_root", "data_format", "train_data", "label_col"])
def test_a_missing_key_of_the_data_set_is_named(folder, key):
    lines = [line for line in DATASET_CONFIG.splitlines() if not line.strip().startswith(f"{key}:")]
    (folder / "dataset_config.yaml").write_text("\n".join(lines))
    assert f"missing key '{key}' of the data set" in mistakes(folder)


@pytest.mark.parametrize("data_format", ["npz", "parquet", "csv"])
def test_data_that_fuxictr_has_encoded_are_refused(folder, data_format):
    (folder / "dataset_config.yaml").write_text(
        f"tiny: {{data_root: ../data/, data_format: {data_format}, train_data: ../data/train.npz}}"
    )
    message = mistakes(folder)
    assert "missing key 'feature_cols' of the data set; npz or parquet files that FuxiCTR has encoded" in message
    assert "give the raw csv or parquet files with their feature_cols, or h5" in message


def test_unknown_experiment_data_set_and_model_list_what_exists(folder):
    assert "unknown experiment 'Toy_tst'; the nearest is 'Toy_test' (known: Toy_test)" in mistakes(
        folder, expid="Toy_tst"
    )
    assert "unknown experiment 'Base'" in mistakes(folder, expid="Base")
    message = mistakes(folder, "dataset_id=tinny", "model=Toi", "batch_size=0")
    assert "3 mistakes" in message
    assert "unknown data set 'tinny'; the nearest is 'tiny'" in message
    assert "unknown model 'Toi'; the nearest is 'Toy'" in message and "InterFormer" in message
    for name in ("os", "Toy.__init__", "../x", "[a]"):  # not a model class of src
        assert "unknown model" in mistakes(folder, f"model={name}")
    with pytest.raises(ConfigError, match=r"no model_config\.yaml"):
        load(folder.parent, "Toy_test")
    with pytest.raises(ConfigError, match=r"unknown data set 'tinny'.*known:.*tiny"):
        load_dataset("tinny", folder)


def test_keys_are_those_of_constructors_that_can_be_reached(folder):
    assert load(folder, "Toy_test", ["num_layers=3", "loss_weight=EQ", "reduce_lr_on_plateau=false"], SRC)
    assert load(folder, "Toy_test", ["streaming=true", "max_gradient_norm=5"], SRC)
    message = mistakes(folder, "model=Closed")
    assert "unknown key 'early_stop_patience'" in message and "unknown key 'hidden_units'" in message
    for argument in ("feature_map", "gpu", "model_id", "kwargs", "self", "validation_data"):
        if argument != "model_id":
            assert f"unknown key '{argument}'" in mistakes(folder, f"{argument}=1")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("epochs=0", "an integer above 0"),
        ("epochs=true", "an integer above 0"),
        ("eval_steps=0", "an integer above 0"),
        ("learning_rate=-1", "a number above 0"),
        ("seed=-1", "an integer of at least 0"),
        ("monitor_mode=maximum", "one of max, min"),
        ("data_format=npz", "one of csv, parquet, h5"),
        ("h5_compression=zip", "one of null, gzip, lzf"),
        ("dropout=high", "a number of at least 0, below 1"),
        ("widths=64", "a list of integers above 0, like its default [16, 8]"),
        ("widths=[a]", "a list of integers above 0, like its default [16, 8]; got ['a']"),
        ("widths=[16, 0]", "a list of integers above 0"),
        ("widths=[1.5]", "a list of integers above 0"),
        ("rates=[high]", "a list of numbers, like its default [0, 0.5]"),
        ("rates=!!python/tuple [0]", "a list of numbers, like its default [0, 0.5]"),  # FuxiCTR adds lists to it
        ("target_field=3", "a list or a name, like its default [('item_id', 'cate_id')]"),
        ("data_block_size=-2", "an integer of at least 0, or -1"),
        ("flow=1", "a text, like its default 'int'"),
        ("save_best_only=yes please", "true or false"),
        ("embedding_regularizer=l3(1)", "l1_l2(x, y)"),
        ("embedding_regularizer=-0.1", "l1_l2(x, y)"),
        ("loss=binary_cros_entropy", "the nearest is 'binary_cross_entropy'"),
        ("head_activation=Rilu", "an activation of torch.nn"),
        ("task=[binary]", "one of binary_classification, regression"),
        ("task=[regression, regression]", "'task' is for 2 labels; the data set has 1: click"),
        ("num_tasks=3", "'num_tasks' is for 3 labels"),
        ("loss_weight=[1, 2]", "'loss_weight' is for 2 labels; the data set has 1: click"),
        ("loss_weight=[-1]", "'loss_weight' must be EQ, UW or a list of numbers of at least 0, not all of them 0"),
        ("loss_weight=[0]", "'loss_weight' must be EQ, UW or a list"),
        ("loss_weight=[.nan]", "'loss_weight' must be EQ, UW or a list"),
        ("loss_weight=[true]", "'loss_weight' must be EQ, UW or a list"),
        ("loss_weight=uw", "'loss_weight' must be EQ, UW or a list"),
        ("loss_weight=1", "'loss_weight' must be EQ, UW or a list"),
        ("metrics=AUC", "'metrics' must be a list of names"),
        ("monitor=NDCG@3", "unknown metric 'NDCG@3'"),
        ("monitor={AUC: best}", "a number as its weight; got 'best'"),
        ("group_id=usr", "'group_id': unknown feature 'usr'; the nearest is 'user'"),
        ("group_id=null", "gAUC needs group_id"),
        ("scenario=itm", "'scenario': unknown feature 'itm'; the nearest is 'item'"),
        ("scenario=price", "'scenario': 'price' is numeric; a scenario is a categorical feature"),
        ("scenario=seq_item", "'scenario': 'seq_item' is sequence; a scenario is a categorical feature"),
        ("scenario=user", "'scenario': 'user' is meta; a scenario is a categorical feature"),
        ("scenario=[item]", "'scenario' must be a text"),
        ("monitor=AUC@item", "unknown metric 'AUC@item'"),
        ("use_features=[itm]", "'use_features': unknown feature 'itm'; the nearest is 'item'"),
        ("feature_specs=[{name: itm, feature_encoder: null}]", "'feature_specs': unknown feature 'itm'"),
        ("feature_cols=3", "'feature_cols' must list mappings"),
        ("behaviors=[seq_item]", "a mapping of each behaviour to the list of its columns"),
        ("behaviors.watch=[seq_itm]", "behavior 'watch': unknown sequence 'seq_itm'; the nearest is 'seq_item'"),
        ("label_col={name: click, dtype: str}", "one of int, float; got 'str'"),
        ("label_col={name: price, dtype: float}", "label 'price' is a feature too"),
        ("label_col={name: click, dtype: float, may_be_missing: 1}", "'may_be_missing' must be true or false; got 1"),
        (
            "label_col={name: click, dtype: float, may_be_missing: true, fill_na: 0}",
            "label_col 'click': fill_na and may_be_missing exclude each other; keep one",
        ),
    ],
)
def test_a_wrong_value_is_named(folder, override, complaint):
    message = mistakes(folder, override)
    assert message.startswith("1 mistake in") and complaint in message


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "max_len: 5, padding: pre,\n",
            "max_len: 6, padding: pre,\n",
            "of different max_len: {'seq_item': 5, 'seq_cate': 6}",
        ),
        ("share_embedding: item", "share_embedding: itm", "'itm' must be an active feature listed before it"),
        ("name: price", "name: item", "feature_cols has 'item' twice"),
        ("padding: pre", "padding: left", "one of pre, post; got 'left'"),
        ("dtype: float, type", "dtype: float64, type", "one of str, int, float; got 'float64'"),
        ("max_len: 5", "max_len: five", "an integer of at least 0"),
        ("normalizer: StandardScaler", "normalizer: Standard", "one of StandardScaler, MinMaxScaler"),
    ],
)
def test_a_wrong_column_is_named(folder, old, new, complaint):
    edit(folder / "dataset_config.yaml", (old, new))
    assert complaint.replace("'itm'", "share_embedding='itm'") in mistakes(folder)


def test_a_key_with_two_values_is_refused_unless_overridden(folder):
    edit(folder / "model_config.yaml", ("seed: 2019", "seed: 2019\n    min_categr_count: 10"))
    assert "'min_categr_count' is 10 in the experiment and 1 in the data set" in mistakes(folder)
    assert load(folder, "Toy_test", ["min_categr_count=3"], SRC)["min_categr_count"] == 3


def test_several_labels(folder):
    labels = "label_col=[{name: click, dtype: float}, {name: like, dtype: float}]"
    two = [labels, "task=[binary_classification, binary_classification]", "num_tasks=2"]
    params = load(folder, "Toy_test", [*two, "loss=[bce, bce]", "monitor=like_AUC"], SRC)
    assert params["monitor"] == "like_AUC"
    assert "unknown metric 'share_AUC'; the nearest is" in mistakes(folder, *two, "monitor=share_AUC")
    fewer = mistakes(folder, labels, "task=[binary_classification]", "loss_weight=[1]")
    for key in ("task", "loss_weight"):
        assert f"'{key}' is for 1 labels; the data set has 2: click, like" in fewer


def test_scenarios_may_be_monitored(folder):
    labels = "label_col=[{name: click, dtype: float, may_be_missing: true}, {name: like, dtype: float}]"
    several = [labels, "scenario=item", "metrics=[AUC, NDCG@5, NDCG(k=1)]"]
    for name in (
        "AUC",
        "AUC@item",
        "like_AUC@item",
        "click_NDCG@5@item",
        "NDCG(k=1)@item",
        "AUC@item=7",
        "AUC@item=a=b",
    ):
        assert load(folder, "Toy_test", [*several, f"monitor={{{name}: 1, like_AUC: 0.5}}"], SRC)["scenario"] == "item"
    for name in ("AUC@cate", "AUC@itm=1", "share_AUC@item", "gAUC@item=1", "AUC@item@item"):
        message = mistakes(folder, *several, f"monitor={{{name}: 1}}")
        assert message.startswith("1 mistake in") and f"'monitor': unknown metric '{name}'" in message
    assert "the nearest is 'AUC@item'" in mistakes(folder, *several, "monitor=AUC@itme")


@pytest.mark.parametrize("loss_weight", ["EQ", "UW", "[1, 0.5]", "[0, 1]"])
def test_loss_weights_of_several_labels(folder, loss_weight):
    labels = "label_col=[{name: click, dtype: float}, {name: like, dtype: float}]"
    params = load(folder, "Toy_test", [labels, f"loss_weight={loss_weight}"], SRC)
    assert params["loss_weight"] == yaml.safe_load(loss_weight)
    message = mistakes(folder, labels, f"loss_weight={loss_weight}", "model=Closed")
    assert "'loss_weight' weighs the losses of several labels; Closed predicts one: remove it" in message
    assert "unknown key 'loss_weight'" not in message


def test_a_data_set_has_scenarios_and_missing_labels_by_itself(folder):
    edit(
        folder / "dataset_config.yaml",
        ("dtype: float}\n    behaviors", "dtype: float, may_be_missing: True}\n    scenario: cate\n    behaviors"),
    )
    assert load_dataset("tiny", folder)["scenario"] == "cate"
    with pytest.raises(ConfigError, match="'scenario': unknown feature 'image2'; the nearest is 'image'"):
        load_dataset("tiny", folder, ["scenario=image2"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1.e-3", 1e-3), ("5E4", 5e4), ("-.5e+2", -50.0), ("0.1", 0.1)),
        *(("1_000", 1000), ("0", 0), ("1e", "1e"), ("e3", "e3"), ("l2(1e-3)", "l2(1e-3)"), ("int", "int")),
        ("'1e-3'", "1e-3"),
    ],
)
def test_numbers_of_yaml(text, value):
    read = yaml.load(text, config._Loader)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            "Base: {epochs: 1}\nToy_test:\n  epochs: 1\n  seed: 3\n  epochs: 2\n",
            "key 'epochs' is given twice, in lines 3 and 5",
        ),
        ("Toy_test: {}\nToy_test: {}\n", "key 'Toy_test' is given twice, in lines 1 and 2"),
        ("Toy_test: [1\n", "is not valid YAML"),
        ("Toy_test: {since: 2022-02-31}\n", "is not valid YAML: day is out of range for month"),
        ("Toy_test: {epochs: !!int}\n", "is not valid YAML"),
        ("Toy_test: {loss: !!bool maybe}\n", "is not valid YAML"),
        ("- Toy_test\n", "must map ids to settings"),
        ("", "must map ids to settings"),
        ("Toy_test: 3\n", "'Toy_test' must be a mapping of keys to values; got 3"),
    ],
)
def test_wrong_yaml_is_refused(folder, content, complaint):
    (folder / "model_config.yaml").write_text(content)
    assert complaint in mistakes(folder)


@pytest.mark.parametrize("kind", ["object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"])
@pytest.mark.parametrize("form", ["{}", "!!python/tuple [{}]"])
def test_python_tags_are_refused(folder, tmp_path, form, kind):
    executed = tmp_path / "executed"
    with open(folder / "model_config.yaml", "a") as file:
        file.write(f"    flow: {form.format(f'!!python/{kind} [touch {executed}]')}\n")
    assert "is not valid YAML" in mistakes(folder)
    assert not executed.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("item", "item"),
        ("[item, cate]", ["item", "cate"]),
        ("!!python/tuple [item, cate]", ("item", "cate")),
        ("[!!python/tuple [item, cate], item]", [("item", "cate"), "item"]),
    ],
)
def test_features_are_named_as_in_the_configurations_of_bars(folder, text, value):
    with open(folder / "model_config.yaml", "a") as file:
        file.write(f"    target_field: {text}\n")
    assert load(folder, "Toy_test", src=SRC)["target_field"] == value


def test_a_tuple_is_taken_for_a_list_of_names_or_numbers(folder):
    overrides = ["widths=!!python/tuple [4, 2]", "use_features=!!python/tuple [item]"]
    params = load(folder, "Toy_test", overrides, SRC)
    assert params["widths"] == (4, 2) and params["use_features"] == ("item",)
    assert "is not valid YAML" in mistakes(folder, "widths=!!python/tuple 4")


def test_a_block_size_of_minus_1_means_no_blocks(folder):
    assert load(folder, "Toy_test", ["data_block_size=-1"], SRC)["data_block_size"] == 0
    assert load_dataset("tiny", folder, ["data_block_size=-1"])["data_block_size"] == 0
    assert load(folder, "Toy_test", ["data_block_size=7"], SRC)["data_block_size"] == 7


CALLS = (
    "__import__('os').system('touch {0}')",
    "open('{0}', 'w')",
    "[open('{0}', 'w')]",
    "exec('open({0!r}, chr(119))')",
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("embedding_initializer", "{}"),
        ("embedding_initializer", "partial(nn.init.normal_, std={})"),
        ("embedding_initializer", "partial({}, std=1)"),
        ("head_activation", "{}"),
        ("optimizer", "{}"),
        ("loss", "{}"),
        ("net_regularizer", "l2({})"),
    ],
)
def test_code_in_an_experiment_is_refused_and_not_run(folder, tmp_path, key, form, call):
    code = form.format(call.format(tmp_path / "executed"))
    content = yaml.load((folder / "model_config.yaml").read_text(), config._Loader)
    content["Toy_test"][key] = code
    (folder / "model_config.yaml").write_text(yaml.safe_dump(content))
    assert f"'{key}' must be" in mistakes(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("dtype", "{}"),
        ("preprocess", "{}"),
        ("preprocess", "copy_from({})"),
        ("feature_encoder", "{}"),
        ("feature_encoder", "nn.Linear({}, 3)"),
        ("feature_encoder", "nn.Linear(2, 3, bias={})"),
        ("feature_encoder", "layers.torch.hub.load({})"),
    ],
)
def test_code_in_a_data_set_is_refused_and_not_run(folder, tmp_path, key, form, call):
    code = form.format(call.format(tmp_path / "executed"))
    content = yaml.load((folder / "dataset_config.yaml").read_text(), config._Loader)
    content["tiny"]["feature_cols"][1][key] = code
    (folder / "dataset_config.yaml").write_text(yaml.safe_dump(content))
    assert f"{key!r} must be" in mistakes(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_initializer", "nn.init.xavier_uniform_"),
        ("embedding_initializer", "torch.nn.init.xavier_normal_"),
        ("embedding_initializer", "partial(nn.init.normal_, mean=0.0, std=1e-4)"),
        ("embedding_initializer", "partial(nn.init.kaiming_uniform_, nonlinearity='relu')"),
        ("head_activation", "dice"),
        ("head_activation", "[relu, PReLU]"),
        ("head_activation", "null"),
        ("optimizer", "Adam"),
        ("optimizer", "AdamW"),
        ("loss", "mse_loss"),
        ("loss", "bce"),
        ("net_regularizer", "l1(1e-5)"),
        ("net_regularizer", "0"),
        ("net_regularizer", "null"),
        ("metrics", "[AUC, MRR, NDCG@5, NDCG(k=1)]"),
        ("monitor", "AUC"),
        ("feature_specs", "[{name: seq_item, feature_encoder: null}]"),
        ("behaviors", "null"),
        ("valid_data", "null"),
    ],
)
def test_what_fuxictr_takes_is_taken(folder, key, value):
    overrides = [f"{key}={value}", *(["monitor=AUC"] if key == "metrics" else [])]
    expected = yaml.load(value, config._Loader)
    if key == "net_regularizer" and expected == 0:
        expected = 0.0
    assert load(folder, "Toy_test", overrides, SRC)[key] == expected


@pytest.mark.parametrize(
    "value",
    ["nn.init.no_such_", "partial(nn.init.normal_, sd=1)", "partial(nn.init.normal_)(1)", "nn.init.normal_()", "3"],
)
def test_an_initializer_that_would_fail_is_refused(folder, value):
    assert "'embedding_initializer' must be nn.init.<name>_" in mistakes(folder, f"embedding_initializer={value}")


@pytest.mark.parametrize("value", ["layers.NoSuch()", "nn.Linear()", "nn.functional.relu(1)", "layers.np()", "MLP()"])
def test_a_feature_encoder_that_would_fail_is_refused(folder, value):
    override = f"feature_specs=[{{name: item, feature_encoder: '{value}'}}]"
    assert "'feature_encoder' must be layers.<Name>(...)" in mistakes(folder, override)


def test_an_h5_data_set_needs_no_columns(folder):
    (folder / "dataset_config.yaml").write_text("tiny: {data_root: d, data_format: h5, train_data: d/tiny/train.h5}")
    params = load(folder, "Toy_test", ["metrics=[AUC, logloss]"], SRC)
    assert params["train_data"] == str(folder.parent / "d" / "tiny" / "train.h5")


KEYS = sorted({*config.DATASET_KEYS, *settings_of(MODEL_CONFIG, "Toy_test"), "behaviors", "monitor"})


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_any_kind_is_taken_or_refused(folder, key):
    refused = 0
    for value in ("[]", "{}", "[[]]", "[{}]", "{a: {}}", "3", "-1.5", "true", "null", "''", "text", "2020-01-01"):
        try:
            load(folder, "Toy_test", [f"{key}={value}"], SRC)
        except ConfigError:
            refused += 1
    assert refused or key in config.IGNORED_KEYS


@pytest.mark.parametrize("key", sorted(config.FEATURE_KEYS))
def test_a_column_value_of_any_kind_is_taken_or_refused(folder, key):
    for value in ([], {}, [[]], 3, -1.5, True, None, "", "text"):
        content = yaml.load(DATASET_CONFIG, config._Loader)
        content["tiny"]["feature_cols"][3][key] = value
        (folder / "dataset_config.yaml").write_text(yaml.safe_dump(content))
        try:
            load(folder, "Toy_test", src=SRC)
        except ConfigError as error:
            assert "mistake" in str(error)
