"""Calls of a split submodule outside of training: they run on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_ext.strategies._pipeline._micro_batches import cut
from lightning_ext.strategies._pipeline._outcomes import attempt, raise_first
from lightning_ext.strategies._pipeline._passes import Passes
from lightning_ext.strategies._pipeline._redirect import Call


class Evaluation:
    """What the submodule's ``forward`` is while no micro-batches are trained.

    Args:
        passes: The local stages.
        num_microbatches: Into how many a call is cut at most.
    """

    def __init__(self, passes: Passes, num_microbatches: int) -> None:
        self._passes, self._count = passes, num_microbatches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the whole submodule would return, on all ranks of the pipeline, which must call."""
        self._passes.begin_call()
        # What FSDP2 gathers here is used again by a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            return self._run(Call(*tree_map(_usable, (args, kwargs))))

    def _run(self, whole: Call) -> Any:
        passes, engine = self._passes, self._passes.engine
        calls, size = self._cut(whole)
        count = len(calls)
        metas = passes.metas(passes.told_key(calls), calls, lambda output: None, train=False)
        with passes.feeding(calls):
            found = engine.evaluate(metas, count)
        outcome: Any = None
        if engine.is_last:
            where = f"pipeline rank {engine.rank}"
            outcome = attempt(where, partial(_joined, found, size, count))
        return _from_last(outcome, engine.group, engine.device)

    def _cut(self, whole: Call) -> tuple[list[Call], int]:
        """Parts of a call, the most that are equal, as the first rank cuts it; samples of each."""
        if self._count == 1:
            return [whole], 1
        module, engine = self._passes.module, self._passes.engine
        own = {id(x) for x in (*module.parameters(), *module.buffers())}
        calls, size = _parts(whole, self._count, own) if engine.is_first else ([], 1)
        told = [(len(calls), size)]
        source = dist.get_global_rank(engine.group, engine.owners[0])
        dist.broadcast_object_list(told, source, group=engine.group)
        count, size = told[0]
        return calls or [whole] * count, size


def _usable(value: Any) -> Any:
    """The same out of inference mode, where layers may change it in place."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _samples(call: Call, own: Collection[int]) -> int:
    """The first dimension of the first tensor that is not the module's own; 1 if there is none."""
    leaves = tree_flatten((call.args, call.kwargs))[0]
    sizes = [len(x) for x in leaves if isinstance(x, Tensor) and x.ndim and id(x) not in own]
    return max(sizes[0], 1) if sizes else 1


def _parts(call: Call, most: int, own: Collection[int]) -> tuple[list[Call], int]:
    """Equal parts of a call and samples of each; the call itself where a list has two readings."""
    samples = _samples(call, own)
    count = max(n for n in range(1, most + 1) if samples % n == 0)
    try:
        args = cut(call.args, samples, count, whole=own)
        kwargs = cut(call.kwargs, samples, count, whole=own)
    except MisconfigurationException:
        return [call], samples
    return [Call(*one) for one in zip(args, kwargs, strict=True)], samples // count


def _joined(found: Sequence[Any], size: int, count: int) -> Any:
    if count == 1:
        return found[0]
    columns, spec = zip(*(tree_flatten(one)[0] for one in found), strict=True), found[0]
    joined = [_joined_values(column, size) for column in columns]
    return tree_unflatten(joined, tree_flatten(spec)[1])


def _joined_values(values: Sequence[Any], size: int) -> Any:
    if not all(isinstance(x, Tensor) and x.ndim and len(x) == size for x in values):
        raise MisconfigurationException(
            f"num_eval_microbatches cut a call into parts of {size} samples, of which the submodule"
            f" made {_kind(values[0])}. Allowed are tensors with a sample in each row. Hint:"
            " num_eval_microbatches=1."
        )
    return torch.cat(tuple(values))


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"


@dataclass(frozen=True)
class _Described:
    shape: torch.Size
    dtype: torch.dtype


def _from_last(value: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
    """What the last rank of a group has, tensors and all."""
    source = dist.get_global_rank(group, dist.get_world_size(group) - 1)
    own = dist.get_rank() == source
    told = [tree_map(_described, value) if own else None]
    dist.broadcast_object_list(told, source, group=group)
    raise_first(told, value)
    found = value if own else tree_map(_room(device), told[0])
    for one in tree_flatten(found)[0]:
        if isinstance(one, Tensor):
            dist.broadcast(one.contiguous() if own else one, source, group=group)
    return found


def _room(device: torch.device) -> Callable[[Any], Any]:
    def room(one: Any) -> Any:
        if not isinstance(one, _Described):
            return one
        return torch.empty(one.shape, dtype=one.dtype, device=device)

    return room


def _described(value: Any) -> Any:
    return _Described(value.shape, value.dtype) if isinstance(value, Tensor) else value
