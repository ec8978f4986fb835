"""Elementwise updates as kernels: launches, compilations, random bits, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from harness import launches
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.kernels._triton._updates._moments import one_minus_power

ROOT = Path(__file__).parent.parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 50), (7,), (), (2100,), (0, 3)]
UPDATES = {"adamw_update_": 4, "lion_update_": 3, "sgd_update_": 3}

Lists = list[list[Tensor]]

every_update = pytest.mark.parametrize("op", UPDATES)


def _lists(op: str, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> Lists:
    lists = [[torch.randn(s, device=DEVICE).to(dtype) for s in shapes] for _ in range(UPDATES[op])]
    if op == "adamw_update_":
        lists[3] = [x.abs() for x in lists[3]]
    return [*lists, [torch.tensor(1.0 + k, device=DEVICE) for k in range(len(shapes))]]


def _copy(lists: Lists) -> Lists:
    return [[x.clone() for x in column] for column in lists]


def _run(op: str, lists: Lists, *, fused: bool | None = True, **settings: Any) -> Lists:
    if op == "sgd_update_":
        settings = {"momentum": 0.9} | settings
    getattr(kernels, op)(*lists, **{"lr": 0.1, "fused": fused, **settings})
    return lists


def _same(found: Lists, expected: Lists) -> bool:
    pairs = [
        (x, y) for pair in zip(found, expected, strict=True) for x, y in zip(*pair, strict=True)
    ]
    return all(torch.equal(x, y) for x, y in pairs)


@triton.jit
def _write_power(out, log_beta, step):
    tl.store(out, one_minus_power(tl.cast(log_beta, tl.float32), tl.cast(step, tl.float32)))


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("step", [0.25, 1.0, 2.0, 3.0, 10.0, 77.0, 500.0, 12345.0, 1e6])
def test_corrections_are_exact_to_float32_rounding(beta: float, step: float) -> None:
    out = torch.zeros(1, device=DEVICE)
    _write_power[(1,)](out, math.log(beta), step)
    expected = -math.expm1(step * math.log(beta))
    assert abs(out.item() / expected - 1) < 2.5e-7


@every_update
def test_all_parameters_of_any_dtype_take_one_launch(op: str) -> None:
    halves = [_lists(op), _lists(op, dtype=torch.bfloat16), _lists(op, dtype=torch.float16)]
    lists = [a + b + c for a, b, c in zip(*halves, strict=True)]
    with launches() as found:
        _run(op, lists)
    assert found == ["update_kernel"]


def test_states_of_several_formats_take_a_launch_for_each() -> None:
    params, grads, _, _, steps = _lists("adamw_update_", [(40, 10), (3,), (30, 20)])
    formats = ["int8", "float32", "int8"]
    states = [
        [
            functional.zero_state(p.shape, format, signed=signed, device=DEVICE)
            for p, format in zip(params, formats, strict=True)
        ]
        for signed in (True, False)
    ]
    with launches() as found:
        kernels.adamw_update_(params, grads, *states, steps, lr=0.1, fused=True)
    assert found == ["update_kernel"] * 2


@every_update
def test_no_parameters_are_no_launch(op: str) -> None:
    with launches() as found:
        _run(op, [[] for _ in range(UPDATES[op] + 1)])
        _run(op, _lists(op, [(0, 3)]))
    assert found == []


@every_update
def test_transposed_matrices_are_not_copied(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = _lists(op, [(40, 30)])
    plain = [[x.T.contiguous() if x.ndim else x for x in column] for column in lists]
    _run(op, plain)
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("copied"))
    turned = _run(op, [[x.T if x.ndim else x for x in column] for column in lists])
    assert _same(turned, plain)


@every_update
def test_gradients_and_steps_stay(op: str) -> None:
    lists = _lists(op)
    kept = _copy(lists)
    _run(op, lists, clip=torch.tensor(0.5, device=DEVICE), maximize=True)
    assert _same([lists[1], lists[-1]], [kept[1], kept[-1]])


@every_update
def test_nothing_changes_where_infinities_were_found(op: str) -> None:
    lists = _lists(op)
    lists[1][0].fill_(torch.nan)
    kept = _copy(lists)
    _run(op, lists, found_inf=torch.tensor([1.0], device=DEVICE))
    assert _same([lists[0], *lists[2:]], [kept[0], *kept[2:]])


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4", "fp8"])
def test_no_bit_of_a_state_changes_where_infinities_were_found(format: str) -> None:
    params, grads, first, second, steps = _lists("adamw_update_", [(40, 10)])
    states = [
        [functional.encode_state(x[0], format, signed=signed)]
        for x, signed in ((first, True), (second, False))
    ]
    kept = [(x[0].codes.clone(), x[0].scales.clone()) for x in states]
    grads[0].fill_(torch.inf)
    found_inf = torch.tensor(1.0, device=DEVICE)
    kernels.adamw_update_(params, grads, *states, steps, lr=0.1, found_inf=found_inf, fused=True)
    for (state,), (codes, scales) in zip(states, kept, strict=True):
        assert torch.equal(state.codes, codes)
        assert torch.equal(state.scales, scales)


@every_update
def test_a_rate_on_the_device_is_the_same_number(op: str) -> None:
    lists = _lists(op)
    other = _copy(lists)
    _run(op, lists)
    _run(op, other, lr=torch.tensor(0.1, device=DEVICE))
    assert _same(lists, other)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.float32, torch.bfloat16) * 2])
def test_weights_are_rounded_by_the_words_of_random_bits(dtypes: tuple[torch.dtype, ...]) -> None:
    # In float32 w − lr·g is exact, so that only the words can make a difference.
    shapes = [(5, 60), (33,), (2500,), (1,)][: len(dtypes)]
    weights = [
        torch.randint(-9, 9, shape, device=DEVICE).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    grads = [torch.randint(-9, 9, shape, device=DEVICE).float() for shape in shapes]
    steps = [torch.tensor(3.0 + k, device=DEVICE) for k in range(len(shapes))]
    options: dict[str, Any] = {"lr": 2.0**-10, "rounding": "stochastic", "seed": 5, "stream": 8}
    expected = [x.clone() for x in weights]
    functional.sgd_update_(expected, grads, None, steps, **options)
    kernels.sgd_update_(weights, grads, None, steps, fused=True, **options)
    assert _same([weights], [expected])


def test_errors_are_those_of_split_weight() -> None:
    pairs = [functional.split_weight(torch.randn(shape, device=DEVICE)) for shape in SHAPES]
    grads = [torch.zeros(shape, device=DEVICE) for shape in SHAPES]
    weights, errors = ([x.clone() for x in column] for column in zip(*pairs, strict=True))
    kernels.sgd_update_(weights, grads, lr=0.1, weight_errors=errors, fused=True)
    assert _same([weights, errors], [list(x) for x in zip(*pairs, strict=True)])
    expected = [functional.join_weight(*pair) - 2.0**-20 for pair in pairs]
    grads = [torch.full(shape, 2.0**-20, device=DEVICE) for shape in SHAPES]
    kernels.sgd_update_(weights, grads, lr=1.0, weight_errors=errors, fused=True)
    for pair, x in zip(zip(weights, errors, strict=True), expected, strict=True):
        assert _same([list(pair)], [list(functional.split_weight(x))])


COUNT_KERNELS = """
import sys
import torch, triton
from triton.runtime.jit import JITFunction
from harness.ahead_of_time import NoDevice
from lightning_ext import kernels
from lightning_ext.kernels._triton import _interpret

