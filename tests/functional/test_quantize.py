from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ext.functional import Quantized, dequantize, quantize

# Exponent bits, mantissa bits, bias and the largest magnitude's code.
FLOATS = {
    "fp8_e4m3": (4, 3, 7, 0x7E),
    "fp8_e5m2": (5, 2, 15, 0x7B),
    "mxfp8_e4m3": (4, 3, 7, 0x7E),
    "mxfp8_e5m2": (5, 2, 15, 0x7B),
    "mxfp6_e2m3": (2, 3, 1, 0x1F),
    "mxfp6_e3m2": (3, 2, 3, 0x1F),
    "mxfp4_e2m1": (2, 1, 1, 0x7),
}
INTEGERS = {"int8": 127, "int4": 7}
FORMATS = [*FLOATS, *INTEGERS, "mxint8"]
NATIVE = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

every_float = pytest.mark.parametrize("format", FLOATS)
every_format = pytest.mark.parametrize("format", FORMATS)


def table(format: str) -> Tensor:
    """The numbers of a format's codes from 0 to the largest one, by its definition."""
    _, mantissa_bits, bias, largest = FLOATS[format]
    values = []
    for code in range(largest + 1):
        exponent, mantissa = code >> mantissa_bits, code & (1 << mantissa_bits) - 1
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)
        values.append(2.0 ** (max(exponent, 1) - bias) * fraction)
    return torch.tensor(values)


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """The codes of the nearest numbers, the even one of two; numpy alone."""
    distance = np.abs(x.numpy().astype(np.float64)[:, None] - numbers.numpy().astype(np.float64))
    is_odd = np.arange(len(numbers)) % 2
    return torch.from_numpy(np.where(distance == distance.min(1)[:, None], is_odd, 2).argmin(1))


def unpacked(found: Quantized) -> Tensor:
    if found.format not in ("int4", "mxfp4_e2m1"):
        return found.codes
    both = torch.stack([found.codes & 15, found.codes >> 4], -1).flatten(-2)
    return both[..., : found.length]


def options(format: str, **others: Any) -> dict[str, Any]:
    return others if format.startswith("mx") else {"block_size": 32} | others


def steps(x: Tensor, found: Quantized) -> Tensor:
    """The distance between the numbers next to each x, those of its own format and block."""
    size = found.block_size
    scales = found.scales
    if scales.dtype == torch.uint8:
        scales = 2.0 ** (scales.double() - 127)
    scales = scales.double().repeat_interleave(size, -1)[..., : x.shape[-1]]
    if found.format not in FLOATS:
        return scales / (64 if found.format == "mxint8" else 1)
    _, mantissa_bits, bias, _ = FLOATS[found.format]
    exponent = (x.double() / scales).abs().clamp_min(2.0 ** (1 - bias)).log2().floor()
    return scales * 2 ** (exponent - mantissa_bits)


def whole_scale(format: str, numbers: Tensor) -> Tensor:
    """Numbers in blocks whose scale is 1: the largest one of the format stands in each."""
    largest = table(format)[-1]
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % 31)).view(-1, 31)
    return torch.cat([blocks, largest.expand(len(blocks), 1)], 1).flatten()


def test_the_sixteen_numbers_of_e2m1() -> None:
    codes = torch.arange(0, 16, 2) | torch.arange(1, 16, 2) << 4
    scales = torch.tensor([127], dtype=torch.uint8)
    found = dequantize(Quantized(codes.to(torch.uint8), scales, None, "mxfp4_e2m1", 32, 16))
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found.tolist() == [*positive, *(-x for x in positive)]


@pytest.mark.parametrize(
    ("format", "codes", "numbers"),
    [
        ("mxfp6_e2m3", [1, 7, 8, 31, 33, 63], [0.125, 0.875, 1, 7.5, -0.125, -7.5]),
        ("mxfp6_e3m2", [1, 3, 4, 31, 33, 63], [0.0625, 0.1875, 0.25, 28, -0.0625, -28]),
        ("mxfp8_e4m3", [1, 8, 0x7E, 0x81], [2**-9, 2**-6, 448, -(2**-9)]),
        ("mxfp8_e5m2", [1, 4, 0x7B, 0xFB], [2**-16, 2**-14, 57344, -57344]),
    ],
)
def test_numbers_that_the_standard_names(
    format: str, codes: list[int], numbers: list[float]
) -> None:
    scales = torch.tensor([127], dtype=torch.uint8)
    kept = torch.tensor(codes, dtype=torch.uint8)
    found = dequantize(Quantized(kept, scales, None, format, 32, len(codes)))
    assert found.tolist() == numbers


