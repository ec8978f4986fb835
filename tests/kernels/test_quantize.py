"""What is peculiar to kernels of quantization; their accuracy stands in the room's contract."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from harness import launches
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.functional import Quantized
from lightning_ext.kernels._triton._quantization._code_tiles import places

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = ["fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2"]
FORMATS = [
    *((name, symmetric) for name in ("int8", "int4") for symmetric in (True, False)),
    *((name, True) for name in [*FLOATS, "mxfp4_e2m1", "mxint8"]),
]

every_format = pytest.mark.parametrize(("format", "symmetric"), FORMATS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The interpreter warns of overflow that a device takes as it comes."""
    with np.errstate(all="ignore"):
        yield


def options(format: str, **others: Any) -> dict[str, Any]:
    return others if format.startswith("mx") else {"block_size": 32} | others


def assert_same(found: Quantized, expected: Quantized) -> None:
    """Every bit of codes, scales and shifts, but for which nan it is."""
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)
    assert found[3:] == expected[3:]


def numbers() -> Tensor:
    """Rows that end within a block: ordinary, mixed, tiny, huge, with ties, not finite."""
    x = torch.randn(6, 100)
    x[1] *= torch.logspace(-30, 3, 100)
    x[2] *= 1e-43
    x[3] = x[3].clamp(-3.4, 3.4) * 1e38
    x[4] = torch.arange(100) / 2 - 25
    x[5, [3, 40, 99]] = torch.tensor([math.nan, math.inf, -math.inf])
    x[0, 64:] = 0
    x[0, 0] = -0.0
    return x


@every_format
@pytest.mark.parametrize("seed", [None, 5])
def test_codes_are_those_of_functional_bit_for_bit(
    format: str, symmetric: bool, seed: int | None
) -> None:
    x, settings = numbers(), options(format, symmetric=symmetric, seed=seed, step=3, stream=1)
    found = kernels.quantize(x.to(DEVICE), format, **settings, fused=True)
    assert_same(found, functional.quantize(x, format, **settings))


@every_format
def test_what_is_read_and_added_up_is_that_of_functional_bit_for_bit(
    format: str, symmetric: bool
) -> None:
    x = torch.stack([numbers(), torch.randn(6, 100)])
    sent = functional.quantize(x, format, **options(format, symmetric=symmetric))
    here = Quantized(*(y.to(DEVICE) if isinstance(y, Tensor) else y for y in sent))
    for name in ("dequantize", "dequantize_reduce"):
        found = getattr(kernels, name)(here, fused=True).cpu()
        expected = getattr(functional, name)(sent)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    found = kernels.dequantize_reduce_quantize(here, seed=1, fused=True)
    assert_same(found, functional.dequantize_reduce_quantize(sent, seed=1))


