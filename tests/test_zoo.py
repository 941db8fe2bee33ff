"""FuxiCTR's model folders on our data: a small folder of each of its layouts, written here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flowctr  # noqa: F401  before fuxictr, so that it needs no ray
import fuxictr
import numpy as np
import pytest
import torch
from flowctr import cli, config, experiment, zoo
from flowctr.config import ConfigError
from flowctr.data import H5DataLoader, build_h5, load_feature_map
from flowctr.trained import load_trained
from flowctr.weights import redraw_embeddings
from fuxictr.pytorch.models import MultiTaskModel
from fuxictr.pytorch.torch_utils import seed_everything
from toy import toy_feature_map
from typer.testing import CliRunner

ATTENTION = """
import torch
from torch import nn
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.layers import FeatureEmbeddingDict, MLP_Block
from .blocks import read


class Attends(BaseModel):
    def __init__(self, feature_map, model_id="Attends", gpu=-1, embedding_dim=4, hidden_units=[8], learning_rate=1e-3,
                 att_target_field=[("item_id", "cate_id")], att_sequence_field=[("click_history", "cate_history")],
                 att_neg_seq_field=[("neg_history",)], context_field="btag", aux_loss_alpha=0,
                 embedding_regularizer=None, net_regularizer=None, **kwargs):
        super(Attends, self).__init__(feature_map, model_id=model_id, gpu=gpu,
                                      embedding_regularizer=embedding_regularizer,
                                      net_regularizer=net_regularizer, **kwargs)
        self.targets, self.sequences = att_target_field, att_sequence_field
        self.embedding_layer = FeatureEmbeddingDict(feature_map, embedding_dim)
        self.mlp = MLP_Block(feature_map.sum_emb_out_dim(), hidden_units=hidden_units, output_dim=1,
                             output_activation=self.output_activation)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        embedded = self.embedding_layer(X)
        for target, sequence in zip(self.targets, self.sequences):
            events, mask = read(sequence, embedded), X[sequence[0]] != 0
            scores = (events * read(target, embedded).unsqueeze(1)).sum(-1).masked_fill(~mask, -1e9).softmax(dim=-1)
            pooled = (scores.unsqueeze(-1) * events).sum(dim=1)
            embedded.update(zip(sequence, pooled.chunk(len(sequence), dim=-1)))
        return {"y_pred": self.mlp(torch.cat(list(embedded.values()), dim=-1))}
"""
BLOCKS = """
import torch


def read(fields, embedded):
    return torch.cat([embedded[name] for name in fields], dim=-1)
"""
RECURRENT = """
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.layers import FeatureEmbeddingDict, MLP_Block


class Remembers(BaseModel):
    def __init__(self, feature_map, embedding_dim=4, learning_rate=1e-2, target_field="item_id",
                 sequence_field="click_history", **kwargs):
        super().__init__(feature_map, **kwargs)
        self.sequence = sequence_field[0][0]
        self.embedding_layer = FeatureEmbeddingDict(feature_map, embedding_dim)
        self.gru = nn.GRU(embedding_dim, embedding_dim, batch_first=True)
        self.fc = nn.Linear(2 * embedding_dim, 1)
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        embedded = self.embedding_layer(X)
        lengths = (X[self.sequence] != 0).sum(dim=1).clamp(min=1).cpu()
        packed = pack_padded_sequence(embedded[self.sequence], lengths, batch_first=True, enforce_sorted=False)
        state = self.gru(packed)[1].squeeze(0)
        return {"y_pred": self.output_activation(self.fc(torch.cat([state, embedded["item"]], dim=-1)))}
"""
TASKS = """
from torch import nn
from fuxictr.pytorch.models import MultiTaskModel
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block


