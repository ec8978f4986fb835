"""What tests of the batch read, against every sample's gradient by hand, in float64."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from harness import assert_accurate, dataset, fit, identical, loader, run_distributed
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.scaling import COORDINATE_FRACTIONS, noise_statistics

BOTH = ("inner_products", "coordinates")
Part = tuple[Tensor, Tensor]


class Still(LightningModule):
    """Float64 weights that never move; the layers are two parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        weights = list(self.net.parameters())
        return torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:]}], lr=0.0)


class Keep(Callback):
    """Keeps the batches."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.parts.append((batch[1], batch[2]))

    def windows(self, size: int) -> list[list[Part]]:
        return [self.parts[i : i + size] for i in range(0, len(self.parts), size)]


class Truth(NamedTuple):
    """Of every window: |G|², S and samples; the variance along ḡ, |ḡ|², |ḡ|⁴, S; the quantiles."""

    noise: Tensor
    inner: Tensor
    coordinates: Tensor


def by_hand(windows: Sequence[Sequence[Part]], *, samples: bool, module: Any = None) -> Truth:
    """From every part's gradient, one after another; a part is a sample or a micro-batch."""
    module = Still() if module is None else module
    rows = [
        _of_window(module, _singles(parts) if samples else list(parts), samples)
        for parts in windows
    ]
    return Truth(*(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)))


def _singles(parts: Sequence[Part]) -> list[Part]:
    return [(x[i : i + 1], y[i : i + 1]) for x, y in parts for i in range(len(y))]


def _of_window(module: Any, parts: list[Part], samples: bool) -> tuple[list[float], ...]:
    g = np.stack([_gradient(module, part) for part in parts])
    n = np.array([len(y) for _, y in parts], dtype=np.float64)
    mean, k, total = n @ g / n.sum(), len(n), n.sum()
    variance = n @ (g - mean) ** 2 / (k - 1)  # of every coordinate
    trace, square = variance.sum(), mean @ mean
    along = n @ (g @ mean - square) ** 2 / (k - 1)
    moves = (g != 0).any(0)
    ratios = np.sort(variance[moves] / mean[moves] ** 2)
    quantiles = np.quantile(ratios, COORDINATE_FRACTIONS, method="inverted_cdf")
    return (
        [square - trace / total, trace, total],
        [along, square, square**2, trace],
        quantiles.tolist(),
    )


def _gradient(module: Any, part: Part) -> np.ndarray:
    loss = module.training_step((None, *part), 0)
    found = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    return torch.cat([x.flatten() for x in found]).numpy()


def measure(noise: GradientNoiseScale, accumulate: int, **kwargs: Any) -> Keep:
    """One epoch at frozen weights."""
    keep = Keep()
    train = kwargs.pop("train", None) or loader(24, dtype=torch.float64)
    others = kwargs.pop("callbacks", [])
    module = kwargs.pop("module", None) or Still()
    kwargs |= {"accumulate_grad_batches": accumulate, "max_epochs": 1}
    fit([noise, keep, *others], module=module, train=train, **kwargs)
    return keep


def inner_rows(noise: GradientNoiseScale) -> Tensor:
    found: Tensor = noise.state_dict()["inner_products"]
    return found


def last_coordinates(noise: GradientNoiseScale) -> Tensor:
    found = noise.coordinates()
    assert found is not None
    assert tuple(found) == COORDINATE_FRACTIONS
    return torch.tensor(list(found.values()), dtype=torch.float64)


def assert_true(noise: GradientNoiseScale, truth: Truth) -> None:
    assert_accurate(noise.state_dict()["history"][:, :3], truth.noise)
    assert_accurate(inner_rows(noise), truth.inner)
    assert_accurate(last_coordinates(noise), truth.coordinates[-1])


CASES = [("micro_batches", 2), ("micro_batches", 3)]
CASES += [("per_sample", accumulate) for accumulate in (1, 2, 3)]
CASES += [("micro_batches", 4), ("per_sample", 4)]  # the last window is cut short
every_source = pytest.mark.parametrize(("source", "accumulate"), CASES)


@every_source
def test_every_statistic_is_that_of_the_gradients_by_hand(source: Any, accumulate: int) -> None:
    noise = GradientNoiseScale(1, source=source, tests=BOTH)
    keep = measure(noise, accumulate)
    assert_true(noise, by_hand(keep.windows(accumulate), samples=source == "per_sample"))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
