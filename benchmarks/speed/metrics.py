"""Seconds per evaluation: flowctr's group metrics beside FuxiCTR's gAUC on the same rows.

python benchmarks/speed/metrics.py [--rows 100000 --groups 80000] [--large-rows 1000000 --large-groups 300000]
"""

import argparse
import os
import time
from collections.abc import Callable

import flowctr.metrics
import fuxictr.metrics
import numpy as np
from rich.console import Console
from rich.table import Table

GROUP_METRICS = ["gAUC", "avgAUC", "MRR", "NDCG@5"]


def click_log(rows: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw (y_true, y_pred, group_id) with one click in five; rows are shuffled and every group has one at least."""
    rng = np.random.default_rng(0)
    y_true = (rng.random(rows) < 0.2).astype(np.float64)
    y_pred = np.clip(0.2 + 0.1 * y_true + 0.1 * rng.standard_normal(rows), 0, 1)
    group_id = rng.permutation(np.concatenate([np.arange(groups), rng.integers(0, groups, rows - groups)]))
    return y_true, y_pred, group_id


def measure(evaluate: Callable, log: tuple[np.ndarray, ...], metrics: list[str], repeats: int) -> tuple[float, float]:
    """Return the median wall seconds of `repeats` evaluations, and the gAUC found."""
    y_true, y_pred, group_id = log
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        gauc = evaluate(y_true, y_pred, metrics, group_id)["gAUC"]
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), gauc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the comparison with FuxiCTR")
    parser.add_argument("--groups", type=int, default=80_000, help="groups that these rows are drawn from")
    parser.add_argument("--large-rows", type=int, default=1_000_000, help="rows of the run without FuxiCTR")
    parser.add_argument("--large-groups", type=int, default=300_000, help="groups that these rows are drawn from")
    parser.add_argument("--repeats", type=int, default=5, help="flowctr's seconds are the median of these; FuxiCTR: 1")
    args = parser.parse_args()

    small, large = click_log(args.rows, args.groups), click_log(args.large_rows, args.large_groups)
    fuxictr_evaluate, our_evaluate = fuxictr.metrics.evaluate_metrics, flowctr.metrics.evaluate_metrics
    runs = [
        ("FuxiCTR", small, ["gAUC"], *measure(fuxictr_evaluate, small, ["gAUC"], repeats=1)),
        ("flowctr", small, ["gAUC"], *measure(our_evaluate, small, ["gAUC"], args.repeats)),
        ("flowctr", small, GROUP_METRICS, *measure(our_evaluate, small, GROUP_METRICS, args.repeats)),
        ("flowctr", large, GROUP_METRICS, *measure(our_evaluate, large, GROUP_METRICS, args.repeats)),
    ]
    table = Table("", "rows", "groups", "metrics", "seconds", "gAUC")
    for name, (y_true, _, group_id), metrics, seconds, gauc in runs:
        shape = f"{len(y_true):,}", f"{len(np.unique(group_id)):,}"
        table.add_row(name, *shape, " ".join(metrics), f"{seconds:.4f}", f"{gauc:.9f}")
    console = Console()
    console.print(table)
    console.print(
        f"gAUC on {args.rows:,} rows: flowctr (one core) is {runs[0][3] / runs[1][3]:,.0f}x as fast as FuxiCTR "
        f"(a process pool; {os.cpu_count()} cores here)"
    )


if __name__ == "__main__":
    main()
