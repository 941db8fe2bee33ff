"""The command line: ``flowctr prepare | build | run | tune | ...``, every model's ``run_expid.py`` and its tuner.

The commands import what they need when they run, so that ``--help`` does not wait for torch.
"""

import json
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

Model = Annotated[str | None, typer.Argument(help="Model, a folder of model_zoo.")]
Zoo = Annotated[
    Path | None, typer.Option(help="Instead of MODEL: a model folder of FuxiCTR, such as FuxiCTR/model_zoo/DIN.")
]
Expid = Annotated[str, typer.Option(help="Experiment id.")]
Gpu = Annotated[int, typer.Option(help="GPU index, -1 for the CPU.")]
Seed = Annotated[int | None, typer.Option(help="Seed instead of the configured one.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", envvar="FLOWCTR_RESUME", help="Continue an interrupted run, as resume: auto does."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration; a.b=1 reaches into a mapping."),
]
Config = Annotated[
    Path | None, typer.Option(help="Config folder, from here or from the model's folder.", show_default="config")
]
Debug = Annotated[bool, typer.Option("--debug", envvar="FLOWCTR_DEBUG", help="Show the traceback of an error.")]


Gpus = Annotated[
    list[int] | None,
    typer.Option("--gpu", metavar="N...", help="GPU indices, as in --gpu 0 1; -1 for the CPU.", show_default="-1"),
]
Search = Annotated[str, typer.Option(help="grid, random or optuna.")]
Trials = Annotated[int | None, typer.Option(help="Number of trials, for all but a grid.")]
EngineName = Annotated[str, typer.Option(help="local or ray.")]
Seeds = Annotated[int, typer.Option(help="Runs of the best trial, with its seed and those that follow.")]
Tag = Annotated[str | None, typer.Option(help="Run only the trials whose id contains this, such as 001.")]
Workers = Annotated[str, typer.Option(help="Trials at a time on each GPU or on the CPU; auto: as many as have room.")]
Sampler = Annotated[str, typer.Option(help="Sampler of optuna.")]


class _TuneCommand(TyperCommand):
    """Takes several values after one --gpu, as FuxiCTR's tuner does."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        words: list[str] = []
        for word in args:
            if word.lstrip("-").isdecimal() and words[-2:-1] == ["--gpu"]:
                words.append("--gpu")
            words.append(word)
        return super().parse_args(ctx, words)


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
    expid: Expid,
    model: Model = None,
    zoo: Zoo = None,
    config: Config = None,
    gpu: Gpu = -1,
    seed: Seed = None,
    resume: Resume = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Run an experiment: train, evaluate, write the result."""
    with _errors(debug):
        config_dir, folder, zoo_override = _place(model, zoo, config)
        _run(None, folder, config_dir, expid, gpu, seed, resume, [*zoo_override, *(overrides or ())])


@app.command()
def export(
    expid: Expid,
    format: Annotated[str, typer.Option(help="torch_export or onnx.")],
    out: Annotated[Path, typer.Option(help="File to write, such as model.pt2 or model.onnx.")],
    model: Model = None,
    zoo: Zoo = None,
    config: Config = None,
    seed: Seed = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Export the trained model of an experiment, and compare the file's predictions with the model's."""
    with _errors(debug):
        import flowctr.export

        trained = _load_trained(model, zoo, config, expid, -1, seed, overrides)
        exported = flowctr.export.export(trained, format, out)
        rows = ", ".join(map(str, exported.rows))
        print(f"checked on batches of {rows} rows: predictions differ by at most {exported.difference:.2g}")
        print(exported.path)


@app.command()
def predict(
    expid: Expid,
    data: Annotated[Path, typer.Option(help="Rows to score: csv or parquet, or h5 of the experiment's data set.")],
    out: Annotated[Path, typer.Option(help="csv or parquet file for the scores.")],
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="COLUMN", help="Column to write beside the scores; repeatable.")
    ] = None,
    model: Model = None,
    zoo: Zoo = None,
    config: Config = None,
    gpu: Gpu = -1,
    seed: Seed = None,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Score the rows of a file with the trained model of an experiment."""
    with _errors(debug):
        import flowctr.predict

        trained = _load_trained(model, zoo, config, expid, gpu, seed, overrides)
        rows = flowctr.predict.predict(trained, data, out, ids or ())
        print(f"{out}: {rows} rows")


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT...", help="Result files, folders of them, csv of published results.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("report"),
    debug: Debug = False,
) -> None:
    """Write a leaderboard of the runs, with pages of their learning curves, attention maps and origin."""
    with _errors(debug):
        from flowctr.leaderboard import write_leaderboard

        print(write_leaderboard(results, out))


@app.command()
def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Experiment id with results in model_zoo/*/results, or a glob of it; or a result file, a folder of "
            "them, or a glob in quotes.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other experiment.")],
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    resamples: Annotated[int, typer.Option(help="Resamples of the bootstrap over users.")] = 2000,
    debug: Debug = False,
) -> None:
    """Compare two experiments: a paired t-test over seeds, and for gAUC a bootstrap over users."""
    with _errors(debug):
        import flowctr.compare

        runs = (flowctr.compare.find_runs(what) for what in (a, b))
        comparison = flowctr.compare.compare(*runs, split, resamples)
        Console(width=120).print(flowctr.compare.comparison_table(comparison))


@app.command(cls=_TuneCommand)
def tune(
    config: Annotated[Path, typer.Argument(help="Tuner YAML.")],
    gpu: Gpus = None,
    search: Search = "grid",
    trials: Trials = None,
    engine: EngineName = "local",
    seeds: Seeds = 1,
    tag: Tag = None,
    workers: Workers = "auto",
    sampler: Sampler = "TPESampler",
    debug: Debug = False,
) -> None:
    """Search hyper-parameters; after an interruption the same command runs what is missing."""
    with _errors(debug):
        from flowctr import tuning

        tuning.tune(config, gpu or [-1], search, trials, engine, seeds, tag, workers, sampler)


def run_param_tuner(src: ModuleType, file: str) -> None:
    """Is the command line of a model folder's ``run_param_tuner.py``.

    Args:
        src: The model's module.
        file: ``__file__`` of the script; its folder is the model's.
    """
    folder = Path(file).resolve().parent

    def command(
        config: Annotated[Path, typer.Option(help="Tuner YAML, from here or from the model's folder.")],
        gpu: Gpus = None,
        search: Search = "grid",
        trials: Trials = None,
        engine: EngineName = "local",
        seeds: Seeds = 1,
        tag: Tag = None,
        workers: Workers = "auto",
        sampler: Sampler = "TPESampler",
        debug: Debug = False,
    ) -> None:
        with _errors(debug):
            from flowctr import tuning

            path = config if config.exists() else folder / config
            tuning.tune(path, gpu or [-1], search, trials, engine, seeds, tag, workers, sampler, folder, src)

    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command(cls=_TuneCommand, help=f"Search hyper-parameters of {folder.name}.")(command)
    script()


@app.command()
def submit(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TUNER_CONFIG|EXPID",
            help="Tuner YAML of a finished search; or an experiment id with results in model_zoo/*/results, or a "
            "folder of its results.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    author: Annotated[str | None, typer.Option(help="Author.", show_default="git's user.name")] = None,
    url: Annotated[str | None, typer.Option(help="The author's page.")] = None,
    debug: Debug = False,
) -> None:
    """Write the BARS submission of a search or an experiment, and its row for the leaderboard."""
    with _errors(debug):
        import flowctr.submission

        folder = flowctr.submission.submit(what, out, author, url)
        print((folder / flowctr.submission.LEADERBOARD).read_text(encoding="utf-8"))
        print(f"submission: {folder}")


