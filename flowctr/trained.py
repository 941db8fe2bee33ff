"""A trained experiment, found again: its parameters, its data set and the model with its weights."""

import copy
import glob
import inspect
import json
import logging
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from flowctr import config, zoo
from flowctr.data import H5DataLoader, build_h5, data_digest, load_feature_map
from flowctr.data.files import read_json
from flowctr.experiment import load_params
from flowctr.resume import is_interrupted
from flowctr.training import accelerate
from fuxictr.features import FeatureMap
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor

NO_EFFECT = {"gpu", "model_id", "stage"}  # constructor arguments that predictions do not depend on


@dataclass
class TrainedModel:
    """A trained experiment.

    Attributes:
        expid: Experiment id.
        params: Its parameters.
        feature_map: FuxiCTR's FeatureMap of its data set.
        files: The h5 files of its data set by split, None for a split that there is not.
        digest: Digest of its data set; None for h5 files that flowctr did not build.
        model: The model with its weights, in evaluation mode.
    """

    expid: str
    params: dict[str, Any]
    feature_map: FeatureMap
    files: dict[str, str | None]
    digest: str | None
    model: BaseModel

    def loader(self, path: str | Path, batch_size: int, others: Iterable[str] = ()) -> H5DataLoader:
        """Opens encoded rows in their order: the columns that the model reads, all but labels and meta columns.

        Args:
            path: An h5 file of the data set; it may be larger than memory.
            batch_size: Rows per batch.
            others: Meta columns to read too.
        """
        feature_map = copy.copy(self.feature_map)
        feature_map.labels = []
        features = feature_map.features.items()
        feature_map.features = {name: spec for name, spec in features if spec["type"] != "meta" or name in others}
        return H5DataLoader(feature_map, path, split="test", batch_size=batch_size, streaming=True, pin_memory=False)

    @property
    def labels(self) -> list[str]:
        """Labels that the model predicts: a single-task model, the first of the data set."""
        labels = self.feature_map.labels
        return labels if isinstance(self.model, MultiTaskModel) else labels[:1]

    def score(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predicts from encoded columns.

        Args:
            columns: Ids ``(B,)`` or ``(B, T)`` and numbers ``(B,)``, as `loader` gives them.

        Returns:
            ``{"<label>_pred": (B, 1)}`` for each label, and ``"y_pred"`` if it is one.
        """
        # In the order of training: FuxiCTR's models concatenate what a batch holds.
        predictions = self.model({name: columns[name] for name in self.feature_map.features if name in columns})
        if not isinstance(self.model, MultiTaskModel):
            predictions = {f"{self.labels[0]}_pred": predictions["y_pred"]}
        scores = {f"{label}_pred": predictions[f"{label}_pred"] for label in self.labels}
        return scores if len(scores) > 1 else {**scores, "y_pred": scores[f"{self.labels[0]}_pred"].clone()}


def load_trained(
    config_dir: str | Path,
    expid: str,
    src: ModuleType | None = None,
    model_dir: str | Path | None = None,
    gpu: int = -1,
    overrides: Iterable[str] = (),
) -> TrainedModel:
    """Loads the model that a run of an experiment has trained; the last stage's, if it has stages.

    Args:
        config_dir: Config folder, see `flowctr.config.load`.
        expid: Experiment id.
        src: Module with the model class; ``flowctr.models.<model>`` by default.
        model_dir: Folder of what the run wrote; the folder that contains ``config_dir`` by default.
        gpu: GPU index, -1 for the CPU.
        overrides: ``key=value`` each, those of the run.

    Raises:
        FileNotFoundError: If the experiment is not trained.
        ValueError: If the configuration is wrong, there is no such GPU, or the weights belong to an unfinished run,
            other settings or another build of the data set.
    """
    overrides = list(overrides)
    config_dir = Path(config_dir).resolve()
    folder = Path(model_dir or config_dir.parent).resolve()
    params = load_params(config_dir, expid, src, folder, gpu, overrides)
    if gpu >= torch.cuda.device_count():
        raise ValueError(
            f"--gpu {gpu} does not exist; this machine has {torch.cuda.device_count()} GPUs; -1 is the CPU"
        )
    weights = Path(params["model_root"]) / params["dataset_id"] / f"{params['model_id']}.model"
    if not weights.is_file():
        model = [params["model"]] if model_dir and not params.get("zoo") else []  # whose folder a run would write to
        command = ["flowctr", "run", *model, "--expid", expid, "--config", str(config_dir)]
        command += [word for override in overrides for word in ("--set", override)]
        raise FileNotFoundError(f"{expid} is not trained: there is no {weights}; train it with: {shlex.join(command)}")
    if is_interrupted(params):
        raise ValueError(
            f"{weights} is of a run that goes on or was interrupted, so a better epoch may follow; finish it with "
            f"--resume, or delete {weights.with_suffix('.resume')} to take the weights as they are"
        )

    files = build_h5(params)
    feature_map = load_feature_map(params)
    params.setdefault("num_tasks", len(feature_map.labels))
    digest = data_digest(feature_map.data_dir, files)
    model_class = config.find_model(params, src)
    if params.get("zoo"):
        model_class = zoo.adapt(model_class, feature_map, params, files["train"])
    if hasattr(model_class, "stages"):
        params["stage"] = list(model_class.stages(params))[-1]
    _compare_with_run(params, expid, folder, digest, inspect.signature(model_class.__init__).parameters)
    params["activation_checkpointing"] = False  # a way to train, in the way of an export
    model = accelerate(model_class)(feature_map, **params)
    model.load_weights(weights)
    model.eval()
    return TrainedModel(expid, params, feature_map, files, digest, model)


def _compare_with_run(
    params: Mapping[str, Any], expid: str, model_dir: Path, digest: str | None, arguments: Iterable[str]
) -> None:
    """Compares with the result of the run, if it is there: other ids or settings may leave every shape as it is."""
    wanted, run = (expid, params["dataset_id"], params["seed"], params["model_root"]), None
    for path in sorted((model_dir / "results").glob(f"{glob.escape(params['model_id'])}-*.json")):  # by time
        result = read_json(path, ("expid", "dataset_id", "seed", "config", "data"), "delete it")
        folder = str(config.REPOSITORY / result["config"]["model_root"])
        if (result["expid"], result["dataset_id"], result["seed"], folder) == wanted:
            run = result
    if run is None:
        return
    if run["data"]["manifest"] != digest:
        raise ValueError(
            f"data set {params['dataset_id']} was built anew since {expid} was trained, so its ids may mean other "
            "values; train again, or put back the data set"
        )
    here = json.loads(json.dumps(params, default=str))
    differences = [
        f"{key}={run['config'].get(key)!r}, here it is {here.get(key)!r}"
        for key in arguments
        if key not in NO_EFFECT and run["config"].get(key) != here.get(key)
    ]
    if params.get("zoo") and run["zoo"]["sha256"] != zoo.origin(params["zoo"])["sha256"]:
        differences.append(f"other code of {params['zoo']}")
    if differences:
        logging.warning("%s was trained with %s", expid, "; ".join(differences))
