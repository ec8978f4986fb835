"""What AdaptiveBatchSize offers to rules, and what it makes of their answers."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
import torch
from harness import Classifier, fit, identical, loader, run_distributed
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LambdaLR

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.optim import PowerScheduler, SampleCosine, SampleSchedule
from lightning_ext.scaling import Observation, Proposal


@dataclass
class Note:
    """Keeps what it was shown, and proposes what a test wants."""

    needs: frozenset[str] = frozenset()
    target: float = 8.0
    damps_lr: bool = False
    seen: list[Observation] = field(default_factory=list)

    def propose(self, observation: Observation) -> Proposal:
        self.seen.append(observation)
        return Proposal(self.target, float(len(self.seen)), "as told")


def noted(*needs: str, target: float = 8.0, **kwargs: Any) -> tuple[Note, Any, AdaptiveBatchSize]:
    rule = Note(frozenset(needs), target)
    options = {"max_global_batch": 64, "dwell_samples": 0}
    batch = AdaptiveBatchSize(rule, **options | kwargs.pop("options", {}))
    module, _ = fit([batch], **kwargs)
    return rule, module, batch


def test_the_loss_is_the_mean_over_samples_with_a_memory_in_samples() -> None:
    rule, module, _ = noted("loss", max_epochs=1, train=loader(24))
    kept, total, weight = 0.5 ** (8 / (32 * 8)), 0.0, 0.0
    for step, seen in enumerate(rule.seen):
        total = total * kept + 4 * sum(module.losses[2 * step : 2 * step + 2])
        weight = weight * kept + 8
        assert seen.loss == pytest.approx(total / weight, rel=1e-6)
        assert seen.first_loss == pytest.approx(sum(module.losses[:2]) / 2, rel=1e-6)
    assert len(rule.seen) == 3


class Broken(Classifier):
    """Its second batch has no finite loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 1 else loss


def test_a_loss_that_is_not_finite_is_left_out_and_no_sample_is_lost() -> None:
    rule, module, batch = noted("loss", "noise", max_epochs=1, train=loader(24), module=Broken())
    assert batch.samples_seen == 24
    assert all(math.isfinite(seen.loss or 0) for seen in rule.seen)
    assert sorted(chain(*module.seen)) == list(range(24))


def _mean_loss() -> list[float | None]:
    torch.set_default_dtype(torch.float64)
    ranks = int(os.environ["WORLD_SIZE"])
    rule, _, _ = noted(
        *("loss",),
        module=Classifier("sgd", dropout=0.0),
        train=loader(48, shuffle=False, dtype=torch.float64),
        accumulate_grad_batches=2 // ranks,
        strategy="ddp",
        devices=ranks,
    )
    return [seen.loss for seen in rule.seen]


