"""Arguments of the pipeline strategy, and runs that it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ext.strategies._fsdp2 import _arguments
from lightning_ext.strategies._fsdp2._arguments import Rule, require
from lightning_ext.strategies._fsdp2._faults import run_settings
from lightning_ext.strategies._fsdp2._precision import check_precision
from lightning_ext.strategies._nodes import check_ranks
from lightning_ext.strategies._pipeline._engine import SCHEDULES
from lightning_ext.strategies._pipeline._settings import SINGLE, Settings

T = TypeVar("T")


def _is_split(value: object) -> bool:
    if isinstance(value, str):
        return True  # which one, is asked next
    return isinstance(value, Sequence) and all(type(one) is int for one in value)


_SPLITS = ("uniform", "params", "time")
_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": tuple(SCHEDULES),
    "data_parallel": ("fsdp2", "ddp"),
}
_COUNTS: dict[str, tuple[str, ...]] = {
    "stages_per_rank": ("layers", "auto"),
    "num_microbatches": ("auto",),
    "num_eval_microbatches": (),
    "data_parallel_size": (),
}
_RULES = {
    "module": Rule(
        lambda x: x is None or isinstance(x, str),
        "the name of a submodule, None",
        "as named_modules() of the LightningModule has it.",
    ),
    "split": Rule(
        _is_split,
        f"one of {', '.join(map(repr, _SPLITS))}, or the first layers of all stages but the first",
        "split=[3, 6] makes three stages.",
    ),
}


def checked(settings: Settings) -> Settings:
    """Returns arguments as they are.

    Args:
        settings: As the user gave them.

    Raises:
        MisconfigurationException: Two that do not fit together.
        TypeError: One is of another kind, with what is allowed.
        ValueError: A number that is too small, or a name that there is not.
    """
    for name, value in settings._asdict().items():
        checked_argument(name, value)
    _check_together(settings)
    return settings


def checked_argument(name: str, value: T) -> T:
    """Returns an argument as it is.

    Args:
        name: Of the argument; those without a rule are switches.
        value: As the user gave it.

    Raises:
        TypeError: It is of another kind, with what is allowed.
        ValueError: A number that is too small, or a name that there is not.
    """
    if name in _COUNTS:
        check_ranks(name, value, least=1, others=_COUNTS[name])
    elif name in _CHOICES:
        _check_choice(name, value, _CHOICES[name])
    elif name in _RULES:
        require(name, value, _RULES[name])
    else:
        _arguments.checked(name, value)
    if name == "split":
        _check_split(value)
    return value


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    kind = TypeError if not isinstance(value, str) else ValueError
    if value not in allowed:
        raise kind(f"{name} was {value!r}; allowed is one of {', '.join(map(repr, allowed))}.")


def _check_split(split: Any) -> None:
    if isinstance(split, str):
        _check_choice("split", split, _SPLITS)
    elif any(one >= other for one, other in pairwise([0, *split])):
        raise ValueError(
            f"split was {list(split)}; allowed are ascending numbers of at least 1. Hint: the"
            " indices of the layers with which all stages but the first begin."
        )


def _check_together(settings: Settings) -> None:
    stages = settings.stages_per_rank
    if settings.schedule in SINGLE and isinstance(stages, int) and stages > 1:
        raise MisconfigurationException(
            f"stages_per_rank={stages} does not go with schedule={settings.schedule!r}; allowed is"
            " 1. Hint: schedule='breadth_first' or 'interleaved_1f1b' take any number."
        )
    cut = settings.data_parallel == "fsdp2" and settings.data_parallel_size > 1
    if settings.mp_policy != MixedPrecisionPolicy() and not cut:
        raise MisconfigurationException(
            f"mp_policy does nothing with data_parallel={settings.data_parallel!r} and"
            f" data_parallel_size={settings.data_parallel_size}; allowed are 'fsdp2' and 2 or more."
            " Hint: Trainer(precision='bf16-mixed')."
        )


def check_world(settings: Settings, world_size: int) -> None:
    """Refuses ranks that disagree or do not make pipelines; all ranks must call.

    Args:
        settings: Of the strategy.
        world_size: All ranks.

    Raises:
        MisconfigurationException: On all ranks, before they make groups of each other.
    """
    require_same({name: repr(value) for name, value in settings._asdict().items()})
    if world_size % settings.data_parallel_size:
        allowed = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise MisconfigurationException(
            f"data_parallel_size={settings.data_parallel_size} does not divide {world_size} ranks;"
            f" allowed are {allowed}. Hint: ranks of a pipeline × data_parallel_size = devices ×"
            " num_nodes."
        )


def check_layers(settings: Settings, ranks: int, layers: int) -> None:
    """Refuses one layer a stage where ranks would have stages of different number.

    Args:
        settings: Of the strategy.
        ranks: Of a pipeline.
        layers: Of the split submodule.

    Raises:
        MisconfigurationException: With the number of layers.
    """
    single = settings.schedule in SINGLE
    if settings.stages_per_rank != "layers" or layers == ranks:
        return
    if single or layers % ranks:
        allowed = f"{ranks} layers" if single else f"a multiple of {ranks}"
        raise MisconfigurationException(
            f"stages_per_rank='layers' makes {layers} stages of {layers} layers on {ranks} ranks;"
            f" allowed under {settings.schedule!r} is {allowed}. Hint: another number of devices,"
            " or stages_per_rank='auto'."
        )


def check_run(trainer: Trainer, module: LightningModule, strategy: str) -> None:
    """Refuses runs that would train wrongly; all ranks must call.

    Args:
        trainer: With its strategy set up so far as its ranks know each other.
        module: Not split yet.
        strategy: Its name.

    Raises:
        MisconfigurationException: With what was set, what is allowed, and a hint.
    """
    require_same({name: repr(value) for name, value in run_settings(trainer, module).items()})
    if trainer.precision != "64-true":
        check_precision(trainer.precision_plugin, strategy)
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"automatic_optimization=False does not go with {strategy}, whose stages run their own"
            " backward pass; allowed is True. Hint: one optimizer with groups of parameters, or"
            " FSDP2Strategy."
        )
    if is_overridden("backward", module):
        raise MisconfigurationException(
            f"{type(module).__name__} has a backward() of its own, which {strategy} would not call:"
            " each stage runs its own backward pass. Allowed is Lightning's. Hint: scale the loss"
            " in training_step, or FSDP2Strategy."
        )
    callbacks: Sequence[Callback] = vars(trainer)["callbacks"]
    for one in callbacks:
        if isinstance(one, (StochasticWeightAveraging, WeightAveraging)):
            raise MisconfigurationException(
                f"{type(one).__name__} does not go with {strategy}: it averages a copy of the whole"
                " module with the layers of one rank. Allowed is an average of this rank's. Hint:"
                " lightning_ext.callbacks.EMA."
            )


def require_same(texts: Mapping[str, str]) -> None:
    """Refuses to go on where ranks have other settings, on all of them; one collective.

    Args:
        texts: Values in words by name.

    Raises:
        MisconfigurationException: With the names, and what this rank has.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(texts))
    names = [name for name in texts if len({one.get(name) for one in found}) > 1]
    if names:
        told = ", ".join(f"{name} (here {texts[name]})" for name in names)
        raise MisconfigurationException(
            f"Ranks disagree about {told} of the pipeline; it must be the same on all of them."
            " Hint: build the module, the Trainer and its strategy alike on every rank."
        )