class Towers(MultiTaskModel):
    def __init__(self, feature_map, task=["binary_classification"], num_tasks=1, model_id="Towers", gpu=-1,
                 learning_rate=1e-3, embedding_dim=4, tower_hidden_units=[8], **kwargs):
        super(Towers, self).__init__(feature_map, task=task, num_tasks=num_tasks, model_id=model_id, gpu=gpu, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.towers = nn.ModuleList([MLP_Block(feature_map.sum_emb_out_dim(), hidden_units=tower_hidden_units,
                                               output_dim=1) for _ in range(num_tasks)])
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        x = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        outputs = zip(self.feature_map.labels, self.output_activation, self.towers)
        return {f"{label}_pred": activation(tower(x)) for label, activation, tower in outputs}
"""
WIDE = """
from torch import nn
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.layers import FeatureEmbedding, LogisticRegression


class Wide(BaseModel):
    def __init__(self, feature_map, embedding_dim=4, learning_rate=1e-3, use_wide=True, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
        self.fc = nn.Linear(feature_map.sum_emb_out_dim(), 1)
        self.lr_layer = LogisticRegression(feature_map) if use_wide else None
        self.compile(kwargs["optimizer"], kwargs["loss"], learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        X = self.get_inputs(inputs)
        logit = self.fc(self.embedding_layer(X, flatten_emb=True))
        return {"y_pred": self.output_activation(logit + self.lr_layer(X) if self.lr_layer else logit)}
"""
VERSION = """
import fuxictr
from packaging import version
assert version.parse(fuxictr.__version__) >= version.parse("2.3.7")
"""
MODEL_CONFIG = """
Base:
    metrics: [AUC, logloss]
    optimizer: adam
    loss: binary_crossentropy
    embedding_dim: 4
    learning_rate: 2e-2
    batch_size: 32
    epochs: 2
    shuffle: False
    seed: 1
    verbose: 0

attends:
    zoo: ../FuxiCTR/model_zoo/Attends
    model: Attends
    dataset_id: rows
    label: click

remembers:
    zoo: ../FuxiCTR/model_zoo/Remembers
    model: Remembers
    dataset_id: rows
    label: click

wide:
    zoo: ../FuxiCTR/model_zoo/Wide
    model: Wide
    dataset_id: rows
    label: click

towers:
    zoo: ../FuxiCTR/model_zoo/multitask/Towers
    model: Towers
    dataset_id: rows
    embedding_regularizer: 1e-4
"""
DATASET_CONFIG = """
rows: &rows
    data_root: data
    data_format: csv
    train_data: data/train.csv
    valid_data: data/valid.csv
    test_data: data/test.csv
    feature_cols:
        - {name: [item, cate], active: True, dtype: str, type: categorical}
        - {name: price, active: True, dtype: float, type: numeric}
        - &items {name: item_history, active: True, dtype: str, type: sequence, splitter: ^, max_len: 6, padding: pre,
                  share_embedding: item, feature_encoder: null}
        - &cates {name: cate_history, active: True, dtype: str, type: sequence, splitter: ^, max_len: 6, padding: pre,
                  share_embedding: cate, feature_encoder: null}
        - &gaps {name: gap_history, active: True, dtype: str, type: sequence, splitter: ^, max_len: 6, padding: pre,
                 feature_encoder: null}
    label_col: [{name: click, dtype: float}, {name: like, dtype: float}]
    behaviors: {watch: [item_history, cate_history, gap_history]}

post:
    <<: *rows
    feature_cols:
        - {name: [item, cate], active: True, dtype: str, type: categorical}
        - {name: price, active: True, dtype: float, type: numeric}
        - {<<: *items, padding: post}
        - {<<: *cates, padding: post}
        - {<<: *gaps, padding: post}
"""
MODELS = {
    "Attends": {"Attends.py": ATTENTION, "blocks.py": BLOCKS, "__init__.py": "from .Attends import *"},
    "Remembers": {"Remembers.py": RECURRENT, "__init__.py": "from .Remembers import Remembers"},
    "Wide": {"Wide.py": WIDE, "__init__.py": "from .Wide import *"},
    "multitask/Towers": {"Towers.py": TASKS, "__init__.py": "from .Towers import *"},
}


def write_folder(folder: Path, files: dict[str, str]) -> Path:
    (folder / "src").mkdir(parents=True)
    for name, text in files.items():
        (folder / "src" / name).write_text(text)
    (folder / "fuxictr_version.py").write_text(VERSION)
    return folder


def write_table(path: Path, rows: int, seed: int) -> None:
    """Writes rows whose label depends on the most recent event, some with an empty history."""
    random = np.random.default_rng(seed)
    lines = ["item,cate,price,item_history,cate_history,gap_history,click,like"]
    for _ in range(rows):
        item, events = random.integers(8), random.integers(8, size=random.integers(6))
        click = int(len(events) > 0 and (events[-1] + item) % 2 == 0)
        history = ["^".join(map(str, values)) for values in (events, events % 3, events % 2)]
        columns = [item, item % 3, f"{random.normal():.3f}", *history, click, random.integers(2)]
        lines.append(",".join(map(str, columns)))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A FuxiCTR checkout, and a folder of configurations and data beside it."""
    root = tmp_path_factory.mktemp("zoo")
    for name, files in MODELS.items():
        write_folder(root / "FuxiCTR" / "model_zoo" / name, files)
    (root / "config").mkdir()
    (root / "config" / "model_config.yaml").write_text(MODEL_CONFIG)
    (root / "config" / "dataset_config.yaml").write_text(DATASET_CONFIG)
    (root / "data").mkdir()
    for seed, (split, rows) in enumerate({"train": 320, "valid": 100, "test": 100}.items()):
        write_table(root / "data" / f"{split}.csv", rows, seed)
    return root


def run(place, expid, *overrides):
    return json.loads(experiment.run(place / "config", expid, overrides=overrides).read_text())


def adapted(model_class, feature_map=None, **params):
    """Gives the parameters that `zoo.adapt` makes of some."""
    params = {"behaviors": {"watch": ["watch_item", "watch_author"], "like": ["like_item"]}, "padding": "any", **params}
    zoo.adapt(model_class, feature_map or toy_feature_map(), params, "none.h5")
    return params


# Equal to FuxiCTR


@pytest.mark.parametrize("expid", ["attends", "wide", "towers"])
def test_a_run_gives_what_fuxictrs_own_fit_gives(place, expid):
    result = run(place, expid)

    # As FuxiCTR's run_expid.py does it, with what a user of FuxiCTR writes into its YAML.
    encoders = {name: "layers.MaskedAveragePooling()" for name in ("item_history", "cate_history", "gap_history")}
    fields = {}
    if expid == "attends":
        encoders = {"item_history": None, "cate_history": None, "gap_history": "layers.MaskedAveragePooling()"}
        fields = {"att_target_field": [("item", "cate")], "att_sequence_field": [("item_history", "cate_history")]}
    params = config.load(place / "config", expid)
    params |= {"feature_specs": [{"name": name, "feature_encoder": value} for name, value in encoders.items()]}
    params |= {"model_root": str(place / "fuxictr"), "num_tasks": 2, "task": "binary_classification", "gpu": -1}
    files = build_h5(params)
    feature_map = load_feature_map(params)
    batches = {
        split: list(H5DataLoader(feature_map, file, split="test", batch_size=32)) for split, file in files.items()
    }
    seed_everything(params["seed"])
    model = zoo.models(params["zoo"])[params["model"]](feature_map, **{**params, **fields})
    Path(model.model_dir).mkdir(parents=True, exist_ok=True)
    model.fit(batches["train"], validation_data=batches["valid"], **{**params, **fields})

    for split in ("valid", "test"):
        expected = model.evaluate(batches[split])
        assert {key: result["metrics"][split][key] for key in expected} == pytest.approx(expected, abs=1e-9)
    ours = torch.load(place / "checkpoints" / "rows" / f"{expid}-s1.model", weights_only=True)
    for key, weights in model.state_dict().items():
        assert torch.equal(weights, ours[key]), key
    assert result["labels"] == (["click", "like"] if expid == "towers" else ["click"])


# Folders


def test_folders_are_imported_apart_and_leave_the_path_as_it_is(tmp_path):
    path = list(sys.path)
    first = write_folder(tmp_path / "a" / "Same", {"__init__.py": "from .Same import *", "Same.py": TASKS})
    second = write_folder(tmp_path / "b" / "Same", {"__init__.py": "from .Same import *", "Same.py": TASKS})
    models = [zoo.models(folder) for folder in (first, second)]
    assert [list(found) for found in models] == [["Towers"], ["Towers"]]  # not MultiTaskModel, which it imports
    assert models[0]["Towers"] is not models[1]["Towers"]
    assert zoo.models(first)["Towers"] is models[0]["Towers"]
    assert issubclass(models[0]["Towers"], MultiTaskModel)
    assert sys.path == path
    assert "src" not in sys.modules


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("from fuxictr.tensorflow.models import BaseModel", r"line 1 of src/__init__.py: No module named 'tensorflow'"),
        ("\nfrom fuxictr.pytorch.layers import EmbeddingLayer", r"line 2 of src/__init__.py: .*'EmbeddingLayer'"),
        ("from .old import *", r"line 1 of src/__init__.py: No module named '.*\.old'"),
        ("x = 1", r"no model, no subclass of fuxictr.pytorch.models.BaseModel"),
    ],
)
def test_a_folder_of_another_generation_is_refused_with_what_is_missing(tmp_path, init, message):
    folder = write_folder(tmp_path / "Old", {"__init__.py": init})
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message) as raised:
        zoo.models(folder)
    assert str(folder) in str(raised.value)
    if "line" in message:
        assert f"fuxictr {fuxictr.__version__}" in str(raised.value)
        assert not any(name.startswith("flowctr_zoo") for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "embedded = self.embedding_layer(X)",
            "embedded = self.embedding_layer(X, flat=1)",
            r" in line 27 of .*'flat'",
        ),
        (
            "    def forward",
            "    def add_loss(self, inputs):\n        return 0\n\n    def forward",
            r": Attends.add_loss\(\)",
        ),
        ("self.model_to_device()", "self.to_device()", r" in line 23 of src/Attends.py: .* no attribute 'to_device'"),
    ],
)
def test_a_folder_that_is_imported_but_does_not_run_is_refused(place, tmp_path, old, new, message):
    """Such as FuxiCTR 2.0 and 2.1, which call the layers, and the loss, in other ways."""
    assert ATTENTION.count(old) == 1
    folder = write_folder(tmp_path / "Old", {**MODELS["Attends"], "Attends.py": ATTENTION.replace(old, new)})
    with pytest.raises(ValueError, match=rf"{folder} does not run with .* fuxictr {fuxictr.__version__}{message}"):
        run(place, "attends", f"zoo={folder}", f"model_root={tmp_path}")


