"""Time a step that measures the noise scale and the accuracy of what it finds, beside gns-pytorch.

    pip install --target /tmp/peers --no-deps gns-pytorch
    PYTHONPATH=.:/tmp/peers python benchmarks/noise_scale.py

Time: short fits of the language model (2 micro-batches of 16 windows, one thread), in which every
second step is measured, one way after another in turn. `ratio` is the time of a measured step to
that of `base`: the step before it, or the measured step of another way; `share` is what the way's
own measurement adds to a step, `share_base` what that of `base` does. The peer collects garbage at
every call, which is timed with and without. `samples_base` and `tensors_base` say what it uses of
the `samples` and `tensors` of a step. Intervals are by drawing rounds of fits.

Accuracy: gradients of known noise scale, Gaussian, of 1,024 entries, 64 samples a measurement, ours
from 8 micro-batches of 8, the peer's from single samples. A window is 500 measurements: ours gives
one estimate with an interval, of the peer's values the mean is taken. `bias_mean` and `bias_median`
are of relative errors of windows with their signs, `error_median` is of those without; `coverage`
is how often the 95 % interval holds the truth, and `zeros` how many of the peer's values are 0
because they were negative.

It asserts that our callback finds the known noise scale in a fit, that the median of our windows
is within 5 % of it, and that the interval holds it as often as 95 % allow. Rows go to
`benchmarks/results/noise_scale.csv`.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._noise_peers import (
    MICRO_BATCH,
    NO_GC,
    OURS,
    PART,
    PARTS,
    PEER,
    PEERS,
    SAMPLES,
    STEP,
    WHOLE,
    Known,
    draw,
    our_window,
    peer_window,
    used_by,
    way,
    without_gc,
)
from benchmarks._pairs import Times, interval_of_rounds
from benchmarks._peers import present, versions_of
from benchmarks._rows import KEY, describe, name_of, write
from benchmarks.callback_overhead import windows
from examples.language_model.data import Windows
from lightning_ext.callbacks import GradientNoiseScale

RESULTS = Path(__file__).resolve().parent / "results" / "noise_scale.csv"
TRUTHS = (64, 512, 4096)
WINDOW = 500  # measurements
WINDOWS = 60
WARM_UP = 4  # steps
CERTAIN = 0.999  # of the bounds of how often an interval may hold
NEXT = "the next step, not measured"
SHAPE = f"language_model,micro={MICRO_BATCH}"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class StepClock(Callback):
    """Times each optimizer step, from its first batch to that of the next.

    Args:
        measured: Whether the step that just ended was.
    """

    def __init__(self, measured: Callable[[], bool]) -> None:
        self.measured, self.start = measured, 0.0
        self.steps: list[tuple[float, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Closes a step, and begins one."""
        if index % trainer.accumulate_grad_batches == 0:
            now = time.perf_counter()
            if index:
                self.steps.append((1e3 * (now - self.start), self.measured()))
            self.start = now


def steps_of(name: str, pairs: int) -> Times:
    """Milliseconds (pairs, 2) of measured steps and of the unmeasured ones next to them."""
    seed_everything(0, verbose=False)
    chosen = way(name)
    clock = StepClock(chosen.measured)
    samples = STEP * (2 * pairs + WARM_UP + 1)
    data = DataLoader(Windows(windows()[:samples]), batch_size=MICRO_BATCH, shuffle=True)
    callbacks = [clock, *chosen.callbacks]
    Trainer(accumulate_grad_batches=STEP // MICRO_BATCH, callbacks=callbacks, **QUIET).fit(
        chosen.module, data
    )
    kept = clock.steps[WARM_UP:]
    times = {which: [ms for ms, measured in kept if measured == which] for which in (True, False)}
    assert len(times[True]) == len(times[False]) == pairs, f"{name}: steps were not measured"
    return np.array([times[True], times[False]]).T


