"""Settings of groups and patterns of names: what is known, and what is refused.

Differs: a setting that is not read of groups is an error, as is a pattern that matches nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ext.optim._adagrad_norm import AdaGradNorm
from lightning_ext.optim._distributed._distributed_lion import DistributedLion
from lightning_ext.optim._groups._parameter_roles import Named, bare
from lightning_ext.optim._lamb import LAMB
from lightning_ext.optim._lars import LARS
from lightning_ext.optim._low_rank._low_rank import LowRank
from lightning_ext.optim._matrix._normuon import NorMuon
from lightning_ext.optim._polyak_sgd import PolyakSGD
from lightning_ext.optim._wrappers._wrapper import Wrapper

_OF_ALL: dict[type[Optimizer], tuple[str, ...]] = {
    AdaGradNorm: ("initial_accumulator",),
    DistributedLion: ("process_group",),
    LAMB: ("form", "max_grad_norm"),
    PolyakSGD: ("process_group",),
}
_NO_SETTINGS = ("params", "param_names")


def check_module(module: Any) -> None:
    """Refuse what is no module.

    Args:
        module: what was given for one.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is {_a(module)}; give the module itself: it says what its parameters are for"
        )


def class_of(optimizer: Any) -> type[Optimizer]:
    """Return the class of optimizers that these groups are for.

    Args:
        optimizer: what was given for it: the class, or a ``functools.partial`` of it. That which a
            command line makes of an ``OptimizerCallable`` has the class among its arguments.

    Raises:
        TypeError: if it is none, or one of wrappers.
        ValueError: if it is ``torch.optim.Muon``.
    """
    found = list(_classes_in(optimizer))
    if len(found) != 1:
        one = isinstance(optimizer, Optimizer)
        what = f"one {type(optimizer).__name__}" if one else _a(optimizer)
        example = type(optimizer).__name__ if one else "torch.optim.AdamW or a partial of it"
        raise TypeError(f"optimizer is {what}; give the class, such as {example}")
    if issubclass(found[0], Wrapper):
        raise TypeError(
            f"{found[0].__name__} goes around an optimizer. Hint: give the class of that one"
        )
    if issubclass(found[0], torch.optim.Muon):
        raise ValueError(
            "torch.optim.Muon takes matrices alone and leaves the rest to a second optimizer."
            " Hint: NorMuon(param_groups_for(module, NorMuon), beta2=None) is Muon and AdamW in one"
        )
    return found[0]


def has_trust_ratio(optimizer: type[Optimizer]) -> bool:
    """Whether groups of an optimizer have a trust ratio or none.

    Args:
        optimizer: its class.
    """
    known = inspect.signature(optimizer).parameters
    return issubclass(optimizer, (LAMB, LARS)) or "trust_ratio" in known


def matrix_algorithm(optimizer: type[Optimizer]) -> str | None:
    """Return what groups of an optimizer call its own way with matrices; ``None`` without groups.

    Args:
        optimizer: its class.
    """
    if issubclass(optimizer, NorMuon):
        return "muon"
    return "low_rank" if issubclass(optimizer, LowRank) else None


def check_overrides(overrides: Any) -> dict[str, Mapping[str, Any]]:
    """Return settings by pattern.

    Args:
        overrides: what was given for them, or nothing.

    Raises:
        TypeError: if it is no mapping of mappings.
        ValueError: if it has what is no setting.
    """
    form = "give settings by name and pattern, {'0': {'lr': 0.001}}"
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"overrides is {_a(overrides)}; {form}")
    for pattern, settings in (overrides or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides has {pattern!r} for a pattern; {form}")
        if not isinstance(settings, Mapping):
            raise TypeError(f"overrides[{pattern!r}] is {_a(settings)}; {form}")
        wrong = [x for x in _NO_SETTINGS if x in settings]
        if wrong:
            raise ValueError(
                f"overrides[{pattern!r}] has {wrong[0]!r}; parameters and names belong to no"
                " setting, the pattern says which they are"
            )
    return dict(overrides or {})


def check_settings(
    optimizer: type[Optimizer], overrides: Mapping[str, Mapping[str, Any]], weight_decay: Any
) -> None:
    """Refuse settings that are not read of the groups of an optimizer.

    Args:
        optimizer: its class.
        overrides: settings by pattern.
        weight_decay: of all, or ``None``.

    Raises:
        TypeError: if ``weight_decay`` is no number.
        ValueError: if a setting is not known, or is of the whole optimizer.
    """
    numbers = (int, float, torch.Tensor)
    if weight_decay is not None and not isinstance(weight_decay, numbers):
        raise TypeError(f"weight_decay is {_a(weight_decay)}; give a number")
    name_of = optimizer.__name__
    known = _known(optimizer)
    of_all = {x for kind, some in _OF_ALL.items() if issubclass(optimizer, kind) for x in some}
    given = [x for settings in overrides.values() for x in settings]
    for name in [*given, *([] if weight_decay is None else ["weight_decay"])]:
        if name in of_all:
            raise ValueError(
                f"{name!r} is of the whole {name_of}, not of some of its parameters. Hint:"
                f" {name_of}(groups, {name}=...)"
            )
        if known is not None and name not in known:
            near = get_close_matches(name, known, 3) or known
            raise ValueError(
                f"{name_of} has no setting {name!r} of a group; the nearest: {', '.join(near)}"
            )


def matched(found: list[Named], patterns: Any, where: str) -> set[str]:
    """Return the first names of what patterns match.

    Args:
        found: the parameters.
        patterns: of their names or of the modules that have them; also without what
            ``torch.compile`` adds to names.
        where: the argument they are from.

    Raises:
        TypeError: if they are no list of patterns.
        ValueError: if one matches nothing.
    """
    hits: set[str] = set()
    for pattern in _listed(patterns, where):
        some = {x.names[0] for x in found if any(_matches(name, pattern) for name in x.names)}
        if not some:
            names = [bare(name) for item in found for name in item.names]
            paths = {name.rpartition(".")[0] for name in names} - {""}
            near = get_close_matches(pattern, [*names, *sorted(paths)], 3, 0.3) or names[:3]
            raise ValueError(
                f"{where}={pattern!r} matches no parameter that is trained; the nearest names:"
                f" {', '.join(near)}"
            )
        hits |= some
    return hits


def _classes_in(made: Any) -> Iterator[type[Optimizer]]:
    """Classes of optimizers in what makes one."""
    if isinstance(made, partial):
        for part in (made.func, *made.args):
            yield from _classes_in(part)
    elif inspect.isclass(made) and issubclass(made, Optimizer):
        yield made


def _known(optimizer: type[Optimizer]) -> list[str] | None:
    """Settings of a group; ``None`` where the constructor does not tell."""
    signature = inspect.signature(optimizer).parameters.values()
    if any(x.kind is x.VAR_KEYWORD for x in signature):
        return None
    trust = ["trust_ratio"] if has_trust_ratio(optimizer) else []
    algorithm = ["algorithm"] if matrix_algorithm(optimizer) else []
    return [*[x.name for x in signature][1:], *trust, *algorithm]


def _listed(patterns: Any, where: str) -> Sequence[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{where}={patterns!r}; give a list of patterns")
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{where} is {_a(patterns)}; give a list of patterns")
    listed = list(patterns)
    for x in listed:
        if not isinstance(x, str):
            raise TypeError(f"{where} has {_a(x)}; patterns are of names")
    return listed


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(x, y) for x in (name, bare(name)) for y in (pattern, f"{pattern}.*"))


def _a(value: Any) -> str:
    """What kind of thing a value is, in words."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