def test_a_folder_without_src_is_refused(tmp_path):
    for framework in ("torch", "tf"):
        write_folder(tmp_path / "DeepFM" / f"DeepFM_{framework}", {"__init__.py": ""})
    with pytest.raises(ValueError, match=r"lacks src/__init__.py.* name one: DeepFM_tf, DeepFM_torch"):
        zoo.models(tmp_path / "DeepFM")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"lacks src/__init__.py.* name FuxiCTR/model_zoo/<MODEL>"):
        zoo.models(tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        zoo.models(tmp_path / "nowhere")


def test_a_folder_of_a_later_fuxictr_is_refused(tmp_path):
    folder = write_folder(tmp_path / "Later", MODELS["multitask/Towers"])
    (folder / "fuxictr_version.py").write_text(VERSION.replace("2.3.7", "2.13.0"))
    with pytest.raises(ValueError, match=rf"for fuxictr 2.13.0 or later, {fuxictr.__version__} is installed"):
        zoo.models(folder)


def test_origin_follows_the_code(tmp_path):
    folder = write_folder(tmp_path / "model_zoo" / "multitask" / "Towers", MODELS["multitask/Towers"])
    before = zoo.origin(folder)
    assert before["folder"] == "model_zoo/multitask/Towers"
    assert zoo.origin(folder) == before
    (folder / "src" / "Towers.py").write_text(TASKS + "\n")
    assert zoo.origin(folder)["sha256"] != before["sha256"]
    copy = write_folder(tmp_path / "elsewhere" / "Mine", MODELS["multitask/Towers"])
    assert zoo.origin(copy) == {"folder": "Mine", "sha256": before["sha256"]}


# Configuration and command line


def test_mistakes_come_in_one_message(place):
    with pytest.raises(ConfigError) as raised:
        config.load(
            place / "config", "attends", ["label=clicks", "hidden_unit=[8]", "padding=left", "aux_loss_alpha=a"]
        )
    message = str(raised.value)
    assert message.startswith("4 mistakes")
    assert "unknown key 'hidden_unit'; the nearest valid name is 'hidden_units'" in message
    assert "unknown label 'clicks'; the nearest is 'click' (known: click, like)" in message
    assert "'padding' must be one of null, pre, post, any; got 'left'" in message


def test_a_model_for_one_label_wants_a_choice_among_several(place):
    with pytest.raises(
        ConfigError, match=r"Attends predicts one label, the data set has click, like; choose one.*label:"
    ):
        config.load(place / "config", "attends", ["label=null"])
    params = config.load(place / "config", "attends", ["label=like"])
    build_h5(params)
    feature_map = load_feature_map(params)
    assert feature_map.labels == ["like"]
    assert set(feature_map.features) == {"item", "cate", "price", "item_history", "cate_history", "gap_history"}
    # An h5 data set tells its labels only once it is loaded.
    with pytest.raises(ValueError, match="has click, like"):
        adapted(zoo.models(params["zoo"])["Attends"], toy_feature_map(("click", "like")))
    with pytest.raises(ValueError, match=r"label names 'likes', which .* lacks; it has click, like"):
        load_feature_map({**params, "label": "likes"})


def test_the_chosen_label_is_trained_on(place):
    result = run(place, "attends", "label=like", "epochs=1", f"model_root={place / 'like'}")
    assert result["labels"] == ["like"]
    click = run(place, "attends", "epochs=1", f"model_root={place / 'click'}")
    assert click["metrics"]["valid"]["logloss"] != result["metrics"]["valid"]["logloss"]


def test_a_model_that_the_folder_lacks_is_refused_though_flowctr_has_it(place):
    with pytest.raises(ConfigError, match=r"unknown model 'INFNet'; the nearest is 'Towers' \(known: Towers\)"):
        config.load(place / "config", "towers", ["model=INFNet"])


def test_zoo_counts_from_the_config_folder_and_in_an_override_from_here(place, monkeypatch):
    assert config.load(place / "config", "towers")["zoo"] == str(
        place / "FuxiCTR" / "model_zoo" / "multitask" / "Towers"
    )
    monkeypatch.chdir(place / "FuxiCTR")
    params = config.load(place / "config", "towers", ["zoo=model_zoo/Attends", "model=Attends", "label=click"])
    assert params["zoo"] == str(place / "FuxiCTR" / "model_zoo" / "Attends")


def test_an_experiment_is_read_without_the_folder_of_its_model(place, tmp_path):
    changes = ["batch_size=7", "embedding_regularizer=1"]
    params = config.load(place / "config", "towers", changes)
    assert config.read(place / "config", "towers", changes) == params
    absent = [*changes, f"zoo={tmp_path / 'absent'}"]
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(place / "config", "towers", absent)
    assert config.read(place / "config", "towers", absent) == {**params, "zoo": str(tmp_path / "absent")}
    with pytest.raises(ConfigError, match="--set takes key=value; got 'seed'"):
        config.read(place / "config", "towers", ["seed"])


def test_command_line(place, monkeypatch):
    """--zoo overrides the configuration's, and nothing is written to FuxiCTR's folder."""
    monkeypatch.chdir(place)
    folder = place / "FuxiCTR" / "model_zoo" / "multitask" / "Towers"
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)

    def invoke(*arguments):
        return CliRunner().invoke(cli.app, ["run", "--expid", "towers", "--set", "epochs=1", *map(str, arguments)])

    run = invoke("--zoo", folder, "--config", place / "config", "--set", "zoo=nowhere", "--set", "seed=3")
    assert run.exit_code == cli.WRONG_INPUT  # --set is the last word
    run = invoke("--zoo", folder, "--config", place / "config", "--set", "seed=3")
    assert run.exit_code == 0, run.output
    (path,) = place.glob("results/towers-s3-*.json")
    origin = json.loads(path.read_text())["zoo"]
    assert origin == {**zoo.origin(folder), "commit": None}

    run = invoke("Towers", "--zoo", folder)
    assert run.exit_code == cli.WRONG_INPUT
    assert "exclude each other" in run.output
    run = invoke()
    assert run.exit_code == cli.WRONG_INPUT
    assert "name MODEL, or a model folder of FuxiCTR with --zoo" in run.output
    run = invoke("--zoo", folder / "nowhere")
    assert run.exit_code == cli.WRONG_INPUT
    assert "there is no zoo folder" in run.output
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_a_configuration_inside_the_zoo_folder_writes_here(place, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "FuxiCTR" / "model_zoo" / "Towers", MODELS["multitask/Towers"])
    (folder / "config").mkdir()
    text = re.sub(r" +zoo: .*\n", "", MODEL_CONFIG)
    (folder / "config" / "model_config.yaml").write_text(text)
    data = DATASET_CONFIG.replace(": data", f": {place}/data")
    (folder / "config" / "dataset_config.yaml").write_text(data)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ["run", "--zoo", str(folder), "--expid", "towers", "--set", "epochs=1"]
    outcome = CliRunner().invoke(cli.app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"checkpoints", "config.csv", "data", "results"}
    assert {path.name for path in folder.iterdir()} == {"config", "fuxictr_version.py", "src"}


