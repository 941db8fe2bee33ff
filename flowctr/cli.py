"""The command line: ``flowctr prepare | build | run | export | predict | report`` and every model's ``run_expid.py``.

The commands import what they need when they run, so that ``--help`` does not wait for torch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

if TYPE_CHECKING:
    from flowctr.trained import TrainedModel

WRONG_INPUT, FAILED_RUN = 2, 1

app = typer.Typer(
    help="Information-flow CTR models on FuxiCTR: prepare data, build h5 data sets, run experiments, compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Model, a folder of model_zoo.")]
Expid = Annotated[str, typer.Option(help="Experiment id.")]
Gpu = Annotated[int, typer.Option(help="GPU index, -1 for the CPU.")]
Seed = Annotated[int | None, typer.Option(help="Seed instead of the configured one.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, as resume: auto does.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration; a.b=1 reaches into a mapping."),
]
Config = Annotated[
    Path | None, typer.Option(help="Config folder, from here or from the model's folder.", show_default="config")
]
Debug = Annotated[bool, typer.Option("--debug", envvar="FLOWCTR_DEBUG", help="Show the traceback of an error.")]


class _PrepareCommand(TyperCommand):
    """Lists the known data sets below the help, which is built only when it is asked for."""

    def format_help(self, ctx, formatter) -> None:
        from flowctr.datasets import DATASETS

        lines = [
            f"{dataset.id}: {dataset.description} Files: {', '.join(dataset.files)}. From: {dataset.download}"
            for dataset in DATASETS.values()
        ]
        self.epilog = "\n\n".join(["Known data sets:", *lines])
        super().format_help(ctx, formatter)


@app.command(cls=_PrepareCommand)
def prepare(
    dataset_id: Annotated[str, typer.Argument(help="Data set id, one of those below.")],
    raw: Annotated[Path, typer.Option(help="Folder with the raw files.")],
    out: Annotated[Path, typer.Option(help="Folder for the train, valid and test tables.")],
    debug: Debug = False,
) -> None:
    """Make the train, valid and test tables of a public data set from its raw files."""
    with _errors(debug):
        import flowctr.datasets

        for path in flowctr.datasets.prepare(dataset_id, raw, out):
            print(path)


@app.command()
def build(
    dataset: Annotated[str, typer.Option(help="Data set id.")],
    config: Annotated[Path | None, typer.Option(help="Config folder; else data_configs/ is searched.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build again even if nothing has changed.")] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Build the h5 data set of a configuration, or find it built."""
    with _errors(debug):
        from flowctr.config import load_dataset
        from flowctr.data import build_h5

        for split, path in build_h5(load_dataset(dataset, config, overrides or ()), rebuild=rebuild).items():
            print(f"{split}: {path}")


