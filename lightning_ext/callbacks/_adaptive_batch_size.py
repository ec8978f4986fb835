"""Changes the global batch while training runs, and all that depends on it."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext import _lightning, scaling
from lightning_ext.callbacks._adaptive_checks import (
    check_arguments,
    check_fit,
    define_wandb_axis,
    the_noise_scale,
    warn_batch_norm,
)
from lightning_ext.callbacks._batch_controller import BatchController
from lightning_ext.callbacks._clipping import ClippedFraction
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import BatchScaling, sample_schedules
from lightning_ext.scaling import BatchRule, BatchSplit, Observation


class AdaptiveBatchSize(Callback):
    r"""Lets a rule or a schedule set the global batch, and keeps everything else consistent.

    A change takes effect between two accumulation windows, so that every gradient is whole. With
    it go: the learning rate, betas and weight decay (``lr_rule``), Adam's step count, the number
    of batches that the Trainer expects, schedules by samples
    (:class:`~lightning_ext.optim.SampleSchedule`) and :class:`EMA`. The micro-batch grows first,
    up to ``max_micro_batch``, then accumulation. Every sample is seen once per epoch, and losses
    are weighed such that each step's gradient is the mean over its samples.

    A checkpoint holds sizes, position in the data and the random state of every rank; a resumed
    run goes on with the very next sample.

    It logs ``global_batch``, ``micro_batch``, ``accumulate``, ``samples_seen``, ``lr_scaled`` (the
    learning rate that the optimizer used), ``tokens_seen`` where ``tokens_per_sample`` is given,
    and ``clipped_fraction`` where the Trainer clips by norm.

    Args:
        rule: ``"noise_scale"``, ``"norm_test"``, a schedule such as ``"0:64 20k:128"``, or an
            object (:class:`~lightning_ext.scaling.BatchRule`).
        lr_rule: How hyper-parameters follow: ``"auto"`` (SGD ``"linear"``, Adam family and RMSprop
            ``"sde"``), ``"none"``, ``"linear"``, ``"linear_samples"``, ``"sqrt"`` or ``"sde"``.
        max_global_batch: Largest samples per optimizer step; a schedule may leave it out.
        max_micro_batch: Largest samples per forward pass on one rank; ``None`` keeps the loader's
            batch size, and accumulation alone changes.
        max_samples: Stop at the first step that reaches as many samples.
        growth: Largest factor of one change.
        dwell_samples: Samples between two changes; ``None`` means 16 steps at the present batch.
        threshold: Least relative change that is worth making.
        monotone: Never shrink.
        scale_weight_decay: Whether decoupled weight decay follows ``lr_rule``.
        rescale_last_window: Weigh losses by samples, so that a cut or uneven last window has the
            mean gradient of its samples; ``False`` is how the Trainer does it.
        source: The :class:`GradientNoiseScale` to use where there are several.
        tokens_per_sample: Makes schedules in tokens possible.
        reference_batch: The global batch that the hyper-parameters belong to; ``None`` means the
            one that the loader and the Trainer start with.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, settings that do not fit together.
    """

    def __init__(
        self,
        rule: str | BatchRule,
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
        rescale_last_window: bool = True,
        source: GradientNoiseScale | None = None,
        tokens_per_sample: int | None = None,
        reference_batch: int | None = None,
    ) -> None:
        check_arguments(
            {
                "max_global_batch": max_global_batch,
                "max_micro_batch": max_micro_batch,
                "max_samples": max_samples,
                "tokens_per_sample": tokens_per_sample,
                "reference_batch": reference_batch,
            },
            lr_rule,
        )
        self.controller = BatchController(
            *_rule_and_limit(rule, max_global_batch),
            max_micro_batch=max_micro_batch,
            growth=growth,
            dwell_samples=dwell_samples,
            threshold=threshold,
            monotone=monotone,
        )
        self.lr_rule = lr_rule
        self.max_samples = max_samples
        self.scale_weight_decay = scale_weight_decay
        self.rescale_last_window = rescale_last_window
        self.source = source
        self.tokens_per_sample = tokens_per_sample
        self.reference_batch = reference_batch
        self.samples_seen = 0
        self._last_change = 0
        self._in_force: BatchSplit | None = None
        self._clipped = ClippedFraction()
        self._position: dict[str, Any] | None = None
        self._random_state: list[dict[str, Any]] | None = None
        self._sampler: AdaptiveBatchSampler | None = None
        self._scaling: BatchScaling | None = None
        self._share = _lightning.BatchShare(0, 0, 0, 1.0)

    @property
    def global_batch(self) -> int:
        """Samples of the next optimizer step."""
        return self.controller.global_batch(self._in_force or self.controller.start)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the settings and takes over the train loader's batch sampler."""
        if stage != "fit":
            return
        check_fit(trainer, pl_module, self.controller, self.max_samples, self.tokens_per_sample)
        if self.controller.rule.needs_noise:
            self.source = the_noise_scale(trainer, self, self.source)
        _lightning.install_sampler(trainer, partial(self._prepare, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies the sizes to begin with, or goes on where the checkpoint stopped."""
        self._sampler = _lightning.live_sampler(trainer)
        define_wandb_axis(trainer)
        resuming = trainer.fit_loop.is_resuming
        if self._in_force is None or not resuming:
            self._in_force = _sizes(self._live, 0)
        _lightning.view(trainer).set_accumulate(self._in_force.accumulate)
        self._scaling = BatchScaling(
            trainer.optimizers[0],
            self.lr_rule,
            kappa=self._kappa,
            scale_weight_decay=self.scale_weight_decay,
        )
        if resuming:
            restore = partial(_lightning.restore_random_state, trainer, self._random_state)
            _lightning.resume_position(trainer, self._position, restore)
        else:
            self._live.set_epoch(trainer.current_epoch)
            _lightning.sync_lengths(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the sampler's epoch, with the sizes that were asked for at the last one's end."""
        self._sampler = _lightning.live_sampler(trainer)
        if self._live.consumed > 0:
            self._live.next_epoch()
        self._apply_due(trainer, pl_module, 0)
        _lightning.sync_lengths(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reads how much the batch counts, and tells schedules by samples about the step."""
        _lightning.sync_first_batch(trainer)
        self._share = _lightning.batch_share(trainer, batch, batch_idx)
        for config in trainer.lr_scheduler_configs:
            for schedule in sample_schedules(config.scheduler):
                schedule.samples_per_step = self._share.window

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
        self._live.consume()
        if not _lightning.steps_now(trainer):
            return
        self.samples_seen += self._share.window
        pl_module.log_dict(self._values(), on_step=True, on_epoch=False)
        self._decide(trainer)
        self._apply_due(trainer, pl_module, batch_idx + 1)
        if self.max_samples is not None and self.samples_seen >= self.max_samples:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps schedulers by metric going after a resume."""
        _lightning.step_plateau_schedulers(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves Trainer and optimizer as they were."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves Trainer and optimizer as they were."""
        self._release(trainer)
        if self._sampler is not None:
            self._position = self._sampler.state_dict()
            self._sampler.resize(*self.controller.start)
        self._sampler = None

    def state_dict(self) -> dict[str, Any]:
        """Sizes, counts and the position in the data."""
        sampler = self._sampler
        return {
            "reference_batch": self.reference_batch,
            "samples_seen": self.samples_seen,
            "last_change": self._last_change,
            "in_force": None if self._in_force is None else list(self._in_force),
            "clipped": self._clipped.state_dict(),
            "sampler": self._position if sampler is None else sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the counts; the position is restored when the loader is there."""
        self.reference_batch = state_dict["reference_batch"]
        self.samples_seen = state_dict["samples_seen"]
        self._last_change = state_dict["last_change"]
        sizes = state_dict["in_force"]
        self._in_force = None if sizes is None else BatchSplit(*sizes)
        self._clipped.load_state_dict(state_dict["clipped"])
        self._position = state_dict["sampler"]
        self._random_state = state_dict.get("random_state")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random state of every rank."""
        if self._sampler is not None:
            own = checkpoint["callbacks"][self.state_key]
            own["random_state"] = _lightning.random_state(trainer)

    @property
    def _live(self) -> AdaptiveBatchSampler:
        if self._sampler is None:
            raise RuntimeError("AdaptiveBatchSize has a sampler during fit only.")
        return self._sampler

    @property
    def _kappa(self) -> float:
        return self.global_batch / (self.reference_batch or self.global_batch)

    def _prepare(self, trainer: Trainer, sampler: AdaptiveBatchSampler) -> None:
        """Learns the sizes that the user set, and asks for those to begin with."""
        size = _lightning.view(trainer).data_parallel_size
        start = BatchSplit(sampler.batch_size, trainer.accumulate_grad_batches)
        self.controller.bind(start, size)
        if self.reference_batch is None:
            self.reference_batch = self.controller.global_batch(start)
        sampler.reference_batch = self.reference_batch
        sampler.rescale_last_window = self.rescale_last_window
        begin = start
        if not self.controller.rule.needs_noise:
            decision = self.controller.decide(self._observe(self.controller.global_batch(start)))
            begin = self.controller.split(decision.global_batch) if decision else start
        elif self._in_force is not None:
            begin = self._in_force
        sampler.resize(*begin)

    def _observe(self, global_batch: int) -> Observation:
        per_sample = self.tokens_per_sample
        needs_noise = self.controller.rule.needs_noise and self.source is not None
        return Observation(
            global_batch=global_batch,
            samples_seen=self.samples_seen,
            noise=self.source.estimate() if needs_noise and self.source else None,
            tokens_seen=None if per_sample is None else self.samples_seen * per_sample,
            total_samples=self.max_samples,
        )

    def _decide(self, trainer: Trainer) -> None:
        """Asks the rule once the last change is done, and every rank takes the same number."""
        asked = BatchSplit(self._live.batch_size, self._live.accumulate)
        since = self.samples_seen - self._last_change
        if asked != self._in_force or self.controller.dwells(self.global_batch, since):
            return
        if self.controller.rule.needs_noise and not (self.source and self.source.measured):
            return
        view = _lightning.view(trainer)
        decision = self.controller.decide(self._observe(self.global_batch))
        (target,) = view.largest(decision.global_batch if decision else self.global_batch)
        split = self.controller.split(target)
        if split != self._in_force:
            view.set_micro_batch(split.micro_batch, accumulate=split.accumulate)

    def _apply_due(self, trainer: Trainer, pl_module: LightningModule, next_batch: int) -> None:
        """Changes accumulation and hyper-parameters where the next batch has new sizes."""
        if next_batch >= _lightning.epoch_end(trainer):
            return
        split = _sizes(self._live, next_batch)
        if split == self._in_force or self._scaling is None:
            return
        if self._in_force and split.micro_batch != self._in_force.micro_batch:
            warn_batch_norm(pl_module)
        _lightning.view(trainer).set_accumulate(split.accumulate)
        self._in_force = split
        self._last_change = self.samples_seen
        self._scaling.set_kappa(self._kappa)

    def _values(self) -> dict[str, float]:
        split = self._in_force or self.controller.start
        values = {
            "global_batch": float(self.global_batch),
            "micro_batch": float(split.micro_batch),
            "accumulate": float(split.accumulate),
            "samples_seen": float(self.samples_seen),
        }
        if self._scaling is not None:
            values["lr_scaled"] = self._scaling.lrs()[0]
        if self.tokens_per_sample is not None:
            values["tokens_seen"] = float(self.samples_seen * self.tokens_per_sample)
        return values | self._clipped.values()

    def _release(self, trainer: Trainer) -> None:
        _lightning.uninstall_sampler(trainer)
        if self._scaling is not None:
            self._scaling.detach()
            trainer.accumulate_grad_batches = self.controller.start.accumulate
        self._scaling = None


def _sizes(sampler: AdaptiveBatchSampler, batch_idx: int) -> BatchSplit:
    return BatchSplit(*sampler.plan.segment(batch_idx)[1:])


def _rule_and_limit(rule: str | BatchRule, max_global_batch: int | None) -> tuple[BatchRule, int]:
    parsed = scaling.parse_rule(rule)
    if max_global_batch is None:
        max_global_batch = getattr(parsed, "max_global_batch", None)
    if max_global_batch is None:
        raise ValueError(f"rule={rule!r} needs max_global_batch, the largest batch it may reach.")
    return parsed, max_global_batch
