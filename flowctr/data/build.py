"""Builds the h5 data set of a csv or parquet table, once: atomic, locked, and with a manifest of what it came from.

``data_root/dataset_id`` then holds the h5 files (see `flowctr.data.format`), FuxiCTR's ``feature_map.json`` and
``feature_vocab.json``, copies of pretrained embeddings, and ``manifest.json``: the settings, each source file with its
size, time and sha256, the rows of each split, what `flowctr.data.Encoder` needs to encode new rows, the fuxictr that
built it, and a ``digest`` of all of this but paths and times.
"""

import glob
import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from flowctr._fuxictr import fuxictr_origin
from flowctr.data.files import NO_SPACE, lock_of, locked, read_json
from flowctr.data.format import feature_map_digest, find_h5, read_feature_map
from flowctr.names import did_you_mean
from fuxictr.features import FeatureMap

FORMAT = 1
SPLITS = ("train", "valid", "test")
DATA_FORMATS = ("csv", "parquet", "h5")
FEATURE_TYPES = ("categorical", "numeric", "sequence", "meta", "embedding")
DTYPES = {"str": str, "int": int, "float": float}


def build_h5(params: dict, rebuild: bool = False) -> dict[str, str | None]:
    """Builds the h5 data set ``data_root/dataset_id``, or finds it built from the same files and settings.

    Processes that build the same data set at once wait for one of them. What an interrupted build leaves behind is
    never used and is removed by the next one.

    Args:
        params: FuxiCTR's data set parameters, ``h5_compression`` and ``behaviors``.
        rebuild: Whether to build again whatever is there.

    Returns:
        For train, valid and test the path of an h5 file or of a folder of part files, None for a split that is not
        given. Two splits made from the same file share one path.

    Raises:
        FileNotFoundError: If a source file is missing.
        ValueError: If the parameters or the data are wrong, or an existing data set was built from something else.
        OSError: If the disk is full; an existing data set stays as it was.
    """
    settings = _settings(params)
    data_dir = Path(params["data_root"]) / params["dataset_id"]
    if settings["data_format"] == "h5":
        paths = _given_h5(params, data_dir)
    else:
        sequences = {name: col for name, col in settings["feature_cols"].items() if col["type"] == "sequence"}
        _check_behaviors(params, sequences)
        paths = None if rebuild else _reuse(params, settings, data_dir)
        if paths is None:
            paths = _build_locked(params, settings, data_dir, rebuild)
        else:
            _remove_leftovers(data_dir)
    features = read_feature_map(data_dir)["features"]
    # Again, as a column without max_len takes the longest sequence of the data.
    _check_behaviors(params, {name: spec for name, spec in features.items() if spec["type"] == "sequence"})
    return paths


def load_feature_map(params: dict) -> FeatureMap:
    """Loads the feature map of a built data set with FuxiCTR's own ``FeatureMap.load``.

    Args:
        params: Data set parameters and the model parameters that FuxiCTR reads here (``embedding_dim``,
            ``use_features``, ``feature_specs``). With a ``label``, the others are left out.

    Raises:
        FileNotFoundError: If the data set is not built.
        ValueError: If its feature map is damaged, is that of another data set, or lacks a column or the label that the
            parameters name.
    """
    data_dir = Path(params["data_root"]) / params["dataset_id"]
    path = data_dir / "feature_map.json"
    if not path.is_file():
        raise FileNotFoundError(f"{data_dir}: no feature_map.json; build the data set first")
    content = read_feature_map(data_dir)
    if content["dataset_id"] != params["dataset_id"]:
        raise ValueError(f"{path} is that of dataset_id={content['dataset_id']!r}, not of {params['dataset_id']!r}")
    features = content["features"]
    used = params.get("use_features") or features
    specs = [name for col in params.get("feature_specs") or [] for name in _names(col)]
    # A batch has the used features only, and groups and scenarios are taken from it.
    columns = {key: [params[key]] if params.get(key) else [] for key in ("group_id", "scenario")}
    for key, names, known in (
        ("use_features", used, features),
        ("feature_specs", specs, used),
        ("group_id", columns["group_id"], used),
        ("scenario", columns["scenario"], used),
    ):
        for name in names:
            if name not in known:
                why = "use_features leaves out" if name in features else f"{path} lacks{did_you_mean(name, known)}"
                raise ValueError(f"{key} names {name!r}, which {why}")
    feature_map = FeatureMap(params["dataset_id"], str(data_dir))
    _check_encoders(path, features)
    feature_map.load(str(path), params)
    feature_map.num_fields = feature_map.get_num_fields()  # FuxiCTR counts before it leaves out what is not used
    if label := params.get("label"):
        if label not in feature_map.labels:
            raise ValueError(f"label names {label!r}, which {path} lacks; it has {', '.join(feature_map.labels)}")
        feature_map.labels = [label]
    return feature_map