@every_float
def test_every_code_reads_as_its_definition_says(format: str) -> None:
    numbers = table(format)
    signed = torch.cat([numbers, -numbers])
    x = whole_scale(format, signed)
    assert torch.equal(dequantize(quantize(x, format, **options(format))), x)


@every_float
@pytest.mark.parametrize("sign", [1, -1])
def test_codes_are_those_of_the_nearest_number_and_ties_are_even(format: str, sign: int) -> None:
    numbers = table(format)
    between = (numbers[1:] + numbers[:-1]) / 2
    others = torch.rand(500) * torch.logspace(-6, math.log10(numbers[-1]), 500)
    just = [torch.nextafter(between, torch.tensor(y)) for y in (0.0, math.inf)]
    x = whole_scale(format, torch.cat([numbers, between, *just, others]))
    codes = unpacked(quantize(sign * x, format, **options(format))).long()
    exponent_bits, mantissa_bits, *_ = FLOATS[format]
    expected = nearest(x, numbers)
    assert torch.equal(codes & (1 << exponent_bits + mantissa_bits) - 1, expected)
    negative = torch.signbit(sign * x)  # that of zeros, too
    assert torch.equal(codes >> exponent_bits + mantissa_bits, negative.long())


@pytest.mark.parametrize("format", NATIVE)
def test_fp8_codes_are_those_of_torch(format: str) -> None:
    x = whole_scale(format, torch.randn(2000) * torch.logspace(-9, 2, 2000))
    found = quantize(x, format, block_size=32)
    assert (found.scales == 1).all()
    assert torch.equal(found.codes, x.to(NATIVE[format]).view(torch.uint8))


def test_in_mx_formats_scales_are_powers_of_two_and_large_numbers_saturate() -> None:
    x = torch.tensor([7.9, -7.9, 5.1, 1.2] + [0.0] * 28)  # ⌊log₂ 7.9⌋ is that of 6
    found = quantize(x, "mxfp4_e2m1")
    assert found.scales.item() == 127
    assert dequantize(found)[:4].tolist() == [6, -6, 6, 1]
    assert quantize(2.0**100 * x, "mxfp4_e2m1").scales.item() == 227


@pytest.mark.parametrize(
    ("largest", "field"), [(2.0**-149, 0), (2.0**-126, 0), (2.0**-125, 0), (1.0, 125), (3e38, 252)]
)
def test_shared_exponents_are_clamped_to_what_e8m0_has(largest: float, field: int) -> None:
    found = quantize(torch.tensor([largest]), "mxfp6_e2m3")
    assert found.scales.item() == field
    read = dequantize(found).item()
    assert math.isfinite(read)
    assert abs(read - largest) <= max(largest / 16, 2.0**-131)


@every_format
@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000])
def test_the_error_is_at_most_half_a_step(format: str, length: int) -> None:
    x = torch.randn(3, length) * torch.randn(3, length).exp()
    found = quantize(x, format, **options(format))
    allowed = steps(x, found) / 2
    if format.startswith("mx"):  # but for saturated numbers
        largest = 127 / 64 if format == "mxint8" else table(format)[-1].double()
        reach = largest * 2.0 ** (found.scales.double() - 127).repeat_interleave(32, -1)
        allowed = torch.maximum(allowed, x.abs() - reach[..., :length])
    assert ((dequantize(found) - x).abs() <= allowed * (1 + 1e-4)).all()


@pytest.mark.parametrize("format", INTEGERS)
def test_a_shift_halves_the_step_of_numbers_of_one_sign(format: str) -> None:
    x = torch.rand(4, 256) + 0.001
    plain = quantize(x, format)
    shifted = quantize(x, format, symmetric=False)
    assert torch.equal(shifted.shifts, x.amin(-1, keepdim=True))
    assert (shifted.scales < 0.51 * plain.scales).all()
    assert ((dequantize(shifted) - x).abs() <= shifted.scales / 2 + 1e-6).all()
    assert shifted.nbytes == plain.nbytes + 4 * 4


