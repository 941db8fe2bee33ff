"""Public raw files to train, valid and test tables, one module per source.

`DATASETS` holds every split that is known here and `prepare` makes one of them; data_configs/<id>.yaml describes the
tables to the h5 pipeline.
"""

from __future__ import annotations

from pathlib import Path

from flowctr.datasets import bars_x1, din_protocol, kuairand, kuairand_tabs, movielens
from flowctr.datasets.base import Dataset
from flowctr.names import did_you_mean

DATASETS: dict[str, Dataset] = {
    dataset.id: dataset
    for module in (kuairand, kuairand_tabs, movielens, din_protocol, bars_x1)
    for dataset in module.DATASETS
}


def prepare(dataset_id: str, raw: Path, out: Path) -> list[Path]:
    """Makes the tables of one public split.

    Args:
        dataset_id: A key of `DATASETS`.
        raw: The folder with the raw files, named as in `DATASETS[dataset_id].files`.
        out: The folder to write the tables to; they appear together and whole, or not at all.

    Returns:
        The paths of the tables.

    Raises:
        FileNotFoundError: If a raw file is missing; the message says where to download it.
        ValueError: If the data set is unknown or a raw file is not what it should be.
    """
    if dataset_id not in DATASETS:
        raise ValueError(
            f"unknown data set {dataset_id!r}{did_you_mean(dataset_id, DATASETS)}; known: {', '.join(DATASETS)}"
        )
    return DATASETS[dataset_id].function(Path(raw), Path(out))
