"""`benchmarks/gpu.py`, as far as it goes without a GPU: every call that it would time is made."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks._gpu import (
    SLICES,
    Ceilings,
    Measurement,
    _ema,
    _norms,
    _quantization,
    _timing,
    once,
    rows,
)
from benchmarks._gpu._quantization_peers import decoders, encoders
from benchmarks._gpu._update_lists import RULES, Lists, least_bytes, lists_of, moved_bytes, update
from lightning_ext import functional
from lightning_ext.kernels._triton._interpret import INTERPRETED

CPU = torch.device("cpu")
FLOAT32_BYTES = {  # of a parameter: what launches move, and every tensor once
    "adamw_update_": (28, 28),
    "lion_update_": (20, 20),
    "sgd_update_": (20, 20),
    "lamb_update_": (40, 28),
    "lars_update_": (28, 20),
    "adamp_update_": (40, 28),
    "came_update_": (32, 20),
    "came_vector_update_": (36, 28),
}


@pytest.mark.parametrize("name", SLICES)
def test_everything_that_would_be_timed_runs(name: str) -> None:
    found: list[Measurement] = []
    for measurement in SLICES[name](CPU, True):
        once(measurement)
        found.append(measurement)
    assert found
    assert all(x.moved_bytes > 0 or x.flops > 0 for x in found)
    assert all({"fused", "default", "plain"} <= set(x.variants) for x in found)
    keys = [(x.thing, x.mode, x.dtype, x.shape) for x in found]
    assert len(set(keys)) == len(keys)


def test_without_a_card_nothing_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda name: pytest.fail("something was run"))
    assert gpu.main(["--only", "ema"]) == 2
    assert "No CUDA device" in capsys.readouterr().err


def test_slices_can_be_named() -> None:
    assert gpu.parse(["--only", "tests,ema"]) == ["tests", "ema"]
    assert gpu.parse([]) == ["tests", "accuracy", *SLICES]


def test_an_unknown_slice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "emma"])
    assert "emma: no such slice; there are tests, accuracy, ema" in capsys.readouterr().err


def test_scripts_that_take_no_device_are_no_slices(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"callback_overhead", "geometry", "trust_updates"} <= set(gpu.SCRIPTS)
    assert not set(gpu.SCRIPTS) & {*SLICES, "gpu"}
    for name in ("adaptive_steps", "invariance", "surge", "geometry_bias", "gpu"):
        with pytest.raises(SystemExit):
            gpu.parse(["--only", name])
        assert f"{name}: no such slice" in capsys.readouterr().err


@pytest.mark.parametrize("name", gpu.SCRIPTS)
def test_a_script_is_run_on_the_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def called(command: list[str], cwd: Path) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", called)
    assert gpu.run(name)
    assert Path(commands[0][1]).name == f"{name}.py"
    assert commands[0][2:] == ["--device", "cuda"]


@pytest.mark.parametrize("name", sorted({*SLICES} & {"contrastive", "ema", "updates"}))
def test_the_name_of_a_family_starts_no_script(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(subprocess, "run", lambda *given, **how: pytest.fail("a script was run"))
    monkeypatch.setattr(gpu, "run_timings", lambda name: not found.append(name))
    assert gpu.run(name)
    assert found == [name]


@pytest.mark.parametrize("op", RULES)
def test_what_an_update_moves_is_counted(op: str) -> None:
    lists = lists_of(RULES[op], (3, (4, 5)), CPU)
    launched, least = FLOAT32_BYTES[op]
    assert moved_bytes(RULES[op], lists) == 60 * launched
    assert least_bytes(RULES[op], lists) == 60 * least


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone tells what is read and written")
@pytest.mark.parametrize("op", RULES)
def test_launches_move_what_is_counted(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = lists_of(RULES[op], (2, (40, 70)), CPU)
    with moved(lists, monkeypatch) as found:
        update(op, lists)(True)
    assert sum(found) == moved_bytes(RULES[op], lists)


@contextmanager
def moved(lists: Lists, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collect the bytes of weights, gradients and moments that launches load and store."""
    from triton.runtime import interpreter

    columns = chain(lists.weights, lists.grads, *lists.states)
    whole = [x for x in columns if isinstance(x, Tensor)]
    native, found = interpreter._interpreter, list[int]()

    def count(pointers: Any, mask: Any) -> None:
        for x in whole:
            first = x.data_ptr()
            inside = (pointers >= first) & (pointers < first + x.nbytes)
            found.append(x.element_size() * int(np.count_nonzero(inside & mask)))

    def load(pointers: Any, mask: Any, *others: Any) -> Any:
        count(pointers, mask)
        return native.load(pointers, mask, *others)

    def store(pointers: Any, value: Any, mask: Any) -> Any:
        count(pointers, mask)
        return native.store(pointers, value, mask)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
        yield found


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_what_torch_casts_is_what_was_encoded(format: str) -> None:
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    codes = functional.quantize(x, format)
    made = encoders(x, codes, small=True)["torch cast"]()
    read = decoders(x, codes, small=True)["torch cast"]()
    assert isinstance(made, tuple)
    assert isinstance(read, Tensor)
    torch.testing.assert_close(made[1].flatten(), codes.scales.flatten(), rtol=1e-6, atol=0.0)
    expected = functional.dequantize(codes, dtype=x.dtype)
    torch.testing.assert_close(read.view_as(x), expected, rtol=2**-3, atol=0.02)


