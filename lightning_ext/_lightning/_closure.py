"""Runs a batch that does not fit into memory again in parts, so that training goes on.

Private: ``automatic_optimization._make_closure`` and the ``_make_step_fn``, ``_make_backward_fn``
    and ``_make_zero_grad_fn`` that it is made of, ``Closure`` and ``ClosureResult``,
    ``lightning_module._current_fx_name``, ``trainer._results.batch`` and ``.batch_size``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext._lightning._chunks import count_samples, cut, even_sizes, join
from lightning_ext._lightning._loader import live_sampler
from lightning_ext._lightning._optimizer_steps import steps_now
from lightning_ext._lightning._out_of_memory import (
    free_memory,
    is_out_of_memory,
    require_repeatable,
)
from lightning_ext._lightning._silent import silent_log


def recover_from_oom(
    trainer: Trainer,
    *,
    on_split: Callable[[int], None],
    on_rerun: Callable[[Any, int], None] | None = None,
    ceiling: int | None = None,
) -> OutOfMemoryRecovery:
    r"""Has automatic optimization survive batches that do not fit, from now on.

    Where forward or backward of a batch of :math:`n` samples runs out of memory, what it spoilt is
    done again in chunks of at most :math:`n/2` samples, halved until it fits. A chunk of
    :math:`n_c` samples counts :math:`n_c/n`, so that a loss that is a mean over samples has the
    gradient of the whole batch. Later batches above the size that did fit run in chunks at once.

    A failure in forward, before any backward of that batch, costs that batch; a failure in
    backward leaves partial sums in ``p.grad``, so all batches of the accumulation window run
    again. Therefore a reference to each batch of the running window is kept, on its device.

    Args:
        trainer: The Trainer in ``on_train_start``, on one device.
        on_split: Called with the samples that did fit, each time they become fewer; from inside
            the batch, so change the loader's sizes later, in ``on_train_batch_end``.
        on_rerun: Called with a batch and its index before it runs again, so that what was read of
            it in ``on_train_batch_start`` can be read again. The running batch comes last.
        ceiling: Samples that are known to fit, from an earlier run.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    recovery = OutOfMemoryRecovery(trainer, on_split, on_rerun or _nothing, ceiling)
    vars(loop)["_make_closure"] = recovery
    return recovery


def runs_in_parts(trainer: Trainer) -> bool:
    """Whether a batch of the running window was run again or in chunks.

    What reads gradients batch by batch (norms of parts) does not see what it expects then.
    """
    own = vars(trainer.fit_loop.epoch_loop.automatic_optimization).get("_make_closure")
    return isinstance(own, OutOfMemoryRecovery) and own.split_window


class _MicroBatch(NamedTuple):
    """One batch of the running window."""

    kwargs: OrderedDict[str, Any]
    batch_idx: int


