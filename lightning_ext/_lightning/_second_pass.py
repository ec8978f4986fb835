"""The batches of an accumulation window once more, at other weights, before the optimizer's step.

Private: ``automatic_optimization._training_step``, the precision plugin's ``_after_closure`` and
    ``scaler``, ``epoch_loop.total_batch_idx``; of torch, ``_per_optimizer_states`` of a
    ``GradScaler``, ``_version`` of a tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_ext._lightning._closure import runs_in_parts
from lightning_ext._lightning._loader import live_sampler
from lightning_ext._lightning._own_gradients import reshard
from lightning_ext._lightning._random_state import _local_state, _set_local_state
from lightning_ext._lightning._sharded_view import local_part
from lightning_ext._lightning._silent import _nothing, _replaced, silent_log, untouched
from lightning_ext._lightning._view import view
from lightning_ext._lightning._window import batch_share


class _Pass(NamedTuple):
    """A batch of the running window, and what its first pass began with."""

    kwargs: OrderedDict[str, Any]
    versions: list[int]
    generators: dict[str, Any]
    weight: float
    loss: Tensor | None


class SecondPass:
    """Has automatic optimization keep the batches of a window, and can run them again.

    It holds them by reference, on their device, until the optimizer steps.

    Args:
        trainer: The Trainer in ``on_train_start``.
        wanted: Whether the batches of the running step are to be kept.
        ready: Called with the optimizer when the gradient of the window is there: averaged over
            ranks, free of the gradient scaler's factor if the optimizer does not see to that, not
            clipped, and not yet seen by any ``on_before_optimizer_step``.

    Raises:
        MisconfigurationException: The run cannot repeat a window.
    """

    def __init__(
        self, trainer: Trainer, *, wanted: Callable[[], bool], ready: Callable[[Optimizer], None]
    ) -> None:
        _check(trainer)
        self._trainer = trainer
        self._wanted, self._ready = wanted, ready
        self._passes: list[_Pass] = []
        self._stepped: int | None = None  # in which batch
        self._tried = False
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self._plugin = trainer.precision_plugin
        self._step, self._go_on = self._loop._training_step, self._plugin._after_closure
        vars(self._loop)["_training_step"] = self._first_pass
        vars(self._plugin)["_after_closure"] = self._after_closure

    def detach(self) -> None:
        """Gives loop and precision plugin their own functions back."""
        vars(self._loop).pop("_training_step", None)
        vars(self._plugin).pop("_after_closure", None)
        self._passes = []

    def repeat(
        self, optimizer: Optimizer, params: Sequence[Parameter], shifts: list[Tensor]
    ) -> Tensor:
        """Puts into ``grad`` what the window's batches have at other weights; to call in ``ready``.

        They run through the strategy and in its precision, with the random numbers of their first
        pass. Weights, buffers, attributes, generators and metrics come back as they were, bit for
        bit and after an error, too; nothing is logged, and no hook of a callback runs. An optimizer
        that has ``add_loss`` gets the losses of this pass, free of the scaler's factor.

        Args:
            optimizer: The optimizer that will step.
            params: Parameters of the optimizer.
            shifts: What is added to each meanwhile; of a DTensor, to this rank's part. The list is
                emptied: the second pass needs the room.

        Returns:
            How much larger this rank's mean loss was than in the first pass.
        """
        before = [one.loss for one in self._passes if one.loss is not None]
        reshard(self._trainer.lightning_module)
        optimizer.zero_grad()  # it may keep more than gradients of the first pass
        with _shifted(params, shifts), self._aside():
            losses = self._run(optimizer)
        self._unscale(optimizer)
        _tell(optimizer, losses)
        change = _sum(losses) - _sum(before)
        self._check_metrics(change)
        return change

    def _first_pass(self, kwargs: OrderedDict[str, Any]) -> ClosureResult:
        trainer = self._trainer
        loop, index = trainer.fit_loop.epoch_loop, trainer.fit_loop.batch_idx
        if index % trainer.accumulate_grad_batches == 0:
            self._passes = []
        if not self._wanted():
            return self._step(kwargs)
        _check_batch(kwargs)
        if self._stepped == loop.total_batch_idx:
            raise MisconfigurationException(
                f"{type(trainer.optimizers[0]).__name__} calls the closure more than once in a"
                " step, and the batches of a step are run twice already. Hint: the optimizer that"
                " it wraps."
            )
        kept = OrderedDict(kwargs, batch=pytree.tree_map(lambda leaf: leaf, kwargs["batch"]))
        versions, generators = _versions(kept), _local_state()
        result = self._step(kwargs)
        weight = _loss_weight(trainer, kwargs["batch"], index)
        self._passes.append(_Pass(kept, versions, generators, weight, _weighed(result, weight)))
        return result

    def _after_closure(self, model: Any, optimizer: Any) -> None:
        passes = self._passes
        try:
            if passes and runs_in_parts(self._trainer):
                rank_zero_warn(
                    "A batch of this optimizer step ran out of memory and was run in parts; the"
                    " step follows the plain gradient. Hint: a smaller micro-batch."
                )
            elif passes and passes[-1].loss is not None:  # without one a scaler does not step
                self._stepped = self._trainer.fit_loop.epoch_loop.total_batch_idx
                self._ready(optimizer)
        finally:
            self._passes = []
        self._go_on(model, optimizer)

    @torch.enable_grad()
    def _run(self, optimizer: Optimizer) -> list[Tensor]:
        last, losses = len(self._passes) - 1, []
        block = getattr(self._trainer.strategy, "block_backward_sync", nullcontext)
        for number, one in enumerate(self._passes):
            if _versions(one.kwargs) != one.versions:
                raise MisconfigurationException(
                    "training_step writes into its batch, which has to be run again as it came."
                    " Hint: operations that are not in place, or on a clone."
                )
            _set_local_state(one.generators)
            with block() if number < last else nullcontext():
                result = self._step(one.kwargs)
                loss, whole = _weighed(result, one.weight), result.closure_loss
                if (loss is None) != (one.loss is None):
                    raise MisconfigurationException(
                        "training_step returned a loss in one pass over a batch and none in the"
                        " other. Hint: a loss that is not finite may be returned as it is."
                    )
                if loss is None or whole is None:
                    continue
                losses.append(loss)
                self._backward(whole if one.weight == 1 else whole * one.weight, optimizer)
        return losses

    def _backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """As the loop does it, without the hooks of callbacks."""
        with ExitStack() as stack:
            for callback in vars(self._trainer)["callbacks"]:
                for name in ("on_before_backward", "on_after_backward"):
                    stack.enter_context(_replaced(callback, name, _nothing))
            call._call_strategy_hook(self._trainer, "backward", loss, optimizer)

    def _unscale(self, optimizer: Optimizer) -> None:
        """Has a gradient scaler look at the new gradients as it has at those of the first pass."""
        scaler = getattr(self._plugin, "scaler", None)
        if scaler is None or _optimizer_handles_unscaling(optimizer):
            return
        scaler._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY
        scaler.unscale_(optimizer)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within, nothing that a step does to module, logs and generators lasts."""
        module: LightningModule = self._trainer.lightning_module
        with ExitStack() as stack:
            stack.callback(_set_local_state, _local_state())
            stack.enter_context(_restored(list(module.buffers())))
            stack.enter_context(untouched(module))
            stack.enter_context(silent_log(module))
            yield

    def _check_metrics(self, change: Tensor) -> None:
        """Once per fit, because it waits for the device."""
        modules = self._trainer.lightning_module.modules()
        if not self._tried and any(isinstance(one, Metric) for one in modules) and change.isnan():
            raise MisconfigurationException(
                "The loss of the second pass is nan: it may be made of a metric of torchmetrics,"
                " which returns nan there so that its state stays. Hint: the metric's functional"
                " form for the loss."
            )
        self._tried = True


