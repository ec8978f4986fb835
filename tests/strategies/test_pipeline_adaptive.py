"""AdaptiveBatchSize under a pipeline: the number of micro-batches grows, as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import run_distributed, trainer
from harness.pipeline_parts import (
    COUNT,
    MICRO,
    Chain,
    data,
    distance,
    pipeline_trainer,
    whole,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler

from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler, SeededPermutation

LOGGED = ("global_batch", "micro_batch", "accumulate", "samples_seen", "target_batch")
RULES: dict[str, dict[str, Any]] = {
    "schedule": {"rule": "0:16 64:32 128:64 448:32"},
    "uneven": {"rule": "0:80"},  # an epoch of 192 samples ends within a step
    "norm test": {"rule": "norm_test", "max_global_batch": 32, "dwell_samples": 64},
    "adadamp": {"rule": "adadamp", "max_global_batch": 32, "dwell_samples": 64},
}
HOW: dict[str, tuple[int, dict[str, Any]]] = {
    "breadth-first": (2, {}),
    "interleaved": (2, {"schedule": "interleaved_1f1b"}),
    "fsdp2": (4, {"schedule": "1f1b", "data_parallel_size": 2, "num_microbatches": 2}),
}


class Sizes(Callback):
    """What was logged of every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, run: Any, *args: Any) -> None:
        """Reads it, behind the others."""
        if not run.fit_loop._should_accumulate():
            self.seen.append([float(run.callback_metrics.get(x, -1)) for x in LOGGED])


def fitted(
    options: dict[str, Any] | None, rule: str, accumulate: int, **kwargs: Any
) -> dict[str, Any]:
    """Weights, averages and sizes of a fit; in one process where there are no options."""
    sizes, average = Sizes(), EMA(0.9)
    noise = GradientNoiseScale(1, geometry="euclidean")
    own: list[Callback] = [AdaptiveBatchSize(**RULES[rule]), noise, average, sizes]
    kwargs = {"max_epochs": 3, "gradient_clip_val": 0.5, **kwargs}
    kwargs["callbacks"] = own + kwargs.get("callbacks", [])
    path = kwargs.pop("ckpt_path", None)
    samples = ConcatDataset([data(), data(), data()])
    batch, passes = MICRO, accumulate * COUNT
    if options is not None:
        replicas = options.get("data_parallel_size", 1)
        batch, passes = MICRO * COUNT // replicas, accumulate
    sampler = AdaptiveBatchSampler(RandomSampler(samples), batch, seed=5)
    make = trainer if options is None else pipeline_trainer
    run = make(*([] if options is None else [options]), accumulate_grad_batches=passes, **kwargs)
    module = Chain()
    run.fit(module, DataLoader(samples, batch_sampler=sampler), ckpt_path=path)
    assert average._average is not None
    after = run.accumulate_grad_batches
    kept = average._average._tensors.items()
    averages = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in kept}
    return {"weights": whole(module), "averages": averages, "sizes": sizes.seen, "after": after}


def same(ranks: list[dict[str, Any]], alone: dict[str, Any], columns: list[int]) -> None:
    """Weights, averages and what was logged of all ranks are those of one process."""
    for rank in ranks:
        for column in columns:
            own, one = ([row[column] for row in x["sizes"]] for x in (rank, alone))
            assert own == pytest.approx(one), LOGGED[column]
        assert distance(rank["weights"], alone["weights"]) < 1e-12
        assert distance(rank["averages"], alone["averages"]) < 1e-12


