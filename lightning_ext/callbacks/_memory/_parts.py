"""Parts of a module that a strategy gathers, or gives to a rank, as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Finds modules of one class, with modules of their own, of which a container has several.

    They are the units of FSDP2 by default.

    Args:
        module: All of it.
    """
    kinds: Counter[type[nn.Module]] = Counter()
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        kinds.update(type(one) for one in module.children() if any(one.children()))
    for child in module.children():
        if kinds[type(child)] > 1:
            yield child
        else:
            yield from repeated_layers(child)


def split_submodule(module: nn.Module, name: str | None) -> tuple[nn.Module, list[nn.Module]]:
    """Finds the submodule whose layers become stages, and these layers.

    Args:
        module: All of it.
        name: Of the submodule; ``None``: the only one that has ``pipeline_layers()``, or else the
            only outermost ``nn.Sequential``.

    Raises:
        ValueError: There is none, or several, or it has no layers.
    """
    named = dict(module.named_modules())
    found = [k for k, one in named.items() if hasattr(one, "pipeline_layers")]
    names = (found or list(_sequences(module, ""))) if name is None else [name]
    if len(names) != 1 or names[0] not in named:
        raise ValueError(_refusal(module, f"module_name={name!r} does not say which is split"))
    owner: Any = named[names[0]]
    declares = hasattr(owner, "pipeline_layers")
    if not declares and not isinstance(owner, nn.Sequential):
        what = f"module_name={names[0]!r} is a {type(owner).__name__} without them"
        raise ValueError(_refusal(module, what))
    layers = list(owner.pipeline_layers() if declares else owner)
    if not layers:
        raise ValueError(_refusal(module, f"module_name={names[0]!r} has none"))
    return owner, layers


def own_parameters(parts: Sequence[nn.Module]) -> list[Parameter]:
    """Lists the parameters of several modules, each once.

    Args:
        parts: The modules.
    """
    return list(dict.fromkeys(p for part in parts for p in part.parameters()))


def _refusal(module: nn.Module, what: str) -> str:
    declared = [k for k, one in module.named_modules() if hasattr(one, "pipeline_layers")]
    found = declared or list(_sequences(module, ""))
    hint = "put the layers into an nn.Sequential, or give their owner that method"
    if found:
        hint = f"memory_plan(..., module_name={found[0]!r})"
    return (
        f"{type(module).__name__} cannot be split into stages of layers: {what}. Allowed is an"
        " nn.Sequential, or anything with a method pipeline_layers():"
        f" {', '.join(map(repr, found[:10])) or 'none here'}. Hint: {hint}"
    )


def _sequences(module: nn.Module, prefix: str) -> Iterator[str]:
    if isinstance(module, nn.Sequential):
        yield prefix
        return
    for name, child in module.named_children():
        yield from _sequences(child, f"{prefix}.{name}" if prefix else name)
