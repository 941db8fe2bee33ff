"""A trained model as one file that runs without flowctr: a torch.export program or an ONNX graph."""

import inspect
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import flowctr
import torch
from flowctr.trained import TrainedModel
from torch import Tensor, nn

CHECKED_ROWS = (1, 2, 37, 256)  # sizes of the batches that are compared
TOLERANCE = 1e-5

Columns = Mapping[str, Tensor]
Scorer = Callable[[Columns], Mapping[str, Tensor]]


class ExportError(RuntimeError):
    """A model that cannot be exported, or whose export predicts something else."""


@dataclass
class Export:
    """An exported model.

    Attributes:
        path: Its file.
        rows: Rows of the batches on which it was compared with the model.
        difference: Largest absolute difference of a prediction.
    """

    path: Path
    rows: list[int]
    difference: float


def export(trained: TrainedModel, format: str, out: str | Path) -> Export:
    """Exports a trained model and compares the file's predictions with the model's on validation rows.

    The inputs are named as the columns: ids ``(B,)`` or ``(B, T)`` in int32, numbers ``(B,)`` in float32, any B; a
    program takes all of them, a graph those that the model reads. The outputs are those of
    `flowctr.trained.TrainedModel.score`.

    Args:
        trained: A model on the CPU.
        format: ``torch_export`` or ``onnx``.
        out: The file; it is written whole or not at all. Weights beyond ONNX's 2 GB go to a file beside it.

    Raises:
        ValueError: If the format is unknown.
        ExportError: If torch cannot export the model, what ONNX needs is not installed, or the predictions differ.
    """
    if format not in WRITERS:
        raise ValueError(f"format {format!r} is unknown; it is one of {', '.join(WRITERS)}")
    write, load = WRITERS[format]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    batches = _batches(trained)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        unfinished = Path(folder) / out.name  # an ONNX file names the file of its weights
        with _explained(trained, format):
            write(trained, batches[-1], unfinished)
            scorer = load(unfinished)
        difference = _compare(trained, scorer, batches, format)
        for file in sorted(Path(folder).iterdir(), key=unfinished.__eq__):  # the file that others belong to is last
            os.replace(file, out.parent / file.name)
    return Export(out, [_rows(batch) for batch in batches], difference)


class _Named(nn.Module):
    """A trained model whose inputs are keyword arguments, one for each column."""

    def __init__(self, trained: TrainedModel, columns: Iterable[str]):
        super().__init__()
        self.model = trained.model  # so that its parameters are found

        def forward(**columns: Tensor) -> dict[str, Tensor]:
            return trained.score(columns)

        # torch.export reads off the names of the inputs; it fails at dynamic shapes behind a mere **columns.
        forward.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in columns]
        )
        self.forward = forward


def _trace(trained: TrainedModel, example: Columns) -> torch.export.ExportedProgram:
    two_rows = {name: values[[0, -1]] for name, values in example.items()}  # one would be taken for a constant
    return torch.export.export(
        _Named(trained, example),
        (),
        two_rows,
        dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in two_rows},
        strict=True,  # otherwise len(tensor) fixes the batch size
    )


def _write_program(trained: TrainedModel, example: Columns, path: Path) -> None:
    with open(path, "wb") as file:
        extra_files = {"metadata.json": json.dumps(_metadata(trained))}
        torch.export.save(_trace(trained, example), file, extra_files=extra_files)


def _load_program(path: Path) -> Scorer:
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda columns: module(**columns)


def _write_onnx(trained: TrainedModel, example: Columns, path: Path) -> None:
    program = _trace(trained, example)
    first, *others = example
    onnx = torch.onnx.export(
        program,
        input_names=list(example),
        output_names=list(trained.score(example)),
        # The name alone; the program has the shapes. Of inputs that share a dimension, torch wants it named once.
        dynamic_shapes={first: {0: "batch"}, **dict.fromkeys(others)},
        verbose=False,
        optimize=False,  # it would drop the 1e-12 by which FuxiCTR keeps the mean of an empty history from 0 / 0
    )
    inputs = onnx.model.graph.inputs
    inputs[:] = [value for value in inputs if value.uses()]
    onnx.model.metadata_props.update(_metadata(trained))
    onnx.save(path)


def _load_onnx(path: Path) -> Scorer:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    names = [output.name for output in session.get_outputs()]

    def score(columns: Columns) -> dict[str, Tensor]:
        arrays = session.run(names, {name: columns[name].numpy() for name in inputs})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}

    return score


WRITERS = {"torch_export": (_write_program, _load_program), "onnx": (_write_onnx, _load_onnx)}


@contextmanager
def _explained(trained: TrainedModel, format: str) -> Iterator[None]:
    """Says in one message why torch cannot export a model."""
    logging.disable(logging.ERROR)  # of what torch writes down, all that matters is in its exceptions
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about how torch copies a program
            yield
    except ImportError as error:
        raise ExportError(
            f"format {format} needs {error.name}; install it with: pip install 'flowctr[export]'"
        ) from error
    except (RuntimeError, ValueError) as error:
        cause = error
        while cause.__cause__ is not None:  # torch.onnx wraps the error that names the operator
            cause = cause.__cause__
        reason, _, details = str(cause).strip().partition("\n")
        frames = re.findall(r'File "(.+)", line (\d+)', details)  # of the model's code, the innermost last
        place = ", in line {1} of {0}".format(*frames[-1]) if frames else ""
        raise ExportError(
            f"torch {torch.__version__} cannot export {trained.params['model']} as {format}: {reason}{place}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _metadata(trained: TrainedModel) -> dict[str, str]:
    """Gives what tells where a file comes from."""
    return {
        "expid": trained.expid,
        "seed": str(trained.params["seed"]),
        "dataset_id": trained.params["dataset_id"],
        "dataset_digest": trained.digest or "",
        "labels": json.dumps(trained.feature_map.labels),
        "flowctr": flowctr.__version__,
    }


def _batches(trained: TrainedModel) -> list[Columns]:
    """Reads validation rows, or those of another split, as batches of different sizes; histories of one are empty."""
    path = next(trained.files[split] for split in ("valid", "test", "train") if trained.files[split])
    rows = next(iter(trained.loader(path, sum(CHECKED_ROWS))))
    ends = list(accumulate(CHECKED_ROWS))
    batches = [{name: values[start:end] for name, values in rows.items()} for start, end in zip([0, *ends], ends)]
    specs = trained.feature_map.features
    sequences = [name for name in rows if specs[name]["type"] == "sequence"]
    empty = {name: torch.zeros_like(values) if name in sequences else values for name, values in batches[0].items()}
    return [batch for batch in [*([empty] if sequences else []), *batches] if _rows(batch)]


@torch.no_grad()
def _compare(trained: TrainedModel, scorer: Scorer, batches: list[Columns], format: str) -> float:
    """Returns the largest difference; raises if it is too large."""
    largest = 0.0
    for batch in batches:
        expected, found = trained.score(batch), scorer(batch)
        for name, values in expected.items():
            difference = (found[name] - values).abs().max().item()
            if not difference <= TOLERANCE:  # put like this, nan fails
                raise ExportError(
                    f"{format} predicts other values than the model: {name} differs by up to {difference:.3g} on a "
                    f"batch of {_rows(batch)} rows, at most {TOLERANCE} is allowed; no file was written"
                )
            largest = max(largest, difference)
    return largest


def _rows(batch: Columns) -> int:
    return len(next(iter(batch.values())))
