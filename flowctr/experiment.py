"""One run, top to bottom: configuration, data, model, training, evaluation, result."""

import hashlib
import json
import logging
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import flowctr
import numpy as np
import torch
from filelock import FileLock, Timeout
from flowctr import config, distributed, stages, zoo
from flowctr._fuxictr import fuxictr_origin
from flowctr.data import H5DataLoader, build_h5, data_digest, load_feature_map, scenario_names
from flowctr.evaluation import MAX_LOGGED_SCENARIOS
from flowctr.flops import flops_per_row
from flowctr.metrics import GroupAUCs
from flowctr.report import metrics_table
from flowctr.resume import ResumeFile, is_interrupted
from flowctr.training import accelerate
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from fuxictr.utils import print_to_json, print_to_list
from rich.console import Console
from torch import nn

RESULT_FORMAT = 1
EVALUATIONS = "FLOWCTR_EVALUATIONS"  # environment variable: file for the evaluations so far, for who watches the run
PACKAGES = ("numpy", "pandas", "polars", "scipy", "scikit-learn", "pyyaml", "h5py", "tqdm")


class RunningError(RuntimeError):
    """Another run writes the same checkpoint and log."""


def run(
    config_dir: str | Path,
    expid: str,
    src: ModuleType | None = None,
    model_dir: str | Path | None = None,
    gpu: int = -1,
    overrides: Iterable[str] = (),
) -> Path:
    """Runs one experiment and writes its result; together with other processes if torchrun has launched them.

    Args:
        config_dir: Config folder, see `flowctr.config.load`.
        expid: Experiment id.
        src: Module with the model class; ``flowctr.models.<model>`` by default.
        model_dir: Folder of what the run writes: checkpoint and log under ``model_root``, one line in
            ``<config folder's name>.csv``, ``results/``. The folder that contains ``config_dir`` by default.
        gpu: GPU index, -1 for the CPU; of several processes on a machine the others take the GPUs that follow.
        overrides: ``key=value`` each, see `flowctr.config.load`.

    Returns:
        Path of the result JSON.

    Raises:
        ValueError: If the configuration or the data are wrong, a run to resume had others, or there are too few GPUs
            or rows for the processes.
        RunningError: If another process runs this experiment with the same seed and ``model_root``.
        OSError: If a file cannot be written, for a full disk among others.
        TrainingError: If the loss, a prediction or the monitored metric is not a number.
        ProcessError: If another process of the run has failed.
    """
    with distributed.process_group(gpu) as gpu:
        return _run_locked(config_dir, expid, src, model_dir, gpu, overrides)


def load_params(
    config_dir: Path, expid: str, src: ModuleType | None, model_dir: Path, gpu: int, overrides: Iterable[str]
) -> dict[str, Any]:
    """Loads the parameters of an experiment with where its run writes: ``model_root`` and, with the seed, ``model_id``.

    Args:
        config_dir, expid, src, gpu, overrides: As for `run`.
        model_dir: The folder that a relative ``model_root`` counts from.

    Raises:
        ConfigError: If the configuration is wrong.
    """
    params = config.load(config_dir, expid, overrides, src)
    model_id = f"{expid}-s{params['seed']}"  # names checkpoint and log, so that seeds may run side by side
    return {**params, "gpu": gpu, "model_id": model_id, "model_root": str(model_dir / params["model_root"])}


def _run_locked(
    config_dir: str | Path,
    expid: str,
    src: ModuleType | None,
    model_dir: str | Path | None,
    gpu: int,
    overrides: Iterable[str],
) -> Path:
    config_dir = Path(config_dir).resolve()
    model_dir = Path(model_dir or config_dir.parent).resolve()
    params = load_params(config_dir, expid, src, model_dir, gpu, overrides)
    model_id = params["model_id"]
    if distributed.world_size() > 1:
        params["world_size"] = distributed.world_size()
    checkpoints = Path(params["model_root"]) / params["dataset_id"]
    checkpoints.mkdir(parents=True, exist_ok=True)
    lock = FileLock(checkpoints / f".{model_id}.lock", timeout=0) if distributed.is_writer() else nullcontext()
    try:
        with lock:
            return _run(params, expid, config_dir, model_dir, src)
    except Timeout as error:
        raise RunningError(
            f"another run of {expid} with seed {params['seed']} is writing to {checkpoints}; wait for it, or give this "
            "one another seed or a folder of its own: --set model_root=DIR"
        ) from error