# Windows of one process change where both of their sizes end, and sizes here do so, too.
@pytest.mark.parametrize(
    ("how", "rule", "accumulate"),
    [
        ("breadth-first", "schedule", 1),
        pytest.param("breadth-first", "schedule", 2, marks=pytest.mark.slow),
        pytest.param("breadth-first", "norm test", 1, marks=pytest.mark.slow),
        pytest.param("breadth-first", "adadamp", 1, marks=pytest.mark.slow),
        pytest.param("breadth-first", "uneven", 1, marks=pytest.mark.slow),
        ("breadth-first", "uneven", 2),
        pytest.param("interleaved", "schedule", 1, marks=pytest.mark.slow),
    ],
)
def test_sizes_and_parameters_are_those_of_one_process(
    how: str, rule: str, accumulate: int
) -> None:
    alone = fitted(None, rule, accumulate)
    ranks = run_distributed(fitted, args=(HOW[how][1], rule, accumulate), timeout=120)
    assert rule in ("adadamp", "uneven") or len({sizes[0] for sizes in alone["sizes"]}) > 1
    same(ranks, alone, [*range(len(LOGGED))])
    assert [rank["after"] for rank in ranks] == [accumulate] * 2


def test_so_they_are_on_replicas_of_sharded_stages() -> None:
    alone = fitted(None, "schedule", 1)
    processes, options = HOW["fsdp2"]
    ranks = run_distributed(fitted, processes, args=(options, "schedule", 1), timeout=120)
    same(ranks, alone, [0, 3, 4])
    assert {tuple(row[1:3]) for row in ranks[0]["sizes"]} == {(4, 2), (4, 4), (4, 8)}


def resumed(folder: str, name: str | None) -> dict[str, Any]:
    """A fit that writes a checkpoint after each step, or goes on from one."""
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    path = None if name is None else str(Path(folder) / name)
    kwargs = {"callbacks": [saver], "enable_checkpointing": True, "ckpt_path": path}
    return fitted({}, "schedule", 1, **kwargs)


@pytest.mark.parametrize("step", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_goes_on_after_the_batch_has_grown(tmp_path: Path, step: int) -> None:
    whole_run = run_distributed(resumed, args=(str(tmp_path), None), timeout=120)
    rest = run_distributed(resumed, args=(str(tmp_path), f"step={step}.ckpt"), timeout=120)
    for own, before in zip(rest, whole_run, strict=True):
        assert own["sizes"] == before["sizes"][step:]
        assert distance(own["weights"], before["weights"]) == 0
        assert distance(own["averages"], before["averages"]) == 0


def shuffled() -> tuple[list[list[float]], Any]:
    """Sizes and the order of a fit on a loader that shuffles, as users have it."""
    sizes = Sizes()
    own = [AdaptiveBatchSize(**RULES["schedule"]), sizes]
    kwargs = {"accumulate_grad_batches": 1, "use_distributed_sampler": True, "max_steps": 6}
    run = pipeline_trainer({}, callbacks=own, **kwargs)
    run.fit(Chain(), DataLoader(data(), MICRO * COUNT, shuffle=True))
    loader: Any = run.train_dataloader
    return sizes.seen, loader.batch_sampler.sampler


def test_the_ranks_of_a_pipeline_shuffle_alike() -> None:
    for seen, order in run_distributed(shuffled, timeout=60):
        assert isinstance(order, SeededPermutation)  # of one seed
        assert [row[0] for row in seen] == [16, 16, 16, 16, 32, 32]


def test_the_micro_batch_stays_where_it_might_grow() -> None:
    for sizes in run_distributed(might_grow, timeout=60):
        assert sizes[0][:2] == [16, 4]
        assert sizes[-1][:2] == [32, 4]


def might_grow() -> list[list[float]]:
    """Global batch and micro-batch of steps with a larger micro-batch allowed."""
    sizes = Sizes()
    own = [AdaptiveBatchSize("0:16 64:32", max_micro_batch=16), sizes]
    kwargs = {"accumulate_grad_batches": 1, "max_steps": 6, "use_distributed_sampler": True}
    run = pipeline_trainer({}, callbacks=own, **kwargs)
    run.fit(Chain(), DataLoader(data(), MICRO * COUNT))
    return sizes.seen
