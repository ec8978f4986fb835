"""The global batch of a fit: its sizes now, how they change, and what has been seen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_ext import _lightning
from lightning_ext.callbacks._adaptive._controller import BatchController, Decision
from lightning_ext.callbacks._adaptive._observer import Observer
from lightning_ext.callbacks._adaptive._other_ranks import ranks_ratio
from lightning_ext.callbacks._adaptive._progress import Progress
from lightning_ext.callbacks._adaptive._rates import FollowingRates
from lightning_ext.callbacks._adaptive._warnings import warn_of_short_epochs, warn_of_waiting
from lightning_ext.callbacks._batch_norm import warn_batch_norm
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.scaling import BatchSplit, Observation

_log = logging.getLogger("lightning_ext")


class RunningBatch:
    """Sizes in force, and everything that changes with them, between two optimizer steps.

    Args:
        controller: The rule with its limits.
        rates: The hyper-parameters that follow.
        progress: Counts what was seen.
        reference_batch: The global batch that the hyper-parameters belong to.
    """

    def __init__(
        self,
        controller: BatchController,
        rates: FollowingRates,
        *,
        progress: Progress,
        reference_batch: int | None,
    ) -> None:
        self.controller = controller
        self.rates = rates
        self.observer = Observer(controller.rule.needs)
        self.progress = progress
        self._given_reference = reference_batch
        self._sampler: AdaptiveBatchSampler | None = None
        self._warned = False
        self._accumulate_grad_batches = 1  # of the Trainer, before any change
        self.reset()

    def reset(self) -> None:
        """Forgets everything that a run has brought."""
        self.reference_batch = self._given_reference
        self.last_change = 0
        self.last_decision: Decision | None = None
        self.position: dict[str, Any] | None = None  # in the data, as last known
        self._in_force: BatchSplit | None = None
        for each in (self.progress, self.rates, self.observer):
            each.reset()
        self.controller.memory.samples = None

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
        seen = _lightning.view(trainer)
        sampler.user_sizes = sampler.batch_size, trainer.accumulate_grad_batches
        start = BatchSplit(*seen.split_of(*sampler.user_sizes))
        resumes = self.begun and trainer.fit_loop.is_resuming
        self.controller.bind(start, seen.data_parallel_size, seen.accumulate_unit, resumes=resumes)
        self.reference_batch = self.reference_batch or self.controller.global_batch(start)
        sampler.reference_batch = self.reference_batch
        sampler.rescale_last_window = rescale_last_window
        self._accumulate_grad_batches = trainer.accumulate_grad_batches
        sampler.resize(*seen.loader_sizes(*self._first_sizes(trainer, sampler, start)))

    def begin(self, trainer: Trainer, on_rerun: Callable[[Any, int], None]) -> None:
        """Sets accumulation and hyper-parameters before the first batch.

        Args:
            trainer: The Trainer in ``on_train_start``.
            on_rerun: Told of a batch and its index before it is run again for lack of memory.
        """
        self._sampler = _lightning.live_sampler(trainer)
        if self._in_force is None or not trainer.fit_loop.is_resuming:
            self._in_force = self._split(trainer, 0)
            self.sampler.set_epoch(trainer.current_epoch)
        _lightning.view(trainer).set_accumulate(self._in_force.accumulate)
        self._warn_of_short_epochs()
        # An optimizer's state from a run without us belongs to the reference batch.
        ours = trainer.fit_loop.is_resuming and self.position is not None
        self.rates.begin(
            trainer.optimizers[0],
            reference_batch=self.reference_batch or self.global_batch,
            before=self.kappa * ranks_ratio(self) if ours else 1.0,
            kappa=self.kappa,
        )
        self.observer.note_lr(trainer)
        self.controller.memory.begin(trainer, on_rerun)
        self._ask_for(trainer, self.in_force, self.global_batch, "memory")

    def begin_epoch(self, trainer: Trainer) -> None:
        """Turns the sampler to the epoch that the Trainer begins."""
        self._sampler = _lightning.live_sampler(trainer)
        if self.sampler.consumed > 0:
            self.sampler.next_epoch()
        self.observer.pause()
        self.apply_due(trainer, 0)
        _lightning.sync_lengths(trainer)

    def worth(self, samples: int) -> float:
        """What a step of so many samples counts for schedules and the end of the run."""
        return self.progress.worth(samples, kappa=self.kappa, gain=self.rates.gain)

    def end_step(self, trainer: Trainer, window_samples: int) -> None:
        """Counts an optimizer step that took so many samples."""
        self.progress.add(window_samples, self.worth(window_samples))
        self.observer.end_step(
            trainer,
            self.in_force,
            samples=window_samples,
            reference_batch=self.reference_batch or self.global_batch,
            whole=window_samples == self.global_batch,
        )

    def decide(self, trainer: Trainer, source: GradientNoiseScale | None) -> None:
        """Asks the rule, and has every rank ask for the same sizes once the last are in force."""
        self.rates.measure(source)
        if self._split(trainer).micro_batch > self.controller.largest_micro_batch:
            split = self.controller.split(self.global_batch)
            self._ask_for(trainer, split, self.global_batch, "out of memory")
        if not (self._may_change(trainer) or self.controller.damps_lr):
            return
        observation = self._observe(trainer, self.global_batch, source)
        decision = observation and self.controller.decide(observation)
        if not decision:
            return
        self.last_decision = decision
        if self.controller.damps_lr:
            largest = self.controller.reachable(self.sampler.plan.num_samples)
            self.rates.damp(largest / decision.proposal.target_batch)
        if self._may_change(trainer):
            (target,) = _lightning.view(trainer).largest(decision.global_batch)
            target = self.sampler.plan.largest_step(target)
            split = self.controller.split(target)
            self._ask_for(trainer, split, target, decision.proposal.reason)

    def _split(self, trainer: Trainer, batch: int | None = None) -> BatchSplit:
        """Sizes of a batch of the epoch, or those last asked for."""
        asked = self.sampler.batch_size, self.sampler.accumulate
        sizes = asked if batch is None else self.sampler.plan.segment(batch)[1:]
        return BatchSplit(*_lightning.view(trainer).split_of(*sizes))

    def _may_change(self, trainer: Trainer) -> bool:
        since = self.progress.samples_seen - self.last_change
        dwells = self.controller.dwells(self.global_batch, since)
        return self._split(trainer) == self._in_force and not dwells

    def _ask_for(
        self, trainer: Trainer, wanted: BatchSplit, global_batch: int, reason: str
    ) -> None:
        """Has the sampler go to sizes, or to those of the same batch that fit into memory."""
        if wanted == self._in_force and reason != "memory":
            return
        again = partial(self.controller.split, global_batch)
        split = self.controller.memory.fits(trainer, wanted, again)
        if split == self._in_force:
            return
        start = _lightning.view(trainer).set_micro_batch(split[0], accumulate=split.accumulate)
        if start is None and not self.controller.estimated:  # what is estimated may wait
            warn_of_waiting(self.global_batch, self.in_force.accumulate, split.accumulate)
        sizes = self.global_batch, self.controller.global_batch(split), self.progress.samples_seen
        rank_zero_only(_log.info)("global batch %d → %d after %d samples: %s", *sizes, reason)

    def apply_due(self, trainer: Trainer, next_batch: int) -> None:
        """Changes accumulation and hyper-parameters where the next batch has new sizes."""
        if next_batch >= _lightning.epoch_end(trainer):
            return
        split = self._split(trainer, next_batch)
        if split == self._in_force:
            return
        if split.micro_batch != self.in_force.micro_batch:
            warn_batch_norm(trainer.lightning_module)
        _lightning.view(trainer).set_accumulate(split.accumulate)
        self._in_force = split
        self._warn_of_short_epochs()
        self.last_change = self.progress.samples_seen
        self.rates.set_kappa(self.kappa)

    def values(self) -> dict[str, float]:
        """What there is to log of the step that was just taken."""
        sizes = {"global_batch": self.global_batch, **self.in_force._asdict()}
        values = {name: float(size) for name, size in sizes.items()} | self.progress.values()
        if self.rates.last_lr is not None:
            values["lr_scaled"] = self.rates.last_lr
        return values | (self.last_decision.values() if self.last_decision else {})

    def release(self, trainer: Trainer) -> None:
        """Gives the Trainer and the optimizer back as they were."""
        self.controller.memory.end()
        _lightning.uninstall_sampler(trainer)
        if self.rates.release():
            trainer.accumulate_grad_batches = self._accumulate_grad_batches

    def end(self) -> None:
        """Notes the position for what may be saved later."""
        self.position = self._sampler.state_dict() if self._sampler else self.position
        self._sampler = None

    def state_dict(self) -> dict[str, Any]:
        """Sizes, counts and the position in the data."""
        return {
            "reference_batch": self.reference_batch,
            "progress": self.progress.state_dict(),
            "rates": self.rates.state_dict(),
            "observer": self.observer.state_dict(),
            "ceiling": self.controller.memory.samples,
            "last_change": self.last_change,
            "in_force": None if self._in_force is None else list(self._in_force),
            "sampler": self._sampler.state_dict() if self._sampler else self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes sizes and counts; the position waits for the loader."""
        self.reference_batch = state["reference_batch"]
        self.progress.load_state_dict(state["progress"])
        self.rates.load_state_dict(state["rates"])
        self.observer.load_state_dict(state["observer"])
        self.controller.memory.samples = state["ceiling"]
        self.last_change = state["last_change"]
        sizes = state["in_force"]
        self._in_force = None if sizes is None else BatchSplit(*sizes)
        self.position = state["sampler"]

    def _warn_of_short_epochs(self) -> None:
        samples = self.sampler.plan.num_samples
        self._warned = self._warned or warn_of_short_epochs(self.global_batch, samples)

    def _first_sizes(
        self, trainer: Trainer, sampler: AdaptiveBatchSampler, start: BatchSplit
    ) -> BatchSplit:
        observed = self._observe(trainer, self.controller.global_batch(start), None)
        if self.controller.estimated or observed is None:
            return self._in_force or start
        decision = self.last_decision = self.controller.decide(observed)
        target = decision.global_batch if decision else self.controller.global_batch(start)
        (target,) = _lightning.view(trainer).largest(target)
        return self.controller.split(sampler.plan.largest_step(target))

    def _observe(
        self, trainer: Trainer, global_batch: int, source: GradientNoiseScale | None
    ) -> Observation | None:
        fields = self.observer.observe(trainer, source, self.controller.made_of)
        if fields is None:
            return None
        return Observation(
            global_batch=global_batch,
            reference_batch=self.reference_batch,
            max_global_batch=self.controller.max_global_batch,
            **self.progress.position(),
            **fields,
        )
