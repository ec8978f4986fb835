"""Training steps on trial: real ones, of which nothing stays and no other rank learns.

Private: ``module._on_before_batch_transfer``, ``epoch_loop._build_kwargs``; of torch, the step
    hooks of an optimizer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from torch import Tensor
from torch.nn import Parameter

from lightning_ext._lightning._offline import offline
from lightning_ext._lightning._random_state import _local_state, _set_local_state
from lightning_ext._lightning._silent import silent_log
from lightning_ext._lightning._snapshot import Snapshot
from lightning_ext._lightning._view import view

_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def try_training(trainer: Trainer, make_batch: Callable[[], Any], *, steps: int = 1) -> None:
    """Trains on a batch as later in the run: gradients and the optimizer's state are there.

    Where they are not yet, a first step makes them. No hook of a callback, the module or the
    optimizer runs, nothing is logged, and collectives of the default process group return at once.
    What the steps change stays changed; see :func:`state_restored`.

    Args:
        trainer: The Trainer in fit, between two optimizer steps, with automatic optimization.
        make_batch: Makes the batch, on the host, as a loader does.
        steps: Steps to take when gradients and the optimizer's state are there.
    """
    fresh = _is_fresh(trainer)
    with _alone(trainer):
        reduced = _buckets_to_come(trainer) if fresh else []
        for _ in range(fresh + steps):
            trial_step(trainer, _on_device(trainer, make_batch()))
        del reduced


def trial_step(trainer: Trainer, batch: Any) -> None:
    """Takes one step: forward in the Trainer's precision, backward, optimizer.

    The module is called itself, not what the strategy wraps around it. A gradient scaler is left
    out: it needs no memory, and would skip the optimizer's step where a gradient overflows.

    Args:
        trainer: The Trainer in fit.
        batch: What ``training_step`` takes, on the device.
    """
    module = trainer.lightning_module
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, 0)

    @torch.enable_grad()
    def closure() -> Any:
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments.values())
        loss = ClosureResult.from_training_step_output(output).closure_loss
        if loss is not None:
            module.backward(loss)
        return loss

    trainer.optimizers[0].step(closure)


@contextmanager
def state_restored(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Brings back, bit for bit, what training steps change; also whenever the result is called.

    Parameters, buffers, gradients, the state of optimizers, plain attributes of modules, and the
    generators of Python, NumPy, torch and the devices. The copies lie in host memory.
    """
    parameters = _parameters(trainer)
    gradients = [parameter.grad for parameter in parameters]
    owners = [*trainer.lightning_module.modules(), *trainer.optimizers]
    before = Snapshot(gradients, *(vars(owner) for owner in owners))
    generators = _local_state()

    def restore() -> None:
        before.restore()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        _set_local_state(generators)

    try:
        yield restore
    finally:
        restore()


def _is_fresh(trainer: Trainer) -> bool:
    """Whether a later step will hold more memory: gradients, or what the optimizer remembers."""
    no_gradients = all(parameter.grad is None for parameter in _parameters(trainer))
    return no_gradients or not trainer.optimizers[0].state


def _parameters(trainer: Trainer) -> list[Parameter]:
    groups = [group["params"] for o in trainer.optimizers for group in o.param_groups]
    own = trainer.lightning_module.parameters()
    return list(dict.fromkeys([*own, *(p for group in groups for p in group)]))


def _buckets_to_come(trainer: Trainer) -> list[Tensor]:
    """Memory for the buckets in which gradients are reduced, which the host gives when written.

    A device has given it when the strategy wrapped the module.
    """
    on_host = trainer.strategy.root_device.type == "cpu"
    if not on_host or view(trainer).data_parallel_size == 1:
        return []
    return [torch.ones_like(p) for p in _parameters(trainer) if p.requires_grad]


def _on_device(trainer: Trainer, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _alone(trainer: Trainer) -> Iterator[None]:
    """Keeps steps from loggers, from what watches the optimizer, and from other ranks."""
    with ExitStack() as stack:
        stack.enter_context(silent_log(trainer.lightning_module))
        stack.enter_context(offline())
        for optimizer in trainer.optimizers:
            for name in _STEP_HOOKS:
                hooks = getattr(optimizer, name)
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
        yield
