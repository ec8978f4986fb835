"""Contrastive losses: 2 operations for each pair of rows, feature and product of matrices.

Forward there is one product of b² logits: 2 b² d. Backward the two gradients are two more, and each
of two sweeps makes the logits again, so that all is 10 b² d. A way with fewer does more of these a
second than the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._gpu._timing import Call, Measurement, compiled, later, peers, ways
from lightning_ext import kernels

WIDTH = 512
SCALE = 1 / 0.07
BATCHES = {  # of rows of an input
    "clip_loss": (4096, 16384, 65536),
    "siglip_loss": (16384, 65536),
    "info_nce_loss": (8192,),
    "nt_xent_loss": (8192,),
}
FORWARD, BOTH = "forward", "forward and backward"

Loss = Callable[..., Tensor]


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield losses forward alone, and with the gradients of inputs, scale and bias."""
    for thing, batches in BATCHES.items():
        for batch in (6,) if small else batches:
            for mode in (FORWARD, BOTH):
                yield measurement(thing, batch, mode, device, small)


def measurement(
    thing: str, batch: int, mode: str, device: torch.device, small: bool
) -> Measurement:
    """Return one loss of new inputs: in bfloat16, but where the interpreter cannot multiply it."""
    width, dtype = (8, torch.float32) if small else (WIDTH, torch.bfloat16)
    inputs = inputs_of(thing, batch, width, dtype, device)
    given = {"excluded": mask(batch, device)} if thing == "info_nce_loss" else {}
    function = getattr(kernels, thing)
    calls = ways(
        lambda fused: pass_of(partial(function, **given, fused=fused), inputs, mode == BOTH)()
    )
    others = {} if small else others_of(thing, partial(DENSE[thing], **given), inputs, mode == BOTH)
    pairs = batch * batch
    if thing == "nt_xent_loss":
        pairs *= 4  # of both views
    # Both gradients of symmetric logits are one: a product less, and one sweep.
    products = 1 if mode == FORWARD else 3 if thing == "nt_xent_loss" else 5
    return Measurement(
        thing=thing,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        shape=f"{batch} x {width}" + (", masked" if given else ""),
        variants=calls | others,
        flops=2 * products * pairs * width,
    )


def inputs_of(
    thing: str, batch: int, width: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return normalised rows that resemble each other in pairs, the scale, and a bias."""
    x = F.normalize(torch.randn(batch, width, device=device))
    y = F.normalize(x + 2 * torch.randn_like(x) / width**0.5)
    numbers = (10.0, -10.0) if thing == "siglip_loss" else (SCALE,)
    found = [x.to(dtype), y.to(dtype), *(torch.tensor(v, device=device) for v in numbers)]
    return [v.requires_grad_() for v in found]


def mask(batch: int, device: torch.device) -> Tensor:
    """Return a tenth of all pairs, without the positive ones."""
    found = torch.rand(batch, batch, device=device) < 0.1
    return found.fill_diagonal_(False)


def pass_of(loss: Loss, inputs: list[Tensor], backward: bool) -> Call:
    """Return a pass through a loss, and back to all its inputs where that is wanted."""
    if backward:
        # Not every package has a gradient for the scale.
        return lambda: torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)

    @torch.no_grad()
    def forward() -> object:
        return loss(*inputs)

    return forward


def dense_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy over rows and over columns."""
    z, own = (scale * x) @ y.T, torch.arange(len(x), device=x.device)
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def dense_info_nce(x: Tensor, y: Tensor, scale: Tensor, excluded: Tensor) -> Tensor:
    """Cross-entropy over rows, without what is excluded."""
    z = ((scale * x) @ y.T).masked_fill(excluded, -torch.inf)
    return F.cross_entropy(z, torch.arange(len(x), device=x.device))


def dense_nt_xent(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy over both views, without the diagonal."""
    views = torch.cat([x, y])
    z = ((scale * views) @ views.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(z, torch.arange(len(views), device=x.device).roll(len(x)))


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid cross-entropy of every pair: softplus(−z) for those of the diagonal."""
    z = (scale * x) @ y.T + bias
    return (F.softplus(z).sum() - z.diagonal().sum()) / len(x)


DENSE: dict[str, Loss] = {
    "clip_loss": dense_clip,
    "siglip_loss": dense_siglip,
    "info_nce_loss": dense_info_nce,
    "nt_xent_loss": dense_nt_xent,
}


def others_of(thing: str, dense: Loss, inputs: list[Tensor], backward: bool) -> dict[str, Call]:
    """Return the dense formula, eager and compiled, and those of other packages."""
    found = {
        "torch": pass_of(dense, inputs, backward),
        "torch compiled": later(lambda: pass_of(compiled(dense), inputs, backward)),
    }
    if thing == "clip_loss":
        found |= peers(
            inf_cl=lambda package: pass_of(partial(inf_cl, package), inputs, backward),
            memeff=lambda package: pass_of(memeff(package), inputs, backward),
        )
    if thing == "siglip_loss":
        found |= peers(
            siglip_kernel=lambda package: pass_of(siglip_kernel(package), inputs, backward)
        )
    return found


def inf_cl(package: Any, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """One direction and the other, which are two calls of it; in float32, by its own choice."""
    rows, columns = (package.cal_flash_loss(*pair, scale=scale) for pair in ((x, y), (y, x)))
    return (rows.mean() + columns.mean()) / 2


def memeff(package: Any) -> Loss:
    """The scale is a number to it, and has no gradient."""
    loss = package.MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True)
    return lambda x, y, scale: loss(x, y)


def siglip_kernel(package: Any) -> Loss:
    """It takes the logarithm of the scale."""
    return lambda x, y, scale, bias: package.fused_siglip_loss(x, y, scale.log(), bias)