class OutOfMemoryRecovery:
    """Stands in for ``_make_closure``; made by :func:`recover_from_oom`.

    Attributes:
        ceiling: The most samples that run at once, ``None`` while everything fits.
        split_window: Whether a batch of the running window was run again or in chunks.
    """

    def __init__(
        self,
        trainer: Trainer,
        on_split: Callable[[int], None],
        on_rerun: Callable[[Any, int], None],
        ceiling: int | None,
    ) -> None:
        self.trainer = trainer
        self.loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self.on_split = on_split
        self.on_rerun = on_rerun
        self.ceiling = ceiling
        self.split_window = False
        self.window: list[_MicroBatch] = []

    def __call__(
        self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int
    ) -> Closure:
        """The closure of the next batch."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.window, self.split_window = [], False
        self.window.append(_MicroBatch(kwargs, batch_idx))
        return _RecoveringClosure(self, optimizer)

    def detach(self) -> None:
        """Gives the loop its own closures back."""
        if vars(self.loop).get("_make_closure") is self:
            del vars(self.loop)["_make_closure"]
        self.window = []

    def lower(self, samples: int, ceiling: int) -> None:
        """Notes what did fit, and tells who wants to know."""
        self.ceiling, self.split_window = ceiling, True
        rank_zero_warn(
            f"A micro-batch of {samples} samples ran out of memory; it was run again in parts of at"
            f" most {ceiling}, and larger ones are from now on. Hint: a micro-batch of {ceiling}."
        )
        self.on_split(ceiling)

    def samples(self, batch: _MicroBatch) -> int:
        """Samples of a batch.

        Raises:
            ValueError: They cannot be told apart.
        """
        if "batch" not in batch.kwargs:
            raise ValueError(
                "training_step draws its batches from an iterator. Hint: let it take the batch."
            )
        samples = count_samples(batch.kwargs["batch"])
        sampler = live_sampler(self.trainer)
        drawn = (
            sampler.share(batch.batch_idx).local
            if sampler is not None and sampler.tracked
            else samples
        )
        if drawn != samples:
            raise ValueError(
                f"the sampler drew {drawn} samples and the batch has {samples} rows. Hint: a"
                " collate function that makes one row per sample, or a smaller micro-batch."
            )
        return samples


class _RecoveringClosure(Closure):
    """The closure of the newest batch of the window."""

    def __init__(self, recovery: OutOfMemoryRecovery, optimizer: Optimizer) -> None:
        batch, loop = recovery.window[-1], recovery.loop
        super().__init__(
            loop._make_step_fn(batch.kwargs),
            loop._make_backward_fn(optimizer),
            loop._make_zero_grad_fn(batch.batch_idx, optimizer),
        )
        self.recovery = recovery
        self.optimizer = optimizer
        self.batch = batch
        self.calls = 0
        self.zeroed = self.spoilt = False

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """Forward, ``zero_grad`` where it is due, and backward, in as many parts as it takes."""
        recovery, module = self.recovery, self.recovery.trainer.lightning_module
        limit, hook = recovery.ceiling, module._current_fx_name
        again: list[_MicroBatch] = []
        self.calls += 1
        self.zeroed = self.spoilt = False
        while True:
            try:
                result = self._run_again(again, limit) if again else self._run(self.batch, limit)
                break
            except (RuntimeError, MemoryError) as error:
                smaller = self._smaller(error, limit)
                if smaller is None:
                    raise
                limit = smaller
            # Out here the error is gone, and with it the activations that its traceback held.
            module._current_fx_name = hook
            again = recovery.window if self.spoilt else [self.batch]
            self._free(gradients=len(again) == len(recovery.window))
        if again and limit is not None:
            recovery.lower(recovery.samples(self.batch), limit)
        if steps_now(recovery.trainer):
            recovery.window = []
        return result

    def _run_again(self, batches: Sequence[_MicroBatch], limit: int | None) -> ClosureResult:
        for batch in batches[:-1]:
            self.recovery.on_rerun(batch.kwargs["batch"], batch.batch_idx)
            with silent_log(self.recovery.trainer.lightning_module):
                self._run(batch, limit)
        self.recovery.on_rerun(self.batch.kwargs["batch"], self.batch.batch_idx)
        return self._run(self.batch, limit)

    def _run(self, batch: _MicroBatch, limit: int | None) -> ClosureResult:
        sizes = self._sizes(batch, limit)
        if len(sizes) < 2:
            return self._pass(batch.kwargs, 1.0)
        self.recovery.split_window = True
        whole = batch.kwargs["batch"]
        results = []
        for chunk, size in zip(cut(whole, sizes), sizes, strict=True):
            self._log_as_of(chunk)
            result = self._pass(OrderedDict(batch.kwargs, batch=chunk), size / sum(sizes))
            results.append((result.loss, recursive_detach(result.extra)))
            del result  # and with it the graph
        self._log_as_of(whole)
        return _joined(results, sizes)

    def _log_as_of(self, batch: Any) -> None:
        """Says how much what is logged counts in a mean over the epoch: as the samples of this."""
        logged: Any = self.recovery.trainer._results
        logged.batch, logged.batch_size = batch, None

    def _sizes(self, batch: _MicroBatch, limit: int | None) -> list[int]:
        """Chunks of a batch; none where it is run as it is."""
        if limit is None:
            return []
        try:
            return even_sizes(self.recovery.samples(batch), limit)
        except ValueError:
            return []

    def _pass(self, kwargs: OrderedDict[str, Any], share: float) -> ClosureResult:
        def backward(loss: Tensor) -> None:
            self.spoilt = True
            if self._backward_fn is not None:
                self._backward_fn(loss if share == 1 else loss * share)

        step = self.recovery.loop._make_step_fn(kwargs)
        return Closure(step, backward, self._zero_grad_once).closure()

    def _zero_grad_once(self) -> None:
        if not self.zeroed and self._zero_grad_fn is not None:
            self._zero_grad_fn()
        self.zeroed = True

    def _free(self, *, gradients: bool) -> None:
        if gradients:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        free_memory()

    def _smaller(self, error: BaseException, limit: int | None) -> int | None:
        """Half of what did not fit, or ``None``, with a note on the error if that is why."""
        if not is_out_of_memory(error):
            return None
        try:
            require_repeatable(self.recovery.trainer, self.optimizer, self.calls)
            samples = self.recovery.samples(self.batch)
        except ValueError as obstacle:
            error.add_note(f"Not recovered by running it in parts: {obstacle}")
            return None
        tried = samples if limit is None else min(samples, limit)
        if tried == 1:
            error.add_note(
                f"A micro-batch of {samples} samples was run in parts down to 1, and 1 sample does"
                " not fit into memory. Hint: shorter or smaller samples, activation checkpointing,"
                " or a lower precision."
            )
            return None
        return tried // 2


def _joined(results: Sequence[tuple[Tensor | None, Any]], sizes: Sequence[int]) -> ClosureResult:
    """One result; chunks that skipped their loss count 0, if not all of them did."""
    shares = [size / sum(sizes) for size in sizes]
    pairs = zip(results, shares, strict=True)
    losses = [loss * share for (loss, _), share in pairs if loss is not None]
    loss = torch.stack(losses).sum() if losses else None
    return ClosureResult(loss, extra=join([extra for _, extra in results], sizes))


def _nothing(batch: Any, batch_idx: int) -> None:
    return None
