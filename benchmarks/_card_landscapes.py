"""Figures of curvature: what SAM makes of it, and how it depends on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext import functional, scaling
from lightning_ext.callbacks import SharpnessAware

Figures = Iterator[tuple[str, str, float]]


class Sine(LightningModule):
    """A net 6-16-1 that SGD fits to noisy samples of a sine."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def loss(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        loss: Tensor = (functional_call(self.net, weights, (x,)) - y).square().mean()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(dict(self.net.named_parameters()), *batch)

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


def waves(count: int) -> tuple[Tensor, Tensor]:
    """Noisy samples."""
    x = torch.randn(count, 6, dtype=torch.float64)
    return x, x.sum(1, keepdim=True).sin() + 0.1 * torch.randn(count, 1, dtype=torch.float64)


def sharpest(module: Sine, x: Tensor, y: Tensor) -> float:
    """The largest eigenvalue of the Hessian."""
    weights = {name: p.detach() for name, p in module.net.named_parameters()}
    blocks = jacrev(jacrev(module.loss))(weights, x, y)
    sizes = [p.numel() for p in weights.values()]
    rows = []
    for row, m in zip(blocks.values(), sizes, strict=True):
        cut = [b.reshape(m, n) for b, n in zip(row.values(), sizes, strict=True)]
        rows.append(torch.cat(cut, 1))
    return float(torch.linalg.eigvalsh(torch.cat(rows)).max())


def sharpness_aware() -> Figures:
    """Eigenvalue, training loss and error on new samples, over those without SAM; 600 steps."""
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    for seed in range(5):
        torch.manual_seed(100 + seed)
        (x, y), new = waves(64), waves(1000)
        found = []
        for rho in (0.0, 0.05, 0.2):
            module, data = Sine(seed), DataLoader(TensorDataset(x, y), 16)
            trainer = Trainer(max_epochs=150, callbacks=[SharpnessAware(rho)], **options)
            trainer.fit(module, data)
            weights = {name: p.detach() for name, p in module.net.named_parameters()}
            losses = [module.loss(weights, *pair).item() for pair in ((x, y), new)]
            found.append([sharpest(module, x, y), *losses])
        for rho, values in zip((0.05, 0.2), found[1:], strict=True):
            names = ("largest eigenvalue", "training loss", "loss of new samples")
            for name, value, plain in zip(names, values, found[0], strict=True):
                yield f"{name}, over that without", f"rho {rho}, seed {seed}", value / plain


class Digits:
    """Two layers, trained on images of digits for a while."""

    def __init__(self, width: int, steps: int) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images / 8 - 1).float(), torch.tensor(labels)
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.parameters = list(self.net.parameters())
        descent = torch.optim.SGD(self.parameters, lr=0.1)
        for _ in range(steps):
            descent.zero_grad()
            self.loss(32).backward()
            descent.step()

    def loss(self, batch: int) -> Tensor:
        """Of a random batch."""
        rows = torch.randint(len(self.labels), (batch,))
        return nn.functional.cross_entropy(self.net(self.images[rows]), self.labels[rows])

    def largest(self, batch: int) -> float:
        """The largest eigenvalue of a random batch's Hessian."""
        gradient = torch.autograd.grad(self.loss(batch), self.parameters, create_graph=True)
        sizes = [p.numel() for p in self.parameters]

        def product(vector: Tensor) -> Tensor:
            cut = zip(vector.split(sizes), self.parameters, strict=True)
            along = [v.view_as(p) for v, p in cut]
            found = torch.autograd.grad(gradient, self.parameters, along, retain_graph=True)
            return torch.cat([x.flatten() for x in found])

        values, _, _ = functional.ritz_values(
            *functional.lanczos(product, torch.randn(sum(sizes)), 12)
        )
        return float(values[-1])


def curvature() -> Figures:
    """Mean eigenvalues of random batches, and the law fitted to batches of 16 and 64."""
    counts = {1: 60, 4: 60, 16: 40, 64: 20, 256: 10}
    for width, steps in ((32, 100), (32, 600), (256, 300)):
        digits, setting = Digits(width, steps), f"{width} wide, {steps} steps"
        found = {b: [digits.largest(b) for _ in range(n)] for b, n in counts.items()}
        law = scaling.fit_batch_curvature([(b, mean(found[b])) for b in (16, 64)])
        for b, values in found.items():
            yield f"mean eigenvalue, batch {b}", setting, mean(values)
            yield f"its standard error, batch {b}", setting, stdev(values) / len(values) ** 0.5
            predicted = scaling.batch_curvature(b, largest=law.largest, saturation=law.saturation)
            yield f"the law, batch {b}", setting, predicted
        yield "saturation batch", setting, law.saturation


CARDS = {"sharpness_aware": sharpness_aware, "curvature": curvature}
