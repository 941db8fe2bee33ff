"""Time and memory of a training step against sequence length and fields: python benchmarks/speed/scaling.py.

Compares INFNet (hubs), InterFormer and INFNet's all-to-all ablation, a transformer over all tokens, at one width and
depth. Prints a table with the fitted exponents and writes scaling.json and scaling.png to results/.

With ``--pairs N`` it measures one number instead, how long INFNet's step takes next to the all-to-all transformer's on
the input of ``PAIR``: the two take turns in one process, so that what else the machine does hits both. Writes
pairs_cpu.json or pairs_cuda.json.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

HERE = Path(__file__).parent
LENGTHS = (50, 100, 200, 400, 800, 1600, 3200)
FIELDS = (10, 25, 50, 100, 200, 400)
VOCABULARY = 1000
MEMORY_LIMIT = 12 * 2**30  # a point that needs more is reported as an error instead of filling the machine
PAIR = {"fields": 89, "behaviors": 4, "length": 50, "labels": 3}  # three tasks, four histories of 50 events
GPU_WARM_UP = 5  # untimed steps before the pairs; a captured step is captured in its fourth
MODELS = {
    "INFNet v2": ("INFNet", {"version": "v2", "num_blocks": 3, "num_field_hubs": 16}),
    "InterFormer": ("InterFormer", {"num_layers": 3, "num_heads": 1}),
    "all-to-all": ("INFNet", {"aggregation": "all_to_all", "num_blocks": 3}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, help="default 64, for pairs 4096")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--max-tokens", type=int, default=3200, help="leave out longer sequences and more fields")
    parser.add_argument("--pairs", type=int, help="time this many pairs of INFNet v2 and all-to-all steps instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a single point, run in a process of its own
    options = parser.parse_args()
    options.batch_size = options.batch_size or (4096 if options.pairs else 64)
    if options.pairs:
        compare_pairs(options)
        return
    if options.one:
        print(json.dumps(measure(*json.loads(options.one), options)))
        return
    points = []
    for axis, sizes in (("sequence length", LENGTHS), ("fields", FIELDS)):
        for size in (size for size in sizes if size <= options.max_tokens):
            for model in MODELS:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps([model, axis, size])]
                done = subprocess.run(command, capture_output=True, text=True)
                point = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()[-200:]}
                points.append({"model": model, "axis": axis, "size": size, **point})
                print(json.dumps(points[-1]), flush=True)
    write(points, options)


def measure(model: str, axis: str, size: int, options) -> dict[str, float]:
    """Times training steps of one model on random data, with its peak memory."""
    import resource

    import torch

    fields, length = (20, size) if axis == "sequence length" else (size, 50)
    if options.gpu < 0:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    feature_map = make_feature_map(fields, length)
    built = build(model, feature_map, options)
    batch = make_batch(feature_map, options.batch_size, built.device)
    on_gpu = built.device.type == "cuda"
    seconds = []
    for step in range(options.steps + 1):
        gc.collect()
        started = time.perf_counter()
        built.train_step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        if step:  # the first one warms up
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


def compare_pairs(options) -> None:
    """Times INFNet v2 and all-to-all in turns and writes the ratio of each pair; on a GPU as captured steps too."""
    import torch

    on_gpu = options.gpu >= 0
    models = ("INFNet v2", "all-to-all")
    feature_map = make_feature_map(**PAIR)
    runs = []
    for mode in ("eager", "CUDA graph") if on_gpu else ("eager",):
        steps = [training_step(model, feature_map, mode, options) for model in models]
        for _ in range(GPU_WARM_UP if on_gpu else 1):
            for step in steps:
                step()
        pairs = []
        for _ in range(options.pairs):
            pairs.append([step() for step in steps])
            print(f"{mode}: {pairs[-1][0]:.4f} s and {pairs[-1][1]:.4f} s", flush=True)
        seconds = {model: statistics.median(column) for model, column in zip(models, zip(*pairs))}
        ratio = statistics.median(hubs / all_to_all for hubs, all_to_all in pairs)
        runs.append({"mode": mode, "ratio": ratio, "seconds": seconds, "pairs": pairs})
        print(f"{mode}: median ratio {ratio:.3f}")
    environment = {
        "device": torch.cuda.get_device_name(options.gpu) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "batch_size": options.batch_size,
        "dim": options.dim,
        "blocks": MODELS["INFNet v2"][1]["num_blocks"],
        **PAIR,
    }
    path = HERE / "results" / f"pairs_{'cuda' if on_gpu else 'cpu'}.json"
    path.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1) + "\n")
    print(f"written: {path}")


def training_step(model: str, feature_map, mode: str, options):
    """Builds a model and random data; returns a function that trains one step and says how many seconds it took."""
    import torch
    from flowctr.training import GraphedStep

    built = build(model, feature_map, options)
    batch = make_batch(feature_map, options.batch_size, built.device)
    train = built.train_step if mode == "eager" else GraphedStep(built)

    def step() -> float:
        started = time.perf_counter()
        train(batch)
        if options.gpu >= 0:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def build(model: str, feature_map, options):
    """Builds one of ``MODELS``, ready to train."""
    import flowctr  # noqa: F401  before fuxictr
    import torch
    from flowctr import models  # noqa: F401
    from flowctr.training import accelerate

    class_name, arguments = MODELS[model]
    module = __import__(f"flowctr.models.{class_name}", fromlist=[class_name])
    torch.manual_seed(0)
    built = accelerate(getattr(module, class_name))(
        feature_map, embedding_dim=options.dim, gpu=options.gpu, verbose=0, model_root="", metrics=["AUC"], **arguments
    )
    built._max_gradient_norm = 10.0
    built.train()
    return built


def make_feature_map(fields: int, length: int, behaviors: int = 1, labels: int = 1):
    """Describes random data: categorical fields and histories that share the first field's table."""
    import flowctr  # noqa: F401  before fuxictr
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("random", "random")
    spec = {"type": "categorical", "source": "", "vocab_size": VOCABULARY, "padding_idx": 0}
    feature_map.features = OrderedDict((f"field_{i}", dict(spec)) for i in range(fields))
    history = {**spec, "type": "sequence", "max_len": length, "share_embedding": "field_0"}
    feature_map.features.update((f"history_{i}", dict(history)) for i in range(behaviors))
    feature_map.labels = [f"label_{i}" for i in range(labels)]
    return feature_map


