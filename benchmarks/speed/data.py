"""Speed and memory of the h5 pipeline beside FuxiCTR's own, on the same rows and in one run.

    python benchmarks/speed/data.py                      # everything; two minutes, 7 GB of disk
    python benchmarks/speed/data.py loader --rows 1000000
    python benchmarks/speed/data.py streaming --streaming-gb 10

The rows are synthetic, of AmazonElectronics_x1's shape: 63,001 items, 801 categories, two histories of length 100.
Every measurement runs in a fresh process. The result goes to ``benchmarks/speed/results/data.json`` as well.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

ITEMS, CATEGORIES, MAX_LEN, MEAN_LENGTH = 63_001, 801, 100, 15
BATCH_SIZE = 2048
DATASET = {
    "dataset_id": "synthetic",
    "data_format": "csv",
    "feature_cols": [
        {"name": "user_id", "active": True, "dtype": "str", "type": "meta"},
        {"name": "item_id", "active": True, "dtype": "str", "type": "categorical"},
        {"name": "cate_id", "active": True, "dtype": "str", "type": "categorical"},
        {
            "name": "item_history",
            "active": True,
            "dtype": "str",
            "type": "sequence",
            "max_len": MAX_LEN,
            "share_embedding": "item_id",
        },
        {
            "name": "cate_history",
            "active": True,
            "dtype": "str",
            "type": "sequence",
            "max_len": MAX_LEN,
            "share_embedding": "cate_id",
        },
    ],
    "label_col": {"name": "label", "dtype": "float"},
    "min_categr_count": 1,
}


# The data


def make_columns(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Encoded rows: histories of geometric length, padded behind with 0."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / MEAN_LENGTH, rows), MAX_LEN)
    real = np.arange(MAX_LEN) < lengths[:, None]
    return {
        "user_id": np.sort(rng.integers(1, rows // 3 + 2, rows)).astype(np.int32),
        "item_id": rng.integers(1, ITEMS, rows).astype(np.uint16),
        "cate_id": rng.integers(1, CATEGORIES, rows).astype(np.uint16),
        "item_history": rng.integers(1, ITEMS, (rows, MAX_LEN)).astype(np.uint16) * real,
        "cate_history": rng.integers(1, CATEGORIES, (rows, MAX_LEN)).astype(np.uint16) * real,
        "label": rng.integers(0, 2, rows).astype(np.float32),
    }


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    with open(path, "w") as file:
        file.write("label,user_id,item_id,cate_id,item_history,cate_history\n")
        for i in range(len(columns["label"])):
            items, cates = columns["item_history"][i], columns["cate_history"][i]
            length = np.count_nonzero(items)
            file.write(
                f"{int(columns['label'][i])},{columns['user_id'][i]},{columns['item_id'][i]},{columns['cate_id'][i]},"
                f"{'^'.join(map(str, items[:length]))},{'^'.join(map(str, cates[:length]))}\n"
            )


def make_feature_map(folder: Path):
    import flowctr  # noqa: F401  before fuxictr, so that it needs no ray
    from fuxictr.features import FeatureMap

    feature_map = FeatureMap("synthetic", str(folder))
    sizes = {"item": ITEMS, "cate": CATEGORIES}
    feature_map.features["user_id"] = {"type": "meta"}
    for name, size in sizes.items():
        feature_map.features[f"{name}_id"] = {"type": "categorical", "vocab_size": size}
    for name, size in sizes.items():
        feature_map.features[f"{name}_history"] = {"type": "sequence", "vocab_size": size, "max_len": MAX_LEN}
    feature_map.labels = ["label"]
    feature_map.set_column_index()
    return feature_map


def write_h5(folder: Path, name: str, columns: dict[str, np.ndarray], repeats: int = 1) -> Path:
    from flowctr.data.format import H5Writer

    features = make_feature_map(folder).features
    with H5Writer(folder, name, features, {}, ["label"], digest="") as writer:
        for _ in range(repeats):
            writer.append(columns)
    return folder / f"{name}.h5"


# What the fresh processes do; each returns its measurements


def memory(key: str) -> float:
    """MB of resident memory of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure_loader(make_loader, epochs: int) -> dict:
    base = memory("VmRSS")
    start = time.perf_counter()
    loader = make_loader()
    load_seconds = time.perf_counter() - start
    rates = []
    for _ in range(epochs + 1):  # the first one warms up where there are more
        start = time.perf_counter()
        rows = sum(len(batch["label"]) for batch in loader)
        rates.append(rows / (time.perf_counter() - start))
    return {
        "rows_per_second": statistics.median(rates[1:] or rates),
        "load_seconds": load_seconds,
        "data_mb": memory("VmRSS") - base,
        "total_mb": memory("VmRSS"),
        "peak_mb": memory("VmHWM"),
        "import_mb": base,
    }


