"""What a forward pass keeps for its backward pass, found on fake tensors.

Private: ``torch._subclasses.fake_tensor``; ``forward``, ``log`` and metrics in the ``__dict__`` of
    modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torchmetrics import Metric

from lightning_ext.callbacks._memory._batches import samples, sized_batch
from lightning_ext.callbacks._memory._fake import faked
from lightning_ext.functional import saved_bytes

Loss = Callable[..., Any]


class Step(NamedTuple):
    """A forward pass as it is to be planned.

    Attributes:
        micro_batch: A batch, or the number of its samples.
        example: A batch of any number of samples, or ``None``.
        loss: Of a module without a ``training_step``.
        device: The one that kernels are chosen for.
    """

    micro_batch: Any
    example: Any
    loss: Loss | None
    device: torch.device


class Saved(NamedTuple):
    """Bytes that a forward pass keeps.

    Attributes:
        samples: Of the micro-batch.
        total: All bytes, if stages are not told apart.
        stages: Of each stage; the first one has what comes before it, the last all that is outside.
    """

    samples: int
    total: float
    stages: tuple[float, ...]


class _Reached(Exception):
    """The first stage would begin."""


def saved_of(
    module: nn.Module,
    step: Step,
    owner: nn.Module | None = None,
    stages: Sequence[Sequence[nn.Module]] = (),
) -> Saved:
    """Runs a forward pass, and a second one where there are stages, without memory.

    Args:
        module: All of it; nothing of it changes.
        step: What is run.
        owner: The submodule that is split into stages.
        stages: Its layers by stage.

    Raises:
        ValueError: The pass depends on numbers, which fake tensors do not have.
        TypeError: The batch has more entries than the module takes, and there is no loss.
    """
    try:
        with faked(module, step.device), torch.random.fork_rng(devices=[]), torch.enable_grad():
            batch, only_inputs = sized_batch(module, step.micro_batch, step.example, step.device)
            _silence(module)
            run = _forward(module, step.loss, only_inputs)
            if owner is None:
                return Saved(samples(batch), saved_bytes(run, batch), ())
            return Saved(samples(batch), 0, _by_stage(run, batch, owner, stages))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the forward pass of {type(module).__name__} reads numbers ({error.func}), and tensors"
            " have none before anything is allocated. Hint: memory_plan(..., activation_bytes=...),"
            " bytes of a sample as functional.saved_bytes measures them on a real batch"
        ) from error


def _forward(module: nn.Module, loss: Loss | None, only_inputs: bool) -> Callable[[Any], Any]:
    if _has_step(module) and not only_inputs:
        return lambda batch: _training_step(module, batch)
    return lambda batch: _with_loss(module, batch, None if only_inputs else loss)


def _has_step(module: nn.Module) -> bool:
    own = getattr(type(module), "training_step", LightningModule.training_step)
    return own is not LightningModule.training_step


def _training_step(module: Any, batch: Any) -> Any:
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, *([0] if takes_index else []))


def _with_loss(module: nn.Module, batch: Any, loss: Loss | None) -> Any:
    """As ``loss(module(*inputs), target)``, of a tuple; of a tensor or dict without a target."""
    if isinstance(batch, dict):
        return (loss or _same)(module(**batch))
    inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    if loss is None:
        _require_taken(module, inputs)
        return module(*inputs)
    count = max(1, len(inputs) - 1)
    return loss(module(*inputs[:count]), *inputs[count:])


def _require_taken(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        inspect.signature(module.forward).bind(*inputs)
    except TypeError as error:
        raise TypeError(
            f"micro_batch has {len(inputs)} entries, which {type(module).__name__}.forward does not"
            f" take ({error}); allowed are its arguments, or with loss= these and a target. Hint:"
            " loss=torch.nn.functional.cross_entropy, or a LightningModule with a training_step"
        ) from None


def _by_stage(
    run: Callable[[Any], Any], batch: Any, owner: nn.Module, stages: Sequence[Sequence[nn.Module]]
) -> tuple[int, ...]:
    sizes = [0] * len(stages)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached

    def staged(*args: Any, **kwargs: Any) -> Any:
        values: Any = args
        for index, layers in enumerate(stages):
            held: list[Any] = []
            sizes[index] += saved_bytes(_chain, layers, values, held)
            values = held[0] if isinstance(held[0], tuple) else (held[0],)
        return held[0]

    with _forward_of(owner, stop):
        before = saved_bytes(_until_reached, run, batch)
    with _forward_of(owner, staged):
        outside = saved_bytes(run, batch)
    sizes[0] += before if len(sizes) > 1 else 0
    sizes[-1] += outside
    return tuple(sizes)


def _chain(layers: Sequence[nn.Module], args: tuple[Any, ...], held: list[Any]) -> None:
    """What a layer returns is the argument, or where it is a tuple the arguments, of the next."""
    value: Any = args
    for layer in layers:
        value = layer(*value) if isinstance(value, tuple) else layer(value)
    held.append(value)


def _until_reached(run: Callable[[Any], Any], batch: Any) -> None:
    with suppress(_Reached):
        run(batch)


@contextmanager
def _forward_of(owner: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(owner)["forward"] = forward
    try:
        yield
    finally:
        del vars(owner)["forward"]


def _silence(module: nn.Module) -> None:
    """Lets nothing be logged and no metric learn; what this sets is put back with the module."""
    for child in module.modules():
        if isinstance(child, LightningModule):
            vars(child).update(log=_nothing, log_dict=_nothing)
        if isinstance(child, Metric):
            vars(child).update(forward=_nan, update=_nothing, compute=_nan)


def _same(output: Any) -> Any:
    return output


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _nan(*args: Any, **kwargs: Any) -> Tensor:
    return torch.tensor(float("nan"))
