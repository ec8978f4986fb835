"""Linear layers of a model changed to ones with weights of 8 bits, and back.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296).
Differs: rows need not be whole blocks; embeddings and norm layers are left, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

from lightning_ext.nn._int8_linear import Int8Linear
from lightning_ext.nn._int8_weight import Int8Weight

M = TypeVar("M", bound=nn.Module)


def convert_int8_linear(
    module: M,
    *,
    block_size: int = 256,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
) -> M:
    """Change each ``torch.nn.Linear`` of a module to an ``Int8Linear``, in place, to nearest codes.

    Hooks, modes, names and biases stay, and a weight that several linear layers share is shared.
    Subclasses of ``torch.nn.Linear`` and layers that are ``Int8Linear`` already are left alone.
    Weights are new parameters: convert before an optimizer, DDP or a Trainer's fit has the old.

    Args:
        module: the model, or a single layer.
        block_size: entries of a row that share scale and shift, a power of two from 16 to 4096.
        include: patterns (``fnmatch``) of the names of layers.
        exclude: patterns of the names of layers that are left.

    Returns:
        The module.

    Raises:
        TypeError: if a weight is a DTensor, or patterns are a single string.
        ValueError: if a weight is shared with what is not converted, a pattern matches no linear
            layer, or the block size is not allowed. Nothing has then changed.

    Example:
        >>> net = convert_int8_linear(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [type(layer).__name__ for layer in net]
        ['Int8Linear', 'ReLU', 'Int8Linear']
    """
    chosen = _chosen(module, _patterns("include", include), _patterns("exclude", exclude))
    _check_sharing(module, chosen)
    made: dict[Tensor, nn.Parameter] = {}
    for layer in chosen.values():
        old = layer.weight
        if old not in made:
            new = Int8Weight.of(old.detach(), block_size=block_size)
            made[old] = nn.Parameter(new, old.requires_grad)
    for layer in chosen.values():
        layer.weight = made[layer.weight]
        layer.__class__ = Int8Linear
    return module


def undo_int8_linear(module: M) -> M:
    """Change each ``Int8Linear`` of a module back to a ``torch.nn.Linear``, in place.

    Weights get the numbers that their codes stand for, so outputs stay exactly the same.

    Args:
        module: the model, or a single layer.

    Returns:
        The module.

    Raises:
        TypeError: if an ``Int8Linear`` has a weight of floats, as where one was put in its place.
            Nothing has then changed.

    Example:
        >>> undo_int8_linear(convert_int8_linear(nn.Linear(8, 2)))
        Linear(in_features=8, out_features=2, bias=True)
    """
    made: dict[Tensor, nn.Parameter] = {}
    layers = {name: x for name, x in module.named_modules() if type(x) is Int8Linear}
    for name, layer in layers.items():
        old: Tensor = layer.weight
        if not isinstance(old, Int8Weight):
            raise TypeError(
                f"{name!r} is an Int8Linear with a weight of floats. Hint: give it"
                " torch.nn.Parameter(Int8Weight.of(weight.detach()))"
            )
        made[old] = nn.Parameter(old.dequantize(), old.requires_grad)
    for layer in layers.values():
        plain: nn.Linear = layer
        plain.weight = made[plain.weight]
        plain.__class__ = nn.Linear
    return module


def _patterns(name: str, given: Iterable[str]) -> list[str]:
    if isinstance(given, str):
        raise TypeError(f"{name}={given!r}; give a list of patterns, such as [{given!r}]")
    return list(given)


def _chosen(module: nn.Module, include: list[str], exclude: list[str]) -> dict[str, nn.Linear]:
    """Layers to convert, by name."""
    layers = {name: x for name, x in module.named_modules() if isinstance(x, nn.Linear)}
    for pattern in [*include, *exclude]:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"{pattern!r} matches no linear layer; there are {', '.join(layers) or 'none'}"
            )
    return {
        name: x
        for name, x in layers.items()
        if type(x) is nn.Linear
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }


def _check_sharing(module: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """Refuse weights that somebody else has, too."""
    names = {layer.weight: name for name, layer in chosen.items()}
    for path, owner in module.named_modules():
        for leaf, param in owner.named_parameters(recurse=False):
            if param in names and (path not in chosen or leaf != "weight"):
                raise ValueError(
                    f"{names[param]!r} shares its weight with {path!r} ({type(owner).__name__}),"
                    f" which is not converted. Hint: exclude=[{names[param]!r}]"
                )
