"""Groups of a module's parameters, as an optimizer wants them.

Source: You et al. 2017 (arXiv:1708.03888) and 2020 (arXiv:1904.00962), whose code takes neither
    decay nor trust ratio of biases and norm layers; Jordan et al. 2024 (Muon), for what goes to
    AdamW.
Differs: by the modules that have parameters rather than by shapes or names alone; what does not fit
    is refused, and what is not known is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_ext.optim._groups._group_settings import (
    check_module,
    check_overrides,
    check_settings,
    class_of,
    has_trust_ratio,
    matched,
    matrix_algorithm,
)
from lightning_ext.optim._groups._output_layers import Outputs, output_layers
from lightning_ext.optim._groups._parameter_roles import Named, Role, role_of, trained
from lightning_ext.optim._matrix._normuon import NorMuon

_WITHOUT_DECAY = ("norm", "vector")
_WHERE = {"muon": "Muon", "low_rank": "a subspace"}  # where matrices go
_LOW_RANK = 'overrides={"...": {"algorithm": "low_rank"}}'


def param_groups_for(
    module: nn.Module,
    optimizer: Callable[..., Optimizer],
    *,
    weight_decay: float | None = None,
    head: str | Sequence[str] | None = None,
    muon: Sequence[str] = (),
    adamw: Sequence[str] = (),
    no_decay: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    named: bool = True,
) -> list[dict[str, Any]]:
    """Return groups of a module's parameters as an optimizer wants them.

    Biases, the parameters of norm layers and all else of fewer than two dimensions have no weight
    decay, and no trust ratio in an optimizer with trust ratios, as ``LAMB`` and ``LARS`` are. For
    ``NorMuon`` the matrices of linear layers, convolutions, attention and recurrent layers are in
    groups with ``algorithm="muon"``; embeddings, output layers and all else are in groups with
    ``"adamw"``, also other parameters of two dimensions, of which it warns. For ``GaLore`` and its
    family it is the same with ``algorithm="low_rank"``. Tied weights are in one group, once, as
    embeddings if one of the modules is one. Frozen parameters are in none.

    What is called a pattern names parameters or the modules that have them, ``"blocks.0"`` or
    ``"blocks.*.mlp.*"``, as in ``fnmatch``; ``torch.compile`` does not change what it matches.

    Args:
        module: any module, also a LightningModule.
        optimizer: the class that will get the groups, or a ``functools.partial`` of it, also the
            ``OptimizerCallable`` of a command line.
        weight_decay: of parameters that decay; ``None`` leaves it to the optimizer.
        head: pattern or patterns of the output layers, none for ``()``. By default those that are
            called ``head``, ``classifier`` or ``logits``, also ``lm_head``, or ``out``,
            ``output``, ``classes`` or ``decoder``, nearest to the root and in no repeated block;
            or else those with the weight of an embedding, or the only ``fc``; or else the last
            linear layer that was registered, of which groups for matrices warn.
        muon: patterns of what has ``algorithm="muon"`` nevertheless, in ``NorMuon``; ``GaLore`` and
            its family take ``overrides={"...": {"algorithm": "low_rank"}}``.
        adamw: patterns of what has ``algorithm="adamw"`` nevertheless, in ``NorMuon``, and in
            ``GaLore`` and its family.
        no_decay: patterns of what has no weight decay either.
        overrides: settings by pattern; later ones override earlier ones. For ``NorMuon``
            ``adamw_lr`` is the rate of what goes to AdamW.
        named: whether groups have the parameters' names; False where others add groups without.

    Returns:
        Groups for ``optimizer``, none of them empty.

    Raises:
        TypeError: if ``optimizer`` shows no class of optimizers, or wraps one, or an argument is of
            another type.
        ValueError: if a pattern matches nothing, a vector is sent to Muon or a subspace, a
            setting is not one of the optimizer's groups, a parameter has no shape yet, or nothing
            is trained.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 9)
        ... )
        >>> for group in param_groups_for(model, NorMuon, weight_decay=0.1, head="3"):
        ...     print(
        ...         group["algorithm"], group["weight_decay"], [name for name, _ in group["params"]]
        ...     )
        muon 0.1 ['2.weight']
        adamw 0.1 ['0.weight', '3.weight']
        adamw 0.0 ['1.weight', '1.bias', '2.bias', '3.bias']
    """
    check_module(module)
    kind = class_of(optimizer)
    found = trained(module)
    if not found:
        raise ValueError(f"{type(module).__name__} has no parameter that is trained")
    given = check_overrides(overrides)
    choice = _Choice(kind, found, muon, adamw, no_decay, given, weight_decay)
    outputs = _outputs(module, found, head)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    roles = {item.names[0]: role_of(item, outputs.layers) for item in found}
    chosen: dict[str, dict[str, Any]] = {}
    for item in found:
        name = item.names[0]
        key, chosen[name] = choice.of(item, roles[name])
        group = groups.setdefault(key, {"params": [], **chosen[name]})
        group["params"].append((name, item.param) if named else item.param)
    if choice.matrices is not None:
        algorithms = {x: y["algorithm"] for x, y in chosen.items()}
        if choice.for_muon:
            _check_rates(algorithms, dict(zip(given, choice.overrides, strict=True)))
        _warn(algorithms, roles, choice, outputs.guess)
    return [groups[key] for key in sorted(groups)]


class _Choice:
    """What is chosen for each parameter, and the patterns that say so."""

    def __init__(
        self,
        optimizer: type[Optimizer],
        found: list[Named],
        muon: Sequence[str],
        adamw: Sequence[str],
        no_decay: Sequence[str],
        overrides: dict[str, Mapping[str, Any]],
        weight_decay: float | None,
    ) -> None:
        self.name = optimizer.__name__
        self.for_muon = issubclass(optimizer, NorMuon)
        self.matrices = matrix_algorithm(optimizer)
        self.trusts = has_trust_ratio(optimizer)
        if (muon or adamw) and self.matrices is None:
            raise ValueError(
                "muon= is for NorMuon, and adamw= for NorMuon, GaLore and its family;"
                f" {self.name} has no such"
            )
        if muon and not self.for_muon:
            raise ValueError(f"muon= is for NorMuon; {self.name} takes {_LOW_RANK}")
        check_settings(optimizer, overrides, weight_decay)
        self.weight_decay = weight_decay
        self.muon = matched(found, muon, "muon")
        self.adamw = matched(found, adamw, "adamw")
        self.no_decay = matched(found, no_decay, "no_decay")
        self.overrides = [
            (matched(found, [pattern], "overrides"), dict(settings))
            for pattern, settings in overrides.items()
        ]
        both = sorted(self.muon & self.adamw)
        if both:
            raise ValueError(f"{both[0]!r} is in muon= and in adamw=; it can have one of them")

    def of(self, item: Named, role: Role) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What tells its group from others, and the group's settings."""
        name = item.names[0]
        decays = role not in _WITHOUT_DECAY and name not in self.no_decay
        places = tuple(i for i, (names, _) in enumerate(self.overrides) if name in names)
        settings: dict[str, Any] = {}
        if self.matrices is not None:
            settings["algorithm"] = self._algorithm(name, role, places)
        if self.trusts:
            settings["trust_ratio"] = role not in _WITHOUT_DECAY
        if not decays:
            settings["weight_decay"] = 0.0
        elif self.weight_decay is not None:
            settings["weight_decay"] = self.weight_decay
        for i in places:
            settings |= self._of_override(i, settings.get("algorithm"))
        if settings.get("algorithm") in _WHERE and item.param.dim() < 2:
            raise ValueError(
                f"{name!r} has shape {tuple(item.param.shape)} and was sent to"
                f" {_WHERE[settings['algorithm']]}, which is for matrices. Hint: a pattern of"
                " matrices alone, such as one that ends in '.weight'"
            )
        ratio = settings.get("trust_ratio", True)
        return (settings.get("algorithm") == "adamw", not decays, not ratio, places), settings

    def _algorithm(self, name: str, role: Role, places: tuple[int, ...]) -> Any:
        for i in reversed(places):
            if "algorithm" in self.overrides[i][1]:
                return self.overrides[i][1]["algorithm"]
        if name in self.muon:
            return "muon"
        return self.matrices if role == "matrix" and name not in self.adamw else "adamw"

    def _of_override(self, i: int, algorithm: Any) -> dict[str, Any]:
        """Settings of an override, with AdamW's rate as the rate of its groups."""
        settings = dict(self.overrides[i][1])
        if self.for_muon and "adamw_lr" in settings:
            rate = settings.pop("adamw_lr")
            if algorithm == "adamw":
                settings["lr"] = rate
        return settings


