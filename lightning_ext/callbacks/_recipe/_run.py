"""What a run looks like to the checks of LargeBatchRecipe: sizes, data, optimizers, neighbours."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_ext import _lightning
from lightning_ext.callbacks._adaptive_batch_size import AdaptiveBatchSize
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.callbacks._trainer_callbacks import callbacks_of
from lightning_ext.scaling import NoiseScale

LARGE_KAPPA = 8
LARGE_BATCH = 1024


class Advice(NamedTuple):
    """One remark on a run.

    Args:
        topic: What it is about.
        severity: ``"note"`` (to know), ``"advice"`` (worth changing) or ``"warning"`` (wrong, or
            likely to fail).
        found: What the run has.
        recommended: What to have instead.
        source: The paper.
    """

    topic: str
    severity: str
    found: str
    recommended: str
    source: str


class Sizes(NamedTuple):
    """The three factors of the global batch."""

    micro_batch: int
    accumulate: int
    data_parallel_size: int

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step."""
        return math.prod(self)


@dataclass(frozen=True)
class RecipeRun:
    """A run in the middle of fit, and what was said of it beforehand.

    Args:
        trainer: The Trainer.
        module: The module that it trains.
        sizes: Those of the present batch.
        began_with: The global batch that the run began with.
        given_reference: The batch that the recipe belongs to, where the user has said so.
        reference_lr: The learning rate of the recipe, where the user has said so.
        clipped: Fraction of steps that were clipped, where it was counted.
        steps: Optimizer steps that it was counted over.
    """

    trainer: Trainer
    module: LightningModule
    sizes: Sizes
    began_with: int
    given_reference: int | None = None
    reference_lr: float | None = None
    clipped: float | None = None
    steps: int = 0

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step."""
        return self.sizes.global_batch

    @property
    def adaptive(self) -> AdaptiveBatchSize | None:
        """The callback that changes the batch, if there is one."""
        return next((c for c in callbacks_of(self.trainer, AdaptiveBatchSize)), None)

    @property
    def hyperparameter_batch(self) -> int:
        """The batch that the optimizer's values belong to; AdaptiveBatchSize scales from there."""
        if self.adaptive is None or self.adaptive.batch.reference_batch is None:
            return self.global_batch
        return self.adaptive.batch.reference_batch

    @property
    def reference_batch(self) -> int | None:
        """The batch that the recipe belongs to, as far as it is known."""
        if self.given_reference is not None or self.adaptive is None:
            return self.given_reference
        return self.adaptive.batch.reference_batch

    @property
    def begins_large(self) -> bool:
        """Whether the first steps are large: 8 times the reference, or 1024 where it is not known.

        A batch of 1024 that is also the reference's needs nothing that the reference did not.
        """
        if self.reference_batch is None:
            return self.began_with >= LARGE_BATCH
        kappa = self.began_with / self.reference_batch
        return kappa >= LARGE_KAPPA or (kappa > 1 and self.began_with >= LARGE_BATCH)

    @property
    def batch_changes(self) -> bool:
        """Whether the global batch will not stay as it is."""
        if any(callbacks_of(self.trainer, GradientAccumulationScheduler)):
            return True
        rule = None if self.adaptive is None else self.adaptive.batch.controller.rule
        return rule is not None and len(getattr(rule, "global_batches", (0, 0))) > 1

    @property
    def may_tell_more(self) -> bool:
        """Whether there will be something to see later that there is not yet."""
        return self.batch_changes or any(callbacks_of(self.trainer, GradientNoiseScale))

    @property
    def noise(self) -> NoiseScale | None:
        """The measured noise scale, once it has an upper limit."""
        return known_noise(self.trainer)

    @property
    def loader(self) -> DataLoader[Any] | None:
        """The train loader, if there is one only and it is torch's."""
        return the_loader(self.trainer)

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples of an epoch over all ranks, as far as they are known."""
        sampler = _lightning.live_sampler(self.trainer)
        if sampler is not None:
            return sampler.plan.num_samples
        order = order_of(self.loader)
        return len(order) * self.sizes.data_parallel_size if isinstance(order, Sized) else None

    @property
    def total_steps(self) -> float:
        """Optimizer steps of the run at the present batch; infinite where nothing says."""
        if any(callbacks_of(self.trainer, GradientAccumulationScheduler)):
            return math.inf
        steps = self.trainer.estimated_stepping_batches
        return steps if steps > 0 else math.inf

    def layers(self, *kinds: type[Any]) -> dict[str, Any]:
        """Layers of these classes by name."""
        return {n: layer for n, layer in self.module.named_modules() if isinstance(layer, kinds)}


def sizes_of(trainer: Trainer, batch: Any, batch_idx: int) -> Sizes | None:
    """The sizes of the present batch, as planned; ``None`` where they cannot be told.

    Args:
        trainer: The Trainer in fit.
        batch: The batch, for loaders that do not say how large theirs are.
        batch_idx: Its index in the epoch.
    """
    view, sampler = _lightning.view(trainer), _lightning.live_sampler(trainer)
    accumulate = trainer.accumulate_grad_batches
    if sampler is not None:
        _, micro_batch, planned = sampler.plan.segment(batch_idx)
        accumulate = planned if sampler.tracked else accumulate
    else:
        loader = the_loader(trainer)
        stated = getattr(loader, "batch_size", None)
        stated = stated or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        try:
            micro_batch = stated or _lightning.batch_share(trainer, batch, batch_idx).local
        except MisconfigurationException:  # a batch without a tensor
            return None
    return Sizes(*view.split_of(micro_batch, accumulate), view.data_parallel_size)


def the_loader(trainer: Trainer) -> DataLoader[Any] | None:
    """The train loader, if there is one only and it is torch's."""
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    if len(loaders) == 1 and isinstance(loaders[0], DataLoader):
        return loaders[0]
    return None


def order_of(loader: DataLoader[Any] | None) -> Any:
    """The sampler that orders the samples; ``None`` for streams and unknown batch samplers."""
    if loader is None or isinstance(loader.dataset, IterableDataset):
        return None
    return getattr(loader.batch_sampler, "sampler", None)


def known_noise(trainer: Trainer) -> NoiseScale | None:
    """The noise scale that one of the callbacks measures, once it has an upper limit."""
    for source in callbacks_of(trainer, GradientNoiseScale):
        if source.measured:
            noise = source.estimate()
            if 0 < noise.value < math.inf and noise.high < math.inf:
                return noise
    return None
