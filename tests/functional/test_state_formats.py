from __future__ import annotations

import math

import pytest
import torch
from harness import assert_accurate
from harness.functional_parts import STATE_FORMATS, code_book, dynamic_map, nearest_codes
from torch import Tensor

from lightning_ext.functional import (
    QuantizedState,
    adamw_update,
    decode_state,
    encode_state,
    export_state,
    import_state,
    state_bytes,
    zero_state,
)

INT4 = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
BOOKS = [(8, True), (8, False), (4, True)]
KINDS = [(format, s) for format in ("int8", "int4", "fp8") for s in (True, False)]
SHAPES = [(), (1,), (129,), (17, 33), (4, 3, 3, 3), (1, 300), (300, 1), (0, 3), (3, 70_000)]
every_book = pytest.mark.parametrize(("bits", "signed"), BOOKS)
every_kind = pytest.mark.parametrize(("format", "signed"), KINDS)


def _moment(shape: tuple[int, ...], signed: bool) -> Tensor:
    x = torch.randn(shape)
    return x if signed else x.square()


def _read(x: Tensor, format: str, signed: bool = True) -> Tensor:
    return decode_state(encode_state(x, format, signed=signed))


def test_the_map_of_four_bits_is_the_known_one() -> None:
    expected = [*(-x for x in reversed(INT4)), 0, *INT4, 1]
    assert dynamic_map(4, True) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("signed", "least", "next_to_1"), [(True, 0.55, 0.45), (False, 0.325, 0.225)]
)
def test_the_maps_of_eight_bits_reach_over_seven_decades(
    signed: bool, least: float, next_to_1: float
) -> None:
    numbers = dynamic_map(8, signed)
    positive = [x for x in numbers if x > 0]
    assert len(set(numbers)) == 256
    assert positive[0] == pytest.approx(least * 1e-6)
    assert positive[-2] == pytest.approx(1 - next_to_1 / 64)
    assert sum(0.1 < x < 1 for x in positive) == (64 if signed else 128)


@every_book
def test_a_look_up_and_a_comparison_find_the_nearest_number(bits: int, signed: bool) -> None:
    book = code_book(bits, signed, torch.device("cpu"))
    steps = torch.tensor([-math.inf, math.inf])
    near = [torch.nextafter(book.middles, to.expand_as(book.middles)) for to in steps]
    sizes = torch.logspace(-9, 0, 20_000)
    x = torch.cat([book.middles, *near, sizes, -sizes, torch.tensor([0.0, -0.0, 1.0000001])])
    codes = nearest_codes(x, bits, signed)
    assert torch.equal(codes, torch.bucketize(x, book.middles).to(torch.uint8))
    apart = (x[:, None] - book.values).abs()
    torch.testing.assert_close(apart.gather(1, codes[:, None].long())[:, 0], apart.amin(1))


@every_book
def test_ties_go_to_the_lower_code(bits: int, signed: bool) -> None:
    middles = code_book(bits, signed, torch.device("cpu")).middles
    assert nearest_codes(middles, bits, signed).tolist() == list(range(len(middles)))


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_has_the_shape_of_its_tensor(
    shape: tuple[int, ...], format: str, signed: bool
) -> None:
    x = _moment(shape, signed)
    state = encode_state(x, format, signed=signed)
    assert (state.shape, state.format, state.signed) == (shape, format, signed)
    assert decode_state(state).shape == shape
    assert decode_state(state).dtype == torch.float32
    assert (decode_state(state) - x).abs().max() < 0.12 * x.abs().max() if x.numel() else True


@every_kind
@pytest.mark.parametrize("value", [1.0, 3e-38, 1e-20, 2e38])
def test_one_value_is_kept(value: float, format: str, signed: bool) -> None:
    x = torch.full((3, 50), value)
    torch.testing.assert_close(_read(x, format, signed), x, rtol=1e-6, atol=0.0)


