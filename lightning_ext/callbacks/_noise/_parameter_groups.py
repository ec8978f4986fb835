"""The parameters that are measured, with the group of the optimizer that each belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import functional


class ParameterGroups:
    """Parameters of an optimizer in one list, and sums over its groups.

    Args:
        optimizer: Whose parameters are measured.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        groups: list[list[Parameter]] = [group["params"] for group in optimizer.param_groups]
        self.count = len(groups)
        self.parameters = [parameter for group in groups for parameter in group]
        self.groups = [index for index, group in enumerate(groups) for _ in group]

    def gradients(self) -> list[Tensor | None]:
        """What is in ``grad`` now."""
        return [parameter.grad for parameter in self.parameters]

    def sq_norms(self, gradients: Sequence[Tensor | None], *, foreach: bool = True) -> Tensor:
        """Squared norms by group, shape (count,).

        Args:
            gradients: One for each parameter.
            foreach: Take them together; ``False`` where they are mapped over.
        """
        # The last counts for a group without parameters.
        members = [*self.groups, self.count - 1]
        return functional.sq_norms([*gradients, None], members, foreach=foreach)


def zeros_for_none(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, with zeros where there is none."""
    pairs = zip(gradients, like, strict=True)
    return [torch.zeros_like(y) if x is None else x for x, y in pairs]
