"""Calls of a module's steps beside the run, of which no log, metric or attribute learns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric, MetricCollection


@contextmanager
def silent_log(module: LightningModule) -> Iterator[None]:
    """Lets steps of a module run without a trace in loggers, progress bar and metrics.

    ``log`` and ``log_dict`` do nothing, loggers accept everything and keep nothing, and the
    metrics of torchmetrics that the module holds return nan and keep their state.

    Args:
        module: A module that is attached to a Trainer.
    """
    trainer = module.trainer
    loggers = trainer.loggers
    with ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.enter_context(_replaced(module, name, _nothing))
        for metric in module.modules():
            for name in _calls(metric):
                stack.enter_context(_replaced(metric, name, _nan))
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield


@contextmanager
def untouched(module: torch.nn.Module) -> Iterator[None]:
    """Puts the attributes of a module and of its children back, train mode and hooks among them.

    So are the contents of their lists, dicts, sets and deques, but not of anything within these.
    Tensors that are changed in place stay changed.

    Args:
        module: Any module.
    """
    attributes = [(vars(child), dict(vars(child))) for child in module.modules()]
    containers = [
        (value, value.copy())
        for _, saved in attributes
        for value in saved.values()
        if isinstance(value, (list, dict, set, deque))
    ]
    try:
        yield
    finally:
        for value, saved in (*attributes, *containers):
            value.clear()
            if isinstance(value, (list, deque)):
                value.extend(saved)
            else:
                value.update(saved)


def _calls(module: torch.nn.Module) -> tuple[str, ...]:
    """Methods that touch a metric's state; a collection's ``forward`` calls its metrics."""
    if isinstance(module, MetricCollection):
        return "update", "compute", "reset"
    return ("forward", "update", "compute", "reset") if isinstance(module, Metric) else ()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _nan(*args: Any, **kwargs: Any) -> Tensor:
    return torch.tensor(float("nan"))


@contextmanager
def _replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """Puts an attribute on the instance, past a module's own bookkeeping."""
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)
