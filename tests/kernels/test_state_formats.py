from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import launches
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.functional import QuantizedState, decode_state, encode_state, zero_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [(format, s) for format in ("int8", "int4", "fp8") for s in (True, False)]
SHAPES = [(40, 70), (1300,), (5, 3, 3, 3), (), (3, 2100), (0, 4)]
every_kind = pytest.mark.parametrize(("format", "signed"), KINDS)


def _moment(shape: Sequence[int], signed: bool) -> Tensor:
    x = torch.randn(shape, device=DEVICE) * 1e-3
    return x if signed else x.square()


def _states(format: str, signed: bool, seed: int) -> list[QuantizedState]:
    torch.manual_seed(seed)
    moments = [_moment(shape, signed) for shape in SHAPES]
    return [encode_state(x, format, signed=signed, seed=seed) for x in moments]


def _problem(formats: tuple[str, str]) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "params": [torch.randn(shape, device=DEVICE) for shape in SHAPES],
        "grads": [torch.randn(shape, device=DEVICE) * 1e-2 for shape in SHAPES],
        "exp_avgs": _states(formats[0], True, 1),
        "exp_avg_sqs": _states(formats[1], False, 2),
        "steps": [torch.tensor(7.0, device=DEVICE) for _ in SHAPES],
    }
    return found


def _codes(states: Sequence[QuantizedState]) -> Tensor:
    codes = [functional.export_state(x)["codes"] for x in states]
    return torch.cat(
        [(x.view(torch.int16) if x.dtype == torch.bfloat16 else x).flatten().int() for x in codes]
    )


