"""Time an optimizer step with and without each callback, in short fits in turn in one process.

    PYTHONPATH=. python benchmarks/callback_overhead.py --device cpu

Each round has one fit without and one with each callback; the figures are of pairs in a round. The
fits are shorter than `log_every_n_steps`, so that only their last step logs. First it asserts
that the neutral callback leaves the weights bit for bit as they are without it. Rows go to
`benchmarks/results/callback_overhead.csv`, one for each thing, variant, mode, dtype, shape and
device; a new run replaces its rows.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks._pairs import Times, interval
from benchmarks._rows import KEY, describe, name_of, write
from examples.language_model.data import TextFolder, Windows
from examples.language_model.module import GPT
from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "callback_overhead.csv"
WARM_UP = 3
Makes = Callable[[int], list[Callback]]
# By thing: how it is used, and what makes the callbacks for a global batch.
THINGS: dict[str, tuple[str, Makes]] = {
    "EMA": ("every step", lambda batch: [EMA()]),
    "AdaptiveBatchSize": ("every step", lambda batch: [AdaptiveBatchSize(f"0:{batch}")]),
    "GradientNoiseScale": ("as it comes", lambda batch: [GradientNoiseScale()]),
    "micro_batches": (
        "every step",
        lambda batch: [GradientNoiseScale(1, source="micro_batches", geometry="euclidean")],
    ),
    "micro_batches, at times": (
        "every 4th step",
        lambda batch: [GradientNoiseScale(4, source="micro_batches", geometry="euclidean")],
    ),
    # With what an earlier run has learnt: the step that calibrates costs more.
    "norm_layers": ("every step", lambda batch: [norm_layers()]),
    # They measure and ask as they would, and the batch is already the largest allowed.
    "both, noise_scale": (
        "as it comes",
        lambda batch: [
            GradientNoiseScale(),
            AdaptiveBatchSize("noise_scale", max_global_batch=batch),
        ],
    ),
}
SHAPES = {"norm_layers": {"language_model,micro=16"}}  # the others have no norm layers
MICRO_BATCH = {"16x2,micro=8": 8, "512x4,micro=64": 64, "language_model,micro=16": 16}
STEPS = {"16x2,micro=8": 43, "512x4,micro=64": 23, "language_model,micro=16": 23}  # of one fit


class Layers(LightningModule):
    """Linear layers of one width under AdamW."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared output."""
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Takes the time between the first step after the warm-up and the last."""

    def __init__(self) -> None:
        self.start = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Starts after the warm-up."""
        if index == WARM_UP * trainer.accumulate_grad_batches:
            _wait(module.device)
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Stops."""
        _wait(module.device)
        self.milliseconds = 1e3 * (time.perf_counter() - self.start)
        self.milliseconds /= trainer.global_step - WARM_UP


@lru_cache
def windows() -> Tensor:
    """Bytes to train the language model on."""
    return TextFolder(max_bytes=1_000_000).train.rows


@lru_cache
def known_factor() -> dict[str, Any]:
    """What norm layers have learnt of the language model in a fit of their own."""
    noise = GradientNoiseScale(1, source="norm_layers")
    fit("language_model,micro=16", "cpu", [noise])
    return noise.norm_factor


def norm_layers() -> GradientNoiseScale:
    """Goes by the norm layers, and does not learn any more."""
    return GradientNoiseScale(1, source="norm_layers", norm_factor=known_factor())


def workload(shape: str) -> tuple[LightningModule, Dataset[Any]]:
    """A module, and data for as many steps as the shape says."""
    samples = 2 * MICRO_BATCH[shape] * STEPS[shape]
    if shape.startswith("language_model"):
        return GPT(), Windows(windows()[:samples])
    width, depth = (int(x) for x in shape.split(",")[0].split("x"))
    return Layers(width, depth), TensorDataset(torch.randn(samples, width))


def fit(shape: str, device: str, callbacks: list[Callback]) -> tuple[float, LightningModule]:
    """Train as many steps as the shape says; return milliseconds per step, and the module."""
    seed_everything(0, verbose=False)
    module, data = workload(shape)
    clock = Clock()
    trainer = Trainer(
        accelerator=device,
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=MICRO_BATCH[shape], shuffle=True))
    return clock.milliseconds, module


def check(thing: str, shape: str, device: str) -> None:
    """Assert that nothing but time differs."""
    plain, used = (fit(shape, device, make(thing, shape))[1] for make in (nothing, callbacks_of))
    for one, other in zip(plain.parameters(), used.parameters(), strict=True):
        assert torch.equal(one, other), f"{thing} changes the weights"


def nothing(thing: str, shape: str) -> list[Callback]:
    """A fit without."""
    return []


def callbacks_of(thing: str, shape: str) -> list[Callback]:
    """A fit with the callbacks of a thing."""
    return THINGS[thing][1](2 * MICRO_BATCH[shape])


def measure(
    things: Sequence[str], shape: str, device: str, rounds: int
) -> dict[str, dict[str, str]]:
    """Assert that nothing but time differs, then return the ratios of step times by thing."""
    for thing in things:
        check(thing, shape, device)
    makes = {"": nothing} | dict.fromkeys(things, callbacks_of)
    times, names = {name: np.empty(rounds) for name in makes}, [*makes]
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            times[name][k] = fit(shape, device, makes[name](name, shape))[0]
    return {thing: figures(times[thing], times[""]) for thing in things}


def figures(using: Times, without: Times) -> dict[str, str]:
    """The ratio, its interval and the time that is added."""
    found = interval(using / without)
    found |= {"ms_without": float(np.median(without))}
    found |= {"ms_added": float(np.median(using - without))}
    return {name: f"{value:.4g}" for name, value in found.items()} | {"pairs": str(len(using))}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure every callback at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--shapes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--things", nargs="+", choices=THINGS, default=list(THINGS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for shape in args.shapes:
        things = [x for x in args.things if shape in SHAPES.get(x, {shape})]
        for thing, found in measure(things, shape, args.device, args.pairs).items():
            key = (thing, THINGS[thing][0], "fit", "float32", shape, name_of(args.device))
            rows.append(dict(zip(KEY, key, strict=True)) | found | describe())
            print(thing, shape, found)
    write(rows, args.results)


if __name__ == "__main__":
    main()
