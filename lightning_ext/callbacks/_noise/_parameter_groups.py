"""The parameters that are measured, and the subsets of them that are measured by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import functional, kernels


class ParameterGroups:
    """Parameters of an optimizer in one list, cut into cells, and subsets that are made of cells.

    A cell holds the parameters that are in the same subsets, so that one pass over all parameters
    gives the sums of every subset.

    Args:
        optimizer: Whose parameters are measured.
        per_group: Take each of its groups as a subset, ``group_0`` and so on.
        modules: Take the parameters of each of these as a subset, ``module_<name>``. A parameter
            counts with the first module that holds it.
        every_cell: Have a cell for each kind of parameter that there could be, so that ranks which
            hold other parameters have the same cells.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        per_group: bool = False,
        modules: Mapping[str, nn.Module] | None = None,
        every_cell: bool = False,
    ) -> None:
        groups: list[list[Parameter]] = [group["params"] for group in optimizer.param_groups]
        self.parameters = [parameter for group in groups for parameter in group]
        self.groups = [index for index, group in enumerate(groups) for _ in group]
        names = [f"group_{index}" for index in range(len(groups))] if per_group else []
        owners = _owners(modules or {})
        memberships = [
            ((f"group_{index}",) if per_group else ()) + owners.get(id(parameter), ())
            for index, parameter in zip(self.groups, self.parameters, strict=True)
        ]
        if every_cell:
            owned: list[tuple[str, ...]] = [(), *((f"module_{name}",) for name in modules or {})]
            grouped: list[tuple[str, ...]] = [(name,) for name in names] or [()]
            kinds = [group + owner for group, owner in product(grouped, owned)]
        else:
            kinds = list(dict.fromkeys(memberships)) or [()]
        self.count = len(kinds)
        self.cells = [kinds.index(kind) for kind in memberships]
        names += [f"module_{name}" for name in modules or {}]
        self.subsets = {name: [i for i, kind in enumerate(kinds) if name in kind] for name in names}

    def gradients(self) -> list[Tensor | None]:
        """What is in ``grad`` now."""
        return [parameter.grad for parameter in self.parameters]

    def sq_norms(self, gradients: Sequence[Tensor | None], *, foreach: bool = True) -> Tensor:
        """Squared norms by cell, shape (count,).

        Args:
            gradients: One for each parameter.
            foreach: Take them together; ``False`` where they are mapped over.
        """
        # The last counts for cells without parameters.
        members = [*self.cells, self.count - 1]
        if not foreach:
            return functional.sq_norms([*gradients, None], members)
        with torch.no_grad():
            return kernels.sq_norms([*gradients, None], members)


def submodules(module: nn.Module, wanted: bool | Sequence[str]) -> dict[str, nn.Module]:
    """Submodules by name.

    Args:
        module: Where they are.
        wanted: Their names; ``True`` for the first ones below it that are more than one.

    Raises:
        MisconfigurationException: There is none of that name.
    """
    if wanted is True:
        return _first_fork(module)
    known = dict(module.named_modules())
    missing = [name for name in wanted or () if name not in known]
    if missing:
        raise MisconfigurationException(
            f"per_module names {missing}; the first submodules of {type(module).__name__} are"
            f" {list(_first_fork(module))}. Hint: names as in named_modules()."
        )
    return {name: known[name] for name in wanted or ()}


def zeros_for_none(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, with zeros where there is none."""
    pairs = zip(gradients, like, strict=True)
    return [torch.zeros_like(y) if x is None else x for x, y in pairs]


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for name, module in modules.items():
        for parameter in module.parameters():
            found.setdefault(id(parameter), (f"module_{name}",))
    return found


def _first_fork(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Children that have parameters, of the first module on the way down that has several."""
    children = {
        prefix + name: child
        for name, child in module.named_children()
        if any(True for _ in child.parameters())
    }
    if len(children) == 1:
        ((name, child),) = children.items()
        return _first_fork(child, name + ".") or children
    return children
