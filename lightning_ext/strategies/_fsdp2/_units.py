"""Which modules are sharded by themselves: gathered as one, and reduced as one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

TRANSFORMER_LAYERS = "transformer_layers"

Wrap = (
    str
    | type[nn.Module]
    | Collection[type[nn.Module]]
    | ModuleWrapPolicy
    | CustomPolicy
    | Callable[[nn.Module], bool]
    | None
)


def find_units(root: nn.Module, wrap: Wrap) -> list[nn.Module]:
    """Finds the modules that become units, inner ones first.

    Left out are those without parameters, those that the user sharded or that are inside of such,
    containers that have no ``forward``, and those that share a parameter or a module with the
    outside: it has to be gathered with both.

    Args:
        root: Of which they are a part; it is none of them.
        wrap: ``"transformer_layers"`` (repeated layers of a ``ModuleList`` or ``Sequential``), the
            name of a class, a class or several, a policy of ``torch.distributed.fsdp.wrap``, or
            what says of a module whether it is one; ``None`` for none.

    Raises:
        MisconfigurationException: A class is given of which there is no module.
    """
    chosen = {id(one) for one in _chosen(root, wrap)}
    users = _users(root)
    inside = {id(m) for s in root.modules() if isinstance(s, FSDPModule) for m in s.modules()}
    modules = [one for one in root.modules() if one is not root and id(one) in chosen]
    return [
        one
        for one in reversed(modules)
        if id(one) not in inside and _has_forward(one) and _is_closed(one, users)
    ]


def _chosen(root: nn.Module, wrap: Wrap) -> Iterator[nn.Module]:
    if wrap is None:
        return
    if isinstance(wrap, type):
        wrap = {wrap}
    if wrap == TRANSFORMER_LAYERS:
        yield from _repeated_layers(root)
    elif isinstance(wrap, str):
        yield from _of_class(root, lambda one: _kind(one).__name__ == wrap, wrap)
    elif isinstance(wrap, (ModuleWrapPolicy, CustomPolicy)):
        yield from wrap._run_policy(root, ignored_modules=set(), root_kwargs={})
    elif callable(wrap):
        yield from (one for one in root.modules() if wrap(one))
    else:
        for kind in wrap:
            yield from _of_class(root, partial(_is_a, kind), kind.__name__)


def classes(root: nn.Module) -> str:
    """Names the classes of modules that have parameters, with the number of each.

    Args:
        root: Of which they are a part; it is none of them.
    """
    below = [
        one for one in root.modules() if one is not root and any(True for _ in one.parameters())
    ]
    kinds = Counter(_kind(one).__name__ for one in below)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.items()) or "no modules"


def _is_a(kind: type[nn.Module], module: nn.Module) -> bool:
    return isinstance(module, kind)


def _of_class(root: nn.Module, is_one: Callable[[nn.Module], bool], name: str) -> list[nn.Module]:
    found = [one for one in root.modules() if is_one(one)]
    if not found:
        raise MisconfigurationException(
            f"wrap names the class {name}, of which {type(root).__name__} has no module. It has"
            f" {classes(root)}. Hint: wrap={TRANSFORMER_LAYERS!r} finds repeated layers by itself."
        )
    return found


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class, before FSDP2 made one of its own of it."""
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, FSDPModule) else kind


def _repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Modules of one class, with modules of their own, of which a container has several."""
    children = list(module.children())
    kinds: Counter[type[nn.Module]] = Counter()
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        kinds.update(_kind(one) for one in children if _has_forward(one) and any(one.children()))
    for child in children:
        if kinds[_kind(child)] > 1:
            yield child
        else:
            yield from _repeated_layers(child)


def _users(root: nn.Module) -> dict[int, set[int]]:
    """By parameter and by module, the modules that have it for their own."""
    users: dict[int, set[int]] = defaultdict(set)
    for module in root.modules():
        for one in (*module.parameters(recurse=False), *module.children()):
            users[id(one)].add(id(module))
    return users


def _has_forward(module: nn.Module) -> bool:
    own: Any = type(module).forward
    return own is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _is_closed(module: nn.Module, users: dict[int, set[int]]) -> bool:
    """Whether it has parameters, and all of them and all modules below to itself."""
    own = {id(one) for one in module.modules()}
    parameters = list(module.parameters())
    parts = [*parameters, *(one for one in module.modules() if one is not module)]
    return bool(parameters) and all(users[id(one)] <= own for one in parts)


def find_roots(module: LightningModule) -> list[nn.Module]:
    """Finds what is gathered for a whole step: the module itself, whose steps are its forward.

    Under manual optimization gradients are needed within a step, so that there it is its children,
    or those of containers, each gathered as it is called; what is outside of them stays whole.

    Args:
        module: With its units sharded.
    """
    if module.automatic_optimization:
        return [module]
    users = _users(module)
    return [one for one in _called(module) if _is_closed(one, users)]


def _called(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _has_forward(child):
            yield from () if isinstance(child, FSDPModule) else (child,)
        else:
            yield from _called(child)
