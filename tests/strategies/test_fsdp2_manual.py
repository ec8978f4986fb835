"""Manual optimization: several optimizers, and gradients within a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.fsdp2_parts import by_fsdp2, by_one
from harness.mixed_module import WORDS, Layer
from harness.strategy_cases import Weights, distance
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn


class Net(nn.Module):
    """Repeated layers behind another one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, 6)
        self.layers = nn.ModuleList(Layer(6, ()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Adversaries(LightningModule):
    """A generator and a critic, and a parameter that is in neither."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.generator, self.critic = Net(4), nn.Sequential(Net(6), nn.Linear(6, 1))
        self.shift = nn.Parameter(torch.zeros(6))
        self.accumulate = accumulate
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Each is stepped in turn; the last graph reaches through both."""
        optimizers: Any = self.optimizers()
        x = batch[0].double() / WORDS
        due = (batch_idx + 1) % self.accumulate == 0
        for index, optimizer in enumerate(optimizers):
            self.toggle_optimizer(optimizer)
            made = self.generator(x) + self.shift
            loss = self.critic(made if index == 0 else made.detach() * 2).square().mean()
            self.manual_backward(loss / self.accumulate)
            if due:
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        """One for each."""
        first = [*self.generator.parameters(), self.shift]
        return [
            torch.optim.SGD(first, lr=0.1, momentum=0.9),
            torch.optim.AdamW(self.critic.parameters(), lr=0.01),
        ]


class Whole(Adversaries):
    """Everything is in one network."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__(accumulate)
        self.net = nn.ModuleDict({"g": self.generator, "c": self.critic})
        del self.generator, self.critic

    def __getattr__(self, name: str) -> Any:
        if name in ("generator", "critic") and "net" in self._modules:
            return self.net[name[0]]
        return super().__getattr__(name)


def trained_on_ranks(kind: type[Adversaries], accumulate: int, wrap: Any) -> Weights:
    how = {"wrap": wrap}
    settings = {"accumulate_grad_batches": 1}
    return by_fsdp2(kind(accumulate), 12, how=how, **settings).weights


@pytest.mark.parametrize(
    ("kind", "accumulate", "wrap"),
    [
        (Adversaries, 1, "transformer_layers"),
        (Adversaries, 2, None),
        (Whole, 1, None),
        (Whole, 2, "transformer_layers"),
        pytest.param(Adversaries, 1, None, marks=pytest.mark.slow),
        pytest.param(Adversaries, 2, "transformer_layers", marks=pytest.mark.slow),
        pytest.param(Whole, 1, "transformer_layers", marks=pytest.mark.slow),
        pytest.param(Whole, 2, None, marks=pytest.mark.slow),
    ],
)
def test_two_optimizers_train_as_in_one_process(
    kind: type[Adversaries], accumulate: int, wrap: Any
) -> None:
    truth = by_one(kind(accumulate), 12, accumulate_grad_batches=1).weights
    for found in run_distributed(trained_on_ranks, args=(kind, accumulate, wrap)):
        assert distance(found, truth) <= 1e-12


class Pieces(Adversaries):
    """Calls what is in its generator, and not the generator."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step."""
        x = batch[0].double() / WORDS
        self.manual_backward(self.generator.first(x).square().mean())


def test_a_part_called_past_its_root_is_refused_as_it_would_not_train() -> None:
    ends = run_distributed(trained_on_ranks, args=(Pieces, 1, None), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    assert all("generator.first was called outside of generator" in str(end) for end in ends)


class Own(Pieces):
    """Such as are units by themselves."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step."""
        optimizer, _ = self.optimizers()
        super().training_step(batch, batch_idx)
        optimizer.step()
        optimizer.zero_grad()


def test_a_unit_may_be_called_past_its_root() -> None:
    truth = by_one(Own(), 12, accumulate_grad_batches=1).weights
    for found in run_distributed(trained_on_ranks, args=(Own, 1, [nn.Linear])):
        assert distance(found, truth) <= 1e-12


class Raw(Adversaries):
    """Steps the optimizer itself, past Lightning, and looks before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step."""
        optimizer, _ = self.optimizers(use_pl_optimizer=False)
        x = torch.ones(1, 4, dtype=torch.float64)
        optimizer.zero_grad()
        self.manual_backward(self.generator(x).square().mean())
        self.look(x)
        optimizer.step()
        self.look(x)

    def look(self, x: Tensor) -> None:
        with torch.no_grad():
            self.seen.append(self.generator(x))


def looks(how: dict[str, Any]) -> list[Tensor]:
    module = Raw()
    settings = {"accumulate_grad_batches": 1, "limit_train_batches": 2, "max_epochs": 1}
    by_fsdp2(module, -1, how=how, **settings)
    return module.seen


@pytest.mark.parametrize("how", [{}, {"reshard_after_forward": False}], ids=str)
def test_no_weights_stay_gathered_over_a_step_past_lightning(how: dict[str, Any]) -> None:
    module = Raw()
    by_one(module, -1, accumulate_grad_batches=1, limit_train_batches=2, max_epochs=1)
    for found in run_distributed(looks, args=(how,)):
        pairs = zip(found, module.seen, strict=True)
        assert all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in pairs)
