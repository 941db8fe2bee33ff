"""Batches of rows of similar length: every row once, nothing but padding cut off, models for which padding matters."""

import copy
from pathlib import Path

import flowctr  # noqa: F401  before fuxictr
import numpy as np
import pytest
import torch
from flowctr.acceleration import check_padding_invariance
from flowctr.data import H5DataLoader
from flowctr.data.format import H5Writer
from flowctr.layers import masked_mean
from flowctr.training import accelerate
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from torch import nn

ROWS, BATCH = 1000, 48
SPECS = {
    "user": {"type": "meta"},
    "hist": {"type": "sequence", "vocab_size": 300, "max_len": 17},
    "tags": {"type": "sequence", "vocab_size": 70_000, "max_len": 10},
    "price": {"type": "numeric"},
}
PADDINGS = {"hist": "pre", "tags": "post"}
CLASSES = [3, 5, 9, 17]  # 17 / 8, 17 / 4, 17 / 2 and 17, rounded up


def make_columns(paddings=PADDINGS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns = {
        "user": np.arange(ROWS, dtype=np.int32),  # names the row
        "price": rng.normal(size=ROWS).astype(np.float32),
        "click": rng.integers(0, 2, ROWS).astype(np.float32),
    }
    for name, dtype in (("hist", np.uint16), ("tags", np.int32)):
        length = SPECS[name]["max_len"]
        real = np.arange(length) < np.minimum(rng.geometric(0.3, (ROWS, 1)) - 1, length)
        ids = rng.integers(1, SPECS[name]["vocab_size"], (ROWS, length)).astype(dtype) * real
        columns[name] = ids[:, ::-1].copy() if paddings[name] == "pre" else ids
    return columns


def make_loader(folder: Path, paddings=PADDINGS, **options) -> H5DataLoader:
    with H5Writer(folder, "train", SPECS, paddings, ["click"], "digest") as writer:
        writer.append(make_columns(PADDINGS))
    settings = {"batch_size": BATCH, "shuffle": True, "seed": 3, "bucket_by_length": True, **options}
    return H5DataLoader(feature_map(folder), folder / "train", **settings)


def feature_map(folder: Path) -> FeatureMap:
    feature_map = FeatureMap("tiny", str(folder))
    feature_map.features.update(copy.deepcopy(SPECS))
    for name in ("hist", "tags"):
        feature_map.features[name] |= {"padding_idx": 0, "source": ""}
    feature_map.features["price"]["source"] = ""
    feature_map.labels = ["click"]
    feature_map.set_column_index()
    return feature_map


def lengths_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Counts per row, one by one, the steps from the padded end to the last real event of the longer sequence."""
    counted = []
    for hist, tags in zip(columns["hist"], columns["tags"]):
        steps = [i + 1 for ids in (hist[::-1], tags) for i, value in enumerate(ids) if value]
        counted.append(max(steps, default=0))
    return np.array(counted)


OPTIONS = [{}, {"num_workers": 1}, {"data_on_device": True}, {"streaming": True, "buffer_size": 200}]


@pytest.mark.parametrize("options", OPTIONS)
def test_each_row_comes_once_and_loses_nothing_but_padding(tmp_path, options):
    loader, columns = make_loader(tmp_path, **options), make_columns()
    lengths = lengths_of(columns)
    orders = []
    for _ in range(2):
        rows = []
        for batch in loader:
            users = batch["user"].numpy()
            rows.append(users)
            longest = min(length for length in CLASSES if length >= lengths[users].max())
            assert batch["hist"].shape == (len(users), longest)
            assert batch["tags"].shape == (len(users), min(longest, 10))
            for name, values in loader.padded(batch).items():
                np.testing.assert_array_equal(values.numpy(), columns[name][users])
        assert [len(users) for users in rows] == [BATCH] * 20 + [40]
        orders.append(np.concatenate(rows))
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(ROWS))
    assert not np.array_equal(*orders)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_epoch_continues_where_it_was_left(tmp_path, options, monkeypatch):
    loader = make_loader(tmp_path, **options)
    whole = [batch["user"].tolist() for batch in loader]
    reads = []
    read = loader._read
    monkeypatch.setattr(loader, "_read", lambda *arguments: (reads.append(arguments), read(*arguments)))
    for start in (7, len(loader)):
        loader.epoch, loader.start_batch = 0, start
        reads.clear()
        assert [batch["user"].tolist() for batch in loader] == whole[start:]
    assert not reads, "nothing is left of the epoch"


def test_most_batches_are_short_and_come_in_no_order_of_length(tmp_path):
    batches = list(make_loader(tmp_path))
    lengths = [batch["hist"].shape[1] for batch in batches]
    whole = sum(len(batch["user"]) for batch in batches) * 17
    assert sum(batch["hist"].numel() for batch in batches) < 0.5 * whole
    assert lengths != sorted(lengths)
    assert sorted(lengths) != lengths[::-1]


def test_where_rows_are_not_shuffled_they_keep_order_and_length(tmp_path):
    loader = make_loader(tmp_path, shuffle=False)
    batches = list(loader)
    assert {batch["hist"].shape[1] for batch in batches} == {17}
    assert torch.cat([batch["user"] for batch in batches]).tolist() == list(range(ROWS))


def test_a_file_that_does_not_say_where_it_pads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no sequence that says where it is padded"):
        make_loader(tmp_path, paddings={})


class Pooling(BaseModel):
    """Logistic regression on pooled embeddings; ``pool`` says how."""

    def __init__(self, feature_map, pool="masked", model_id="Pooling", gpu=-1, learning_rate=0.01, spread=1, **kwargs):
        super().__init__(feature_map, model_id=model_id, gpu=gpu, **kwargs)
        self.pool = pool
        self.tables = nn.ModuleDict({name: nn.Embedding(SPECS[name]["vocab_size"], 4) for name in ("hist", "tags")})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=spread)
            nn.init.zeros_(table.weight[:1])
        self.event = nn.Linear(4, 4)  # its bias is 0 at first
        self.linear = nn.Linear(8 if pool != "flat" else 4 * 27, 1)
        self.compile("adam", "binary_crossentropy", learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        x = self.get_inputs(inputs)
        events = {name: table(x[name].long()) for name, table in self.tables.items()}
        if self.pool == "masked":
            pooled = [masked_mean(e, x[name] != 0) for name, e in events.items()]
        elif self.pool == "mean":
            pooled = [e.mean(dim=1) for e in events.values()]
        elif self.pool == "sum":
            pooled = [self.event(e).sum(dim=1) for e in events.values()]
        else:
            pooled = [e.flatten(1) for e in events.values()]
        return {"y_pred": self.output_activation(self.linear(torch.cat(pooled, dim=-1)))}


def build(loader: H5DataLoader, tmp_path: Path, pool: str, **options) -> BaseModel:
    torch.manual_seed(0)
    settings = {"verbose": 0, "model_root": str(tmp_path), "metrics": ["AUC"], "eval_steps": None, **options}
    return accelerate(Pooling)(feature_map(tmp_path), pool=pool, **settings)


class Whole:
    """The same batches with all their padding."""

    def __init__(self, loader: H5DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return map(self.loader.padded, self.loader)


def test_training_is_that_on_whole_sequences(tmp_path):
    cut, whole = make_loader(tmp_path), Whole(make_loader(tmp_path))
    models = []
    for data in (cut, whole):
        models.append(build(cut, tmp_path, "masked"))
        models[-1].fit(data, epochs=2)
    losses = [[point["loss"] for point in model.history["train"]] for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert cut.epoch == 2  # the check of the model took none


@pytest.mark.parametrize("spread", [1, 1e-4, 1e3])  # FuxiCTR's tables start with 1e-4
@pytest.mark.parametrize(
    "pool, message",
    [
        ("mean", "padding changes the predictions of Pooling by"),
        ("sum", "padding changes the predictions of Pooling by"),
        ("flat", "Pooling needs sequences of one length"),
    ],
)
def test_models_that_padding_matters_to_are_refused(tmp_path, pool, message, spread):
    loader = make_loader(tmp_path)
    with pytest.raises(ValueError, match=f"bucket_by_length: {message}"):
        build(loader, tmp_path, pool, spread=spread).fit(loader, epochs=1)


@pytest.mark.parametrize("spread", [1, 1e-4, 0])
def test_the_check_leaves_weights_and_random_numbers_as_they_are(tmp_path, spread):
    loader = make_loader(tmp_path)
    model = build(loader, tmp_path, "masked", spread=spread)
    weights, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_padding_invariance(model, loader)
    assert torch.equal(torch.get_rng_state(), numbers) and loader.epoch == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_the_check_finds_the_only_batch_that_is_cut(tmp_path):
    loader = make_loader(tmp_path)
    batches = list(map(loader.padded, loader))
    short = {name: values[:, -9:] if name == "hist" else values for name, values in batches[-1].items()}
    data = type("Data", (list,), {"epoch": 0, "start_batch": 0, "padded": loader.padded})([*batches[:-1], short])
    with pytest.raises(ValueError, match="padding changes the predictions of Pooling"):
        check_padding_invariance(build(loader, tmp_path, "mean"), data)


def test_the_check_takes_short_sequences(tmp_path):
    """A model may cope with all but the shortest ones."""
    loader = make_loader(tmp_path)
    model = build(loader, tmp_path, "masked")
    lengths, forward = [], model.forward
    model.forward = lambda inputs: (lengths.append(inputs["hist"].shape[1]), forward(inputs))[1]
    check_padding_invariance(model, loader)
    assert lengths == [17, min(batch["hist"].shape[1] for batch in make_loader(tmp_path))]


def test_batches_of_different_lengths_are_not_joined(tmp_path):
    loader = make_loader(tmp_path)
    with pytest.raises(ValueError, match="gradient_accumulation=2 joins batches, which bucket_by_length"):
        build(loader, tmp_path, "masked", gradient_accumulation=2).fit(loader, epochs=1)
