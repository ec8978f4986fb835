"""Micro-batches of ranks that share their parameters out, as parts of a global batch."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter

from lightning_ext._lightning import BatchShare, OwnGradients, View
from lightning_ext.callbacks._noise._gradient_parts import GradientParts
from lightning_ext.callbacks._noise._parameter_groups import ParameterGroups


class ShardedParts(GradientParts):
    """The gradient of every backward pass of one window, before FSDP2 reduces it over ranks.

    After a backward pass ``grad`` holds a part of the mean over ranks, so hooks hand over all
    gradients. Only norms are communicated.

    Args:
        parameters: What is measured.
        seen: The view.

    Raises:
        MisconfigurationException: FSDP2 makes something else than the mean over ranks.
    """

    def __init__(self, parameters: ParameterGroups, seen: View) -> None:
        super().__init__(parameters)
        self._seen = seen
        for factor in seen.divide_factors:
            raise MisconfigurationException(
                f"The noise scale needs the mean over {seen.data_parallel_size} ranks, and"
                f" set_gradient_divide_factor was called with {factor:g}. Hint: leave it out, and"
                " put the factor into the learning rate."
            )
        self._watch: OwnGradients | None = None

    def begin(self, seen: View, batch: object, batch_idx: int, share: BatchShare) -> None:
        """Announces a backward pass."""
        self._shares.append((share.local, share.loss_weight))
        self._open()
        if self._watch is None:
            self._watch = seen.watch_gradients(self.parameters.parameters, self._note)

    def look(self) -> None:
        """Finds what the backward pass will be through; to be called before it."""
        if self._watch is not None:
            self._watch.look()

    def detach(self) -> None:
        """Removes the hooks."""
        if self._watch is not None:
            self._watch.remove()

    def whole(self, seen: View, step_scale: float) -> Tensor:
        """Squared norms of the reduced gradient by cell of the parameters.

        Raises:
            MisconfigurationException: There are gradients that nobody reduces over the ranks, or
                that the hooks could not see.
        """
        self._check(seen)
        return self._norms(self.parameters.gradients()) / step_scale**2

    def _reduce(self) -> Tensor:
        """Squared norms of all that was found in this pass; lets go of it."""
        norms = self._norms(self._found)
        self._reduced = norms if self._reduced is None else self._reduced + norms
        self._found = [None] * len(self._found)
        self._bytes = 0
        return self._reduced

    def _norms(self, gradients: list[Tensor | None]) -> Tensor:
        # The last counts for cells without parameters.
        members = [*self.parameters.cells, self.parameters.count - 1]
        return self._seen.sq_norms([*gradients, None], members)

    def _was_seen(self, index: int) -> bool:
        return self._watch is not None and self._watch.fired(index)

    def _check(self, seen: View) -> None:
        """Compares the ranks: which gradients were seen, and those that FSDP2 does not reduce."""
        if self._watch is None:
            return
        parameters = self.parameters.parameters
        apart = [p for p in parameters if p.requires_grad and not seen.reduces(p)]
        sums = seen.sq_norms([*(p.grad for p in apart), None], [*range(len(apart)), 0])
        fired = [float(self._was_seen(index)) for index in range(len(parameters))]
        # Every rank needs the same to decide the same.
        device = seen.trainer.strategy.root_device
        row = torch.tensor(fired, dtype=torch.float64, device=device)
        found = seen.gather(torch.cat([row, sums.to(row)])).split([len(row), len(sums)], dim=1)
        known = found[0].any(0).tolist()
        self._require_seen(seen, [p for p, was in zip(parameters, known, strict=True) if not was])
        alike = torch.isclose(found[1], found[1][:1], rtol=1e-6, atol=0.0, equal_nan=True).all(0)
        self._require_reduced(
            seen, [p for p, same in zip(apart, alike.tolist(), strict=False) if not same]
        )

    def _require_reduced(self, seen: View, differing: list[Parameter]) -> None:
        if differing:
            raise MisconfigurationException(
                f"The gradients of {_names(seen, differing)} differ over the"
                f" {seen.data_parallel_size} data-parallel ranks: FSDP2 does not reduce them, and"
                " every rank trains its own copy. Hint: fully_shard the module that holds them, or"
                " requires_grad_(False)."
            )

    def _require_seen(self, seen: View, unseen: list[Parameter]) -> None:
        gradients = [p.grad for p in unseen]
        norms = seen.sq_norms([*gradients, None], [0] * (len(unseen) + 1))
        if bool(norms > 0):  # zeros stand for parameters that were not used
            raise MisconfigurationException(
                f"The gradients of {_names(seen, unseen)} are of no backward pass that the Trainer"
                " runs, and cannot be seen. Hint: one loss, returned from training_step; gradients"
                " are not to be written by hand."
            )


def _names(seen: View, parameters: list[Parameter]) -> str:
    wanted = {id(parameter) for parameter in parameters}
    return ", ".join(name for name, p in seen.local_parameters() if id(p) in wanted)
