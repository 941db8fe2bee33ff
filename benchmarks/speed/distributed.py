"""Training rows per second of one process and of several that train InterFormer together, in one run.

    python benchmarks/speed/distributed.py --gpu 0      # two GPUs, 2048 rows each of AmazonElectronics_x1's shape
    python benchmarks/speed/distributed.py              # a small size, two processes on the CPU

torchrun launches the processes, in turns: one, all of them, one, ... Each has the same rows per step, and the median of
the turns counts. Writes results/distributed.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import flowctr  # noqa: F401  before fuxictr
from flowctr import distributed
from flowctr.data import H5DataLoader
from flowctr.training import accelerate
from fuxictr.features import FeatureMap
from fuxictr.pytorch.torch_utils import seed_everything
from rich.console import Console
from rich.table import Table
from training import ACCELERATIONS, LOADING, SIZES, Stopwatch, environment, model_and_arguments, write_data

MODEL = "InterFormer"
NAMES = [name for name, options in ACCELERATIONS.items() if "cuda_graphs" not in options]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=-1, help="the first GPU; the other processes take those that follow")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=["plain"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distributed.json")
    # For a process that torchrun has launched: how to train, and on what.
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    vars(args).update(SIZES[args.gpu >= 0])
    if args.train:
        train(args, ACCELERATIONS[args.train])
        return
    results = {"environment": environment(args, SIZES[args.gpu >= 0]), "processes": args.processes, "runs": {}}
    table = Table("", "rows/s of 1", f"rows/s of {args.processes}", "ratio", title=MODEL, title_justify="left")
    with tempfile.TemporaryDirectory() as folder:
        rows = argparse.Namespace(**{**vars(args), "batch_size": args.processes * args.batch_size})
        write_data(Path(folder), rows).save(f"{folder}/columns.json")
        for name in args.only:
            turns = [[launch(args, name, n, Path(folder)) for n in (1, args.processes)] for _ in range(args.turns)]
            one, several = (statistics.median(rates) for rates in zip(*turns))
            results["runs"][name] = {"one": one, "several": several, "ratio": several / one, "turns": turns}
            table.add_row(name, f"{one:,.0f}", f"{several:,.0f}", f"{several / one:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table)
    print(f"written: {args.out}")


def launch(args, name: str, processes: int, folder: Path) -> float:
    """Lets torchrun train with some processes and returns their rows per second."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    threads = max(1, len(os.sched_getaffinity(0)) // args.processes)  # the same for one process as for several
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    out = folder / "rate.json"
    command = [*launcher, __file__, "--gpu", str(args.gpu), "--train", name, "--data", str(folder), "--out", str(out)]
    subprocess.run(command, env=env, check=True)
    rate = json.loads(out.read_text())
    print(f"{name}: {processes} processes, {rate:,.0f} rows/s", flush=True)
    return rate


def train(args, acceleration: dict) -> None:
    """Trains one epoch together with the other processes; the writer writes the rows per second of all."""
    with distributed.process_group(args.gpu) as gpu:
        sharing = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        feature_map = FeatureMap("random", str(args.data))
        feature_map.load(str(args.data / "columns.json"), {})
        options = dict(acceleration)
        loading = {"shuffle": True, **{key: options.pop(key) for key in LOADING if key in options}, **sharing}
        data = H5DataLoader(feature_map, args.data / "train", batch_size=args.batch_size, gpu=gpu, **loading)
        model_class, arguments = model_and_arguments(MODEL, feature_map, args)
        seed_everything(0)
        model = accelerate(model_class)(
            feature_map,
            model_id=MODEL,
            gpu=gpu,
            embedding_regularizer=0.005,
            verbose=0,
            model_root=str(args.data),
            metrics=["AUC"],
            **arguments,
            **options,
        )
        watch = Stopwatch(data, args.warm_up, gpu)
        model.fit(watch, epochs=1)
        if distributed.is_writer():
            rate = watch.steps_per_second() * args.batch_size * distributed.world_size()
            args.out.write_text(json.dumps(rate))


if __name__ == "__main__":
    main()
