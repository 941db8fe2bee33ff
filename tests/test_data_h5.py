"""Loading: every row once, in an order that seed and epoch determine, in bounded memory, from files that fit."""

import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import flowctr.data.h5 as h5
import h5py
import numpy as np
import pytest
import torch
from flowctr.data import H5DataLoader
from flowctr.data.format import H5Writer, feature_map_digest
from fuxictr.features import FeatureMap

ROWS = 1000
SPECS = {
    "user": {"type": "meta"},
    "item": {"type": "categorical", "vocab_size": 300},
    "hist": {"type": "sequence", "vocab_size": 70_000, "max_len": 5},
    "price": {"type": "numeric"},
    "vector": {"type": "embedding", "pretrain_dim": 3},
}
LABELS = ["click", "like"]


def make_columns(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {
        "user": np.arange(rows, dtype=np.int32),  # names the row
        "item": rng.integers(0, 300, rows).astype(np.uint16),
        "hist": rng.integers(0, 70_000, (rows, 5)).astype(np.int32),
        "price": rng.normal(size=rows).astype(np.float32),
        "vector": rng.normal(size=(rows, 3)).astype(np.float32),
        "click": rng.integers(0, 2, rows).astype(np.float32),
        "like": (rng.random(rows) < 0.1).astype(np.float32),
    }


def make_feature_map(folder: Path, specs: dict = SPECS) -> FeatureMap:
    feature_map = FeatureMap("tiny", str(folder))
    feature_map.features.update({name: dict(spec) for name, spec in specs.items()})
    feature_map.labels = list(LABELS)
    return feature_map


def write(folder: Path, columns: dict[str, np.ndarray], **options) -> None:
    with H5Writer(folder, "train", SPECS, {"hist": "pre"}, LABELS, "digest", **options) as writer:
        rows = len(columns["user"])
        for start in range(0, rows, 64):
            writer.append({name: array[start : start + 64] for name, array in columns.items()})


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path, make_columns())
    return tmp_path


def joined(batches) -> dict[str, np.ndarray]:
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("block_rows", [0, 170])
def test_evaluation_comes_in_file_order(tmp_path, streaming, block_rows):
    columns = make_columns()
    write(tmp_path, columns, block_rows=block_rows)
    loader = H5DataLoader(
        make_feature_map(tmp_path), tmp_path / "train", "valid", 96, shuffle=True, streaming=streaming, buffer_size=200
    )
    batches = list(loader)
    assert [len(batch["click"]) for batch in batches] == [96] * 10 + [40]
    assert (len(loader), loader.num_batches, loader.num_samples, loader.num_blocks) == (
        11,
        11,
        1000,
        6 if block_rows else 1,
    )
    for name, values in joined(batches).items():
        np.testing.assert_array_equal(values, columns[name])
    assert {name: tensor.dtype for name, tensor in batches[0].items()} == {
        "user": torch.int32,
        "item": torch.int32,
        "hist": torch.int32,
        **dict.fromkeys(["price", "vector", "click", "like"], torch.float32),
    }
    assert loader.base_rates == pytest.approx(
        {label: columns[label].mean(dtype=np.float64) for label in LABELS}, abs=1e-12
    )


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 3}, {"streaming": True, "buffer_size": 200}, {"streaming": True}]
)
@pytest.mark.parametrize("block_rows", [0, 170])
def test_shuffling_visits_each_row_once_in_an_order_of_seed_and_epoch(tmp_path, options, block_rows):
    columns = make_columns()
    write(tmp_path, columns, block_rows=block_rows)

    def epochs(seed, first=0):
        loader = H5DataLoader(
            make_feature_map(tmp_path), tmp_path / "train", batch_size=96, shuffle=True, seed=seed, **options
        )
        loader.epoch = first
        return [joined(loader), joined(loader)]

    runs = epochs(3)
    for epoch in runs:
        order = epoch["user"]
        np.testing.assert_array_equal(np.sort(order), np.arange(ROWS))
        for name, values in epoch.items():  # rows stay together
            np.testing.assert_array_equal(values, columns[name][order])
        assert abs(np.corrcoef(order, np.arange(ROWS))[0, 1]) < 0.4  # blocks of 18 rows at the coarsest
        assert np.mean(np.abs(np.diff(order)) < 3) < 0.1
    assert not np.array_equal(runs[0]["user"], runs[1]["user"])
    np.testing.assert_array_equal(epochs(3)[1]["user"], runs[1]["user"])
    np.testing.assert_array_equal(epochs(3, first=1)[0]["user"], runs[1]["user"])  # a resumed run
    assert not np.array_equal(epochs(4)[0]["user"], runs[0]["user"])


