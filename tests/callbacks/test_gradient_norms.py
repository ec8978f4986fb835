"""GradientNormRecorder: what it records, when it refuses, and the schedule that it makes."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, dataset, fit, identical, loader, run_distributed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNormRecorder
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import RefinedSchedule
from lightning_ext.scaling import FactorTable, refined_factors


class Gradients(Callback):
    """Keeps both norms of every step, from the gradients themselves."""

    def __init__(self) -> None:
        self.norms: dict[str, list[float]] = {"l1": [], "l2": []}

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        whole = torch.cat([p.grad.flatten() for p in module.parameters()])
        self.norms["l1"].append(whole.abs().sum().item())
        self.norms["l2"].append(whole.norm().item())


class Noted(Classifier):
    """With a learning rate that does not move it and no dropout: every epoch is the same."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__("sgd", dropout=0.0)
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.0))
        self.double()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def recorded(recorder: GradientNormRecorder) -> list[list[float]]:
    """Norm and global batch of every step."""
    found: list[list[float]] = recorder.state_dict()["history"].tolist()
    return found


def norms_of(recorder: GradientNormRecorder) -> list[float]:
    return [norm for norm, _ in recorded(recorder)]


def doubles(**kwargs: Any) -> DataLoader[Any]:
    return loader(dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_it_records_the_norm_of_every_steps_whole_gradient(norm: Any) -> None:
    recorder, gradients = GradientNormRecorder(norm=norm), Gradients()
    fit([recorder, gradients], module=Noted(), train=doubles())
    assert norms_of(recorder) == pytest.approx(gradients.norms[norm], rel=1e-14)
    assert len(norms_of(recorder)) == 24
    assert {batch for _, batch in recorded(recorder)} == {8}


def test_the_gradient_is_the_mean_over_the_accumulated_batches() -> None:
    whole, parts = GradientNormRecorder(), GradientNormRecorder()
    fit([whole], module=Noted(), train=doubles(batch_size=8, shuffle=False), max_epochs=1,
        accumulate_grad_batches=1)  # fmt: skip
    fit([parts], module=Noted(), train=doubles(batch_size=4, shuffle=False), max_epochs=1)
    assert norms_of(parts) == pytest.approx(norms_of(whole), rel=1e-12)


def test_it_records_before_clipping() -> None:
    free, clipped = GradientNormRecorder(), GradientNormRecorder()
    for recorder, limit in ((free, None), (clipped, 1e-3)):
        fit([recorder], module=Noted(), train=doubles(), gradient_clip_val=limit)
    assert norms_of(clipped) == norms_of(free)
    assert min(norms_of(free)) > 1e-2


class ScaledOnly(MixedPrecision):
    """A gradient scaler without autocast: a factor 65536, which is exact."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    def autocast_context_manager(self) -> Any:
        return contextlib.nullcontext()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_scalers_factor_is_undone(norm: Any, fused: bool) -> None:
    plain, scaled = GradientNormRecorder(norm=norm), GradientNormRecorder(norm=norm)
    for recorder, plugins in ((plain, None), (scaled, ScaledOnly())):
        module = Noted(lambda p: torch.optim.SGD(p, lr=0.0, fused=fused))
        fit([recorder], module=module, train=doubles(), plugins=plugins)
    assert norms_of(scaled) == pytest.approx(norms_of(plain), rel=1e-14)


class Overflowing(Noted):
    """Its third step overflows, and the gradient scaler skips it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if len(self.seen) == 5 else loss


def test_a_step_that_is_not_finite_is_left_out_and_its_samples_counted() -> None:
    recorder = GradientNormRecorder()
    fit([recorder], module=Overflowing(), train=doubles(), plugins=ScaledOnly(), max_steps=10)
    table = recorder.schedule()
    assert len(recorded(recorder)) == 10
    assert table.samples == (0, 8, 24, 32, 40, 48, 56, 64, 72)
    finite = [norm for norm in norms_of(recorder) if math.isfinite(norm)]
    assert list(table.factors) == refined_factors(finite)


def test_the_table_has_the_factor_of_each_step_at_the_samples_seen_before_it() -> None:
    recorder = GradientNormRecorder(norm="l1")
    fit([recorder], train=loader())
    norms = norms_of(recorder)
    assert recorder.schedule() == FactorTable(
        tuple(range(0, 192, 8)), tuple(refined_factors(norms, norm="l1")), 8
    )
    assert recorder.schedule(width=0.5).factors == tuple(
        refined_factors(norms, norm="l1", width=0.5)
    )


@pytest.mark.parametrize(
    ("optimizer", "norm"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "l2"),
        (lambda p: torch.optim.AdamW(p), "l1"),
        (lambda p: torch.optim.NAdam(p), "l1"),
        (lambda p: torch.optim.RMSprop(p), "l1"),
        (lambda p: torch.optim.Adagrad(p), "l1"),
    ],
    ids=["SGD", "AdamW", "NAdam", "RMSprop", "Adagrad"],
)
def test_auto_takes_the_norm_that_belongs_to_the_optimizer(optimizer: Any, norm: str) -> None:
    recorder = GradientNormRecorder()
    fit([recorder], module=Noted(optimizer), train=doubles(), max_steps=2)
    assert recorder.state_dict()["norm"] == norm