def _run(params: dict[str, Any], expid: str, config_dir: Path, model_dir: Path, src: ModuleType | None) -> Path:
    started, clock = datetime.fromtimestamp(distributed.from_writer(time.time)), time.perf_counter()
    logging.raiseExceptions = False  # no traceback for each line that a log on a full disk cannot take
    if distributed.is_writer():
        _open_log(params)
    else:
        logging.basicConfig(format=f"process {distributed.rank()}: %(levelname)s %(message)s", force=True)
    logging.info("Params: %s", print_to_json(params))
    _check_gpu(params["gpu"])

    files = distributed.from_writer(lambda: build_h5(params))
    feature_map = load_feature_map(params)
    params.setdefault("num_tasks", len(feature_map.labels))
    _check_groups(feature_map)
    model_class = config.find_model(params, src)
    if params.get("zoo"):
        model_class = zoo.adapt(model_class, feature_map, params, files["train"])
    code = _code_origin(params)  # of what is loaded now: the checkout may change while the run trains

    def load(split: str, **sharing: int) -> H5DataLoader | None:
        return H5DataLoader(feature_map, files[split], split=split, **{**params, **sharing}) if files[split] else None

    # The test data too come before the training: what is wrong with them must not cost it.
    rank = distributed.rank()
    train_data, valid_data = load("train", rank=rank), load("valid", rank=rank)
    test_data = valid_data if files["test"] == files["valid"] else load("test", rank=rank)
    if distributed.world_size() > 1:
        _log_step_rows(params)
    digest = data_digest(feature_map.data_dir, files) or _files_digest(train_data, valid_data)
    model, earlier_stages = _train(model_class, feature_map, params, train_data, valid_data, digest, clock)

    metrics = {}
    if model.restored:  # what the best evaluation measured is not measured again
        metrics["valid"] = {name: value for name, value in model.restored.items() if name not in ("step", "epoch")}
    elif valid_data:
        metrics["valid"] = model.evaluate(valid_data)
    users = None
    if test_data and test_data is valid_data:
        metrics["test"] = metrics["valid"]
        users = model.group_aucs(test_data)  # which the best evaluation, maybe before a resume, did not keep
    elif test_data:
        logging.info("******** Test evaluation ********")
        metrics["test"], users = model.evaluate_with_groups(test_data)

    name = f"{params['model_id']}-{started:%Y%m%d-%H%M%S-%f}"  # runs may start in the same second
    path, lines = model_dir / "results" / f"{name}.json", model_dir / f"{config_dir.name}.csv"
    if not distributed.is_writer():
        return path
    shown = valid_data or train_data
    if distributed.world_size() > 1 and hasattr(model, "kept_flows"):  # is about all rows, not this process's part
        shown = load("valid" if valid_data else "train", world_size=1)
    result = {
        "format": RESULT_FORMAT,
        "expid": expid,
        "model": params["model"],
        "dataset_id": params["dataset_id"],
        "seed": params["seed"],
        "started": started.astimezone().isoformat(timespec="seconds"),
        "command": _command(),
        "config": portable(params),
        "labels": feature_map.labels,
        "metrics": metrics,
        "ne_base": "train",
        "curves": model.history,
        "stages": earlier_stages,
        "parameters": _count_parameters(model),
        "speed": {f"{work}_rows_per_second": rate for work, rate in model.rows_per_second().items()},
        "wall_seconds": model.resume_file.wall_seconds,
        "peak_memory_bytes": _peak_memory(model.device),
        "data": {"manifest": data_digest(feature_map.data_dir, files)},
        "kept_flows": _kept_flows(model, shown),
        "flops_per_row": flops_per_row(model, shown),
        **_environment(model.device),
        **code,
    }
    console = Console()
    console.print(metrics_table(result))  # before all writing, which may fail
    result["attention"] = _save_attention(model, valid_data, path.with_suffix(".npz"))
    result["users"] = _save_users(users, path.with_suffix(".users.npz"))
    with _checkpoint_kept(path, model.checkpoint):
        _write(path, lambda file: file.write(_to_json(result).encode()))
    with _checkpoint_kept(lines, model.checkpoint):
        _append_line(lines, result)
    model.resume_file.remove()  # not earlier: a run that is killed before evaluates again, it does not train again
    console.print(f"result: {path}", soft_wrap=True)
    console.print(f"report: flowctr report {shlex.quote(str(path))} --out report", soft_wrap=True)
    return path


