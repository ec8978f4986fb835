"""Moments of few bits under a Trainer: whoever writes a checkpoint, and whoever reads it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import run_distributed
from harness._faults import Fault
from harness.low_bit_fits import Wide, fitted
from harness.low_bit_sharded import Weights, distance, own_rows, same
from lightning.pytorch.callbacks import ModelCheckpoint

# A reader has no use for the settings of the callback that wrote.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:ZeroPPStrategy has one node:UserWarning"),
]
SAVED, STEPS = 3, 6
RANKS = {
    "one process": 1,
    "ddp": 2,
    "fsdp2": 2,
    "fsdp2 in a file": 2,
    "breadth_first_pipeline": 2,
    "pipeline_1f1b": 2,
    "zeropp": 2,
}
SHARDED = ("fsdp2", "fsdp2 in a file", "zeropp")
# ‖w − w₁‖/‖w₁ − w₀‖ of three more steps, and ‖m − m₁‖/‖m₁‖ of a moment where blocks are cut.
BOUNDS = {"int8": (0.03, 0.02), "int4": (0.2, 0.25), "fp8": (0.03, 0.03)}
FORMATS = ("float32", "int8", "int4")  # those that are written
LOW = ("bfloat16", "int8", "int4", "fp8")
Run = tuple[list[Weights], list[Weights]]


def write(strategy: str, format: str, folder: Path) -> tuple[Weights, Weights]:
    """Saves in mid-epoch; returns the weights and moments that were saved."""
    save = ModelCheckpoint(folder, format, every_n_train_steps=SAVED)
    kept = fitted(strategy, Wide(format), SAVED, save, enable_checkpointing=True)
    return kept.weights[-1], kept.moments[-1]


def write_all(strategy: str, folder: Path) -> dict[str, tuple[Weights, Weights]]:
    return {format: write(strategy, format, folder) for format in FORMATS}


def read(strategy: str, format: str, path: Path) -> Run:
    kept = fitted(strategy, Wide(format), STEPS, ckpt_path=str(path))
    return kept.weights, kept.moments


def read_all(strategy: str, paths: list[tuple[str, Path]]) -> list[Run]:
    return [read(strategy, format, path) for format, path in paths]


@functools.cache
def straight(format: str) -> Weights:
    """What one process comes to without a stop."""
    return fitted("one process", Wide(format), STEPS).weights[-1]


Written = Callable[[str, str], tuple[Path, Weights, Weights]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Has a strategy write a checkpoint, once; and what whole weights and moments there were."""

    @functools.cache
    def of_ranks(strategy: str) -> tuple[Path, list[dict[str, tuple[Weights, Weights]]]]:
        folder = tmp_path_factory.mktemp("written")
        return folder, run_distributed(write_all, RANKS[strategy], args=(strategy, folder))

    def make(strategy: str, format: str) -> tuple[Path, Weights, Weights]:
        folder, ranks = of_ranks(strategy)
        found = [own[format] for own in ranks]
        weights = {n: x for own, _ in found for n, x in own.items()}
        moments = {n: x for _, own in found for n, x in own.items()}
        if strategy in SHARDED:
            moments = {n: torch.cat([own[n] for _, own in found]) for n in moments}
        return folder / f"{format}.ckpt", weights, moments

    return make


def is_coded(name: str) -> bool:
    return name.startswith("net.") and "weight" in name


PAIRS = [
    ("one process", "fsdp2"),
    ("fsdp2", "fsdp2"),
    ("fsdp2 in a file", "one process"),
    ("breadth_first_pipeline", "one process"),
    ("one process", "breadth_first_pipeline"),
    ("pipeline_1f1b", "fsdp2"),
    ("zeropp", "zeropp"),
]
SLOW_PAIRS = [
    ("ddp", "fsdp2"),
    ("fsdp2 in a file", "fsdp2"),
    ("fsdp2", "pipeline_1f1b"),
    ("one process", "zeropp"),
]


@pytest.mark.parametrize(
    ("writer", "reader"), [*PAIRS, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW_PAIRS)]
)
def test_checkpoints_go_on(writer: str, reader: str, written: Written) -> None:
    formats = ("int8", "int4")
    paths = [(format, written(writer, format)[0]) for format in formats]
    for rank, runs in enumerate(run_distributed(read_all, RANKS[reader], args=(reader, paths))):
        for format, run in zip(formats, runs, strict=True):
            require_goes_on(written(writer, format), writer, reader, rank, format, run)


