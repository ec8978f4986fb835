"""Which steps are measured, what is logged of them, and that the meter is never left on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, fit, loader, run_distributed, same_weights
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_ext.callbacks import AdaptiveBatchSize, CommunicationVolume, WireCount, WireMeter
from lightning_ext.scaling import CommunicationBytes, Traffic


class Watched(Classifier):
    """Notes in which batches a dispatch mode is on, and validates by the mean over ranks."""

    def __init__(self, fails_at: int = -1, ends_at: int = -1) -> None:
        super().__init__(dropout=0)
        self.on: list[bool] = []
        self.on_in_validation: set[bool] = set()
        self.fails_at = fails_at
        self.ends_at = ends_at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.ends_at else None

    def on_train_epoch_end(self) -> None:
        self.on_at_the_end = is_in_torch_dispatch_mode()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.on.append(is_in_torch_dispatch_mode())
        if batch_idx == self.fails_at:
            raise RuntimeError("planned")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.on_in_validation.add(is_in_torch_dispatch_mode())


def steps_on(module: Watched, accumulate: int = 2) -> list[int]:
    """Indices of the steps with the meter on in all of their batches, having checked the others."""
    windows = [module.on[i : i + accumulate] for i in range(0, len(module.on), accumulate)]
    assert all(all(window) or not any(window) for window in windows)
    return [index for index, window in enumerate(windows) if all(window)]


def test_a_single_device_sends_nothing() -> None:
    volume = CommunicationVolume(1)
    _, run = fit([volume])
    assert volume.last == WireCount()
    assert volume.values() == {
        "communication_bytes": 0,
        "communication_intra_bytes": 0,
        "communication_inter_bytes": 0,
        "communication_messages": 0,
    }
    assert run.logged_metrics["communication_bytes"] == 0


def test_the_first_step_the_third_and_every_nth_are_measured() -> None:
    module, _ = fit([CommunicationVolume(5)], module=Watched())
    assert steps_on(module) == [0, 2, 5, 10, 15, 20]  # of 24


def test_a_step_that_the_epoch_cuts_short_is_not_measured() -> None:
    volume = CommunicationVolume(3)
    fit([volume], train=loader(28), max_epochs=1)  # steps of 2, 2, 2 and 1 batches
    assert volume.state_dict() == {"steps": 4, "measured": 2}


def test_where_every_step_is_cut_short_none_is_measured() -> None:
    volume = CommunicationVolume(1)
    fit([volume], train=loader(12), accumulate_grad_batches=4)
    assert volume.last is None
    assert volume.state_dict() == {"steps": 2, "measured": -1}


def test_the_meter_follows_a_batch_that_changes_in_flight() -> None:
    module = Watched()
    fit([AdaptiveBatchSize("0:8 16:16"), CommunicationVolume(1)], module=module, max_epochs=1)
    assert all(module.on)


def test_it_is_off_between_batches() -> None:
    module = Watched()
    fit([CommunicationVolume(1)], module=module, val=loader(8, shuffle=False), val_check_interval=1)
    assert module.on_in_validation == {False}


def test_it_is_off_after_an_exception() -> None:
    volume = CommunicationVolume(1)
    with pytest.raises(RuntimeError, match="planned"):
        fit([volume], module=Watched(fails_at=1))
    assert not is_in_torch_dispatch_mode()
    assert volume.last is None


def test_it_is_off_after_an_epoch_that_is_broken_off() -> None:
    module = Watched(ends_at=3)
    fit([CommunicationVolume(1)], module=module, max_epochs=1)
    assert module.on == [True] * 3
    assert not module.on_at_the_end


def test_a_resumed_run_measures_its_own_first_steps(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=7)
    carried = [AdaptiveBatchSize("0:8"), saver]  # position in the data
    fit([CommunicationVolume(10), *carried], max_steps=7, enable_checkpointing=True)
    module, again = Watched(), CommunicationVolume(10)
    path = str(tmp_path / "last.ckpt")
    carried = [AdaptiveBatchSize("0:8"), saver]
    fit([again, *carried], module=module, ckpt_path=path, enable_checkpointing=True)
    assert steps_on(module) == [0, 2, 3, 13]  # 7, 9, 10 and 20 of the run
    assert again.state_dict() == {"steps": 24, "measured": 20}


class Averages(Classifier):
    """Averages its loss over the ranks where it logs it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("averaged", loss, sync_dist=True)
        return loss


