"""Corners of AdaptiveBatchSize: foreign state, reloads, reuse, ranks that disagree."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Classifier, dataset, fit, loader, run_distributed, same_weights, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler

from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import SampleSchedule
from lightning_ext.scaling import Observation, Proposal


def test_the_state_of_a_foreign_optimizer_belongs_to_the_reference_batch(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=8)
    fit([saver], max_steps=8, max_epochs=-1, enable_checkpointing=True)
    adaptive = AdaptiveBatchSize("0:32", max_micro_batch=32, reference_batch=8)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        _, run = fit([adaptive], ckpt_path=tmp_path / "plain.ckpt", max_steps=9, max_epochs=-1)
    steps = {state["step"].item() for state in run.optimizers[0].state.values()}
    assert steps == {8 / 4 + 1}


def test_reloaded_loaders_keep_the_neutral_setting() -> None:
    settings = {"train": loader(50), "reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}
    ours, _ = fit([AdaptiveBatchSize("0:8", rescale_last_window=False)], **settings)
    plain, _ = fit([], **settings)
    assert same_weights(ours, plain)


def test_a_sampler_of_the_user_is_left_alone() -> None:
    sampler = AdaptiveBatchSampler(RandomSampler(dataset(20)), 4, seed=0)
    expected = AdaptiveBatchSampler(RandomSampler(dataset(20)), 4, seed=0)
    fit([AdaptiveBatchSize("0:8 8:16")], train=DataLoader(dataset(20), batch_sampler=sampler))
    assert [list(sampler) for _ in range(3)] == [list(expected) for _ in range(3)]
    assert sampler.batch_size == 4
    assert sampler.reference_batch is None


def test_the_logged_learning_rate_is_the_one_that_the_step_used() -> None:
    used, logged = [], []

    class Note(Callback):
        def on_train_batch_start(self, run: Any, *args: Any) -> None:
            used.append(run.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            logged.append(run.callback_metrics["lr_scaled"].item())

    def halving(optimizer: Any) -> Any:
        return {"scheduler": LambdaLR(optimizer, lambda step: 0.5**step), "interval": "step"}

    fit(
        [AdaptiveBatchSize("0:4"), Note()],
        module=Classifier("sgd", schedulers=halving),
        accumulate_grad_batches=1,
        train=loader(20),
        max_epochs=1,
    )
    assert logged == pytest.approx(used)
    assert logged == pytest.approx([0.1 * 0.5**step for step in range(5)])


@pytest.mark.parametrize("settings", [{}, {"interval": "step", "frequency": 2}])
def test_a_sample_schedule_must_be_stepped_with_the_optimizer(settings: dict[str, Any]) -> None:
    def seldom(optimizer: Any) -> Any:
        return {"scheduler": SampleSchedule(optimizer, float, samples_per_step=8), **settings}

    with pytest.raises(MisconfigurationException, match="SampleSchedule is stepped with interval"):
        fit([AdaptiveBatchSize("0:8")], module=Classifier("sgd", schedulers=seldom))


class SavesAtEpochStart(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, run: Any, module: Any) -> None:
        run.save_checkpoint(self.folder / f"epoch={run.current_epoch}.ckpt")


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_from_the_start_of_an_epoch(tmp_path: Path, first: bool) -> None:
    def run(ckpt_path: Path | None) -> Any:
        ours = AdaptiveBatchSize("0:8 30:16 70:32", max_micro_batch=8)
        saver = [] if ckpt_path else [SavesAtEpochStart(tmp_path)]
        callbacks = [ours, *saver] if first else [*saver, ours]
        return fit(callbacks, train=loader(50), max_epochs=3, ckpt_path=ckpt_path)[0]

    whole = run(None)
    for path in sorted(tmp_path.glob("*.ckpt")):
        again = run(path)
        assert again.seen == whole.seen[len(whole.seen) - len(again.seen) :]
        assert same_weights(again, whole)


def test_a_checkpoint_after_fit_goes_on_bitwise(tmp_path: Path) -> None:
    def adaptive() -> AdaptiveBatchSize:
        return AdaptiveBatchSize("0:8 30:16 70:32", max_micro_batch=8)

    whole, _ = fit([adaptive()], train=loader(50), max_epochs=3)
    _, run = fit([adaptive()], train=loader(50), max_epochs=2)
    run.save_checkpoint(tmp_path / "end.ckpt")
    again, _ = fit([adaptive()], train=loader(50), max_epochs=3, ckpt_path=tmp_path / "end.ckpt")
    assert same_weights(again, whole)


class Drawing(Classifier):
    """Its loss depends on Python's and NumPy's generators."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (random.random() + np.random.rand())