def _check(trainer: Trainer) -> None:
    if view(trainer).cuts_batches:
        raise MisconfigurationException(
            "The batches of a step are run twice, and"
            f" {type(trainer.strategy).__name__} runs forward and backward passes of its stages by"
            " itself, once. Allowed are a single device, DDP and FSDP2. Hint:"
            " Trainer(strategy='fsdp2')."
        )
    if not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            "The batches of a step are run twice under automatic optimization alone;"
            " automatic_optimization is False. Hint: let the Trainer call the optimizer."
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "LBFGS evaluates its batch several times in a step, and the batches of a step are run"
            " twice already. Hint: a first-order optimizer."
        )


def _check_batch(kwargs: OrderedDict[str, Any]) -> None:
    if "batch" not in kwargs:
        raise MisconfigurationException(
            "training_step draws its batches from an iterator, which cannot give them again. Hint:"
            " let it take the batch."
        )


def _versions(kwargs: OrderedDict[str, Any]) -> list[int]:
    """How often each tensor was written to."""
    leaves = pytree.tree_leaves(kwargs["batch"])
    return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]


def _loss_weight(trainer: Trainer, batch: Any, batch_idx: int) -> float:
    """What AdaptiveBatchSize multiplies the loss by, if it takes part."""
    sampler = live_sampler(trainer)
    if sampler is None or not sampler.tracked:
        return 1.0
    return batch_share(trainer, batch, batch_idx).loss_weight


def _weighed(result: ClosureResult, weight: float) -> Tensor | None:
    return None if result.loss is None else result.loss * weight


def _tell(optimizer: Optimizer, losses: Sequence[Tensor]) -> None:
    """Has an optimizer that computes with the loss, as PolyakSGD, know that of its gradient."""
    add_loss = getattr(optimizer, "add_loss", None)  # of a wrapper that of its base
    if add_loss is not None:
        for loss in losses:
            add_loss(loss)


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.reshape(()) for loss in losses]).sum()


@contextmanager
def _shifted(params: Sequence[Parameter], shifts: list[Tensor]) -> Iterator[None]:
    """Adds to parameters, and puts back the very bits that they had."""
    local = [local_part(parameter).detach() for parameter in params]
    with _restored(local):
        with torch.no_grad():
            torch._foreach_add_(local, shifts)
        shifts.clear()
        yield


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    """Copies tensors, and writes the copies back."""
    copies = [x.detach().clone() for x in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, copy in zip(tensors, copies, strict=True):
                x.copy_(copy)
