"""Measures how long each layer takes, for stages of equal time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_ext.strategies._pipeline._layers import Layers
from lightning_ext.strategies._pipeline._outcomes import attempt, raise_first
from lightning_ext.strategies._pipeline._redirect import Call, captured
from lightning_ext.strategies._pipeline._rehearsal import without_a_trace
from lightning_ext.strategies._pipeline._stage import Context, Stage

_WARM_UP, _TIMES = 2, 5


def layer_seconds(
    module: LightningModule,
    layers: Layers,
    device: torch.device,
    precision: Context,
    *,
    recompute: bool,
) -> list[float]:
    """Seconds of the forward and backward pass of each layer, the median of several.

    Rank 0 measures one layer after the other on its device; all ranks must call.

    Args:
        module: Whole, with an ``example_input_array``, which its ``forward`` takes.
        layers: Of the split submodule.
        device: Where they will be.
        precision: The context of a forward pass.
        recompute: Whether the backward pass repeats the forward one.

    Raises:
        MisconfigurationException: On all ranks, if there is no example or it does not run.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        stages = [
            Stage([one], index, unpacks=layers.unpacks, precision=precision, recompute=recompute)
            for index, one in enumerate(layers.members)
        ]
        told = [attempt("rank 0", partial(_measured, module, layers, stages, device))]
    own = told[0]
    dist.broadcast_object_list(told, 0)
    raise_first(told, own)
    found: list[float] = told[0]
    return found


def _measured(
    module: LightningModule, layers: Layers, stages: Sequence[Stage], device: torch.device
) -> list[float]:
    call = _example(module, layers)
    found = []
    for stage in stages:
        parameter = next(stage.parameters(), None)
        home = device if parameter is None else parameter.device
        stage.to(device)
        with without_a_trace(stage, device):
            runs = [_timed(stage, call, device) for _ in range(_WARM_UP + _TIMES)]
        stage.to(home)
        found.append(median(seconds for seconds, _ in runs[_WARM_UP:]))
        output = runs[-1][1]
        unpacked = stage.unpacks and isinstance(output, tuple)
        call = Call(output if unpacked else (output,), {})
    return found


def _example(module: LightningModule, layers: Layers) -> Call:
    example = module.example_input_array
    if example is None:
        raise MisconfigurationException(
            f"split='time' measures layers, and {type(module).__name__}.example_input_array is"
            " None. Allowed are arguments of its forward. Hint: self.example_input_array ="
            " torch.zeros(micro-batch, …), or split='params'."
        )
    kwargs = example if isinstance(example, dict) else {}
    args = () if kwargs else example if isinstance(example, (tuple, list)) else (example,)
    with torch.no_grad():
        step = partial(module.forward, *args, **kwargs)
        return captured(layers.owner, layers.name, step, "forward(*example_input_array)")


def _timed(stage: Stage, call: Call, device: torch.device) -> tuple[float, Any]:
    """Seconds of both passes, and what came out."""
    call = Call(*tree_map(partial(_as_input, device=device), tuple(call)))
    stage.calls = lambda index: call
    _wait(device)
    start = perf_counter()
    output = stage(micro_batch=torch.tensor(0))
    ends = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    given = [x for x in tree_leaves(tuple(call)) if isinstance(x, Tensor)]
    sources = [x for x in (*given, *stage.parameters()) if x.requires_grad]
    if ends:
        torch.autograd.grad(ends, sources, [torch.ones_like(x) for x in ends], allow_unused=True)
    _wait(device)
    return perf_counter() - start, output


def _as_input(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device).requires_grad_(value.is_floating_point())


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
