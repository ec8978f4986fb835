"""What a rank holds of a module under each strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_ext.callbacks._memory._parts import own_parameters, repeated_layers
from lightning_ext.callbacks._memory._ranks import Split
from lightning_ext.scaling import MemoryPlan, padded_parameters, sharded_memory

ShapeOf = Callable[[Tensor], Sequence[int]]
States = Callable[[Split | None, torch.dtype | None], Mapping[int, float]]
SHARDED = ("fsdp2", "zeropp")
# Of DeepSpeed, the stage of ZeRO in the words of `scaling.sharded_memory`.
DEEPSPEED = {
    "deepspeed_stage_1": "zero1",
    "deepspeed_stage_2": "zero2",
    "deepspeed_stage_3": "zero3",
    "zeropp_deepspeed": "zero3",
}
SCHEDULES = {
    "breadth_first_pipeline": "breadth_first",
    "gpipe": "gpipe",
    "pipeline_1f1b": "1f1b",
    "pipeline_interleaved_1f1b": "interleaved_1f1b",
}
STRATEGIES = ("auto", "single", "ddp", *SHARDED, *DEEPSPEED, *SCHEDULES)


class Ranks(NamedTuple):
    """How a strategy is set.

    Attributes:
        strategy: Its name.
        size: Ranks over which samples, and what is sharded, are divided.
        per_node: Ranks of a node.
        accumulate: Micro-batches of a step.
        units: Modules that FSDP2 gathers each as one; ``None``: repeated layers.
        hpz: Whether there is a secondary partition.
        error_bytes: Of error feedback for each parameter.
    """

    strategy: str
    size: int
    per_node: int
    accumulate: int
    units: Sequence[nn.Module] | None
    hpz: bool
    error_bytes: float


class Held(NamedTuple):
    """Bytes of one rank, as in :class:`MemoryPlan`."""

    weights_bytes: float
    gradients_bytes: float
    states_bytes: float
    gathered_bytes: float = 0.0
    copies_bytes: float = 0.0


def held_by_rank(module: nn.Module, states: States, ranks: Ranks) -> Held:
    """Counts the bytes of a rank without activations.

    Args:
        module: All of it.
        states: Bytes of the optimizer's states by parameter, of the rank that keeps most.
        ranks: How they are divided.
    """
    if ranks.strategy in SHARDED:
        return _sharded(module, states, ranks)
    if ranks.strategy in DEEPSPEED:
        return _deepspeed(module, states, ranks)
    parameters = list(module.parameters())
    gradients = gradient_bytes(parameters)
    # DDP's reducer has gradients a second time, in buckets.
    buckets = gradients if ranks.strategy == "ddp" else 0.0
    return Held(
        weight_bytes(parameters), gradients, sum(states(None, None).values()), copies_bytes=buckets
    )


def _sharded(module: nn.Module, states: States, ranks: Ranks) -> Held:
    parameters = list(module.parameters())
    split = Split(ranks.size)
    secondary = sharded_memory(
        sum(p.numel() for p in parameters),
        ranks.size,
        math.gcd(ranks.size, ranks.per_node),
        "zeropp",
        weight_bytes=weight_bytes(parameters) / sum(p.numel() for p in parameters),
        hpz=ranks.hpz,
        error_bytes=ranks.error_bytes,
    )
    copies = secondary.secondary + secondary.error_feedback
    return Held(
        weight_bytes(parameters, split.shape_of),
        gradient_bytes(parameters, split.shape_of if ranks.accumulate == 1 else None),
        sum(states(split, None).values()),
        _gathered(module, ranks),
        copies if ranks.strategy == "zeropp" else 0.0,
    )


def _gathered(module: nn.Module, ranks: Ranks) -> float:
    """Two units and the root with their weights, and gradients of the unit that is reduced."""
    if ranks.size == 1:
        return 0.0
    units = list(repeated_layers(module) if ranks.units is None else ranks.units)
    inner = {id(p) for p in own_parameters(units)}
    parts = [[p for p in unit.parameters() if p.ndim] for unit in units]
    root = [p for p in module.parameters() if p.ndim and id(p) not in inner]
    found = MemoryPlan.gathered(
        [_padded_bytes(x, ranks) for x in parts], _padded_bytes(root, ranks)
    )
    if ranks.accumulate > 1:  # gradients are whole anyway, and counted as such
        return found
    trained = [[p for p in part if p.requires_grad] for part in (*parts, root)]
    return found + max(_padded_bytes(part, ranks) for part in trained)


def _padded_bytes(parameters: Iterable[Parameter], ranks: Ranks) -> int:
    """Bytes of parameters as they are gathered, rows filled up to a multiple of the ranks."""
    return sum(padded_parameters([p.shape], ranks.size) * p.itemsize for p in parameters)


def _deepspeed(module: nn.Module, states: States, ranks: Ranks) -> Held:
    """By the formulas of ZeRO; the optimizer steps a copy of the weights in float32."""
    parameters = list(module.parameters())
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    node = math.gcd(ranks.size, ranks.per_node)
    found = sharded_memory(
        count,
        ranks.size,
        node,
        DEEPSPEED[ranks.strategy],
        weight_bytes=weight_bytes(parameters) / count,
        gradient_bytes=gradient_bytes(parameters) / count,
        optimizer_bytes=(sum(states(None, torch.float32).values()) + 4 * trained) / count,
    )
    keeps_copy = ranks.strategy == "zeropp_deepspeed" and ranks.hpz and node < ranks.size
    copies = weight_bytes(parameters) / node if keeps_copy else 0.0
    return Held(found.weights, found.gradients, found.optimizer, copies_bytes=copies)


def weight_bytes(parameters: Iterable[Parameter], shape_of: ShapeOf | None = None) -> int:
    """Counts the bytes of parameters.

    Args:
        parameters: The parameters.
        shape_of: Of each, the part that counts; ``None``: all of it.
    """
    shape_of = shape_of or (lambda p: p.shape)
    return sum(math.prod(shape_of(p)) * p.itemsize for p in parameters)


def gradient_bytes(parameters: Iterable[Parameter], shape_of: ShapeOf | None = None) -> int:
    """Counts the bytes of the gradients of those that are trained.

    Args:
        parameters: The parameters.
        shape_of: As in :func:`weight_bytes`.
    """
    return weight_bytes((p for p in parameters if p.requires_grad), shape_of)
