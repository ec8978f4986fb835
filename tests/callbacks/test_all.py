"""The contract of the room, run over everything that it lists."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import (
    Classifier,
    dataset,
    fit,
    identical,
    loader,
    run_distributed,
    same_weights,
    trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext import callbacks
from lightning_ext.callbacks import (
    AGVM,
    EMA,
    AdamInstabilityMonitor,
    AdaptiveBatchSize,
    AdaptiveGradientClipping,
    CommunicationVolume,
    CriticalBatchSize,
    Curvature,
    GradientNoiseScale,
    GradientNormRecorder,
    LargeBatchRecipe,
    LocalGradients,
    MicroBatchFinder,
    NormLoss,
    PolyakLoss,
    SharpnessAware,
    WeightDistance,
)
from lightning_ext.data import AdaptiveBatchSampler

pytestmark = pytest.mark.filterwarnings("ignore:NormLoss takes the place of weight decay")


class Contract(NamedTuple):
    """How to make a callback that changes nothing, one at work, and another one beside it."""

    neutral: Callable[[], Callback]
    at_work: Callable[[], Callback]
    another: Callable[[], Callback] | None  # None: two in one Trainer are refused


CONTRACTS = {
    "AGVM": Contract(
        neutral=lambda: AGVM(1, warmup_steps=0, bounds=(1.0, 1.0)),
        at_work=lambda: AGVM(1, decay=0.5, warmup_steps=0),
        another=None,
    ),
    "AdamInstabilityMonitor": Contract(
        neutral=lambda: AdamInstabilityMonitor(1),
        at_work=lambda: AdamInstabilityMonitor(2),
        another=lambda: AdamInstabilityMonitor(5, per_layer=True),
    ),
    "AdaptiveBatchSize": Contract(
        neutral=lambda: AdaptiveBatchSize("0:8", rescale_last_window=False),
        at_work=lambda: AdaptiveBatchSize("0:8 40:16 100:32", max_micro_batch=8),
        another=None,
    ),
    "AdaptiveGradientClipping": Contract(
        neutral=lambda: AdaptiveGradientClipping(1e6),
        at_work=lambda: AdaptiveGradientClipping(0.05),
        another=lambda: AdaptiveGradientClipping(0.01),
    ),
    "CommunicationVolume": Contract(
        neutral=lambda: CommunicationVolume(1),
        at_work=lambda: CommunicationVolume(2),
        another=None,  # two dispatch modes would not be left in the order of entering
    ),
    "CriticalBatchSize": Contract(
        neutral=lambda: CriticalBatchSize((1, 2), samples=64, at_samples=[0, 32]),
        at_work=lambda: CriticalBatchSize((1, 2), samples=64, every_samples=40),
        another=None,
    ),
    "Curvature": Contract(
        neutral=lambda: Curvature(1, 3),
        at_work=lambda: Curvature(8, 3),
        another=lambda: Curvature(6, 3),
    ),
    "EMA": Contract(
        neutral=lambda: EMA(0.9),
        at_work=lambda: EMA(0.9, every_n_steps=2),
        another=lambda: EMA(0.99),
    ),
    "GradientNoiseScale": Contract(
        neutral=lambda: GradientNoiseScale(1),
        at_work=lambda: GradientNoiseScale(every_n_steps=2, per_group=True),
        another=lambda: GradientNoiseScale(every_n_steps=3),
    ),
    "GradientNormRecorder": Contract(
        neutral=lambda: GradientNormRecorder(),
        at_work=lambda: GradientNormRecorder(norm="l1"),
        another=lambda: GradientNormRecorder(norm="l2"),
    ),
    "LargeBatchRecipe": Contract(
        neutral=lambda: LargeBatchRecipe(),
        at_work=lambda: LargeBatchRecipe(reference_batch=1),
        another=lambda: LargeBatchRecipe(reference_batch=2),
    ),
    "LocalGradients": Contract(
        neutral=lambda: LocalGradients(),
        at_work=lambda: LocalGradients(),
        another=None,
    ),
    "MicroBatchFinder": Contract(
        neutral=lambda: MicroBatchFinder(max_micro_batch=8),
        at_work=lambda: MicroBatchFinder(max_micro_batch=5),
        another=None,
    ),
    "NormLoss": Contract(
        neutral=lambda: NormLoss(0.0),
        at_work=lambda: NormLoss(0.01),
        another=lambda: NormLoss(0.1),
    ),
    "SharpnessAware": Contract(
        neutral=lambda: SharpnessAware(1e-30),  # is lost when it is added to the weights
        at_work=lambda: SharpnessAware(0.1, every_n_steps=3),
        another=None,
    ),
    "PolyakLoss": Contract(
        neutral=lambda: PolyakLoss(),
        at_work=lambda: PolyakLoss(),
        another=None,
    ),
    "WeightDistance": Contract(
        neutral=lambda: WeightDistance(1),
        at_work=lambda: WeightDistance(2),
        another=lambda: WeightDistance(3),
    ),
}

# Functions beside the callbacks: each has tests of its own.
FUNCTIONS = {"measure_critical_batch", "memory_held", "memory_plan", "sweep_batch_sizes"}
# What callbacks are made of, or give: the same.
PARTS = {"WireCount", "WireMeter"}

every_callback = pytest.mark.parametrize(
    "name", [name for name in callbacks.__all__ if name in CONTRACTS]
)

_drift = pytest.mark.xfail(
    raises=MisconfigurationException,
    reason="with gradients of their own, ranks of AdamW would drift apart: it is refused",
)
several_ranks = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=_drift) if name == "LocalGradients" else name
        for name in callbacks.__all__
        if name in CONTRACTS
    ],
)


def test_every_callback_has_a_contract() -> None:
    assert set(callbacks.__all__) == CONTRACTS.keys() | FUNCTIONS | PARTS


@every_callback
@pytest.mark.parametrize("accumulate", [2, 3])
def test_neutral_is_bitwise_the_run_without_it(name: str, accumulate: int) -> None:
    settings = {"accumulate_grad_batches": accumulate, "train": loader(48)}
    neutral = CONTRACTS[name].neutral
    if name == "AdaptiveBatchSize":
        neutral = lambda: AdaptiveBatchSize(f"0:{4 * accumulate}", rescale_last_window=False)  # noqa: E731 (one line beside its use)
    with_it, _ = fit([neutral()], **settings)
    without, _ = fit([], **settings)
    assert with_it.losses == without.losses
    assert same_weights(with_it, without)


def state_of(callback: Callback) -> Any:
    state: dict[str, Any] = callback.state_dict()
    average = callback._average if isinstance(callback, EMA) else None
    return state, {} if average is None else average._tensors


@every_callback
def test_a_checkpoint_in_between_changes_nothing(name: str, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None) -> Any:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        # Position and random state are AdaptiveBatchSize's work; the others are tried beside it.
        carrier = [] if name == "AdaptiveBatchSize" else [CONTRACTS["AdaptiveBatchSize"].neutral()]
        one = CONTRACTS[name].at_work()
        module, _ = fit(
            [*carrier, one, saver], train=loader(50), ckpt_path=ckpt_path, enable_checkpointing=True
        )
        return module, state_of(one)

    module, state = run(None)
    for path in sorted(tmp_path.glob("*.ckpt")):
        again, resumed = run(path)
        assert same_weights(again, module)
        assert identical(state, resumed)


@every_callback
def test_two_instances(name: str) -> None:
    contract = CONTRACTS[name]
    if contract.another is None:
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            fit([contract.at_work(), contract.at_work()])
    else:
        one, other = contract.at_work(), contract.another()
        alone = contract.at_work()
        together, _ = fit([one, other])
        single, _ = fit([alone])
        assert identical(state_of(one), state_of(alone))
        if alone.state_dict():
            assert not identical(state_of(other), state_of(alone))
        else:  # what it does is seen in the weights
            assert not same_weights(together, single)


@every_callback
def test_pickle_before_and_after_fit(name: str) -> None:
    callback = CONTRACTS[name].at_work()
    pickle.loads(pickle.dumps(callback))
    fit([callback])
    again = pickle.loads(pickle.dumps(callback))
    assert identical(again.state_dict(), callback.state_dict())


def test_ddp_spawn() -> None:
    # With LocalGradients ranks of AdamW would drift apart: it refuses.
    found = [contract for name, contract in CONTRACTS.items() if name != "LocalGradients"]
    all_of_them = [contract.at_work() for contract in found]
    run = trainer(all_of_them, strategy="ddp_spawn", devices=2, limit_val_batches=0)
    run.fit(Classifier(), loader())
    assert run.callback_metrics["samples_seen"] == 192
    assert run.callback_metrics["global_batch"] == 32


def in_float64(name: str, accumulate: int, devices: int) -> Any:
    data = dataset(96, torch.float64)
    sampler = AdaptiveBatchSampler(SequentialSampler(range(96)), 4)
    carrier = [AdaptiveBatchSize("0:16 32:32")] if name != "AdaptiveBatchSize" else []
    callback = CONTRACTS[name].at_work()
    if name == "AdaptiveBatchSize":
        callback = AdaptiveBatchSize("0:16 40:32 100:64", max_micro_batch=8)
    module, run = fit(
        [*carrier, callback],
        module=Classifier(dropout=0.0).double(),
        train=DataLoader(data, batch_sampler=sampler),
        accumulate_grad_batches=accumulate,
        **({"strategy": "ddp", "devices": 2} if devices == 2 else {}),
    )
    state, tensors = state_of(callback)
    state.pop("sampler", None)
    state.pop("in_force", None)
    state.pop("found_on", None)
    history = [state.pop(key).flatten() for key in ("history", "norms") if key in state]
    numbers = torch.cat([*history, *(t.flatten() for t in tensors.values()), torch.zeros(1)])
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return state, numbers, weights, run.callback_metrics["global_batch"].item()


@several_ranks
def test_two_processes_equal_one(name: str) -> None:
    state, numbers, weights, batch = in_float64(name, 4, 1)
    for rank in run_distributed(in_float64, args=(name, 2, 2)):
        assert rank[0] == state
        torch.testing.assert_close(rank[1], numbers, rtol=0, atol=1e-12)
        torch.testing.assert_close(rank[2], weights, rtol=0, atol=1e-12)
        assert rank[3] == batch
