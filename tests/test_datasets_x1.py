"""The BARS x1 splits: only the official files are taken over, whole; the registry lists what can be prepared."""

import hashlib

import pytest
from flowctr.datasets import DATASETS, prepare
from flowctr.datasets.bars_x1 import md5, prepare_x1


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("train.csv", "test.csv", "item.h5"):
        (folder / name).write_text(f"content of {name}")
    return folder


def files_of(raw):
    return {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in ("train.csv", "test.csv")}


def test_official_files_are_put_in_place(raw, tmp_path):
    paths = prepare_x1(raw, tmp_path / "out", files_of(raw) | {"item.h5": None}, "here")
    assert [path.name for path in paths] == ["train.csv", "test.csv", "item.h5"]
    assert all(path.read_bytes() == (raw / path.name).read_bytes() for path in paths)
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    again = prepare_x1(raw, tmp_path / "out", files_of(raw), "here")  # over existing files
    assert again == paths[:2] and again[0].read_text() == "content of train.csv"
    assert prepare_x1(raw, raw, files_of(raw), "here")[1].read_text() == "content of test.csv"  # in place
    assert len(list(raw.iterdir())) == 3


def test_files_are_copied_where_they_cannot_be_linked(raw, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", link)
    paths = prepare_x1(raw, tmp_path / "out", files_of(raw), "here")
    assert [path.read_text() for path in paths] == ["content of train.csv", "content of test.csv"]


def test_a_wrong_file_is_named_with_both_digests_and_nothing_is_written(raw, tmp_path):
    (raw / "test.csv").write_text("another")
    found = hashlib.md5(b"another").hexdigest()
    expected = "57a20e82fe736dd495f2eaf0669bf6d0"
    official = files_of(raw) | {"test.csv": expected}
    with pytest.raises(
        ValueError, match=rf"raw/test\.csv .* expected md5 {expected}, found {found}; .*again from here"
    ):
        prepare_x1(raw, tmp_path / "out", official, "here")
    with pytest.raises(ValueError, match="expected md5 e9bf80b92985e463db18fdc753d347b5"):
        prepare("amazonelectronics_x1", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named_with_its_download(raw, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no item_visual_emb_dim64\.h5 in .*reczoo/KuaiVideo_x1"):
        prepare("kuaivideo_x1", raw, tmp_path / "out")


def test_md5_reads_in_pieces(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"0123456789abcdef" * 200_000)  # 3.2 MB: more than three pieces
    assert md5(path) == hashlib.md5(b"0123456789abcdef" * 200_000).hexdigest()


def test_an_unknown_data_set_names_the_nearest(tmp_path):
    with pytest.raises(
        ValueError, match=r"'taobao_x1' \(did you mean 'taobaoad_x1'\?\); known: kuairand_pure_window, "
    ):
        prepare("taobao_x1", tmp_path, tmp_path)


def test_the_registry_says_what_each_data_set_is():
    assert len(DATASETS) == 15
    for name, dataset in DATASETS.items():
        assert name == dataset.id and dataset.files and callable(dataset.function)
        assert all("\n" not in text and text for text in (dataset.description, dataset.download, dataset.licence))