@every_kind
def test_numbers_that_are_not_normal_count_as_zeros(format: str, signed: bool) -> None:
    x = torch.full((3, 50), 1e-40)
    state = encode_state(x, format, signed=signed)
    assert (decode_state(state) == 0).all()
    assert all(
        torch.equal(*pair)
        for pair in zip(state[:2], zero_state((3, 50), format, signed=signed)[:2], strict=True)
    )


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, format: str, signed: bool) -> None:
    x = _moment((300, 300), signed)
    x[100, 7] = bad
    read = _read(x, format, signed)
    assert not read[100, 7].isfinite()
    assert read[200].isfinite().all()


def test_bfloat16_is_rounded_at_random_without_a_bias() -> None:
    x = torch.tensor([1.0 + 2**-10, -3e-5, 1e-30])
    copies = x.expand(40_000, 3).contiguous()
    read = decode_state(encode_state(copies, "bfloat16", seed=1, step=2, stream=3)).double()
    standard_error = read.std(0) / 200
    assert ((read.mean(0) - x).abs() <= 4 * standard_error).all()
    assert (read.std(0) > 0).all()
    again = decode_state(encode_state(copies, "bfloat16", seed=1, step=2, stream=3))
    other = decode_state(encode_state(copies, "bfloat16", seed=1, step=3, stream=3))
    assert torch.equal(again.double(), read)
    assert not torch.equal(other.double(), read)


@every_kind
def test_parts_that_are_worked_on_one_after_the_other_do_not_show(
    format: str, signed: bool
) -> None:
    x = _moment((80_000, 3), signed)
    state = encode_state(x, format, signed=signed)
    whole = encode_state(x.double(), format, signed=signed)  # without a look-up
    assert (state.codes != whole.codes).double().mean() <= 1e-4
    assert_accurate(decode_state(state), decode_state(whole._replace(codes=state.codes)))


@pytest.mark.parametrize(
    ("format", "signed", "expected"),
    [
        ("float32", True, 4),
        ("bfloat16", True, 2),
        ("int8", True, 1 + 4 / 256),
        ("int8", False, 1 + 4 / 256),
        ("int4", True, 0.5 + 4 / 128),
        ("int4", False, 0.5 + 4 * (512 + 768) / (512 * 768)),
        ("fp8", True, 1 + 8 / 128),
    ],
)
def test_bytes_of_a_parameter(format: str, signed: bool, expected: float) -> None:
    shape = (512, 768)
    for state in (
        encode_state(torch.rand(shape), format, signed=signed),
        zero_state(shape, format, signed=signed),
    ):
        assert state_bytes(state) / math.prod(shape) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("format", STATE_FORMATS)