def test_chunks_of_any_size_measure_the_same(chunk_size: int) -> None:
    noise = GradientNoiseScale(1, source="per_sample", chunk_size=chunk_size, tests=BOTH)
    keep = measure(noise, 2)
    assert_true(noise, by_hand(keep.windows(2), samples=True))


@pytest.mark.parametrize("source", ["micro_batches", "per_sample"])
def test_groups_are_measured_by_themselves(source: Any) -> None:
    noise = GradientNoiseScale(1, source=source, per_group=True)
    keep = measure(noise, 2)
    second = noise.state_dict()["history"][:, 6:]
    module = Still()
    module.net[0].requires_grad_(False)
    truth = by_hand(keep.windows(2), samples=source == "per_sample", module=module)
    assert_accurate(second, truth.noise)


@pytest.mark.parametrize("source", ["micro_batches", "per_sample"])
@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_inner_products_are_averaged_as_the_noise_scale_is(source: Any, smoothing: float) -> None:
    noise = GradientNoiseScale(1, source=source, smoothing=smoothing, tests=["inner_products"])
    keep = measure(noise, 2)
    rows = by_hand(keep.windows(2), samples=source == "per_sample").inner
    weights = smoothing ** torch.arange(len(rows) - 1.0, -1, -1).double()
    found = noise.inner_products()
    assert found is not None
    assert_accurate(torch.tensor(found, dtype=torch.float64), weights @ rows / weights.sum())
    estimate = noise.estimate()
    assert found.grad_trace == pytest.approx(estimate.grad_trace, rel=1e-12)


def test_the_trace_of_pooled_samples_is_not_the_published_sum_which_counts_twice() -> None:
    """The mean of the ranks' unbiased variances plus that between ranks is 9.4 % too large here."""
    local, ranks, repeats = 8, 4, 2000
    gradients = torch.randn(repeats, ranks, local, 50, dtype=torch.float64)  # S = 50
    means, whole = gradients.mean(2), gradients.mean((1, 2))
    between = means.square().mean(1).sum(-1) - whole.square().sum(-1)
    published = gradients.var(2).mean(1).sum(-1) + between
    norms = gradients.flatten(1, 2).square().sum(-1)
    n = ranks * local
    pooled = [
        noise_statistics(row.tolist(), [1] * n, square.item())[1]
        for row, square in zip(norms, whole.square().sum(-1), strict=True)
    ]
    assert np.mean(pooled) == pytest.approx(50, rel=0.005)
    excess = published.mean().item() / np.mean(pooled) - 1
    assert excess == pytest.approx((1 - 1 / ranks) / local, rel=0.02)


def measure_on(processes: int, source: Any, accumulate: int) -> tuple[Any, Any, Any]:
    data = dataset(48, torch.float64)
    noise = GradientNoiseScale(1, source=source, tests=BOTH)
    keep = measure(
        noise,
        accumulate,
        train=DataLoader(data, batch_sampler=AdaptiveBatchSampler(SequentialSampler(data), 4)),
        callbacks=[AdaptiveBatchSize(f"0:{4 * accumulate * processes}")],
        **({"strategy": "ddp", "devices": processes} if processes > 1 else {}),
    )
    return noise.state_dict(), noise.coordinates(), keep.windows(accumulate)


@pytest.mark.parametrize(
    ("source", "accumulate"),
    [("micro_batches", 1), ("micro_batches", 2), ("per_sample", 1), ("per_sample", 2)],
)
def test_two_processes_measure_as_one_and_as_by_hand(source: Any, accumulate: int) -> None:
    (state, found, mine), (other, _, others) = run_distributed(
        measure_on, args=(2, source, accumulate)
    )
    assert identical(state, other)
    windows = [a + b for a, b in zip(mine, others, strict=True)]
    truth = by_hand(windows, samples=source == "per_sample")
    assert_accurate(state["history"], truth.noise)
    assert_accurate(state["inner_products"], truth.inner)
    quantiles = torch.tensor(list(found.values()), dtype=torch.float64)
    assert_accurate(quantiles, truth.coordinates[-1])
    alone, coordinates, _ = measure_on(1, source, 2 * accumulate)
    for name in ("history", "inner_products"):
        torch.testing.assert_close(alone[name], state[name], rtol=1e-10, atol=1e-12)
    assert list(coordinates.values()) == pytest.approx(list(found.values()), rel=1e-10)


