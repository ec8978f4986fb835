"""Gradients of the parts of one window, reduced to norms in the optimizer's own geometry."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext._lightning import View
from lightning_ext.callbacks._noise._geometry_sums import KINDS, Counts, Norms
from lightning_ext.callbacks._noise._parameter_groups import ParameterGroups
from lightning_ext.optim import CAME, base_optimizer

_SIGN_LIKE = (
    *("adam", "nadam", "radam", "sparseadam", "rmsprop", "lion", "sign"),
    *("lamb", "diffgrad", "distributedlion", "mtadam", "accumadam", "lowbitadam", "came"),
)


def geometry_of(optimizer: Optimizer) -> str:
    """The geometry that an optimizer steps in, by its class and its groups.

    ``"nuclear"`` where a group has ``algorithm="muon"`` and for ``torch.optim.Muon``, ``"l1"`` for
    Adam, RMSprop, Lion, Signum and their like, and ``"euclidean"`` otherwise. Of a wrapper it is
    that of the optimizer inside.

    Args:
        optimizer: Who steps.
    """
    optimizer = base_optimizer(optimizer)
    if _muon_groups(optimizer):
        return "nuclear"
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return "l1" if any(name.startswith(_SIGN_LIKE) for name in names) else "euclidean"


class GeometryParts:
    """Sums over the parts of one window, from which norms without noise can be had.

    Parts go to folds in turn: part j of rank r of W is number j W + r, and its fold is the
    remainder by their count. What is kept, in float32 or wider, is four folds of the gradient and
    one copy for ``"l1"``, two and two squares of each matrix's smaller side for ``"nuclear"``, and
    for ``"adam"`` one and the preconditioner.

    Args:
        parameters: What is measured.
        optimizer: Whose state preconditions under ``"adam"``, and whose groups say which matrices
            are measured under ``"nuclear"``: those with ``algorithm="muon"`` if there are any,
            otherwise all.
        geometry: ``"l1"``, ``"nuclear"`` or ``"adam"``.
        rank: Data-parallel rank.
        ranks: Data-parallel ranks.

    Raises:
        MisconfigurationException: There is nothing to measure in this geometry.
    """

    def __init__(
        self,
        parameters: ParameterGroups,
        optimizer: Optimizer,
        geometry: str,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._kind = KINDS[geometry]
        self._columns, self._cells = parameters.count, parameters.cells
        self._rank, self._ranks, self._calls = rank, ranks, 0
        self._counts = torch.zeros(2, self._kind.count, dtype=torch.float64)  # samples, parts
        self._sums = {
            index: self._kind(parameters.parameters[index], optimizer, group)
            for index, group in _measured(parameters, optimizer, geometry).items()
        }
        self._sums = {index: sums for index, sums in self._sums.items() if sums.ready}

    @torch.no_grad()
    def add(self, gradients: list[Tensor | None], samples: float, factor: float) -> None:
        """Takes in one part.

        Args:
            gradients: This part's and this rank's, whole, one for each parameter; they may be
                overwritten afterwards.
            samples: In the part; one without samples is left out.
            factor: What makes the mean over samples of them.
        """
        fold = (self._calls * self._ranks + self._rank) % self._kind.count
        self._calls += 1
        if samples <= 0:
            return
        self._counts[:, fold] += torch.tensor([samples, 1.0])
        for index, sums in self._sums.items():
            gradient = gradients[index]
            if gradient is not None:
                sums.add(fold, gradient, samples, factor)

    @torch.no_grad()
    def measure(self, seen: View) -> list[Norms] | None:
        """Norms over the parts of all ranks; to be called once.

        Args:
            seen: The view; its data-parallel group adds up the sums.

        Returns:
            Of all parameters, then of each cell; they add up. ``None`` where it would mean nothing:
            fewer than two parts, folds that cannot be compared, a gradient that is not finite, or
            no state to precondition with.
        """
        counts = self._reduce(seen)
        if not self._sums or sum(counts.parts) < 2 or _uneven(counts, self._kind.count):
            return None
        table = self._kind.table(list(self._sums.values()), counts)
        cells = torch.tensor([self._cells[i] for i in self._sums], device=table.device)
        columns = table.new_zeros(self._columns, len(table)).index_add_(0, cells, table.mT)
        rows = torch.cat([columns.sum(0, keepdim=True), columns]).tolist()
        if not all(math.isfinite(x) for x in rows[0]):
            return None
        return [self._kind.norms(row, counts) for row in rows]

    def _reduce(self, seen: View) -> Counts:
        found = self._counts
        if seen.data_parallel_size > 1:
            found = seen.gather(found.to(seen.trainer.strategy.root_device)).sum(0)
            for sums in self._sums.values():
                for total in (*sums.folds, *sums.squares):
                    dist.all_reduce(total, group=seen.data_parallel_group)
        samples, parts = found.tolist()
        folds = [fold for fold, count in enumerate(parts) if count > 0]
        return Counts(folds, [samples[i] for i in folds], [round(parts[i]) for i in folds])


def _uneven(counts: Counts, folds: int) -> bool:
    """Whether all parts are in one of several folds, or three and more are too unlike."""
    unlike = max(counts.samples) > 3 * min(counts.samples) * (1 + 1e-9)
    return len(counts.folds) < min(folds, 2) or (len(counts.folds) > 2 and unlike)


def _muon_groups(optimizer: Optimizer) -> list[int]:
    named = [i for i, x in enumerate(optimizer.param_groups) if x.get("algorithm") == "muon"]
    kinds = type(base_optimizer(optimizer)).__mro__
    if named or not any(kind.__name__ == "Muon" for kind in kinds):
        return named
    return list(range(len(optimizer.param_groups)))


def _measured(
    parameters: ParameterGroups, optimizer: Optimizer, geometry: str
) -> dict[int, dict[str, Any]]:
    """Index and group of each parameter that counts in this geometry."""
    muon = _muon_groups(optimizer) if geometry == "nuclear" else []
    pairs = zip(parameters.parameters, parameters.groups, strict=True)
    found = {
        index: optimizer.param_groups[group]
        for index, (parameter, group) in enumerate(pairs)
        if (geometry != "nuclear" or parameter.ndim == 2)
        and (not muon or group in muon)
        and parameter.requires_grad
    }
    if not found:
        raise MisconfigurationException(
            f"geometry={geometry!r} found no parameter to measure; under 'nuclear' these are"
            " matrices, of the groups with algorithm='muon' if there are any. Hint:"
            " geometry='euclidean'."
        )
    if geometry == "adam" and not all(_has_adams(optimizer, group) for group in found.values()):
        raise MisconfigurationException(
            f"geometry='adam' reads Adam's second moment, and {type(optimizer).__name__} has none"
            " of each entry. Hint: geometry='l1' for other optimizers that step by the sign."
        )
    return found


def _has_adams(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group has Adam's second moment of each entry."""
    factored = isinstance(base_optimizer(optimizer), CAME)
    return "betas" in group and group.get("algorithm") != "low_rank" and not factored