def test_the_commit_of_the_checkout_is_recorded(place, tmp_path):
    folder = write_folder(tmp_path / "model_zoo" / "Towers", MODELS["multitask/Towers"])
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    result = run(place, "towers", f"zoo={folder}", "epochs=1", "seed=4")
    assert result["zoo"]["commit"] == head.stdout.strip()
    copy = write_folder(tmp_path / "copied" / "Towers", MODELS["multitask/Towers"])  # that checkout does not track it
    assert run(place, "towers", f"zoo={copy}", "epochs=1", "seed=5")["zoo"]["commit"] is None


# Fields


@pytest.fixture(scope="module")
def attends(place):
    return zoo.models(place / "FuxiCTR" / "model_zoo" / "Attends")["Attends"]


def test_fields_are_derived_from_behaviors(attends):
    feature_map = toy_feature_map()
    feature_map.features["watch_author"]["share_embedding"] = "like_author"  # which shares that of author
    feature_map.features["like_author"] = {**feature_map.features["like_item"], "share_embedding": "author"}
    feature_map.features["gap"] = {"type": "sequence", "vocab_size": 5, "max_len": 8, "feature_encoder": None}
    behaviors = {"watch": ["watch_item", "watch_author", "gap"], "like": ["like_item", "left_out"], "gaps": ["gap"]}
    params = adapted(attends, feature_map, behaviors=behaviors)
    assert params["att_sequence_field"] == [("watch_item", "watch_author"), "like_item"]
    assert params["att_target_field"] == [("item", "author"), "item"]
    assert params["att_neg_seq_field"] == params["context_field"] == []
    encoders = {name: spec.get("feature_encoder") for name, spec in feature_map.features.items() if "max_len" in spec}
    pooled = dict.fromkeys(["like_author", "gap"], "layers.MaskedAveragePooling()")
    assert encoders == {**dict.fromkeys(["watch_item", "watch_author", "like_item"]), **pooled}


