"""AdamW and Lion with states in few bits; the encoding and decoding of these states alone.

What an update moves of a parameter: the weight and each state, with its scales, twice, the gradient
once, and a byte of errors twice. Second moments in int4 take a launch for their maxima before; it
is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import _update_lists as made
from benchmarks._gpu._timing import Call, Measurement, later, peers, ways
from benchmarks._gpu._update_lists import ADAM, Lists
from lightning_ext import functional, kernels

FORMATS = ("bfloat16", "int8", "int4", "fp8")
KINDS = ("float32", "bfloat16, error bits")
SIGNS = {True: "with a sign", False: "without a sign"}

Others = Callable[[Lists], dict[str, Call]]


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield both rules in every format, and the formats by themselves."""
    name = made.SMALL_FEW if small else made.FEW
    shape = (name, (made.SMALL if small else made.SHAPES)[name])
    for op in ("adamw_update_", "lion_update_"):
        # All in bfloat16: what the fused optimizers of torch do with weights in bfloat16.
        all_short = others_of(op, "bfloat16", "bfloat16, nearest", small)
        yield made.measurement(op, shape, device, all_short, "bfloat16", "bfloat16, nearest")
        for kind in KINDS:
            for format in FORMATS:
                others = others_of(op, kind, format, small)
                yield made.measurement(op, shape, device, others, kind, format)
    count, sizes = shape[1]
    x = torch.randn(count * sizes[0], *sizes[1:], device=device)
    for format in FORMATS:
        for signed in SIGNS:
            yield from coded(x, format, signed)


def coded(x: Tensor, format: str, signed: bool) -> Iterator[Measurement]:
    """Yield a format's encoding and decoding."""
    x = x if signed else x.abs()
    state = functional.encode_state(x, format, signed=signed)
    mode, shape = f"{format}, {SIGNS[signed]}", " x ".join(map(str, x.shape))
    moved = x.nbytes + functional.state_bytes(state)
    encode = partial(kernels.encode_state, x, format, signed=signed)
    calls = ways(lambda fused: encode(fused=fused))
    yield Measurement("encode_state", mode, "float32", shape, calls, moved)
    calls = ways(lambda fused: kernels.decode_state(state, fused=fused))
    yield Measurement("decode_state", mode, "float32", shape, calls, moved)


def others_of(op: str, kind: str, format: str, small: bool) -> Others:
    """Return optimizers that keep as much of a parameter, by the names of their packages."""
    if small:
        return lambda lists: {}
    if format == "bfloat16, nearest":
        return torch_adamw if op == "adamw_update_" else lambda lists: {}
    makers = {
        package: path
        for (rule, weights, states, package), path in PACKAGES.items()
        if (rule, weights, states) == (op, kind, format)
    }
    return lambda lists: peers(
        **{package: partial(step_of, path, lists) for package, path in makers.items()}
    )


def torch_adamw(lists: Lists) -> dict[str, Call]:
    """AdamW of torch, whose states have the dtype of the weights."""
    make = partial(made.optimizer, torch.optim.AdamW, lists, **ADAM)
    return {"torch fused": later(lambda: make(fused=True))}


def step_of(path: str, lists: Lists, package: Any) -> Call:
    """Return the step of a package's optimizer."""
    found = package
    for name in path.split("."):
        found = getattr(found, name)
    return made.optimizer(found, lists, **ADAM)


PACKAGES = {  # rule, weights, states and package: the optimizer's name in it
    ("adamw_update_", "float32", "int8", "bitsandbytes"): "optim.AdamW8bit",
    ("adamw_update_", "float32", "int8", "torchao"): "optim.AdamW8bit",
    ("adamw_update_", "float32", "int8", "flashoptim"): "FlashAdamW",
    ("adamw_update_", "float32", "int4", "torchao"): "optim.AdamW4bit",
    ("adamw_update_", "float32", "fp8", "torchao"): "optim.AdamWFp8",
    ("adamw_update_", "bfloat16, error bits", "int8", "flashoptim"): "FlashAdamW",
    ("lion_update_", "float32", "int8", "bitsandbytes"): "optim.Lion8bit",
    ("lion_update_", "float32", "int8", "flashoptim"): "FlashLion",
    ("lion_update_", "bfloat16, error bits", "int8", "flashoptim"): "FlashLion",
}
