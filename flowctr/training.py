"""The training engine: FuxiCTR's fit, evaluate and predict, without a device sync per step and with a memory.

``accelerate(Model)`` subclasses a FuxiCTR model, ours or FuxiCTR's alike. What it computes stays FuxiCTR's: with one
seed and the same batches, losses and weights are bit-equal on the CPU. What it adds: the loss is read once per logging
interval, predictions leave the device once per evaluation, `flowctr.metrics` scores them, learning curves are kept, a
checkpoint is whole or absent, and a run that has gone wrong says so and stops.
"""

import logging
import math
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from flowctr.metrics import evaluate_metrics
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor
from tqdm import tqdm

CURVE_POINTS_PER_EVALUATION = 10
TWO_CLASS_METRICS = ("AUC", "gAUC", "avgAUC")
OTHER_MONITOR = "monitor a metric that these validation data define, such as logloss, or take other data"
# How torch's binary_cross_entropy reports a prediction that is nan: on the CPU, and on a GPU.
NAN_PREDICTION = ("all elements of input should be between 0 and 1", "device-side assert triggered")

Batches = Iterable[Mapping[str, Tensor]]
Model = TypeVar("Model", bound=BaseModel)


class TrainingError(RuntimeError):
    """A run that cannot go on: a loss, a prediction or the monitored metric is not a number."""


def accelerate(model_class: type[Model]) -> type[Model]:
    """Derives the class that trains with this engine.

    Args:
        model_class: A subclass of FuxiCTR's ``BaseModel`` or ``MultiTaskModel``.

    Returns:
        A subclass of it with the same name and arguments and the methods of `Engine`.
    """
    namespace = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    if model_class.regularization_loss is MultiTaskModel.regularization_loss:
        # The one of MultiTaskModel sees only parameters called weight or bias: bare nn.Parameters go unregularised.
        namespace["regularization_loss"] = BaseModel.regularization_loss
    return type(model_class.__name__, (Engine, model_class), namespace)