def require_goes_on(
    saved: tuple[Path, Weights, Weights], writer: str, reader: str, rank: int, format: str, run: Run
) -> None:
    _, weights, moments = saved
    found, states = run
    assert all(torch.equal(x, weights[n]) for n, x in found[0].items()), format
    for name, value in states[0].items():
        own = reader in SHARDED
        truth = own_rows(moments[name], rank, RANKS[reader]) if own else moments[name]
        # Those who share rows alike, or have all of them, begin blocks alike.
        exact = (writer in SHARDED) == own or not is_coded(name)
        bound = 0.0 if exact else BOUNDS[format][1]
        assert (value - truth).norm() <= bound * truth.norm(), (format, name)
    error = distance(found[1], straight_of(found[1], format), Wide().start)
    # ZeRO++ rounds gradients, too.
    assert error <= (0.4 if reader == "zeropp" else BOUNDS[format][0]), format


def straight_of(own: Weights, format: str) -> Weights:
    return {n: x for n, x in straight(format).items() if n in own}


def resumed(strategy: str, format: str, folder: Path) -> tuple[Weights, Weights]:
    """An uninterrupted run, and one that goes on from what is there."""
    whole = fitted(strategy, Wide(format), STEPS).weights[-1]
    again = fitted(strategy, Wide(format), STEPS, ckpt_path=str(folder / "step=4.ckpt"))
    return whole, again.weights[-1]


def uninterrupted(strategy: str, format: str, folder: Path) -> tuple[Weights, Weights]:
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    fitted(strategy, Wide(format), 4, save, enable_checkpointing=True)
    return resumed(strategy, format, folder)


@pytest.mark.parametrize(
    ("strategy", "ranks", "format"),
    [
        ("zeropp", 2, "int8"),
        ("breadth_first_pipeline", 2, "int8"),
        pytest.param("breadth_first_pipeline", 2, "int4", marks=pytest.mark.slow),
        pytest.param("zeropp", 2, "int4", marks=pytest.mark.slow),
        pytest.param("pipeline_1f1b", 2, "int8", marks=pytest.mark.slow),
        pytest.param("pipeline_1f1b", 2, "int4", marks=pytest.mark.slow),
        pytest.param("pipeline of shards", 4, "int8", marks=pytest.mark.slow),
        pytest.param("pipeline of shards", 4, "int4", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_bitwise(strategy: str, ranks: int, format: str, tmp_path: Path) -> None:
    for whole, again in run_distributed(uninterrupted, ranks, args=(strategy, format, tmp_path)):
        assert same(whole, again)


def killed(strategy: str, format: str, folder: Path) -> None:
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    fault = Fault("die", rank=1, step=5)
    fitted(strategy, Wide(format), STEPS, save, fault, enable_checkpointing=True)


QUICK = (("fsdp2", "int8"), ("fsdp2 in a file", "int4"))  # the others are slow


@pytest.mark.parametrize(
    ("strategy", "format"),
    [
        pytest.param(*x, marks=[pytest.mark.slow] * (x not in QUICK))
        for x in itertools.product(("fsdp2", "fsdp2 in a file"), LOW)
    ],
)
def test_a_run_that_was_killed_goes_on_bitwise(strategy: str, format: str, tmp_path: Path) -> None:
    errors = run_distributed(killed, args=(strategy, format, tmp_path), return_exceptions=True)
    assert all(isinstance(x, Exception) for x in errors)
    for whole, again in run_distributed(resumed, args=(strategy, format, tmp_path)):
        assert same(whole, again)


@pytest.mark.parametrize(
    "writer", ["fsdp2", pytest.param("fsdp2 in a file", marks=pytest.mark.slow)]
)
def test_another_format_is_converted(writer: str, written: Written) -> None:
    pairs = [("float32", "int8"), ("int8", "int4"), ("int8", "float32")]
    paths = [(wanted, written(writer, saved)[0]) for saved, wanted in pairs]
    for rank, runs in enumerate(run_distributed(read_all, args=("fsdp2", paths))):
        for (saved, wanted), (found, states) in zip(pairs, runs, strict=True):
            _, weights, moments = written(writer, saved)
            assert same(found[0], weights)
            for name, value in states[0].items():
                truth = own_rows(moments[name], rank, 2)
                exact = wanted == "float32" or not is_coded(name)
                bound = 0.0 if exact else BOUNDS[wanted][1]
                assert (value - truth).norm() <= bound * truth.norm(), (wanted, name)
