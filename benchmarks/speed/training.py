"""Training rows per second of each acceleration, alone and together, beside FuxiCTR's own fit in the same run.

    python benchmarks/speed/training.py --gpu 0                       # AmazonElectronics_x1's shape
    python benchmarks/speed/training.py                               # a small size on the CPU, under a minute
    python benchmarks/speed/training.py --gpu 0 --models DIN --only plain all

FuxiCTR trains on batches that lie in memory, the engine on what its loader delivers. Everything starts from the same
weights and sees the same batches; "loss difference" is the largest relative difference of the training curve from that
of FuxiCTR. Writes results/training.json.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib import import_module
from pathlib import Path

import flowctr  # noqa: F401  before fuxictr
import torch
from flowctr._fuxictr import fuxictr_origin
from flowctr.data import H5DataLoader
from flowctr.data.format import H5Writer
from flowctr.training import CURVE_POINTS_PER_EVALUATION, accelerate
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import DIN_Attention, FeatureEmbeddingDict, MLP_Block
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from rich.console import Console
from rich.table import Table

from data import CATEGORIES, ITEMS, make_columns

SIZES = {  # by whether there is a GPU
    True: {"batch_size": 2048, "warm_up": 20, "steps": 60, "dim": 64, "length": 100, "layers": 3},
    False: {"batch_size": 256, "warm_up": 2, "steps": 9, "dim": 16, "length": 20, "layers": 1},
}
FUSED = {"fused_optimizer": True, "fused_regularizer": True}
ACCELERATIONS = {
    "plain": {},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "cuda_graphs": {"cuda_graphs": True},
    "fused": FUSED,
    "data_on_device": {"data_on_device": True},
    "checkpointing": {"activation_checkpointing": True},
    "fp32 together": {"cuda_graphs": True, "data_on_device": True},
    "all": {"precision": "bf16", "compile": True, "cuda_graphs": True, "data_on_device": True, **FUSED},
}
QUICK = [name for name, options in ACCELERATIONS.items() if not {"compile", "cuda_graphs"} & set(options)]
PARTS = 3  # of the timed steps; the median counts


class DIN(BaseModel):
    """Deep interest network, built of FuxiCTR's layers: attention of the item over its history, then an MLP."""

    def __init__(self, feature_map, embedding_dim, learning_rate=5e-4, **kwargs):
        super().__init__(feature_map, **kwargs)
        self.embedding_layer = FeatureEmbeddingDict(feature_map, embedding_dim)
        self.attentions = torch.nn.ModuleDict(
            {name: DIN_Attention(embedding_dim, [512, 256]) for name in ("item", "cate")}
        )
        units = [1024, 512, 256]
        self.mlp = MLP_Block(4 * embedding_dim, units, "ReLU", 1, batch_norm=True)
        self.compile("adam", "binary_crossentropy", learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs):
        x = self.get_inputs(inputs)
        embedded, features = self.embedding_layer(x), []
        for name, attention in self.attentions.items():
            target, history = embedded[f"{name}_id"], embedded[f"{name}_history"]
            features += [target, attention(target, history, x[f"{name}_history"] > 0)]
        return {"y_pred": self.output_activation(self.mlp(torch.cat(features, dim=-1)))}