def rows_of_time(pairs: int, rounds: int) -> list[dict[str, str]]:
    """Time all ways in turn; of each (rounds, pairs, 2)."""
    rounds = min(rounds, pairs)
    names = [*OURS, *(PEERS if present(PEER) else ())]
    found: dict[str, list[Times]] = {name: [] for name in names}
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            with without_gc(name.endswith(NO_GC)):
                found[name].append(steps_of(name, -(-pairs // rounds)))
    times = {name: np.array(each) for name, each in found.items()}
    rows = [time_row(name, NEXT, times[name][..., 1], times) for name in names]
    beside = [(one, other) for one in OURS for other in names if other in PEERS]
    return rows + [time_row(one, other, times[other][..., 0], times) for one, other in beside]


def time_row(name: str, base: str, base_times: Times, times: dict[str, Times]) -> dict[str, str]:
    """A way beside the step without it, or beside another way."""
    mode = "measured step" if base not in times else f"measured step beside {base}"
    key = ("noise scale, time", name, mode, "float32", SHAPE, name_of("cpu"))
    measured = times[name][..., 0]
    figures = interval_of_rounds(measured / base_times)
    figures |= {"ms": float(np.median(measured)), "ms_base": float(np.median(base_times))}
    figures |= share(times[name], "share")
    if base in times:
        figures |= share(times[base], "share_base")
    texts = {column: f"{value:.4g}" for column, value in figures.items()}
    print(name, "|", mode, texts, flush=True)
    texts |= {"pairs": str(measured.size), "rounds": str(len(measured))}
    texts |= next((used_by(x) for x in (base, name) if x in PEERS), {})
    return row_of(key) | {"base": base} | texts


def share(times: Times, name: str) -> dict[str, float]:
    """What a measurement adds to a step, with its interval."""
    found = interval_of_rounds(times[..., 0] / times[..., 1] - 1)
    return {name: found["ratio"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def row_of(key: tuple[str, ...]) -> dict[str, str]:
    """A key, and where it was measured."""
    return dict(zip(KEY, key, strict=True)) | describe() | versions_of(PEER)


def rows_of_accuracy(count: int) -> list[dict[str, str]]:
    """As many windows of known gradients, of ours and of the peer's."""
    rows = []
    for truth in TRUTHS:
        key = ("noise scale, accuracy", "float32", f"truth={truth},batch={SAMPLES}")
        rows.append(accuracy_row(key, "lightning_ext", our_errors(truth, count)))
        if present(PEER):
            errors = peer_errors(WHOLE | {"use_vmap": True}, truth, count)
            rows.append(accuracy_row(key, "gns-pytorch, single samples", errors))
    return rows


def accuracy_row(
    key: tuple[str, str, str], variant: str, figures: dict[str, float]
) -> dict[str, str]:
    """Errors of a way, which are those of any machine."""
    thing, dtype, shape = key
    mode = "ratio of averages" if variant == "lightning_ext" else "mean of ratios"
    texts = {name: f"{value:.4g}" for name, value in figures.items()}
    print(shape, variant, texts, flush=True)
    return row_of((thing, variant, f"{mode}, {WINDOW}", dtype, shape, "any")) | texts


def our_errors(truth: float, count: int) -> dict[str, float]:
    """Errors of our estimates and how often their interval is right, both asserted."""
    generator = torch.Generator().manual_seed(truth := int(truth))
    found = [our_window(truth, WINDOW, generator) for _ in range(count)]
    errors = np.array([x.value / truth - 1 for x in found])
    assert abs(np.median(errors)) <= 0.05, f"{truth}: bias {np.median(errors):.2g}"
    held = sum(x.low <= truth <= x.high for x in found)
    least, most = binomial_bounds(count, 0.95)
    assert least <= held <= most, f"{truth}: {held} of {count} intervals hold, at least {least}"
    return errors_of(errors) | {"coverage": held / count}


def binomial_bounds(count: int, share: float) -> tuple[int, int]:
    """Between which a binomial count lies, almost certainly."""
    each = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    low, high = np.searchsorted(np.cumsum(each), [(1 - CERTAIN) / 2, (1 + CERTAIN) / 2])
    return int(low), min(int(high), count)


def peer_errors(settings: dict[str, Any], truth: float, count: int) -> dict[str, float]:
    """Errors of means of the peer's values."""
    generator = torch.Generator().manual_seed(int(truth))
    found = np.array([peer_window(settings, truth, WINDOW, generator) for _ in range(count)])
    return errors_of(found.mean(1) / truth - 1) | {"zeros": float(np.mean(found == 0))}


def errors_of(errors: Times) -> dict[str, float]:
    """Mean and median over windows, and the median without signs."""
    return {
        "bias_mean": float(errors.mean()),
        "bias_median": float(np.median(errors)),
        "error_median": float(np.median(np.abs(errors))),
        "windows": float(len(errors)),
    }


class Still(LightningModule):
    """Gradients of known noise scale, at a learning rate of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Known()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean loss."""
        loss: Tensor = self.known(batch[0]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Moves nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def check(truth: int, steps: int = 200) -> None:
    """Assert that the callback finds a known noise scale: in its interval, or within 5 %."""
    generator = torch.Generator().manual_seed(truth)
    samples = draw(truth, SAMPLES * steps, 1, generator)
    data: DataLoader[Any] = DataLoader(TensorDataset(samples), batch_size=PART)
    noise = GradientNoiseScale(1, smoothing=1.0, source="micro_batches")
    Trainer(accumulate_grad_batches=PARTS, callbacks=[noise], **QUIET).fit(Still(), data)
    found = noise.estimate()
    near = abs(found.value / truth - 1) < 0.05
    assert near or found.low <= truth <= found.high, f"noise scale {truth}: found {found}"
    assert found.samples == SAMPLES * steps, f"{found.samples} samples"


def main() -> None:
    """Assert accuracy, then measure it, and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10, help="of fits, which share the pairs")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for truth in TRUTHS:
        check(truth)
    write(rows_of_accuracy(args.windows), args.results)
    write(rows_of_time(args.pairs, args.rounds), args.results)


if __name__ == "__main__":
    main()