@pytest.mark.parametrize("family", [_ema, _norms])
def test_lists_are_compiled_but_long_ones(
    family: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"short": (3, (5, 4)), "long": (101, (2, 2))}
    monkeypatch.setattr(family, "SHAPES", shapes)
    for measurement in family.measurements(CPU, False):
        assert ("torch compiled" in measurement.variants) == (measurement.shape == "short")


@pytest.mark.parametrize("format", _quantization.FORMATS)
def test_codes_are_timed_beside_what_torch_has(format: str) -> None:
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    found = list(_quantization.coded(x, format, "4 x 512", small=False))
    assert all("torch compiled" in measurement.variants for measurement in found)
    casts = format in ("int8", "fp8_e4m3")
    for measurement in (found[0], found[2]):
        assert ("torch cast" in measurement.variants) == casts
        assert ("torch cast compiled" in measurement.variants) == casts


def test_states_errors_and_scales_are_counted() -> None:
    rule = RULES["adamw_update_"]
    lists = lists_of(rule, (1, (2, 256)), CPU, "bfloat16, error bits", "int8")
    # Weight, its errors and two states twice, the gradient once; a scale for 256 entries.
    assert moved_bytes(rule, lists) == 512 * (2 * (2 + 1 + 2) + 2) + 2 * 2 * 2 * 4


def test_a_row_says_why_another_package_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("too large")

    fake_card(monkeypatch)
    own = dict.fromkeys(("fused", "default", "plain"), lambda: None)
    found = rows(Measurement("x", "", "", "", own | {"torch": fails}, 6), Ceilings(1.0, 1.0))
    assert [row["failure"] for row in found] == ["", "", "", "OutOfMemoryError"]
    assert [row["ms_median"] for row in found] == ["2", "2", "2", ""]
    assert len({tuple(row) for row in found}) == 1


def test_a_failure_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("broken")

    fake_card(monkeypatch)
    with pytest.raises(RuntimeError, match="broken"):
        rows(Measurement("x", "", "", "", {"fused": fails}, 6), Ceilings(1.0, 1.0))


def fake_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call once for the memory, and say that it took 1 to 3 ms."""
    monkeypatch.setattr(_timing, "peak_mib", lambda call: call() or 1.0)
    monkeypatch.setattr(_timing, "milliseconds", lambda call: [1.0, 2.0, 3.0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
