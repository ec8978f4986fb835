from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.optimizer_parts import LossTrend
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.callbacks import PolyakLoss
from lightning_ext.optim import MKOR, MKORH, PolyakSGD


def trend_of(means: list[float], threshold: float = 0.1, decay: float = 0.5) -> LossTrend:
    trend = LossTrend()
    for mean in means:
        trend.add(3 * mean, 3)
        trend.close_window(threshold, decay)
    return trend


def test_the_rate_is_an_average_of_falls_without_bias() -> None:
    trend = trend_of([8.0, 4.0, 3.0])  # falls by 4 and 1: (4/4 + 1/2)/(3/4)
    assert trend.rate / (1 - 0.5**2) == pytest.approx(2.0)
    assert trend.best == 4.0


def test_it_is_over_where_the_rate_is_below_a_share_of_the_best() -> None:
    falling = [8.0, 4.0, 3.0, 2.9, 2.89, 2.889]
    assert [trend_of(falling[:n]).over for n in range(1, 7)] == [0, 0, 0, 0, 0, 1]


def test_there_is_no_verdict_before_the_average_has_settled() -> None:
    assert trend_of([8.0, 4.0, 9.0, 9.0], decay=0.9).over == 0
    assert trend_of([8.0, 4.0, 9.0, 9.0], decay=0.5).over == 1


def test_losses_that_are_not_finite_do_not_count() -> None:
    trend = LossTrend()
    for loss in (1.0, math.nan, math.inf, 2.0):
        trend.add(loss)
    assert (trend.total, trend.count) == (3.0, 2.0)


def test_all_of_a_trend_is_saved() -> None:
    trend = trend_of([8.0, 4.0, 3.0, 2.9, 2.89, 2.889, 2.0])
    trend.add(5.0)
    assert LossTrend.load(trend.save()) == trend


def problem() -> tuple[nn.Module, MKORH]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    base = torch.optim.SGD(module.parameters(), lr=0.05)
    return module, MKORH(base, module, every_n_steps=2, hybrid_threshold=0.5, hybrid_decay=0.5)


def take(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        return loss.detach()

    found = optimizer.step(closure)
    assert found is not None
    return float(found)


def test_it_goes_over_to_its_base_for_good() -> None:
    module, optimizer = problem()
    seen = []
    for _ in range(60):
        take(module, optimizer)
        seen.append(optimizer.is_first_order)
    assert seen == sorted(seen)
    assert not seen[0]
    assert seen[-1]


def test_after_that_it_is_its_base_to_the_bit() -> None:
    module, optimizer = problem()
    while not optimizer.is_first_order:
        take(module, optimizer)
    twin, _ = problem()
    twin.load_state_dict(module.state_dict())
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(5):
        take(module, optimizer)
        take(twin, plain)
    pairs = zip(module.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def stepped(module: nn.Module, optimizer: MKORH, *, added: int = 0, scale: float = 1.0) -> None:
    """A step without a closure, whose loss is added in equal parts."""
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)
    optimizer.zero_grad()
    loss = module(x).square().mean()
    loss.backward()
    for _ in range(added):
        optimizer.add_loss(scale * loss / added)
    optimizer.step()


def test_added_losses_do_what_a_closures_does() -> None:
    module, optimizer = problem()
    twin, other = problem()
    for _ in range(60):
        take(module, optimizer)
        stepped(twin, other, added=2)
        assert other._trend.total == pytest.approx(optimizer._trend.total)
        assert other.is_first_order == optimizer.is_first_order
    assert optimizer.is_first_order


def test_an_added_loss_goes_before_the_closures() -> None:
    module, optimizer = problem()
    take(module, optimizer)  # the first step is a window of its own
    optimizer.add_loss(torch.tensor(3.0))
    optimizer.step(lambda: 5.0)
    assert optimizer._trend.total == 3.0


def test_an_added_loss_is_forgotten_by_a_step_and_by_zero_grad() -> None:
    module, optimizer = problem()
    stepped(module, optimizer, added=1)
    optimizer.add_loss(7.0)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer._trend.count == 0


def test_a_base_gets_the_added_loss_too() -> None:
    module = nn.Linear(2, 1)
    base = PolyakSGD(module.parameters())
    optimizer = MKORH(base, module)
    module(torch.ones(1, 2)).square().sum().backward()
    optimizer.add_loss(2.0)
    optimizer.step()
    assert len(base.rates) == 1


def test_hooks_of_a_step_run_once() -> None:
    module, optimizer = problem()
    MKOR(torch.optim.SGD(module.parameters()), module)  # torch then has put hooks around its step
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    take(module, optimizer)
    assert len(calls) == 1


def test_none_is_no_loss() -> None:
    module, optimizer = problem()
    for _ in range(5):
        assert optimizer.step(lambda: None) is None
    for _ in range(5):
        take(module, optimizer)
    assert optimizer._trend.last > 0


def test_without_any_loss_it_says_what_is_missing() -> None:
    module, optimizer = problem()
    stepped(module, optimizer)
    stepped(module, optimizer)
    with pytest.raises(RuntimeError, match=r"add_loss.*PolyakLoss\(\)"):
        stepped(module, optimizer)


def test_it_has_all_settings_of_mkor_and_two_of_its_own() -> None:
    plain, own = (inspect.signature(x.__init__).parameters for x in (MKOR, MKORH))
    assert [*plain, "hybrid_threshold", "hybrid_decay"] == list(own)
    assert all(own[name] == plain[name] for name in plain)


@pytest.mark.parametrize("how", [{"hybrid_threshold": 1.0}, {"hybrid_decay": 1.0}])
def test_its_settings_out_of_range_are_refused(how: dict[str, float]) -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="must lie in"):
        MKORH(torch.optim.SGD(module.parameters(), lr=0.1), module, **how)


def test_a_setting_that_is_no_number_is_refused() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="hybrid_decay='x'"):
        MKORH(torch.optim.SGD(module.parameters()), module, hybrid_decay="x")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.optimizer = problem()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> MKORH:
        return self.optimizer


class Sparing(Module):
    """Has no loss for every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % 2 == 0:
            return None
        return super().training_step(batch, batch_idx)


def fit(module: Module, path: Path, **how: Any) -> MKORH:
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=path,
        **how,
    )
    size = 8 // how.get("accumulate_grad_batches", 1)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=size))
    return module.optimizer


def test_a_trainer_hands_it_the_loss(tmp_path: Path) -> None:
    assert fit(Module(), tmp_path, max_epochs=40).is_first_order


def test_polyak_loss_hands_it_that_of_all_micro_batches(tmp_path: Path) -> None:
    module, optimizer = problem()
    take(module, optimizer)
    how = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": [PolyakLoss()]}
    assert fit(Module(), tmp_path, **how)._trend.last == pytest.approx(optimizer._trend.last)


def test_it_gets_the_loss_without_the_factor_of_a_gradient_scaler(tmp_path: Path) -> None:
    module, optimizer = problem()
    take(module, optimizer)
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    how: dict[str, Any] = {"max_epochs": 1, "plugins": [half], "callbacks": [PolyakLoss()]}
    found = fit(Module(), tmp_path, **how)._trend.last
    assert found == pytest.approx(optimizer._trend.last, rel=1e-2)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_without_a_loss_is_allowed(tmp_path: Path) -> None:
    assert fit(Sparing(), tmp_path, max_epochs=2, accumulate_grad_batches=2)._trend.last > 0