def make_batch(feature_map, batch_size: int, device) -> dict:
    """Draws random ids, histories of full length, and labels."""
    import torch

    batch = {}
    for name, spec in feature_map.features.items():
        steps = [spec["max_len"]] if spec["type"] == "sequence" else []
        batch[name] = torch.randint(1, VOCABULARY, (batch_size, *steps))
    batch.update((label, torch.randint(0, 2, (batch_size,)).float()) for label in feature_map.labels)
    return {name: values.to(device) for name, values in batch.items()}


def exponent(points: list[dict]) -> float:
    """Fits time ~ size^x over the larger half of the sizes, where fixed costs no longer matter."""
    import numpy as np

    tail = points[len(points) // 2 - 1 :]
    sizes, seconds = np.log([point["size"] for point in tail]), np.log([point["seconds"] for point in tail])
    return float(np.polyfit(sizes, seconds, 1)[0])


def write(points: list[dict], options) -> None:
    """Prints the exponents and writes the measured points and their plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"one training step, batch {options.batch_size}, width {options.dim}, 3 layers")
    for column in ("model", "axis", "largest", "seconds there", "peak there", "exponent"):
        table.add_column(column)
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    exponents = []
    for column, axis in enumerate(("sequence length", "fields")):
        for model in MODELS:
            line = [p for p in points if p["model"] == model and p["axis"] == axis and "error" not in p]
            slope = exponent(line)
            exponents.append({"model": model, "axis": axis, "exponent": slope})
            last = line[-1]
            memory = f"{last['peak_bytes'] / 2**20:,.0f} MiB"
            table.add_row(model, axis, str(last["size"]), f"{last['seconds']:.3f}", memory, f"{slope:.2f}")
            sizes = [p["size"] for p in line]
            panels[0, column].loglog(sizes, [p["seconds"] for p in line], marker="o", label=f"{model} ({slope:.2f})")
            panels[1, column].loglog(sizes, [p["peak_bytes"] / 2**20 for p in line], marker="o", label=model)
        panels[0, column].set(xlabel=axis, ylabel="seconds per training step")
        panels[1, column].set(xlabel=axis, ylabel="peak memory, MiB")
        panels[0, column].legend(title="model (exponent)")
    Console().print(table)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    figure.savefig(results / "scaling.png", dpi=110)
    environment = {"device": "cpu" if options.gpu < 0 else "cuda", "batch_size": options.batch_size, "dim": options.dim}
    content = {"environment": environment, "exponents": exponents, "points": points}
    (results / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {results / 'scaling.json'} and scaling.png")


if __name__ == "__main__":
    main()
