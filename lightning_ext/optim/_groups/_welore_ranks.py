"""Ranks of the matrices of a module, by the spectra of its weights.

Source: Jaiswal et al. 2024 (WeLore, arXiv:2407.11239): one threshold for the normalized singular
    values of all matrices, and matrices that lose most of theirs are the low-rank ones.
Differs: the threshold for a wanted mean is exact, not from a grid; ranks are for optimizers, and
    weights stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ext.functional import normalized_singular_values
from lightning_ext.optim._groups._group_settings import check_module, matched
from lightning_ext.optim._groups._output_layers import output_layers
from lightning_ext.optim._groups._parameter_roles import Named, role_of, trained


def welore_ranks(
    module: nn.Module,
    *,
    threshold: float | None = None,
    mean_reduction: float | None = None,
    min_ratio: float = 0.5,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, int | None]:
    """Return a rank for each hidden matrix of a module, or ``None`` where it is to stay full.

        c = #{i: σ̂_i < t},   rank = k − c  if  c/k > min_ratio,  else None

    of the k = min(m, n) singular values on the scale of ``functional.normalized_singular_values``,
    with one threshold t for all matrices. For ``mean_reduction`` it is the one of the values
    themselves with the mean of c/k nearest to it, before ``min_ratio`` is asked.

    Args:
        module: any module, whose weights are worth looking at: trained for a while, or loaded.
            Weights of ``nn.Int8Linear`` are read; sharded ones are gathered, so call it on all
            ranks.
        threshold: t in [0, 1]; 0 cuts nothing.
        mean_reduction: wanted mean of c/k over the matrices, in [0, 1).
        min_ratio: share of its singular values that a matrix has to lose to be of low rank, in
            [0, 1).
        include: patterns (``fnmatch``) of matrices that are asked nevertheless, as an output layer.
        exclude: patterns of matrices that are not asked.

    Returns:
        By name, for the weights of linear, attention and recurrent layers that are trained, without
        embeddings and output layers, in the order of ``named_parameters``.

    Raises:
        TypeError: if ``module`` is no module, or patterns are of another type.
        ValueError: unless one of ``threshold`` and ``mean_reduction`` is given; if a number is out
            of its range, a pattern matches nothing, or there is no matrix.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = net[0].weight.data.copy_(torch.diag(torch.tensor([9.0, 2.0, 1.0, 0.0])))
        >>> welore_ranks(net, threshold=0.25), welore_ranks(net, threshold=0.2)
        ({'0.weight': 1}, {'0.weight': None})
    """
    check_module(module)
    _check(threshold, mean_reduction, min_ratio)
    spectra = {
        item.names[0]: normalized_singular_values(_whole(item.param)).cpu()
        for item in _matrices(module, include, exclude)
    }
    if threshold is None:
        assert mean_reduction is not None
        threshold = _threshold_for(list(spectra.values()), mean_reduction)
    return {name: _rank(values, threshold, min_ratio) for name, values in spectra.items()}


def _check(threshold: float | None, mean_reduction: float | None, min_ratio: float) -> None:
    if (threshold is None) == (mean_reduction is None):
        raise ValueError(
            f"threshold={threshold} and mean_reduction={mean_reduction}; give one of them. Hint:"
            " mean_reduction=0.5 finds the threshold that cuts half of all ranks"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is not allowed; it must be in [0, 1]")
    for name, value in (("mean_reduction", mean_reduction), ("min_ratio", min_ratio)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}={value} is not allowed; it must be in [0, 1)")


def _matrices(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[Named]:
    found = trained(module)
    wanted, left = matched(found, include, "include"), matched(found, exclude, "exclude")
    heads = output_layers(module).layers
    chosen = [
        item
        for item in found
        if item.param.dim() == 2
        and item.names[0] not in left
        and (item.names[0] in wanted or role_of(item, heads) == "matrix")
    ]
    if not chosen:
        raise ValueError(
            f"{type(module).__name__} has no hidden matrix that is trained. Hint: include= names"
            " those that are taken for embeddings or output layers"
        )
    return chosen


@torch.no_grad()
def _whole(param: Tensor) -> Tensor:
    """All of a weight as plain numbers: of shards, or of codes."""
    if hasattr(param, "full_tensor"):
        return param.full_tensor()
    return param.dequantize() if hasattr(param, "requantize_") else param.detach()


class _Cuts(NamedTuple):
    """Thresholds at which something is cut, in ascending order, and what is cut below each."""

    thresholds: Tensor
    reductions: Tensor


def _cuts(spectra: list[Tensor]) -> _Cuts:
    """For each of the values: the mean over matrices of the share that lies below it."""
    values = torch.cat([x.double() for x in spectra])
    shares = torch.cat([torch.full((len(x),), 1 / len(x)).double() for x in spectra])
    thresholds, places = values.unique(return_inverse=True)
    of_each = torch.zeros_like(thresholds).index_add_(0, places, shares / len(spectra))
    return _Cuts(thresholds, of_each.cumsum(0) - of_each)


def _threshold_for(spectra: list[Tensor], mean_reduction: float) -> float:
    cuts = _cuts(spectra)
    return cuts.thresholds[(cuts.reductions - mean_reduction).abs().argmin()].item()


def _rank(values: Tensor, threshold: float, min_ratio: float) -> int | None:
    cut = int((values.double() < threshold).sum())
    return len(values) - cut if cut > min_ratio * len(values) else None