def _check_encoders(path: Path, features: dict[str, dict]) -> None:
    """Raises for an encoder in a feature map that is more than a layer: FuxiCTR evaluates the text as Python."""
    for name, spec in features.items():
        if encoder := spec.get("feature_encoder"):
            from flowctr.checks import COLUMN_CHECKS  # a build without encoders does without torch

            if needed := COLUMN_CHECKS["feature_encoder"](encoder):
                raise ValueError(f"{path}: feature_encoder of {name!r} must be {needed}; got {encoder!r}")


def _settings(params: dict) -> dict:
    """Returns the parameters that determine the data set; raises one ValueError naming everything wrong in them."""
    problems = [f"{key} is missing" for key in ("dataset_id", "data_root", "train_data") if not params.get(key)]
    data_format = params.get("data_format", "csv")
    if data_format not in DATA_FORMATS:
        problems.append(f"data_format={data_format!r} is unknown{did_you_mean(data_format, DATA_FORMATS)}")
    if params.get("h5_compression") not in (None, "gzip", "lzf"):
        problems.append(f"h5_compression={params['h5_compression']!r} is unknown; use null, gzip or lzf")
    feature_cols, label_col = {}, {}
    for key, columns in (("feature_cols", feature_cols), ("label_col", label_col)):
        given = params.get(key) or []
        for col in given if isinstance(given, list) else [given]:
            for name in _names(col):
                if not isinstance(name, str) or name in columns:
                    problems.append(f"{key}: {name!r} occurs twice" if name in columns else f"{key}: no name in {col}")
                elif col.get("active", True):
                    columns[name] = {**col, "name": name, "active": True}
    if data_format != "h5":
        for key, columns in (("feature_cols", feature_cols), ("label_col", label_col)):
            if not columns:
                problems.append(f"{key} has no active column")
        earlier: dict[str, dict] = {}
        for name, col in feature_cols.items():
            problems += [f"feature_cols: {name!r}: {text}" for text in _column_problems(col, earlier)]
            earlier[name] = col
        for name, col in label_col.items():
            if _dtype_name(col.get("dtype")) not in ("int", "float"):
                problems.append(f"label_col: {name!r}: dtype={col.get('dtype')!r}; a label is int or float")
            if col.get("may_be_missing") and "fill_na" in col:
                problems.append(f"label_col: {name!r}: fill_na and may_be_missing exclude each other; keep one")
    if problems:
        raise ValueError(f"data set {params.get('dataset_id')}: " + "; ".join(problems))
    for col in [*feature_cols.values(), *label_col.values()]:
        col["dtype"] = _dtype_name(col.get("dtype"))
    return {
        "data_format": data_format,
        "sep": params.get("sep", ","),
        "feature_cols": feature_cols,
        "label_col": label_col,
        "min_categr_count": params.get("min_categr_count", 1),
        "data_block_size": params.get("data_block_size") or 0,
        "h5_compression": params.get("h5_compression"),
    }


def _names(col: dict) -> list:
    """Returns the names of an entry of feature_cols, label_col or feature_specs, which has one or a list of them."""
    return col["name"] if isinstance(col.get("name"), list) else [col.get("name")]