def test_the_width_of_embeddings_is_the_models_default(attends):
    feature_map = toy_feature_map()
    assert adapted(attends, feature_map)["embedding_dim"] == feature_map.default_emb_dim == 4
    assert adapted(attends, feature_map, embedding_dim=6)["embedding_dim"] == feature_map.default_emb_dim == 6


def test_keys_of_the_experiment_come_first(attends):
    feature_map = toy_feature_map()
    feature_map.features["watch_author"]["feature_encoder"] = "layers.MaskedSumPooling()"
    feature_map.features["like_item"]["feature_encoder"] = "layers.MaskedSumPooling()"
    given = {"att_sequence_field": ["like_item"], "att_target_field": ["item"], "context_field": None}
    params = adapted(attends, feature_map, **given, att_neg_seq_field=["watch_item"])
    assert params["att_sequence_field"] == ["like_item"]
    assert params["att_target_field"] == ["item"]
    assert params["context_field"] == []
    encoders = [feature_map.features[name]["feature_encoder"] for name in ("like_item", "watch_item", "watch_author")]
    assert encoders == [None, None, "layers.MaskedSumPooling()"]


def test_a_field_that_the_data_lack_is_named(attends):
    with pytest.raises(
        ValueError, match=r"Attends needs fields that data set toy lacks: 'item_id' \(att_target_field\)"
    ):
        adapted(attends, behaviors=None)
    with pytest.raises(ValueError, match=r"'watch_items' \(att_sequence_field\) \(did you mean 'watch_item'"):
        adapted(attends, att_sequence_field=["watch_items"], att_target_field=["item"])
    with pytest.raises(ValueError, match=r"'user_group' \(att_target_field\)"):  # a meta column is no input
        adapted(attends, att_sequence_field=["watch_item"], att_target_field=["user_group"])
    message = r"a target for each sequence, of as many fields; got att_target_field=\[.*\], att_sequence_field="
    with pytest.raises(ValueError, match=rf"{message}\['watch_item'\]"):
        adapted(attends, att_sequence_field=["watch_item"])
    with pytest.raises(ValueError, match=rf"{message}\[\('watch_item', 'watch_author'\)\]; name them all"):
        adapted(attends, att_sequence_field=[("watch_item", "watch_author")], att_target_field=["item"])
    with pytest.raises(ValueError, match="att_sequence_field names 'author', which is categorical; name a sequence"):
        adapted(attends, att_sequence_field=["author"], att_target_field=["item"])
    with pytest.raises(
        ValueError, match=r"aux_loss_alpha=1 needs sequences of negative samples; name .*att_neg_seq_field"
    ):
        adapted(attends, aux_loss_alpha=1)


