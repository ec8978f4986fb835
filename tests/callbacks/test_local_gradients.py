"""LocalGradients: ranks of DDP keep their gradients, and resume with their own moments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import dataset, fit, fsdp2, identical, loader, run_distributed, same_weights, trainer
from harness.gradient_edits import Gradients, Overflowing, Plain, ScaledOnly
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_ext.callbacks import AdaptiveBatchSize, LocalGradients
from lightning_ext.optim import DistributedLion, Lion


def by_votes(params: Any) -> DistributedLion:
    return DistributedLion(params, lr=1e-3)


def train(*callbacks: Callback, make: Any = by_votes, module: Any = None, **kwargs: Any) -> Any:
    """On two ranks; the samples of a rank are every second one."""
    settings = {"strategy": "ddp", "devices": 2} | kwargs
    data = DataLoader(dataset(96, torch.float64), batch_size=4)
    module = module or Plain(make)
    return fit(list(callbacks), module=module, train=data, **settings)


def weights_of(module: Any) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def as_it_should() -> tuple[list[Tensor], list[dict[str, Tensor]], Any, list[list[int]]]:
    seen = Gradients()
    module, run = train(LocalGradients(), seen)
    moments = [state["exp_avg"] for state in run.optimizers[0].state.values()]
    return weights_of(module), seen.grads, moments, module.seen


def by_hand(batches: list[list[list[int]]]) -> list[Tensor]:
    """All ranks in one process, from the indices of the samples that each of them saw."""
    module = Plain()
    params = list(module.parameters())
    data = dataset(96, torch.float64)
    moments = [[torch.zeros_like(p) for p in params] for _ in batches]
    for step in range(len(batches[0]) // 2):
        total = [torch.zeros_like(p) for p in params]
        for rank, seen in enumerate(batches):
            loss: Any = 0.0
            for indices in seen[2 * step : 2 * step + 2]:
                _, x, y = data[indices]
                loss = loss + torch.nn.functional.cross_entropy(module.net(x), y) / 2
            grads = torch.autograd.grad(loss, params)
            for i, (m, g) in enumerate(zip(moments[rank], grads, strict=True)):
                way = 0.9 * m + 0.1 * g
                total[i] += torch.where(way == 0, (-1.0) ** (step + rank), way.sign())
                moments[rank][i] = 0.99 * m + 0.01 * g
        with torch.no_grad():
            for p, votes in zip(params, total, strict=True):
                p -= 1e-3 * votes.sign()
    return weights_of(module)


def test_ranks_vote_with_gradients_of_their_own() -> None:
    one, other = run_distributed(as_it_should)
    truth = by_hand([one[3], other[3]])
    for found, same, expected in zip(one[0], other[0], truth, strict=True):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not identical(one[1], other[1])
    assert not identical(one[2], other[2])


def forgotten() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(w.message) for w in caught if "DistributedLion" in str(w.message)]


def test_without_it_the_averaged_gradients_are_warned_of_once() -> None:
    for found in run_distributed(forgotten):
        assert len(found) == 1
        assert "LocalGradients()" in found[0]


def test_one_process_trains_as_with_lion() -> None:
    alone = {"strategy": "auto", "devices": 1}
    one, _ = train(LocalGradients(), **alone)
    other, _ = train(make=lambda params: Lion(params, lr=1e-3), **alone)
    assert same_weights(one, other)


def resumed(folder: str, name: str | None) -> Any:
    """What a run comes to, from a checkpoint of another one or from the start."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    carrier = AdaptiveBatchSize("0:16", rescale_last_window=False)
    module, run = fit(
        [carrier, LocalGradients(), saver],
        module=Plain(by_votes),
        train=loader(96, dtype=torch.float64),
        strategy="ddp",
        devices=2,
        enable_checkpointing=True,
        ckpt_path=None if name is None else f"{folder}/{name}",
    )
    (optimizer,) = run.optimizers
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    return weights_of(module), moments, optimizer.param_groups[0]["zero_sign"]


def test_every_rank_resumes_with_its_own_moments(tmp_path: Path) -> None:
    whole = run_distributed(resumed, args=(str(tmp_path), None))
    assert not identical(whole[0][1], whole[1][1])
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert len(names) == 2
    for name in names:
        found = run_distributed(resumed, args=(str(tmp_path), name))
        assert identical(found, whole)
    states = torch.load(tmp_path / names[0], weights_only=True)["optimizer_states"]
    assert states[0]["state"][0]["exp_avg"].shape == (2, 12, 6)


class OneOverflows(Overflowing):
    """Only on the second rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = super().training_step if self.global_rank else Plain.training_step.__get__(self)
        return step(batch, batch_idx)


def overflow() -> tuple[list[Tensor], list[int], int]:
    module = OneOverflows(by_votes)
    seen = Gradients()
    _, run = train(LocalGradients(), seen, module=module, plugins=ScaledOnly())
    pairs = enumerate(zip(seen.weights[1:], seen.weights[:-1], strict=True))
    still = [i for i, (now, before) in pairs if identical(now, before)]
    (state, *_) = run.optimizers[0].state.values()
    return weights_of(module), still, int(state["step"])


def test_an_overflow_on_one_rank_skips_the_step_of_all() -> None:
    one, other = run_distributed(overflow)
    assert identical(one[0], other[0])
    assert one[1:] == other[1:] == ([2], 11)
    assert all(x.isfinite().all() for x in one[0])


def with_sgd() -> None:
    train(LocalGradients(), make=lambda params: SGD(params, lr=0.1))


def with_fsdp2() -> None:
    train(LocalGradients(), make=lambda params: SGD(params, lr=0.1), **fsdp2(2))


def with_a_hook() -> None:
    strategy = DDPStrategy(ddp_comm_hook=lambda state, bucket: None)
    train(LocalGradients(), strategy=strategy)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (with_sgd, r"SGD steps along the gradient that it gets.*DistributedLion"),
        (with_fsdp2, r"the strategy is ModelParallelStrategy.*Trainer\(strategy='ddp'\)"),
        (with_a_hook, "has a ddp_comm_hook, and DDP takes one"),
    ],
)
def test_what_does_not_go_with_it_is_refused(wrong: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        run_distributed(wrong)


@pytest.mark.slow
def test_it_can_be_spawned() -> None:
    run = trainer([LocalGradients()], strategy="ddp_spawn", devices=2, limit_val_batches=0)
    module = Voter()
    run.fit(module, loader())
    assert not same_weights(module, Voter())


class Voter(Plain):
    """Can be pickled."""

    def __init__(self) -> None:
        super().__init__(by_votes)
        self.float()
