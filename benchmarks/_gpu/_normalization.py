"""Layer and RMS normalization, forward and backward, with the norms of single samples and without.

Forward x is read and y written. Backward x and ∂L/∂y are read and ∂L/∂x is written. What is as
large as a row or a column is next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._gpu._timing import Call, Measurement, compiled, later, peers, ways
from lightning_ext import kernels

SAMPLES = 16
SHAPES = ((4096, 1024), (16384, 1024), (4096, 4096), (8192, 8192))
SMALL = ((32, 8),)
FORWARD, BOTH, NORMS = "forward", "forward and backward", "with norms of samples"

Layer = Callable[..., Tensor]


class Inputs(NamedTuple):
    """What a layer takes, and ∂L/∂y."""

    x: Tensor
    affine: tuple[Tensor, ...]  # the weight, and the bias where there is one
    grad: Tensor


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield both layers in float32 and bfloat16."""
    for shape in SMALL if small else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for thing in ("layer_norm", "rms_norm"):
                yield from layer(inputs_of(thing, shape, dtype, device), thing, small)


def inputs_of(
    thing: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Return positions of a few samples, all with gradients."""
    rows, features = shape
    given: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(SAMPLES, rows // SAMPLES, features, **given).requires_grad_()
    count = 2 if thing == "layer_norm" else 1
    affine = tuple(torch.randn(features, **given).requires_grad_() for _ in range(count))
    return Inputs(x, affine, torch.randn_like(x))


def layer(inputs: Inputs, thing: str, small: bool) -> Iterator[Measurement]:
    """Yield one layer forward alone, and with its backward pass."""
    x = inputs.x
    dtype = str(x.dtype).removeprefix("torch.")
    shape = f"{x.shape[:2].numel()} x {x.shape[2]}"
    others = {} if small else others_of(inputs, thing, backward=False)
    calls = ways(ours(inputs, thing, backward=False)) | others
    yield Measurement(thing, FORWARD, dtype, shape, calls, moved_bytes=2 * x.nbytes)
    others = {} if small else others_of(inputs, thing, backward=True)
    calls = ways(ours(inputs, thing, backward=True)) | others
    yield Measurement(thing, BOTH, dtype, shape, calls, moved_bytes=5 * x.nbytes)
    into = torch.zeros(len(inputs.affine), SAMPLES, device=x.device)
    calls = ways(ours(inputs, thing, backward=True, sample_sq_norms=into))
    # What the same costs torch without the norms.
    calls["torch, no norms"] = pass_of(torch_layer(thing), inputs, backward=True)
    yield Measurement(thing, f"{BOTH}, {NORMS}", dtype, shape, calls, moved_bytes=5 * x.nbytes)


def ours(
    inputs: Inputs, thing: str, *, backward: bool, sample_sq_norms: Tensor | None = None
) -> Callable[[bool | None], object]:
    """Return the suite's own layer by ``fused``."""
    function = getattr(kernels, thing)

    def call(fused: bool | None) -> object:
        def run(x: Tensor, *affine: Tensor) -> Tensor:
            features = x.shape[-1:]
            return function(
                x, features, *affine, eps=1e-5, sample_sq_norms=sample_sq_norms, fused=fused
            )

        return pass_of(run, inputs, backward=backward)()

    return call


def pass_of(function: Layer, inputs: Inputs, *, backward: bool) -> Call:
    """Return a pass through a layer, and back where that is wanted."""
    wanted = inputs.x, *inputs.affine
    if backward:
        return lambda: torch.autograd.grad(function(*wanted), wanted, inputs.grad)

    @torch.no_grad()
    def forward() -> object:
        return function(*wanted)

    return forward


def torch_layer(thing: str) -> Layer:
    """Return torch's layer over the last dimension."""
    function: Any = getattr(F, thing)
    return lambda x, *affine: function(x, x.shape[-1:], *affine, eps=1e-5)


def others_of(inputs: Inputs, thing: str, *, backward: bool) -> dict[str, Call]:
    """Return torch's, eager and compiled, and Liger's, which is not to overwrite ∂L/∂y."""
    single = torch_layer(thing)

    def liger(package: Any) -> Call:
        from importlib import import_module

        kit = import_module(f"{package.__name__}.transformers.functional")
        function = getattr(kit, f"liger_{thing}")
        last = {"in_place": False} if thing == "rms_norm" else {}
        return pass_of(lambda *given: function(*given, 1e-5, **last), inputs, backward=backward)

    return {
        "torch": pass_of(single, inputs, backward=backward),
        "torch compiled": later(lambda: pass_of(compiled(single), inputs, backward=backward)),
        **peers(liger_kernel=liger),
    }