@every_format
def test_a_large_number_costs_its_own_block_alone(format: str) -> None:
    x = torch.randn(96)
    other = x.clone()
    other[40] = 1e6
    one, two = (dequantize(quantize(y, format, **options(format))) for y in (x, other))
    assert torch.equal(one[:32], two[:32])
    assert torch.equal(one[64:], two[64:])
    whole = dequantize(quantize(other[:].clone(), "int8", block_size=128))
    assert (whole[:32] == 0).all()  # of one scale for all


@every_format
def test_rows_do_not_know_of_each_other(format: str) -> None:
    x = torch.randn(3, 2, 37)
    whole = quantize(x, format, **options(format))
    alone = quantize(x[1, 1], format, **options(format))
    assert torch.equal(whole.codes[1, 1], alone.codes)
    assert torch.equal(whole.scales[1, 1], alone.scales)
    assert whole.shape == x.shape


@every_format
@pytest.mark.parametrize("seed", [None, 1])
def test_zeros_are_zeros(format: str, seed: int | None) -> None:
    x = torch.zeros(2, 70)
    x[1, 5] = 3.0
    found = dequantize(quantize(x, format, **options(format, seed=seed)))
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[1, 32:], x[1, 32:])


@every_format
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_makes_its_block_nan(format: str, wrong: float, symmetric: bool) -> None:
    if not symmetric and format not in INTEGERS:
        return
    x = torch.randn(100)
    x[40] = wrong
    found = quantize(x, format, **options(format, symmetric=symmetric, seed=1))
    read = dequantize(found)
    assert read[32:64].isnan().all()
    assert not unpacked(found)[32:64].any()
    assert read[:32].isfinite().all()
    assert read[64:].isfinite().all()


@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37, 1e38])
def test_very_small_and_large_blocks(format: str, size: float) -> None:
    x = size * torch.linspace(-1, 1, 33)
    found = quantize(x, format, block_size=64)
    assert found.scales.item() >= 2.0**-126
    assert ((dequantize(found).double() - x).abs() <= steps(x, found) * 0.50001).all()


@every_format
def test_random_rounding_has_the_numbers_as_its_mean(format: str) -> None:
    x = torch.randn(256)
    if format.startswith("mx"):  # nothing saturates
        x[::32] = 1.2 * 2.0 ** x.view(-1, 32).abs().amax(1).log2().ceil()
    rounds = 500
    settings = options(format)
    found = quantize(x.expand(rounds, -1).contiguous(), format, **settings, seed=3)
    read = dequantize(found).double()
    unit = steps(x, found._replace(scales=found.scales[0]))
    assert ((read - x).abs() < unit * 1.001).all()
    share = x / unit - (x / unit).floor()
    variance = unit.square() * share * (1 - share) / rounds
    apart = read.mean(0) - x
    assert apart.sum().abs() <= 4 * variance.sum().sqrt()
    often = (share > 0.05) & (share < 0.95)
    assert (apart.abs() <= 5 * variance.sqrt())[often].all()  # 256 of them are looked at


@pytest.mark.parametrize("symmetric", [True, False])
def test_random_rounding_keeps_to_the_codes_there_are(symmetric: bool) -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(5000)
    read = dequantize(quantize(x, "int4", symmetric=symmetric, seed=2))
    torch.testing.assert_close(read, x)