class ReducesLater(Classifier):
    """Reduces once more when autograd is through, as engines of their own do."""

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        dist.all_reduce(torch.ones(1))


def in_two(module: LightningModule, settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    volume = CommunicationVolume(**settings)
    _, run = fit([volume], module=module, strategy="ddp", devices=2, max_steps=4)
    logged = {k: v for k, v in run.logged_metrics.items() if k.startswith("communication")}
    return volume.last, volume.values(), logged


def test_what_is_logged_is_what_was_measured() -> None:
    for _, values, logged in run_distributed(in_two, args=(Classifier(), {})):
        assert values == {
            "communication_bytes": 492,  # of 123 parameters, half to the other rank, twice
            "communication_intra_bytes": 492,
            "communication_inter_bytes": 0,
            "communication_messages": 2,
            "communication_bytes/all_reduce": 492,
        }
        assert logged == values


def test_collectives_are_logged_by_choice() -> None:
    settings = {"per_collective": False}
    for _, values, _ in run_distributed(in_two, args=(Classifier(), settings)):
        assert "communication_bytes/all_reduce" not in values


def test_with_a_rank_for_each_node_all_is_between_nodes() -> None:
    settings = {"ranks_per_node": 1}
    for _, values, _ in run_distributed(in_two, args=(Classifier(), settings)):
        assert values["communication_inter_bytes"] == values["communication_bytes"] == 492
        assert values["communication_intra_bytes"] == 0


def test_averages_of_metrics_are_told_from_gradients() -> None:
    for last, _, _ in run_distributed(in_two, args=(Averages(), {})):
        assert last.parts == CommunicationBytes(gradients=Traffic(492, 0, 2, 0))
        assert last.rest == 2 * Traffic(4, 0, 2, 0)  # one scalar for each micro-batch
        assert last.only(phase="forward").calls == 2


def test_what_follows_autograd_in_a_backward_pass_belongs_to_it() -> None:
    for last, _, _ in run_distributed(in_two, args=(ReducesLater(), {})):
        assert last.parts.gradients == Traffic(492, 0, 2, 0) + 2 * Traffic(4, 0, 2, 0)
        assert last.rest == Traffic()


def test_large_counts_are_logged_exactly() -> None:
    volume = CommunicationVolume()
    volume.values = lambda: {"communication_bytes": 2**24 + 1}  # type: ignore[method-assign] # float32 has no such number
    _, run = fit([volume])
    assert run.logged_metrics["communication_bytes"].item() == 2**24 + 1


def alone() -> tuple[WireCount, set[str]]:
    dist.init_process_group("gloo")
    layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1, bias=False))
    with WireMeter(ranks_per_node=1) as meter:
        loss = layer(torch.ones(2, 3)).sum()
        loss.backward()
        meter.phase = "other"
        dist.all_reduce(loss.detach())
    dist.all_reduce(torch.ones(1))
    return meter.count, meter.unknown


def test_the_meter_alone_tells_phases_and_groups() -> None:
    for count, unknown in run_distributed(alone):
        gradient, value = Traffic(0, 12, 0, 2), Traffic(0, 4, 0, 2)
        assert count.by("phase") == {"backward": gradient, "other": value}
        assert count.by("group_size") == {2: gradient + value}
        assert count.by("kind") == {"all_reduce": gradient + value}
        assert unknown == set()


def test_compiled_code_stays_compiled() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with WireMeter(ranks_per_node=1):
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(2))
    assert len(graphs) == 1


class Attention(Classifier):
    """A layer of each kind that transformers and convolutional networks have."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            one = torch.nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True)
            self.net = torch.nn.Sequential(one, torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Spread of what comes out, beside the cross-entropy."""
        _, x, y = batch
        out = self.net[2](self.net[1](self.net[0](x[None]).squeeze(0)))
        loss = torch.nn.functional.cross_entropy(out, y) + out.std() + out.prod()
        self.losses.append(loss.item())
        return loss


def test_a_transformer_trains_bitwise_as_without_it() -> None:
    with_it, _ = fit([CommunicationVolume(1)], module=Attention())
    without, _ = fit([], module=Attention())
    assert with_it.losses == without.losses
    assert same_weights(with_it, without)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"every_n_steps": 0}, ValueError),
        ({"ranks_per_node": 0}, ValueError),
        ({"ranks_per_node": 1.0}, TypeError),
        ({"per_collective": 1}, TypeError),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="allowed is"):
        CommunicationVolume(**settings)
