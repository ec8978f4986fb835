"""On a real network at frozen weights: the estimate against the U-statistic over all samples."""

import pytest
import torch
from harness import fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.callbacks import GradientNoiseScale
from lightning_ext.scaling import NoiseScale

MICRO_BATCH, ACCUMULATE, PASSES = 32, 8, 60


class Digits(LightningModule):
    """A small convolutional network without dropout or batch normalization."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(x, torch.tensor(labels))


def over_all_samples(module: Digits) -> tuple[float, float]:
    """|G|² and tr Σ from every per-sample gradient, without bias."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(module.net, weights, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    weights = {name: p.detach() for name, p in module.net.named_parameters()}
    found = vmap(grad(loss), (None, 0, 0))(weights, *digits().tensors)
    gradients = torch.cat([g.flatten(1) for g in found.values()], dim=1).double()
    n = len(gradients)
    squares, mean = gradients.square().sum().item(), gradients.mean(0).square().sum().item()
    return (n**2 * mean - squares) / (n * (n - 1)), (squares - n * mean) / (n - 1)


Measured = tuple[NoiseScale, tuple[float, float]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """The estimate and the truth after one epoch of training."""
    noise = GradientNoiseScale(1, smoothing=1)
    module = Digits(lr=0.1)
    train = DataLoader(digits(), batch_size=32, shuffle=True)
    fit(module=module, train=train, max_epochs=1, accumulate_grad_batches=1)
    module.lr = 0.0
    frozen = DataLoader(digits(), batch_size=MICRO_BATCH, shuffle=True, drop_last=True)
    fit(
        [noise],
        module=module,
        train=frozen,
        max_epochs=PASSES,
        accumulate_grad_batches=ACCUMULATE,
    )
    return noise.estimate(), over_all_samples(module)


def test_enough_was_measured_for_a_verdict(measured: Measured) -> None:
    estimate, _ = measured
    assert estimate.value < 1.1 * estimate.low
    assert estimate.high < 1.1 * estimate.value


def test_the_noise_scale_is_that_of_all_samples(measured: Measured) -> None:
    estimate, (sq_norm, trace) = measured
    assert estimate.value == pytest.approx(trace / sq_norm, rel=0.1)


def test_the_gradients_square_is_that_of_all_samples(measured: Measured) -> None:
    estimate, (sq_norm, _) = measured
    assert estimate.grad_sq_norm == pytest.approx(sq_norm, rel=0.1)


def test_the_trace_is_that_of_all_samples(measured: Measured) -> None:
    estimate, (_, trace) = measured
    assert estimate.grad_trace == pytest.approx(trace, rel=0.1)