def _outputs(module: nn.Module, found: list[Named], head: str | Sequence[str] | None) -> Outputs:
    if head is None:
        return output_layers(module)
    names = matched(found, [head] if isinstance(head, str) else head, "head")
    return Outputs([owner for item in found if item.names[0] in names for owner in item.owners])


def _check_rates(
    algorithms: Mapping[str, str], overrides: Mapping[str, tuple[set[str], dict[str, Any]]]
) -> None:
    """Refuse a rate for AdamW of what goes to Muon alone."""
    for pattern, (names, settings) in overrides.items():
        if "adamw_lr" in settings and all(algorithms[x] != "adamw" for x in names):
            raise ValueError(
                f"overrides={pattern!r} has adamw_lr, and all that it matches goes to Muon."
                " Hint: lr"
            )


def _warn(
    algorithms: Mapping[str, str], roles: Mapping[str, Role], choice: _Choice, guess: str | None
) -> None:
    """Warn of what was decided without knowing."""
    name, own = choice.name, choice.matrices or ""
    to_adamw = [x for x in roles if algorithms[x] == "adamw" and x not in choice.adamw]
    unknown = [x for x in to_adamw if roles[x] == "unknown"]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (" and others" if len(unknown) > 5 else "")
        warnings.warn(
            f"In {name} AdamW gets {shown}: of two dimensions or more, but of no layer that is"
            f" known. Hint: adamw= if that is right, {'muon=' if choice.for_muon else _LOW_RANK} if"
            " they are hidden matrices with a row an output",
            stacklevel=3,
        )
    if own not in algorithms.values():
        warnings.warn(
            f"{name} gets no matrix for {_WHERE[own]}, and is AdamW. Hint: head=() where the only"
            " linear layer is no output",
            stacklevel=3,
        )
    elif guess and any(roles[x] == "head" for x in to_adamw):
        warnings.warn(
            f"In {name} AdamW gets {guess!r} for the output, as the last linear layer that was"
            f" registered: no name tells. Hint: head={guess!r} if that is right, or the name of the"
            " output, or head=() if there is none",
            stacklevel=3,
        )