def test_all_batches_but_the_last_are_full_when_streaming(folder):
    for buffer_size in (1, 50, 96, 100, 5000):
        loader = H5DataLoader(
            make_feature_map(folder),
            folder / "train.h5",
            batch_size=96,
            shuffle=True,
            streaming=True,
            buffer_size=buffer_size,
        )
        batches = list(loader)
        assert [len(batch["user"]) for batch in batches] == [96] * 10 + [40]
        np.testing.assert_array_equal(np.sort(joined(batches)["user"]), np.arange(ROWS))


def test_streaming_holds_one_window(folder, monkeypatch):
    """Memory does not grow with the file: nothing larger than the window is ever allocated or read."""
    allocated, read = [], []
    allocate, read_rows = H5DataLoader._allocate, H5DataLoader._read
    monkeypatch.setattr(H5DataLoader, "_allocate", lambda self, rows: allocated.append(rows) or allocate(self, rows))

    def counted(self, file, start, stop, arrays, at):
        read.append(stop - start)
        read_rows(self, file, start, stop, arrays, at)

    monkeypatch.setattr(H5DataLoader, "_read", counted)
    loader = H5DataLoader(
        make_feature_map(folder), folder / "train", batch_size=32, shuffle=True, streaming=True, buffer_size=160
    )
    assert (allocated, read) == ([], [])
    assert sum(len(batch["user"]) for batch in loader) == ROWS
    assert allocated == [160]
    assert sum(read) == ROWS and max(read) <= 10  # at least 16 blocks make a window


def test_streaming_is_chosen_for_what_does_not_fit_into_memory(folder, monkeypatch):
    assert not H5DataLoader(make_feature_map(folder), folder / "train").streaming
    monkeypatch.setattr(h5, "_total_memory", lambda: 50_000)  # the arrays take 50 bytes a row
    assert H5DataLoader(make_feature_map(folder), folder / "train").streaming
    assert not H5DataLoader(make_feature_map(folder), folder / "train", streaming=False).streaming


def test_arrays_in_memory_have_the_narrow_type_of_the_vocabulary(tmp_path):
    columns = {
        name: array.astype(np.int64 if array.dtype.kind != "f" else float) for name, array in make_columns().items()
    }
    write(tmp_path, columns)
    loader = H5DataLoader(make_feature_map(tmp_path), tmp_path / "train")
    assert {name: array.dtype for name, array in loader._arrays.items()} == {
        "user": np.int64,
        "item": np.uint16,
        "hist": np.int32,
        **dict.fromkeys(["price", "vector", "click", "like"], np.float32),
    }


# On a GPU


WIDE = {
    **SPECS,
    "brand": {"type": "categorical", "vocab_size": 60_000},
    "tag": {"type": "categorical", "vocab_size": 9},
}


def write_wide(folder: Path) -> None:
    """Adds ids of which the highest bit of 16 is set, ids of one byte, and missing labels."""
    columns, rng = make_columns(), np.random.default_rng(1)
    columns["brand"] = rng.integers(0, 60_000, ROWS).astype(np.uint16)
    columns["tag"] = rng.integers(0, 9, ROWS).astype(np.uint8)
    columns["like"][::3] = np.nan
    assert (columns["brand"] >= 2**15).any()
    with H5Writer(folder, "train", WIDE, {"hist": "pre"}, LABELS, "digest", may_be_missing=["like"]) as writer:
        writer.append(columns)


