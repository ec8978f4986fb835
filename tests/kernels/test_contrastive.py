"""What is peculiar to the contrastive kernels: stability, strips, blocks of a ring, errors."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_accurate, launches
from torch import Tensor
from torch.nn import functional as F

from lightning_ext import functional, kernels
from lightning_ext.kernels._triton._contrastive import _products as products
from lightning_ext.kernels._triton._contrastive import _tiles as tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Loss, Loss, tuple[float, ...]]] = {
    "clip": (kernels.clip_loss, functional.clip_loss, (10.0,)),
    "info_nce": (kernels.info_nce_loss, functional.info_nce_loss, (10.0,)),
    "nt_xent": (kernels.nt_xent_loss, functional.nt_xent_loss, (10.0,)),
    "siglip": (kernels.siglip_loss, functional.siglip_loss, (10.0, -3.0)),
}


def _units(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def _value_and_gradients(
    loss: Loss,
    x: Tensor,
    y: Tensor,
    numbers: tuple[float, ...],
    dtype: torch.dtype,
    **given: object,
) -> list[Tensor]:
    pair = [v.to(DEVICE, dtype, copy=True).requires_grad_() for v in (x, y)]
    wide = torch.promote_types(dtype, torch.float32)
    scalars = [torch.tensor(v, dtype=wide, device=DEVICE, requires_grad=True) for v in numbers]
    value = loss(*pair, *scalars, **given)
    return [value.detach(), *torch.autograd.grad(value, [*pair, *scalars])]


def _assert_as_exact_as_torch(name: str, x: Tensor, y: Tensor, numbers: tuple[float, ...]) -> None:
    ours, plain, _ = LOSSES[name]
    x, y = x.float(), y.float()
    truth = _value_and_gradients(plain, x, y, numbers, torch.float64)
    own = _value_and_gradients(plain, x, y, numbers, torch.float32)
    found = _value_and_gradients(ours, x, y, numbers, torch.float32, fused=True)
    for f, t, o in zip(found, truth, own, strict=True):
        assert f.isfinite().all()
        assert_accurate(f, t, torch_out=o)


@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_row_at_a_low_temperature_keeps_its_denominator(name: str) -> None:
    # At 1/T = 100 a fixed maximum of 100 leaves exp(10 - 100) of a best cosine of 0.1.
    x, y = _units(40, 16), _units(40, 16)
    x[3] = 0.1 * y[3] / (y @ y[3]).max()
    _assert_as_exact_as_torch(name, x, y, (100.0, *LOSSES[name][2][1:]))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_columns_of_a_tile_may_be_far_apart(name: str) -> None:
    # Logits from about 1 to 2,500: one exponent for the tile would lose most rows and columns.
    x, y = _units(40, 8), _units(40, 8)
    x *= torch.logspace(-3, 0, 40, dtype=torch.float64)[:, None]
    y *= torch.logspace(0, -2, 40, dtype=torch.float64)[:, None]
    _assert_as_exact_as_torch(name, x, y, (2500.0, *LOSSES[name][2][1:]))


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_the_scale_may_be_anything(scale: float) -> None:
    _assert_as_exact_as_torch("clip", _units(20, 16), _units(20, 16), (scale,))


@pytest.mark.parametrize("bias", [-40.0, 40.0])
def test_a_sigmoid_loss_keeps_what_is_small(bias: float) -> None:
    _assert_as_exact_as_torch("siglip", _units(20, 16), _units(20, 16), (10.0, bias))


def test_the_gradients_of_a_mean_over_a_large_batch_survive_float16() -> None:
    x, y = _units(30, 16), _units(30, 16)
    x, y = x.half(), y.half()
    weight = 1e-7  # a mean over ten million rows
    given = (torch.tensor(10.0), *(torch.zeros(30) for _ in range(2)))
    scale, rows, columns = (v.to(DEVICE) for v in given)
    by_row = torch.full((30,), weight, device=DEVICE)
    x, y = x.to(DEVICE), y.to(DEVICE)
    sums = kernels.block_logsumexp(x, y, scale, fused=True)
    rows, columns = sums.rows, sums.columns
    vectors = (rows, columns, by_row, by_row, -2 * by_row)
    found = kernels.block_logsumexp_grads(x, y, scale, *vectors, fused=True)
    exact = (v.double() for v in (x, y, scale, *vectors))
    truth = functional.block_logsumexp_grads(*exact)
    assert_accurate((found[0] / weight).half(), truth[0] / weight)


@pytest.mark.parametrize("name", LOSSES)
def test_strips_and_splits_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _units(200, 16), _units(200, 16)
    with launches() as whole:
        _assert_as_exact_as_torch(name, x, y, LOSSES[name][2])
    monkeypatch.setattr(tiles, "_PARTIAL_BYTES", 1)
    monkeypatch.setattr(products, "_STAGED_BYTES", 1)
    monkeypatch.setattr(products, "_STEPS", 3)
    with launches() as found:
        _assert_as_exact_as_torch(name, x, y, LOSSES[name][2])
    blocks = -(-(400 if name == "nt_xent" else 200) // 64)
    each = 1 if name == "nt_xent" else 2
    assert whole.count("_product_kernel") == each
    assert found.count("_product_kernel") == each * blocks


def test_a_strip_of_gradients_is_small_at_any_batch() -> None:
    for batch, rows in ((65_536, 2048), (131_072, 1024), (4_194_304, 128)):
        x = torch.empty(1, 512, dtype=torch.bfloat16).expand(batch, 512)
        found = tiles.pair(x, x)
        assert products.staged_rows(found) == rows // found.blocks.rows * found.blocks.rows
        strips = list(tiles.partial_strips(found))
        assert strips[0][1] * found.tiles(1)[1] * 8 <= 32 << 20
        assert strips[-1][1] == batch


@pytest.mark.parametrize("name", LOSSES)
def test_results_are_bitwise_the_same_again(name: str) -> None:
    ours, _, numbers = LOSSES[name]
    x, y = _units(70, 20), _units(70, 20)
    first, second = (
        _value_and_gradients(ours, x, y, numbers, torch.float32, fused=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_both_directions_come_out_of_one_pass() -> None:
    x = _units(30, 16).float().to(DEVICE).requires_grad_()
    with launches() as forward:
        loss = kernels.clip_loss(x, x.detach(), 3.0, fused=True)
    assert forward == ["_partial_kernel", "_merge_kernel", "_merge_kernel"]
    with launches() as backward:
        loss.backward()
    assert backward == ["_gradient_kernel", "_product_kernel"]  # y asks for nothing


def test_blocks_of_a_ring_are_the_whole() -> None:
    x, y = (_units(48, 12).float().to(DEVICE) for _ in range(2))
    scale = torch.tensor(8.0, device=DEVICE)
    whole = functional.block_logsumexp(x.double(), y.double(), scale.double())
    rows = torch.full((48,), -torch.inf, device=DEVICE)
    positives, columns = torch.zeros(48, device=DEVICE), []
    own = torch.arange(48, device=DEVICE)
    for start in (0, 16, 32):
        block = kernels.block_logsumexp(
            x, y[start : start + 16], scale, labels=own - start, fused=True
        )
        rows = functional.merge_logsumexp(rows, block.rows)
        positives += block.positives
        columns.append(block.columns)
    assert_accurate(rows.float(), whole.rows)
    assert_accurate(torch.cat(columns).float(), whole.columns)
    assert_accurate(positives.float(), whole.positives)


def test_gradients_of_blocks_add_up() -> None:
    x, y = (_units(48, 12).float().to(DEVICE) for _ in range(2))
    scale = torch.tensor(8.0, device=DEVICE)
    own = torch.arange(48, device=DEVICE)
    sums = functional.block_logsumexp(x, y, scale)
    by_row, by_column, by_positive = (torch.rand(48, device=DEVICE) for _ in range(3))
    vectors = (sums.rows, sums.columns, by_row, by_column, by_positive)
    exact = [v.double() for v in (x, y, scale, *vectors)]
    truth = functional.block_logsumexp_grads(*exact)
    dx, ds, dy = torch.zeros_like(x), torch.zeros((), device=DEVICE), []
    for start in (0, 16, 32):
        here = slice(start, start + 16)
        vectors = (sums.rows, sums.columns[here], by_row, by_column[here], by_positive)
        found = kernels.block_logsumexp_grads(
            x, y[here], scale, *vectors, labels=own - start, fused=True
        )
        dx, ds = dx + found[0], ds + found[2]
        dy.append(found[1])
    assert_accurate(dx, truth[0])
    assert_accurate(torch.cat(dy), truth[1])
    assert_accurate(ds.float(), truth[2])


def test_a_row_of_which_all_is_excluded_has_no_gradient() -> None:
    x = _units(20, 16).float().to(DEVICE).requires_grad_()
    excluded = torch.zeros(20, 20, dtype=torch.bool, device=DEVICE)
    excluded[4] = True
    found = kernels.block_logsumexp(x, x.detach(), 3.0, excluded=excluded, fused=True)
    assert found.rows[4] == -torch.inf
    (gradient,) = torch.autograd.grad(found.rows[:4].sum() + found.rows[5:].sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[4].any()


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory is 8 GiB of untouched pages of the host")
def test_rows_may_lie_more_than_two_to_the_31_entries_apart() -> None:
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (2**31 + 64)), dtype=torch.float32)  # untouched
    x = memory.as_strided((2, 16), (2**31, 1))
    x.copy_(_units(2, 16))
    assert_accurate(
        kernels.clip_loss(x, x, 3.0, fused=True), functional.clip_loss(x.double(), x.double(), 3.0)
    )


def test_tf32_is_taken_where_torch_takes_it() -> None:
    x = torch.randn(8, 64)
    assert tiles.pair(x, x).settings["PRECISION"] == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert tiles.pair(x, x).settings["PRECISION"] == "tf32"
        assert tiles.pair(x.half(), x.half()).settings["PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_aligned_rows_are_not_copied_and_others_are_padded() -> None:
    x = torch.randn(8, 128)
    assert tiles.pair(x, x[:, :64]).x is x
    found = tiles.pair(x[:, 1:34], x[:, 1:34])
    assert found.width == 33
    assert found.x.data_ptr() % 16 == 0
    assert found.x.shape[1] % found.blocks.depth == 0
    assert torch.equal(found.x[:, :33], x[:, 1:34])
    assert not found.x[:, 33:].any()


def test_a_second_derivative_is_refused() -> None:
    x = _units(5, 16).float().to(DEVICE).requires_grad_()
    for loss, _, numbers in LOSSES.values():
        value = loss(x, x.detach(), *numbers, fused=True)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            gradient.sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_double_precision_is_not_for_the_kernel(name: str) -> None:
    ours, plain, numbers = LOSSES[name]
    x, y = _units(5, 4).to(DEVICE), _units(5, 4).to(DEVICE)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        ours(x, y, *numbers, fused=True)
    torch.testing.assert_close(ours(x, y, *numbers), plain(x, y, *numbers))


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_fit_is_refused_before_any_launch(name: str, fused: bool | None) -> None:
    ours, _, numbers = LOSSES[name]
    x = torch.randn(5, 4, device=DEVICE)
    with launches() as found:
        with pytest.raises(ValueError, match="width"):
            ours(x, torch.randn(5, 6, device=DEVICE), *numbers, fused=fused)
        with pytest.raises(ValueError, match="width"):
            ours(x[0], x[0], *numbers, fused=fused)
        with pytest.raises(TypeError, match="one floating-point dtype"):
            ours(x, x.half(), *numbers, fused=fused)
        with pytest.raises(ValueError, match="'median'"):
            ours(x, x, *numbers, reduction="median", fused=fused)
        with pytest.raises(ValueError, match="number or a floating-point tensor"):
            ours(x, x, torch.ones(2, device=DEVICE), *numbers[1:], fused=fused)
    assert found == []


@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_two_sides_have_equally_many_rows(name: str) -> None:
    x = torch.randn(5, 4, device=DEVICE)
    with pytest.raises(ValueError, match="must be equal"):
        LOSSES[name][0](x, x[:3], 1.0, fused=True)


def test_wrong_labels_and_masks_are_refused() -> None:
    x = torch.randn(5, 4, device=DEVICE)
    with pytest.raises(ValueError, match="give labels"):
        kernels.info_nce_loss(x, x[:3], 1.0, fused=True)
    with pytest.raises(TypeError, match="labels"):
        kernels.info_nce_loss(x, x, 1.0, labels=x[:, 0], fused=True)
    with pytest.raises(ValueError, match="broadcast"):
        kernels.info_nce_loss(
            x, x, 1.0, excluded=torch.ones(3, dtype=torch.bool, device=DEVICE), fused=True
        )
    with pytest.raises(TypeError, match="excluded"):
        kernels.info_nce_loss(x, x, 1.0, excluded=torch.ones(5, 5, device=DEVICE), fused=True)


def test_a_label_out_of_range_is_nan_as_in_functional() -> None:
    x = torch.randn(3, 4, device=DEVICE)
    labels = torch.tensor([0, 7, -1], device=DEVICE)
    given: dict[str, Any] = {"labels": labels, "reduction": "none"}
    found = kernels.info_nce_loss(x, x, 1.0, **given, fused=True)
    torch.testing.assert_close(found, functional.info_nce_loss(x, x, 1.0, **given), equal_nan=True)
    assert found.isnan().tolist() == [False, True, True]


def test_sums_on_another_device_are_refused() -> None:
    x = torch.randn(5, 4, device=DEVICE)
    rows, meta = x[:, 0], torch.empty(5, device="meta")
    with launches() as found:
        with pytest.raises(TypeError, match="rows is on meta"):
            kernels.block_logsumexp_grads(x, x, 1.0, meta, None, rows, None, rows, fused=True)
        with pytest.raises(TypeError, match="grad_rows is on meta"):
            kernels.siglip_grads(x, x, 1.0, 0.0, meta, fused=True)
    assert found == []