def loader_flowctr(folder: Path, num_workers: int) -> dict:
    from flowctr.data import H5DataLoader

    options = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": num_workers}
    return measure_loader(lambda: H5DataLoader(make_feature_map(folder), folder / "rows.h5", **options), epochs=3)


def loader_fuxictr(folder: Path, num_workers: int) -> dict:
    from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

    options = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": num_workers}
    return measure_loader(
        lambda: NpzDataLoader(make_feature_map(folder), str(folder / "rows.npz"), **options), epochs=1
    )


def streaming_flowctr(folder: Path, shuffle: bool) -> dict:
    from flowctr.data import H5DataLoader

    options = {"batch_size": BATCH_SIZE, "shuffle": shuffle, "streaming": True}
    return measure_loader(lambda: H5DataLoader(make_feature_map(folder), folder / "large.h5", **options), epochs=0)


def build_flowctr(folder: Path, csv: str) -> dict:
    from flowctr.data import build_h5

    start = time.perf_counter()
    build_h5({**DATASET, "data_root": str(folder / "flowctr"), "train_data": csv}, rebuild=True)
    return {"call_seconds": time.perf_counter() - start, "peak_mb": memory("VmHWM")}


def build_fuxictr(folder: Path, csv: str) -> dict:
    from fuxictr.preprocess import FeatureProcessor, build_dataset

    with tempfile.TemporaryDirectory(dir=folder) as data_root:
        params = {**DATASET, "data_root": data_root, "train_data": csv}
        start = time.perf_counter()
        build_dataset(FeatureProcessor(**params), **params)
        return {"call_seconds": time.perf_counter() - start, "peak_mb": memory("VmHWM")}


def in_fresh_process(function, folder: Path, argument) -> dict:
    """Runs one of the functions above in a new Python and adds the seconds it took, imports included."""
    command = [sys.executable, __file__, "--child", function.__name__, str(folder), json.dumps(argument)]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{function.__name__}({argument!r}) failed:\n{process.stderr[-3000:]}")
    return {**json.loads(process.stdout.splitlines()[-1]), "seconds": seconds}


# The sections


def bench_loader(folder: Path, args) -> dict:
    columns = make_columns(args.rows)
    write_h5(folder, "rows", columns)
    # As FuxiCTR stored them: 64 bits everywhere.
    np.savez(folder / "rows.npz", **{n: a.astype(float if n == "label" else np.int64) for n, a in columns.items()})
    del columns
    runs = {
        "flowctr h5, 0 workers": in_fresh_process(loader_flowctr, folder, 0),
        "flowctr h5, 1 worker": in_fresh_process(loader_flowctr, folder, 1),
        "FuxiCTR npz, 3 workers": in_fresh_process(loader_fuxictr, folder, 3),
    }
    ours, theirs = runs["flowctr h5, 0 workers"], runs["FuxiCTR npz, 3 workers"]
    return {
        "rows": args.rows,
        "batch_size": BATCH_SIZE,
        "runs": runs,
        "speedup": ours["rows_per_second"] / theirs["rows_per_second"],
        "data_memory_ratio": ours["data_mb"] / theirs["data_mb"],
        "total_memory_ratio": ours["total_mb"] / theirs["total_mb"],
    }


