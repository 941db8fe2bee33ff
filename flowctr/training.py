"""The training engine: FuxiCTR's fit, evaluate and predict, without a device sync per step and with a memory.

``accelerate(Model)`` subclasses a FuxiCTR model, ours or FuxiCTR's alike. What it computes stays FuxiCTR's: with one
seed and the same batches, losses and weights are bit-equal on the CPU. One thing differs, for models of several
labels outside of FuxiCTR's own folders: regularisation reaches every parameter, as it does with one label. What it
adds: the loss is read once per logging interval, predictions leave the device once per evaluation, `flowctr.metrics`
scores them, learning curves are kept, a checkpoint is whole or absent, and a run that has gone wrong says so and
stops. What makes it faster at the price of other last digits or of more memory is an option. What is not the training
itself has modules of its own: `flowctr.acceleration`, `flowctr.losses`, `flowctr.evaluation`, `flowctr.weights` and
`flowctr.resume`.
"""

import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from flowctr import acceleration, distributed, losses, weights
from flowctr.acceleration import CompiledForward, GraphedStep
from flowctr.evaluation import OTHER_MONITOR, Predictions, Scorer
from flowctr.losses import Loss, UncertaintyLoss, WeightedLoss
from flowctr.metrics import GroupAUCs
from flowctr.resume import START_ANEW, ResumeFile, random_state, set_random_state
from flowctr.tensorboard import CurveEvents, check_installed
from flowctr.weights import AveragedWeights
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor, nn
from tqdm import tqdm

CURVE_POINTS_PER_EVALUATION = 10
# How torch's binary_cross_entropy reports a prediction that is nan: on the CPU, and on a GPU.
NAN_PREDICTION = ("all elements of input should be between 0 and 1", "device-side assert triggered")
ONE_ROW = "Expected more than 1 value per channel"  # how torch's batch normalisation reports a batch of one row

# What a training goes on from besides weights, optimiser and random numbers: attributes with plain values.
PROGRESS = (
    *("_total_steps", "_epoch_index", "_stopping_steps", "_stop_training"),
    *("_epoch_rows", "_step_rows", "history", "restored", "_restored_weights"),
)

Batches = Iterable[Mapping[str, Tensor]]
Model = TypeVar("Model", bound=BaseModel)


class TrainingError(RuntimeError):
    """A run that cannot go on: a loss, a prediction or the monitored metric is not a number."""


def accelerate(model_class: type[Model]) -> type[Model]:
    """Derives the class that trains with this engine.

    A model may define ``start_epoch(epoch, epochs)``: it is called before each epoch, which counts from 0, with the
    number of epochs, for schedules such as a falling temperature. What a schedule changes has to be a buffer that is
    filled in place: a captured step (see `GraphedStep`) reads the same memory for ever.

    Args:
        model_class: A subclass of FuxiCTR's ``BaseModel`` or ``MultiTaskModel``.

    Returns:
        A subclass of it with the same name and arguments and the methods of `Engine`.
    """
    namespace = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (Engine, model_class), namespace)


def _in_precision(method: Callable) -> Callable:
    """Runs a method of `Engine` with the model's precision of matrix products."""

    @functools.wraps(method)
    def in_precision(self, *args, **kwargs):
        with acceleration.matmul_precision(self._precision):
            return method(self, *args, **kwargs)

    return in_precision


