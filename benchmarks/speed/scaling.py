"""Time and memory of a training step against sequence length and fields: python benchmarks/speed/scaling.py.

Compares INFNet (hubs), InterFormer and INFNet's all-to-all ablation, a transformer over all tokens, at one width and
depth. Prints a table with the fitted exponents and writes scaling.json and scaling.png to results/.
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
MODELS = {
    "INFNet v2": ("INFNet", {"version": "v2", "num_blocks": 3, "num_field_hubs": 16}),
    "InterFormer": ("InterFormer", {"num_layers": 3, "num_heads": 1}),
    "all-to-all": ("INFNet", {"aggregation": "all_to_all", "num_blocks": 3}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--max-tokens", type=int, default=3200, help="leave out longer sequences and more fields")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a single point, run in a process of its own
    options = parser.parse_args()
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

    import flowctr  # noqa: F401  before fuxictr
    import torch
    from flowctr import models  # noqa: F401
    from flowctr.training import accelerate

    class_name, arguments = MODELS[model]
    fields, length = (20, size) if axis == "sequence length" else (size, 50)
    if options.gpu < 0:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    feature_map = make_feature_map(fields, length)
    module = __import__(f"flowctr.models.{class_name}", fromlist=[class_name])
    torch.manual_seed(0)
    built = accelerate(getattr(module, class_name))(
        feature_map, embedding_dim=options.dim, gpu=options.gpu, verbose=0, model_root="", metrics=["AUC"], **arguments
    )
    built._max_gradient_norm = 10.0
    built.train()
    ids = {name: torch.randint(1, VOCABULARY, (options.batch_size,)) for name in feature_map.features}
    for name, spec in feature_map.features.items():
        if spec["type"] == "sequence":
            ids[name] = torch.randint(1, VOCABULARY, (options.batch_size, length))
    batch = {**ids, "label": torch.randint(0, 2, (options.batch_size,)).float()}
    batch = {name: values.to(built.device) for name, values in batch.items()}
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


def make_feature_map(fields: int, length: int):
    """Describes random data: categorical fields and one history that shares the first field's table."""
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("random", "random")
    spec = {"type": "categorical", "source": "", "vocab_size": VOCABULARY, "padding_idx": 0}
    feature_map.features = OrderedDict((f"field_{i}", dict(spec)) for i in range(fields))
    history = {**spec, "type": "sequence", "max_len": length, "share_embedding": "field_0"}
    feature_map.features["history"] = history
    feature_map.labels = ["label"]
    return feature_map


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
