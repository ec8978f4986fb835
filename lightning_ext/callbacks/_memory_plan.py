"""Bytes of a training step before anything is allocated, and what really stands.

Source: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, sections 3.1 and 5).
Differs: nothing is assumed of bytes per parameter: the optimizer steps, and the forward pass runs,
    on tensors that have shapes and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ext.callbacks._memory._activations import Saved, Step, saved_of
from lightning_ext.callbacks._memory._batches import samples
from lightning_ext.callbacks._memory._checks import (
    check_module,
    check_optimizer,
    named,
    require_counts,
)
from lightning_ext.callbacks._memory._count import storage_bytes, tensors_in
from lightning_ext.callbacks._memory._layouts import SCHEDULES, Ranks, held_by_rank
from lightning_ext.callbacks._memory._parts import split_submodule
from lightning_ext.callbacks._memory._ranks import Split
from lightning_ext.callbacks._memory._stages import cut_layers, held_by_stages, pipeline_of
from lightning_ext.callbacks._memory._states import OptimizerLike, state_bytes_of
from lightning_ext.scaling import MemoryPlan


def memory_plan(
    module: nn.Module,
    *,
    micro_batch: Any,
    optimizer: OptimizerLike | None = None,
    strategy: str = "auto",
    devices: int = 1,
    example: Any = None,
    loss: Callable[..., Any] | None = None,
    accumulate: int = 1,
    ranks_per_node: int | None = None,
    units: Sequence[nn.Module] | None = None,
    hpz: bool = True,
    error_bytes: float = 0.0,
    module_name: str | None = None,
    stages_per_rank: int | Literal["auto"] = "auto",
    num_microbatches: int | Literal["auto"] = "auto",
    data_parallel: Literal["fsdp2", "ddp"] = "fsdp2",
    data_parallel_size: int = 1,
    state_bytes: float | None = None,
    activation_bytes: float | None = None,
    device: torch.device | str | None = None,
) -> MemoryPlan:
    """Return the bytes of a training step on the rank that needs most, with nothing allocated.

        total = weights + buffers + gradients + states + activations + gathered + copies

    States are counted after one step of the optimizer, activations by ``functional.saved_bytes``
    in one forward pass, both on fake tensors; what is recomputed does not count. Temporary tensors,
    what an allocator rounds up and the gradients of activations come on top. Module, optimizer and
    generators stay as they are.

    Args:
        module: a module on any device, also on ``meta``; of a LightningModule ``training_step``
            runs, without logs.
        micro_batch: a batch of one forward pass of one rank, or the number of its samples.
        optimizer: a class or another callable that makes one of a list of parameters, an
            optimizer, or ``None`` for what ``configure_optimizers`` returns.
        strategy: "single", "ddp", "fsdp2", "zeropp", "deepspeed_stage_1" to "_3",
            "zeropp_deepspeed", or a pipeline's name; "auto": "ddp" for several devices.
        devices: all ranks.
        example: for a number of samples, a batch of any size. Without it a module's
            ``example_input_array`` serves, and the forward pass alone counts.
        loss: of a module without ``training_step``: takes the output and the batch's last entry.
        accumulate: micro-batches of a step; FSDP2 keeps whole gradients above 1.
        ranks_per_node: of "zeropp" and "zeropp_deepspeed"; ``None``: all.
        units: modules that FSDP2 gathers each as one; ``None``: repeated layers.
        hpz: of ZeRO++, whether there is a secondary partition.
        error_bytes: of "zeropp", error feedback for each parameter.
        module_name: of the submodule that a pipeline splits; ``None``: the only one that can be.
        stages_per_rank: of a pipeline; "auto": 1 for "gpipe" and "pipeline_1f1b", else 2.
        num_microbatches: of a pipeline; "auto": twice the stages.
        data_parallel: of a pipeline, between its replicas.
        data_parallel_size: replicas of a pipeline.
        state_bytes: bytes of the optimizer's states for each trained parameter, in place of a step.
        activation_bytes: bytes of a sample, in place of a forward pass.
        device: the one that kernels are chosen for; ``None``: the module's, and the CPU for
            ``meta``.

    Returns:
        The plan: bytes of each part, their sum, which part binds and what helps.

    Raises:
        TypeError: if there is no optimizer, or an argument is of another kind.
        ValueError: if the strategy is unknown, numbers do not fit together, a number of samples has
            no example, the optimizer has no parameter that is trained, or step or forward pass read
            numbers out of tensors.

    Example:
        >>> with torch.device("meta"):
        ...     module = torch.nn.Linear(1000, 1000)
        >>> batch = torch.empty(8, 1000, device="meta")
        >>> plan = memory_plan(module, optimizer=torch.optim.AdamW, micro_batch=batch)
        >>> plan.weights_bytes, plan.states_bytes, plan.activations_bytes, plan.binds
        (4004000, 8008008, 32000, 'states')
    """
    check_module(module)
    check_optimizer(optimizer)
    require_counts(devices=devices, accumulate=accumulate, data_parallel_size=data_parallel_size)
    name = named(strategy, devices)
    size = data_parallel_size if name in SCHEDULES else devices
    per_node = devices if ranks_per_node is None else ranks_per_node
    ranks = Ranks(name, size, per_node, accumulate, units, hpz, error_bytes)
    step = Step(micro_batch, example, loss, _device(module, device))
    states = partial(_states, module, optimizer, state_bytes)
    if name in SCHEDULES:
        pipeline = pipeline_of(devices, ranks, stages_per_rank, num_microbatches, data_parallel)
        owner, layers = split_submodule(module, module_name)
        stages = cut_layers(layers, pipeline.ranks * pipeline.stages_per_rank)
        saved = _saved(module, step, activation_bytes, owner, stages)
        every = held_by_stages(module, states, ranks, pipeline, stages, saved)
    else:
        saved = _saved(module, step, activation_bytes)
        every = [(held_by_rank(module, states, ranks), saved.total)]
    held, activations = max(every, key=lambda pair: sum(pair[0]) + pair[1])
    buffers = storage_bytes(module.buffers())
    fields = {**held._asdict(), "activations_bytes": activations, "buffers_bytes": buffers}
    return MemoryPlan(name, devices, saved.samples, **fields)


def memory_held(module: nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> dict[str, int]:
    """Return the bytes of storages that stand on this rank, by the names of a plan's fields.

    Between the backward pass and ``zero_grad`` of a step, these are what :func:`memory_plan` counts
    as weights, buffers, gradients and states. Of tensors that ranks split this rank's part counts.

    Args:
        module: the module.
        optimizers: one or several.

    Returns:
        ``weights_bytes``, ``buffers_bytes``, ``gradients_bytes`` and ``states_bytes``.

    Example:
        >>> module = torch.nn.Linear(10, 10)
        >>> memory_held(module, torch.optim.AdamW(module.parameters()))["weights_bytes"]
        440
    """
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    weights = list(module.parameters())
    return {
        "weights_bytes": storage_bytes(weights),
        "buffers_bytes": storage_bytes(module.buffers()),
        "gradients_bytes": storage_bytes(p.grad for p in weights if p.grad is not None),
        "states_bytes": storage_bytes(tensors_in([one.state for one in several]), without=weights),
    }


def _device(module: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def _states(
    module: nn.Module,
    optimizer: OptimizerLike | None,
    state_bytes: float | None,
    split: Split | None,
    dtype: torch.dtype | None,
) -> Mapping[int, float]:
    """Bytes of states by parameter, of the rank that keeps most."""
    if state_bytes is None:
        return state_bytes_of(module, optimizer, split, dtype)
    trained = [p for p in module.parameters() if p.requires_grad]
    shape_of = (split or Split(1)).shape_of
    return {id(p): state_bytes * math.prod(shape_of(p)) for p in trained}


def _saved(
    module: nn.Module,
    step: Step,
    activation_bytes: float | None,
    owner: nn.Module | None = None,
    stages: Sequence[Sequence[nn.Module]] = (),
) -> Saved:
    if activation_bytes is None:
        return saved_of(module, step, owner, stages)
    given = step.micro_batch
    count = given if isinstance(given, int) else samples(given)
    each = activation_bytes * count / max(1, len(stages))
    return Saved(count, activation_bytes * count, (each,) * len(stages))