class Engine:
    """What `accelerate` puts before a model class: FuxiCTR's training methods, overridden.

    Args:
        *args: The model's arguments.
        precision: ``fp32``; ``tf32``: float32 with the factors of matrix products rounded to 10 bits, on GPUs that can;
            ``bf16``: matrix products of the forward and backward pass in bfloat16. Weights, losses and metrics are
            float32 or more in all of them.
        compile: Whether to compile the forward pass for training and evaluation (see `CompiledForward`). Dropout then
            draws other random numbers.
        cuda_graphs: Whether to replay a captured training step on a GPU (see `GraphedStep`); without effect on the
            CPU and, with a warning, in several processes. With ``compile``, the compiled step is captured.
        fused_optimizer: Whether to update in one kernel, for optimisers of which torch has such a form.
        fused_regularizer: Whether to compute FuxiCTR's regularisation in one pass over lists of parameters.
        gradient_accumulation: Batches of which a step takes the mean gradient. Their rows count the same, in the last
            step of an epoch, which may have fewer batches, too; every part of the step is normalised by its own batch
            statistics. Steps, and with them ``eval_steps`` and ``checkpoint_steps``, are updates.
        activation_checkpointing: Whether to compute the blocks' activations again in the backward pass instead of
            keeping them (see `acceleration.checkpoint_activations`); not with ``cuda_graphs``.
        reset_embeddings: Whether each epoch but the first starts with new embedding tables, so that several epochs
            teach the rest of the model while no table sees a row twice (see `weights.redraw_embeddings`).
        ema_decay: Decay, per step, of an exponential moving average of the weights, which is evaluated, saved and left
            in the model in their place (see `AveragedWeights`); None: the weights themselves.
        lr_decay_factor: What ``reduce_lr_on_plateau`` multiplies the learning rate by after every evaluation that is
            not the best one yet; FuxiCTR's 0.1.
        checkpoint_steps: Steps after which `fit` writes its resume file, besides the evaluations; None: only at those.
        loss_weight: How the losses of several labels add up: ``EQ`` sums them, a list has one weight for each label,
            ``UW`` learns the weights (see `UncertaintyLoss`).
        tensorboard: Whether to write the learning curves for TensorBoard too, to ``<model_id>.tensorboard`` beside the
            checkpoint.
        scenario: Categorical column within whose values the metrics are evaluated too; None: overall only. The model
            is given it as well.
        **kwargs: The model's arguments.

    Attributes:
        history: Learning curves of the last `fit`. ``train`` has ``{step, epoch, loss}`` per logging interval, the mean
            over its steps with regularisation, of the weights themselves; ``valid`` has ``{step, epoch, <metric>:
            value}`` per evaluation, of their average with ``ema_decay``. Steps and epochs count from 1.
        restored: The entry of ``history["valid"]`` that belongs to the weights `fit` left in the model; None without
            validation data.
        base_rates: Label -> mean in the training data, by which NE is normalised; None before `fit`.
        on_evaluation: Called with ``history["valid"]`` after each evaluation of `fit`, if it is set.

    Raises:
        ValueError: If ``loss_weight`` does not fit the labels, ``scenario`` is no categorical column, ``ema_decay`` or
            ``lr_decay_factor`` is not between 0 and 1, or the model, its optimiser or the device cannot do what is
            asked for.
    """

    on_evaluation: Callable[[list[dict[str, float]]], None] | None = None

    # A model made ready

    def __init__(
        self,
        *args,
        precision: str = "fp32",
        compile: bool = False,
        cuda_graphs: bool = False,
        fused_optimizer: bool = False,
        fused_regularizer: bool = False,
        gradient_accumulation: int = 1,
        activation_checkpointing: bool = False,
        reset_embeddings: bool = False,
        ema_decay: float | None = None,
        lr_decay_factor: float = 0.1,
        checkpoint_steps: int | None = None,
        loss_weight: str | Sequence[float] = "EQ",
        tensorboard: bool = False,
        scenario: str | None = None,
        **kwargs,
    ):
        self._loss_weighting = loss_weight  # these before the model's constructor, which calls compile
        self._fused_optimizer = fused_optimizer
        if scenario is not None:
            kwargs["scenario"] = scenario
        super().__init__(*args, **kwargs)
        self.cuda_graphs = cuda_graphs
        self._precision = precision
        self._gradient_accumulation = gradient_accumulation
        self._reset_embeddings = reset_embeddings
        self._ema_decay = ema_decay
        self._lr_decay_factor = lr_decay_factor
        self._checkpoint_steps = checkpoint_steps
        self._fused_regularizer = fused_regularizer
        self._penalties: list | None = None  # known once the model is complete
        self._check_acceleration(activation_checkpointing)
        if precision == "bf16":
            acceleration.widen_logits(self.output_activation)
        if activation_checkpointing:
            acceleration.checkpoint_activations(self)
        self._run_forward = CompiledForward(self, super().forward) if compile else super().forward
        self._tensorboard = tensorboard
        if tensorboard:
            check_installed()
        self._scenario = scenario
        self._scorer = Scorer(self.feature_map, scenario)
        self.history: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
        self.restored: dict[str, float] | None = None
        self.base_rates: Mapping[str, float] | None = None
        self._rows, self._seconds = Counter(), Counter()

    def _check_acceleration(self, activation_checkpointing: bool) -> None:
        """Raises ValueError for what this model or device cannot do."""
        acceleration.check_precision(self._precision, self.device)
        name, parts = type(self).__name__, self._gradient_accumulation
        if parts < 1:
            raise ValueError(f"gradient_accumulation={parts}; a step takes at least 1 batch")
        if parts > 1 and super().train_step.__func__ is not BaseModel.train_step:
            raise ValueError(
                f"gradient_accumulation={parts}: {name} has a train_step of its own, which takes one batch"
            )
        if self._ema_decay is not None and not 0 < self._ema_decay < 1:
            raise ValueError(f"ema_decay={self._ema_decay}; it lies between 0 and 1")
        if not 0 < self._lr_decay_factor < 1:
            raise ValueError(f"lr_decay_factor={self._lr_decay_factor}; it lies between 0 and 1")
        if distributed.world_size() > 1 and self.cuda_graphs:
            logging.warning("cuda_graphs cannot capture a step that several processes take together: it is off")
            self.cuda_graphs = False
        if self._reset_embeddings:
            weights.check_redrawable(self, in_place=self.cuda_graphs)
        if distributed.world_size() > 1 and super().train_step.__func__ is not BaseModel.train_step:
            raise ValueError(f"{name} has a train_step of its own, which takes one process; start it without torchrun")
        penalties = (BaseModel.regularization_loss, MultiTaskModel.regularization_loss)
        if self._fused_regularizer and super().regularization_loss.__func__ not in penalties:
            raise ValueError(f"fused_regularizer: {name} has a regularization_loss of its own; turn it off")
        if self.cuda_graphs and activation_checkpointing:
            raise ValueError(
                "cuda_graphs cannot capture activation_checkpointing, which saves the state of the random numbers on "
                "the host; turn one of them off"
            )

    def compile(self, optimizer: str, loss: str | list[str], lr: float) -> None:
        """Compiles the model and weighs its losses.

        Args:
            optimizer: FuxiCTR's optimiser name; learned weights are trained by the same optimiser.
            loss: FuxiCTR's loss name, one for all labels or a list with one for each.
            lr: Learning rate.
        """
        labels = self.feature_map.labels
        if isinstance(loss, list) and len(loss) != len(labels):
            raise ValueError(
                f"loss={loss} is for {len(loss)} labels; the data set has {len(labels)}: {', '.join(labels)}"
            )
        super().compile(optimizer, loss, lr)
        if self._fused_optimizer:
            self.optimizer = acceleration.fused_optimizer(self.optimizer)
        self._weigh_losses(lr)

    def _weigh_losses(self, lr: float) -> None:
        """Puts the weights that ``loss_weight`` asks for before the losses; raises ValueError if it cannot."""
        weighting, labels = self._loss_weighting, self.feature_map.labels
        if weighting == "EQ":
            return
        if not isinstance(self, MultiTaskModel):
            raise ValueError(f"loss_weight={weighting!r} weighs several labels; {type(self).__name__} predicts one")
        if weighting == "UW":
            if not hasattr(self, "loss_log_variances"):
                self.loss_log_variances = nn.Parameter(torch.zeros(len(labels), device=self.device))
            trained = {id(weight) for group in self.optimizer.param_groups for weight in group["params"]}
            if id(self.loss_log_variances) not in trained:
                self.optimizer.add_param_group({"params": [self.loss_log_variances], "lr": lr, "weight_decay": 0.0})
            self.loss_fn = [UncertaintyLoss(fn, self.loss_log_variances, k) for k, fn in enumerate(self.loss_fn)]
        elif isinstance(weighting, Sequence) and not isinstance(weighting, str) and len(weighting) == len(labels):
            self.loss_fn = [WeightedLoss(fn, weight) for fn, weight in zip(self.loss_fn, weighting)]
        else:
            raise ValueError(
                f"loss_weight={weighting!r} must be EQ, UW or one weight for each of the {len(labels)} labels "
                f"{', '.join(labels)}"
            )

    def _losses_by_label(self) -> dict[str, Loss]:
        functions = self.loss_fn if isinstance(self, MultiTaskModel) else [self.loss_fn]
        return dict(zip(self.feature_map.labels, functions))

    # One step

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes what the model does; accelerated while it trains, as `evaluate` and `predict` are."""
        return self._accelerated_forward(inputs) if self.training else super().forward(inputs)

    def _accelerated_forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with acceleration.autocast(self._precision, self.device):
            outputs = self._run_forward(inputs)
        return acceleration.widened(outputs)

    def train_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Trains on a batch as FuxiCTR does, or in as many parts as ``gradient_accumulation`` says.

        Args:
            batch: Rows; those of this process, maybe none, of a step that several take together.

        Returns:
            The loss, the mean over the rows of the batch, and of the other processes' batches.
        """
        if self._gradient_accumulation == 1 and distributed.world_size() == 1:
            return super().train_step(batch)
        self.optimizer.zero_grad()
        rows, loss = acceleration.row_count(batch), torch.zeros((), device=self.device)
        losses.share_known(self._losses_by_label(), batch, rows)
        for part in acceleration.split_batch(batch, self._gradient_accumulation) if rows else ():
            share = acceleration.row_count(part) / rows
            part_loss = share * self.compute_loss(self.forward(part), self.get_labels(part))
            part_loss.backward()
            loss += part_loss.detach()
        self._average_over_processes(loss, rows)
        nn.utils.clip_grad_norm_(self.parameters(), self._max_gradient_norm)
        self.optimizer.step()
        return loss

    def _average_over_processes(self, loss: Tensor, rows: int) -> None:
        if distributed.world_size() == 1:
            return
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # here, but maybe not in other processes
                parameter.grad = torch.zeros_like(parameter)
        distributed.mean_over_rows([loss, *(parameter.grad for parameter in trained)], rows)

    def regularization_loss(self) -> Tensor:
        """Computes FuxiCTR's regularisation of every parameter but learned loss weights."""
        regularization_loss = super().regularization_loss
        if self._fused_regularizer:
            regularization_loss = self._fused_regularization_loss
        elif regularization_loss.__func__ is MultiTaskModel.regularization_loss:
            # It sees only parameters called weight or bias: bare nn.Parameters would go unregularised.
            regularization_loss = super(MultiTaskModel, self).regularization_loss
        if self._loss_weighting != "UW":
            return regularization_loss()
        self.loss_log_variances.requires_grad_(False)  # FuxiCTR passes over what takes no gradient
        try:
            return regularization_loss()
        finally:
            self.loss_log_variances.requires_grad_(True)

    def _fused_regularization_loss(self) -> Tensor:
        if self._penalties is None:
            self._penalties = acceleration.penalties(self, self._embedding_regularizer, self._net_regularizer)
        return sum(acceleration.Penalty.apply(p, weight, *parameters) for p, weight, parameters in self._penalties)

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies what is computed with, all but meta columns; FuxiCTR's ``get_inputs`` would wait for every column."""
        meta = {name for name, spec in self.feature_map.features.items() if spec["type"] == "meta"}
        return {
            name: values if name in meta else values.to(self.device, non_blocking=True)
            for name, values in batch.items()
        }

    # All steps

    @_in_precision
    def fit(
        self,
        data_generator: Batches,
        epochs: int = 1,
        validation_data: Batches | None = None,
        max_gradient_norm: float = 10.0,
        resume_file: ResumeFile | None = None,
        **kwargs,
    ) -> None:
        """Trains, evaluates every ``eval_steps`` steps, stops early and restores the best weights.

        Without validation data the last weights are kept. A training that goes on from a resume file ends like one that
        was never interrupted, bit-equal on the CPU.

        Args:
            data_generator: Training batches, with a length; NE is normalised by its ``base_rates`` if it has them, and
                the loss of labels in its ``may_be_missing`` leaves out the rows that are NaN.
            epochs: Epochs to train at most.
            validation_data: Validation batches.
            max_gradient_norm: Gradients are clipped to this norm.
            resume_file: What to go on from, if it has a state, and where to keep it: at each evaluation, or where one
                would be with validation data, and every ``checkpoint_steps`` steps. It needs the ``epoch``,
                ``start_batch`` and ``streaming`` of `H5DataLoader`.
            **kwargs: Other parameters of a configuration, which have no effect here.

        Raises:
            ValueError: If the monitored metric needs both classes of a label, of which the validation data have one,
                or is of a scenario that training has not seen, the best weights of the run to resume are gone, or an
                epoch ends with one row, which batch normalisation cannot take.
            TrainingError: If a loss, a weight, a prediction or the monitored metric is not a number.
        """
        steps_per_epoch = -(-len(data_generator) // self._gradient_accumulation)
        self._begin_fit(data_generator, validation_data, steps_per_epoch)
        self._max_gradient_norm = max_gradient_norm
        self.resume_file = resume_file
        weights.remove_unfinished(Path(self.checkpoint))

        logging.info("Start training: %d steps/epoch", steps_per_epoch)
        in_epoch = resume_file is not None and resume_file.state is not None
        if in_epoch:
            self._continue_from(resume_file.state, data_generator, steps_per_epoch)
            resume_file.state = None  # as much memory as model and optimiser
        self._events = None
        if self._tensorboard and distributed.is_writer():
            self._events = CurveEvents(Path(self.checkpoint).with_suffix(".tensorboard"), self._total_steps)
        for epoch in range(self._epoch_index, epochs):
            self._epoch_index = epoch
            if self._stop_training:
                break
            if not in_epoch:
                self._begin_epoch(epochs)
            in_epoch = False
            try:
                self.train_epoch(data_generator)
            except RuntimeError as error:
                if self._step_rows and any(sign in str(error) for sign in NAN_PREDICTION):
                    last = len(self._step_rows) - 1
                    first = last if self.device.type == "cpu" else 0  # a GPU reports it some steps later
                    raise self._diverged("predictions are nan", first, last) from error
                raise
            except ValueError as error:
                if ONE_ROW in str(error):
                    raise ValueError(
                        f"step {self._total_steps} has one row, batch normalisation needs several; the last step of an "
                        "epoch has the rows that are left over: change batch_size by a few"
                    ) from error
                raise
        logging.info("Training finished.")
        if self.valid_gen is not None and self.restored is None:  # eval_steps is more than the steps there were
            self.eval_step()
        if self._events is not None:
            self._events.close()
        if self.valid_gen is None:
            if self._averaged_weights is not None:
                self._averaged_weights.swap()
            self.save_weights(self.checkpoint)
        else:
            logging.info("Load the best weights, epoch %(epoch)d, step %(step)d", self.restored)
            self.load_weights(self.checkpoint)
            if self._fingerprint() != self._restored_weights:
                # A start of the run was killed between writing them and its resume file, and this one found no better.
                logging.warning("%s is newer than what the run was resumed from: evaluated again", self.checkpoint)
                self.restored = {**self.restored, **self.evaluate(validation_data)}
        self._averaged_weights = None  # as much memory as the model

    def _begin_fit(self, data_generator: Batches, validation_data: Batches | None, steps_per_epoch: int) -> None:
        """Forgets an earlier `fit`, and raises ValueError for what data and model cannot do."""
        if self.device.type == "cpu":
            acceleration.keep_freed_memory()
        self.history = {"train": [], "valid": []}
        self.restored = self._restored_weights = None
        self.base_rates = getattr(data_generator, "base_rates", None)
        self.valid_gen = validation_data
        rates = getattr(validation_data, "base_rates", {})
        self._scorer.check_monitor(
            self._monitor.get_metrics(), {label: rates[label] for label in self._outputs() if label in rates}
        )
        self._leave_out_missing(getattr(data_generator, "may_be_missing", ()))
        self._evaluate_every = self._eval_steps or steps_per_epoch
        self._record_every = max(1, min(self._evaluate_every, steps_per_epoch) // CURVE_POINTS_PER_EVALUATION)
        # By step since the last record of the loss: the loss and the rows.
        self._losses = torch.zeros(self._record_every, dtype=torch.float64, device=self.device)
        self._step_rows: list[int] = []
        self._epoch_rows = 0
        self._graphed_step = GraphedStep(self) if self.cuda_graphs and self.device.type == "cuda" else None
        # These have the names and meaning of BaseModel, whose checkpoint_and_earlystop uses them.
        self._best_metric = math.inf if self._monitor_mode == "min" else -math.inf
        self._stopping_steps = 0
        self._stop_training = False
        self._total_steps = 0
        self._epoch_index = 0
        self._join_processes(data_generator)
        self._averaged_weights = None if self._ema_decay is None else AveragedWeights(self, self._ema_decay)
        if getattr(data_generator, "bucket_by_length", False):
            if self._gradient_accumulation > 1:
                raise ValueError(
                    f"gradient_accumulation={self._gradient_accumulation} joins batches, which bucket_by_length gives "
                    "different lengths; turn one of them off"
                )
            acceleration.check_padding_invariance(self, data_generator)

    def _leave_out_missing(self, labels: Sequence[str]) -> None:
        """Lets the losses of labels that may be missing leave out the rows that lack them."""
        if not labels:
            return
        functions = losses.leave_out_missing(self._losses_by_label(), labels)
        self.loss_fn = functions if isinstance(self, MultiTaskModel) else functions[0]

    def _join_processes(self, data_generator: Batches) -> None:
        """Starts from the writer's weights in every process; raises ValueError if the processes' steps differ."""
        distributed.barrier()
        batches = distributed.gather(len(data_generator))
        if len(set(batches)) > 1:
            raise ValueError(f"the processes have {batches} training batches; each needs the same number")
        distributed.broadcast(self.state_dict().values())
        if distributed.rank() > 0:  # dropout must not leave out the same for every process's rows
            torch.manual_seed(torch.initial_seed() + distributed.rank())

    def _begin_epoch(self, epochs: int) -> None:
        logging.info("************ Epoch=%d start ************", self._epoch_index + 1)
        self._epoch_rows = 0
        if self._reset_embeddings and self._epoch_index > 0:
            weights.redraw_embeddings(self, in_place=self._graphed_step is not None)
            if self._averaged_weights is not None:
                self._averaged_weights.forget(weights.embedding_tables(self))
        if hasattr(self, "start_epoch"):
            self.start_epoch(self._epoch_index, epochs)

    def train_epoch(self, data_generator: Batches) -> None:
        """Trains one epoch, or less when early stopping ends it."""
        self.train()
        started = time.perf_counter()
        batches = map(self._on_device, self._progress(data_generator, "train"))
        for batch in acceleration.join_batches(batches, self._gradient_accumulation):
            step = self.train_step if self._graphed_step is None else self._graphed_step
            self._count_step(distributed.world_size() * acceleration.row_count(batch))
            self._losses[len(self._step_rows) - 1] = step(batch).detach()
            if self._averaged_weights is not None:
                self._averaged_weights.update()
            if self._total_steps % self._record_every == 0:
                self._record_loss()
            if self.valid_gen is not None and self._total_steps % self._evaluate_every == 0:
                self._record_loss()
                paused = time.perf_counter()
                self.eval_step()
                started += time.perf_counter() - paused
            if self._is_resume_point():
                self._seconds["train"] += time.perf_counter() - started
                self._save_progress(data_generator)
                started = time.perf_counter()
            if self._stop_training:
                break
        self._record_loss()
        self._seconds["train"] += time.perf_counter() - started

    def _count_step(self, rows: int) -> None:
        self._total_steps += 1
        self._epoch_rows += rows
        self._step_rows.append(rows)
        self._rows["train"] += rows

    def _progress(self, data_generator: Batches, what: str) -> Batches:
        """Shows the progress and the rate on a terminal, nothing in a log."""
        shown = self._verbose and distributed.is_writer()
        return tqdm(data_generator, what, unit="batch", leave=False, disable=None if shown else True)

    # Losses, read once per interval

    def _record_loss(self) -> None:
        """Records the mean loss since the last call: the only point where every training loop waits for the device."""
        if not self._step_rows:
            return
        values = self._read_losses()
        loss = sum(values) / len(values)
        self._add_point("train", {"step": self._total_steps, "epoch": self._epoch_index + 1, "loss": loss})
        logging.info("Train loss: %.6f @step %d", loss, self._total_steps)
        self._step_rows.clear()

    def _add_point(self, curve: str, point: dict[str, float]) -> None:
        self.history[curve].append(point)
        if self._events is not None:
            self._events.add(curve, point)

    def _read_losses(self) -> list[float]:
        """Copies the losses since the last record from the device; raises TrainingError if one is not a number."""
        values = self._losses[: len(self._step_rows)].tolist()
        for i, loss in enumerate(values):
            if not math.isfinite(loss):
                raise self._diverged(f"loss is {loss}", i, i)
        return values

    def _diverged(self, what: str, first: int, last: int) -> TrainingError:
        """Says where: in the ``first`` to the ``last`` of the steps since the loss was last recorded, from 0."""
        step = self._total_steps - len(self._step_rows) + 1
        row = self._epoch_rows - sum(self._step_rows[first:]) + 1
        steps = f"at step {step + first}" if first == last else f"between steps {step + first} and {step + last}"
        rows = f"rows {row} to {row + sum(self._step_rows[first : last + 1]) - 1} in its order"
        return self._stopped(f"{what} {steps} (epoch {self._epoch_index + 1}, {rows})")

    def _stopped(self, what: str) -> TrainingError:
        """Adds what to do, and which weights are left."""
        kept = f"; the best weights, of step {self.restored['step']}, are {self.checkpoint}" if self.restored else ""
        return TrainingError(
            f"the training {what}; lower learning_rate, or look for nan and extreme values in the features{kept}"
        )

    # Evaluation

    def eval_step(self) -> None:
        """Evaluates on the validation data, saves the weights if they are the best, stops early if they stay worse."""
        with nullcontext() if self._averaged_weights is None else self._averaged_weights.in_model():
            self._evaluate_and_keep()
        self.train()

    def _evaluate_and_keep(self) -> None:
        logging.info("Evaluation @epoch %d - step %d:", self._epoch_index + 1, self._total_steps)
        logs, predictions = self._evaluate(self.valid_gen, self.validation_metrics)
        record = {"step": self._total_steps, "epoch": self._epoch_index + 1, **logs}
        self._add_point("valid", record)
        if self.on_evaluation is not None:
            self.on_evaluation(self.history["valid"])
        if self._loss_weighting == "UW":
            learned = torch.exp(-self.loss_log_variances.detach()).tolist()
            listed = ", ".join(f"{label} {weight:.4f}" for label, weight in zip(self.feature_map.labels, learned))
            logging.info("Loss weights: %s", listed)
        self._check_monitored(logs, predictions)
        best = self._best_metric
        self.checkpoint_and_earlystop(logs)
        if self._best_metric != best or not self._save_best_only:
            self.restored, self._restored_weights = record, self._fingerprint()

    def lr_decay(self, factor: float | None = None, min_lr: float = 1e-6) -> float:
        """Cuts the learning rate, by ``lr_decay_factor`` if no other factor is given, and returns it."""
        return super().lr_decay(self._lr_decay_factor if factor is None else factor, min_lr)

    def _fingerprint(self) -> int:
        return distributed.from_writer(lambda: weights.fingerprint(self.checkpoint))

    def _check_monitored(self, logs: Mapping[str, float], predictions: Predictions) -> None:
        """Raises TrainingError unless all monitored metrics are numbers."""
        monitored = self._monitor.get_metrics()
        reason = self._scorer.why_undefined(monitored, logs, predictions.y_true)
        if reason is not None:
            raise TrainingError(
                f"the monitored {' + '.join(monitored)} is nan at step {self._total_steps}: {reason}{OTHER_MONITOR}"
            )

    def evaluate(self, data_generator: Batches, metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Scores the predictions for some data.

        Args:
            data_generator: Batches.
            metrics: Metric names; those of the configuration by default.

        Returns:
            Metric -> value, named as FuxiCTR does: with several labels ``<label>_<metric>`` for each, and their mean
            as ``<metric>``. With a scenario, each label also has ``<metric>@<scenario>=<value>`` within each of its
            values, nan where it is undefined, and their mean as ``<metric>@<scenario>``, which leaves out what is
            undefined and the values unseen in training, ``<scenario>=unseen``. NE keeps the base rate of all rows.
            Rows without a label are left out of its metrics if the data's ``may_be_missing`` has it.

        Raises:
            TrainingError: If a prediction is not a number.
        """
        return self._evaluate(data_generator, metrics or self.validation_metrics)[0]

    def predict(self, data_generator: Batches) -> np.ndarray | dict[str, np.ndarray]:
        """Predicts, in the order of the data.

        Returns:
            One value per row, ``(rows,)`` in float64; for a multi-task model a dict of those by label.
        """
        y_pred = self._collect(data_generator).y_pred
        return y_pred if isinstance(self, MultiTaskModel) else y_pred[self.feature_map.labels[0]]

    def group_aucs(self, data_generator: Batches) -> dict[str, GroupAUCs] | None:
        """Predicts, and gives for each label the AUC of the groups that gAUC is the mean of.

        Returns:
            Label -> its groups that have both classes; None if gAUC is not among the configured metrics, and in all
            processes but the writer.
        """
        return self._group_aucs(self._collect(data_generator)) if "gAUC" in self.validation_metrics else None

    def evaluate_with_groups(self, data_generator: Batches) -> tuple[dict[str, float], dict[str, GroupAUCs] | None]:
        """Gives what `evaluate` and `group_aucs` give, and predicts once."""
        logs, predictions = self._evaluate(data_generator, self.validation_metrics)
        return logs, self._group_aucs(predictions) if "gAUC" in self.validation_metrics else None

    def _group_aucs(self, predictions: Predictions) -> dict[str, GroupAUCs] | None:
        return predictions.group_aucs() if distributed.is_writer() else None

    def _evaluate(self, data_generator: Batches, metrics: Sequence[str]) -> tuple[dict[str, float], Predictions]:
        """Scores as `evaluate` does and gives what has been scored as well."""
        started = time.perf_counter()
        predictions = self._collect(data_generator)
        if labels := predictions.not_finite():
            raise TrainingError(
                f"the model predicts nan or inf for {', '.join(labels)}; lower learning_rate, or look for nan and "
                "extreme values in the features"
            )
        logs = distributed.from_writer(
            lambda: self._scorer.score(predictions, data_generator, metrics, self.base_rates)
        )
        self._rows["evaluate"] += predictions.rows
        self._seconds["evaluate"] += time.perf_counter() - started
        return logs, predictions

    @_in_precision
    @torch.no_grad()
    def _collect(self, data_generator: Batches) -> Predictions:
        """Predicts all rows, in all processes; each value leaves the device once."""
        self.eval()
        distributed.broadcast(self.buffers())  # the statistics of batch norms, which a checkpoint has from the writer
        outputs = self._outputs()
        y_true: dict[str, list[Tensor]] = {label: [] for label in outputs}
        y_pred: dict[str, list[Tensor]] = {label: [] for label in outputs}
        groups: list[Tensor] = []
        scenarios: list[Tensor] = []
        for batch in self._progress(data_generator, "evaluate"):
            batch = self._on_device(batch)
            predictions = self._accelerated_forward(batch)
            # Copies: a column is a view of a buffer that all columns of its type share.
            for label, output in outputs.items():
                y_true[label].append(batch[label].flatten().clone())
                y_pred[label].append(predictions[output].flatten())
            if self.feature_map.group_id is not None:
                groups.append(self.get_group_id(batch).flatten().clone())
            if self._scenario is not None:
                scenarios.append(batch[self._scenario].flatten().clone())
        distributed.barrier()  # shares of much data take some processes longer than others
        return Predictions(
            {label: _gathered(parts, torch.float64) for label, parts in y_true.items()},
            {label: _gathered(parts, torch.float64) for label, parts in y_pred.items()},
            _gathered(groups) if groups else None,
            _gathered(scenarios) if scenarios else None,
        )

    def _outputs(self) -> dict[str, str]:
        """Names the prediction of each label that the model has one for."""
        labels = self.feature_map.labels
        if isinstance(self, MultiTaskModel):
            return {label: f"{label}_pred" for label in labels}
        return {labels[0]: "y_pred"}

    def rows_per_second(self) -> dict[str, float]:
        """Rates over all work since construction: ``train`` without evaluations, ``evaluate`` with its metrics."""
        return {work: self._rows[work] / self._seconds[work] for work in self._rows}

    # What outlasts the process

    def save_weights(self, checkpoint: str | Path) -> None:
        """Writes the weights, so that the file is whole at any time: the old ones or the new ones.

        Raises:
            OSError: If they cannot be written, for a full disk among others.
        """
        distributed.from_writer(lambda: weights.save(self, Path(checkpoint)))

    def load_weights(self, checkpoint: str | Path) -> None:
        """Loads weights that `save_weights` or FuxiCTR wrote.

        Raises:
            ValueError: If the file holds no weights, or those of another model or feature map; names the first few.
        """
        weights.load(self, checkpoint)

    def _is_resume_point(self) -> bool:
        periods = (self._evaluate_every, self._checkpoint_steps)
        due = any(period is not None and self._total_steps % period == 0 for period in periods)
        return due and self.resume_file is not None

    def _save_progress(self, data_generator: Batches) -> None:
        """Writes all that the rest of the training depends on, unless it has come to nothing."""
        self._read_losses()
        random_states = distributed.gather(random_state(self.device))
        if not torch.stack([weight.isfinite().all() for weight in self.parameters()]).all():
            raise self._stopped(f"weights are nan or inf at step {self._total_steps} (epoch {self._epoch_index + 1})")
        state = {
            "weights": self.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "random": random_states,
            "loader_epoch": data_generator.epoch - 1,
            "streaming": data_generator.streaming,
            "average": None if self._averaged_weights is None else self._averaged_weights.state(),
            "losses": self._losses,
            "best_metric": float(self._best_metric),
            "rows": dict(self._rows),
            "seconds": dict(self._seconds),
            **{name: getattr(self, name) for name in PROGRESS},
        }
        distributed.from_writer(lambda: self.resume_file.save(state))

    def _continue_from(self, state: Mapping[str, Any], data_generator: Batches, steps_per_epoch: int) -> None:
        """Puts back what `_save_progress` wrote."""
        if state["restored"] and not Path(self.checkpoint).exists():
            raise ValueError(f"{self.checkpoint}, the best weights of the run to resume, is gone; {START_ANEW}")
        if state["streaming"] != data_generator.streaming:
            raise ValueError(
                f"the run to resume has streaming={state['streaming']}, here it is {data_generator.streaming}, which "
                "gives the rows another order; where it is not set, the machine's memory decides: set "
                f"streaming={str(state['streaming']).lower()}, or {START_ANEW}"
            )
        self.load_state_dict(state["weights"])
        groups = self.optimizer.state_dict()["param_groups"]  # this run's: by which kernel to update may have changed
        for group, rate in zip(groups, state["learning_rates"]):
            group["lr"] = rate
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        set_random_state(state["random"][distributed.rank()], self.device)
        if self._averaged_weights is not None:
            self._averaged_weights.restore(state["average"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self._losses.copy_(state["losses"])
        self._best_metric = state["best_metric"]
        self._rows, self._seconds = Counter(state["rows"]), Counter(state["seconds"])
        steps = self._total_steps - self._epoch_index * steps_per_epoch
        data_generator.epoch, data_generator.start_batch = state["loader_epoch"], steps * self._gradient_accumulation
        logging.info("Resume after step %d, in epoch %d", self._total_steps, self._epoch_index + 1)


def _gathered(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> np.ndarray:
    """Concatenates what is on the device, and then what the processes have."""
    return np.concatenate(distributed.gather(torch.cat(parts).to(dtype).cpu().numpy()))
