"""A model's epoch, evaluation and memory under FuxiCTR's trainer and under each acceleration, side by side in one run.

    python benchmarks/speed/training.py --gpu 0                            # AmazonElectronics_x1's shape
    python benchmarks/speed/training.py                                    # a small size on two CPU cores: minutes
    python benchmarks/speed/training.py --gpu 0 --zoo FuxiCTR/model_zoo    # and FuxiCTR's own models, unchanged
    python benchmarks/speed/training.py --gpu 0 --models DIN --zoo FuxiCTR/model_zoo --only plain all --profile

"FuxiCTR" trains on its npz loader, "FuxiCTR, in memory" on batches that lie in memory; the engine always on its h5
loader. All start from the same weights. "Loss difference" is the largest relative difference of the training curve from
that of FuxiCTR on the same batches. "Limit" is the share of the rate that the machine's measured matrix products and
copies would allow (see `limit`); "idle" is what an epoch loses against steps on batches that lie on the device. Writes
results/training_<device>.json and .png; with --profile also each kernel's time, ..._profile_<model>_<option>.txt.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib import import_module
from itertools import islice
from pathlib import Path

import flowctr  # noqa: F401  before fuxictr
import matplotlib.pyplot as plt
import numpy as np
import torch
from flowctr import zoo
from flowctr._fuxictr import fuxictr_origin
from flowctr.acceleration import check_padding_invariance
from flowctr.data import H5DataLoader
from flowctr.data.format import H5Writer
from flowctr.training import CURVE_POINTS_PER_EVALUATION, accelerate
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data import CATEGORIES, ITEMS, make_columns

SIZES = {  # by whether there is a GPU
    True: {
        "batch_size": 2048,
        "warm_up": 128,
        "steps": 192,
        "dim": 64,
        "length": 100,
        "layers": 3,
        "eval_rows": 100_000,
    },
    False: {"batch_size": 128, "warm_up": 4, "steps": 64, "dim": 16, "length": 100, "layers": 1, "eval_rows": 5_000},
}
LOADING = ("data_on_device", "bucket_by_length")  # the loader's part of the options
FUSED = {"fused_optimizer": True, "fused_regularizer": True}
FP32 = {"cuda_graphs": True, "data_on_device": True, **FUSED}
ACCELERATIONS = {
    "plain": {},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "cuda_graphs": {"cuda_graphs": True},
    "fused": FUSED,
    "data_on_device": {"data_on_device": True},
    "bucket_by_length": {"bucket_by_length": True},
    "ema_decay": {"ema_decay": 0.998},
    "checkpointing": {"activation_checkpointing": True},
    "fp32 together": FP32,
    "bf16 together": {"precision": "bf16", "compile": True, **FP32},
    "all": {"precision": "bf16", "compile": True, "bucket_by_length": True, **FP32},
}
CPU = ("plain", "bucket_by_length")
ROOFLINE = ("plain", "bucket_by_length", "bf16 together", "all")
RESIDENT = 64  # batches that lie on the device
STOCK = "FuxiCTR"
STOCK_IN_MEMORY = "FuxiCTR, in memory"
BEHAVIORS = {"clicks": ["item_history", "cate_history"]}
OURS = {
    "InterFormer": lambda args: ("InterFormer", {"num_layers": args.layers}),
    "INFNet v2": lambda args: ("INFNet", {"num_blocks": args.layers, "num_field_hubs": 2}),
    "DHEN": lambda args: ("DHEN", {"num_layers": args.layers}),
}
# BARS' settings for AmazonElectronics_x1, the same for all.
ZOO = {
    **{"optimizer": "adam", "loss": "binary_crossentropy", "learning_rate": 5e-4},
    **{"batch_norm": True, "net_dropout": 0.1},
}
ZOO_UNITS = {
    "DIN": {"dnn_hidden_units": [1024, 512, 256], "attention_hidden_units": [512, 256]},
    "BST": {"dnn_hidden_units": [1024, 512, 256]},
    "TransAct": {"dcn_hidden_units": [1024, 512, 256]},
    "DMIN": {"dnn_hidden_units": [1024, 512, 256]},
    "DCNv2": {"parallel_dnn_hidden_units": [1024, 512, 256]},
}


class Stopwatch:
    """Batches that tell the time at which the warm-up is done, and the last step."""

    def __init__(self, batches: Iterable, warm_up: int, gpu: int):
        self.batches, self.warm_up, self.gpu = batches, warm_up, gpu
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        for done, batch in enumerate(self.batches):
            if done == self.warm_up:
                self._mark()
            yield batch
        self._mark()

    def _mark(self) -> None:
        if self.gpu >= 0:
            torch.cuda.synchronize(self.gpu)
        self.times.append(time.perf_counter())

    def steps_per_second(self) -> float:
        start, end = self.times
        return (len(self) - self.warm_up) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--zoo", type=Path, help="the model_zoo of a FuxiCTR checkout")
    parser.add_argument(
        "--models", nargs="+", choices=[*OURS, *ZOO_UNITS], help="ours, and those of the zoo if it is given"
    )
    parser.add_argument("--only", nargs="+", choices=list(ACCELERATIONS), help="all on a GPU, a few on the CPU")
    for name in SIZES[True]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"{SIZES[True][name]}, {SIZES[False][name]} on the CPU"
        )
    parser.add_argument("--profile", action="store_true", help="keep what each option spends its time on")
    parser.add_argument("--out", type=Path, help="training_cuda.json or training_cpu.json in results/")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) or size for name, size in SIZES[args.gpu >= 0].items()}
    vars(args).update(sizes)
    device = "cuda" if args.gpu >= 0 else "cpu"
    args.out = args.out or Path(__file__).parent / "results" / f"training_{device}.json"
    models = args.models or [*OURS, *(ZOO_UNITS if args.zoo else ())]
    if not args.zoo and (lacking := [name for name in models if name in ZOO_UNITS]):
        parser.error(f"{', '.join(lacking)}: name the FuxiCTR checkout that has them, --zoo FuxiCTR/model_zoo")
    names = args.only or (list(ACCELERATIONS) if args.gpu >= 0 else CPU)
    results = {"environment": environment(args, sizes), "rates": measured_rates(args), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        feature_map = write_data(Path(folder), args)
        results["loaders"] = {
            STOCK: loader_rate(npz_loader(feature_map, args)),
            "flowctr": loader_rate(h5_loader(feature_map, args, {})),
        }

        def attempt(model: str, name: str, options: dict | None) -> dict:
            print(f"{model}: {name} ...", flush=True)
            try:
                return measure(model, feature_map, args, name, options)
            except (ValueError, RuntimeError) as error:
                return {"error": str(error)}

        # FuxiCTR's first: on the CPU, the engine changes for the whole process how memory is freed.
        stock = {model: {name: attempt(model, name, None) for name in (STOCK, STOCK_IN_MEMORY)} for model in models}
        for model, runs in stock.items():
            runs |= {name: attempt(model, name, ACCELERATIONS[name]) for name in names}
            results["models"][model] = compared(runs, results["rates"])
            write(args.out, results)  # after each model, in case the run is cut off
            print_table(model, runs)
    print(f"written: {args.out}")


# The data


def write_data(folder: Path, args) -> FeatureMap:
    """Writes rows of AmazonElectronics_x1's shape, for both loaders, and describes them."""
    feature_map = FeatureMap("random", str(folder))
    feature_map.features["user_id"] = {"type": "meta"}
    for name, size in (("item", ITEMS), ("cate", CATEGORIES)):
        spec = {"source": "", "vocab_size": size, "padding_idx": 0}
        feature_map.features[f"{name}_id"] = {"type": "categorical", **spec}
        history = {"type": "sequence", "max_len": args.length, "share_embedding": f"{name}_id", "feature_encoder": None}
        feature_map.features[f"{name}_history"] = {**spec, **history}
    feature_map.labels, feature_map.group_id = ["label"], "user_id"
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.set_column_index()
    for split, rows in (("train", (args.warm_up + args.steps) * args.batch_size), ("valid", args.eval_rows)):
        columns = make_columns(rows)
        columns["user_id"] = np.random.default_rng(0).integers(0, rows * 4 // 5, rows).astype(np.int32)
        for name in ("item_history", "cate_history"):
            columns[name] = np.ascontiguousarray(columns[name][:, : args.length])
        paddings = {"item_history": "post", "cate_history": "post"}
        with H5Writer(folder, split, feature_map.features, paddings, ["label"], digest="") as writer:
            writer.append(columns)
        np.savez(folder / f"{split}.npz", **{name: array.astype(np.float64) for name, array in columns.items()})
    return feature_map


def npz_loader(feature_map: FeatureMap, args, split: str = "train") -> Iterable:
    """Opens the rows with FuxiCTR's npz loader; its file alone is imported, as its package wants ray."""
    spec = importlib.util.find_spec("fuxictr")
    file = Path(spec.origin).parent / "pytorch" / "dataloaders" / "npz_dataloader.py"
    module_spec = importlib.util.spec_from_file_location("npz_dataloader", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    path = str(Path(feature_map.data_dir) / f"{split}.npz")
    workers = min(8, (os.cpu_count() or 2) // 2)
    return module.NpzDataLoader(feature_map, path, args.batch_size, shuffle=split == "train", num_workers=workers)


def h5_loader(feature_map: FeatureMap, args, options: dict, split: str = "train", gpu: int = -1) -> H5DataLoader:
    path = Path(feature_map.data_dir) / split
    return H5DataLoader(feature_map, path, split, args.batch_size, shuffle=True, gpu=gpu, **options)


def loader_rate(batches: Iterable) -> float:
    """Measures the rows per second of an epoch without a model, on the host."""
    start = time.perf_counter()
    rows = sum(len(batch["label"]) for batch in batches)
    return rows / (time.perf_counter() - start)


# The measurement


def model_and_arguments(model: str, feature_map: FeatureMap, args) -> tuple[type[BaseModel], dict]:
    if model in OURS:
        name, arguments = OURS[model](args)
        arguments |= {"behaviors": BEHAVIORS, "embedding_dim": args.dim, "task": "binary_classification"}
        return getattr(import_module(f"flowctr.models.{name}"), name), arguments
    (model_class,) = zoo.models(args.zoo / model).values()
    arguments = {**ZOO, **ZOO_UNITS[model], "behaviors": BEHAVIORS, "embedding_dim": args.dim}
    return zoo.adapt(model_class, feature_map, arguments, feature_map.data_dir), arguments


def measure(model: str, feature_map: FeatureMap, args, name: str, options: dict | None) -> dict:
    """Trains one epoch and evaluates, with FuxiCTR's own methods if there are no options, not even empty ones."""
    stock, options = options is None, dict(options or {})
    loading = {key: options.pop(key) for key in LOADING if key in options}
    if name == STOCK:
        data, valid_data = npz_loader(feature_map, args), npz_loader(feature_map, args, "valid")
    else:
        gpu = -1 if stock else args.gpu
        data, valid_data = (h5_loader(feature_map, args, loading, split, gpu) for split in ("train", "valid"))
    model_class, arguments = model_and_arguments(model, feature_map, args)
    if not stock:
        model_class = accelerate(model_class)
    if args.gpu >= 0:
        torch.cuda.reset_peak_memory_stats(args.gpu)
    seed_everything(0)
    built = model_class(
        feature_map,
        model_id=model,
        gpu=args.gpu,
        embedding_regularizer=0.005,
        eval_steps=sys.maxsize,
        verbose=0,
        model_root=feature_map.data_dir,
        metrics=["AUC", "gAUC"],
        **arguments,
        **options,
    )
    losses = []
    if stock:
        step = built.train_step
        built.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
        Path(built.model_dir).mkdir(exist_ok=True)
        built.save_weights(built.checkpoint)  # which its fit reads at the end
    if loading.get("bucket_by_length"):
        check_padding_invariance(built, data)  # fit would look for it, were the batches not in a Stopwatch
    watch = Stopwatch(list(data) if name == STOCK_IN_MEMORY else data, args.warm_up, args.gpu)
    built.fit(watch, epochs=1)
    if stock:
        every = max(1, len(watch) // CURVE_POINTS_PER_EVALUATION)
        losses = [loss.item() for loss in losses]
        curve = [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)]
    else:
        curve = [point["loss"] for point in built.history["train"]]
    peak = torch.cuda.max_memory_allocated(args.gpu) if args.gpu >= 0 else None
    run = {
        "rows_per_second": watch.steps_per_second() * args.batch_size,
        "peak_bytes": peak,
        "curve": curve,
        "same_batches": name != STOCK and not loading.get("bucket_by_length"),
    }
    if name == STOCK or not stock:
        run["evaluate_seconds"] = min(evaluation_seconds(built, valid_data) for _ in range(2))
    if not stock and args.gpu >= 0:
        resident = Stopwatch(list(islice(data, RESIDENT)) * 3, RESIDENT, args.gpu)
        built.fit(resident, epochs=1)
        run["resident_rows_per_second"] = resident.steps_per_second() * args.batch_size
    if not stock and args.profile:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.gpu >= 0)
        with profile(activities=activities) as profiled:
            built.fit(list(islice(data, RESIDENT)), epochs=1)
        table = profiled.key_averages().table(f"self_{'cuda' if args.gpu >= 0 else 'cpu'}_time_total", row_limit=40)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_name(f"{args.out.stem}_profile_{model}_{name}.txt".replace(" ", "_")).write_text(table)
    if not stock:
        run["work"] = work_per_row(built, next(iter(h5_loader(feature_map, args, {}))))
    del built
    torch.compiler.reset()
    gc.collect()
    return run


def evaluation_seconds(model: BaseModel, data: Iterable) -> float:
    start = time.perf_counter()
    model.evaluate(data)
    return time.perf_counter() - start


def work_per_row(model: BaseModel, batch: dict) -> dict[str, float]:
    """Counts what a training step has to do for a row at least, on whole sequences: operations, and bytes to move.

    Bytes are those of the activations that the backward pass reads, once written and once read, and of weights,
    gradients and Adam's two moments, of which seven are read or written by an update.
    """
    saved: dict[tuple, int] = {}

    def save(tensor):
        saved[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
        return tensor

    batch = {name: values.to(model.device) for name, values in batch.items()}
    model.train()
    model.optimizer.zero_grad()
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        outputs = {key: value for key, value in model._accelerated_forward(batch).items() if key.endswith("_pred")}
        sum(output.sum() for output in outputs.values()).backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = len(batch["label"])
    return {"flops": counter.get_total_flops() / rows, "bytes": (2 * sum(saved.values()) + 7 * 4 * parameters) / rows}


def measured_rates(args) -> dict[str, float]:
    """Measures what the device does at best: operations per second of matrix products, bytes per second of copies."""
    device = torch.device("cuda", args.gpu) if args.gpu >= 0 else torch.device("cpu")
    size, dtype = (8192, torch.bfloat16) if args.gpu >= 0 else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(2**30 if args.gpu >= 0 else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * size**3 / best_time(lambda: a @ a, device),
        "bytes": 2 * source.numel() / best_time(lambda: target.copy_(source), device),
    }


def best_time(call, device: torch.device) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / 10)
    return min(times)


def limit(work: dict[str, float], rates: dict[str, float]) -> float:
    """The rows per second at which either the matrix products or the copies alone would take all the time."""
    return min(rates[kind] / work[kind] for kind in ("flops", "bytes"))


def compared(runs: dict[str, dict], rates: dict[str, float]) -> dict[str, dict]:
    """Adds ratios to FuxiCTR and to the plain engine, the difference of the training curves, idle time and limit."""
    stock = runs[STOCK]
    for run in runs.values():
        if "error" in run or "error" in stock:
            continue
        for key, base in (("over_fuxictr", stock), ("over_plain", runs.get("plain"))):
            run[key] = run["rows_per_second"] / base["rows_per_second"] if base else None
        if run["same_batches"]:
            pairs = zip(run["curve"], runs[STOCK_IN_MEMORY]["curve"], strict=True)
            run["loss_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        if "resident_rows_per_second" in run:
            run["idle"] = max(0.0, 1 - run["rows_per_second"] / run["resident_rows_per_second"])
        if "work" in run:
            run["limit"] = run["rows_per_second"] / limit(run["work"], rates)
    return runs


def environment(args, sizes: dict) -> dict:
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(args.gpu) if args.gpu >= 0 else f"cpu, {torch.get_num_threads()} threads",
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "fuxictr": fuxictr_origin(),
        "sizes": sizes,
    }


# The result

COLUMNS = {  # heading -> key and how it is shown
    "epoch rows/s": ("rows_per_second", "{:,.0f}"),
    "over FuxiCTR": ("over_fuxictr", "{:.2f}"),
    "resident rows/s": ("resident_rows_per_second", "{:,.0f}"),
    "idle": ("idle", "{:.0%}"),
    "limit": ("limit", "{:.0%}"),
    "evaluation, s": ("evaluate_seconds", "{:.2f}"),
    "peak GB": ("peak_bytes", None),
    "loss difference": ("loss_difference", "{:.0e}"),
}


def cells(run: dict) -> list[str]:
    """Shows a run in the columns of the tables."""
    if "error" in run:
        return [run["error"].splitlines()[0][:100], *["–"] * (len(COLUMNS) - 1)]
    values = {key: run.get(key) for key, _ in COLUMNS.values()}
    if values["peak_bytes"] is not None:
        values["peak_bytes"] /= 1e9
    return ["–" if values[key] is None else (form or "{:.2f}").format(values[key]) for key, form in COLUMNS.values()]


def print_table(model: str, runs: dict[str, dict]) -> None:
    table = Table(model, *COLUMNS, title_justify="left")
    for name, run in runs.items():
        table.add_row(name, *cells(run))
    Console(width=150).print(table)


def write(path: Path, results: dict) -> None:
    """Writes the result, and as a picture: throughput, and how near the machine's limit it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    models, rates = results["models"], results["rates"]
    figure, (bars, roofline) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [
        name for name in next(iter(models.values())) if any("rows_per_second" in runs[name] for runs in models.values())
    ]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [runs[name].get("rows_per_second", math.nan) for runs in models.values()]
        bars.bar(np.arange(len(models)) + (i - len(names) / 2) * width, heights, width, label=name)
    bars.set_xticks(range(len(models)), list(models), rotation=30, ha="right")
    bars.set_ylabel("rows/s of an epoch")
    bars.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    intensity = np.logspace(-1, 3, 400)
    roofline.plot(intensity, np.minimum(rates["flops"], rates["bytes"] * intensity) / 1e12, color="black")
    for model, runs in models.items():
        points = [(name, run) for name, run in runs.items() if "work" in run and name in ROOFLINE]
        x = [run["work"]["flops"] / run["work"]["bytes"] for _, run in points]
        y = [run["work"]["flops"] * run["rows_per_second"] / 1e12 for _, run in points]
        roofline.plot(x, y, "o-", label=model)
        for (name, _), *place in zip(points, x, y):
            roofline.annotate(name, place, fontsize=6)
    roofline.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="TFLOP/s")
    roofline.set_title("the machine's limit, and where the models are", fontsize=9)
    if models and roofline.get_legend_handles_labels()[0]:
        roofline.legend(fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
