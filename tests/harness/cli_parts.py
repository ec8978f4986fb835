"""Everything that a LightningCLI can make of this package, with what it has to be told at least."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from lightning_ext import callbacks, losses, optim, scaling, strategies

Config = dict[str, Any]
# Names that a Trainer knows by `import lightning_ext`, and their classes.
NAMES: dict[str, str] = {
    name: StrategyRegistry[name]["strategy"].strategy
    for name in StrategyRegistry
    if type(StrategyRegistry[name]["strategy"]).__module__.startswith("lightning_ext")
}
# What has no default, and what a matrix of 3 × 4 needs.
LEAST: dict[str, Config] = {
    "AdaptiveBatchSize": {"rule": "0:8 64:16"},
    "CriticalBatchSize": {"at_samples": [0]},
    "CriticalBatchLaw": {"tokens_per_sample": 128},
    "GeoDamp": {"factor": 2.0, "every_samples": 64},
    "OptimalBatchRule": {"step_price": 4.0},
    "PadaDamp": {"rate": 0.5},
    "BatchSizeSchedule": {"starts": [0, 64], "global_batches": [8, 16]},
    "APOLLO": {"rank": 1},
    "Fira": {"rank": 1},
    "GaLore": {"rank": 1},
    "GradNormLoRP": {"rank": 1},
    "QGaLore": {"rank": 1},
    "DelayCompensation": {"delay": 2},
    "LAWN": {"free_steps": 4},
    "LEGWWarmup": {"warmup_samples": 64, "reference_batch": 8},
    "PowerScheduler": {"tokens_per_sample": 128},
    "RefinedSchedule": {"table": {"samples": [0, 64], "factors": [1.0, 0.5]}},
    "SampleCosine": {"total_samples": 64},
    "SampleLinear": {"total_samples": 64},
    "SampleOneCycle": {"total_samples": 64},
    "SampleSchedule": {"fn": "math.cos"},
    "SampleWSD": {"total_samples": 64, "warmup_samples": 8, "decay_samples": 8},
    "SampleWarmup": {"warmup_samples": 64},
    "WeightDecaySchedule": {"phases": {0: 0.0, 64: 0.1}},
}


def unwrapped(base: Optimizer) -> Optimizer:
    """The optimizer as it is."""
    return base


def unchanged(base: Optimizer, module: nn.Module) -> Optimizer:
    """The optimizer as it is, whatever the module."""
    return base


def no_loss(outputs: Tensor) -> Tensor:
    """Their sum."""
    return outputs.sum()


class Matrix(LightningModule):
    """One matrix, which any optimizer takes; the CLI brings one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3, bias=False)


