"""The view of ZeRO-3 by DeepSpeed, whose engine holds parameters and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter

from lightning_ext._lightning._base_view import DistributedView
from lightning_ext._lightning._own_gradients import Note


class DeepSpeedView(DistributedView):
    """Every rank sees other data and holds a part of each parameter, inside of an engine.

    A parameter of the module is a placeholder without elements between two passes, and its ``grad``
    is ``None``.
    """

    @property
    def model_parallel_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Parameters are split over all ranks."""
        return (dist.group.WORLD,) if dist.group.WORLD is not None else ()

    @property
    def splits_gradients(self) -> bool:
        """Whether a backward pass leaves a part of the mean over ranks, which the engine keeps."""
        return True

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        strategy: Any = self.trainer.strategy
        return strategy.deepspeed_engine

    def set_accumulate(self, accumulate: int) -> None:
        """Changes the accumulation of the Trainer and the engine between two windows of both sizes.

        Raises:
            MisconfigurationException: A gradient would be cut or mixed here.
        """
        super().set_accumulate(accumulate)
        engine = self.engine
        samples = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
        engine.set_train_batch_size(samples * accumulate)

    def sq_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sum of squares over all ranks of parts; of no tensors, that of the engine's gradients."""
        return super().sq_norm(list(tensors) or self._gradients())

    def sq_norms(self, tensors: Sequence[Tensor | None], columns: Sequence[int]) -> Tensor:
        """Sums of squares by column, over all ranks of parts.

        Args:
            tensors: Parts that this rank holds; ``None`` counts as zeros.
            columns: The column of each, integers of at least 0.

        Returns:
            Shape (max(columns) + 1,).
        """
        return self.reduce_columns(super().sq_norms(tensors, columns), [])

    def reduce_columns(self, sums: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Adds up what the ranks found in their parts of tensors."""
        whole = sums.clone()
        dist.all_reduce(whole)
        return whole

    def watch_gradients(self, parameters: Sequence[Parameter], note: Note) -> NoReturn:
        """Refused: the engine reduces and frees a gradient as soon as it is there."""
        _refuse("gradients before they are reduced")

    def save_tensors(self, tensors: Mapping[str, Tensor]) -> NoReturn:
        """Refused: what lives beside a placeholder has no elements."""
        _refuse("tensors beside the parameters")

    def load_tensors(self, saved: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> NoReturn:
        """Refused, as :meth:`save_tensors`."""
        _refuse("tensors beside the parameters")

    def _holds_gradients(self) -> bool:
        strategy: Any = self.trainer.strategy
        return bool(strategy.holds_gradients)

    def _gradients(self) -> list[Tensor]:
        """This rank's parts of the mean gradient of a whole window, before the step."""
        from deepspeed.utils import safe_get_local_grad

        scale = float(self.engine.optimizer.loss_scale)
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        return [safe_get_local_grad(p) / scale for p in trained]


def _refuse(what: str) -> NoReturn:
    raise MisconfigurationException(
        f"DeepSpeed's engine keeps parameters and gradients to itself: {what} cannot be had from"
        " it. Hint: Trainer(strategy='fsdp2') or 'zeropp', which share them."
    )
