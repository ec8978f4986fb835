"""Time norm layers that leave norms of samples, and Newton–Schulz, next to what torch has for them.

    PYTHONPATH=. python benchmarks/normalization.py --device cpu

Side by side in one process, in pairs of one call each. Layers forward and backward: the base is
torch's layer, which leaves no norms; hooks are the layer, then x̂ again and
`functional.affine_sample_gradients`. Newton–Schulz: the base is the function of torch.optim.Muon,
which is in bfloat16. First it asserts results against float64. Rows go to
`benchmarks/results/normalization.csv`; `ratio` is the time of the variant to that of `base`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import _muon

from benchmarks._rows import KEY, describe, name_of, write
from benchmarks.ema import Row, compare
from lightning_ext import functional, kernels

RESULTS = Path(__file__).resolve().parent / "results" / "normalization.csv"
LAYERS = ((16, 256, 512), (64, 197, 384), (512, 8, 256), (4096, 1, 512))
MATRICES = ((128, 512), (512, 512), (512, 2048))
EPS = 1e-5
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}

Layer = Callable[..., Tensor]


class Inputs(NamedTuple):
    """What a layer takes, ∂L/∂y, and where norms are added."""

    x: Tensor
    affine: list[Tensor]  # the weight, and the bias where there is one
    grad: Tensor
    norms: Tensor


def inputs_of(thing: str, shape: tuple[int, ...], device: str) -> Inputs:
    """Positions of samples, all with gradients."""
    x, grad = (torch.randn(shape, device=device) for _ in range(2))
    affine = [torch.randn(shape[-1:], device=device) for _ in range(1 + (thing == "layer_norm"))]
    norms = torch.zeros(len(affine), shape[0], device=device)
    return Inputs(x.requires_grad_(), [p.requires_grad_() for p in affine], grad, norms)


def torch_layer(thing: str) -> Layer:
    """Return torch's over the last dimension."""
    function: Any = getattr(F, thing)
    return lambda x, *affine: function(x, x.shape[-1:], *affine, eps=EPS)


def own_layer(thing: str, norms: Tensor | None) -> Layer:
    """The suite's, with norms of samples where there is a place for them."""
    function: Any = getattr(kernels, thing)
    return lambda x, *affine: function(x, x.shape[-1:], *affine, eps=EPS, sample_sq_norms=norms)


def run(layer: Layer, inputs: Inputs) -> list[Tensor]:
    """Result and gradients."""
    wanted = [inputs.x, *inputs.affine]
    y = layer(*wanted)
    return [y.detach(), *torch.autograd.grad(y, wanted, inputs.grad)]


def run_with_hooks(thing: str, inputs: Inputs) -> list[Tensor]:
    """The layer, and norms from what goes in and comes back."""
    found = run(torch_layer(thing), inputs)
    with torch.no_grad():
        parts = functional.affine_sample_gradients(
            inputs.grad, torch_layer(thing)(inputs.x.detach()), [inputs.x.ndim - 1]
        )
        norms = [part.square().sum(1) for part in parts[: len(inputs.affine)]]
    return [*found, *norms]


def error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖/‖truth‖."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def check_layer(thing: str, inputs: Inputs) -> None:
    """Assert that results and norms are at most twice as far from float64 as torch's."""
    wide = [t.detach().double() for t in (inputs.x, *inputs.affine, inputs.grad, inputs.norms)]
    affine = [p.requires_grad_() for p in wide[1:-2]]
    exact = Inputs(wide[0].requires_grad_(), affine, wide[-2], wide[-1])
    inputs.norms.zero_()
    truth = run_with_hooks(thing, exact)
    theirs = run_with_hooks(thing, inputs)
    ours = [*run(own_layer(thing, inputs.norms), inputs), *inputs.norms]
    for t, o, f in zip(truth, theirs, ours, strict=True):
        assert error(f, t) <= max(2 * error(o, t), FLOORS[torch.float32]), thing


def layer_rows(thing: str, shape: tuple[int, ...], device: str) -> Iterator[Row]:
    """The suite's layer with and without norms, and hooks, next to torch's."""
    inputs = inputs_of(thing, shape, device)
    check_layer(thing, inputs)
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        (f"kernels.{thing}", "no norms"): lambda: run(own_layer(thing, None), inputs),
        (f"kernels.{thing}", "norms"): lambda: run(own_layer(thing, inputs.norms), inputs),
        ("hooks", "norms"): lambda: run_with_hooks(thing, inputs),
    }
    base = torch_layer(thing)
    for (variant, mode), call in calls.items():
        yield Row(
            *(thing, variant, f"forward and backward, {mode}", "float32", f"F.{thing}, no norms"),
            call,
            lambda: run(base, inputs),
        )


def plain(x: Tensor) -> Tensor:
    """The iteration as it is written, in the dtype of x."""
    a, b, c = COEFFICIENTS
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def matrix_rows(shape: tuple[int, ...], device: str) -> Iterator[Row]:
    """Both precisions next to torch's function, and the plain operations in float32."""
    x = torch.randn(shape, device=device)
    muon: Any = _muon._zeropower_via_newtonschulz
    theirs = lambda: muon(x, COEFFICIENTS, STEPS, 1e-7)  # noqa: E731
    calls: dict[tuple[str, torch.dtype], Callable[[], Tensor]] = {
        ("kernels.newton_schulz", torch.bfloat16): lambda: kernels.newton_schulz(
            x, dtype=torch.bfloat16
        ),
        ("kernels.newton_schulz", torch.float32): lambda: kernels.newton_schulz(x),
        ("plain operations", torch.float32): lambda: plain(x),
    }
    truth, others = plain(x.double()), {torch.bfloat16: theirs(), torch.float32: plain(x)}
    for (variant, dtype), call in calls.items():
        bound = max(2 * error(others[dtype], truth), FLOORS[dtype])
        assert error(call(), truth) <= bound, f"{variant}, {dtype}"
        name = str(dtype).removeprefix("torch.")
        yield Row(
            *("newton_schulz", variant, f"{STEPS} steps", name, "torch.optim.Muon's, bfloat16"),
            call,
            theirs,
        )


def all_rows(things: list[str], device: str) -> Iterator[tuple[str, Row]]:
    """Shapes in words, and what is compared there."""
    for thing in things:
        shapes = MATRICES if thing == "newton_schulz" else LAYERS
        for shape in shapes:
            torch.manual_seed(0)
            matrix = thing == "newton_schulz"
            rows = matrix_rows(shape, device) if matrix else layer_rows(thing, shape, device)
            for row in rows:
                yield " x ".join(map(str, shape)), row


def main() -> None:
    """Measure every layer and matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    things = ["layer_norm", "rms_norm", "newton_schulz"]
    parser.add_argument("--things", nargs="+", choices=things, default=things)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, written = name_of(args.device, args.threads), []
    for shape, row in all_rows(args.things, args.device):
        found = compare(row, args.device, args.pairs)
        key = (row.thing, row.variant, row.mode, row.dtype, shape, device)
        named = dict(zip(KEY, key, strict=True)) | {"base": row.base}
        written.append(named | found | describe())
        print(*key[:5], found, flush=True)
    write(written, RESULTS)


if __name__ == "__main__":
    main()