def _column_problems(col: dict, earlier: dict[str, dict]) -> list[str]:
    """Lists what is wrong with one feature column; ``earlier`` are the active columns before it, by name."""
    kind, problems = col.get("type"), []
    if _dtype_name(col.get("dtype")) is None:  # FuxiCTR would evaluate the string as Python
        problems.append(f"dtype={col.get('dtype')!r} is not one of str, int, float")
    if kind not in FEATURE_TYPES:
        problems.append(f"type={kind!r} is unknown{did_you_mean(kind, FEATURE_TYPES)}")
    if "category_processor" in col:
        problems.append(
            f"category_processor={col['category_processor']!r} is not supported by FuxiCTR 2.3 (its build fails); "
            "put the bucket of each value into a column of its own"
        )
    if kind == "embedding" and "pretrain_dim" not in col:
        problems.append("type embedding needs pretrain_dim, the length of its vectors")
    if kind in ("categorical", "sequence") and not col.get("remap", True):
        needed = ["vocab_size"] + (["max_len"] if kind == "sequence" else [])
        problems += [f"remap: False needs {key}" for key in needed if key not in col]
    if col.get("padding", "post") not in ("pre", "post"):
        problems.append(f"padding={col['padding']!r} is not pre or post")
    if col.get("normalizer", "MinMaxScaler") not in ("MinMaxScaler", "StandardScaler"):
        problems.append(f"normalizer={col['normalizer']!r} is not MinMaxScaler or StandardScaler")
    if base := col.get("share_embedding"):
        if base not in earlier:
            problems.append(f"share_embedding={base!r} is no active column before it{did_you_mean(base, earlier)}")
        elif earlier[base].get("type") not in ("categorical", "sequence"):
            problems.append(f"share_embedding={base!r} is {earlier[base].get('type')}, which has no embedding to share")
    if kind == "sequence" and _dtype_name(col.get("dtype")) in ("int", "float"):
        problems.append(
            f"dtype={col['dtype']!r} of a sequence; its tokens are text: set dtype: str, also of a column whose "
            "embedding it shares"
        )
    if (function := col.get("preprocess")) and function.split("(")[0] != "copy_from":
        problems.append(f"preprocess={function!r} is unknown to FuxiCTR, which has copy_from(column)")
    return problems


def _dtype_name(dtype) -> str | None:
    return next((name for name, t in DTYPES.items() if dtype == name or dtype is t), None)


def _check_behaviors(params: dict, sequences: dict[str, dict]) -> None:
    """Checks that the columns of each behavior are sequences whose steps can be aligned."""
    for behavior, columns in (params.get("behaviors") or {}).items():
        for name in columns:
            if name not in sequences:
                raise ValueError(
                    f"behaviors: {behavior!r} names {name!r}, which is no active sequence column"
                    f"{did_you_mean(name, sequences)}"
                )
        for key in ("max_len", "padding"):
            values = {name: sequences[name][key] for name in columns if sequences[name].get(key)}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name}={value}" for name, value in values.items())
                raise ValueError(
                    f"behaviors: the columns of {behavior!r} must have the same {key}, "
                    f"as their steps are aligned; got {listed}"
                )


def _given_h5(params: dict, data_dir: Path) -> dict[str, str | None]:
    """Returns the paths of a data set that is in h5 already."""
    if not (data_dir / "feature_map.json").is_file():
        raise FileNotFoundError(f"{data_dir}: data_format is h5 but there is no feature_map.json beside the data")
    paths = {}
    for split in SPLITS:
        path = params.get(f"{split}_data")
        paths[split] = str(find_h5(path)) if path else None
    return paths


def data_digest(data_dir: str | Path, files: dict[str, str | None]) -> str | None:
    """Reads the digest of what a data set was built from.

    Args:
        data_dir: Its folder.
        files: What `build_h5` returned.

    Returns:
        The digest; None for h5 files that flowctr did not build there.

    Raises:
        ValueError: If the manifest is damaged.
    """
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        return None
    manifest = read_json(path, ("digest", "splits"), "build the data set again")
    built = _paths(manifest, Path(data_dir))
    given = {split: file for split, file in files.items() if file}
    ours = all(built[split] and os.path.abspath(file) == os.path.abspath(built[split]) for split, file in given.items())
    return manifest["digest"] if ours else None


def _sources(params: dict, settings: dict) -> dict[str, str]:
    """Maps each role (train, valid, test, pretrained_emb of a column) to the path given for it."""
    sources = {split: str(params[f"{split}_data"]) for split in SPLITS if params.get(f"{split}_data")}
    for name, col in settings["feature_cols"].items():
        if "pretrained_emb" in col:
            sources[f"pretrained_emb of {name}"] = str(col["pretrained_emb"])
    return sources