def bench_build(folder: Path, args) -> dict:
    results = {}
    for rows in args.build_rows:
        csv = folder / f"{rows}.csv"
        write_csv(csv, make_columns(rows))
        runs = {
            "flowctr build_h5": in_fresh_process(build_flowctr, folder, str(csv)),
            "FuxiCTR build_dataset": in_fresh_process(build_fuxictr, folder, str(csv)),
        }
        results[str(rows)] = {
            "csv_bytes": csv.stat().st_size,
            "runs": runs,
            "speedup": runs["FuxiCTR build_dataset"]["seconds"] / runs["flowctr build_h5"]["seconds"],
        }
    return results


def bench_streaming(folder: Path, args) -> dict:
    columns = make_columns(500_000)
    row_bytes = sum(array[:1].nbytes for array in columns.values())
    repeats = -(-int(args.streaming_gb * 1e9) // (500_000 * row_bytes))
    path = write_h5(folder, "large", columns, repeats)
    del columns
    try:
        runs = {
            "shuffled": in_fresh_process(streaming_flowctr, folder, True),
            "file order": in_fresh_process(streaming_flowctr, folder, False),
        }
        return {"rows": 500_000 * repeats, "file_bytes": path.stat().st_size, "runs": runs}
    finally:
        path.unlink()


def environment() -> dict:
    from flowctr._fuxictr import fuxictr_origin

    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    packages = ("flowctr", "numpy", "torch", "polars", "h5py", "ray")
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "fuxictr": fuxictr_origin(),
    }


def print_tables(results: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title, columns, rows):
        table = Table("", *columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    console = Console()
    if loader := results.get("loader"):
        memory_columns = {"data MB": "data_mb", "process MB": "total_mb", "peak MB": "peak_mb"}
        table(
            f"Loader, {loader['rows']:,} rows in shuffled batches of {loader['batch_size']}: "
            f"{loader['speedup']:.1f}x the rows/s, {loader['data_memory_ratio']:.2f}x the memory "
            f"({loader['total_memory_ratio']:.2f}x with the process itself)",
            ["rows/s", *memory_columns, "load s"],
            [
                [
                    name,
                    f"{run['rows_per_second']:,.0f}",
                    *(f"{run[key]:,.0f}" for key in memory_columns.values()),
                    f"{run['load_seconds']:.2f}",
                ]
                for name, run in loader["runs"].items()
            ],
        )
    for rows, build in results.get("build", {}).items():
        table(
            f"Build, {int(rows):,} csv rows, {build['csv_bytes'] / 1e6:,.1f} MB: {build['speedup']:.1f}x by process",
            ["process s", "call s", "peak MB"],
            [
                [name, f"{run['seconds']:.2f}", f"{run['call_seconds']:.2f}", f"{run['peak_mb']:,.0f}"]
                for name, run in build["runs"].items()
            ],
        )
    if streaming := results.get("streaming"):
        table(
            f"Streaming, {streaming['rows']:,} rows in a file of {streaming['file_bytes'] / 1e9:.2f} GB",
            ["rows/s", "peak MB", "of that imports"],
            [
                [name, f"{run['rows_per_second']:,.0f}", f"{run['peak_mb']:,.0f}", f"{run['import_mb']:,.0f}"]
                for name, run in streaming["runs"].items()
            ],
        )


SECTIONS = {"loader": bench_loader, "build": bench_build, "streaming": bench_streaming}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"which of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--rows", type=int, default=400_000, help="rows of the loader benchmark")
    parser.add_argument("--build-rows", type=int, nargs="+", default=[100, 200_000], help="rows of the builds")
    parser.add_argument("--streaming-gb", type=float, default=6.5, help="size of the file to stream")
    parser.add_argument(
        "--folder", type=Path, help="where the data is written and removed again; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    results = {"environment": environment()}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for section in args.sections or SECTIONS:
            print(f"{section} ...", flush=True)
            results[section] = SECTIONS[section](Path(folder), args)
    print_tables(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        function, folder, argument = sys.argv[2:]
        print(json.dumps(globals()[function](Path(folder), json.loads(argument))))
    else:
        main()
