"""Time of a search of 24 trials, compared with that of running them one after another.

    python benchmarks/speed/tuning.py --gpu 0 --seconds 60       # each takes a fifth of the GPU's memory for a minute
    python benchmarks/speed/tuning.py --seconds 6 --workers 4    # on the CPU, four at a time

The trials do not train: they hold memory and wait, so that the search itself is measured. On a GPU it has to find out
how many of them have room. Writes results/tuning.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import yaml
from flowctr.tuning import search

SHARE = 0.2  # of the GPU's memory that a trial takes
# In place of run_expid.py: the memory first, an evaluation at once, a result at the end.
TRIAL = """
import argparse, json, os, time
from datetime import datetime
from pathlib import Path

parser = argparse.ArgumentParser()
for option in ("config", "expid", "gpu"):
    parser.add_argument(f"--{option}")
args = parser.parse_args()
plan, started = json.loads(Path("plan.json").read_text()), datetime.now().astimezone()
if int(args.gpu) >= 0:
    import torch

    taken = torch.zeros(plan["bytes"], dtype=torch.uint8, device=f"cuda:{args.gpu}")
evaluation = {"AUC": 0.5}
Path(os.environ["FLOWCTR_EVALUATIONS"]).write_text(json.dumps([evaluation]))
time.sleep(plan["seconds"])
result = {
    "format": 1, "expid": args.expid, "model": "DOT", "dataset_id": "none", "seed": 1, "labels": ["click"],
    "started": started.isoformat(timespec="seconds"), "command": "python run_expid.py",
    "metrics": {"valid": evaluation}, "curves": {"train": [], "valid": [evaluation]},
}
Path("results").mkdir(exist_ok=True)
Path("results", f"{args.expid}-s1-{started:%Y%m%d-%H%M%S-%f}.json").write_text(json.dumps(result))
"""
EXPERIMENT = {
    **{"model": "DOT", "dataset_id": "none", "metrics": ["AUC"], "optimizer": "adam", "loss": "binary_crossentropy"},
    **{"batch_size": 1, "epochs": 1, "seed": 1},
}
DATASET = {
    **{"data_root": "data", "data_format": "csv", "train_data": "none.csv", "valid_data": "none.csv"},
    "feature_cols": [{"name": "item", "active": True, "dtype": "str", "type": "categorical"}],
    "label_col": {"name": "click", "dtype": "float"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tuning.json")
    args = parser.parse_args()
    search.build_h5 = lambda params: None  # the trials need no data
    with tempfile.TemporaryDirectory() as folder:
        path = write_search(Path(folder), args)
        started = time.perf_counter()
        search.tune(path, [args.gpu], workers=args.workers)
        wall = time.perf_counter() - started
        ledger = path.with_suffix("") / "ledger.jsonl"
        trials = [json.loads(line)["seconds"] for line in ledger.read_text().splitlines()]
    ratio = wall / sum(trials)
    print(f"{len(trials)} trials in {wall:.0f} s, one after another {sum(trials):.0f} s: ratio {ratio:.3f}")
    device = torch.cuda.get_device_name(args.gpu) if args.gpu >= 0 else "cpu"
    result = {
        "device": device,
        "workers": args.workers,
        "search_seconds": wall,
        "trial_seconds": trials,
        "ratio": ratio,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def write_search(folder: Path, args: argparse.Namespace) -> Path:
    """Writes a model's folder whose trials wait; returns the tuner YAML."""
    (folder / "config").mkdir()
    (folder / "run_expid.py").write_text(TRIAL)
    memory = int(SHARE * torch.cuda.get_device_properties(args.gpu).total_memory) if args.gpu >= 0 else 0
    (folder / "plan.json").write_text(json.dumps({"seconds": args.seconds, "bytes": memory}))
    space = {"base_expid": "DOT_wait", "tuner_space": {"embedding_dim": list(range(1, args.trials + 1))}}
    contents = {"model_config": {"DOT_wait": EXPERIMENT}, "dataset_config": {"none": DATASET}, "tuner": space}
    for name, content in contents.items():
        (folder / "config" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / "config" / "tuner.yaml"


if __name__ == "__main__":
    main()
