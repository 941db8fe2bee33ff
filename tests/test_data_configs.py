"""Every data_configs/*.yaml describes the tables that `flowctr prepare` makes."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml
from flowctr.data.encode import Processor
from flowctr.datasets import DATASETS, bars_x1, prepare
from fuxictr.preprocess.feature_processor import FeatureProcessor
from raw_files import (
    PURE_DAYS,
    WINDOW_DAYS,
    kuairand_log,
    movielens_ratings,
    write_amazon,
    write_movielens,
    write_pure,
    write_pure_tabs,
    write_window,
)

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "data_configs").glob("*.yaml"))
SHIPPED = ("kuairand_tiny", "kuairand_tiny_tabs")  # come prepared, in data/
REQUIRED = {"data_root", "data_format", "train_data", "valid_data", "test_data", "min_categr_count", "group_id"}
REQUIRED |= {"feature_cols", "label_col"}
SCENARIOS = {
    "kuairand_pure_window_tabs": ("tab", {"0", "1", "4"}),
    "kuairand_pure_tabs": ("tab", {"0", "1", "4"}),
    "kuairand_tiny_tabs": ("tab", {"0", "1", "4"}),
    "movielens_1m": ("scenario", {"0", "1", "2"}),
}
AMAZON = {
    "amazon_sports_din": "Sports_and_Outdoors",
    "amazon_sports_din_holdout": "Sports_and_Outdoors",
    "amazon_beauty_din_holdout": "Beauty",
    "amazon_toys_din_holdout": "Toys_and_Games",
}
X1_COLUMNS = {
    "amazonelectronics_x1": "label,user_id,item_id,cate_id,item_history,cate_history",
    "taobaoad_x1": "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,"
    "pvalue_level,shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,customer,brand,price,"
    "pid,btag",
    "kuaivideo_x1": "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items",
    "microvideo1.7m_x1": "user_id,item_id,cate_id,is_click,timestamp,clicked_items,clicked_categories",
}
LABELS = {"clk", "label", "is_click", "is_like", "is_follow"}
HISTORIES = "history his pos_items neg_items clicked_items clicked_categories".split()


def load(path: Path) -> dict:
    (dataset_id, config), *others = yaml.safe_load(path.read_text()).items()
    assert dataset_id == path.stem and not others
    return config


def columns(config: dict) -> dict[str, dict]:
    """Returns every feature column by its name, in the file's order."""
    names = [(col["name"] if isinstance(col["name"], list) else [col["name"]], col) for col in config["feature_cols"]]
    return {name: col for group, col in names for name in group}


