"""Changes the global batch while training runs, and all that depends on it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext import _lightning
from lightning_ext.callbacks._adaptive._checks import (
    check_arguments,
    check_fit,
    check_ranks,
    check_schedules,
    define_wandb_axis,
    the_critical_batch,
    the_curvature,
    the_noise_scale,
)
from lightning_ext.callbacks._adaptive._choices import lr_rule_of, rule_and_limit, unit_of
from lightning_ext.callbacks._adaptive._clipping import ClippedFraction
from lightning_ext.callbacks._adaptive._controller import BatchController
from lightning_ext.callbacks._adaptive._memory_ceiling import MemoryCeiling, finder_of
from lightning_ext.callbacks._adaptive._other_ranks import keep_batch
from lightning_ext.callbacks._adaptive._progress import UNITS, Progress
from lightning_ext.callbacks._adaptive._rates import FollowingRates
from lightning_ext.callbacks._adaptive._running_batch import RunningBatch
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.callbacks._logging import log_step
from lightning_ext.callbacks._reuse import begins_anew
from lightning_ext.optim import sample_schedules
from lightning_ext.scaling import HYPERPARAMETER_RULES, BatchRule, BatchSizeSchedule


class AdaptiveBatchSize(Callback):
    r"""Lets a rule or a schedule set the global batch, and keeps everything else consistent.

    A change takes effect between two accumulation windows, so that every gradient is whole. With
    it go hyper-parameters (``lr_rule``), Adam's step count, the number of batches that the Trainer
    expects, schedules by samples (:class:`~lightning_ext.optim.SampleSchedule`) and :class:`EMA`.
    The micro-batch grows first, up to ``max_micro_batch``, then accumulation. Every sample is seen
    once per epoch, and each step's gradient is the mean over its samples. A resumed run goes on
    with the very next sample. Under a pipeline the loader's batch grows, and with it the number of
    micro-batches; these keep their size.

    Where the Trainer logs, it logs ``global_batch``, ``micro_batch``, ``accumulate``,
    ``samples_seen``, ``lr_scaled`` (what the optimizer used), ``target_batch`` and ``statistic`` of
    the rule, and what there is of ``tokens_seen``, ``progress_samples`` and ``clipped_fraction``.

    Args:
        rule: The name of a rule, such as ``"noise_scale"`` or ``"norm_test"``, a schedule such as
            ``"0:64 20k:128"``, or an object (:class:`~lightning_ext.scaling.BatchRule`).
        lr_rule: How hyper-parameters follow, one of ``scaling.HYPERPARAMETER_RULES``; ``"auto"``
            is what the rule asks for, else that of the optimizer (``optim.batch_rule``). ``"rmt"``
            reads the one :class:`Curvature` of the Trainer.
        max_global_batch: Largest samples per optimizer step; a schedule may leave it out.
        max_micro_batch: Largest samples per forward pass on one rank; ``None`` keeps the loader's
            batch size, and accumulation alone changes, as it always does under a pipeline.
        max_samples: Stop at the first step that reaches as many samples.
        growth: Largest factor of one change.
        dwell_samples: Samples between two changes; ``None`` means 16 steps at the present batch.
        threshold: Least relative change that is worth making.
        monotone: Never shrink.
        scale_weight_decay: Whether decoupled weight decay follows ``lr_rule``.
        scale_second_moment: Whether Adam's second moment, too, changes with the batch at once.
        clamp_lr: Where a :class:`GradientNoiseScale` measures and the batch passes the upper limit
            of its estimate, the learning rate stops growing (and warns once).
        progress: What a step counts for schedules and ``max_samples``: ``"samples"``, those it
            takes; ``"gain"``, the reference batch times AdaScale's gain (``"auto"`` under
            ``"adascale"``); ``"steps"``, the reference batch: as many updates (regime adaptation).
        rescale_last_window: Weigh losses by samples, so that a cut or uneven last window has the
            mean gradient of its samples; ``False`` is how the Trainer does it.
        source: The :class:`GradientNoiseScale` to use where there are several, or its ``prefix``.
        tokens_per_sample: Makes schedules in tokens possible.
        on_oom: ``"split"`` runs a batch that does not fit into memory again in parts, and goes on
            with a smaller micro-batch, on one device; ``"raise"`` ends the fit, as does lack of
            memory under a pipeline.
        reference_batch: The global batch that the hyper-parameters belong to; ``None`` means the
            one that the loader and the Trainer start with.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, settings that do not fit together.
    """

    def __init__(
        self,
        rule: str | BatchRule | BatchSizeSchedule,
        *,
        lr_rule: str = "auto",
        max_global_batch: int | None = None,
        max_micro_batch: int | None = None,
        max_samples: int | None = None,
        growth: float = 2.0,
        dwell_samples: int | None = None,
        threshold: float = 0.2,
        monotone: bool = True,
        scale_weight_decay: bool = True,
        scale_second_moment: bool = False,
        clamp_lr: bool = True,
        progress: Literal["auto", "samples", "gain", "steps"] = "auto",
        rescale_last_window: bool = True,
        source: str | GradientNoiseScale | None = None,
        tokens_per_sample: int | None = None,
        reference_batch: int | None = None,
        on_oom: Literal["split", "raise"] = "split",
    ) -> None:
        check_arguments(
            {
                "max_global_batch": max_global_batch,
                "max_micro_batch": max_micro_batch,
                "max_samples": max_samples,
                "tokens_per_sample": tokens_per_sample,
                "reference_batch": reference_batch,
            },
            {
                "scale_weight_decay": scale_weight_decay,
                "scale_second_moment": scale_second_moment,
                "clamp_lr": clamp_lr,
                "rescale_last_window": rescale_last_window,
            },
            {
                "lr_rule": (lr_rule, ("auto", *HYPERPARAMETER_RULES)),
                "progress": (progress, ("auto", *UNITS)),
                "on_oom": (on_oom, ("split", "raise")),
            },
            source,
        )
        controller = BatchController(
            *rule_and_limit(rule, max_global_batch),
            max_micro_batch=max_micro_batch,
            growth=growth,
            dwell_samples=dwell_samples,
            threshold=threshold,
            monotone=monotone,
            memory=MemoryCeiling(recover=on_oom == "split"),
        )
        self.source = source if isinstance(source, GradientNoiseScale) else None
        self._given_source = source
        self.max_samples = max_samples
        self.rescale_last_window = rescale_last_window
        chosen = lr_rule_of(lr_rule, controller.rule)
        rates = FollowingRates(
            chosen,
            scale_weight_decay=scale_weight_decay,
            clamp=clamp_lr,
            scale_second_moment=scale_second_moment,
        )
        self.batch = RunningBatch(
            controller,
            rates,
            progress=Progress(unit_of(progress, chosen), tokens_per_sample, max_samples),
            reference_batch=reference_batch,
        )
        self._clipped = ClippedFraction()
        self._random_state: list[dict[str, Any]] | None = None
        self._monitored: dict[str, float] = {}
        self._share = _lightning.BatchShare(0, 0, 0, 1.0)

    @property
    def global_batch(self) -> int:
        """Samples of the next optimizer step; known once training has begun."""
        if not self.batch.begun:
            raise RuntimeError("The global batch is known once fit has read the train loader.")
        return self.batch.global_batch

    @property
    def samples_seen(self) -> int:
        """Samples of all optimizer steps so far."""
        return self.batch.progress.samples_seen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the settings and takes over the train loader's batch sampler."""
        if stage != "fit":
            return
        check_fit(trainer, pl_module, self.batch)
        if finder_of(trainer) is not None:
            self.batch.controller.grow_micro_batch()
        if begins_anew(self, pl_module):
            self.batch.reset()
            self._clipped = ClippedFraction()
        self.source = the_noise_scale(trainer, self, self._given_source, self.batch)
        self.batch.rates.curvature = the_curvature(trainer, self.batch)
        self.batch.observer.branches = the_critical_batch(trainer, self.batch)
        prepare = partial(self.batch.prepare, trainer, rescale_last_window=self.rescale_last_window)
        _lightning.install_sampler(trainer, prepare)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies the sizes to begin with, or goes on where the checkpoint stopped."""
        define_wandb_axis(trainer)
        check_schedules(trainer, self.batch)
        self.batch.begin(trainer, on_rerun=partial(self._read_share, trainer))
        check_ranks(trainer, self.batch)
        if trainer.fit_loop.is_resuming:
            _lightning.restore_monitored_metrics(trainer, self._monitored)
            restore = partial(_lightning.restore_random_state, trainer, self._random_state)
            keep = partial(keep_batch, trainer, self.batch)
            _lightning.resume_position(trainer, self.batch.position, restore, keep)
        else:
            _lightning.sync_lengths(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the sampler's epoch, with the sizes that were asked for at the last one's end."""
        self.batch.begin_epoch(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reads how much the batch counts, and tells schedules by samples about the step."""
        _lightning.sync_first_batch(trainer)
        self._read_share(trainer, batch, batch_idx)
        _lightning.view(trainer).announce_loss_weight(self._share.loss_weight)
        for config in trainer.lr_scheduler_configs:
            for schedule in sample_schedules(config.scheduler):
                schedule.samples_per_step = self.batch.worth(self._share.window)

    def _read_share(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        self._share = _lightning.batch_share(trainer, batch, batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Weighs the loss; what was logged and returned of it stays as it is."""
        if self._share.loss_weight != 1:
            loss.mul_(self._share.loss_weight)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Counts the steps that will be clipped."""
        self._clipped.count(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: counts, asks the rule, and changes what is due."""
        self.batch.sampler.consume()
        accumulate = trainer.accumulate_grad_batches
        self.batch.observer.add_loss(outputs, self._share.local, accumulate)
        if not _lightning.steps_now(trainer):
            return
        self.batch.end_step(trainer, self._share.window)
        self.batch.decide(trainer, self.source)
        if _lightning.logs_now(trainer):
            values = self.batch.values() | self._clipped.values()
            log_step(pl_module, values, bar="global_batch")
        self.batch.apply_due(trainer, batch_idx + 1)
        done = self.batch.progress.reference_samples
        if self.max_samples is not None and done >= self.max_samples:
            trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the time of validation out of that of steps."""
        self.batch.observer.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps schedulers by metric going after a resume."""
        _lightning.step_plateau_schedulers(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves Trainer and optimizer as they were."""
        self.batch.release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves Trainer, optimizer and loader as they were."""
        if self.batch.running:
            self._random_state = _lightning.random_state(trainer)
        self.batch.release(trainer)
        self.batch.end()

    def state_dict(self) -> dict[str, Any]:
        """Sizes, counts and the position in the data."""
        return {**self.batch.state_dict(), "clipped": self._clipped.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the counts; the position is restored when the loader is there."""
        self.batch.load_state_dict(state_dict)
        self._clipped.load_state_dict(state_dict["clipped"])
        self._random_state = state_dict.get("random_state")
        self._monitored = state_dict.get("monitored", {})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random state of every rank and what schedulers monitor, or that of fit's end."""
        if self.batch.running:
            self._random_state = _lightning.random_state(trainer)
            self._monitored = _lightning.monitored_metrics(trainer)
        own = checkpoint["callbacks"][self.state_key]
        own |= {"random_state": self._random_state, "monitored": self._monitored}
