"""Raw rows to arrays of ids: FuxiCTR's FeatureProcessor, fitted deterministically and applied a column at a time."""

import importlib
import logging
import math
import os
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
from flowctr.data.files import check_csv_end, read_json
from flowctr.data.format import H5Writer, feature_map_digest, narrow_dtype, read_feature_map
from flowctr.names import did_you_mean
from tqdm import tqdm

BATCH_ROWS, BATCH_STEPS = 65536, 2**24  # rows encoded at a time, fewer where sequences are long
STATISTICS_ROWS = 65536  # fixed, because the last bits of a mean depend on how the rows are grouped
PAD = 0
SPECIAL = ("__PAD__", "__OOV__")
KEY_TYPES = {"str": str, "int": int, "float": float}


class _LateModule(ModuleType):
    """Stands in for a module until something of it is used."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


def _import_without_sklearn(name: str) -> ModuleType:
    """Imports a module of FuxiCTR without sklearn, which it uses for scalers only.

    Importing sklearn takes longer than building a small data set.
    """
    if "sklearn" in sys.modules:
        return importlib.import_module(name)
    package, preprocessing = ModuleType("sklearn"), _LateModule("sklearn.preprocessing")
    package.preprocessing = preprocessing
    sys.modules.update({"sklearn": package, "sklearn.preprocessing": preprocessing})
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["sklearn"], sys.modules["sklearn.preprocessing"]


fuxictr_processing = _import_without_sklearn("fuxictr.preprocess.feature_processor")


class ColumnError(ValueError):
    """A column cannot be encoded. The message does not name the file, which only the caller knows."""


class NotANumberError(ColumnError):
    """A label or numeric feature has a value that is missing, not a number or infinite."""


class Processor(fuxictr_processing.FeatureProcessor):
    """FuxiCTR's FeatureProcessor with list columns, ``remap: False``, reproducible statistics and no pickle."""

    def read_data(self, data_path: str, data_format: str = "csv", sep: str = ",") -> pl.LazyFrame:
        """Scans a file or folder lazily, see ``adapt``."""
        return self.adapt(self.scan(data_path, data_format, sep))

    def scan(self, data_path: str, data_format: str, sep: str) -> pl.LazyFrame:
        """Scans a file or folder lazily, with the types that are there."""
        return super().read_data(data_path, data_format, sep)

    def adapt(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """Brings column types of parquet files to those that a csv file would give.

        Lists become strings joined by the column's splitter, a null in them an empty token; categories and bytes become
        strings, decimals numbers; labels and numeric features become numbers.
        """
        schema = frame.collect_schema()
        texts = pl.Categorical, pl.Enum, pl.Binary
        casts = [pl.col(name).cast(pl.String) for name, t in schema.items() if t in texts]
        for name, dtype in schema.items():
            if isinstance(dtype, pl.Decimal):
                casts.append(pl.col(name).cast(pl.Float64 if dtype.scale else pl.Int64))
        for col in self.feature_cols + self.label_cols:
            name, dtype = col["name"], schema.get(col["name"])
            if col.get("type") == "sequence" and isinstance(dtype, pl.List | pl.Array):
                casts.append(_joined(col))
            elif col.get("type", "label") in ("label", "numeric") and dtype in (pl.String, pl.Boolean):
                casts.append(pl.col(name).cast(pl.Float64))
        return frame.with_columns(casts)

    def preprocess(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """Fills and copies columns as FuxiCTR does, in its order, and keeps the active ones.

        Columns that are only filled share one step. FuxiCTR takes one for each, and the time and memory that polars
        needs to plan them grow with the cube of their number.
        """
        names, fills = set(frame.collect_schema().names()), []
        columns = [*self.label_cols, *reversed(self.feature_cols)]
        for col in columns:
            name, fill_na = col["name"], _fill_na(col)
            if name in names and fill_na is not None:
                fills.append(pl.col(name).fill_null(fill_na))
            if function := col.get("preprocess"):
                frame, fills = frame.with_columns(fills), []
                _, _, argument = function.rstrip(")").partition("(")
                frame = frame.with_columns(self.copy_from(argument or name).alias(name))
                if col.get("type") == "sequence" and isinstance(frame.collect_schema()[name], pl.List | pl.Array):
                    frame = frame.with_columns(_joined(col))
                if name not in names and fill_na is not None:
                    fills.append(pl.col(name).fill_null(fill_na))
        return frame.with_columns(fills).select(col["name"] for col in columns if col.get("active") is not False)

    def _collect_statistics(self, train_ddf, meta_ddf=None):
        statistics = self._statistics_in_turns(train_ddf, meta_ddf)
        scaled = [c["name"] for c in self.feature_cols if c["type"] == "numeric" and "normalizer" in c]
        for name, (mean, std) in _mean_and_std(train_ddf, scaled).items():
            low, high = statistics[name]["min"], statistics[name]["max"]
            if low == high:  # rounding must not turn a constant's spread into 1e-17
                mean, std = float(low), 0.0
            statistics[name].update(mean=mean, std=std)
        return statistics

    def _statistics_in_turns(self, train_ddf, meta_ddf) -> dict[str, dict]:
        """Counts one sequence column at a time: all at once, as FuxiCTR does, polars holds the events of all."""
        columns, statistics = self.feature_cols, {}
        turns = [[col for col in columns if col["type"] != "sequence"]]
        turns += [[col] for col in columns if col["type"] == "sequence"]
        try:
            for turn in turns:
                self.feature_cols = turn  # which is what FuxiCTR counts
                statistics |= super()._collect_statistics(train_ddf, meta_ddf)
        finally:
            self.feature_cols = columns
        return statistics

    def fit_meta_col(self, col, stats_dict):
        if col.get("remap", True):
            _check_tokens(col, stats_dict["value_counts"], min_count=1, na_value="")
        super().fit_meta_col(col, stats_dict)

    def fit_numeric_col(self, col, stats_dict=None):
        super().fit_numeric_col(col, stats_dict)
        if "normalizer" in col:
            self.processor_dict[col["name"] + "::statistics"] = stats_dict

    def fit_categorical_col(self, col, col_series=None, min_categr_count=1, num_buckets=10):
        self._select_vocabulary_source(col, col_series, min_categr_count)
        super().fit_categorical_col(col, col_series, min_categr_count, num_buckets)
        self.rebuild_dataset = True

    def fit_sequence_col(self, col, stats_dict=None, min_categr_count=1):
        self._select_vocabulary_source(col, stats_dict, min_categr_count)
        super().fit_sequence_col(col, stats_dict, min_categr_count)
        self.rebuild_dataset = True

    def _select_vocabulary_source(self, col, statistics, min_categr_count):
        # FuxiCTR collects no tokens where `remap: False` and would crash; `rebuild_dataset=False` is its own way to
        # take the vocabulary from `vocab_size`.
        self.rebuild_dataset = col.get("remap", True)
        if self.rebuild_dataset:
            min_count = col.get("min_categr_count", min_categr_count)
            _check_tokens(col, statistics["value_counts"], min_count, col.get("fill_na", ""))

    def save_pickle(self, pickle_file):
        """Does nothing: ``Encoder.load`` needs no pickle."""


class Encoder:
    """Encodes frames as ``FeatureProcessor.transform`` does, whole columns instead of Python loops over rows.

    Args:
        processor: A fitted processor.
        behaviors: Behaviour name -> its columns, whose events are aligned; they must have equally many in each row.

    Attributes:
        longest: By sequence column, the most events that an encoded row had, before it was cut to ``max_len``.
        cut: By sequence column, how many encoded rows had more than ``max_len``.
    """

    def __init__(self, processor: Processor, behaviors: dict[str, list[str]] | None = None):
        self.processor = processor
        self.behaviors = behaviors or {}
        self.features = processor.feature_map.features
        self.labels = processor.feature_map.labels
        self.may_be_missing = [col["name"] for col in processor.label_cols if col.get("may_be_missing")]
        self.longest: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()

    @classmethod
    def load(cls, data_dir: str | Path, behaviors: dict[str, list[str]] | None = None) -> "Encoder":
        """Restores the encoder of a built data set, to encode new rows without their labels and meta columns.

        Args:
            data_dir: The folder of the data set, ``data_root/dataset_id``.
            behaviors: See the class.

        Raises:
            ValueError: If ids cannot be restored because one vocabulary mixes numbers and strings, or if a file of
                the data set is damaged.
        """
        data_dir = Path(data_dir)
        remedy = "build the data set again"
        manifest = read_json(data_dir / "manifest.json", ("settings", "encoders"), remedy)
        cols = [c for c in _feature_columns(manifest["settings"]) if c["type"] != "meta"]
        with_vocabulary = [c["name"] for c in cols if "key" in manifest["encoders"].get(c["name"], {})]
        vocabularies = read_json(data_dir / "feature_vocab.json", with_vocabulary, remedy)
        read_feature_map(data_dir)  # checks it
        processor = Processor(cols, [], data_dir.name, str(data_dir.parent))
        processor.feature_map.load(str(data_dir / "feature_map.json"), {})
        processor.feature_map.labels = []
        for col in cols:
            name, state = col["name"], manifest["encoders"].get(col["name"], {})
            if "statistics" in state:
                normalizer = fuxictr_processing.Normalizer(col["normalizer"])
                s = state["statistics"]
                normalizer.fit_from_stats(s["min"], s["max"], s["mean"], s["std"], s["count"])
                processor.processor_dict[name + "::normalizer"] = normalizer
            elif "key" in state:
                if state["key"] not in KEY_TYPES:
                    raise ValueError(
                        f"{data_dir}: the vocabulary of {name!r} mixes {state['key']} keys, so its ids cannot be "
                        "restored; give all columns that share an embedding the same dtype and build again"
                    )
                tokenizer = _tokenizer(col, processor.feature_map.features[name].get("max_len", 0))
                as_key = KEY_TYPES[state["key"]]
                tokenizer.vocab = {k if k in SPECIAL else as_key(k): idx for k, idx in vocabularies[name].items()}
                processor.processor_dict[name + "::tokenizer"] = tokenizer
        return cls(processor, behaviors)

    def state(self) -> dict[str, dict]:
        """Returns what ``load`` needs beside the vocabularies: key types and normaliser statistics by column."""
        state = {}
        for name in self.features:
            tokenizer = self.processor.processor_dict.get(name + "::tokenizer")
            statistics = self.processor.processor_dict.get(name + "::statistics")
            if tokenizer is not None:
                keys = {type(key).__name__ for key in tokenizer.vocab if key not in SPECIAL}
                state[name] = {"key": " and ".join(sorted(keys))}
            elif statistics is not None:
                state[name] = {"statistics": statistics}
        return state

    def tokens(self, name: str) -> list[str]:
        """Lists the tokens of a column's vocabulary that were in the data."""
        return [token for token in self.processor.processor_dict[f"{name}::tokenizer"].vocab if token not in SPECIAL]

    def encode(self, frame: pl.DataFrame) -> dict[str, np.ndarray]:
        """Encodes raw rows.

        Args:
            frame: Rows as read from a csv or parquet file.

        Returns:
            Arrays by column: ids in the narrowest integer type, shape ``(N,)``, sequences ``(N, max_len)``; numeric
            features and labels float32 ``(N,)``, a missing label NaN if it may be missing, embeddings float32
            ``(N, pretrain_dim)``.
        """
        return self.encode_preprocessed(self.processor.preprocess(self.processor.adapt(frame.lazy())).collect())

    def encode_preprocessed(self, frame: pl.DataFrame) -> dict[str, np.ndarray]:
        """Encodes rows that went through ``Processor.preprocess`` already; see ``encode``."""
        encoders = {
            "meta": self._encode_category,
            "categorical": self._encode_category,
            "sequence": self._encode_sequence,
            "numeric": self._encode_numeric,
            "embedding": self._encode_embedding,
        }
        self._check_alignment(frame)
        features = [(n, spec) for n, spec in self.features.items() if n in frame.columns]
        return {name: encoders[spec["type"]](name, frame[name]) for name, spec in features} | {
            label: self._encode_numeric(label, frame[label]) for label in self.labels
        }

    def _check_alignment(self, frame: pl.DataFrame) -> None:
        """Raises for a row of which the columns of a behaviour keep different numbers of events."""
        for behavior, columns in self.behaviors.items():
            kept = {name: self._kept_events(name, frame[name]) for name in columns if name in frame.columns}
            for (first, expected), (name, found) in pairwise(kept.items()):
                if (wrong := (found != expected).fill_null(False)).any():
                    row = wrong.arg_max()
                    raise ColumnError(
                        f"behaviors: the columns of {behavior!r} are aligned, but a row has {expected[row]} events in "
                        f"{first!r} ({frame[first][row][:60]!r}) and {found[row]} in {name!r} "
                        f"({frame[name][row][:60]!r}); correct it, or make these columns behaviors of their own"
                    )

    def _kept_events(self, name: str, series: pl.Series) -> pl.Series:
        tokenizer = self.processor.processor_dict[name + "::tokenizer"]
        return (series.str.count_matches(tokenizer._splitter, literal=True) + 1).clip(upper_bound=tokenizer.max_len)

    def _encode_category(self, name: str, series: pl.Series) -> np.ndarray:
        if self.features[name]["type"] == "meta" and name + "::tokenizer" not in self.processor.processor_dict:
            if series.dtype.is_float() and (wrong := series != series.floor()).any():
                raise ColumnError(
                    f"column {name!r} has {series[wrong.arg_max()]}; with `remap: False` it must hold whole numbers"
                )
            return series.cast(pl.Int64).to_numpy()
        return self._lookup(name, series.to_arrow())

    def _encode_sequence(self, name: str, series: pl.Series) -> np.ndarray:
        tokenizer = self.processor.processor_dict[name + "::tokenizer"]
        max_len = tokenizer.max_len
        lists = series.str.split(tokenizer._splitter).list
        events = lists.len()
        self.longest[name] = max(self.longest[name], events.max() or 0)
        self.cut[name] += (events > max_len).sum()
        lists = lists.tail(max_len) if tokenizer.padding == "pre" else lists.head(max_len)
        lengths = lists.list.len().fill_null(0).cast(pl.Int64).to_numpy()[:, None]
        ids = self._lookup(name, lists.to_arrow().flatten())
        steps = np.arange(max_len)
        # Row by row, the real steps of the matrix are the flat ids in their order.
        real = steps >= max_len - lengths if tokenizer.padding == "pre" else steps < lengths
        matrix = np.full((len(series), max_len), PAD, ids.dtype)
        matrix[real] = ids
        return matrix

    def _encode_numeric(self, name: str, series: pl.Series) -> np.ndarray:
        values = series.cast(pl.Float64).to_numpy()
        wrong = np.isinf(values) if name in self.may_be_missing else ~np.isfinite(values)
        if wrong.any():
            raise NotANumberError(f"column {name!r} has a value that is not a finite number")
        normalizer = self.processor.processor_dict.get(name + "::normalizer")
        with np.errstate(over="ignore", invalid="ignore"):  # checked
            numbers = (values if normalizer is None else normalizer.transform(values)).astype(np.float32)
        if (wrong := ~np.isfinite(numbers) & ~np.isnan(values)).any():
            raise ColumnError(
                f"column {name!r}: {values[wrong.argmax()]} is beyond what float32 holds"
                f"{' after its normalizer' if normalizer else ''}; clip the column, or leave missing values empty"
            )
        return numbers

    def _encode_embedding(self, name: str, series: pl.Series) -> np.ndarray:
        dim = self.features[name]["pretrain_dim"]
        if not isinstance(series.dtype, pl.List | pl.Array):
            raise ColumnError(f"column {name!r} of type embedding must hold lists of numbers; got {series.dtype}")
        lists = series.cast(pl.List(pl.Float32))
        lengths = lists.list.len().fill_null(0)
        if (wrong := lengths != dim).any():
            raise ColumnError(f"column {name!r}: a row has {lengths[wrong.arg_max()]} values, pretrain_dim is {dim}")
        vectors = lists.to_arrow().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
        if not np.isfinite(vectors).all():
            raise ColumnError(f"column {name!r}: a vector has a number that is missing or not finite; correct it")
        return vectors

    def _lookup(self, name: str, tokens: pa.Array) -> np.ndarray:
        """Returns the id of each token; only distinct tokens pass through Python."""
        tokenizer = self.processor.processor_dict[name + "::tokenizer"]
        spec = self.features[name]
        vocab_size = spec.get("vocab_size") or tokenizer.vocab_size()  # FuxiCTR notes no size for meta columns
        vocab, oov = tokenizer.vocab, tokenizer.vocab["__OOV__"]
        na_value = tokenizer._na_value if spec["type"] == "sequence" else object()
        distinct = tokens.dictionary_encode(null_encoding="encode")
        values = distinct.dictionary.to_pylist()
        if tokenizer.remap:
            ids = [PAD if value == na_value else vocab.get(value, oov) for value in values]
        else:
            ids = [PAD if value == na_value else _as_index(name, value) for value in values]
        for value, idx in zip(values, ids):
            if not 0 <= idx < vocab_size:
                raise ColumnError(
                    f"column {name!r}: index {idx} of value {value!r} is beyond its vocabulary "
                    f"(vocab_size={vocab_size}); correct the data or raise vocab_size"
                )
        return np.array(ids, narrow_dtype(vocab_size))[distinct.indices.to_numpy()]


def encode_splits(
    settings: dict,
    behaviors: dict[str, list[str]] | None,
    sources: dict[str, tuple[str, list[str]]],
    data_root: Path,
    dataset_id: str,
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Fits FuxiCTR's encoders on the training split and writes every split, encoded, to ``data_root/dataset_id``.

    Args:
        settings: The checked settings of the data set.
        behaviors: Behaviour name -> its columns, whose events are aligned.
        sources: For each split the path given for it and the files found there.
        data_root, dataset_id: Where the h5 files, ``feature_map.json`` and ``feature_vocab.json`` go.

    Returns:
        For each split the path, rows and files (name and bytes) of what was written; and ``Encoder.state()``.

    Raises:
        ValueError: If a value or column of the data is wrong.
        OSError: If the disk is full.
    """
    # Labels are never filled in unless `fill_na` says so; FuxiCTR would turn a missing label into 0.
    labels = [{"fill_na": None, **col} for col in settings["label_col"].values()]
    features = _feature_columns(settings)
    processor = Processor(features, labels, dataset_id, str(data_root))
    try:
        frames = _read(processor, sources, settings)
        meta = [col["name"] for col in features if col["type"] == "meta"]
        every_split = pl.concat([frame.select(meta) for frame in frames.values()], how="vertical_relaxed")
        with _named(sources["train"][0]):
            processor.fit(frames["train"], every_split, settings["min_categr_count"])
        encoder = Encoder(processor, behaviors)
        written = _write(encoder, frames, sources, settings)
    except (pl.exceptions.PolarsError, NotANumberError) as error:
        raise _explanation(error, processor, sources, settings) from error
    encoders = encoder.state()
    for name, state in encoders.items():
        if " and " in state.get("key", ""):
            logging.warning(
                f"the vocabulary shared with {name!r} has {state['key']} keys: equal values of different dtype get "
                "different ids; give columns that share an embedding the same dtype"
            )
    return written, encoders


def _read(processor: Processor, sources: dict[str, tuple[str, list[str]]], settings: dict) -> dict[str, pl.LazyFrame]:
    """Scans and preprocesses each split after checking that it has rows and every column."""
    frames, kinds, tokens = {}, {}, {}
    for split, (path, files) in sources.items():
        for file in files if settings["data_format"] == "csv" else []:
            check_csv_end(file, settings["sep"])
        try:
            scan = processor.scan(path, settings["data_format"], settings["sep"])
            columns = scan.collect_schema()
        except pl.exceptions.NoDataError as error:
            raise ValueError(f"{path}: the {split} split is an empty file") from error
        wanted = [col["name"] for col in processor.feature_cols + processor.label_cols if not col.get("preprocess")]
        if missing := [name for name in wanted if name not in columns]:
            listed = "; ".join(f"column {name!r} is missing{did_you_mean(name, columns)}" for name in missing)
            only_labels = split == "test" and set(missing) <= {col["name"] for col in processor.label_cols}
            remedy = (
                "; to score rows without labels, set test_data: null and use flowctr predict" if only_labels else ""
            )
            raise ValueError(f"{path}: {listed}; the {split} split has {', '.join(columns)}{remedy}")
        for col in processor.feature_cols:
            _check_token_type(col, columns, path, tokens)
        _check_elements(processor, scan, columns, path)
        frames[split] = processor.preprocess(processor.adapt(scan))
        if frames[split].head(1).collect().is_empty():
            raise ValueError(f"{path}: the {split} split has no rows")
        _warn_of_empty_ids(processor, scan, path)
        for name, dtype in frames[split].collect_schema().items():
            # An id that is a number here and a string there would silently become out-of-vocabulary.
            kind = kinds.setdefault(name, (dtype.is_numeric(), dtype, path))
            if kind[0] != dtype.is_numeric():
                raise ValueError(f"column {name!r} is {kind[1]} in {kind[2]} but {dtype} in {path}; make them the same")
    return frames


def _check_token_type(col: dict, columns: pl.Schema, path: str, seen: dict[str, dict[str, str]]) -> None:
    """Raises if a token would be 1 in some of the columns and splits that share a vocabulary, and 1.0 in others.

    Args:
        col: A feature column.
        columns: Types of a split's columns.
        path: The split's path.
        seen: By the column that owns a vocabulary, the kinds of its tokens, each with the first column; added to.
    """
    dtype = columns.get(col["name"])
    while isinstance(dtype, pl.List | pl.Array):
        dtype = dtype.inner
    if col["dtype"] != "str" or dtype is None or not (dtype.is_numeric() or dtype == pl.String):
        return
    kind = "text" if dtype == pl.String else "float" if dtype.is_float() else "integer"
    kinds = seen.setdefault(col.get("share_embedding", col["name"]), {})
    if kind in kinds:
        return
    kinds[kind] = f"{col['name']!r} is {dtype} in {path}"
    remedy = "make it integers (pandas makes floats of them where one is empty: use Int64)"
    if {"integer", "float"} <= kinds.keys():
        raise ValueError(
            f"column {kinds['float']} but {kinds['integer']}, so that 1 and 1.0 would be two tokens; {remedy}"
        )
    if {"text", "float"} <= kinds.keys():
        logging.warning(
            f"column {kinds['float']}, so its tokens are like 1.0, but {kinds['text']}; if that has 1, {remedy}"
        )


def _warn_of_empty_ids(processor: Processor, scan: pl.LazyFrame, path: str) -> None:
    """Warns of rows without an id in a meta column: as a group_id they would all be one group."""
    meta = [col["name"] for col in processor.feature_cols if col["type"] == "meta" and "fill_na" not in col]
    given = scan.select(name for name in meta if name in scan.collect_schema())
    for name, count in given.null_count().collect().to_dict(as_series=False).items():
        if count := sum(count):
            logging.warning(
                f"{path}: column {name!r} is empty in {count} rows, which would be one group; correct them, or set "
                "fill_na to say so"
            )


def _check_elements(processor: Processor, scan: pl.LazyFrame, columns: pl.Schema, path: str) -> None:
    """Raises if a token of a list holds the splitter of its column, by which it would become two."""
    contains = [
        pl.col(col["name"])
        .cast(pl.List(pl.String))
        .list.eval(pl.element().str.contains(col.get("splitter", "^"), literal=True).any())
        .list.first()
        .any()
        for col in processor.feature_cols
        if col["type"] == "sequence"
        and isinstance(columns.get(col["name"]), pl.List | pl.Array)
        and not columns[col["name"]].inner.is_numeric()
    ]
    for name, found in scan.select(contains).collect().to_dict().items() if contains else ():
        if found.any():
            raise ValueError(
                f"{path}: column {name!r} has lists with a token that holds the column's splitter and would become "
                "two; give the column a splitter that occurs in none, such as splitter: '|'"
            )


def _write(encoder: Encoder, frames: dict[str, pl.LazyFrame], sources: dict, settings: dict) -> dict:
    """Encodes each distinct split into h5 files and describes them for the manifest."""
    processor = encoder.processor
    sequences = {n: spec for n, spec in encoder.features.items() if spec["type"] == "sequence"}
    paddings = {name: settings["feature_cols"][name].get("padding", "post") for name in sequences}
    steps = sum(spec["max_len"] for spec in sequences.values())
    batch_rows = max(1, min(BATCH_ROWS, BATCH_STEPS // max(1, steps)))
    folder, digest = Path(processor.data_dir), feature_map_digest(processor.data_dir)
    written, by_files = {}, {}
    for split, frame in frames.items():
        path, files = sources[split]
        files = tuple(os.path.realpath(file) for file in files)
        if files not in by_files:
            with (
                H5Writer(
                    folder,
                    split,
                    encoder.features,
                    paddings,
                    encoder.labels,
                    digest,
                    settings["data_block_size"],
                    settings["h5_compression"],
                    encoder.may_be_missing,
                ) as writer,
                tqdm(desc=f"encode {split}", unit=" rows", disable=None) as progress,  # None: only on a terminal
                _named(path),
            ):
                for batch in frame.collect_batches(chunk_size=batch_rows, maintain_order=True):
                    writer.append(encoder.encode_preprocessed(batch))
                    progress.update(len(batch))
            by_files[files] = {
                "path": split if settings["data_block_size"] else f"{split}.h5",
                "rows": writer.rows,
                "files": {name: (folder / name).stat().st_size for name in writer.files},
            }
        written[split] = by_files[files]
    _warn_of_histories(encoder, paddings)
    return written


def _warn_of_histories(encoder: Encoder, paddings: dict[str, str]) -> None:
    """Warns of what is seldom meant: newest events that are cut off, and a splitter that splits nothing."""
    for name, longest in encoder.longest.items():
        tokenizer = encoder.processor.processor_dict[f"{name}::tokenizer"]
        if paddings[name] == "post" and encoder.cut[name]:
            logging.warning(
                f"column {name!r}: {encoder.cut[name]} rows have more than max_len={tokenizer.max_len} events; "
                "padding: post cuts off the last, the newest in most data, padding: pre the first"
            )
        if longest == 1:
            logging.warning(
                f"column {name!r}: no row has more than one event; if its events are joined by another character than "
                f"{tokenizer._splitter!r}, set splitter"
            )


@contextmanager
def _named(path: str):
    """Puts the path of the split in front of what is wrong with one of its columns."""
    try:
        yield
    except NotANumberError:
        raise
    except ColumnError as error:
        raise ValueError(f"{path}: {error}") from error


def _explanation(error: Exception, processor: Processor, sources: dict, settings: dict) -> ValueError:
    """Finds the value that made reading fail: polars names neither file nor row."""
    is_csv = settings["data_format"] == "csv"
    for file in [file for _, files in sources.values() for file in files]:
        # Without type inference every value of a csv can be read, as a string.
        scan = pl.scan_csv(file, separator=settings["sep"], infer_schema=False) if is_csv else pl.scan_parquet(file)
        for col in processor.label_cols + processor.feature_cols:
            name, dtype = col["name"], processor.dtype_dict[col["name"]]
            try:
                may_be_missing = bool(col.get("may_be_missing"))
                may_be_null = may_be_missing or col.get("fill_na", 0) is not None
                is_int = is_csv and dtype is int
                bad = None if dtype is str else _first_bad_number(scan, name, is_int, may_be_null, may_be_missing)
            except pl.exceptions.PolarsError:  # no such column, or a file that cannot be read at all
                continue
            if bad is not None:
                row, value = bad
                where = f"row {row} (line {row + 1})" if is_csv else f"row {row}"
                is_label = col in processor.label_cols
                if value is None:
                    remedy = "set may_be_missing: true for the label" if is_label else "set fill_na"
                    return ValueError(f"{file}: column {name!r} is empty in {where}; correct it or {remedy}")
                kind = "an integer" if is_csv and dtype is int else "a number"
                remedy = f"correct the value or the dtype of {name!r}"
                if value.lower() == "nan":
                    remedy = (
                        "set may_be_missing: true for the label" if is_label else "leave it empty, which fill_na fills"
                    )
                return ValueError(f"{file}: column {name!r} has {value!r}, which is not {kind} in {where}; {remedy}")
    return ValueError(f"{', '.join(path for path, _ in sources.values())}: cannot be read: {error}")


def _first_bad_number(
    scan: pl.LazyFrame, name: str, is_int: bool, may_be_null: bool, may_be_nan: bool
) -> tuple[int, str | None] | None:
    """Returns row (from 1) and value of the first one that is no finite number, unless it may be null or NaN."""
    value = pl.col(name).cast(pl.String)
    dtype = scan.select(name).collect_schema()[name]
    given = pl.col(name) if dtype.is_numeric() or dtype == pl.Boolean else value
    number = given.cast(pl.Int64 if is_int else pl.Float64, strict=False).cast(pl.Float64)
    bad = number.is_finite().not_().fill_null(True)
    if may_be_null:
        bad &= value.is_not_null()
    if may_be_nan:
        bad &= number.is_nan().fill_null(False).not_()
    rows = scan.select(value.alias("value"), bad.alias("bad")).with_row_index("row", offset=1)
    return next(rows.filter("bad").select("row", "value").head(1).collect().iter_rows(), None)


def _joined(col: dict) -> pl.Expr:
    """Joins the lists of a sequence column by its splitter; a null in them is an empty token."""
    strings = pl.col(col["name"]).cast(pl.List(pl.String)).list.eval(pl.element().fill_null(""))
    return strings.list.join(col.get("splitter", "^"))


def _fill_na(col: dict) -> str | float | None:
    """What a column's nulls become, as in FuxiCTR; None: they stay."""
    kind = col["dtype"] if isinstance(col["dtype"], str) else col["dtype"].__name__
    return col.get("fill_na", {"str": "", "int": 0, "float": 0.0}[kind])


def _as_index(name: str, value) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ColumnError(
            f"column {name!r} has `remap: False`, so its values must be indices; got {value!r}; "
            "remove `remap: False` to have FuxiCTR number the values"
        ) from None


def _feature_columns(settings: dict) -> list[dict]:
    """Copies the feature columns as FuxiCTR's processor takes them.

    Vectors are never filled in. A column that shares the table of one that shares another's names the last one, the
    only one whose vocabulary FuxiCTR would count all tokens in.
    """
    columns = {name: dict(col) for name, col in settings["feature_cols"].items()}
    for col in columns.values():
        while (base := col.get("share_embedding")) and (owner := columns[base].get("share_embedding")):
            col["share_embedding"] = owner
        if col["type"] == "embedding":
            col["fill_na"] = None
    return list(columns.values())


def _tokenizer(col: dict, max_len: int) -> "fuxictr_processing.Tokenizer":
    return fuxictr_processing.Tokenizer(
        na_value=col.get("fill_na", ""),
        splitter=col.get("splitter", "^"),
        max_len=max_len,
        padding=col.get("padding", "post"),
        remap=col.get("remap", True),
    )


def _check_tokens(col: dict, counts: dict, min_count: int, na_value) -> None:
    if not any(count >= min_count and token != na_value for token, count in counts.items()):
        raise ColumnError(
            f"column {col['name']!r} has no token to learn from: every value is empty or occurs fewer than "
            f"min_categr_count={min_count} times in the training data; lower min_categr_count or set active: False"
        )


def _mean_and_std(frame: pl.LazyFrame, names: list[str]) -> dict[str, tuple[float, float]]:
    """Mean and population standard deviation of columns, the same on every run and any number of threads."""
    if not names:
        return {}
    moments = dict.fromkeys(names, (0, 0.0, 0.0))  # count, mean, sum of squared deviations
    for batch in frame.select(names).collect_batches(chunk_size=STATISTICS_ROWS, maintain_order=True):
        for name in names:
            x = batch[name].drop_nulls().cast(pl.Float64).to_numpy()
            if len(x) == 0:
                continue
            count, mean, squares = moments[name]
            delta, total = x.mean() - mean, count + len(x)  # merged by Chan's formula
            squares += ((x - x.mean()) ** 2).sum() + delta**2 * count * len(x) / total
            moments[name] = (total, mean + delta * len(x) / total, squares)
    return {name: (float(mean), math.sqrt(squares / max(count, 1))) for name, (count, mean, squares) in moments.items()}