def _train(
    model_class: type[BaseModel],
    feature_map: FeatureMap,
    params: dict[str, Any],
    train_data: H5DataLoader,
    valid_data: H5DataLoader | None,
    data: str,
    started: float,
) -> tuple[BaseModel, dict[str, Any]]:
    """Trains a model, stage by stage if it has stages (see `flowctr.stages`).

    ``data``, the digest of the data, and ``started`` are those of `ResumeFile`.

    Returns:
        The model of the last stage, and the records of the stages before it.
    """
    model_class, writes = accelerate(model_class), distributed.is_writer()
    all_stages = model_class.stages(params) if hasattr(model_class, "stages") else {}
    selected = {"train": params}
    if all_stages:  # the writer looks what is done, before it begins
        wanted = params.get("stage", stages.ALL)
        names = distributed.from_writer(lambda: list(stages.select(all_stages, wanted, data)))
        selected = {name: all_stages[name] for name in names}
    *earlier, last = all_stages or selected
    resume_files = {name: ResumeFile(parameters, data, started) for name, parameters in selected.items()}
    if params["resume"]:
        for resume_file in resume_files.values():
            resume_file.load()
        earlier_seconds = max(resume_file.earlier_seconds for resume_file in resume_files.values())
        for resume_file in resume_files.values():  # of later stages too, which have no file yet
            resume_file.earlier_seconds = earlier_seconds
    for name in set(earlier) - set(selected) if writes else ():  # it is done: of a run that was killed right then
        ResumeFile(all_stages[name], data, started).remove()
    model = None
    for name, parameters in selected.items():
        logging.info("******** Stage %s ********", name)
        seed_everything(params["seed"])  # a stage is the same whether the ones before it ran just now or earlier
        train_data.epoch = train_data.start_batch = 0
        del model  # its memory is the next one's
        model = model_class(feature_map, **parameters)
        if params.get("zoo") and writes:
            zoo.warn_of_linear(model)
        if writes and os.environ.get(EVALUATIONS):
            model.on_evaluation = lambda curve: _write(
                Path(os.environ[EVALUATIONS]), lambda file: file.write(_to_json(curve).encode())
            )
        logging.info("Parameters: %s", _count_parameters(model))
        # Not earlier: settings that the constructor refuses must not cost a search.
        if name != last and writes:
            stages.forget(parameters)
        if not params["resume"] and writes:
            for resume_file in resume_files.values():  # of later stages too: they will start from another one
                resume_file.discard()
        validation_data = valid_data if name == last else None
        model.fit(train_data, validation_data=validation_data, resume_file=resume_files[name], **parameters)
        if name != last and writes:
            stages.finish(parameters, data, {"curves": model.history})
            resume_files[name].remove()
    return model, {other: stages.read(all_stages[other]) for other in earlier if other != name}