@app.command()
def run(
    model: Model,
    expid: Expid,
    config: Config = None,
    gpu: Gpu = -1,
    seed: Seed = None,
    resume: Resume = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Run an experiment: train, evaluate, write the result."""
    with _errors(debug):
        _run(None, _model_folder(model), config, expid, gpu, seed, resume, overrides)


@app.command()
def export(
    model: Model,
    expid: Expid,
    format: Annotated[str, typer.Option(help="torch_export or onnx.")],
    out: Annotated[Path, typer.Option(help="File to write, such as model.pt2 or model.onnx.")],
    config: Config = None,
    seed: Seed = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Export the trained model of an experiment, and compare the file's predictions with the model's."""
    with _errors(debug):
        import flowctr.export

        trained = _load_trained(model, config, expid, -1, seed, overrides)
        exported = flowctr.export.export(trained, format, out)
        rows = ", ".join(map(str, exported.rows))
        print(f"checked on batches of {rows} rows: predictions differ by at most {exported.difference:.2g}")
        print(exported.path)


@app.command()
def predict(
    model: Model,
    expid: Expid,
    data: Annotated[Path, typer.Option(help="Rows to score: csv or parquet, or h5 of the experiment's data set.")],
    out: Annotated[Path, typer.Option(help="csv or parquet file for the scores.")],
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="COLUMN", help="Column to write beside the scores; repeatable.")
    ] = None,
    config: Config = None,
    gpu: Gpu = -1,
    seed: Seed = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Score the rows of a file with the trained model of an experiment."""
    with _errors(debug):
        import flowctr.predict

        rows = flowctr.predict.predict(_load_trained(model, config, expid, gpu, seed, overrides), data, out, ids or ())
        print(f"{out}: {rows} rows")


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT...", help="Result files of the runs, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("report"),
    debug: Debug = False,
) -> None:
    """Write an HTML page with the results, learning curves and attention maps of some runs."""
    with _errors(debug):
        from flowctr.report import write_report

        files: list[Path] = []
        for path in results:
            found = sorted(path.glob("*.json")) if path.is_dir() else [path]
            if not found:
                raise FileNotFoundError(f"there is no result, no *.json, in the folder {path}")
            files += found
        print(write_report(files, out))


def run_expid(src: ModuleType, file: str) -> None:
    """Is the command line of a model folder's ``run_expid.py``.

    Args:
        src: The model's module.
        file: ``__file__`` of the script; its folder is the model's.
    """
    folder = Path(file).resolve().parent

    def command(
        config: Config = None,
        expid: Annotated[str, typer.Option(help="Experiment id.")] = f"{folder.name}_test",
        gpu: Gpu = -1,
        seed: Seed = None,
        resume: Resume = False,
        overrides: Overrides = None,
        debug: Debug = False,
    ) -> None:
        with _errors(debug):
            _run(src, folder, config, expid, gpu, seed, resume, overrides)

    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command(help=f"Run an experiment of {folder.name}: train, evaluate, write the result.")(command)
    script()


def main() -> None:
    """Is the ``flowctr`` command."""
    app()


def _run(
    src: ModuleType | None,
    folder: Path | None,
    config: Path | None,
    expid: str,
    gpu: int,
    seed: int | None,
    resume: bool,
    overrides: Sequence[str] | None,
) -> None:
    from flowctr import experiment

    overrides = [*_with_seed(overrides, seed), *(["resume=auto"] if resume else [])]
    experiment.run(_config_dir(config, folder), expid, src, folder, gpu, overrides)


def _load_trained(
    model: str, config: Path | None, expid: str, gpu: int, seed: int | None, overrides: Sequence[str] | None
) -> "TrainedModel":
    from flowctr.trained import load_trained

    folder = _model_folder(model)
    return load_trained(_config_dir(config, folder), expid, None, folder, gpu, _with_seed(overrides, seed))


def _with_seed(overrides: Sequence[str] | None, seed: int | None) -> list[str]:
    return [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]


def _model_folder(model: str) -> Path | None:
    """Finds the folder of a model; none: it is installed without a checkout."""
    from flowctr.config import REPOSITORY, model_class

    model_class(model)
    folder = REPOSITORY / "model_zoo" / model
    return folder if folder.is_dir() else None


def _config_dir(config: Path | None, folder: Path | None) -> Path:
    """Finds the config folder from the working directory, else from the model's folder."""
    places = [folder / (config or "config")] if folder else []
    if config or not folder:
        places.insert(0, config or Path("config"))
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"there is no config folder {' or '.join(map(str, places))}; name it with --config")


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Ends the program with one message and an exit code for what a user can mend; bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if debug or not _is_expected(error):
            raise
        if _is_told_elsewhere(error):
            raise typer.Exit(FAILED_RUN) from error
        console = Console(stderr=True, soft_wrap=True)
        console.print(Text(f"error: {error or type(error).__name__}", style="bold red"))
        console.print("(--debug shows where it comes from)", style="dim")
        raise typer.Exit(WRONG_INPUT if isinstance(error, (ValueError, FileNotFoundError)) else FAILED_RUN) from error


def _is_expected(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return True
    import torch
    from flowctr.distributed import ProcessError
    from flowctr.experiment import RunningError
    from flowctr.export import ExportError
    from flowctr.training import TrainingError

    return isinstance(error, (ExportError, ProcessError, RunningError, TrainingError, torch.OutOfMemoryError))


def _is_told_elsewhere(error: Exception) -> bool:
    """Says whether the first process of this machine tells of another's error, so that not all of them do."""
    from flowctr.distributed import ProcessError

    return isinstance(error, ProcessError) and os.environ.get("LOCAL_RANK", "0") != "0"