# Padding


@pytest.mark.parametrize("side", ["pre", "post"])
def test_align_moves_the_padding_and_keeps_the_events(side):
    rows = [[0, 0, 3, 4], [3, 4, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4], [0, 3, 0, 4], [3, 0, 4, 0]]
    expected = []
    for row in rows:
        events = list(row)
        while any(events) and events[0 if side == "post" else -1] == 0:  # rotate, one step at a time
            events = events[1:] + events[:1] if side == "post" else events[-1:] + events[:-1]
        expected.append(events)
    batch = {"a": torch.tensor(rows, dtype=torch.int32), "item": torch.arange(6)}
    aligned = zoo.align(batch, [["a"]], side)
    assert aligned["a"].tolist() == expected
    assert aligned["a"].dtype == torch.int32
    assert torch.equal(aligned["item"], batch["item"])
    assert batch["a"].tolist() == rows
    assert zoo.align(aligned, [["a"]], side)["a"].tolist() == expected


def test_columns_of_a_behavior_rotate_together():
    batch = {"a": torch.tensor([[0, 0, 5, 6]]), "b": torch.tensor([[0, 0, 0, 7]])}  # b is unknown at the first event
    aligned = zoo.align(batch, [["a", "b"]], "post")
    assert aligned["a"].tolist() == [[5, 6, 0, 0]]
    assert aligned["b"].tolist() == [[0, 7, 0, 0]]


def test_a_recurrent_model_gets_the_padding_that_it_assumes(place):
    """Data padded on either side give the same run, but not when the padding is left where it is."""
    results = {
        name: run(place, "remembers", *overrides, f"model_root={place / name}")
        for name, overrides in {
            "pre": [],
            "post": ["dataset_id=post"],
            "pre as it is": ["padding=any"],
            "post as it is": ["dataset_id=post", "padding=any"],
        }.items()
    }
    curves = {name: result["curves"] for name, result in results.items()}
    assert curves["pre"] == curves["post"] == curves["post as it is"]
    assert curves["pre as it is"]["train"][0]["loss"] != curves["pre"]["train"][0]["loss"]
    log = (place / "pre" / "rows" / "remembers-s1.log").read_text()
    assert "Remembers wants sequences padded 'post': the padding is moved there" in log
    assert "padding is moved" not in (place / "post" / "post" / "remembers-s1.log").read_text()