class Stopwatch:
    """Batches that tell the time at which a step is done: after the warm-up, and at the end of each part."""

    def __init__(self, batches: Iterable, warm_up: int, steps: int, gpu: int):
        self.batches, self.gpu = batches, gpu
        self.marks = [warm_up + steps * part // PARTS for part in range(PARTS + 1)]
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        for done, batch in enumerate(self.batches):
            if done in self.marks:
                self._mark()
            yield batch
        self._mark()

    def _mark(self) -> None:
        if self.gpu >= 0:
            torch.cuda.synchronize(self.gpu)
        self.times.append(time.perf_counter())

    def steps_per_second(self) -> float:
        parts = zip(self.marks, self.marks[1:], self.times, self.times[1:])
        return statistics.median((last - first) / (end - start) for first, last, start, end in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--only", nargs="+", choices=list(ACCELERATIONS), help="all on a GPU, the quick ones on the CPU"
    )
    for name in SIZES[True]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"{SIZES[True][name]}, {SIZES[False][name]} on the CPU"
        )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) or size for name, size in SIZES[args.gpu >= 0].items()}
    vars(args).update(sizes)
    names = args.only or (list(ACCELERATIONS) if args.gpu >= 0 else QUICK)
    results = {"environment": environment(args, sizes), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        feature_map = write_data(Path(folder), args)
        for model in args.models:
            runs = {"FuxiCTR": measure(model, feature_map, args, None)}
            for name in names:
                print(f"{model}: {name} ...", flush=True)
                try:
                    runs[name] = measure(model, feature_map, args, ACCELERATIONS[name])
                except (ValueError, RuntimeError) as error:
                    runs[name] = {"error": str(error)}
            results["models"][model] = compared(runs)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")  # after each model, in case the run is cut off
            print_table(model, runs)
    print(f"written: {args.out}")


def write_data(folder: Path, args) -> FeatureMap:
    """Writes rows of AmazonElectronics_x1's shape and describes them."""
    feature_map = FeatureMap("random", str(folder))
    feature_map.features["user_id"] = {"type": "meta"}
    for name, size in (("item", ITEMS), ("cate", CATEGORIES)):
        spec = {"source": "", "vocab_size": size, "padding_idx": 0}
        feature_map.features[f"{name}_id"] = {"type": "categorical", **spec}
        history = {"type": "sequence", "max_len": args.length, "share_embedding": f"{name}_id"}
        feature_map.features[f"{name}_history"] = {**spec, **history}
    feature_map.labels = ["label"]
    feature_map.num_fields = feature_map.get_num_fields()
    columns = make_columns((args.warm_up + args.steps) * args.batch_size)
    for name in ("item_history", "cate_history"):
        columns[name] = columns[name][:, : args.length]
    with H5Writer(folder, "train", feature_map.features, {}, ["label"], digest="") as writer:
        writer.append(columns)
    return feature_map


def zoo_model(name: str, **arguments):
    """Returns the class of our model and its arguments."""
    return getattr(import_module(f"flowctr.models.{name}"), name), arguments


MODELS = {
    "InterFormer": lambda args: zoo_model(
        "InterFormer", num_layers=args.layers, behaviors={"clicks": ["item_history", "cate_history"]}
    ),
    "INFNet v2": lambda args: zoo_model(
        "INFNet", num_blocks=args.layers, num_field_hubs=2, behaviors={"clicks": ["item_history", "cate_history"]}
    ),
    "DIN": lambda args: (DIN, {}),
}


def measure(model: str, feature_map: FeatureMap, args, acceleration: dict | None) -> dict:
    """Trains one epoch, with FuxiCTR's fit if there is no acceleration given, not even an empty one."""
    stock = acceleration is None
    options = dict(acceleration or {})
    loading = {"batch_size": args.batch_size, "shuffle": True, "data_on_device": options.pop("data_on_device", False)}
    data = H5DataLoader(feature_map, Path(feature_map.data_dir) / "train", gpu=-1 if stock else args.gpu, **loading)
    model_class, arguments = MODELS[model](args)
    if not stock:
        model_class = accelerate(model_class)
    if args.gpu >= 0:
        torch.cuda.reset_peak_memory_stats(args.gpu)
    seed_everything(0)
    built = model_class(
        feature_map,
        model_id=model,
        gpu=args.gpu,
        embedding_dim=args.dim,
        embedding_regularizer=0.005,
        eval_steps=sys.maxsize,
        verbose=0,
        model_root=feature_map.data_dir,
        metrics=["AUC"],
        **arguments,
        **options,
    )
    losses = []
    if stock:
        step = built.train_step
        built.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
        Path(built.model_dir).mkdir(exist_ok=True)
        built.save_weights(built.checkpoint)  # which its fit reads at the end
    watch = Stopwatch(list(data) if stock else data, args.warm_up, args.steps, args.gpu)
    built.fit(watch, epochs=1)
    if stock:
        every = max(1, len(watch) // CURVE_POINTS_PER_EVALUATION)
        losses = [loss.item() for loss in losses]
        curve = [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses), every)]
    else:
        curve = [point["loss"] for point in built.history["train"]]
    peak = torch.cuda.max_memory_allocated(args.gpu) if args.gpu >= 0 else None
    del built
    torch.compiler.reset()
    gc.collect()
    return {"rows_per_second": watch.steps_per_second() * args.batch_size, "peak_bytes": peak, "curve": curve}


def compared(runs: dict[str, dict]) -> dict[str, dict]:
    """Adds the ratios to FuxiCTR and to the plain engine, and the difference of the training curves."""
    for run in runs.values():
        if "error" in run:
            continue
        for key, base in (("over_fuxictr", runs["FuxiCTR"]), ("over_plain", runs.get("plain"))):
            run[key] = run["rows_per_second"] / base["rows_per_second"] if base else None
        pairs = zip(run["curve"], runs["FuxiCTR"]["curve"], strict=True)
        run["loss_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    return runs


def environment(args, sizes: dict) -> dict:
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(args.gpu) if args.gpu >= 0 else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "fuxictr": fuxictr_origin(),
        "sizes": sizes,
    }


def print_table(model: str, runs: dict[str, dict]) -> None:
    columns = ("rows/s", "over FuxiCTR", "over plain", "peak GB", "loss difference")
    table = Table(model, *columns, title_justify="left")
    for name, run in runs.items():
        if "error" in run:
            table.add_row(name, run["error"][:100])
            continue
        cells = [f"{run['rows_per_second']:,.0f}"]
        cells += [f"{run[key]:.2f}" if run[key] else "" for key in ("over_fuxictr", "over_plain")]
        cells += [f"{run['peak_bytes'] / 1e9:.2f}" if run["peak_bytes"] else "", f"{run['loss_difference']:.1e}"]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
