"""What the groups of an optimizer with subspaces may hold, and what may not be meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_ext.optim._groups._parameter_roles import is_in_or_out
from lightning_ext.optim._low_bit._moments import STATE_DTYPES
from lightning_ext.optim._low_rank._states import layout_of, matrix_shape
from lightning_ext.optim._matrix._owners import refuse_other_splits
from lightning_ext.optim._step._checks import ABOVE_0, Range

RANGES = {
    "rank": Range(
        lambda x: x > 0 and (isinstance(x, int) or x < 1),
        "be a whole number above 0, as 128, or a share of the shorter side between 0 and 1, as"
        " 0.25. Hint: 1 is a rank, 1.0 is neither",
    ),
    "update_proj_gap": Range(lambda x: x >= 1 and x == int(x), "be a whole number of at least 1"),
    "scale": ABOVE_0,
    "norm_growth": Range(lambda x: x >= 1, "be at least 1"),
    "cos_threshold": Range(lambda x: 0 < x <= 1, "lie in (0, 1]"),
    "seed": Range(lambda x: 0 <= x < 2**64 and x == int(x), "lie in [0, 2**64)"),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "algorithm": ("low_rank", "adamw"),
    "subspace": ("svd", "randomized", "iteration"),
    "projection_dtype": ("float32", "int4"),
    "state_dtype": STATE_DTYPES,
    "scale_type": ("channel", "tensor"),
    "spread_refresh": (True, False),
    "alpha_in_residual": (True, False),
    "scale_front": (True, False),
}


def check_low_rank_group(name: str, group: dict[str, Any]) -> None:
    """Refuse a choice that there is not, and a matrix that is split along its columns.

    Args:
        name: of the optimizer.
        group: the group.

    Raises:
        ValueError: if there is one.
    """
    for setting, allowed in _CHOICES.items():
        if setting in group and not any(
            group[setting] is x or group[setting] == x for x in allowed
        ):
            choices = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} got {setting}={group[setting]!r}; choose one of {choices}")
    names = group.get("param_names")
    for i, param in enumerate(group["params"]):
        if isinstance(param, Tensor) and param.is_floating_point() and layout_of(param, group):
            refuse_other_splits(name, param, repr(names[i]) if names else f"parameter {i}")


def warn_of_groups(name: str, groups: Sequence[dict[str, Any]], *, plain: bool) -> None:
    """Warn where embeddings and output layers seem to get a subspace, once.

    Args:
        name: of the optimizer.
        groups: those that are new.
        plain: no group says its ``algorithm``, as where ``model.parameters()`` were given.
    """
    hint = f"Hint: {name}(optim.param_groups_for(module, {name}))"
    if plain and any(len({x.dim() > 1 for x in g["params"]}) > 1 for g in groups):
        warnings.warn(
            f"{name} got vectors and matrices in one group, as model.parameters() are, and gives"
            " every matrix a subspace, also embeddings and output layers, which should go to"
            f' AdamW. {hint}, or algorithm="low_rank" in the group if that is meant',
            stacklevel=4,
        )
        return
    found = [x for group in groups for x in _embeddings_and_outputs(group)]
    if found:
        shown = ", ".join(map(repr, found[:3])) + (" and others" if len(found) > 3 else "")
        warnings.warn(
            f"{name} gives a subspace to {shown}, by the name an embedding or an output layer."
            f" {hint} gives those to AdamW; it takes head= and adamw= where names do not tell",
            stacklevel=4,
        )


def warn_without_subspace(name: str, groups: Sequence[dict[str, Any]]) -> None:
    """Warn where ranks leave no matrix a subspace, so that all goes to AdamW at another's rate.

    Args:
        name: of the optimizer.
        groups: all of them.
    """
    pairs = [
        (min(matrix_shape(x)), group)
        for group in groups
        if group["algorithm"] == "low_rank"
        for x in group["params"]
        if x.dim() > 1 and x.numel()
    ]
    short, group = max(pairs, key=lambda x: x[0], default=(0, {}))
    if short > 1:
        warnings.warn(
            f"{name} has no matrix with a subspace, and is AdamW at lr={float(group['lr']):g}:"
            f" rank={group['rank']} is not below any shorter side, of which the longest has"
            f" {short}. Hint: rank=0.25, a quarter of each",
            stacklevel=5,
        )


def _embeddings_and_outputs(group: dict[str, Any]) -> list[str]:
    """Names of matrices with a subspace that are called so."""
    pairs = zip(group.get("param_names", ()), group["params"], strict=False)
    return [name for name, x in pairs if is_in_or_out(name) and layout_of(x, group)]