def test_random_rounding_can_be_repeated_and_depends_on_seed_step_and_stream() -> None:
    x = torch.randn(1000)
    codes = [
        quantize(x, "int4", seed=seed, step=step, stream=stream).codes
        for seed, step, stream in [(1, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    ]
    assert torch.equal(codes[0], codes[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(codes[1:], 2))


def test_an_error_that_is_fed_back_does_not_add_up() -> None:
    x = torch.randn(64) + 0.05
    plain, fed, error = torch.zeros(64), torch.zeros(64), torch.zeros(64)
    for _ in range(50):
        plain += dequantize(quantize(x, "int4"))
        sent = dequantize(quantize(x + error, "int4"))
        error = x + error - sent
        fed += sent
    step = quantize(x, "int4").scales.item()
    assert (fed - 50 * x).abs().max() <= step
    assert (plain - 50 * x).abs().max() > 10 * step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_widened(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    found = quantize(x, "int8")
    assert found.scales.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found.codes, quantize(x.float(), "int8").codes)


def test_memory_order_does_not_matter() -> None:
    x = torch.randn(37, 33).T
    assert torch.equal(quantize(x, "int8").codes, quantize(x.contiguous(), "int8").codes)
    found = quantize(x, "int4", block_size=16)
    turned = found._replace(codes=found.codes.T.contiguous().T, scales=found.scales.mT.mT)
    assert torch.equal(dequantize(turned), dequantize(found))


@pytest.mark.parametrize("size", [0, 8, 24, 8192])
def test_block_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="power of two from 16 to 4096"):
        quantize(torch.randn(64), "int8", block_size=size)


@pytest.mark.parametrize(
    ("x", "settings", "error"),
    [
        (torch.ones(4), {"format": "int5"}, ValueError),
        (torch.ones(4), {"format": "mxint8", "block_size": 64}, ValueError),
        (torch.ones(4), {"format": "fp8_e4m3", "symmetric": False}, ValueError),
        (torch.ones(4), {"format": "mxint8", "symmetric": False}, ValueError),
        (torch.ones(4), {"format": "int8", "seed": -1}, ValueError),
        (torch.tensor(1.0), {"format": "int8"}, ValueError),
        (torch.ones(4, dtype=torch.int64), {"format": "int8"}, TypeError),
    ],
    ids=str,
)
def test_what_is_refused(x: Tensor, settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        quantize(x, **settings)


def test_codes_that_do_not_fit_their_scales_are_refused() -> None:
    found = quantize(torch.randn(3, 100), "int4", block_size=32)
    with pytest.raises(ValueError, match=r"codes are .* \(3, 50\)"):
        dequantize(found._replace(codes=found.codes[:, 1:]))
    with pytest.raises(ValueError, match=r"scales have shape .* \(3, 4\)"):
        dequantize(found._replace(scales=found.scales[1:]))
    with pytest.raises(ValueError, match=r"codes are torch\.int8"):
        dequantize(found._replace(codes=found.codes.view(torch.int8)))


def test_scales_on_another_device_are_refused() -> None:
    found = quantize(torch.randn(3, 100), "int8", symmetric=False)
    assert found.shifts is not None
    with pytest.raises(ValueError, match=r"scales are on meta, codes on cpu"):
        dequantize(found._replace(scales=found.scales.to("meta")))
    with pytest.raises(ValueError, match=r"shifts are on meta, codes on cpu"):
        dequantize(found._replace(shifts=found.shifts.to("meta")))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_a_dtype_that_does_not_hold_the_numbers_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="must be a real floating dtype"):
        dequantize(quantize(torch.randn(20), "int8"), dtype=dtype)


def test_a_block_size_is_an_integer() -> None:
    with pytest.raises(TypeError, match=r"block_size=64\.0 is not allowed; give an integer"):
        quantize(torch.randn(100), "int8", block_size=64.0)


# TorchInductor drops a short last block where it takes a division by the block size for a loop.
@pytest.mark.parametrize(
    ("format", "length", "settings"),
    [
        ("int8", 100, {"block_size": 16}),
        ("int4", 37, {"block_size": 16, "symmetric": False}),
        ("mxfp8_e4m3", 77, {}),
    ],
)
# Inductor imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_compiled_for_a_cpu_a_short_last_block_is_there(
    format: str, length: int, settings: dict[str, Any]
) -> None:
    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        found = quantize(x, format, **settings)
        return found.codes, dequantize(found)

    x = torch.randn(5, length)
    expected = there_and_back(x)
    codes, numbers = torch.compile(there_and_back, fullgraph=True, dynamic=False)(x)
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(numbers, expected[1])


# Inductor imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_compiled_for_a_cpu_codes_of_a_short_last_block_are_read() -> None:
    found = quantize(torch.randn(5, 1000), "int8")
    compiled = torch.compile(dequantize, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(found), dequantize(found))


@pytest.mark.parametrize("format", ["int4", "fp8_e4m3", "mxfp6_e3m2"])
def test_it_compiles_whole(format: str) -> None:
    def there_and_back(x: Tensor) -> Tensor:
        return dequantize(quantize(x, format, seed=1))

    x = torch.randn(3, 70)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), there_and_back(x))