class ScaledOnly(MixedPrecision):
    """A gradient scaler without autocast: a factor 65536, which is exact."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    def autocast_context_manager(self) -> Any:
        return contextlib.nullcontext()


class Fused(Still):
    """Its optimizer takes the gradient scaler's factor off by itself."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0, fused=True)


@every_source
@pytest.mark.parametrize("module", [Still, Fused])
def test_the_gradient_scalers_factor_is_undone(source: Any, accumulate: int, module: Any) -> None:
    noise = GradientNoiseScale(1, source=source, tests=BOTH)
    keep = measure(noise, accumulate, module=module(), plugins=ScaledOnly())
    assert_true(noise, by_hand(keep.windows(accumulate), samples=source == "per_sample"))


class Spoils(Callback):
    """Makes the data of one batch infinite; the fit itself goes on with them."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_before_backward(self, run: Any, module: Any, loss: Tensor) -> None:
        if run.fit_loop.batch_idx == self.batch_idx:
            loss.mul_(float("nan"))


@pytest.mark.parametrize("source", ["micro_batches", "per_sample"])
def test_a_step_that_is_not_finite_leaves_every_statistic_alone(source: Any) -> None:
    noise = GradientNoiseScale(1, source=source, tests=BOTH)
    keep = measure(noise, 2, callbacks=[Spoils(5)], plugins=ScaledOnly())
    assert len(keep.parts) == 6
    assert_true(noise, by_hand(keep.windows(2)[:-1], samples=source == "per_sample"))


@pytest.mark.parametrize("source", ["micro_batches", "per_sample"])
def test_a_first_step_that_is_not_finite_is_no_error(source: Any) -> None:
    noise = GradientNoiseScale(1, source=source, tests=BOTH)
    keep = measure(noise, 2, callbacks=[Spoils(0)], plugins=ScaledOnly())
    assert_true(noise, by_hand(keep.windows(2)[1:], samples=source == "per_sample"))


def test_gradients_may_be_taken_in_before_the_pass_is_over(monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_ext.callbacks._noise._gradient_parts._PENDING_BYTES", 0)
    noise = GradientNoiseScale(1, tests=["coordinates"])
    keep = measure(noise, 3)
    truth = by_hand(keep.windows(3), samples=False)
    assert_accurate(noise.state_dict()["history"], truth.noise)
    assert_accurate(last_coordinates(noise), truth.coordinates[-1])


class Shared(Still):
    """Runs one layer twice, each time recomputed in backward by a pass within the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)]).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(self.net[0], x, use_reentrant=True)
        return nn.functional.cross_entropy(self.net[1](x), y)


class Plain(Shared):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        return nn.functional.cross_entropy(self.net[1](self.net[0](self.net[0](x))), y)


def test_a_gradient_that_comes_in_pieces_is_put_together() -> None:
    noise = GradientNoiseScale(1, tests=BOTH)
    keep = measure(noise, 3, module=Shared())
    assert_true(noise, by_hand(keep.windows(3), samples=False, module=Plain()))


class Partly(Still):
    """Has a layer that only some batches reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.none = nn.Linear(6, 3).double(), nn.Linear(2, 2).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        out = self.net(x) + (self.some(x) if batch_idx % 2 else 0)
        return nn.functional.cross_entropy(out, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_parameters_that_only_some_parts_reach_count_zero_for_the_others() -> None:
    noise = GradientNoiseScale(1, tests=BOTH)
    keep = measure(noise, 2, module=Partly())

    def gradient(part: Part, batch_idx: int) -> np.ndarray:
        module = Partly()
        loss = module.training_step((None, *part), batch_idx)
        found = torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)
        return torch.cat([x.flatten() for x in found]).numpy()

    g = np.stack([gradient(part, index) for index, part in enumerate(keep.windows(2)[-1])])
    mean = g.mean(0)
    variance = 4 * ((g - mean) ** 2).sum(0)
    moves = (g != 0).any(0)
    ratios = variance[moves] / mean[moves] ** 2
    expected = np.quantile(ratios, COORDINATE_FRACTIONS, method="inverted_cdf")
    assert_accurate(last_coordinates(noise), torch.from_numpy(expected))
    along = 4 * ((g @ mean - mean @ mean) ** 2).sum()
    assert inner_rows(noise)[-1, 0].item() == pytest.approx(along, rel=1e-10)