def test_packing_is_found_in_another_file_of_the_folder(place, tmp_path):
    model, blocks = RECURRENT.split("from fuxictr.pytorch.models", 1)
    files = {
        "Remembers.py": "from .blocks import pack\nfrom torch import nn\nfrom fuxictr.pytorch.models"
        + blocks.replace("pack_padded_sequence(", "pack("),
        "blocks.py": model + "\ndef pack(*args, **kwargs):\n    return pack_padded_sequence(*args, **kwargs)\n",
        "__init__.py": "from .Remembers import Remembers",
    }
    params = config.load(place / "config", "remembers")
    train = build_h5(params)["train"]
    remembers = zoo.models(write_folder(tmp_path / "Remembers", files))["Remembers"]
    assert zoo.adapt(remembers, load_feature_map(params), params, train).forward is not remembers.forward


@pytest.mark.parametrize(("dataset_id", "moved"), [("rows", False), ("post", True)])
@pytest.mark.parametrize("name", ["TransAct", "DMR"])
def test_some_models_read_the_last_steps(place, attends, name, dataset_id, moved):
    model = type(name, (attends,), {"__module__": attends.__module__})
    params = config.load(place / "config", "attends", [f"dataset_id={dataset_id}"])
    adapted_class = zoo.adapt(model, load_feature_map(params), params, build_h5(params)["train"])
    assert (adapted_class.forward is not model.forward) == moved


def test_padding_of_the_experiment_comes_first(place, attends):
    params = config.load(place / "config", "remembers")
    train = build_h5(params)["train"]
    remembers = zoo.models(params["zoo"])["Remembers"]
    for model, padding, moved in [
        (attends, None, False),
        (attends, "post", True),
        (attends, "pre", False),
        (remembers, None, True),
        (remembers, "pre", False),
    ]:
        params = {**params, "padding": padding}
        adapted_class = zoo.adapt(model, load_feature_map(params), dict(params), train)
        assert (adapted_class.forward is not model.forward) == moved
        assert adapted_class.__name__ == model.__name__


# Afterwards


def test_a_trained_model_is_found_again(place):
    result = run(place, "remembers", "seed=5")
    trained = load_trained(place / "config", "remembers", overrides=["seed=5"])
    loader = H5DataLoader(trained.feature_map, trained.files["test"], split="test", batch_size=32)
    assert trained.model.evaluate(loader, ["AUC", "logloss"]) == pytest.approx(
        {name: result["metrics"]["test"][name] for name in ("AUC", "logloss")}
    )
    with pytest.raises(FileNotFoundError, match=r"flowctr run --expid remembers --config \S+ --set seed=6$"):
        load_trained(place / "config", "remembers", overrides=["seed=6"])


def test_predict_scores_raw_rows(place):
    run(place, "attends", "seed=7")
    out = place / "scores.csv"
    arguments = ["predict", "--expid", "attends", "--config", place / "config", "--seed", "7"]
    arguments += ["--data", place / "data" / "test.csv", "--out", out]
    outcome = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert outcome.exit_code == 0, outcome.output
    trained = load_trained(place / "config", "attends", overrides=["seed=7"])
    loader = H5DataLoader(trained.feature_map, trained.files["test"], split="test", batch_size=32)
    scores = np.loadtxt(out, delimiter=",", skiprows=1)[:, 1]
    np.testing.assert_allclose(scores, trained.model.predict(loader), atol=1e-6)


def test_columns_are_scored_in_the_order_of_training(place):
    """FuxiCTR's models concatenate what a batch holds; raw rows come in another order than `use_features` may have."""
    features = ["price", "cate_history", "cate", "item_history", "gap_history", "item"]
    used = f"use_features=[{', '.join(features)}]"
    run(place, "attends", "seed=8", used)
    trained = load_trained(place / "config", "attends", overrides=["seed=8", used])
    columns = next(iter(trained.loader(trained.files["test"], 32)))
    seen = []
    trained.model.register_forward_pre_hook(lambda model, inputs: seen.append(list(inputs[0])))
    trained.score(dict(reversed(columns.items())))
    assert seen == [features]


def test_other_code_than_that_of_the_training_is_told(place, tmp_path, monkeypatch):
    run(place, "remembers", "seed=9")
    other = shutil.copytree(config.load(place / "config", "remembers")["zoo"], tmp_path / "model_zoo" / "Remembers")
    with open(other / "src" / "__init__.py", "a") as file:
        file.write("# changed\n")
    told = []
    monkeypatch.setattr("flowctr.trained.logging.warning", lambda text, *values: told.append(text % values))
    load_trained(place / "config", "remembers", overrides=["seed=9"])
    assert not told
    load_trained(place / "config", "remembers", overrides=["seed=9", f"zoo={other}"])
    assert told == [f"remembers was trained with other code of {other}"]


# Initial weights