def _source_files(role: str, path: str, data_format: str) -> list[str]:
    """Lists the files of a source as FuxiCTR finds them: one file, or all of a format in a folder."""
    if role not in SPLITS:
        files = [path] if os.path.isfile(path) else []
    else:
        path = path if path.endswith(data_format) else os.path.join(path, f"*.{data_format}")
        files = sorted(glob.glob(path))
    if not files:
        raise FileNotFoundError(f"{role} data: there is no file {path}")
    return files


def _reuse(params: dict, settings: dict, data_dir: Path) -> dict[str, str | None] | None:
    """Returns the paths of the data set if it is built, None if it is not; raises if it is another one."""
    if not (data_dir / "feature_map.json").is_file():
        return None
    remedy = f"delete {data_dir}, choose another dataset_id, or build with rebuild=True (flowctr build --rebuild)"
    if any(Path(path).resolve().is_relative_to(data_dir.resolve()) for path in _sources(params, settings).values()):
        remedy = f"{data_dir} holds the raw files too: choose another data_root or dataset_id, or build with --rebuild"
    manifest_file = data_dir / "manifest.json"
    if not manifest_file.is_file():
        raise ValueError(
            f"{data_dir} has a feature_map.json but no manifest.json, so flowctr did not build it; {remedy}"
        )
    manifest = read_json(manifest_file, ("format", "digest"), remedy)
    try:
        intact = manifest["format"] == FORMAT and manifest["digest"] == _digest(manifest)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest_file} is damaged ({error!r}); {remedy}") from error
    if not intact:
        raise ValueError(f"{manifest_file} was edited or has another format; {remedy}")
    changes = _changed_settings(manifest["settings"], _recorded(settings))
    changes += _changed_sources(manifest["sources"], _sources(params, settings), settings["data_format"])
    if changes:
        raise ValueError(f"{data_dir} was built from something else: {'; '.join(changes)}; {remedy}")
    for split in manifest["splits"].values():
        for name, size in split["files"].items():
            file = data_dir / name
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file} is missing or was cut off (expected {size} bytes); {remedy}")
    logging.info(f"{data_dir}: built already from the same files and settings")
    return _paths(manifest, data_dir)


def _recorded(settings: dict) -> dict:
    """Returns the settings as the manifest holds them; pretrained embeddings count by content, as sources."""
    recorded = json.loads(json.dumps(settings))
    for col in recorded["feature_cols"].values():
        if "pretrained_emb" in col:
            col["pretrained_emb"] = Path(col["pretrained_emb"]).suffix
    return recorded