def assert_equal_batches(batches, expected) -> None:
    for batch, wanted in zip(batches, expected, strict=True):
        assert list(batch) == list(wanted)
        for name, values in batch.items():
            assert values.dtype == wanted[name].dtype and values.is_contiguous(), name
            torch.testing.assert_close(values, wanted[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_on_the_device_give_the_same_batches(tmp_path, split):
    write_wide(tmp_path)
    plain, resident = (
        H5DataLoader(
            make_feature_map(tmp_path, WIDE),
            tmp_path / "train",
            split,
            96,
            shuffle=True,
            seed=5,
            data_on_device=resident,
        )
        for resident in (False, True)
    )
    epochs = [list(plain) for _ in range(2)]
    assert_equal_batches(resident, epochs[0])
    for batch in resident:  # batches are copies: what becomes of them does not reach the data
        for values in batch.values():
            values.zero_()
    resident.epoch = 1
    assert_equal_batches(resident, epochs[1])
    stored = {name: stack.values.element_size() for stack in resident._stacks for name in stack.names}
    assert stored == {"item": 2, "brand": 2, "tag": 1, **dict.fromkeys(["hist", "price", "vector", *LABELS], 4)}


def test_data_that_do_not_fit_on_the_device_are_copied(folder, monkeypatch, caplog):
    monkeypatch.setattr(h5, "_total_memory", lambda: 92_000)  # all columns take 50 bytes a row, without user 46
    with caplog.at_level("WARNING"):
        assert H5DataLoader(make_feature_map(folder), folder / "train", data_on_device=True, streaming=False)._stacks
    assert not caplog.text
    monkeypatch.setattr(h5, "_total_memory", lambda: 91_999)
    plain = H5DataLoader(make_feature_map(folder), folder / "train", streaming=False)
    with caplog.at_level("WARNING"):
        loader = H5DataLoader(make_feature_map(folder), folder / "train", data_on_device=True, streaming=False)
    assert "the train split needs 46000 bytes, more than half of the 91999 bytes free on cpu" in caplog.text
    assert_equal_batches(loader, list(plain))
    with pytest.raises(ValueError, match="data_on_device keeps all rows, streaming keeps a few of them"):
        H5DataLoader(make_feature_map(folder), folder / "train", data_on_device=True, streaming=True)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"streaming": True, "buffer_size": 200}])
def test_a_batch_is_one_buffer_for_each_type(folder, options):
    """Those that go to a GPU, in one copy each, apart from those that stay."""
    loader = H5DataLoader(make_feature_map(folder), folder / "train", batch_size=96, **options)
    for batch in loader:
        buffers = {name: values.untyped_storage().data_ptr() for name, values in batch.items()}
        assert len(set(buffers.values())) == 3
        assert buffers["item"] == buffers["hist"] != buffers["user"]
        assert len({buffers[name] for name in ("price", "vector", "click", "like")}) == 1


class FakeStream:
    """Stands in for a CUDA stream: notes what is asked of it."""

    def __init__(self, *_):
        self.events = 0

    def record_event(self):
        self.events += 1
        return self.events

    def wait_event(self, event):
        self.waited = [*getattr(self, "waited", []), event]


@pytest.fixture
def new_copying_stream():
    """Lets loaders make the stream that they share, and forgets it."""
    h5._copying_stream.cache_clear()
    yield
    h5._copying_stream.cache_clear()


@pytest.mark.usefixtures("new_copying_stream")
def test_batches_are_copied_ahead_and_waited_for(folder, monkeypatch):
    """Each batch is waited for when it is handed out, and its memory kept for the stream that uses it."""
    current, kept = FakeStream(), []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor.dtype, stream)))
    plain, sending = (
        H5DataLoader(make_feature_map(folder), folder / "train", batch_size=96, shuffle=True) for _ in range(2)
    )
    sent = sending._sent(sending._packed(np.random.default_rng([0, 0]), first_row=0))
    for i, (batch, wanted) in enumerate(zip(sending._received(sent), plain, strict=True)):
        assert current.waited == list(range(1, i + 2))
        assert_equal_batches([batch], [wanted])
    assert kept == [(torch.int32, current), (torch.float32, current)] * 11


