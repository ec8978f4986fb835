"""Figures of formats and subspaces: errors, bytes, shares of the squares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext import functional, optim

Figures = Iterator[tuple[str, str, float]]
QUANTIZED = {
    "int8": ("int8", True),
    "int8, asymmetric": ("int8", False),
    "int4": ("int4", True),
    "int4, asymmetric": ("int4", False),
    **{
        name: (name, True)
        for name in (
            *("fp8_e4m3", "fp8_e5m2", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2"),
            *("mxfp6_e2m3", "mxfp6_e3m2", "mxfp4_e2m1"),
        )
    },
}


def quantization() -> Figures:
    """Errors of 2²⁰ normal numbers, read again, and what they take."""
    x = torch.randn(2**20)
    for name, (format, symmetric) in QUANTIZED.items():
        for how, seed in (("nearest", None), ("at random", 0)):
            codes = functional.quantize(x, format, symmetric=symmetric, seed=seed)
            off = (functional.dequantize(codes) - x).norm() / x.norm()
            yield f"relative error, {name}", how, off.item()
        yield f"bytes a number, {name}", "", codes.nbytes / x.numel()


def moments() -> tuple[Tensor, Tensor]:
    """Adam's averages after 300 steps of gradients whose rows and columns differ in size."""
    rows, columns = (torch.randn(512, dtype=torch.float64).mul(0.5).exp() for _ in range(2))
    m, v = torch.zeros(2, 512, 512, dtype=torch.float64)
    for _ in range(300):
        grad = rows[:, None] * columns * torch.randn(512, 512, dtype=torch.float64)
        m, v = torch.lerp(m, grad, 0.1), torch.lerp(v, grad.square(), 0.01)
    return m.float(), v.float()


def state_formats() -> Figures:
    """Errors of both moments, of 1/√v and of m/√v, and the bytes of their storage."""
    m, v = moments()
    truth = {"m": m, "v": v, "1/sqrt v": v.rsqrt(), "m/sqrt v": m * v.rsqrt()}
    for format in ("bfloat16", "int8", "fp8", "int4"):
        kept = [functional.encode_state(m, format)]
        kept.append(functional.encode_state(v, format, signed=False))
        one, two = (functional.decode_state(state) for state in kept)
        found = {"m": one, "v": two, "1/sqrt v": two.rsqrt(), "m/sqrt v": one * two.rsqrt()}
        for name, x in truth.items():
            yield f"relative error of {name}", format, ((found[name] - x).norm() / x.norm()).item()
        for name, state in zip("mv", kept, strict=True):
            yield f"bytes an entry of {name}", format, functional.state_bytes(state) / m.numel()


def decaying(power: float) -> Tensor:
    """A noisy 1024 × 512 matrix whose k-th singular value falls by k^-power."""
    left, right = (torch.linalg.qr(torch.randn(n, 512))[0] for n in (1024, 512))
    values = torch.arange(1, 513).float() ** -power
    return left * values @ right.T


def subspaces() -> Figures:
    """Time and what is kept of a gradient's squares, of it or of the SVD's subspace."""
    for power in (0.3, 1.0):
        before = decaying(power)
        grad = before + 0.3 * before.norm() * torch.randn_like(before) / before.numel() ** 0.5
        best = functional.gradient_subspace(before, 128)
        kept = {}
        for method in ("svd", "randomized", "iteration"):
            taken = []
            for _ in range(5):
                start = time.process_time()
                found = functional.gradient_subspace(grad, 128, method=method, previous=best)
                taken.append(1e3 * (time.process_time() - start))
            kept[method] = (grad @ found.T).square().sum().item()
            yield f"CPU ms, {method}", f"k^-{power}", median(taken)
        kept["not looked for again"] = (grad @ best.T).square().sum().item()
        for method, value in kept.items():
            yield f"share of the SVD's squares, {method}", f"k^-{power}", value / kept["svd"]


def low_rank() -> Figures:
    """Bytes of states of a 1024 × 512 matrix at rank 128, and subspaces."""
    makes: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "GaLore": lambda w: optim.GaLore(w, rank=128),
        "Fira": lambda w: optim.Fira(w, rank=128),
        "GradNormLoRP": lambda w: optim.GradNormLoRP(w, rank=128),
        "APOLLO": lambda w: optim.APOLLO(w, rank=128),
        "APOLLO, int8": lambda w: optim.APOLLO(w, rank=128, state_dtype="int8"),
        "Q-GaLore": lambda w: optim.QGaLore(w, rank=128),
        "APOLLO-Mini": lambda w: optim.APOLLOMini(w),
    }
    for name, make in makes.items():
        weight = torch.nn.Parameter(torch.randn(1024, 512))
        optimizer, weight.grad = make([weight]), torch.randn(1024, 512)
        optimizer.step()
        state = {k: x for k, x in optimizer.state[weight].items() if k != "step"}
        kept = [x for x in state.values() if isinstance(x, (Tensor, functional.QuantizedState))]
        total = sum(functional.state_bytes(x) for x in kept)
        yield "bytes a parameter", name, total / weight.numel()
    yield from subspaces()


def multi_tensor() -> Figures:
    """How far a norm of 3·10⁷ entries is off in float32."""
    x = torch.randn(30_000_000)
    truth = mean(part.double().square().sum().item() for part in x.chunk(10)) * 10
    for name, found in (
        ("torch's", x.norm().item()),
        ("sq_norms", functional.sq_norms([x]).sqrt()),
    ):
        yield f"error of a norm, {name}", "3e7 entries", abs(float(found) / truth**0.5 - 1)


def dense_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The loss by a matrix of logits."""
    logits, own = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def contrastive_losses() -> Figures:
    """Errors where the loss is next to nothing, and CPU time at two scales."""
    x = F.normalize(torch.randn(300, 64), dim=1)
    y = F.normalize(x + 0.125 * torch.randn(300, 64), dim=1)
    truth: list[Tensor] = []
    losses: dict[str, Callable[..., Tensor]] = {
        "float64": dense_clip,
        "tiles": functional.clip_loss,
        "cross_entropy": dense_clip,
    }
    for name, loss_of in losses.items():
        dtype = torch.float64 if name == "float64" else torch.float32
        inputs = [z.to(dtype, copy=True).requires_grad_() for z in (x, y)]
        loss = loss_of(*inputs, torch.tensor(100.0, dtype=dtype))
        found = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        truth = truth or found
        off = [(a - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)]
        yield f"loss, {name}", "300 pairs, scale 100", loss.item()
        yield f"relative error of the loss, {name}", "300 pairs, scale 100", off[0].item()
        yield f"relative error of a gradient, {name}", "300 pairs, scale 100", off[1].item()
    for scale in (14.3, 100.0):
        x = F.normalize(torch.randn(1024, 256), dim=1)
        y = F.normalize(x + 0.01 * torch.randn(1024, 256), dim=1)
        pair = [x.requires_grad_(), y.requires_grad_()]
        for name in ("tiles", "cross_entropy"):
            taken = []
            for _ in range(4):
                start = time.process_time()
                torch.autograd.grad(losses[name](*pair, torch.tensor(scale)), pair)
                taken.append(1e3 * (time.process_time() - start))
            yield f"CPU ms, {name}", f"batch 1024, scale {scale}", median(taken[1:])


CARDS = {
    "contrastive_losses": contrastive_losses,
    "quantization": quantization,
    "state_formats": state_formats,
    "low_rank": low_rank,
    "multi_tensor": multi_tensor,
}
