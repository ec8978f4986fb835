"""Ways to measure the noise scale that `benchmarks/noise_scale.py` puts side by side.

Source: gns-pytorch 0.1.5, whose `compute_gns` takes the losses of single samples inside a training
    step, as its page on the package index tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._peers import found_member, found_module
from benchmarks.callback_overhead import known_factor
from examples.language_model.module import GPT
from lightning_ext.callbacks import GradientNoiseScale
from lightning_ext.functional import part_sq_norms, sq_norms
from lightning_ext.scaling import NoiseScale, noise_scale, noise_statistics

Source = Literal["micro_batches", "norm_layers", "per_sample"]

PEER = "gns_pytorch"
EVERY = 2  # steps: measured ones take turns with others
WHOLE: dict[str, Any] = {"param_percentage": 1.0, "batch_percentage": 1.0}
NO_GC = ", no gc.collect"
# What is given to `compute_gns`, by the name of the row.
PEERS: dict[str, dict[str, Any]] = {
    "gns-pytorch, defaults": {},
    f"gns-pytorch, defaults{NO_GC}": {},
    "gns-pytorch, all parameters and samples": WHOLE,
    f"gns-pytorch, all parameters and samples{NO_GC}": WHOLE,
    "gns-pytorch, all parameters and samples, vmap": WHOLE | {"use_vmap": True},
}
MICRO_BATCH, STEP = 16, 32  # samples; the peer has those of a micro-batch at a time
DIM, PARTS, PART = 1024, 8, 8
SAMPLES = PARTS * PART


def ours(source: Source) -> GradientNoiseScale:
    """A callback; norm layers go by what an earlier run has learnt."""
    known = known_factor() if source == "norm_layers" else None
    return GradientNoiseScale(EVERY, source=source, geometry="euclidean", norm_factor=known)


OURS: dict[str, Source] = {
    "lightning_ext, micro_batches": "micro_batches",
    "lightning_ext, norm_layers": "norm_layers",
    "lightning_ext, per_sample": "per_sample",
}


class MeasuresItself(GPT):
    """The language model, whose training step calls a peer in every second optimizer step.

    Args:
        settings: What the peer takes.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.compute = found_member(f"{PEER}.compute_gns")
        self.settings, self.measured, self.average = settings, False, 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; of the first of a step, its noise scale, too."""
        logits, targets = self(batch[:, :-1]), batch[:, 1:].long()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        of_samples = losses.view(targets.shape).mean(1)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.measured = self.global_step % EVERY == 0
            if self.measured:
                found = self.compute(of_samples, self, **self.settings)
                self.average = 0.9 * self.average + 0.1 * found
        loss: Tensor = of_samples.mean()
        return loss


@contextmanager
def without_gc(out: bool = True) -> Iterator[None]:
    """Take the peer's `gc.collect()`, one at each call, out for a while."""
    module: Any = found_module(f"{PEER}.gns") if out else SimpleNamespace(gc=None)
    kept, module.gc = module.gc, SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        module.gc = kept


def used_by(name: str) -> dict[str, str]:
    """Samples and tensors that a peer's measurement uses, and those that a step has."""
    tensors = sum(1 for _ in GPT().parameters())
    known = signature(found_member(f"{PEER}.compute_gns")).parameters
    parts = {key: x.default for key, x in known.items()} | PEERS[name]
    drawn = max(min(tensors, 10), int(tensors * parts["param_percentage"]))
    samples = max(2, int(MICRO_BATCH * parts["batch_percentage"]))
    counts = (("samples_base", samples), ("samples", STEP), ("tensors_base", drawn))
    return {key: str(count) for key, count in (*counts, ("tensors", tensors))}


class Way(NamedTuple):
    """A way to measure: a module, callbacks, and whether the step that just ended was measured."""

    module: GPT
    callbacks: list[Callback]
    measured: Callable[[], bool]


def way(name: str) -> Way:
    """One of ours or of the peer's."""
    if name in OURS:
        noise = ours(OURS[name])
        return Way(GPT(), [noise], lambda: noise.measured)
    module = MeasuresItself(PEERS[name])
    return Way(module, [], lambda: module.measured)


class Known(nn.Module):
    """Its gradient for a sample x is x: the loss is w·x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM))

    def forward(self, samples: Tensor) -> Tensor:
        """Losses of samples (n, DIM)."""
        return samples @ self.weight


@lru_cache
def mean() -> Tensor:
    """The gradient, of norm 1."""
    return torch.full((DIM,), DIM**-0.5)


def draw(truth: float, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Mean gradients (count, DIM) of as many samples as `size`, of a known noise scale."""
    noise = torch.randn(count, DIM, generator=generator)
    return noise.mul_(math.sqrt(truth / DIM / size)).add_(mean())


def our_window(truth: float, length: int, generator: torch.Generator) -> NoiseScale:
    """An estimate from as many measurements, of 8 micro-batches of 8 samples each."""
    parts = draw(truth, PARTS * length, PART, generator).view(PARTS, length, DIM)
    each = range(length)
    norms = part_sq_norms([part.unbind() for part in parts], each)
    whole = sq_norms(parts.mean(0).unbind(), each)
    sq_norm, trace = noise_statistics(norms.double().unbind(), [PART] * PARTS, whole.double())
    rows = torch.stack([sq_norm, trace, torch.full_like(trace, SAMPLES)], 1)
    return noise_scale(rows.numpy())


def peer_window(
    settings: dict[str, Any], truth: float, length: int, generator: torch.Generator
) -> list[float]:
    """As many of its values, each of 64 samples."""
    compute, model = found_member(f"{PEER}.compute_gns"), Known()
    batches = (draw(truth, SAMPLES, 1, generator) for _ in range(length))
    with without_gc():  # its values are the same
        return [compute(model(batch), model, **settings) for batch in batches]