def _changed_settings(old: dict, new: dict) -> list[str]:
    before, after = _flatten(old), _flatten(new)
    changes = [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    names = [list(settings["feature_cols"]) for settings in (old, new)]
    return changes or ([f"order of feature_cols: {names[0]} -> {names[1]}"] if names[0] != names[1] else [])


def _flatten(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _changed_sources(old: dict[str, dict], sources: dict[str, str], data_format: str) -> list[str]:
    changes = []
    for role in {**old, **sources}:
        if role not in old or role not in sources:
            before = old[role]["path"] if role in old else "none"
            changes.append(f"{role} data: {before} -> {sources.get(role, 'none')}")
            continue
        try:
            files = _source_files(role, sources[role], data_format)
        except FileNotFoundError:
            if sources[role] != old[role]["path"]:
                raise
            logging.warning(
                f"{role} data {sources[role]} is gone, so it cannot be compared; using what was built from it"
            )
            continue
        if len(files) != len(old[role]["files"]):
            changes.append(f"{role} data {sources[role]}: {len(old[role]['files'])} files -> {len(files)} files")
            continue
        for file, known in zip(files, old[role]["files"]):
            stat = os.stat(file)
            if (stat.st_size, stat.st_mtime_ns) != (known["size"], known["mtime_ns"]):
                if stat.st_size != known["size"]:
                    changes.append(f"{role} data {file}: {known['size']} bytes -> {stat.st_size} bytes")
                elif (found := _sha256(file)) != known["sha256"]:
                    changes.append(f"{role} data {file}: sha256 {known['sha256'][:12]} -> {found[:12]}")
    return changes


def _build_locked(params: dict, settings: dict, data_dir: Path, rebuild: bool) -> dict[str, str | None]:
    sources = {
        role: (path, _source_files(role, path, settings["data_format"]))
        for role, path in _sources(params, settings).items()
    }
    staging = _staging(data_dir)
    with locked(data_dir):
        try:
            paths = None if rebuild else _reuse(params, settings, data_dir)  # what the other process built meanwhile
            if paths is None:
                shutil.rmtree(staging, ignore_errors=True)  # left by a build that was killed
                manifest = _build(settings, params.get("behaviors"), sources, staging, data_dir.name)
                _publish(staging / data_dir.name, data_dir)
                paths = _paths(manifest, data_dir)
            return paths
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise OSError(
                error.errno,
                f"no space left for the data set {data_dir} ({os.strerror(error.errno)}); free disk space or choose "
                "another data_root. Temporary files were removed, existing data is untouched",
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _staging(data_dir: Path) -> Path:
    return data_dir.parent / f".{data_dir.name}.building"


def _remove_leftovers(data_dir: Path) -> None:
    """Removes what a killed build left, unless another process is building there or the folder is read-only."""
    staging = _staging(data_dir)
    if staging.exists():
        with suppress(OSError), lock_of(data_dir).acquire(timeout=0):  # its Timeout is an OSError
            shutil.rmtree(staging, ignore_errors=True)


def _build(
    settings: dict,
    behaviors: dict[str, list[str]] | None,
    sources: dict[str, tuple[str, list[str]]],
    staging: Path,
    dataset_id: str,
) -> dict:
    """Builds the whole data set in a staging folder and returns its manifest."""
    from flowctr.data.encode import encode_splits  # polars: needed to build only

    # Before they are read: a file that changes meanwhile is noticed by the next call.
    described = {
        role: {"path": path, "files": [_describe(file) for file in files]} for role, (path, files) in sources.items()
    }
    splits = {split: source for split, source in sources.items() if split in SPLITS}
    written, encoders = encode_splits(settings, behaviors, splits, staging, dataset_id)
    manifest = {
        "format": FORMAT,
        "settings": _recorded(settings),
        "sources": described,
        "splits": written,
        "encoders": encoders,
        "feature_map_digest": feature_map_digest(staging / dataset_id),
        "fuxictr": fuxictr_origin(),
    }
    manifest["digest"] = _digest(manifest)
    (staging / dataset_id / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return manifest


def _publish(staged: Path, data_dir: Path) -> None:
    """Moves a built data set into place, ``feature_map.json`` last: until then no one takes it for built."""
    data_dir.mkdir(exist_ok=True)
    (data_dir / "feature_map.json").unlink(missing_ok=True)
    for split in SPLITS:
        for stale in [data_dir / f"{split}.h5", *data_dir.glob(f"{split}/part-*.h5")]:
            stale.unlink(missing_ok=True)
    files = [path for path in staged.rglob("*") if path.is_file()]
    last = ["manifest.json", "feature_map.json"]
    for file in sorted(files, key=lambda path: last.index(path.name) if path.name in last else -1):
        target = data_dir / file.relative_to(staged)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)


def _paths(manifest: dict, data_dir: Path) -> dict[str, str | None]:
    splits = manifest["splits"]
    return {split: str(data_dir / splits[split]["path"]) if split in splits else None for split in SPLITS}


def _digest(manifest: dict) -> str:
    """Digests what the data set is made of, not where and when its sources were found."""
    identity = {
        "format": manifest["format"],
        "settings": manifest["settings"],
        "columns": list(manifest["settings"]["feature_cols"]),
        "sources": {role: [f["sha256"] for f in source["files"]] for role, source in manifest["sources"].items()},
        "rows": {split: entry["rows"] for split, entry in manifest["splits"].items()},
        "encoders": manifest["encoders"],
        "feature_map_digest": manifest["feature_map_digest"],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _describe(file: str) -> dict:
    stat = os.stat(file)
    return {"path": file, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(file)}


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