def _open_log(params: Mapping[str, Any]) -> None:
    """Logs as FuxiCTR's ``set_logger`` does, but goes on with the log of a run that goes on."""
    path = Path(params["model_root"]) / params["dataset_id"] / f"{params['model_id']}.log"
    mode = "a" if params["resume"] and is_interrupted(params) else "w"
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s P%(process)d %(levelname)s %(message)s",
        handlers=[logging.FileHandler(path, mode), logging.StreamHandler()],
        force=True,
    )
    logging.info("FuxiCTR version: %s", version("fuxictr"))


def _log_step_rows(params: Mapping[str, Any]) -> None:
    """States what several processes make of the batch size, and what they do not make of the learning rate."""
    processes, rows, batches = params["world_size"], params["batch_size"], params.get("gradient_accumulation", 1)
    logging.info(
        "%d processes: a step takes %d rows (%d processes x %d batches x %d rows); the learning rate stays %s",
        *(processes, processes * batches * rows, processes, batches, rows, params.get("learning_rate", "the model's")),
    )


def _check_gpu(gpu: int) -> None:
    if gpu >= 0 and not torch.cuda.is_available():
        logging.warning(
            "!!! --gpu %d was asked for, but there is no GPU: this run uses the CPU and will be slow !!!", gpu
        )
    elif gpu >= torch.cuda.device_count() > 0:
        raise ValueError(f"--gpu {gpu} does not exist; this machine has GPUs 0 to {torch.cuda.device_count() - 1}")


def _check_groups(feature_map: FeatureMap) -> None:
    """Warns of a gAUC whose groups are not the groups of the data."""
    group = feature_map.group_id
    if group is not None and feature_map.features[group]["type"] == "categorical":
        logging.warning(
            "group_id: %s is categorical: all that training has not seen is one group of gAUC; for groups as they are, "
            "name a meta column: {name: group_id, dtype: str, type: meta, preprocess: copy_from(%s)}",
            *(group, group),
        )


def _command() -> str:
    """The command line, as FuxiCTR writes it for a script."""
    script, *arguments = sys.argv
    if not script.endswith(".py"):
        return shlex.join([Path(script).name, *arguments])
    return shlex.join(["python", portable(os.path.abspath(script)), *arguments])


def portable(value: Any) -> Any:
    """Gives paths inside the repository relative to it, so that a result says nothing of the machine."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, str) and value.startswith(f"{config.REPOSITORY}{os.sep}"):
        return os.path.relpath(value, config.REPOSITORY)
    return value


def _count_parameters(model: BaseModel) -> dict[str, int]:
    """Counts trainable parameters: all, and those outside of embedding tables."""
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        "total": sum(trainable.values()),
        "non_embedding": sum(count for key, count in trainable.items() if key not in tables),
    }


def _peak_memory(device: torch.device) -> dict[str, int | None]:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def _environment(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {"python": platform.python_version(), "flowctr": flowctr.__version__, "fuxictr": version("fuxictr")}
    return {
        "device": f"{device} ({gpu})" if gpu else str(device),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": gpu,
        },
        # torch names its build (+cpu, +cu130), which the package's version leaves out
        "versions": {
            **versions,
            "torch": torch.__version__,
            **{name: version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "fuxictr": fuxictr_origin(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _code_origin(params: Mapping[str, Any]) -> dict[str, Any]:
    """Names the ``commit`` of this code, and under ``zoo`` the code of FuxiCTR's model; None for a model of ours."""
    folder = params.get("zoo")
    return {
        "zoo": {**zoo.origin(folder), "commit": _commit(Path(folder))} if folder else None,
        "commit": _commit(config.REPOSITORY) if (config.REPOSITORY / ".git").exists() else None,
    }


