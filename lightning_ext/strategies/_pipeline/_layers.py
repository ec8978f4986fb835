"""Which submodule is split, and which layers it has."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn


class Layers(NamedTuple):
    """A submodule, and the layers that its forward calls one after the other.

    Args:
        name: Of the submodule within the LightningModule; empty for itself.
        owner: The submodule.
        members: Its layers in order.
        unpacks: Whether a tuple of one layer becomes several arguments of the next.
    """

    name: str
    owner: nn.Module
    members: tuple[nn.Module, ...]
    unpacks: bool


def find_layers(root: nn.Module, name: str | None) -> Layers:
    """Finds the submodule that is split.

    Args:
        root: The LightningModule.
        name: Of the submodule; ``None``: the only one that can be split.

    Raises:
        MisconfigurationException: There is none, or several, or it has no layers, or is compiled.
    """
    found = dict(root.named_modules())
    if name is None:
        name = _only_one(root, _candidates(root))
    elif name not in found:
        raise MisconfigurationException(_refusal(root, f"module={name!r} is not in it"))
    owner: Any = found[name]
    _require_uncompiled(name, owner)
    declares = hasattr(owner, "pipeline_layers")
    if not declares and not _is_plain_sequence(owner):
        raise MisconfigurationException(
            _refusal(root, f"module={name!r} is a {type(owner).__name__} without them")
        )
    members = tuple(owner.pipeline_layers() if declares else owner)
    _check(members, name)
    return Layers(name, owner, members, unpacks=declares)


def _require_uncompiled(name: str, owner: Any) -> None:
    around = hasattr(owner, "_orig_mod") or name.endswith("_orig_mod")
    if around or getattr(owner, "_compiled_call_impl", None) is not None:
        raise MisconfigurationException(
            f"module={name!r} is compiled as a whole, and is to run layer by layer. Allowed are"
            " compiled layers. Hint: for layer in net: layer.compile()."
        )


def _check(members: tuple[Any, ...], name: str) -> None:
    wrong = [type(one).__name__ for one in members if not isinstance(one, nn.Module)]
    if wrong or not members:
        raise MisconfigurationException(
            f"The layers of module={name!r} are {wrong[:3] or 'none'}; allowed are one or more"
            " nn.Module. Hint: pipeline_layers() returns them in the order in which they run."
        )


def _candidates(root: nn.Module) -> list[str]:
    """Those that declare their layers, else the outermost sequences."""
    declared = [name for name, one in root.named_modules() if hasattr(one, "pipeline_layers")]
    return declared or _sequences(root, "")


def _sequences(module: nn.Module, prefix: str) -> list[str]:
    if _is_plain_sequence(module):
        return [prefix]
    return [
        found
        for name, child in module.named_children()
        for found in _sequences(child, f"{prefix}.{name}" if prefix else name)
    ]


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _only_one(root: nn.Module, candidates: list[str]) -> str:
    if len(candidates) != 1:
        raise MisconfigurationException(_refusal(root, "module= does not say which is split"))
    return candidates[0]


def _refusal(root: nn.Module, what: str) -> str:
    found = _candidates(root)
    named = ", ".join(map(repr, found[:10])) or "none here"
    hint = "put the layers into an nn.Sequential, or give their owner that method"
    if found:
        hint = f"PipelineStrategy(module={found[0]!r})"
    return (
        f"{type(root).__name__} cannot be split into stages: {what}. Allowed is an nn.Sequential,"
        f" or anything with a method pipeline_layers(): {named}. Hint: {hint}."
    )
