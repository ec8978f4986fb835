"""Timings on one card, beside what it can do at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks._rows import KEY, describe, first_line

Call = Callable[[], object]
ROUNDS = 3  # each variant's turns, between those of the others
SLOW = 100.0  # ms, from which on one call a turn will do
OWN = ("fused", "default", "plain")
Times = tuple[float, float, float]
DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


@dataclass(frozen=True)
class Measurement:
    """Ways to do one thing on the same inputs.

    Args:
        thing: what is done, by the operation's name.
        mode: which part of it, such as forward.
        dtype: of the inputs.
        shape: of the inputs, in words.
        variants: by name; those of the suite are `fused`, `default` and `plain`.
        moved_bytes: that are at least read and written, of updates by the launches of the suite; 0
            where arithmetic is the limit.
        flops: that must at least be done; 0 where memory is the limit.
    """

    thing: str
    mode: str
    dtype: str
    shape: str
    variants: dict[str, Call]
    moved_bytes: int = 0
    flops: int = 0


Slice = Callable[[torch.device, bool], Iterator[Measurement]]


@dataclass(frozen=True)
class Ceilings:
    """What the card does at most, measured in the same run."""

    gb_per_s: float
    tflop_per_s: float

    @classmethod
    def measured(cls) -> Ceilings:
        """Time a copy of 1 GiB, and a product of bfloat16 matrices of 8192 rows and columns."""
        return cls(2 * 2**30 / _copy() / 1e6, 2 * 8192**3 / _product() / 1e9)


def _copy() -> float:
    x, y = torch.zeros(2, 2**28, dtype=torch.float32, device="cuda")
    return quantiles(milliseconds(lambda: y.copy_(x)))[0]


def _product() -> float:
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    return quantiles(milliseconds(lambda: a @ b))[0]


def milliseconds(call: Call) -> list[float]:
    """Return the times of calls over 100 ms, the cache flushed before each; of one that is slow."""
    from triton.testing import do_bench

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    first = start.elapsed_time(end)
    return [first] if first > SLOW else do_bench(call, warmup=25, rep=100, return_mode="all")


def quantiles(times: list[float]) -> Times:
    """Return the median and the quantiles 0.2 and 0.8."""
    found = torch.tensor(times, dtype=torch.float64)
    median, low, high = torch.quantile(found, found.new_tensor([0.5, 0.2, 0.8])).tolist()
    return median, low, high


def rows(measurement: Measurement, ceilings: Ceilings) -> list[dict[str, str]]:
    """Time all variants in turn and return a row for each.

    Of another package's that fails, or needs more memory than there is, the row says so.
    """
    torch.compiler.reset()  # or shapes of earlier ones would count as recompilations
    peaks, failed = _peaks(measurement.variants)
    timings: dict[str, list[float]] = {name: [] for name in peaks}
    for _ in range(ROUNDS):
        for name in peaks:
            timings[name] += milliseconds(measurement.variants[name])
    middle = {name: quantiles(found) for name, found in timings.items()}
    best = min(found[0] for found in middle.values())
    where = {"device": torch.cuda.get_device_name()}
    driver = describe("torch", "triton") | {"driver": first_line(DRIVER)}
    return [
        _key(measurement, name, where)
        | _figures(measurement, middle.get(name), ceilings)
        | {"peak_mib": f"{peaks[name]:.4g}" if name in peaks else ""}
        | {"times_best": f"{middle[name][0] / best:.3f}" if name in middle else ""}
        | {"failure": failed.get(name, ""), "package": _version(name)}
        | driver
        for name in measurement.variants
    ]


def _peaks(variants: dict[str, Call]) -> tuple[dict[str, float], dict[str, str]]:
    """The memory of each variant, and why others have none."""
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, call in variants.items():
        try:
            peaks[name] = peak_mib(call)
        except failures() as error:
            if name in OWN:
                raise
            failed[name] = type(error).__name__
            lines = str(error).strip().splitlines()
            print(f"{name}: {failed[name]}: {lines[0][:200] if lines else ''}")
        if name in failed:
            torch.cuda.empty_cache()
    return peaks, failed


def failures() -> tuple[type[Exception], ...]:
    """Return what a kernel or another package may raise."""
    from triton.errors import TritonError

    usual = (RuntimeError, AssertionError, ValueError, TypeError, ImportError, AttributeError)
    return (*usual, TritonError)


def once(measurement: Measurement) -> None:
    """Run every variant, and time none."""
    for call in measurement.variants.values():
        call()


def peak_mib(call: Call) -> float:
    """Return the MiB that a call needs beyond what was there, its results included."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ways(call: Callable[[bool | None], object]) -> dict[str, Call]:
    """Return the suite's own variants of an operation."""
    return {
        "fused": lambda: call(True),
        "default": lambda: call(None),
        "plain": lambda: call(False),
    }


def later(make: Callable[[], Call]) -> Call:
    """Return a call of what is made when it is called first: a compiled one, an optimizer."""
    made: list[Call] = []

    def call() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled by torch for each shape by itself."""
    return torch.compile(function, dynamic=False)


def in_one(call: Callable[[bool | None], object], *, small: bool) -> dict[str, Call]:
    """Return the plain operations, compiled; nothing where inputs are small, as that takes long."""
    return {} if small else {"torch compiled": later(lambda: compiled(lambda: call(False)))}


def peers(**makers: Callable[[Any], Call]) -> dict[str, Call]:
    """Return the variants of the packages that are installed, by the packages' names.

    Args:
        makers: given the package, imported where it is needed first, each returns the call.
    """
    found = {name: make for name, make in makers.items() if find_spec(name) is not None}
    return {name: later(partial(_made, name, make)) for name, make in found.items()}


def _made(name: str, make: Callable[[Any], Call]) -> Call:
    return make(import_module(name))


def _version(variant: str) -> str:
    """The version of another package, empty for the variants of ours and of torch."""
    names = packages_distributions().get(variant, [])
    return version(names[0]) if names else ""


def _key(measurement: Measurement, variant: str, where: dict[str, str]) -> dict[str, str]:
    m = measurement
    values = (m.thing, variant, m.mode, m.dtype, m.shape, where["device"])
    return dict(zip(KEY, values, strict=True))


def _figures(measurement: Measurement, found: Times | None, ceilings: Ceilings) -> dict[str, str]:
    median, low, high = found or (math.nan,) * 3
    gigabytes = measurement.moved_bytes / median / 1e6
    teraflops = measurement.flops / median / 1e9
    share = max(gigabytes / ceilings.gb_per_s, teraflops / ceilings.tflop_per_s)
    figures = {"ms_median": median, "ms_p20": low, "ms_p80": high}
    figures |= {"gb_per_s": gigabytes, "tflop_per_s": teraflops, "share_of_ceiling": share}
    figures |= {"ceiling_gb_per_s": ceilings.gb_per_s, "ceiling_tflop_per_s": ceilings.tflop_per_s}
    return {name: "" if math.isnan(x) else f"{x:.4g}" for name, x in figures.items()}