class Configured(Matrix):
    """A module that is told what trains it.

    Args:
        optimizer: Makes the optimizer.
        wrap: What goes around it.
        precondition: What goes around it and reads the module.
        schedule: Makes the schedule.
        loss: A function, or a module.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.SGD,
        wrap: Callable[[Optimizer], Optimizer] = unwrapped,
        precondition: Callable[[Optimizer, nn.Module], Optimizer] = unchanged,
        schedule: LRSchedulerCallable = ConstantLR,
        loss: nn.Module | Callable[..., Tensor] = no_loss,
    ) -> None:
        super().__init__()
        self.made_by, self.loss = (optimizer, wrap, precondition, schedule), loss

    def configure_optimizers(self) -> Any:
        """The optimizer in its wrappers, and its schedule, by steps."""
        optimizer, wrap, precondition, schedule = self.made_by
        made = precondition(wrap(optimizer(self.parameters())), self)
        return [made], [{"scheduler": schedule(made), "interval": "step"}]


def classes(room: Any, parent: type | None = None) -> list[str]:
    """Names of the classes that a room lists, of one kind or all."""
    found = [name for name in room.__all__ if inspect.isclass(getattr(room, name))]
    return [name for name in found if parent is None or issubclass(getattr(room, name), parent)]


def _is_rule(name: str) -> bool:
    kind = getattr(scaling, name)
    return hasattr(kind, "propose") and kind is not scaling.BatchRule


def _needs(name: str) -> list[str]:
    """The positional arguments of an optimizer that have no default."""
    known = inspect.signature(getattr(optim, name)).parameters.values()
    return [p.name for p in known if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


CALLBACKS = classes(callbacks, Callback)
RULES = [name for name in classes(scaling) if _is_rule(name)]
STRATEGIES = classes(strategies, Strategy)
SCHEDULES = classes(optim, LRScheduler)
LOSSES = classes(losses, nn.Module)
_OPTIMIZERS = classes(optim, Optimizer)
OPTIMIZERS = [name for name in _OPTIMIZERS if _needs(name)[0] == "params"]
WRAPPERS = [name for name in _OPTIMIZERS if _needs(name) == ["base"]]
PRECONDITIONERS = [name for name in _OPTIMIZERS if _needs(name) == ["base", "module"]]


def _named(room: str, name: str, **more: Any) -> Config:
    return {"class_path": f"lightning_ext.{room}.{name}", "init_args": LEAST.get(name, {}) | more}


def _callback(name: str, **more: Any) -> Config:
    return {"trainer": {"callbacks": [_named("callbacks", name, **more)]}}


def _optimizer(option: str, name: str, **more: Any) -> Config:
    settings = {"lr": 1.0, "weight_decay": 0.1, "momentum": 0.9}
    sgd = {"class_path": "torch.optim.SGD", "init_args": settings}
    return {"model": {"optimizer": sgd, option: _named("optim", name, **more)}}


# A config for each member, by room and name.
CONFIGS: dict[str, Config] = {
    **{f"callbacks.{name}": _callback(name) for name in CALLBACKS},
    **{
        f"scaling.{name}": _callback(
            "AdaptiveBatchSize", rule=_named("scaling", name), max_global_batch=64
        )
        for name in RULES
    },
    **{
        f"strategies.{name}": {"trainer": {"strategy": _named("strategies", name)}}
        for name in STRATEGIES
    },
    **{f"strategy.{name}": {"trainer": {"strategy": name}} for name in NAMES},
    **{f"optim.{name}": _optimizer("optimizer", name) for name in OPTIMIZERS},
    **{f"optim.{name}": _optimizer("wrap", name) for name in WRAPPERS},
    **{f"optim.{name}": _optimizer("precondition", name) for name in PRECONDITIONERS},
    **{f"optim.{name}": _optimizer("schedule", name, samples_per_step=8) for name in SCHEDULES},
    **{f"losses.{name}": {"model": {"loss": _named("losses", name)}} for name in LOSSES},
    "nn.Int8Linear": {
        "model": {"loss": _named("nn", "Int8Linear", in_features=256, out_features=2)}
    },
    "kernels.clip_loss": {"model": {"loss": "lightning_ext.kernels.clip_loss"}},
}


@contextmanager
def _quiet_line() -> Iterator[None]:
    """LightningCLI warns where the program has arguments of its own; long lines of help."""
    with patch.object(sys, "argv", ["prog"]), patch.dict(os.environ, {"COLUMNS": "400"}):
        yield


def cli(*args: str, module: type[LightningModule] = Configured, **more: Any) -> LightningCLI:
    """A LightningCLI on the CPU that makes everything and runs nothing."""
    quiet = [
        "--seed_everything=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
    ]
    more = {"run": False, "save_config_callback": None, **more}
    with _quiet_line():
        return LightningCLI(module, args=[*quiet, *args], **more)


@cache
def parser() -> Any:
    """That of a LightningCLI, which the tests share, as it is slow to make."""
    return cli().parser


def parsed(*args: str) -> Any:
    """The namespace that a command line makes."""
    with _quiet_line():
        return parser().parse_args(list(args))


def made(namespace: Any) -> Any:
    """The objects that a namespace stands for."""
    torch.manual_seed(0)
    with _quiet_line():
        return parser().instantiate_classes(namespace)


def told(*args: str) -> str:
    """What a command line prints that only asks, such as ``--help`` and ``--print_config``."""
    out = StringIO()
    try:
        with redirect_stdout(out):
            parsed(*args)
    except SystemExit as end:
        if end.code == 0:
            return out.getvalue()
    raise AssertionError(f"{args} did not end with a printed text")


def write(config: Config, folder: Path) -> str:
    """Write a YAML file, and return the argument that reads it."""
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False} | config.get("trainer", {})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "trainer": trainer}), "utf-8")
    return f"--config={path}"


def subject(config: Config, found: Any) -> list[Any]:
    """Of the objects that were made those that a config is about."""
    if "trainer" in config:
        return [found.trainer.strategy, *(found.trainer.callbacks or [])]
    optimizers, schedules = found.model.configure_optimizers()
    return [*optimizers, schedules[0]["scheduler"], found.model.loss]


def facts(thing: Any, inside: tuple[int, ...] = ()) -> Any:
    """What an object holds, in plain values that compare."""
    if isinstance(thing, Tensor):
        return torch.empty(thing.shape, dtype=thing.dtype).copy_(thing.detach()).tolist()
    if isinstance(thing, type) or inspect.isroutine(thing):
        return f"{thing.__module__}.{thing.__qualname__}"
    if id(thing) in inside:
        return "itself"
    within = (*inside, id(thing))
    if isinstance(thing, Mapping):
        return [(facts(key, within), facts(value, within)) for key, value in thing.items()]
    if isinstance(thing, list | tuple | set | frozenset):
        return [type(thing).__name__, *(facts(part, within) for part in thing)]
    if isinstance(thing, Optimizer):
        thing = [type(thing), thing.defaults, thing.state_dict(), getattr(thing, "base", None)]
        return facts(thing, within)
    held = getattr(thing, "__dict__", None)
    if not held:
        return repr(thing) if type(thing).__repr__ is not object.__repr__ else facts(type(thing))
    return [facts(type(thing)), facts(held, within)]
