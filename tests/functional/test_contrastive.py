"""Contrastive losses by tiles: dense formulas in float64, extreme logits, blocks in a ring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from harness import assert_accurate
from harness.functional_parts import contrastive_tiles
from torch import Tensor
from torch.nn import functional as F

from lightning_ext.functional import (
    block_logsumexp,
    block_logsumexp_grads,
    clip_loss,
    info_nce_loss,
    merge_logsumexp,
    nt_xent_loss,
    siglip_grads,
    siglip_loss,
)

Loss = Callable[..., Tensor]


def dense_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    z, own = scale * (x @ y.T), torch.arange(len(x))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def dense_info_nce(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * (q @ k.T), torch.arange(len(q)))


def dense_nt_xent(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    views = torch.cat([a, b])
    z = (scale * (views @ views.T)).fill_diagonal_(-math.inf)
    return F.cross_entropy(z, torch.arange(len(views)).roll(len(a)))


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = scale * (x @ y.T) + bias
    return -F.logsigmoid(z * (2 * torch.eye(*z.shape, dtype=z.dtype) - 1)).sum(1).mean()


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "clip": (clip_loss, dense_clip),
    "info_nce": (info_nce_loss, dense_info_nce),
    "nt_xent": (nt_xent_loss, dense_nt_xent),
    "siglip": (siglip_loss, dense_siglip),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def arguments(name: str, scale: float = 7.0, rows: int = 13, width: int = 6) -> list[Tensor]:
    """Normalised pairs that resemble each other, scale, and bias where there is one, in float64."""
    x = torch.randn(rows, width, dtype=torch.float64)
    y = x + torch.randn(rows, width, dtype=torch.float64)
    found = [F.normalize(x), F.normalize(y), torch.tensor(scale).double()]
    return [*found, torch.tensor(-2.0).double()] if name == "siglip" else found


def value_and_grads(loss: Loss, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


TRACING = "ignore:.* should not be instantiated:DeprecationWarning"  # torch's own, of Functions


@pytest.fixture(params=[5, 1024], ids=["many tiles", "one tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(contrastive_tiles, "CPU_TILE", request.param)
    return int(request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("scale", [7.0, 50.0])  # with one exponential of a tile, and with two
@every_loss
def test_it_is_the_dense_formula(name: str, scale: float) -> None:
    inputs, (loss, dense) = arguments(name, scale), LOSSES[name]
    torch.testing.assert_close(value_and_grads(loss, inputs), value_and_grads(dense, inputs))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 11])
@every_loss
def test_any_batch_is_right(name: str, rows: int) -> None:
    inputs, (loss, dense) = arguments(name, rows=rows), LOSSES[name]
    torch.testing.assert_close(value_and_grads(loss, inputs), value_and_grads(dense, inputs))


@pytest.mark.parametrize("width", [1, 3, 300])
@every_loss
def test_any_width_is_right(name: str, width: int) -> None:
    inputs, (loss, dense) = arguments(name, width=width), LOSSES[name]
    torch.testing.assert_close(value_and_grads(loss, inputs), value_and_grads(dense, inputs))


@every_loss
def test_finite_differences_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_tiles, "CPU_TILE", 3)
    inputs = [x.requires_grad_() for x in arguments(name, rows=4, width=3)]
    assert torch.autograd.gradcheck(LOSSES[name][0], inputs)
    unreduced = [x.requires_grad_() for x in arguments(name, rows=4, width=3)]
    assert torch.autograd.gradcheck(lambda *x: LOSSES[name][0](*x, reduction="none"), unreduced)


@every_loss
def test_reductions_are_of_the_same_losses(name: str) -> None:
    inputs, loss = arguments(name), LOSSES[name][0]
    losses = loss(*inputs, reduction="none")
    assert losses.shape == (26 if name == "nt_xent" else 13,)
    torch.testing.assert_close(loss(*inputs, reduction="sum"), losses.sum())
    torch.testing.assert_close(loss(*inputs), losses.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@every_loss
def test_of_rounded_inputs_the_loss_is_that_of_float64(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    pair, scalars = arguments(name, scale, rows=300, width=64)[:2], arguments(name, scale)[2:]
    rounded = [x.to(dtype) for x in pair]
    got = value_and_grads(LOSSES[name][0], [*rounded, *(x.float() for x in scalars)])
    exact = value_and_grads(LOSSES[name][1], [*(x.double() for x in rounded), *scalars])
    theirs = value_and_grads(
        LOSSES[name][1], [*(x.float() for x in rounded), *(x.float() for x in scalars)]
    )
    assert got[0].dtype == torch.float32
    assert [x.dtype for x in got[1:3]] == [dtype, dtype]
    for ours, reference, truth in zip(got, theirs, exact, strict=True):
        assert_accurate(ours, truth, torch_out=reference.to(ours.dtype))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("scale", [1e4, 100.0])
@every_loss
def test_extreme_logits_are_right_in_float32(name: str, scale: float) -> None:
    pair, scalars = arguments(name, scale)[:2], arguments(name, scale)[2:]
    pair[1][:6] *= -1  # positives at −scale and at scale
    rounded = [x.float() for x in (*pair, *scalars)]
    exact = value_and_grads(LOSSES[name][1], [x.double() for x in rounded])
    theirs = value_and_grads(LOSSES[name][1], rounded)
    for ours, reference, truth in zip(
        value_and_grads(LOSSES[name][0], rounded), theirs, exact, strict=True
    ):
        assert_accurate(ours, truth, torch_out=reference)


@pytest.mark.usefixtures("tile")
def test_a_row_whose_best_cosine_is_low_keeps_its_sum() -> None:
    # At scale 100 its logits lie 90 below those of all other rows: a maximum that they share, or
    # the largest that is possible, leaves a denominator of 1e-39.
    basis = torch.eye(16)
    image, text = basis.clone(), basis[:, :].clone()
    image[3] = 0.1 * basis[3] + 0.99**0.5 * basis[15]
    text[15], image[15] = basis[14], basis[14]
    inputs = [image, text, torch.tensor(100.0)]
    exact = value_and_grads(dense_clip, [x.double() for x in inputs])
    for ours, truth in zip(value_and_grads(clip_loss, inputs), exact, strict=True):
        assert_accurate(ours, truth)
    rows = block_logsumexp(*inputs).rows
    torch.testing.assert_close(rows, (100 * image.double() @ text.double().T).logsumexp(1))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent"])
def test_a_loss_far_below_the_logits_is_not_lost(name: str) -> None:
    # Positives 30 above all else: 1 + e⁻³⁰ is 1 in float32, and what comes of it is noise.
    pair = [torch.eye(16)[:9] * math.sqrt(30), torch.eye(16)[:9] * math.sqrt(30)]
    pair[1] += 1e-3 * torch.randn(9, 16)
    inputs = [*pair, torch.tensor(1.0)]
    exact = value_and_grads(LOSSES[name][1], [x.double() for x in inputs])
    assert 0 < exact[0] < 1e-11
    for ours, truth in zip(value_and_grads(LOSSES[name][0], inputs), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-14)


@every_loss
def test_a_nan_spreads(name: str) -> None:
    inputs = [x.float() for x in arguments(name)]
    inputs[0][2, 1] = math.nan
    value, *grads = value_and_grads(LOSSES[name][0], inputs)
    assert value.isnan()
    assert grads[0][2].isnan().all()


def test_scale_and_bias_may_be_numbers() -> None:
    x, y, scale, bias = arguments("siglip")
    assert clip_loss(x, y, scale.item()) == clip_loss(x, y, scale)
    assert siglip_loss(x, y, scale.item(), bias.item()) == siglip_loss(x, y, scale, bias)


@pytest.mark.parametrize("factor", [0.0, -3.0])
@every_loss
def test_scale_may_be_zero_or_negative(name: str, factor: float) -> None:
    inputs, (loss, dense) = arguments(name, factor), LOSSES[name]
    torch.testing.assert_close(value_and_grads(loss, inputs), value_and_grads(dense, inputs))


@every_loss
def test_non_contiguous_inputs_and_gradients_are_right(name: str) -> None:
    inputs, (loss, dense) = arguments(name), LOSSES[name]
    inputs[0] = inputs[0].T.contiguous().T
    inputs[1] = torch.stack([inputs[1], inputs[1]], dim=2)[:, :, 0]
    torch.testing.assert_close(value_and_grads(loss, inputs), value_and_grads(dense, inputs))


@every_loss
def test_autocast_does_not_round_the_sums(name: str) -> None:
    inputs = [x.float() for x in arguments(name)]
    plain = value_and_grads(LOSSES[name][0], inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value_and_grads(LOSSES[name][0], inputs), plain, rtol=0, atol=0)


@every_loss
def test_a_second_derivative_is_refused(name: str) -> None:
    inputs = [x.requires_grad_() for x in arguments(name)]
    value = LOSSES[name][0](*inputs)
    (grad,) = torch.autograd.grad(value, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (value + grad.sum()).backward()


@every_loss
def test_it_composes_with_func_grad(name: str) -> None:
    inputs, (loss, dense) = arguments(name), LOSSES[name]
    places = tuple(range(len(inputs)))
    got, expected = (torch.func.grad(f, places)(*inputs) for f in (loss, dense))
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings(TRACING)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@every_loss
def test_it_compiles_to_one_graph(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_tiles, "CPU_TILE", 5)
    torch.compiler.reset()
    inputs, loss = arguments(name), LOSSES[name][0]
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    torch.testing.assert_close(value_and_grads(compiled, inputs), value_and_grads(loss, inputs))


def _nodes(loss: Loss, inputs: Sequence[Tensor]) -> int:
    torch.compiler.reset()
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        counts.append(len(list(graph.graph.nodes)))
        return graph

    torch.compile(loss, backend=count, fullgraph=True)(*inputs)
    return sum(counts)


@pytest.mark.filterwarnings(TRACING)
@every_loss
def test_a_compiler_does_not_write_out_the_tiles(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, loss = arguments(name), LOSSES[name][0]
    monkeypatch.setattr(contrastive_tiles, "CPU_TILE", 2)
    many = _nodes(loss, inputs)
    monkeypatch.setattr(contrastive_tiles, "CPU_TILE", 1024)
    assert many == _nodes(loss, inputs)


@pytest.mark.usefixtures("tile")
def test_of_mirrored_views_one_tile_of_two_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def product(x: Tensor, y: Tensor, *more: Tensor) -> Tensor:
        seen.append((len(x), len(y)))
        return plain(x, y, *more)

    plain = contrastive_tiles.product
    monkeypatch.setattr(contrastive_tiles, "product", product)
    inputs = arguments("nt_xent", rows=10)
    nt_xent_loss(*inputs)
    whole = sum(m * n for m, n in seen)
    assert whole == (20 * 25 / 2 if len(seen) > 1 else 400)


class TestInfoNCE:
    def test_labels_and_more_keys_than_queries(self, tile: int) -> None:
        query, key = torch.randn(7, 4).double(), torch.randn(19, 4).double()
        labels = torch.randint(19, (7,))
        inputs = [query, key, torch.tensor(2.0).double()]
        got = value_and_grads(lambda *x: info_nce_loss(*x, labels=labels), inputs)
        dense = value_and_grads(lambda q, k, s: F.cross_entropy(s * (q @ k.T), labels), inputs)
        torch.testing.assert_close(got, dense)

    @pytest.mark.parametrize("scale", [0.5, 20.0])
    @pytest.mark.parametrize("shape", [(7, 19), (19,), (1, 19)])
    def test_excluded_pairs_take_no_part(
        self, tile: int, shape: tuple[int, ...], scale: float
    ) -> None:
        inputs = [torch.randn(7, 4).double(), torch.randn(19, 4).double(), torch.tensor(scale)]
        excluded = torch.rand(shape) < 0.4
        whole, own = excluded.expand(7, 19), torch.arange(7)

        def dense(q: Tensor, k: Tensor, s: Tensor) -> Tensor:
            z = s * (q @ k.T)
            positives = z[own, own]
            return (z.masked_fill(whole, -math.inf).logsumexp(1) - positives).mean()

        got = value_and_grads(lambda *x: info_nce_loss(*x, excluded=excluded), inputs)
        torch.testing.assert_close(got, value_and_grads(dense, inputs))

    def test_without_the_positives_it_is_the_decoupled_loss(self) -> None:
        x, y, scale = arguments("clip")
        z = scale * (x @ y.T)
        apart = z.clone().fill_diagonal_(-math.inf).logsumexp(1) - z.diagonal()
        own = torch.eye(13, dtype=torch.bool)
        torch.testing.assert_close(
            info_nce_loss(x, y, scale, excluded=own, reduction="none"), apart
        )

    @pytest.mark.parametrize("shape", [(7, 1), (1, 1), ()])
    def test_a_mask_may_leave_out_whole_rows(self, tile: int, shape: tuple[int, ...]) -> None:
        query, key, excluded = torch.randn(7, 4), torch.randn(19, 4), torch.rand(shape) < 0.5
        losses = info_nce_loss(query, key, 1.0, excluded=excluded, reduction="none")
        assert losses.isneginf().tolist() == excluded.expand(7, 1)[:, 0].tolist()

    @pytest.mark.parametrize("scale", [1.0, 100.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_row_without_keys_has_no_gradient_and_no_nan(
        self, tile: int, dtype: torch.dtype, scale: float
    ) -> None:
        x = torch.randn(6, 3, dtype=dtype, requires_grad=True)
        excluded = torch.zeros(6, 8, dtype=torch.bool)
        excluded[2] = True
        found = block_logsumexp(x, torch.randn(8, 3, dtype=dtype), scale, excluded=excluded)
        assert found.rows[2] == -math.inf
        (grad,) = torch.autograd.grad(found.rows.sum(), x)
        assert grad[2].tolist() == [0, 0, 0]
        assert grad.isfinite().all()

    def test_a_label_out_of_range_is_nan_for_its_query_alone(self) -> None:
        labels = torch.tensor([0, 3, -1, 2])
        x = torch.randn(4, 2)
        losses = info_nce_loss(x, torch.randn(3, 2), 1.0, labels=labels, reduction="none")
        assert losses.isnan().tolist() == [False, True, True, False]


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_a_block_may_have_masks_and_positives_that_share_a_column(scale: float) -> None:
    inputs = [torch.randn(11, 4).double(), torch.randn(8, 4).double(), torch.tensor(scale)]
    labels = torch.tensor([3, 3, -1, 0, 8, 7, 7, 7, 1, 6, 2])
    own, excluded = torch.arange(11) - 2, torch.rand(11, 8) < 0.3
    excluded[:, 4] = True
    weights = torch.randn(11 + 7 + 11, dtype=torch.float64)
    apart = excluded | (own[:, None] == torch.arange(8))
    kept = torch.arange(8) != 4

    def tiled(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        found = block_logsumexp(x, y, s, labels=labels, excluded=excluded, own=own)
        assert found.columns[4] == -math.inf
        return weights @ torch.cat([found.rows, found.columns[kept], found.positives])

    def dense(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        z = s * (x @ y.T)
        here = (labels >= 0) & (labels < 8)
        positives = torch.where(here, z.gather(1, labels.clamp(0, 7)[:, None])[:, 0], 0.0)
        z = z.masked_fill(apart, -math.inf)
        return weights @ torch.cat([z.logsumexp(1), z[:, kept].logsumexp(0), positives])

    torch.testing.assert_close(value_and_grads(tiled, inputs), value_and_grads(dense, inputs))


RANKS = 3


def _parts(x: Tensor) -> list[Tensor]:
    return list(x.chunk(RANKS))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("size", [7.0, 50.0])
def test_a_ring_of_blocks_is_the_whole_clip_loss(size: float) -> None:
    x, y, scale = arguments("clip", size, rows=18)
    images, texts, b = _parts(x), _parts(y), 6
    rows = [torch.full((b,), -math.inf).double() for _ in images]
    columns = [torch.full((b,), -math.inf).double() for _ in images]
    positives = [torch.zeros(b).double() for _ in images]

    def labels(rank: int, block: int) -> Tensor:
        return torch.arange(b) + b * (rank - block)

    for rank in range(RANKS):
        for hop in range(RANKS):
            block = (rank + hop) % RANKS
            found = block_logsumexp(images[rank], texts[block], scale, labels=labels(rank, block))
            rows[rank] = merge_logsumexp(rows[rank], found.rows)
            columns[block] = merge_logsumexp(columns[block], found.columns)
            positives[rank] += found.positives
    loss = sum(
        ((r + c) / 2 - p).sum() for r, c, p in zip(rows, columns, positives, strict=True)
    ) / len(x)
    half = torch.full((b,), 0.5 / len(x), dtype=torch.float64)
    dx, dy = [torch.zeros_like(v) for v in images], [torch.zeros_like(v) for v in texts]
    ds = torch.zeros(()).double()
    for rank in range(RANKS):
        for hop in range(RANKS):
            block = (rank + hop) % RANKS
            parts = block_logsumexp_grads(
                *(images[rank], texts[block], scale, rows[rank], columns[block]),
                *(half, half, -2 * half),
                labels=labels(rank, block),
            )
            dx[rank] += parts[0]
            dy[block] += parts[1]
            ds += parts[2]
    got = [loss, torch.cat(dx), torch.cat(dy), ds]
    whole = value_and_grads(dense_clip, [x, y, scale])
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tile")
def test_a_ring_of_blocks_is_the_whole_nt_xent_loss() -> None:
    a, b, scale = arguments("nt_xent", rows=9)
    views, n = torch.cat([a, b]), 18
    blocks, size = _parts(views), n // RANKS
    pair, own = torch.arange(n).roll(n // 2), torch.arange(n)

    def places(rank: int, block: int) -> dict[str, Tensor]:
        here = slice(size * rank, size * (rank + 1))
        return {"labels": pair[here] - size * block, "own": own[here] - size * block}

    sums = [torch.full((size,), -math.inf).double() for _ in blocks]
    total = torch.zeros(()).double()
    for rank in range(RANKS):
        for k in range(RANKS):
            found = block_logsumexp(
                blocks[rank], blocks[k], scale, columns=False, **places(rank, k)
            )
            sums[rank] = merge_logsumexp(sums[rank], found.rows)
            total -= found.positives.sum() / n
        total += sums[rank].sum() / n
    weight = torch.full((size,), 1 / n, dtype=torch.float64)
    grads = [torch.zeros_like(v) for v in blocks]
    ds = torch.zeros(()).double()
    for rank in range(RANKS):
        for k in range(RANKS):
            dx, dy, more = block_logsumexp_grads(
                *(blocks[rank], blocks[k], scale, sums[rank], None, weight, None, -weight),
                **places(rank, k),
            )
            grads[rank] += dx
            grads[k] += dy
            ds += more
    value, da, db, whole_ds = value_and_grads(dense_nt_xent, [a, b, scale])
    got, expected = [total, torch.cat(grads), ds], [value, torch.cat([da, db]), whole_ds]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tile")
def test_a_ring_of_blocks_is_the_whole_siglip_loss() -> None:
    x, y, scale, bias = arguments("siglip", rows=18)
    images, texts, b = _parts(x), _parts(y), 6
    weight = torch.full((b,), 1 / len(x), dtype=torch.float64)
    loss = ds = db = torch.zeros(()).double()
    dx, dy = [torch.zeros_like(v) for v in images], [torch.zeros_like(v) for v in texts]
    for rank in range(RANKS):
        for block in range(RANKS):
            labels = torch.arange(b) + b * (rank - block)
            inputs = images[rank], texts[block], scale, bias
            loss = loss + siglip_loss(*inputs, labels=labels, reduction="sum") / len(x)
            parts = siglip_grads(*inputs, weight, labels=labels)
            dx[rank] += parts[0]
            dy[block] += parts[1]
            ds, db = ds + parts[2], db + parts[3]
    got = [loss, torch.cat(dx), torch.cat(dy), ds, db]
    whole = value_and_grads(dense_siglip, [x, y, scale, bias])
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)


def test_merging_with_nothing_changes_nothing() -> None:
    a = torch.tensor([-math.inf, 3.0, -math.inf, 1e4], dtype=torch.float64)
    b = torch.tensor([-math.inf, -math.inf, -2.0, 1e4], dtype=torch.float64)
    expected = torch.tensor([-math.inf, 3.0, -2.0, 1e4 + math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(merge_logsumexp(a, b), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks_add_nothing(shape: tuple[int, int]) -> None:
    m, n = shape
    x, y = torch.randn(m, 3, requires_grad=True), torch.randn(n, 3, requires_grad=True)
    found = block_logsumexp(x, y, 2.0)
    assert found.rows.tolist() == [-math.inf] * m
    assert found.columns.tolist() == [-math.inf] * n
    assert found.positives.tolist() == [0] * m
    total = found.positives.sum() + siglip_loss(x, y, 2.0, 0.0, reduction="sum")
    grads = torch.autograd.grad(total, (x, y))
    assert [g.shape for g in grads] == [x.shape, y.shape]
    assert not any(g.any() for g in grads)


X = torch.randn(4, 3)
META = torch.empty(4, 4, device="meta")
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: clip_loss(X, X[:3], 1.0), ValueError, "must be equal"),
    (lambda: clip_loss(X, X[:, :2], 1.0), ValueError, "same width"),
    (lambda: clip_loss(X[0], X[0], 1.0), ValueError, "matrices"),
    (lambda: clip_loss(X, X.double(), 1.0), TypeError, "one floating-point dtype"),
    (lambda: clip_loss(X.long(), X.long(), 1.0), TypeError, "one floating-point dtype"),
    (lambda: clip_loss(X, X.to("meta"), 1.0), TypeError, "one device"),
    (lambda: clip_loss(X, X, torch.ones(1)), ValueError, "scale"),
    (lambda: clip_loss(X, X, torch.tensor(2)), ValueError, "scale"),
    (lambda: clip_loss(X, X, 1.0, reduction="avg"), ValueError, "'avg'"),
    (lambda: clip_loss(X, X, META[0, 0]), TypeError, "scale is on meta"),
    (lambda: info_nce_loss(X, X, 1.0, excluded=META > 0), TypeError, "excluded is on meta"),
    (lambda: info_nce_loss(X, X, 1.0, labels=META[:, 0].long()), TypeError, "labels is on meta"),
    (lambda: siglip_loss(X, X, 1.0, 0.0, labels=META[:, 0].long()), TypeError, "labels is on meta"),
    (lambda: siglip_grads(X, X, 1.0, 0.0, META[:, 0]), TypeError, "grad_rows is on meta"),
    (lambda: block_logsumexp(X, X, 1.0, own=META[:, 0].long()), TypeError, "own is on meta"),
    (
        lambda: block_logsumexp_grads(X, X, 1.0, META[:, 0], None, X[:, 0], None, X[:, 0]),
        TypeError,
        "rows is on meta",
    ),
    (
        lambda: block_logsumexp_grads(X, X, 1.0, X[:, 0], META[:, 0], X[:, 0], X[:, 0], X[:, 0]),
        TypeError,
        "columns is on meta",
    ),
    (lambda: info_nce_loss(X, X[:3], 1.0), ValueError, "give labels"),
    (lambda: info_nce_loss(X, X, 1.0, labels=torch.zeros(3).long()), ValueError, "labels"),
    (lambda: info_nce_loss(X, X, 1.0, labels=torch.zeros(4)), TypeError, "int64"),
    (lambda: info_nce_loss(X, X, 1.0, excluded=torch.eye(4)), TypeError, "booleans"),
    (lambda: info_nce_loss(X, X, 1.0, excluded=torch.ones(3) > 0), ValueError, "broadcast"),
    (lambda: nt_xent_loss(X, X[:3], 1.0), ValueError, "must be equal"),
    (lambda: siglip_loss(X, X, 1.0, torch.ones(2)), ValueError, "bias"),
    (lambda: siglip_loss(X, X, 1.0, 0.0, labels=torch.zeros(4)), TypeError, "int64"),
    (lambda: siglip_grads(X, X, 1.0, 0.0, torch.ones(3)), ValueError, "grad_rows"),
    (lambda: block_logsumexp(X, X, 1.0, own=torch.zeros(4)), TypeError, "own"),
    (
        lambda: block_logsumexp_grads(X, X, 1.0, X[:, 0], X[:, 0], X[:, 0], None, X[:, 0]),
        ValueError,
        "belong together",
    ),
    (
        lambda: block_logsumexp_grads(X, X, 1.0, X[:, 0], None, X[:3, 0], None, X[:, 0]),
        ValueError,
        "grad_rows",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_wrong_arguments_are_refused(
    call: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()


@every_loss
def test_an_unknown_reduction_is_refused_before_any_tile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive_tiles, "product", None)
    with pytest.raises(ValueError, match="'avg'"):
        LOSSES[name][0](*arguments(name), reduction="avg")
