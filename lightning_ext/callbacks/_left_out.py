"""Which parameters a callback works on: those of an optimizer, without some by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext._lightning import view


def require_patterns(name: str, value: Any) -> tuple[str, ...]:
    """Returns name patterns, none for ``None``.

    Raises:
        TypeError: Not a list of strings.
    """
    given = () if value is None else value
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name} was {value!r}; allowed is a list of name patterns, or None.")
    if not all(isinstance(x, str) for x in given):
        raise TypeError(f"{name} was {value!r}; allowed is a list of name patterns, or None.")
    return tuple(given)


def left_out(
    trainer: Trainer, owner: str, exclude: Sequence[str], *, classifier: bool
) -> frozenset[str]:
    """Returns the names of parameters that are left out, and tells which.

    Args:
        trainer: The Trainer in ``on_train_start``.
        owner: Who leaves them out.
        exclude: Patterns as in ``fnmatch``, of parameters or of modules with all they hold.
        classifier: Whether those of the last ``nn.Linear`` are, in the order in which modules were
            registered, as far as it is trained.

    Raises:
        MisconfigurationException: A pattern matches no parameter.
    """
    seen = view(trainer)
    named, names = dict(seen.local_parameters()), seen.parameter_names
    for pattern in exclude:
        if not any(_matches(name, pattern) for name in names):
            raise MisconfigurationException(
                f"{owner} excludes {pattern!r}, and no parameter has such a name; allowed are"
                f" patterns of names such as {next(iter(names), '')!r}. Hint: print the names of"
                " module.named_parameters()."
            )
    chosen = {name for name in names if any(_matches(name, x) for x in exclude)}
    if classifier:
        index, members = _last_linear(trainer.lightning_module)
        (latest,) = seen.largest(index)
        last = {id(p) for p in members if index == latest}  # a later one is of another stage
        chosen |= {name for name, p in named.items() if id(p) in last}
        if latest < 0:
            rank_zero_warn(
                f"{owner} leaves the classifier out, and found none: there is no nn.Linear that is"
                " trained. Hint: exclude=['head.*'], or exclude_classifier=False."
            )
    if chosen:
        rank_zero_info(f"{owner} leaves out {', '.join(sorted(chosen))}.")
    return frozenset(chosen)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is of a parameter or a module around it; compiled modules hide a prefix."""
    bare = name.replace("_orig_mod.", "")
    return any(fnmatchcase(x, y) for x in (name, bare) for y in (pattern, f"{pattern}.*"))


def with_gradients(
    trainer: Trainer,
    optimizer: Optimizer,
    names: frozenset[str],
    *,
    takes: Callable[[Parameter], bool] = lambda _: True,
) -> list[Parameter]:
    """Returns parameters of an optimizer that have a gradient.

    Args:
        trainer: The Trainer.
        optimizer: Whose parameters they are.
        names: Of those to leave out.
        takes: Tells of a parameter whether it is wanted.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        p
        for name, p in view(trainer).local_parameters()
        if id(p) in own and name not in names and p.grad is not None and takes(p)
    ]


def _last_linear(module: nn.Module) -> tuple[int, list[Parameter]]:
    """Its place among modules and its parameters; -1 if there is none."""
    found = [
        (index, [p for p in one.parameters() if p.requires_grad])
        for index, one in enumerate(module.modules())
        if isinstance(one, nn.Linear)
    ]
    trained = [(index, params) for index, params in found if params]
    return trained[-1] if trained else (-1, [])
