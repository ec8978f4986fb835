"""The view of a strategy: one interface for a single device and DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import fit, loader, run_distributed, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext._lightning import DistributedView, View, view
from lightning_ext.callbacks import AdaptiveBatchSize


class Look(Callback):
    """Keeps what a function finds at the third batch."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.found: Any = None

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i == 2 and self.found is None:
            self.found = self.look(view(run))


def seen(look: Any, *callbacks: Callback, **kwargs: Any) -> Any:
    looker = Look(look)
    fit([*callbacks, looker], max_epochs=1, **kwargs)
    return looker.found


def facts(seen_by: View) -> Any:
    rank = seen_by.data_parallel_rank
    return {
        "kind": type(seen_by).__name__,
        "size": seen_by.data_parallel_size,
        "rank": rank,
        "model parallel": seen_by.model_parallel_groups,
        "grouped": seen_by.data_parallel_group is not None,
        "names": [name for name, _ in seen_by.local_parameters()],
        "accumulate": (seen_by.accumulate, seen_by.can_set_accumulate),
        "gathered": seen_by.gather(torch.tensor([rank, 7])).tolist(),
        "largest": seen_by.largest(rank, -rank, 5),
        "sq_norm": seen_by.sq_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item(),
    }


NAMES = ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"]


def test_a_single_device() -> None:
    assert seen(facts) == {
        "kind": "View",
        "size": 1,
        "rank": 0,
        "model parallel": (),
        "grouped": False,
        "names": NAMES,
        "accumulate": (2, True),
        "gathered": [[0, 7]],
        "largest": [0, 0, 5],
        "sq_norm": 25.0,
    }


def on_two_ranks() -> Any:
    return seen(facts, strategy="ddp", devices=2)


def test_ddp() -> None:
    found = run_distributed(on_two_ranks)
    for rank in range(2):
        assert found[rank] == {
            "kind": DistributedView.__name__,
            "size": 2,
            "rank": rank,
            "model parallel": (),
            "grouped": True,
            "names": NAMES,
            "accumulate": (2, True),
            "gathered": [[0, 7], [1, 7]],
            "largest": [1, 0, 5],
            "sq_norm": 25.0,
        }


def test_accumulation_changes_only_between_windows_of_both_sizes() -> None:
    def change(seen_by: View) -> str:
        with pytest.raises(MisconfigurationException, match="cannot change from 2 to 3"):
            seen_by.set_accumulate(3)
        seen_by.set_accumulate(2)  # no change at all
        return "refused"

    assert seen(change) == "refused"


def test_accumulation_may_change_at_a_common_multiple() -> None:
    class Change(Callback):
        def on_train_batch_end(self, run: Any, module: Any, o: Any, batch: Any, i: int) -> None:
            if i == 5:
                view(run).set_accumulate(3)

    _, run = fit([Change()], max_epochs=1)
    assert run.accumulate_grad_batches == 3
    assert run.global_step == 3 + 18 // 3


def test_the_micro_batch_needs_our_sampler() -> None:
    def change(seen_by: View) -> str:
        with pytest.raises(MisconfigurationException, match="no AdaptiveBatchSampler"):
            seen_by.set_micro_batch(8)
        return "refused"

    assert seen(change) == "refused"


def test_the_micro_batch_changes_from_the_next_window_on() -> None:
    asked: list[int | None] = []
    look = Look(lambda seen_by: [asked.append(seen_by.set_micro_batch(12))])
    silent = AdaptiveBatchSize(
        "noise_scale", max_global_batch=24, max_micro_batch=12, dwell_samples=10**9
    )
    module, run = fit([silent, look], train=loader(60), max_epochs=1)
    assert asked == [4]
    assert [len(batch) for batch in module.seen] == [4, 4, 4, 4, 12, 12, 12, 8]
    assert run.num_training_batches == 8


def test_tensors_go_through_a_checkpoint() -> None:
    def look(seen_by: View) -> Any:
        live = {name: p.detach() for name, p in seen_by.local_parameters()}
        saved = seen_by.save_tensors(live)
        assert all(saved[name] is not live[name] for name in live)
        half = {name: tensor.half() for name, tensor in live.items()}
        loaded = seen_by.load_tensors(saved, half)
        return all(torch.equal(loaded[name], half[name]) for name in live)

    assert seen(look)


def test_a_strategy_may_bring_its_own_view() -> None:
    run = trainer()
    run.strategy.view = lambda: "its own"
    assert view(run) == "its own"


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, object])
def test_other_strategies_are_refused_by_name(kind: type) -> None:
    class FakeTrainer:
        strategy: Any = object.__new__(type("Remote", (kind,), {}))

    with pytest.raises(MisconfigurationException, match=r"Remote is not supported.*DDP"):
        view(FakeTrainer())


def test_the_views_list_all_of_rule_10() -> None:
    public = {name for name in dir(View) if not name.startswith("_")}
    assert public >= {
        "accumulate",
        "can_set_accumulate",
        "data_parallel_group",
        "data_parallel_size",
        "load_tensors",
        "local_parameters",
        "model_parallel_groups",
        "save_tensors",
        "set_accumulate",
        "set_micro_batch",
        "sq_norm",
    }