triton.runtime.driver.set_active(NoDevice(80))
_interpret.runs_on = lambda device: True
found, launch = set(), JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    found.add(launch(self, *args, grid=grid, warmup=True, **kwargs).hash)

JITFunction.run = compile_only
w, g, m, v = ([torch.ones(300), torch.ones(5, 5)] for _ in range(4))
t = [torch.tensor(1.0), torch.tensor(1.0)]

def update(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **options):
    chosen = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    kernels.adamw_update_(w, g, m, v, t, **chosen, **options)

update(0.1)
update(1.0)
update(0.0, (0.0, 1 / 3), 0.0, 0.0)
update(16.0, (0.5, 0.5), 1.0, 16.0, maximize=True)
print(len(found))
update(0.1, decoupled_weight_decay=False)
print(len(found))
"""


@pytest.mark.timeout(300)
def test_numbers_change_without_another_compilation() -> None:
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", COUNT_KERNELS]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1", "2"]  # another rule is another kernel


@every_update
@pytest.mark.parametrize("place", [1, 2, -1])
def test_mismatched_lists_are_refused_before_a_launch(op: str, place: int) -> None:
    lists = _lists(op)
    lists[place].pop()
    kept = _copy(lists)
    with launches() as found, pytest.raises(ValueError, match="got 5 params and 4"):
        _run(op, lists)
    assert found == []
    assert _same(lists, kept)


@every_update
def test_other_shapes_are_refused_before_a_launch(op: str) -> None:
    lists = _lists(op)
    lists[2][0] = lists[2][0].T
    with launches() as found, pytest.raises(ValueError, match=r"params\[0\] of shape \(3, 50\)"):
        _run(op, lists)
    assert found == []


@every_update
def test_double_precision_has_no_kernel(op: str) -> None:
    with pytest.raises(TypeError, match=r"torch\.float64"):
        _run(op, _lists(op, dtype=torch.float64))


@every_update
def test_steps_are_counted_in_float32(op: str) -> None:
    lists = _lists(op)
    lists[-1][0] = lists[-1][0].half()
    with pytest.raises(TypeError, match="steps"):
        _run(op, lists)


def test_settings_out_of_range_are_refused_as_in_functional() -> None:
    with pytest.raises(ValueError, match="each must lie in"):
        _run("adamw_update_", _lists("adamw_update_"), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="nesterov=True"):
        _run("sgd_update_", _lists("sgd_update_"), nesterov=True, dampening=0.5)
    with pytest.raises(TypeError, match="amsgrad"):
        _run("adamw_update_", _lists("adamw_update_"), amsgrad=True)
