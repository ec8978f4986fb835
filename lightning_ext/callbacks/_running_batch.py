"""The global batch of a fit: its sizes now, how they change, and what has been seen."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ext import _lightning
from lightning_ext.callbacks._batch_controller import BatchController
from lightning_ext.callbacks._batch_norm import warn_batch_norm
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import BatchScaling
from lightning_ext.scaling import BatchSplit, Observation


class RunningBatch:
    """Sizes in force, and everything that changes with them, between two optimizer steps.

    Args:
        controller: The rule with its limits.
        lr_rule: How hyper-parameters follow.
        scale_weight_decay: Whether decoupled weight decay follows too.
        tokens_per_sample: For schedules in tokens.
        total_samples: For schedules in percent.
        reference_batch: The global batch that the hyper-parameters belong to.
    """

    def __init__(
        self,
        controller: BatchController,
        *,
        lr_rule: str,
        scale_weight_decay: bool,
        tokens_per_sample: int | None,
        total_samples: int | None,
        reference_batch: int | None,
    ) -> None:
        self.controller = controller
        self.lr_rule = lr_rule
        self.scale_weight_decay = scale_weight_decay
        self.tokens_per_sample = tokens_per_sample
        self.total_samples = total_samples
        self._given_reference = reference_batch
        self._sampler: AdaptiveBatchSampler | None = None
        self._scaling: BatchScaling | None = None
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forgets everything that a run has brought."""
        self.reference_batch = self._given_reference
        self.samples_seen = 0
        self.last_change = 0
        self.position: dict[str, Any] | None = None  # in the data, as last known
        self._in_force: BatchSplit | None = None

    @property
    def running(self) -> bool:
        """Whether a fit is under way."""
        return self._sampler is not None

    @property
    def begun(self) -> bool:
        """Whether sizes are known, from a fit or a checkpoint."""
        return self._in_force is not None

    @property
    def sampler(self) -> AdaptiveBatchSampler:
        """The sampler of the running fit."""
        if self._sampler is None:
            raise RuntimeError("There is a sampler during fit only.")
        return self._sampler

    @property
    def in_force(self) -> BatchSplit:
        """Micro-batch and accumulation of the next batch."""
        return self._in_force or self.controller.start

    @property
    def global_batch(self) -> int:
        """Samples of the next optimizer step."""
        return self.controller.global_batch(self.in_force)

    @property
    def kappa(self) -> float:
        """Global batch over reference batch."""
        return self.global_batch / (self.reference_batch or self.global_batch)

    def prepare(
        self, trainer: Trainer, sampler: AdaptiveBatchSampler, *, rescale_last_window: bool
    ) -> None:
        """Learns the sizes that the user set, and asks the sampler for those to begin with."""
        start = BatchSplit(sampler.batch_size, trainer.accumulate_grad_batches)
        self.controller.bind(start, _lightning.view(trainer).data_parallel_size)
        if self.reference_batch is None:
            self.reference_batch = self.controller.global_batch(start)
        sampler.reference_batch = self.reference_batch
        sampler.rescale_last_window = rescale_last_window
        sampler.user_sizes = start
        sampler.resize(*self._first_sizes(trainer, sampler, start))

    def begin(self, trainer: Trainer) -> None:
        """Sets accumulation and hyper-parameters before the first batch."""
        self._sampler = _lightning.live_sampler(trainer)
        if self._in_force is None or not trainer.fit_loop.is_resuming:
            self._in_force = _sizes(self.sampler, 0)
            self.sampler.set_epoch(trainer.current_epoch)
        _lightning.view(trainer).set_accumulate(self._in_force.accumulate)
        self._warn_of_short_epochs()
        # An optimizer's state from a run without us belongs to the reference batch.
        ours = trainer.fit_loop.is_resuming and self.position is not None
        self._scaling = BatchScaling(
            trainer.optimizers[0],
            self.lr_rule,
            kappa=self.kappa if ours else 1.0,
            scale_weight_decay=self.scale_weight_decay,
        )
        self._scaling.set_kappa(self.kappa)

    def begin_epoch(self, trainer: Trainer) -> None:
        """Turns the sampler to the epoch that the Trainer begins."""
        self._sampler = _lightning.live_sampler(trainer)
        if self.sampler.consumed > 0:
            self.sampler.next_epoch()
        self.apply_due(trainer, 0)
        _lightning.sync_lengths(trainer)

    def decide(self, trainer: Trainer, source: GradientNoiseScale | None) -> None:
        """Asks the rule once the last change is done, and every rank takes the same number."""
        asked = BatchSplit(self.sampler.batch_size, self.sampler.accumulate)
        since = self.samples_seen - self.last_change
        if asked != self._in_force or self.controller.dwells(self.global_batch, since):
            return
        if self.controller.rule.needs_noise and not (source and source.measured):
            return
        view = _lightning.view(trainer)
        decision = self.controller.decide(self._observe(self.global_batch, source))
        (target,) = view.largest(decision.global_batch if decision else self.global_batch)
        target = self._within_epoch(target)
        split = self.controller.split(target)
        if split != self._in_force:
            start = view.set_micro_batch(split.micro_batch, accumulate=split.accumulate)
            self._warn_of_waiting(start, split.accumulate)

    def apply_due(self, trainer: Trainer, next_batch: int) -> None:
        """Changes accumulation and hyper-parameters where the next batch has new sizes."""
        if next_batch >= _lightning.epoch_end(trainer) or self._scaling is None:
            return
        split = _sizes(self.sampler, next_batch)
        if split == self._in_force:
            return
        if split.micro_batch != self.in_force.micro_batch:
            warn_batch_norm(trainer.lightning_module)
        _lightning.view(trainer).set_accumulate(split.accumulate)
        self._in_force = split
        self._warn_of_short_epochs()
        self.last_change = self.samples_seen
        self._scaling.set_kappa(self.kappa)

    def values(self) -> dict[str, float]:
        """What there is to log of the step that was just taken."""
        values = {
            "global_batch": float(self.global_batch),
            "micro_batch": float(self.in_force.micro_batch),
            "accumulate": float(self.in_force.accumulate),
            "samples_seen": float(self.samples_seen),
        }
        if self._scaling is not None and self._scaling.last_lrs is not None:
            values["lr_scaled"] = self._scaling.last_lrs[0]
        if self.tokens_per_sample is not None:
            values["tokens_seen"] = float(self.samples_seen * self.tokens_per_sample)
        return values

    def release(self, trainer: Trainer) -> None:
        """Gives the Trainer and the optimizer back as they were."""
        _lightning.uninstall_sampler(trainer)
        if self._scaling is not None:
            self._scaling.detach()
            trainer.accumulate_grad_batches = self.controller.start.accumulate
        self._scaling = None

    def end(self) -> None:
        """Notes the position for what may be saved later."""
        if self._sampler is not None:
            self.position = self._sampler.state_dict()
        self._sampler = None

    def state_dict(self) -> dict[str, Any]:
        """Sizes, counts and the position in the data."""
        return {
            "reference_batch": self.reference_batch,
            "samples_seen": self.samples_seen,
            "last_change": self.last_change,
            "in_force": None if self._in_force is None else list(self._in_force),
            "sampler": self._sampler.state_dict() if self._sampler else self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes sizes and counts; the position waits for the loader."""
        self.reference_batch = state["reference_batch"]
        self.samples_seen = state["samples_seen"]
        self.last_change = state["last_change"]
        sizes = state["in_force"]
        self._in_force = None if sizes is None else BatchSplit(*sizes)
        self.position = state["sampler"]

    def _warn_of_waiting(self, start: int | None, accumulate: int) -> None:
        if start is not None or self.controller.rule.needs_noise:
            return  # what is estimated may wait
        common = math.lcm(self.in_force.accumulate, accumulate)
        if common > max(self.in_force.accumulate, accumulate):
            rank_zero_warn(
                f"The batch of {self.global_batch} changes with the next epoch only: from"
                f" accumulation {self.in_force.accumulate} to {accumulate} it takes a batch that is"
                f" a multiple of {common}. Hint: sizes of which one divides the other."
            )

    def _warn_of_short_epochs(self) -> None:
        samples = self.sampler.plan.num_samples
        if self.global_batch > samples and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The global batch of {self.global_batch} is more than the {samples} samples of an"
                f" epoch: each step takes {samples}, with hyper-parameters for {self.global_batch}."
                " Hint: a smaller max_global_batch, or a longer epoch."
            )

    def _within_epoch(self, global_batch: int, sampler: AdaptiveBatchSampler | None = None) -> int:
        """Keeps one step from taking, under ``drop_last``, more than there is."""
        plan = (sampler or self.sampler).plan
        return min(global_batch, plan.num_samples) if plan.drop_last else global_batch

    def _first_sizes(
        self, trainer: Trainer, sampler: AdaptiveBatchSampler, start: BatchSplit
    ) -> BatchSplit:
        if self.controller.rule.needs_noise:
            return self._in_force or start
        observed = self._observe(self.controller.global_batch(start), None)
        decision = self.controller.decide(observed)
        target = decision.global_batch if decision else self.controller.global_batch(start)
        (target,) = _lightning.view(trainer).largest(target)
        return self.controller.split(self._within_epoch(target, sampler))

    def _observe(self, global_batch: int, source: GradientNoiseScale | None) -> Observation:
        per_sample = self.tokens_per_sample
        return Observation(
            global_batch=global_batch,
            samples_seen=self.samples_seen,
            noise=source.estimate() if source and self.controller.rule.needs_noise else None,
            tokens_seen=None if per_sample is None else self.samples_seen * per_sample,
            total_samples=self.total_samples,
        )


def _sizes(sampler: AdaptiveBatchSampler, batch_idx: int) -> BatchSplit:
    return BatchSplit(*sampler.plan.segment(batch_idx)[1:])