class Strange(torch.optim.Optimizer):
    """Of no known family."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        """Moves nothing."""
        return None if closure is None else closure()


def test_auto_refuses_an_optimizer_that_it_does_not_know() -> None:
    with pytest.raises(MisconfigurationException, match=r"norm='auto' does not know Strange"):
        fit([GradientNormRecorder()], module=Noted(Strange), train=doubles())
    recorder = GradientNormRecorder(norm="l2")
    fit([recorder], module=Noted(Strange), train=doubles(), max_steps=2)
    assert len(recorded(recorder)) == 2


def test_more_steps_than_wait_on_the_device_are_recorded_in_order() -> None:
    recorder, gradients = GradientNormRecorder(), Gradients()
    fit([recorder, gradients], module=Noted(), train=doubles(batch_size=1), max_epochs=6)
    assert norms_of(recorder) == pytest.approx(gradients.norms["l2"], rel=1e-14)
    assert len(recorder._pending) == 0
    assert len(norms_of(recorder)) == 288


def test_a_change_of_the_batch_is_refused_with_the_reason() -> None:
    recorder = GradientNormRecorder()
    fit([AdaptiveBatchSize("0:8 40:16"), recorder])
    with pytest.raises(ValueError, match=r"the global batch changed.*\|G\|² \+ S/B"):
        recorder.schedule()


def test_with_a_path_the_first_change_warns_once_and_nothing_is_written(tmp_path: Path) -> None:
    recorder = GradientNormRecorder(tmp_path / "table.json")
    with pytest.warns(UserWarning, match="had 8 samples, this one has 16") as caught:
        fit([AdaptiveBatchSize("0:8 40:16 80:32"), recorder])
    assert len([w for w in caught if "GradientNormRecorder" in str(w.message)]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_shorter_step_at_the_end_of_an_epoch_is_no_change(adaptive: bool, tmp_path: Path) -> None:
    recorder = GradientNormRecorder(tmp_path / "table.json")
    fit([*([AdaptiveBatchSize("0:8")] if adaptive else []), recorder], train=loader(50))
    assert recorder.schedule().global_batch == 8
    assert len(recorded(recorder)) == 14


def test_the_table_of_a_run_is_the_schedule_of_the_next(tmp_path: Path) -> None:
    recorder = GradientNormRecorder(tmp_path / "new" / "table.json")
    fit([recorder], module=Classifier("sgd"))
    assert json.loads((tmp_path / "new" / "table.json").read_text())["global_batch"] == 8
    used: list[float] = []

    class Note(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    def refined(optimizer: Any) -> Any:
        schedule = RefinedSchedule.from_file(
            optimizer, tmp_path / "new" / "table.json", samples_per_step=8
        )
        return {"scheduler": schedule, "interval": "step"}

    fit([Note()], module=Classifier("sgd", schedulers=refined))
    factors = recorder.schedule().factors
    assert used == pytest.approx([0.1 * factor for factor in factors], abs=1e-15)
    assert max(factors) == 1
    assert factors[-1] == 0


def test_a_run_of_one_step_warns_and_writes_nothing(tmp_path: Path) -> None:
    recorder = GradientNormRecorder(tmp_path / "table.json")
    with pytest.warns(UserWarning, match="1 steps had a gradient"):
        fit([recorder], max_steps=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="1 gradient norms were given"):
        recorder.schedule()


def test_another_module_begins_anew() -> None:
    again, fresh = GradientNormRecorder(), GradientNormRecorder()
    fit([again], module=Noted(), train=doubles(), max_steps=3)
    fit([again], module=Noted(), train=doubles(), max_steps=5)
    fit([fresh], module=Noted(), train=doubles(), max_steps=5)
    assert identical(again.state_dict(), fresh.state_dict())


def test_a_checkpoint_of_the_other_norm_is_refused(tmp_path: Path) -> None:
    def run(optimizer: str, **kwargs: Any) -> Trainer:
        return fit([GradientNormRecorder()], module=Classifier(optimizer), **kwargs)[1]

    run("sgd", max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (own,) = checkpoint["callbacks"].values()
    own["norm"] = "l1"
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(MisconfigurationException, match="The checkpoint holds l1 norms"):
        run("sgd", ckpt_path=str(tmp_path / "b.ckpt"))


def test_manual_optimization_is_refused() -> None:
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization is False"):
        fit([GradientNormRecorder()], module=module, accumulate_grad_batches=1)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm was 'linf'"):
        GradientNormRecorder(norm="linf")


def record(processes: int) -> list[list[float]]:
    data = dataset(96, torch.float64)
    recorder = GradientNormRecorder(norm="l2")
    fit(
        [recorder, AdaptiveBatchSize("0:16")],
        module=Classifier("adamw", dropout=0).double(),
        train=DataLoader(data, batch_sampler=AdaptiveBatchSampler(SequentialSampler(data), 4)),
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        accumulate_grad_batches=4 // processes,
        max_epochs=1,
    )
    return recorded(recorder)


def test_every_rank_records_the_gradient_of_all() -> None:
    expected = record(1)
    for found in run_distributed(record, args=(2,)):
        assert [batch for _, batch in found] == [16] * 6
        assert [norm for norm, _ in found] == pytest.approx([g for g, _ in expected], rel=1e-12)