def _assert_codes_agree(found: Sequence[QuantizedState], wanted: Sequence[QuantizedState]) -> None:
    apart = (_codes(found) - _codes(wanted)).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= 1e-4
    scales = [torch.cat([x.scales.flatten() for x in states]) for states in (found, wanted)]
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("v_format", ["bfloat16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("m_format", ["bfloat16", "int8", "int4", "fp8"])
def test_one_launch_reads_updates_and_writes_states(m_format: str, v_format: str) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    problem, own = _problem((m_format, v_format)), _problem((m_format, v_format))
    with launches() as found:
        kernels.adamw_update_(**problem, **settings, seed=3, stream=5, fused=True)
    maxima = ["rank_one_maxima_kernel"] if v_format == "int4" else []
    assert found == [*maxima, "update_kernel"]
    for i, (w, g, m, v, t) in enumerate(zip(*own.values(), strict=True)):
        new = functional.adamw_update(w, g, decode_state(m), decode_state(v), t, **settings)
        w.copy_(new[0])
        for k, (state, value) in enumerate(((m, new[1]), (v, new[2]))):
            bits = {"seed": 3, "step": 7, "stream": 5 + 4 * i + 1 + k}
            encode_state(value, state.format, signed=state.signed, out=state, **bits)
    _assert_codes_agree(problem["exp_avgs"], own["exp_avgs"])
    _assert_codes_agree(problem["exp_avg_sqs"], own["exp_avg_sqs"])
    torch.testing.assert_close(problem["params"], own["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4", "fp8"])
def test_a_step_that_is_left_out_changes_no_state(format: str) -> None:
    problem, before = _problem((format, format)), _problem((format, format))
    problem["grads"][0][0, 0] = math.inf
    found_inf = torch.ones((), device=DEVICE)
    kernels.adamw_update_(**problem, lr=0.01, found_inf=found_inf, fused=True)
    for name in ("exp_avgs", "exp_avg_sqs"):
        for state, old in zip(problem[name], before[name], strict=True):
            assert torch.equal(state.codes, old.codes)
            assert torch.equal(state.scales, old.scales)


@pytest.mark.parametrize(("format", "signed"), [*KINDS[:4], ("bfloat16", True)])
def test_codes_are_bit_for_bit_those_of_functional(format: str, signed: bool) -> None:
    x = _moment((90, 100), signed) * torch.logspace(-6, 6, 90, device=DEVICE)[:, None]
    settings: dict[str, Any] = {"signed": signed, "seed": 2**40 + 1, "step": 3, "stream": 4}
    found = kernels.encode_state(x, format, **settings, fused=True)
    wanted = encode_state(x, format, **settings)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)


# numpy, which interprets kernels, warns of what is meant here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_kernel_does_not_hide_what_is_not_finite(bad: float, format: str, signed: bool) -> None:
    x = _moment((20, 200), signed)
    x[3, 7] = bad
    read = decode_state(kernels.encode_state(x, format, signed=signed, fused=True))
    assert not read[3, 7].isfinite()
    assert read[10].isfinite().all()


@every_kind
def test_numbers_that_are_not_normal_count_as_zeros_in_a_kernel(format: str, signed: bool) -> None:
    state = kernels.encode_state(
        torch.full((3, 50), 1e-40, device=DEVICE), format, signed=signed, fused=True
    )
    zero = zero_state((3, 50), format, signed=signed, device=DEVICE)
    assert torch.equal(state.codes, zero.codes)
    assert torch.equal(state.scales, zero.scales)


def test_a_state_with_a_gradient_is_read_by_torch_or_refused() -> None:
    state = zero_state((3,), "int8", device=DEVICE)
    state.scales.requires_grad_()
    assert kernels.decode_state(state).requires_grad
    with pytest.raises(RuntimeError, match="no gradient"):
        kernels.decode_state(state, fused=True)


def test_double_precision_is_refused_before_a_launch() -> None:
    x = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    with launches() as found:
        with pytest.raises(TypeError, match=r"torch\.float64"):
            kernels.encode_state(x, "int8", fused=True)
        with pytest.raises(TypeError, match=r"torch\.float64"):
            kernels.decode_state(encode_state(x, "int8"), fused=True)
    assert found == []


def test_a_state_that_would_be_read_beyond_its_end_is_refused_before_a_launch() -> None:
    problem = _problem(("int8", "fp8"))
    first = problem["exp_avgs"][0]
    problem["exp_avgs"][0] = first._replace(scales=first.scales[:-1])
    with launches() as found:
        with pytest.raises(ValueError, match="are no int8 state"):
            kernels.decode_state(problem["exp_avgs"][0], fused=True)
        with pytest.raises(ValueError, match="are no int8 state"):
            kernels.adamw_update_(**problem, lr=0.1, fused=True)
    assert found == []


@pytest.mark.parametrize("options", [{"seed": -1}, {"step": 2**32}, {"stream": -1}])
def test_counters_that_do_not_fit_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        kernels.encode_state(torch.zeros(3), "bfloat16", fused=True, **options)


START, WIDTH = 2**33, 1000


def _far_table(columns: Sequence[tuple[Tensor, int]], size: int) -> list[Tensor | int]:
    """A table of tensors that are said to begin so many of their entries earlier."""
    addresses = [x.data_ptr() - before * x.element_size() for x, before in columns]
    codes = [0] * len(columns)
    table = torch.tensor([START + size, 0, *addresses, *codes], device=DEVICE).view(-1, 1)
    chunks = torch.tensor([[0, START // 1024]], dtype=torch.int32, device=DEVICE)
    return [table, chunks, 1]


def _far_columns(name: str, state: QuantizedState) -> list[tuple[Tensor, int]]:
    per_byte = 2 if state.format == "int4" else 1
    codes = (state.codes, START // per_byte)
    if name == "int4_rank1":
        width = torch.tensor(WIDTH, device=DEVICE)
        return [codes, (state.scales, START // WIDTH), (width, 0), (state.scales, START // WIDTH)]
    block = 256 if state.format == "int8" else 128
    return [codes, (state.scales, START // block * (2 if state.format == "fp8" else 1))]


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_offsets_beyond_two_to_the_31(format: str) -> None:
    from lightning_ext.kernels._triton._states import _encode_state as launcher
    from lightning_ext.kernels._triton._states._columns import code_books, state_format

    x = _moment((300,), True)
    wanted, state = encode_state(x, format), zero_state((300,), format, device=DEVICE)
    read, name = torch.empty_like(x), state_format(state)
    shared: dict[str, Any] = {"FORMAT": name, "ALIGNED": False, "BLOCK": 1024}
    columns = [(x, START), *_far_columns(name, state)]
    launcher.encode_state_kernel[(1,)](
        *_far_table(columns, 300), code_books(DEVICE), 0, 0, 0, **shared,
        FROM=launcher.tl.float32, TO=None,
    )  # fmt: skip
    _assert_codes_agree([state], [wanted])
    columns = [(read, START), *_far_columns(name, state)]
    launcher.decode_state_kernel[(1,)](
        *_far_table(columns, 300), code_books(DEVICE), **shared, FROM=None
    )
    torch.testing.assert_close(read, decode_state(state), rtol=1e-6, atol=0.0)


def test_rows_beyond_two_to_the_31() -> None:
    from lightning_ext.kernels._triton._states import _encode_state as launcher
    from lightning_ext.kernels._triton._states._columns import code_books

    size, first = 300, START % WIDTH
    rows = -(-(START + size) // WIDTH) - START // WIDTH
    codes = torch.randint(0, 256, (150,), dtype=torch.uint8, device=DEVICE)
    scales, read = torch.rand(rows + WIDTH, device=DEVICE), torch.empty(size, device=DEVICE)
    state = QuantizedState(codes, scales, "int4", (size,), False)
    columns = [(read, START), *_far_columns("int4_rank1", state)]
    launcher.decode_state_kernel[(1,)](
        *_far_table(columns, size), code_books(DEVICE), FORMAT="int4_rank1", FROM=None,
        ALIGNED=False, BLOCK=1024,
    )  # fmt: skip
    at = first + torch.arange(size, device=DEVICE)
    scale = torch.minimum(scales[at // WIDTH], scales[rows + at % WIDTH])
    numbers = (functional.export_state(state)["codes"] + 1.0) / 16
    torch.testing.assert_close(read, numbers * scale, rtol=1e-6, atol=0.0)