def test_the_generators_of_python_and_numpy_go_on(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None, *more: Callback) -> Any:
        module = Drawing()
        fit(
            [AdaptiveBatchSize("0:8"), *more],
            module=module,
            ckpt_path=ckpt_path,
            enable_checkpointing=bool(more),
        )
        return module

    saver = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=5, save_top_k=1)
    whole = run(None, saver)
    assert same_weights(run(tmp_path / "mid.ckpt", saver), whole)


def test_a_generator_of_the_loader_alone_goes_on(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        fit(
            [AdaptiveBatchSize("0:8"), saver],
            train=loader(50, shuffle=False, generator=generator),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
        )
        return generator.get_state()

    assert torch.equal(run(None), run(tmp_path / "step=3.ckpt"))


class ByRank:
    """A rule on which the ranks disagree."""

    needs: frozenset[str] = frozenset()

    def propose(self, observation: Observation) -> Proposal:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        base = 16.0 if observation.samples_seen < 60 else 32.0
        return Proposal(base * (1 + rank), 0.0, "by rank")


def disagreeing(workers: bool) -> Any:
    ahead = {"num_workers": int(torch.multiprocessing.current_process().name[-1]) % 2 * 2}
    adaptive = AdaptiveBatchSize(ByRank(), max_global_batch=64, max_micro_batch=8)
    module, run = fit(
        [adaptive],
        train=loader(96, **(ahead if workers else {})),
        strategy="ddp",
        devices=2,
        max_epochs=2,
    )
    return [len(batch) for batch in module.seen], adaptive.global_batch, run.global_step


@pytest.mark.parametrize("workers", [False, True])
def test_ranks_take_the_same_size_at_the_same_batch(workers: bool) -> None:
    one, other = run_distributed(disagreeing, args=(workers,))
    assert one == other
    assert one[1] == 64


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_decide_alike_where_the_data_does_not_divide(ranks: int) -> None:
    alone = uneven(1, 6)
    for rank in run_distributed(uneven, world_size=ranks, args=(ranks, 6 // ranks)):
        assert rank[0] == alone[0]
        torch.testing.assert_close(rank[1], alone[1], rtol=0, atol=1e-12)


def uneven(devices: int, accumulate: int) -> Any:
    data = dataset(50, torch.float64)
    adaptive = AdaptiveBatchSize(
        "noise_scale", max_global_batch=36, max_micro_batch=4, dwell_samples=0, threshold=0.01
    )
    module, run = fit(
        [adaptive, GradientNoiseScale(1)],
        module=Classifier(dropout=0.0).double(),
        train=DataLoader(data, batch_sampler=AdaptiveBatchSampler(RandomSampler(data), 2, seed=1)),
        accumulate_grad_batches=accumulate,
        max_epochs=6,
        **({"strategy": "ddp", "devices": devices} if devices > 1 else {}),
    )
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return (run.global_step, adaptive.global_batch), weights


def test_callbacks_begin_anew_with_another_module() -> None:
    settings = {"max_global_batch": 48, "max_micro_batch": 8, "dwell_samples": 0}
    used = [AdaptiveBatchSize("noise_scale", **settings), GradientNoiseScale(1), EMA(0.9)]
    fit(used, max_epochs=1)
    fresh = [AdaptiveBatchSize("noise_scale", **settings), GradientNoiseScale(1), EMA(0.9)]
    again, expected = (fit(callbacks, max_epochs=2)[0] for callbacks in (used, fresh))
    assert same_weights(again, expected)
    assert used[0].samples_seen == fresh[0].samples_seen == 192
    assert used[1].estimate() == fresh[1].estimate()
    assert used[2].updates == fresh[2].updates


def test_a_callback_may_move_to_another_trainer() -> None:
    adaptive = AdaptiveBatchSize("noise_scale", max_global_batch=48)
    fit([adaptive], max_epochs=1)
    first = adaptive.source
    fit([adaptive], max_epochs=1)
    assert adaptive.source is not first
    assert adaptive.samples_seen == 96


def test_a_batch_above_the_epoch_warns() -> None:
    with pytest.warns(UserWarning, match="512 is more than the 20 samples of an epoch"):
        fit([AdaptiveBatchSize("0:512", max_micro_batch=64)], train=loader(20), max_epochs=1)


def test_drop_last_never_drops_everything() -> None:
    adaptive = AdaptiveBatchSize("0:8 20:128", max_micro_batch=64)
    module, run = fit([adaptive], train=loader(50, drop_last=True), max_epochs=4)
    assert run.current_epoch == 4
    assert run.global_step > 4
    assert len(module.seen[-1]) <= 50


def test_a_schedule_may_begin_below_the_loader() -> None:
    module, _ = fit([AdaptiveBatchSize("0:4")], max_epochs=1)
    assert {len(batch) for batch in module.seen} == {4}


def test_validation_cuts_no_window_once_sizes_have_changed() -> None:
    found = []

    class Note(Callback):
        def on_validation_start(self, run: Any, module: Any) -> None:
            done = run.fit_loop.epoch_loop.batch_progress.current.ready
            found.append((done % run.accumulate_grad_batches, done == run.num_training_batches))

    fit(
        [AdaptiveBatchSize("0:8 24:28"), Note()],
        val=loader(4, shuffle=False),
        val_check_interval=0.5,
        max_epochs=2,
    )
    assert len(found) >= 2
    assert all(rest == 0 or last for rest, last in found)


def test_a_save_inside_a_window_resumes_with_the_mean_of_the_rest(tmp_path: Path) -> None:
    gradients = []

    class Note(Callback):
        def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
            gradients.append([p.grad.clone() for p in module.parameters()])

        def on_train_batch_end(self, run: Any, module: Any, o: Any, batch: Any, i: int) -> None:
            if i == 1 and not (tmp_path / "cut.ckpt").exists():
                run.save_checkpoint(tmp_path / "cut.ckpt")

    def module() -> Classifier:
        return Classifier("sgd", dropout=0.0).double()

    settings = {
        "train": loader(12, dtype=torch.float64, shuffle=False),
        "accumulate_grad_batches": 3,
        "max_epochs": 1,
    }
    fit([AdaptiveBatchSize("0:12"), Note()], module=module(), **settings)
    gradients.clear()
    resumed = module()
    fit(
        [AdaptiveBatchSize("0:12"), Note()],
        module=resumed,
        ckpt_path=tmp_path / "cut.ckpt",
        **settings,
    )
    fresh = module()
    _, x, y = dataset(12, torch.float64)[8:12]
    loss = torch.nn.functional.cross_entropy(fresh.net(x), y)
    truth = torch.autograd.grad(loss, list(fresh.parameters()))
    (found,) = gradients
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_an_optimizer_is_needed() -> None:
    class Idle(Classifier):
        def configure_optimizers(self) -> Any:
            return None

    with (
        pytest.warns(UserWarning, match="configure_optimizers"),
        pytest.raises(MisconfigurationException, match="there is none"),
    ):
        fit([GradientNoiseScale(1)], module=Idle())


def test_a_rule_must_propose_a_batch() -> None:
    class Wrong:
        needs: frozenset[str] = frozenset()

        def propose(self, observation: Observation) -> Any:
            return 64

    with pytest.raises(ValueError, match=r"proposed 64; allowed is None, or a scaling\.Proposal"):
        trainer([AdaptiveBatchSize(Wrong(), max_global_batch=64)]).fit(Classifier(), loader())