@app.command()
def validate(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="BARS submissions, or folders of them such as a checkout.")
    ],
    debug: Debug = False,
) -> None:
    """Check BARS submissions and leaderboards: list every defect with its file and line."""
    with _errors(debug):
        from flowctr import validation

        targets, findings = validation.validate(folders, Console(stderr=True))
        for finding in findings:
            print(finding)
        Console().print(validation.summary_table(targets, findings))
    if not all(finding.is_notice for finding in findings):
        raise typer.Exit(FAILED_RUN)


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
            _run(src, folder, _config_dir(config, folder), expid, gpu, seed, resume, overrides)

    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command(help=f"Run an experiment of {folder.name}: train, evaluate, write the result.")(command)
    script()


def main() -> None:
    """Is the ``flowctr`` command."""
    app()


def _run(
    src: ModuleType | None,
    folder: Path | None,
    config_dir: Path,
    expid: str,
    gpu: int,
    seed: int | None,
    resume: bool,
    overrides: Sequence[str] | None,
) -> None:
    from flowctr import experiment

    overrides = [*_with_seed(overrides, seed), *(["resume=auto"] if resume else [])]
    experiment.run(config_dir, expid, src, folder, gpu, overrides)


def _load_trained(
    model: str | None,
    zoo: Path | None,
    config: Path | None,
    expid: str,
    gpu: int,
    seed: int | None,
    overrides: Sequence[str] | None,
) -> "TrainedModel":
    from flowctr.trained import load_trained

    config_dir, folder, zoo_override = _place(model, zoo, config)
    overrides = _with_seed([*zoo_override, *(overrides or ())], seed)
    return load_trained(config_dir, expid, None, folder, gpu, overrides)


def _with_seed(overrides: Sequence[str] | None, seed: int | None) -> list[str]:
    return [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]


def _place(model: str | None, zoo: Path | None, config: Path | None) -> tuple[Path, Path | None, list[str]]:
    """Finds the config folder, the folder that a run writes to, None for that around it, and the override for --zoo."""
    if model and zoo:
        raise ValueError(f"MODEL {model} and --zoo {zoo} exclude each other; keep one of them")
    if model:
        folder = _model_folder(model)
        return _config_dir(config, folder), folder, []
    if zoo is None:
        if config is None:
            raise ValueError("name MODEL, or a model folder of FuxiCTR with --zoo, or a config folder with --config")
        return _config_dir(config, None), None, []
    if not zoo.is_dir():
        raise FileNotFoundError(f"there is no zoo folder {zoo}; name FuxiCTR/model_zoo/<MODEL>")
    config_dir = _config_dir(config, zoo)
    overrides = [f"zoo={json.dumps(str(zoo), ensure_ascii=False)}"]
    if not config_dir.resolve().is_relative_to(zoo.resolve()):
        return config_dir, None, overrides
    data_root = json.dumps(str(Path.cwd() / "data" / "built"), ensure_ascii=False)
    return config_dir, Path.cwd(), [*overrides, f"data_root={data_root}"]  # nothing is written to FuxiCTR's checkout


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
    from flowctr.tuning import TuningError

    ours = (ExportError, ProcessError, RunningError, TrainingError, TuningError)
    return isinstance(error, (*ours, torch.OutOfMemoryError))


def _is_told_elsewhere(error: Exception) -> bool:
    """Says whether the first process of this machine tells of another's error, so that not all of them do."""
    from flowctr.distributed import ProcessError

    return isinstance(error, ProcessError) and os.environ.get("LOCAL_RANK", "0") != "0"