def test_a_state_can_be_written_to(format: str) -> None:
    x, out = torch.randn(5, 60), zero_state((5, 60), format)
    pointers = [y.data_ptr() for y in out[:2]]
    assert encode_state(x, format, seed=4, out=out) is out
    made = encode_state(x, format, seed=4)
    assert [y.data_ptr() for y in out[:2]] == pointers
    assert all(torch.equal(*pair) for pair in zip(out[:2], made[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_widened_first(dtype: torch.dtype) -> None:
    x = torch.randn(300).to(dtype)
    assert torch.equal(_read(x, "int8"), _read(x.float(), "int8"))


def test_the_order_of_memory_does_not_matter() -> None:
    x = torch.randn(40, 30)
    state = encode_state(x.t(), "int4")
    assert torch.equal(state.codes, encode_state(x.t().contiguous(), "int4").codes)


@pytest.mark.parametrize(("format", "ratio"), [("int8", 1.1), ("fp8", 1.1), ("int4", 1.8)])
def test_adamw_with_states_in_fewer_bits_comes_about_as_far(format: str, ratio: float) -> None:
    target = torch.randn(32, 48)
    distances = []
    for formats in (("float32", "float32"), (format, format)):
        w = torch.zeros_like(target)
        m, v = (
            zero_state(w.shape, f, signed=s) for f, s in zip(formats, (True, False), strict=True)
        )
        for t in range(1, 101):
            noisy = w - target + 0.3 * torch.randn_like(w)
            moved = adamw_update(
                w, noisy, decode_state(m), decode_state(v), t, lr=0.05, weight_decay=0.0
            )
            w = moved[0]
            encode_state(moved[1], m.format, out=m)
            encode_state(moved[2], v.format, signed=False, out=v)
        distances.append((w - target).norm().item())
    assert distances[1] <= ratio * distances[0] < 0.2 * target.norm()


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'nf4' is not allowed; choose one of .*'fp8'"):
        encode_state(torch.zeros(3), "nf4")
    with pytest.raises(ValueError, match="is not allowed"):
        zero_state((3,), "int2")


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        encode_state(torch.zeros(3, dtype=torch.int64), "int8")


@pytest.mark.parametrize("out", [("int4", (3,), True), ("int8", (4,), True), ("int8", (3,), False)])
def test_a_state_that_does_not_fit_is_refused(out: tuple[str, tuple[int, ...], bool]) -> None:
    format, shape, signed = out
    with pytest.raises(ValueError, match=r"wanted int8 of shape \(3,\) with signed=True"):
        encode_state(torch.zeros(3), "int8", out=zero_state(shape, format, signed=signed))


def test_scales_that_do_not_belong_to_codes_are_refused() -> None:
    saved = export_state(encode_state(torch.randn(300), "int8"))
    with pytest.raises(ValueError, match=r"are no int8 state .* which has \(300,\) and \(2,\)"):
        import_state({**saved, "scales": torch.ones(3)})


def test_codes_of_another_format_are_refused() -> None:
    state = zero_state((300,), "int8")
    with pytest.raises(ValueError, match=r"which has \(150,\) and \(3,\)"):
        decode_state(state._replace(format="int4"))
    with pytest.raises(TypeError, match=r"has torch\.uint8 and torch\.float32"):
        decode_state(state._replace(codes=state.codes.char()))
    with pytest.raises(TypeError, match=r"scales in torch\.float16"):
        decode_state(state._replace(scales=state.scales.half()))


def test_a_state_is_made_of_tensors_and_plain_values() -> None:
    state = zero_state((2, 3), "int4")
    assert isinstance(state, QuantizedState)
    assert [type(x) for x in state] == [Tensor, Tensor, str, tuple, bool, type(None)]


@pytest.mark.parametrize(
    ("format", "signed"), [("int8", True), ("int4", True), ("int4", False), ("fp8", True)]
)
# Inductor imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_compiled_for_a_cpu_a_short_last_block_is_there(format: str, signed: bool) -> None:
    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        state = encode_state(x, format, signed=signed)
        return state.codes, decode_state(state)

    x = _moment((37, 13), signed)
    expected = there_and_back(x)
    codes, numbers = torch.compile(there_and_back, fullgraph=True, dynamic=False)(x)
    assert codes.ne(expected[0]).sum() <= 1
    torch.testing.assert_close(numbers, expected[1], rtol=0.1, atol=1e-3)


def test_another_device_is_refused() -> None:
    state = encode_state(torch.randn(300), "int8")
    with pytest.raises(ValueError, match="codes are on cpu, scales on meta"):
        decode_state(state._replace(scales=state.scales.to("meta")))
    with pytest.raises(ValueError, match="out is on meta, x on cpu"):
        encode_state(torch.randn(300), "int8", out=zero_state((300,), "int8", device="meta"))


@pytest.mark.parametrize(("format", "least"), [("int8", 0.0), ("int4", 1 / 16)])
def test_without_a_sign_negative_entries_become_the_least_number(format: str, least: float) -> None:
    assert _read(torch.tensor([-1.0, 2.0]), format, signed=False)[0] == least
