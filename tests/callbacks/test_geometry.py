"""Norms of a window's parts in the optimizer's geometry, against brute force in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from harness.noise_parts import GeometryParts, Norms, ParameterGroups, geometry_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_ext import optim, scaling
from lightning_ext._lightning import DistributedView, View

SHAPES = [(12, 20), (12, 20), (30, 8), (40,)]
COLUMNS = [0, 1, 1, 1]
NOBODY: Any = SimpleNamespace()  # one process asks no Trainer
ALONE = View(NOBODY)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]


def optimizer_of(parameters: list[nn.Parameter], kind: Any = torch.optim.AdamW) -> Any:
    return kind([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1e-3)


def parts_of(geometry: str, optimizer: Any = None, **options: Any) -> GeometryParts:
    optimizer = optimizer_of(weights()) if optimizer is None else optimizer
    groups = ParameterGroups(optimizer, per_group=True)
    return GeometryParts(groups, optimizer, geometry, **options)


def measured(geometry: str, batch: list[list[Tensor]], sizes: list[int], **options: Any) -> Any:
    parts = parts_of(geometry, **options)
    for gradients, size in zip(batch, sizes, strict=True):
        parts.add(list(gradients), size, 1.0)
    return parts.measure(ALONE)


def assert_alike(got: list[Norms], expected: list[Norms], rel: float = 1e-9) -> None:
    assert len(got) == len(expected) == 3
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=rel)


def norm(geometry: str, tensors: list[Tensor]) -> float:
    if geometry == "l1":
        return float(sum(x.abs().sum() for x in tensors))
    return float(sum(torch.linalg.svdvals(x).sum() for x in tensors if x.ndim == 2))


def batches(
    mean: list[Tensor], deviation: list[Tensor], sizes: list[int], steps: int, seed: int = 0
) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def part(size: int) -> list[Tensor]:
        return [
            g + s * torch.randn(g.shape, generator=generator, dtype=g.dtype) / math.sqrt(size)
            for g, s in zip(mean, deviation, strict=True)
        ]

    return ([part(size) for size in sizes] for _ in range(steps))


def truth(geometry: str, mean: list[Tensor], deviation: list[Tensor]) -> tuple[float, float]:
    """‖G‖, and the norm of the noise, of independent coordinates."""
    if geometry == "l1":
        return norm("l1", mean), float(sum(s.sum() for s in deviation))
    noise = 0.0
    for s in deviation:
        if s.ndim == 2:
            side = 1 if s.shape[0] <= s.shape[1] else 0
            noise += s.square().sum(side).sqrt().sum().item()
    return norm(geometry, mean), noise


@pytest.mark.parametrize("geometry", ["l1", "nuclear"])
@pytest.mark.parametrize("sizes", [[4] * 8, [2] * 16, [3, 5, 4, 4, 5, 3, 4, 4]])
def test_the_noise_scale_is_that_of_known_gradients(geometry: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    mean = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    deviation = [0.5 + torch.rand(shape, dtype=torch.float64) for shape in SHAPES]
    signal, noise = truth(geometry, mean, deviation)
    mean = [g * (2 * noise / signal / math.sqrt(sum(sizes))) for g in mean]  # B = 4 B_noise
    found = [measured(geometry, b, sizes) for b in batches(mean, deviation, sizes, 150)]
    rows = [(norms[0].signal, norms[0].noise, sum(sizes)) for norms in found]
    got = scaling.norm_noise_scale(rows)
    assert got.value == pytest.approx(sum(sizes) / 4, rel=0.05)
    low, high = (sum(getattr(n[0], k) for n in found) / len(found) for k in ("low", "high"))
    assert low < signal * (2 * noise / signal / math.sqrt(sum(sizes))) < high


@pytest.mark.parametrize("geometry", ["l1", "nuclear"])
@pytest.mark.parametrize("sizes", [[16, 16], [16, 8, 8]])
def test_two_and_three_parts_are_measured(geometry: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    mean = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    deviation = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    signal, noise = truth(geometry, mean, deviation)
    mean = [g * (2 * noise / signal / math.sqrt(32)) for g in mean]
    found = [measured(geometry, b, sizes)[0] for b in batches(mean, deviation, sizes, 100)]
    got = scaling.norm_noise_scale([(n.signal, n.noise, 32) for n in found])
    # The root of a covariance of two parts cannot be extrapolated: it is too small.
    assert got.value == pytest.approx(8, rel=0.25 if geometry == "nuclear" else 0.05)
    assert got.grad_sq_norm == pytest.approx((2 * noise) ** 2 / 32, rel=0.03)


@pytest.mark.parametrize("geometry", ["l1", "nuclear"])
def test_groups_add_up_to_the_whole(geometry: str) -> None:
    torch.manual_seed(0)
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(8)]
    whole, *groups = measured(geometry, batch, [4] * 8)
    for field in Norms._fields:
        total = sum(getattr(group, field) for group in groups)
        assert total == pytest.approx(getattr(whole, field))
    alone = measured(geometry, [[g[0], *[None] * 3] for g in batch], [4] * 8)
    assert groups[0] == pytest.approx(alone[0])


def test_under_adam_it_is_the_noise_scale_of_what_adam_would_step_by() -> None:
    torch.manual_seed(0)
    parameters = weights()
    adam = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-3)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        adam.step()
    sizes = [3, 5, 4]
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in sizes]
    whole = [sum(b[i] * n for b, n in zip(batch, sizes, strict=True)) / 12 for i in range(4)]
    spread = [
        sum(n * (b[i] - whole[i]) ** 2 for b, n in zip(batch, sizes, strict=True)) / 2
        for i in range(4)
    ]
    seconds = [adam.state[p]["exp_avg_sq"] / (1 - 0.95**3) for p in parameters]
    factors = [
        1 / (torch.maximum(v, s / 120).sqrt() + 1e-3) for v, s in zip(seconds, spread, strict=True)
    ]
    rows = [torch.cat([(g * f).flatten() for g, f in zip(b, factors, strict=True)]) for b in batch]
    mean = sum(row * size for row, size in zip(rows, sizes, strict=True)) / 12
    expected = scaling.noise_statistics([float(r @ r) for r in rows], sizes, float(mean @ mean))
    found = measured("adam", batch, sizes, optimizer=adam)[0]
    assert (found.signal, found.noise) == pytest.approx(expected)


@pytest.mark.parametrize("parts", [2, 8, 64])
def test_under_adam_the_number_of_parts_does_not_matter(parts: int) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    signal = torch.cat([torch.ones(200), torch.full((200,), 0.3)]).double()
    deviation = torch.cat([torch.full((200,), 0.3), torch.full((200,), 10.0)]).double()
    adam = torch.optim.Adam([weight], lr=0.0, betas=(0.9, 0.999))
    second = signal**2 + deviation**2 / 64  # of a batch's gradient, which Adam comes to
    weight.grad = second.sqrt()
    for _ in range(50):
        adam.step()
    found = []
    for _ in range(60):
        samples = signal + deviation * torch.randn(parts, 64 // parts, 400, dtype=torch.float64)
        each = GeometryParts(ParameterGroups(adam), adam, "adam")
        for part in samples.mean(1):
            each.add([part], 64 // parts, 1.0)
        norms = each.measure(ALONE)
        assert norms is not None
        found.append(norms[0][:2])
    u = torch.tensor(found).mean(0)
    truth = (deviation**2 / second).sum() / (signal**2 / second).sum()
    assert float(u[1] / u[0]) == pytest.approx(float(truth), rel=0.1)


def test_under_adam_a_coordinate_that_had_no_gradient_before_is_bounded() -> None:
    parameters = weights()
    adam = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(8)]
    found = measured("adam", batch, [4] * 8, optimizer=adam)[0]
    entries = sum(parameter.numel() for parameter in parameters)
    assert found.noise <= 10 * 32 * entries * (1 + 1e-6)


def test_under_adam_the_second_moment_is_that_before_the_window() -> None:
    torch.manual_seed(0)
    parameters = weights()
    adam = torch.optim.Adam(parameters, lr=1e-3)
    batch = [[torch.ones(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(4)]
    assert measured("adam", batch, [4] * 4, optimizer=adam) is None  # no state yet


def test_the_factor_makes_means_of_what_hooks_have_seen() -> None:
    torch.manual_seed(0)
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(4)]
    expected = measured("l1", batch, [4] * 4)
    parts = parts_of("l1")
    for gradients in batch:
        parts.add([g * 128 for g in gradients], 4, 1 / 128)
    assert_alike(parts.measure(ALONE), expected)


@pytest.mark.parametrize("geometry", ["l1", "nuclear"])
def test_nothing_is_kept_of_the_gradients_that_were_given(geometry: str) -> None:
    torch.manual_seed(0)
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(4)]
    expected = measured(geometry, batch, [4] * 4)
    parts = parts_of(geometry)
    for gradients in batch:
        given = [g.clone() for g in gradients]
        parts.add(given, 4, 1.0)
        for g in given:
            g.zero_()
    assert_alike(parts.measure(ALONE), expected)


def test_low_precision_is_added_up_in_float32() -> None:
    parameters = [nn.Parameter(torch.zeros(12, 20, dtype=torch.bfloat16))]
    sgd = torch.optim.SGD(parameters, lr=1.0)
    torch.manual_seed(0)
    batch = [torch.randn(12, 20).bfloat16() for _ in range(8)]
    for geometry in ("l1", "nuclear"):
        found = measured(geometry, [[g] for g in batch], [4] * 8, optimizer=sgd)[0]
        wide = torch.optim.SGD([nn.Parameter(torch.zeros(12, 20).double())], lr=1.0)
        exact = measured(geometry, [[g.double()] for g in batch], [4] * 8, optimizer=wide)[0]
        assert found == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_parts_are_not_measured(count: int) -> None:
    batch = [[torch.ones(shape, dtype=torch.float64) for shape in SHAPES]] * count
    for geometry in ("l1", "nuclear"):
        assert measured(geometry, batch, [4] * count) is None


def test_parts_without_samples_do_not_count() -> None:
    torch.manual_seed(0)
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(5)]
    expected = measured("l1", batch[:4], [4] * 4)
    assert_alike(measured("l1", batch, [4, 4, 4, 4, 0]), expected)


def test_folds_that_cannot_be_compared_are_left_out() -> None:
    batch = [[torch.ones(shape, dtype=torch.float64) for shape in SHAPES]] * 4
    assert measured("l1", batch, [4, 20, 4, 4]) is None
    assert measured("nuclear", batch, [4, 20, 4, 4]) is not None


@pytest.mark.parametrize("geometry", ["l1", "nuclear"])
def test_a_gradient_that_is_not_finite_is_left_out(geometry: str) -> None:
    batch = [[torch.ones(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(4)]
    batch[1][0][0, 0] = math.inf
    assert measured(geometry, batch, [4] * 4) is None


def test_nuclear_takes_the_matrices_of_muon_only() -> None:
    torch.manual_seed(0)
    batch = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(8)]
    parameters = weights()
    groups = [
        {"params": parameters[:1], "algorithm": "muon"},
        {"params": parameters[1:], "algorithm": "adamw"},
    ]
    mixed = torch.optim.AdamW(groups)
    found = measured("nuclear", batch, [4] * 8, optimizer=mixed)
    assert found[0] == found[1]
    assert found[2].signal == 0
    assert found[0] == pytest.approx(measured("nuclear", batch, [4] * 8)[1])


class Lion(torch.optim.SGD):
    """A stranger of that name."""


class AdamW8bit(torch.optim.SGD):
    """Another."""


class Mine(torch.optim.AdamW):
    """A descendant."""


class LineSearch(torch.optim.SGD):
    """No sign of a sign."""


@pytest.mark.parametrize(
    ("kind", "geometry"),
    [
        (torch.optim.SGD, "euclidean"),
        (torch.optim.Adam, "l1"),
        (torch.optim.AdamW, "l1"),
        (torch.optim.NAdam, "l1"),
        (torch.optim.RAdam, "l1"),
        (torch.optim.Adamax, "l1"),
        (torch.optim.RMSprop, "l1"),
        (Lion, "l1"),
        (AdamW8bit, "l1"),
        (Mine, "l1"),
        (LineSearch, "euclidean"),
        (torch.optim.Muon, "nuclear"),
    ],
)
def test_the_geometry_is_that_of_the_optimizer(kind: Any, geometry: str) -> None:
    assert geometry_of(kind([nn.Parameter(torch.zeros(2, 3))], lr=1e-3)) == geometry


@pytest.mark.parametrize(
    ("kind", "geometry"),
    [
        (optim.LAMB, "l1"),
        (optim.LARS, "euclidean"),
        (optim.Lion, "l1"),
        (optim.AdamP, "l1"),
        (optim.SGDP, "euclidean"),
        (optim.DiffGrad, "l1"),
        (optim.MTAdamW, "l1"),
        (optim.AccumAdam, "l1"),
        (optim.DistributedLion, "l1"),
        (optim.PolyakSGD, "euclidean"),
    ],
)
def test_the_geometry_of_our_optimizers_and_of_what_wraps_them(kind: Any, geometry: str) -> None:
    how = {"tasks": {"one": (1.0, 1.0)}} if kind is optim.MTAdamW else {}
    optimizer = kind([nn.Parameter(torch.zeros(2, 3))], lr=1e-3, **how)
    assert geometry_of(optimizer) == geometry
    assert geometry_of(optim.LAWN(optimizer, free_steps=3)) == geometry


def test_a_group_for_muon_makes_it_nuclear() -> None:
    groups = [
        {"params": [nn.Parameter(torch.zeros(2, 3))], "algorithm": "muon"},
        {"params": [nn.Parameter(torch.zeros(3))], "algorithm": "adamw"},
    ]
    assert geometry_of(torch.optim.AdamW(groups)) == "nuclear"


def test_what_cannot_be_measured_is_refused() -> None:
    vectors = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0)
    with pytest.raises(MisconfigurationException, match="matrices"):
        parts_of("nuclear", vectors)
    matrix = nn.Parameter(torch.zeros(6, 4))
    for other in (vectors, optim.CAME([matrix]), optim.GaLore([matrix], rank=2)):
        with pytest.raises(MisconfigurationException, match="none of each entry"):
            parts_of("adam", other)


def some_batch(count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
        for _ in range(count)
    ]


def on_a_rank(geometry: str) -> Any:
    """Every second part."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    run: Any = SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)
    parts = parts_of(geometry, rank=rank, ranks=2)
    for gradients in some_batch(8)[rank::2]:
        parts.add(list(gradients), 4, 1.0)
    return parts.measure(DistributedView(run))


@pytest.mark.parametrize("geometry", ["l1", "nuclear"])
def test_two_processes_are_as_good_as_one(geometry: str) -> None:
    alone = measured(geometry, some_batch(8), [4] * 8)
    for found in run_distributed(on_a_rank, args=(geometry,)):
        assert_alike(found, alone, rel=1e-12)