def _commit(folder: Path) -> str | None:
    """The git commit of a folder, with "-dirty" when tracked files differ from it; None if no checkout tracks it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout

    try:
        if not git("ls-files", "."):  # a copy that lies in a checkout of something else
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _files_digest(train_data: H5DataLoader, valid_data: H5DataLoader | None) -> str:
    """Tells h5 files that come without a manifest from others, by their sizes and times."""
    paths = [*train_data.files, *(valid_data.files if valid_data else [])]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _kept_flows(model: BaseModel, data: H5DataLoader) -> dict[str, Any] | None:
    """Measures the share of rows that keep each flow, by scenario and label, of a model that gates flows."""
    shares = model.kept_flows(data) if hasattr(model, "kept_flows") else None  # (scenarios, K, flows)
    if shares is None:
        return None
    labels = model.feature_map.labels
    names = list(scenario_names(model.feature_map, model.scenario).values())[: len(shares)]
    for scenario, by_label in zip(names[:MAX_LOGGED_SCENARIOS], shares):
        for label, by_flow in zip(labels, by_label):
            kept = ", ".join(f"{flow} {share:.3f}" for flow, share in zip(model.FLOWS, by_flow))
            logging.info("Kept flows, %s=%s, %s: %s", model.scenario, scenario, label, kept)
    return {
        "scenario": model.scenario,
        "scenarios": names,
        "labels": labels,
        "flows": model.FLOWS,
        "kept": shares.tolist(),
    }


def _save_attention(model: BaseModel, data: H5DataLoader | None, path: Path) -> str | None:
    """Saves the model's ``attention_maps`` for the first validation batch, if it offers them and there is room."""
    if data is None or not hasattr(model, "attention_maps"):
        return None
    arrays = {}
    try:
        for name, (weights, rows, columns) in model.attention_maps(next(iter(data))).items():
            arrays |= {name: weights, f"{name}__rows": np.array(rows), f"{name}__cols": np.array(columns)}
        _write(path, lambda file: np.savez_compressed(file, **arrays))
    except (OSError, torch.OutOfMemoryError) as error:
        logging.warning("The attention maps are not saved to %s: %s", path, error)
        return None
    return path.name


def _save_users(users: Mapping[str, GroupAUCs] | None, path: Path) -> str | None:
    """Saves the AUC of every user (group) of the test data, for `flowctr.compare`, if there is room."""
    if users is None:
        return None
    arrays = {
        f"{label}__{name}": values for label, groups in users.items() for name, values in groups._asdict().items()
    }
    try:
        _write(path, lambda file: np.savez_compressed(file, **arrays))
    except OSError as error:
        logging.warning("The users' AUCs are not saved to %s: %s", path, error)
        return None
    return path.name


def _to_json(result: Mapping[str, Any]) -> str:
    finite = json.loads(json.dumps(result, default=str), parse_constant=lambda constant: None)  # JSON has no NaN
    return json.dumps(finite, indent=1)


@contextmanager
def _checkpoint_kept(path: Path, checkpoint: str) -> Iterator[None]:
    """Says what is left when a result cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}; the metrics are printed above and the checkpoint {checkpoint} is kept"
        ) from error


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def result_line(result: Mapping[str, Any]) -> str:
    """Formats a result, or what its JSON holds, as FuxiCTR's line of a result csv."""
    time = datetime.fromisoformat(result["started"])
    metrics = [result["metrics"].get(split, {}) for split in ("valid", "test")]
    # JSON has no nan
    valid, test = (print_to_list({k: math.nan if v is None else v for k, v in m.items()}) for m in metrics)
    return (
        f" {time:%Y%m%d-%H%M%S},[command] {result['command']},[exp_id] {result['expid']},"
        f"[dataset_id] {result['dataset_id']},[train] N.A.,[val] {valid},[test] {test}"
    )


def _append_line(path: Path, result: Mapping[str, Any]) -> None:
    """Appends a run's line to its csv; runs that end together wait for each other."""
    with FileLock(path.parent / "results" / f".{path.name}.lock"), open(path, "a", encoding="utf-8") as file:
        file.write(f"{result_line(result)}\n")