def new_model(place, expid, *overrides):
    """Builds the model of an experiment, untrained."""
    params = config.load(place / "config", expid, overrides)
    train, feature_map = build_h5(params)["train"], load_feature_map(params)
    adapted_class = zoo.adapt(config.find_model(params), feature_map, params, train)
    seed_everything(params["seed"])
    return adapted_class(feature_map, **params)


def linear_weights(model) -> dict[str, torch.Tensor]:
    columns = model.lr_layer.embedding_layer.embedding_layer.embedding_layers
    return {name: column.weight.detach() for name, column in columns.items()}


def test_the_linear_part_starts_small_if_the_experiment_says_so(place):
    as_it_is, small = (new_model(place, "wide", *sets) for sets in ((), ("init_linear=true",)))
    for name in ("item_history", "cate_history", "price"):  # FuxiCTR's own, and the reason for the option
        assert linear_weights(as_it_is)[name].abs().max() > 0.1
    weights = linear_weights(small)
    assert {"item", "price", "item_history", "cate_history", "gap_history"} <= weights.keys()
    assert all(0 < weight.abs().max() < 1e-3 for weight in weights.values())
    assert not any(weights[name][0].any() for name in ("item_history", "cate_history", "gap_history"))  # padding
    tables = small.embedding_layer.embedding_layer.embedding_layers
    assert tables["item_history"].weight is tables["item"].weight  # elsewhere they share as before


def test_the_linear_part_starts_small_in_every_epoch_with_new_tables(place):
    model = new_model(place, "wide", "init_linear=true")
    before = {name: weight.clone() for name, weight in linear_weights(model).items()}
    redraw_embeddings(model, in_place=False)
    after = linear_weights(model)
    for name in ("item", "item_history", "cate_history", "gap_history"):
        assert not torch.equal(before[name], after[name])
        assert after[name].abs().max() < 1e-3
    assert torch.equal(before["price"], after["price"])  # it has no table


def test_a_training_warns_of_linear_weights_that_start_large(place, monkeypatch):
    warning = "WARNING Wide: FuxiCTR starts the linear weights of item_history, cate_history at N(0, 1)"
    logs = {}
    for name, small in (("small", "true"), ("large", "false")):
        run(place, "wide", f"init_linear={small}", f"model_root={place / name}")
        logs[name] = (place / name / "rows" / "wide-s1.log").read_text()
    assert warning in logs["large"]
    assert "linear weights" not in logs["small"]
    calls = []
    monkeypatch.setattr(zoo, "warn_of_linear", calls.append)
    load_trained(place / "config", "wide", overrides=["init_linear=false", f"model_root={place / 'large'}"])
    assert not calls  # too late for these


def test_keys_for_these_folders_are_refused_without_one():
    with pytest.raises(ConfigError, match="'init_linear' is for FuxiCTR's model folders; name one with zoo"):
        config.load(config.REPOSITORY / "model_zoo" / "HSTU" / "config", "HSTU_test", ["init_linear=true"])


def test_a_model_without_a_linear_part_does_not_start_it(place):
    with pytest.raises(ValueError, match="init_linear: Wide has no linear part as it is set; leave init_linear out"):
        new_model(place, "wide", "init_linear=true", "use_wide=false")


# The configurations that come along


def test_baselines_are_complete():
    folder = config.REPOSITORY / "benchmarks" / "baselines"
    content = config.read_yaml(folder / "model_config.yaml")
    base = content.pop("Base")
    known = {path.stem for path in (config.REPOSITORY / "data_configs").glob("*.yaml")}
    suites = {}
    for expid, settings in content.items():
        model, dataset = settings["model"], settings["dataset_id"]
        name, kind, holdout = re.fullmatch(r"(\w+?)((?:_tuned)?(?:_ema|_init)?)((?:_holdout)?)", expid).groups()
        assert f"{name}{holdout}" == f"{model}_{dataset}"
        assert re.fullmatch(rf"FuxiCTR/model_zoo/(multitask/)?{model}", settings["zoo"])
        assert dataset in known
        assert not set(config.REQUIRED_KEYS) - {**base, **settings}.keys()
        suites.setdefault(f"{dataset}{kind}", set()).add(model)
    single = set("FM FmFM xDeepFM AutoInt DCNv2 GDCN FinalMLP WuKong DIN DIEN BST DMIN DMR TransAct".split())
    several = {"ShareBottom", "MMoE", "PLE"}
    assert suites == {
        "amazon_sports_din": single,
        "amazon_sports_din_holdout": single,
        "amazon_sports_din_tuned": single,
        "amazon_sports_din_holdout_tuned": single,
        "amazon_sports_din_tuned_ema": {"DIN"},
        "amazon_sports_din_holdout_tuned_ema": {"DIN"},
        "kuairand_pure_window": several | single,
        "kuairand_pure_window_init": {"FM", "FmFM", "xDeepFM", "AutoInt"},
        "kuairand_pure_window_tabs": several,
        "kuairand_tiny": single | several,
    }