class GraphedStep:
    """Replays a captured training step: forward, backward, clipping and update go to the GPU in one launch.

    The first steps run as they are, which lets libraries choose their kernels; then one step is captured. Batches of
    another shape than the first, such as the last of an epoch, run as they are. A changed learning rate is captured
    anew.

    Args:
        model: A model on a GPU whose ``train_step`` does not read values back from the device.

    Raises:
        ValueError: If the optimiser counts its steps on the host: the captured step would repeat one count for ever.
    """

    WARM_UP_STEPS = 3

    def __init__(self, model: BaseModel):
        self.model = model
        self.steps = 0
        self.shapes: dict[str, torch.Size] = {}
        self.rates: list[float] = []
        optimizer = model.optimizer
        if "capturable" not in optimizer.defaults and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(f"cuda_graphs cannot capture {type(optimizer).__name__}; use adam or SGD, or turn it off")
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True  # keeps the step counter on the device

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Trains on a batch that lies on the device and returns its loss."""
        self.steps += 1
        shapes = {name: values.shape for name, values in batch.items()}
        self.shapes = self.shapes or shapes
        if self.steps <= self.WARM_UP_STEPS or shapes != self.shapes:
            return self.model.train_step(batch)
        rates = [group["lr"] for group in self.model.optimizer.param_groups]
        if rates != self.rates:
            self._capture(batch)
            self.rates = rates
        for name, values in self.inputs.items():
            values.copy_(batch[name])
        self.graph.replay()
        return self.loss

    def _capture(self, batch: Mapping[str, Tensor]) -> None:
        self.inputs = {name: values.clone() for name, values in batch.items()}
        self.model.optimizer.zero_grad(set_to_none=True)  # gradients belong to the graph's own memory
        self.graph = torch.cuda.CUDAGraph()
        with (  # thread_local: the loader's thread may go on pinning memory meanwhile
            torch.cuda.device(self.model.device),  # on which the capture's stream is made
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):
            self.loss = self.model.train_step(self.inputs).detach()


class Engine:
    """What `accelerate` puts before a model class: FuxiCTR's training methods, overridden.

    Args:
        *args: The model's arguments.
        cuda_graphs: Whether to replay a captured training step on a GPU (see `GraphedStep`); without effect on the CPU.
        **kwargs: The model's arguments.

    Attributes:
        history: Learning curves of the last `fit`. ``train`` has ``{step, epoch, loss}`` per logging interval, the mean
            over its steps with regularisation; ``valid`` has ``{step, epoch, <metric>: value}`` per evaluation. Steps
            and epochs count from 1.
        restored: The entry of ``history["valid"]`` that belongs to the weights `fit` left in the model; None without
            validation data.
        base_rates: Label -> mean in the training data, by which NE is normalised; None before `fit`.
    """

    def __init__(self, *args, cuda_graphs: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.cuda_graphs = cuda_graphs
        self.history: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
        self.restored: dict[str, float] | None = None
        self.base_rates: Mapping[str, float] | None = None
        self._rows, self._seconds = Counter(), Counter()

    def fit(
        self,
        data_generator: Batches,
        epochs: int = 1,
        validation_data: Batches | None = None,
        max_gradient_norm: float = 10.0,
        **kwargs,
    ) -> None:
        """Trains, evaluates every ``eval_steps`` steps, stops early and restores the best weights.

        Without validation data the last weights are kept.

        Args:
            data_generator: Training batches, with a length; NE is normalised by its ``base_rates`` if it has them.
            epochs: Epochs to train at most.
            validation_data: Validation batches.
            max_gradient_norm: Gradients are clipped to this norm.
            **kwargs: Other parameters of a configuration, which have no effect here.

        Raises:
            ValueError: If the monitored metric needs both classes of a label, of which the validation data have one.
            TrainingError: If a loss, a prediction or the monitored metric is not a number.
        """
        steps_per_epoch = len(data_generator)
        self.history = {"train": [], "valid": []}
        self.restored = None
        self.base_rates = getattr(data_generator, "base_rates", None)
        self.valid_gen = validation_data
        self._check_validation_classes()
        self._evaluate_every = self._eval_steps or steps_per_epoch
        self._record_every = max(1, min(self._evaluate_every, steps_per_epoch) // CURVE_POINTS_PER_EVALUATION)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._loss_steps = 0
        self._graphed_step = GraphedStep(self) if self.cuda_graphs and self.device.type == "cuda" else None
        # These have the names and meaning of BaseModel, whose train_step and checkpoint_and_earlystop use them.
        self._max_gradient_norm = max_gradient_norm
        self._best_metric = math.inf if self._monitor_mode == "min" else -math.inf
        self._stopping_steps = 0
        self._stop_training = False
        self._total_steps = 0
        self._epoch_index = 0

        logging.info("Start training: %d batches/epoch", steps_per_epoch)
        for self._epoch_index in range(epochs):
            logging.info("************ Epoch=%d start ************", self._epoch_index + 1)
            try:
                self.train_epoch(data_generator)
            except RuntimeError as error:
                if any(sign in str(error) for sign in NAN_PREDICTION):
                    raise self._diverged("predictions are nan", self._total_steps + 1) from error
                raise
            if self._stop_training:
                break
        logging.info("Training finished.")
        if self.valid_gen is None:
            self.save_weights(self.checkpoint)
            return
        if self.restored is None:  # eval_steps is more than the steps there were
            self.eval_step()
        logging.info("Load the best weights, epoch %(epoch)d, step %(step)d", self.restored)
        self.load_weights(self.checkpoint)

    def _check_validation_classes(self) -> None:
        rates = getattr(self.valid_gen, "base_rates", {})
        one_class = [label for label in self._outputs() if rates.get(label) in (0, 1)]
        for name in self._monitor.get_metrics():  # a name without a label is the mean over all of them
            undefined = [label for label in one_class if name.removeprefix(f"{label}_") in TWO_CLASS_METRICS]
            if undefined:
                raise ValueError(
                    f"the monitored {name} needs both classes, but the validation labels of {', '.join(undefined)} are "
                    f"all of one class; {OTHER_MONITOR}"
                )

    def train_epoch(self, data_generator: Batches) -> None:
        """Trains one epoch, or less when early stopping ends it."""
        self.train()
        started = time.perf_counter()
        for batch in self._progress(data_generator, "train"):
            batch = self._on_device(batch)
            step = self.train_step if self._graphed_step is None else self._graphed_step
            self._loss_sum += step(batch).detach()
            self._loss_steps += 1
            self._total_steps += 1
            self._rows["train"] += len(batch[self.feature_map.labels[0]])
            if self._total_steps % self._record_every == 0:
                self._record_loss()
            if self.valid_gen is not None and self._total_steps % self._evaluate_every == 0:
                self._record_loss()
                paused = time.perf_counter()
                self.eval_step()
                started += time.perf_counter() - paused
            if self._stop_training:
                break
        self._record_loss()
        self._seconds["train"] += time.perf_counter() - started

    def eval_step(self) -> None:
        """Evaluates on the validation data, saves the weights if they are the best, stops early if they stay worse."""
        logging.info("Evaluation @epoch %d - step %d:", self._epoch_index + 1, self._total_steps)
        logs, y_true = self._evaluate(self.valid_gen, self.validation_metrics)
        record = {"step": self._total_steps, "epoch": self._epoch_index + 1, **logs}
        self.history["valid"].append(record)
        if not math.isfinite(self._monitor.get_value(logs)):
            one_class = [label for label, values in y_true.items() if values.min() == values.max()]
            reason = f"the validation labels of {', '.join(one_class)} are all of one class; " if one_class else ""
            raise TrainingError(
                f"the monitored {' + '.join(self._monitor.get_metrics())} is nan at step {self._total_steps}: "
                f"{reason}{OTHER_MONITOR}"
            )
        best = self._best_metric
        self.checkpoint_and_earlystop(logs)
        if self._best_metric != best or not self._save_best_only:
            self.restored = record
        self.train()

    def evaluate(self, data_generator: Batches, metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Scores the predictions for some data.

        Args:
            data_generator: Batches.
            metrics: Metric names; those of the configuration by default.

        Returns:
            Metric -> value, named as FuxiCTR does: with several labels ``<label>_<metric>`` for each, and their mean
            as ``<metric>``.

        Raises:
            TrainingError: If a prediction is not a number.
        """
        return self._evaluate(data_generator, metrics or self.validation_metrics)[0]

    def predict(self, data_generator: Batches) -> np.ndarray | dict[str, np.ndarray]:
        """Predicts, in the order of the data.

        Returns:
            One value per row, ``(rows,)`` in float64; for a multi-task model a dict of those by label.
        """
        y_pred = self._collect(data_generator)[1]
        return y_pred if isinstance(self, MultiTaskModel) else y_pred[self.feature_map.labels[0]]

    def rows_per_second(self) -> dict[str, float]:
        """Rates over all work since construction: ``train`` without evaluations, ``evaluate`` with its metrics."""
        return {work: self._rows[work] / self._seconds[work] for work in self._rows}

    def save_weights(self, checkpoint: str | Path) -> None:
        """Writes the weights, so that the file is whole at any time: the old ones or the new ones.

        Raises:
            OSError: If they cannot be written, for a full disk among others.
        """
        path = Path(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(self.state_dict(), unfinished)
            os.replace(unfinished, path)
        except RuntimeError as error:  # what torch makes of a failed write
            raise OSError(f"the checkpoint {path} cannot be written; is the disk full? {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def load_weights(self, checkpoint: str | Path) -> None:
        """Loads weights that `save_weights` or FuxiCTR wrote.

        Raises:
            ValueError: If the file holds no weights, or those of another model or feature map; names the first few.
        """
        try:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{checkpoint} is not a file of model weights: {error}") from error
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        expected = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        differences = [
            f"{name} is {shapes.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            for name in {**expected, **shapes}
            if shapes.get(name) != expected.get(name)
        ]
        if differences:
            raise ValueError(
                f"{checkpoint} does not fit {type(self).__name__} on data set {self.feature_map.dataset_id!r}; "
                "the model's arguments or the feature map have changed since it was saved. "
                f"{len(differences)} weights differ: {'; '.join(differences[:5])}"
            )
        self.load_state_dict(weights)

    def _record_loss(self) -> None:
        """Reads the mean loss since the last call: the only point where the training loop waits for the device."""
        if not self._loss_steps:
            return
        loss = self._loss_sum.item() / self._loss_steps
        if not math.isfinite(loss):
            raise self._diverged(f"loss is {loss}", self._total_steps)
        self.history["train"].append({"step": self._total_steps, "epoch": self._epoch_index + 1, "loss": loss})
        logging.info("Train loss: %.6f @step %d", loss, self._total_steps)
        self._loss_sum.zero_()
        self._loss_steps = 0

    def _diverged(self, what: str, step: int) -> TrainingError:
        """Says between which steps it happened: those since the loss was last read."""
        return TrainingError(
            f"the training {what} between steps {self._total_steps - self._loss_steps + 1} and {step} "
            f"(epoch {self._epoch_index + 1}); lower learning_rate, or look for nan and extreme values in the features"
        )

    def _evaluate(
        self, data_generator: Batches, metrics: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scores as `evaluate` does and gives the labels as well."""
        started = time.perf_counter()
        y_true, y_pred, group_id = self._collect(data_generator)
        scores = {}
        for label in y_true:
            if not np.isfinite(y_pred[label]).all():
                raise TrainingError(f"the model predicts nan or inf for {label}; lower learning_rate")
            base_rate = self.base_rates[label] if self.base_rates else None
            scores[label] = evaluate_metrics(y_true[label], y_pred[label], metrics, group_id, base_rate)
            values = " - ".join(f"{name}: {value:.6f}" for name, value in scores[label].items())
            logging.info("[Task: %s][Metrics] %s", label, values)
        self._rows["evaluate"] += len(y_true[label])
        self._seconds["evaluate"] += time.perf_counter() - started
        if len(scores) == 1:
            return scores[label], y_true
        logs = {f"{label}_{name}": value for label, values in scores.items() for name, value in values.items()}
        means = {name: float(np.mean([values[name] for values in scores.values()])) for name in scores[label]}
        return {**logs, **means}, y_true

    @torch.no_grad()
    def _collect(
        self, data_generator: Batches
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray | None]:
        """Gathers labels and predictions by label, float64, and the group ids; each leaves the device once."""
        self.eval()
        outputs = self._outputs()
        y_true: dict[str, list[Tensor]] = {label: [] for label in outputs}
        y_pred: dict[str, list[Tensor]] = {label: [] for label in outputs}
        groups: list[Tensor] = []
        for batch in self._progress(data_generator, "evaluate"):
            batch = self._on_device(batch)
            predictions = self.forward(batch)
            for label, output in outputs.items():
                y_true[label].append(batch[label].flatten())
                y_pred[label].append(predictions[output].flatten())
            if self.feature_map.group_id is not None:
                groups.append(self.get_group_id(batch).flatten())
        return (
            {label: torch.cat(parts).double().cpu().numpy() for label, parts in y_true.items()},
            {label: torch.cat(parts).double().cpu().numpy() for label, parts in y_pred.items()},
            torch.cat(groups).numpy() if groups else None,
        )

    def _outputs(self) -> dict[str, str]:
        """Names the prediction of each label that the model has one for."""
        labels = self.feature_map.labels
        if isinstance(self, MultiTaskModel):
            return {label: f"{label}_pred" for label in labels}
        return {labels[0]: "y_pred"}

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies what is computed with, all but meta columns; FuxiCTR's ``get_inputs`` would wait for every column."""
        meta = {name for name, spec in self.feature_map.features.items() if spec["type"] == "meta"}
        return {
            name: values if name in meta else values.to(self.device, non_blocking=True)
            for name, values in batch.items()
        }

    def _progress(self, data_generator: Batches, what: str) -> Batches:
        """Shows the progress and the rate on a terminal, nothing in a log."""
        return tqdm(data_generator, what, unit="batch", leave=False, disable=None if self._verbose else True)