@pytest.mark.usefixtures("new_copying_stream")
def test_all_epochs_of_all_loaders_copy_on_one_stream(folder, monkeypatch):
    """A GPU has 32 streams for everyone: with one for each epoch, a copy meets the stream of a capture."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(FakeStream()) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for split in ("train", "valid"):
        loader = H5DataLoader(make_feature_map(folder), folder / "train", split=split, batch_size=500)
        for epoch in range(3):
            assert len(list(loader._sent(loader._packed(np.random.default_rng([0, epoch]), first_row=0)))) == 2
    assert len(made) == 1 and made[0].events == 12


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"streaming": True, "shuffle": True}])
def test_iteration_that_stops_early_leaves_no_thread(folder, options):
    loader = H5DataLoader(make_feature_map(folder), folder / "train", batch_size=8, **options)
    before = threading.active_count()
    iterator = iter(loader)
    assert len(list(islice(iterator, 3))) == 3
    assert threading.active_count() == before + 1
    del iterator
    assert threading.active_count() == before
    assert len(list(loader)) == 125
    assert threading.active_count() == before


def test_error_in_the_prefetching_thread_reaches_the_reader(folder):
    loader = H5DataLoader(make_feature_map(folder), folder / "train", batch_size=8, streaming=True)
    with h5py.File(folder / "train.h5", "r+") as file:
        file["item"][700] = 300
    with pytest.raises(ValueError, match=r"train\.h5: column 'item', row 700: index 300 .*vocab_size=300"):
        list(loader)


def test_used_features_alone_are_read(folder):
    feature_map = make_feature_map(folder, {"item": SPECS["item"]})
    (batch,) = H5DataLoader(feature_map, folder / "train", batch_size=ROWS)
    assert batch.keys() == {"item", "click", "like"}


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_fuxictr_2_0_and_2_1_open(tmp_path, streaming):
    """They have no attributes, int64 ids and float64 numbers, and parts named part_00000.h5."""
    columns = make_columns()
    (tmp_path / "parts").mkdir()
    paths = [(tmp_path / "whole.h5", 0, ROWS)]
    paths += [(tmp_path / "parts" / f"part_{i:05d}.h5", i * 400, (i + 1) * 400) for i in range(3)]
    for path, start, stop in paths:
        with h5py.File(path, "w") as file:
            for name, array in columns.items():
                file.create_dataset(name, data=array[start:stop].astype(float if array.dtype.kind == "f" else np.int64))
    for path in ("whole.h5", "whole", "parts"):
        loader = H5DataLoader(make_feature_map(tmp_path), tmp_path / path, "test", batch_size=128, streaming=streaming)
        for name, values in joined(loader).items():
            np.testing.assert_array_equal(values, columns[name])
        assert loader.base_rates == pytest.approx({label: columns[label].mean(dtype=np.float64) for label in LABELS})


def test_parts_come_by_their_numbers(tmp_path):
    columns = make_columns()
    for i in range(12):
        with h5py.File(tmp_path / f"part_{i}.h5", "w") as file:
            for name, array in columns.items():
                file.create_dataset(name, data=array[i * 50 : (i + 1) * 50])
    loader = H5DataLoader(make_feature_map(tmp_path), tmp_path, "test", batch_size=64)
    np.testing.assert_array_equal(joined(loader)["user"], np.arange(600))


def test_loader_fits_fuxictrs_rank_data_loader(folder):
    """In a process of its own, because FuxiCTR's module imports ray."""
    shutil.copy(folder / "train.h5", folder / "valid.h5")
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_data_h5 import *\n"
        "from fuxictr.pytorch.dataloaders import RankDataLoader\n"
        f"folder = Path({str(folder)!r})\n"
        "train, valid, test = RankDataLoader(\n"
        "    make_feature_map(folder), train_data=str(folder / 'train'), valid_data=str(folder / 'valid.h5'),\n"
        "    test_data=str(folder / 'valid'), batch_size=100, shuffle=True, data_format='h5', seed=1,\n"
        "    num_workers=3, data_loader=H5DataLoader)\n"
        "assert sorted(joined(train)['user']) == list(range(ROWS)) != list(joined(train)['user'])\n"
        "assert list(joined(valid)['user']) == list(joined(test)['user']) == list(range(ROWS))\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_package_does_not_import_ray():
    code = "import sys, flowctr.data; assert not [name for name in sys.modules if name.split('.')[0] == 'ray']"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Bad input


