"""Training steps of a LightningModule of which one submodule is split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_ext.strategies._pipeline._logged import Records, refusing_logs
from lightning_ext.strategies._pipeline._message import Message
from lightning_ext.strategies._pipeline._micro_batches import Cutter, checksum
from lightning_ext.strategies._pipeline._outcomes import (
    Failure,
    as_raised,
    attempt,
    require_success,
)
from lightning_ext.strategies._pipeline._passes import Passes, shape_of
from lightning_ext.strategies._pipeline._random import LOSS, OUTSIDE, digest
from lightning_ext.strategies._pipeline._redirect import Call, captured, redirected, require_taken
from lightning_ext.strategies._pipeline._rehearsal import untouched_metrics
from lightning_ext.strategies._pipeline._skips import begin_of_loss, require_no_stage_parameters

_LOSS = "loss"


class Window(NamedTuple):
    """Where a batch stands.

    Args:
        position: Batches of the fit before it.
        parts: Batches of an optimizer step, or more where this one weighs less.
        reduces: Whether it is the last of them.
    """

    position: int
    parts: float
    reduces: bool


class Training:
    """Forward and backward passes of batches.

    Args:
        passes: The local stages.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes, self._module = passes, passes.module
        self._engine, self._layers = passes.engine, passes.layers
        self._message = Message(self._engine.group, self._engine.device)
        self._records = Records(self._engine.device)
        self.begin_fit()

    def begin_fit(self) -> None:
        """Lets the first batch of a fit say again how large micro-batches are."""
        self._cutter = Cutter(self._hook("pipeline_micro_batches"))

    def step(
        self, step: Callable[[Any], Any], batch: Any, count: int, window: Window
    ) -> tuple[Tensor, dict[str, Any]]:
        """Runs a batch; all ranks must call.

        Args:
            step: The user's ``training_step`` of a micro-batch.
            batch: The same on all ranks of a pipeline.
            count: Micro-batches of the first batch, which the size of all of them follows.
            window: Where the batch stands.

        Returns:
            The mean of the losses, and what was logged: (value, options of ``log``) by name.

        Raises:
            MisconfigurationException: On all ranks, before anything is computed.
        """
        self._passes.begin_step(window.position)
        micro, calls, key = self._prepare(step, batch, count)
        finish = self._rehearsed_loss(step, micro[0])
        metas = self._passes.metas(key, calls, finish, train=True)

        def loss(output: Any, index: Tensor) -> Tensor:
            with self._records.listening(self._module, samples):
                found = self._loss(step, micro[int(index)], int(index), output)
            losses.append(found.detach())
            return found / (len(micro) * window.parts)

        losses: list[Tensor] = []
        samples = self._cutter.size
        with self._passes.feeding(calls), as_raised():
            self._engine.train(metas, len(micro), loss, reduces=window.reduces)
        return self._tell(losses)

    def _prepare(
        self, step: Callable[[Any], Any], batch: Any, count: int
    ) -> tuple[list[Any], list[Call], Any]:
        """Micro-batches, on the first rank what the stages are called with, and its key."""
        where = f"rank {dist.get_rank()}"
        found = attempt(where, lambda: self._parts_of(batch, count))
        calls: Any = []
        if self._engine.is_first and not isinstance(found, Failure):
            calls = attempt(where, lambda: self._calls(step, found))
        failure = next((x for x in (found, calls) if isinstance(x, Failure)), None)
        shape = repr(shape_of(calls[0])) if calls and failure is None else ""
        return found, calls, self._agree(batch, failure, shape)

    def _parts_of(self, batch: Any, count: int) -> list[Any]:
        with self._passes.draws(count, OUTSIDE):  # an own method may draw: alike on all ranks
            return self._cutter.parts(batch, count)

    def _calls(self, step: Callable[[Any], Any], micro: Sequence[Any]) -> list[Call]:
        found = []
        with self._runs_again():
            for index, part in enumerate(micro):
                records = Records(self._engine.device)
                with self._passes.draws(index, OUTSIDE), records.listening(self._module, 1):
                    found.append(self._call(step, part))
        shapes = [shape_of(call) for call in found]
        if any(shape != shapes[0] for shape in shapes):
            raise MisconfigurationException(
                f"Micro-batches of one batch differ in what {self._layers.name!r} is called with:"
                f" {sorted(set(map(str, shapes)))[:2]}. Allowed are tensors of the same shapes."
                " Hint: pad all samples to one length."
            )
        return found

    def _runs_again(self) -> AbstractContextManager[None]:
        """What is before the call leaves its trace once, where the answer runs it again."""
        own = [self._hook(name) for name in ("pipeline_inputs", "pipeline_loss")]
        if self._engine.is_last and own == [None, None]:
            return self._passes.outside.untraced()
        return untouched_metrics(self._module)

    def _hook(self, name: str) -> Any:
        return getattr(self._module, name, None)

    def _call(self, step: Callable[[Any], Any], part: Any) -> Call:
        own = self._hook("pipeline_inputs")
        with self._passes.precision():
            if own is None:
                layers = self._layers
                call = captured(layers.owner, layers.name, lambda: step(part))
                require_taken(call, layers.members[0], layers.name)
                return call
            with refusing_logs(self._module):
                inputs = own(part)
        return Call(inputs if isinstance(inputs, tuple) else (inputs,), {})

    def _agree(self, batch: Any, failure: Failure | None, shape: str) -> Any:
        """Raises on all ranks if one failed, or if ranks of a pipeline have other batches.

        Args:
            batch: Of this rank.
            failure: Of this rank.
            shape: What the stages are called with, on the first rank.

        Returns:
            A key of the shape and of which parameters are trained, the same on all of a pipeline.
        """
        group, device = self._engine.group, self._engine.device
        total = checksum((batch, self._module.trainer.num_training_batches))
        facts = [failure is not None, total, digest(shape), self._trained()]
        own = torch.tensor(facts, dtype=torch.int64, device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        failed, sums, *keys = torch.stack(found).T.tolist()
        width = dist.get_world_size(group)
        differ = [i for i in range(0, len(sums), width) if len(set(sums[i : i + width])) > 1]
        if differ and not any(failed):
            ranks = list(range(differ[0], differ[0] + width))
            failure = Failure(
                "The ranks of a pipeline have different batches, or different numbers of them;"
                " allowed are the same on all ranks. Hint: leave use_distributed_sampler on, or"
                " seed what shuffles on all ranks alike, as seed_everything(0, workers=True) does",
                f"ranks {ranks}",
            )
        if differ or any(failed):
            require_success(failure)
        first = dist.get_rank() // width * width
        return tuple(tuple(key[first : first + width]) for key in keys)

    def _trained(self) -> int:
        """Of which parameters of the local stages a gradient is taken."""
        stages = self._engine.stages
        flags = [[p.requires_grad for p in stages[i].parameters()] for i in sorted(stages)]
        return digest(repr(flags))

    def _rehearsed_loss(self, step: Callable[[Any], Any], part: Any) -> Callable[[Any], None]:
        def finish(output: Any) -> None:
            records = Records(self._engine.device)
            begin = begin_of_loss()
            with self._passes.outside.untraced(), records.listening(self._module, 1):
                loss = self._loss(step, part, 0, output)
            if dist.get_world_size(self._engine.group) > 1:
                stages = self._engine.stages
                require_no_stage_parameters(loss, begin, self._module, stages)

        return finish

    def _loss(self, step: Callable[[Any], Any], part: Any, index: int, output: Any) -> Tensor:
        own = self._hook("pipeline_loss")
        layer = OUTSIDE if own is None else LOSS  # pipeline_inputs draws OUTSIDE, too
        with self._passes.draws(index, layer), self._passes.precision():
            if own is not None:
                found = own(output, part)
            else:
                layers = self._layers
                found = redirected(layers.owner, layers.name, output, lambda: step(part))
        loss = found.get(_LOSS) if isinstance(found, dict) else found
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"training_step returned {type(found).__name__}; allowed under a pipeline is a"
                " loss, or a dict with 'loss', a tensor of one number. Hint: a step that is to be"
                " left out returns the loss times 0."
            )
        return loss

    def _tell(self, losses: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """The loss and what was logged, on all ranks as the last one has it."""
        if not self._engine.is_last:
            found = self._message.receive()
        else:
            logged = self._records.pop()
            values = {(_LOSS, ""): torch.stack(losses).mean()}
            for name, (value, samples, _) in logged.items():
                values["value", name] = value
                values["samples", name] = torch.tensor(samples, device=value.device)
            options = {("value", name): one.options for name, one in logged.items()}
            found = self._message.send(values, options)
        loss, _ = found.pop((_LOSS, ""))
        return loss, {
            name: (value, {**options, "batch_size": int(found["samples", name][0])})
            for (kind, name), (value, options) in found.items()
            if kind == "value"
        }