@pytest.mark.parametrize("native", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_integer_arithmetic_makes_the_codes_of_torch(native: torch.dtype) -> None:
    info = torch.finfo(native)
    format = "fp8_e4m3" if native == torch.float8_e4m3fn else "fp8_e5m2"
    codes = torch.arange(256, dtype=torch.uint8).view(native).float()
    codes = codes[codes.isfinite()]
    between = (codes[1:] + codes[:-1]) / 2
    others = torch.randn(3000) * torch.logspace(-9, math.log10(info.max), 3000)
    x = torch.cat([codes, between, others]).clamp(-info.max, info.max)
    x = torch.nn.functional.pad(x, (0, -len(x) % 15)).view(-1, 15)
    x = torch.nn.functional.pad(x, (0, 1), value=info.max)  # a scale of 1 for each block
    found = kernels.quantize(x.to(DEVICE), format, block_size=16, fused=True)
    assert (found.scales == 1).all()
    assert torch.equal(found.codes.cpu(), x.to(native).view(torch.uint8))


def test_what_goes_between_two_hops_takes_one_launch() -> None:
    sent = kernels.quantize(torch.randn(4, 2, 100, device=DEVICE), "int4", fused=False)
    with launches() as found:
        kernels.dequantize_reduce_quantize(sent, fused=True)
    assert found == ["requantize_kernel"]


@pytest.mark.parametrize("settings", [{"block_size": 24}, {"block_size": 8}, {"seed": 2**64}])
def test_what_is_refused_is_refused_before_a_launch(settings: dict[str, Any]) -> None:
    with launches() as found, pytest.raises(ValueError, match="not allowed"):
        kernels.quantize(torch.randn(64, device=DEVICE), "int8", **settings, fused=True)
    assert found == []


def test_shapes_that_do_not_fit_are_refused_before_a_launch() -> None:
    sent = kernels.quantize(torch.randn(4, 64, device=DEVICE), "int8")
    with launches() as found:
        with pytest.raises(ValueError, match="scales have shape"):
            kernels.dequantize(sent._replace(scales=sent.scales[1:]), fused=True)
        with pytest.raises(ValueError, match="first axis"):
            kernels.dequantize_reduce(
                sent._replace(codes=sent.codes[0], scales=sent.scales[0]), fused=True
            )
        with pytest.raises(ValueError, match="shifts"):
            kernels.dequantize(sent._replace(shifts=sent.scales[:2]), fused=True)
    assert found == []


def test_float64_is_refused() -> None:
    x = torch.randn(64, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        kernels.quantize(x, "int8", fused=True)
    sent = functional.quantize(x, "int8")
    with pytest.raises(TypeError, match=r"torch\.float64"):
        kernels.dequantize(sent, fused=True)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        kernels.dequantize(sent._replace(scales=sent.scales.float()), dtype=x.dtype, fused=True)
    assert kernels.quantize(x, "int8").scales.dtype == torch.float64


@triton.jit
def _write_places(offsets, inside, first, blocks, length, per_row, FLAT: tl.constexpr):
    found, there = places(tl.cast(first, tl.int64), blocks, length, per_row, FLAT, 4, 16)
    entries = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(offsets + entries, found)
    tl.store(inside + entries, there.to(tl.int8))


@pytest.mark.parametrize(
    ("flat", "first", "length"), [(True, 2**29, 2**33 + 40), (False, 2**28 - 4, 2**31 - 24)]
)
def test_offsets_beyond_two_to_the_31_do_not_wrap(flat: bool, first: int, length: int) -> None:
    per_row = -(-length // 16)
    offsets = torch.empty(64, dtype=torch.int64, device=DEVICE)
    inside = torch.empty(64, dtype=torch.int8, device=DEVICE)
    _write_places[(1,)](offsets, inside, first, 16 * per_row, length, per_row, FLAT=flat)
    expected = []
    for block in range(first, first + 4):
        row, column = (0, block) if flat else divmod(block, per_row)
        expected += [(row, 16 * column + entry) for entry in range(16)]
    assert offsets.tolist() == [row * length + column for row, column in expected]
    assert inside.tolist() == [column < length for _, column in expected]
    assert 0 < sum(inside.tolist()) < 64


@pytest.mark.parametrize("op", ["quantize", "pack_signs"])
def test_left_to_choose_it_compiles_whole(op: str) -> None:
    def there_and_back(x: Tensor) -> Tensor:
        if op == "quantize":
            return kernels.dequantize(kernels.quantize(x, "int4", seed=1))
        return kernels.unpack_votes(kernels.majority_vote(kernels.pack_signs(x)), x.shape[-1])

    x = torch.randn(4, 70)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), there_and_back(x))


def test_gradients_of_scales_are_those_of_functional() -> None:
    sent = functional.quantize(torch.randn(2, 64, device=DEVICE), "int8", block_size=32)
    d = torch.randn(64, device=DEVICE)
    found, expected = (
        torch.autograd.grad(reduce(sent._replace(scales=scales)), scales, d)[0]
        for reduce in (kernels.dequantize_reduce, functional.dequantize_reduce)
        for scales in [sent.scales.clone().requires_grad_()]
    )
    torch.testing.assert_close(found, expected)
    by_hand = (d * sent.codes.view(torch.int8)).view(2, -1, sent.block_size).sum(2) / 2
    torch.testing.assert_close(found, by_hand)
