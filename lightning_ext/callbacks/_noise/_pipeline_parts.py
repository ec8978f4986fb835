"""Micro-batches that pass through stages of several ranks, as parts of a global batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ext._lightning import BatchShare, PipelineView, View
from lightning_ext.callbacks._noise._parameter_groups import ParameterGroups
from lightning_ext.callbacks._noise._sharded_parts import ShardedParts


class PipelineParts(ShardedParts):
    """The gradient of every micro-batch of one window, made stage by stage in any order.

    What one stage alone has is squared when the backward pass through the stage is over. The
    gradient of what several stages have, or what is outside of them, is kept for each micro-batch
    of a batch, and summed over the ranks that have made a part of it before it is squared.

    Args:
        parameters: What is measured, in cells that are the same on all ranks.
        seen: The view.
    """

    def __init__(self, parameters: ParameterGroups, seen: PipelineView) -> None:
        super().__init__(parameters, seen)
        self._pipeline = seen
        names = {id(p): name for name, p in seen.local_parameters()}
        own = {names[id(p)]: index for index, p in enumerate(parameters.parameters)}
        self._shared = [own.get(name) for name in seen.shared_names]  # alike on all ranks
        self._own_shared = {index for index in self._shared if index is not None}
        self._leave: Callable[[], None] | None = None
        self._micro_batch: int | None = None
        self._rows: dict[int, Tensor] = {}
        self._sums: dict[int, dict[int, Tensor]] = defaultdict(dict)  # by parameter, micro-batch

    def begin(self, seen: View, batch: object, batch_idx: int, share: BatchShare) -> None:
        """Announces the backward passes of a batch."""
        super().begin(seen, batch, batch_idx, share)
        if self._leave is None:
            self._leave = self._pipeline.micro_batches.follow(self._next_pass)

    @torch.no_grad()
    def end(self) -> None:
        """Closes the batch: a part for each of its micro-batches."""
        self._close_pass()
        sizes = self._pipeline.micro_batches
        samples, weight = self._shares.pop()
        self._shares += [(samples / sizes.ran, weight * sizes.count / sizes.ran)] * sizes.ran
        self._add_shared()
        none = self.parameters.sq_norms([None] * len(self.parameters.parameters))
        rows = torch.stack([self._rows.get(i, none) for i in range(sizes.ran)])
        self._sq_norms += self._pipeline.sum_over_stages(rows).unbind()
        self._rows = {}

    def detach(self) -> None:
        """Removes the hooks."""
        super().detach()
        if self._leave is not None:
            self._leave()

    def _was_seen(self, index: int) -> bool:
        return index in self._own_shared or super()._was_seen(index)

    def _next_pass(self) -> None:
        with torch.no_grad():
            self._close_pass()
        self.look()

    def _note(self, index: int, gradient: Tensor) -> None:
        self._micro_batch = self._pipeline.micro_batches.running
        known = self._found[index]  # by an earlier part of the same pass, under checkpointing
        self._found[index] = gradient if known is None else known + gradient

    def _close_pass(self) -> None:
        index, self._micro_batch = self._micro_batch, None
        if index is None:
            return
        for place in self._own_shared:
            gradient = self._found[place]
            if gradient is not None:
                known = self._sums[place].get(index)
                self._sums[place][index] = gradient if known is None else known + gradient
                self._found[place] = None
        self._add_row(index, self._found)
        self._open()

    def _add_row(self, micro_batch: int, gradients: list[Tensor | None]) -> None:
        row = self.parameters.sq_norms(gradients)
        known = self._rows.get(micro_batch)
        self._rows[micro_batch] = row if known is None else known + row

    def _add_shared(self) -> None:
        """Squares what several stages may have, each once over all ranks."""
        makers = self._makers() if self._shared else []
        for place, (ranks, numel, wide) in zip(self._shared, makers, strict=True):
            gradients = {} if place is None else self._sums.pop(place, {})
            if ranks > 1:
                dtype = torch.float64 if wide else torch.float32
                gradients = self._summed(place, gradients, numel // ranks, dtype)
            for micro_batch, gradient in gradients.items():
                found: list[Tensor | None] = [None] * len(self._found)
                found[place or 0] = gradient
                self._add_row(micro_batch, found)

    def _makers(self) -> list[list[int]]:
        """Of each such parameter: ranks with a gradient, their elements, those in float64."""
        rows = []
        for place in self._shared:
            gradients = {} if place is None else self._sums.get(place, {})
            one = next(iter(gradients.values()), None)
            is_wide = one is not None and one.dtype == torch.float64
            rows.append([one is not None, 0 if one is None else one.numel(), is_wide])
        device = self._pipeline.trainer.strategy.root_device
        own = torch.tensor(rows, dtype=torch.int64, device=device)
        found: list[list[int]] = self._pipeline.sum_over_stages(own).tolist()
        return found

    def _summed(
        self, place: int | None, gradients: dict[int, Tensor], numel: int, dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """The sums over ranks, on the one that counts the parameter; on others nothing."""
        count = self._pipeline.micro_batches.ran
        device = self._pipeline.trainer.strategy.root_device
        own = torch.zeros(count, numel, dtype=dtype, device=device)
        for index, gradient in gradients.items():
            own[index] = gradient.flatten()
        whole = self._pipeline.sum_over_stages(own)
        parameters = [] if place is None else [self.parameters.parameters[place]]
        return dict(enumerate(whole)) if self._pipeline.counted(parameters) else {}