def x1_rows(header: str) -> str:
    """Writes 40 rows: an id, or a history of two ids, from five values."""
    rows = [header]
    for i in range(40):
        row = [
            f"{i % 2}" if name in LABELS else f"{i % 5}^{i % 4}" if name.endswith(tuple(HISTORIES)) else f"{i % 5}"
            for name in header.split(",")
        ]
        rows.append(",".join(row))
    return "\n".join(rows) + "\n"


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepares a data set from small raw files into the folder that its YAML names."""

    def make(dataset_id: str) -> Path:
        raw, out = tmp_path / "raw", tmp_path / "data" / "prepared" / dataset_id
        if dataset_id in SHIPPED:
            shutil.copytree(ROOT / "data" / dataset_id, tmp_path / "data" / dataset_id)
            return tmp_path
        if dataset_id.startswith("kuairand_pure_window"):
            write_window(raw, kuairand_log(0, WINDOW_DAYS))
        elif dataset_id == "kuairand_pure":
            write_pure(raw, kuairand_log(0, PURE_DAYS))
        elif dataset_id == "kuairand_pure_tabs":
            write_pure_tabs(raw, kuairand_log(0, PURE_DAYS), kuairand_log(1, PURE_DAYS))
        elif dataset_id == "movielens_1m":
            write_movielens(raw, movielens_ratings())
        elif dataset_id in AMAZON:
            write_amazon(raw, AMAZON[dataset_id])
        else:
            raw.mkdir()
            for name in DATASETS[dataset_id].files:
                (raw / name).write_text(x1_rows(X1_COLUMNS[dataset_id]))
            official = DATASETS[dataset_id].function.keywords["files"]
            digests = iter(digest for digest in official.values() if digest)
            monkeypatch.setattr(bars_x1, "md5", lambda path: next(digests))
        prepare(dataset_id, raw, out)
        return tmp_path

    return make


def test_every_known_data_set_has_a_config_and_the_other_way_round():
    assert {path.stem for path in FILES} == set(DATASETS) != set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_is_whole_and_says_where_it_comes_from(path):
    config, text = load(path), path.read_text()
    assert set(config) - {"behaviors", "scenario"} == REQUIRED
    assert ("scenario" in config) == (path.stem in SCENARIOS)
    header = text[: text.index(f"\n{path.stem}:")]
    for word in ("# Source: ", "# Protocol: ", "# Rows: ", f": flowctr prepare {path.stem} --raw "):
        assert word in header
    assert config["data_root"] == "data/built"
    for split in ("train_data", "valid_data", "test_data"):
        folder = f"data/{path.stem}/" if path.stem in SHIPPED else f"data/prepared/{path.stem}/"
        assert config[split].startswith(folder)
    assert (config["valid_data"] == config["test_data"]) == path.stem.endswith(("_x1", "_din"))


@pytest.mark.parametrize("dataset_id", SHIPPED)
def test_the_tiny_tables_are_those_that_prepare_makes(tmp_path, dataset_id):
    for path in prepare(dataset_id, ROOT / "data" / "kuairand_pure_window", tmp_path):
        shipped = pl.read_parquet(ROOT / "data" / dataset_id / path.name)
        assert shipped.equals(pl.read_parquet(path)) and not shipped.is_empty()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_features_fit_together(path):
    config = load(path)
    features = columns(config)
    order = list(features)
    sequences = {name for name, col in features.items() if col["type"] == "sequence"}
    for name, col in features.items():
        if "share_embedding" in col:  # FuxiCTR merges into a vocabulary that exists already
            assert order.index(col["share_embedding"]) < order.index(name)
            assert features[col["share_embedding"]]["type"] == "categorical"
    behaviors = config.get("behaviors", {})
    assert {column for group in behaviors.values() for column in group} == sequences
    for group in behaviors.values():
        assert len({(features[column]["max_len"], features[column]["padding"]) for column in group}) == 1
    for name in sequences:  # one token per event: nothing pools over the steps
        assert features[name].get("feature_encoder", "pooling") in (None, "nn.Linear(64, 64, bias=False)")
    assert features[config["group_id"]]["type"] == "meta"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fuxictr_encodes_the_prepared_tables_by_it(path, prepared, monkeypatch):
    """Runs FuxiCTR's own preprocessing and vocabularies (without pretrained vectors) on small prepared tables."""
    config = load(path)
    monkeypatch.chdir(prepared(path.stem))
    for col in config["feature_cols"]:
        if "pretrained_emb" in col:
            assert Path(col.pop("pretrained_emb")).is_file()
    processor = FeatureProcessor(dataset_id=path.stem, **config)
    tables = {
        split: processor.preprocess(processor.read_data(config[f"{split}_data"], config["data_format"])).collect()
        for split in ("train", "valid", "test")
    }
    processor.fit(tables["train"].lazy(), min_categr_count=1)
    labels = processor.feature_map.labels
    assert all(set(table[label].unique()) <= {0, 1} for table in tables.values() for label in labels)
    encoded = processor.transform({name: tables["test"][name].to_list() for name in tables["test"].columns})
    features = columns(config)
    for group in config.get("behaviors", {}).values():
        steps = [encoded[column] != 0 for column in group]
        assert steps[0].any() and all((step == steps[0]).all() for step in steps)  # aligned, real event by real event
        assert all(step.shape == (tables["test"].height, features[group[0]]["max_len"]) for step in steps)
    source = features[config["group_id"]].get("preprocess", config["group_id"]).removeprefix("copy_from(").rstrip(")")
    raw = pl.scan_parquet if config["data_format"] == "parquet" else pl.scan_csv
    expected = raw(config["test_data"]).select(pl.col(source).cast(pl.Int64)).collect().to_series()
    assert encoded[config["group_id"]].tolist() == expected.to_list()


@pytest.mark.parametrize("dataset_id", SCENARIOS)
def test_every_scenario_gets_an_id_however_rare_it_is(dataset_id, prepared, monkeypatch):
    """Encodes with the config's own settings: of its columns only the scenario and buckets keep what occurs once."""
    config = load(ROOT / "data_configs" / f"{dataset_id}.yaml")
    monkeypatch.chdir(prepared(dataset_id))
    column, scenarios = SCENARIOS[dataset_id]
    train = pl.read_parquet(config["train_data"])
    rare = max(scenarios)
    once = pl.concat([train.filter(pl.col(column) != rare), train.filter(pl.col(column) == rare).head(1)])
    first = pl.int_range(pl.len()) == 0
    once = once.with_columns(pl.when(first).then(999).otherwise(pl.col(pl.Int32)).name.keep())  # buckets
    once.write_parquet(config["train_data"])
    processor = Processor(
        dataset_id=dataset_id, **{key: config[key] for key in ("feature_cols", "label_col", "data_root")}
    )
    frame = processor.preprocess(processor.read_data(config["train_data"], "parquet"))
    processor.fit(frame, frame.select("group_id"), config["min_categr_count"])
    assert config["scenario"] == column
    for name, col in columns(config).items():
        if col["type"] == "categorical" and col["active"]:
            counts = dict(once[name].value_counts().iter_rows())
            least = 1 if name == column or col["dtype"] == "int" else config["min_categr_count"]
            vocabulary = set(processor.processor_dict[f"{name}::tokenizer"].vocab) - {"__PAD__", "__OOV__"}
            kept = {value for value, count in counts.items() if count >= least}
            # what a history holds is in the vocabulary of its column too
            assert vocabulary >= kept if "behaviors" in config else vocabulary == kept, name
    assert set(processor.processor_dict[f"{column}::tokenizer"].vocab) - {"__PAD__", "__OOV__"} == scenarios