def load(folder: Path, specs: dict = SPECS, **options) -> H5DataLoader:
    return H5DataLoader(make_feature_map(folder, specs), folder / "train", **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "task, label, value",
    [
        ("binary_classification", "click", 2.0),
        ("binary_classification", "like", -0.5),
        ("binary_classification", "click", float("nan")),
        (["regression", "binary_classification"], "like", 1.5),
        (["regression", "binary_classification"], "click", float("nan")),
        ("regression", "click", float("inf")),
    ],
)
def test_labels_beyond_their_task_are_named(folder, streaming, task, label, value):
    with h5py.File(folder / "train.h5", "r+") as file:
        file[label][321] = value
    with pytest.raises(ValueError, match=rf"train\.h5: column '{label}', row 321: label {value} is not "):
        list(load(folder, task=task, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_fit_their_task_are_taken(folder, streaming):
    with h5py.File(folder / "train.h5", "r+") as file:
        file["click"][:2] = [-7.5, 3e38]
        file["like"][:2] = [0.25, 1.0]
    batches = joined(load(folder, task=["regression", "binary_classification"], streaming=streaming))
    np.testing.assert_array_equal(batches["click"][:2], np.float32([-7.5, 3e38]))
    np.testing.assert_array_equal(batches["like"][:2], [0.25, 1.0])
    with pytest.raises(ValueError, match=r"task=\['regression'\] has 1 entries for the 2 labels click, like"):
        load(folder, task=["regression"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("block_rows", [0, 170])
def test_a_label_may_be_missing_in_files_that_say_so(tmp_path, streaming, block_rows):
    columns = make_columns()
    columns["like"][np.arange(ROWS) % 3 > 0] = np.nan
    columns["like"][:200] = np.nan  # the whole first part
    write(tmp_path, columns, block_rows=block_rows, may_be_missing=["like"])
    loader = load(tmp_path, streaming=streaming, batch_size=96)
    assert loader.may_be_missing == ["like"]
    means = {"click": columns["click"].mean(dtype=np.float64), "like": np.nanmean(columns["like"], dtype=np.float64)}
    assert loader.base_rates == pytest.approx(means, abs=1e-12)
    np.testing.assert_array_equal(joined(loader)["like"], columns["like"])
    columns["like"][500] = 2
    columns["click"][700] = np.nan
    write(tmp_path / "like", columns, block_rows=block_rows, may_be_missing=["like", "click"])
    with pytest.raises(ValueError, match=r"column 'like', row \d+: label 2\.0 is not in \[0, 1\]"):
        list(load(tmp_path / "like", streaming=streaming))
    columns["like"][500] = 0
    write(tmp_path / "click", columns, block_rows=block_rows, may_be_missing=["like"])
    with pytest.raises(ValueError, match=r"column 'click', row \d+: label nan is not in \[0, 1\]"):
        list(load(tmp_path / "click", streaming=streaming))


@pytest.mark.parametrize("batch_size", [0, -3, 1.5, None])
def test_impossible_batch_size(folder, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}; a batch needs a positive whole number"):
        load(folder, batch_size=batch_size)


def test_missing_file_names_what_was_tried(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tried .*/train\.h5, .*/train, .*/train/\*\.h5"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 500, 20_000])
def test_truncated_file(folder, size):
    with open(folder / "train.h5", "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=r"train\.h5: not an h5 file, or a truncated one"):
        load(folder)


def test_foreign_file(folder):
    (folder / "train.h5").write_text("label,item\n1,2\n" * 100)
    with pytest.raises(ValueError, match=r"train\.h5: not an h5 file"):
        load(folder)
    with h5py.File(folder / "train.h5", "w") as file:
        file["something"] = [1, 2]
    with pytest.raises(ValueError, match=r"no column 'user', 'item', .*'like'; the file has 'something'"):
        load(folder)


def test_damaged_chunk(tmp_path):
    write(tmp_path, make_columns(), compression="gzip")
    with h5py.File(tmp_path / "train.h5") as file:
        chunk = file["hist"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "train.h5").read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    (tmp_path / "train.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.h5: column 'hist' cannot be read, the file is damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: file["price"].resize(900, axis=0), r"column 'price' has 900 rows instead of 1000"),
        (lambda file: file.attrs.update(rows=999), r"column 'user' has 1000 rows instead of 999"),
        (lambda file: file.attrs.update(format=99), r"format 99, this flowctr reads format 1"),
        (lambda file: file.__delitem__("like"), r"no column 'like'"),
        (lambda file: file["hist"].__setitem__((5, 2), 70_000), r"'hist', row 5: index 70000 .*vocab_size=70000"),
        (lambda file: file["hist"].__setitem__((7, 1), -1), r"'hist', row 7: index -1 is beyond its vocabulary"),
    ],
)
def test_inconsistent_file(folder, change, message):
    with h5py.File(folder / "train.h5", "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_feature_map_that_does_not_fit(folder):
    with pytest.raises(
        ValueError, match=r"column 'item' was built with .*'vocab_size': 300.* says .*'vocab_size': 301"
    ):
        load(folder, {**SPECS, "item": {**SPECS["item"], "vocab_size": 301}})
    with pytest.raises(ValueError, match=r"column 'hist' was built with .*'max_len': 5.* says .*'max_len': 6"):
        load(folder, {**SPECS, "hist": {**SPECS["hist"], "max_len": 6}})
    with pytest.raises(ValueError, match="no column 'other'"):
        load(folder, {**SPECS, "other": {"type": "numeric"}})
    # Equal sizes, other vocabularies: only the digest over the feature map's files can tell.
    make_feature_map(folder).save(str(folder / "feature_map.json"))
    with h5py.File(folder / "train.h5", "r+") as file:
        file.attrs["feature_map_digest"] = feature_map_digest(folder)
    load(folder)
    (folder / "feature_vocab.json").write_text('{"item": {"a": 1}}')
    with pytest.raises(ValueError, match="built with another feature map"):
        load(folder)


def test_empty_split(folder):
    with h5py.File(folder / "train.h5", "r+") as file:
        for dataset in file.values():
            dataset.resize(0, axis=0)
        file.attrs["rows"] = 0
    with pytest.raises(ValueError, match="the train split has no rows"):
        load(folder)