def test_two_processes_see_the_loss_of_one() -> None:
    # Not forked: what other tests leave of Lightning's patches of DataLoader would be inherited.
    alone = run_distributed(_mean_loss, 1, start_method="spawn")[0]
    for together in run_distributed(_mean_loss, 2, start_method="spawn"):
        assert together == pytest.approx(alone, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The global batch may change, and with interval")
def test_the_decay_of_the_schedule_ignores_its_warm_up() -> None:
    factors = [0.25, 0.5, 1.0, 1.0, 0.5, 0.25, 0.25]
    module = Classifier(
        schedulers=lambda optimizer: {
            "scheduler": LambdaLR(optimizer, lambda step: factors[min(step, 6)]),
            "interval": "step",
        }
    )
    rule, _, _ = noted("lr_decay", module=module, max_epochs=1, train=loader(48))
    assert [seen.lr_decay for seen in rule.seen] == [1, 1, 1, 0.5, 0.25, 0.25]  # of the next step


def test_the_time_of_a_step_is_predicted_from_those_that_were_taken() -> None:
    rule, _, _ = noted("step_seconds", max_epochs=1, train=loader(96))
    assert len(rule.seen) == 12 - 3  # the first has no beginning, the next two are not steady
    predict = rule.seen[-1].step_seconds
    assert predict is not None
    assert 0 < predict(8) < 1
    assert predict(32) >= predict(8)


def test_a_rule_hears_where_the_run_stands() -> None:
    rule, _, _ = noted("loss", options={"max_samples": 32, "tokens_per_sample": 3})
    assert rule.seen[1].samples_seen == 16
    assert rule.seen[1].tokens_seen == 48
    assert (rule.seen[1].total_samples, rule.seen[1].reference_batch) == (32, 8)
    assert rule.seen[1].max_global_batch == 64


def by_steps(optimizer: Any) -> Any:
    return {"scheduler": LambdaLR(optimizer, lambda step: 0.9**step), "interval": "step"}


def test_a_schedule_by_steps_is_named_where_the_batch_may_change() -> None:
    with pytest.warns(UserWarning, match="LambdaLR → SampleSchedule"):
        fit([AdaptiveBatchSize("0:8 16:16")], module=Classifier(schedulers=by_steps))
    fit([AdaptiveBatchSize("0:16")], module=Classifier(schedulers=by_steps))


def by_power(optimizer: Any) -> Any:
    schedule = PowerScheduler(optimizer, tokens_per_sample=1, samples_per_step=8)
    return {"scheduler": schedule, "interval": "step"}


def test_a_schedule_that_knows_the_batch_is_refused_a_rule_that_multiplies_again() -> None:
    module = Classifier("unit", schedulers=by_power)
    with pytest.raises(MisconfigurationException, match="PowerScheduler makes the learning rate"):
        fit([AdaptiveBatchSize("0:16", lr_rule="sde")], module=module)
    _, run = fit([AdaptiveBatchSize("0:16", lr_rule="constant")], module=module, max_epochs=1)
    assert run.callback_metrics["lr_scaled"] == run.optimizers[0].param_groups[0]["lr"]


def test_an_unknown_need_is_refused_with_what_there_is() -> None:
    batch = AdaptiveBatchSize(Note(frozenset({"entropy"})), max_global_batch=64)
    with pytest.raises(
        MisconfigurationException, match=r"needs entropy, which a run does not.*loss"
    ):
        fit([batch])


@pytest.mark.parametrize("needs", [(), ("noise",)])
def test_what_the_batch_cannot_reach_the_learning_rate_gives(needs: tuple[str, ...]) -> None:
    rule = Note(frozenset(needs), target=256.0, damps_lr=True)
    options: dict[str, Any] = {"dwell_samples": 0, "growth": 100, "lr_rule": "constant"}
    batch = AdaptiveBatchSize(rule, max_global_batch=64, **options)
    _, run = fit([batch, GradientNoiseScale(1)], train=loader(640), max_epochs=1)
    assert batch.global_batch == 64
    assert run.callback_metrics["lr_scaled"] == pytest.approx(1e-2 * 64 / 256)
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-2


def test_target_and_statistic_are_logged_and_a_change_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_ext"):
        rule = Note(frozenset({"loss"}), target=24.0)
        batch = AdaptiveBatchSize(rule, max_global_batch=64, dwell_samples=0)
        _, run = fit([batch], max_epochs=1)
    assert run.callback_metrics["target_batch"] == 24
    assert run.callback_metrics["statistic"] == len(rule.seen)
    assert "global batch 8 → 16 after 8 samples: as told" in caplog.text


@dataclass
class Settled(Note):
    """Says how hyper-parameters follow it."""

    lr_rule: str = "constant"


def test_a_rule_may_say_how_hyper_parameters_follow() -> None:
    rule = Settled(target=32.0)
    batch = AdaptiveBatchSize(rule, max_global_batch=64)
    _, run = fit([batch], max_epochs=1)
    assert run.callback_metrics["lr_scaled"] == pytest.approx(1e-2)
    assert AdaptiveBatchSize(rule, max_global_batch=64, lr_rule="sqrt").batch.rates.rule == "sqrt"


@pytest.mark.parametrize(("progress", "steps"), [("samples", 4), ("steps", 8)])
def test_the_budget_counts_samples_or_updates(progress: str, steps: int) -> None:
    options: dict[str, Any] = {"reference_batch": 8, "lr_rule": "sqrt", "progress": progress}
    batch = AdaptiveBatchSize("0:16", max_samples=64, **options)
    _, run = fit([batch], max_epochs=-1)
    assert run.global_step == steps
    assert batch.samples_seen == 16 * steps


def test_under_adascale_a_step_counts_by_its_gain() -> None:
    noise = GradientNoiseScale(1)
    options: dict[str, Any] = {"reference_batch": 8, "lr_rule": "adascale"}
    batch = AdaptiveBatchSize("0:32", max_samples=200, **options)
    _, run = fit([noise, batch], module=Classifier("sgd"), max_epochs=-1)
    assert batch.batch.rates.gain < 4
    assert run.global_step > 200 / 32
    assert batch.samples_seen > batch.batch.progress.reference_samples >= 200


def by_cosine(optimizer: Any) -> Any:
    schedule = SampleCosine(optimizer, total_samples=400, samples_per_step=8)
    return {"scheduler": schedule, "interval": "step"}


def test_seesaw_counts_from_the_first_learning_rate_and_needs_a_schedule() -> None:
    def halving(optimizer: Any) -> Any:
        schedule = SampleSchedule(optimizer, lambda s: 0.5 ** (s / 96), samples_per_step=8)
        return {"scheduler": schedule, "interval": "step"}

    batch = AdaptiveBatchSize("seesaw", max_global_batch=64)
    fit([batch], module=Classifier(schedulers=halving), max_epochs=2)
    assert batch.batch.last_change == 96  # half of the first, not of the second
    assert batch.global_batch == 16
    with pytest.raises(MisconfigurationException, match=r"follows the decay.*there is none"):
        fit([AdaptiveBatchSize("seesaw", max_global_batch=64)])


class Steep(Classifier):
    """Nearly all of its gradient is the same for every sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 50 * self.net[3].bias.sum()


def test_the_first_step_past_the_noise_scale_is_clamped_already() -> None:
    noise = GradientNoiseScale(1)
    batch = AdaptiveBatchSize("0:8 96:96", max_micro_batch=48, lr_rule="linear")
    rates = []

    class Note(Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            if batch.global_batch == 96 and "lr_scaled" in run.callback_metrics:
                rates.append(run.callback_metrics["lr_scaled"].item())

    with pytest.warns(UserWarning, match="above the noise scale"):
        fit([noise, batch, Note()], module=Steep("sgd", dropout=0.0), max_epochs=3)
    assert noise.estimate().high < 8
    assert rates == [pytest.approx(0.1)] * 4


def test_a_gain_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="progress='gain' is AdaScale's"):
        AdaptiveBatchSize("0:8", lr_rule="sqrt", progress="gain")


def test_percents_of_updates_are_refused() -> None:
    batch = AdaptiveBatchSize("0:8 50%:16", max_samples=96, progress="steps")
    with pytest.raises(MisconfigurationException, match="in percent counts samples"):
        fit([batch])


def _with_another_rule() -> str:
    rule = ("sde", "linear")[int(os.environ["RANK"])]
    try:
        fit([AdaptiveBatchSize("0:16", lr_rule=rule)], strategy="ddp", devices=2)
    except MisconfigurationException as error:
        return str(error)
    return "trained"


def test_ranks_with_other_settings_are_refused() -> None:
    for message in run_distributed(_with_another_rule, 2):
        assert "Ranks disagree about lr_rule (here " in message


def test_everything_that_a_rule_reads_survives_a_checkpoint(tmp_path: Any) -> None:
    def run(ckpt_path: Any = None) -> Any:
        rule = Note(frozenset({"loss", "noise", "lr_decay"}), target=16.0)
        options: dict[str, Any] = {"dwell_samples": 24, "lr_rule": "surge"}
        batch = AdaptiveBatchSize(rule, max_global_batch=64, **options)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        module = Classifier(schedulers=by_cosine)
        checkpoint: dict[str, Any] = {"ckpt_path": ckpt_path, "enable_checkpointing": True}
        fit([batch, GradientNoiseScale(1), keep], module=module, **checkpoint)
        return rule.seen, batch.state_dict()

    seen, state = run()
    again, state_again = run(tmp_path / "step=6.ckpt")
    assert again == seen[-len(again) :]
    assert identical(state, state_again)


def _with_data_of_another_length() -> str:
    batch = AdaptiveBatchSize("0:16", max_global_batch=64)
    rank = int(os.environ["RANK"])
    try:
        fit([batch], train=loader(96 - 8 * rank), strategy="ddp", devices=2)
    except MisconfigurationException as error:
        return str(error)
    return "trained"


def test_a_rank_with_other_data_is_refused_on_every_rank() -> None:
    for message in run_distributed(_with_data_of_another_length, 2):
        assert "Ranks disagree about the number of samples (here " in message
