r"""Pipelined backpropagation of the digits: late gradients, with and without compensation.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone \
        --nproc-per-node 2 benchmarks/pipelined_backprop.py  # two stages in two processes
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/pipelined_backprop.py  # emulated rows, figure

In a step of time each stage makes one forward and one backward pass, of different micro-batches,
and steps at once: nothing is drained, so of S stages stage s computes its gradients with weights
that are D = 2(S − 1 − s) of its steps old. A backward pass uses the weights of its forward pass
(weights are stashed). More than two stages are emulated in one process, with the same arithmetic.
Source: Kosson et al. 2021 (Pipelined Backpropagation at Scale, arXiv:2003.11666), the regime.
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from benchmarks._pipelined_backprop_report import draw, print_table, summarize
from benchmarks._rows import ROOT, describe, name_of, write
from lightning_ext.optim import DelayCompensation
from lightning_ext.scaling import scale_hyperparameters

BLOCKS, WIDTH = 16, 32
MICRO_BATCH, REFERENCE_BATCH, MOMENTUM = 8, 32, 0.9
RATES, EPOCHS, SEEDS = (0.01, 0.03, 0.1), 4, 5  # rates of the reference batch
EMULATED = (1, 4, 8, 16)  # numbers of stages; of 1 it is synchronous
VARIANTS: dict[str, dict[str, Any]] = {
    "late": {"spike": False, "prediction": None},
    "spike": {"prediction": None},
    "prediction": {"spike": False},
    "both": {},
}
Weights = dict[str, Tensor]


class Setting(NamedTuple):
    """What a run is besides its seed; the rate is that of the reference batch."""

    num_stages: int
    variant: str
    lr: float
    micro_batch: int = MICRO_BATCH


SINGLE = [Setting(*x, 0.03, 1) for x in ((1, "late"), (16, "late"), (16, "both"))]


class Residual(nn.Module):
    """x + ReLU(W·norm(x)), normalized over features, as a micro-batch may be a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Of (samples, features)."""
        return x + self.linear(self.norm(x)).relu()


def make_stages(num_stages: int, seed: int) -> list[nn.Module]:
    """The same network of 16 blocks for a seed, cut into stages of equal depth."""
    torch.manual_seed(seed)
    middle = [Residual() for _ in range(BLOCKS - 2)]
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
    blocks = [nn.Linear(64, WIDTH), *middle, head]
    size = BLOCKS // num_stages
    return [nn.Sequential(*blocks[i : i + size]) for i in range(0, BLOCKS, size)]


def delay_of(stage: int, num_stages: int) -> int:
    """Steps of a stage between its forward pass of a micro-batch and the step with the gradient."""
    return 2 * (num_stages - 1 - stage)


def make_optimizer(stages: dict[int, nn.Module], setting: Setting, steps: int) -> DelayCompensation:
    """Momentum SGD for the micro-batch, each stage a group with its delay; lr falls to 0."""
    kappa = setting.micro_batch / REFERENCE_BATCH
    scaled = scale_hyperparameters(kappa, rule="linear_samples", lr=setting.lr, momentum=MOMENTUM)
    groups = [
        {"params": list(stage.parameters()), "delay": delay_of(index, setting.num_stages)}
        for index, stage in stages.items()
    ]
    base = torch.optim.SGD(groups, lr=scaled.lr, momentum=scaled.momentum or 0.0)
    optimizer = DelayCompensation(base, delay=0, **VARIANTS[setting.variant])
    schedule = LambdaLR(optimizer, lambda step: 1 - step / max(steps, step))
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def copy_weights(stage: nn.Module, ahead: dict[Tensor, Tensor]) -> Weights:
    """What a forward pass and its backward pass use: predicted weights where there are any."""
    return {
        name: ahead.get(p, p).detach().clone().requires_grad_()
        for name, p in stage.named_parameters()
    }


def emulate(
    stages: list[nn.Module], optimizer: DelayCompensation, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[float]:
    """Trains in one process; step i is computed with weights after i − D steps of each stage."""
    last = len(stages) - 1
    kept = [deque[Weights](maxlen=delay_of(s, last + 1) + 1) for s in range(last + 1)]
    losses = []
    for x, y in batches:
        ahead = optimizer.predictions()
        for stage, versions in zip(stages, kept, strict=True):
            versions.append(copy_weights(stage, ahead))
            x = functional_call(stage, versions[0], x)
        loss = cross_entropy(x, y)
        leaves = [p for versions in kept for p in versions[0].values()]
        params = [p for stage in stages for p in stage.parameters()]
        for p, grad in zip(params, torch.autograd.grad(loss, leaves), strict=True):
            p.grad = grad
        optimizer.step()
        losses.append(loss.item())
    return losses


class StageProcess:
    """One stage of the pipeline, in the process of its rank."""

    def __init__(self, stage: nn.Module, optimizer: DelayCompensation, features: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.last, self.delay = self.rank == self.size - 1, delay_of(self.rank, self.size)
        self.stage, self.optimizer, self.features = stage, optimizer, features
        self.version, self.delays, self.losses = 0, list[int](), list[float]()
        self.flying = deque[tuple[Tensor, Weights, Tensor, int]]()
        self.sent = deque[tuple[Any, Tensor]]()

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """One forward and one backward pass in a step of time; only the last ones are drained."""
        for x, y in batches:
            self.forward(x, y)
            if len(self.flying) > self.delay:
                self.backward()
        while self.flying:
            self.backward()
        while self.sent:
            self.sent.popleft()[0].wait()

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Pass of the newest micro-batch, with the weights as they are predicted now."""
        if self.rank:
            x = x.new_empty(len(x), self.features)
            dist.recv(x, self.rank - 1)
            x.requires_grad_()
        weights = copy_weights(self.stage, self.optimizer.predictions())
        out = functional_call(self.stage, weights, x)
        if self.last:
            out = cross_entropy(out, y)
            self.losses.append(out.item())
        else:
            self.send(out.detach(), self.rank + 1)
        self.flying.append((x, weights, out, self.version))

    def backward(self) -> None:
        """Pass of the oldest micro-batch, with the weights of its forward pass, and the step."""
        x, weights, out, version = self.flying.popleft()
        grad = torch.ones_like(out)
        if not self.last:
            dist.recv(grad, self.rank + 1)
        inputs = [*weights.values(), *([x] if self.rank else [])]
        grads = torch.autograd.grad(out, inputs, grad)
        if self.rank:
            self.send(grads[-1], self.rank - 1)
        for p, found in zip(self.stage.parameters(), grads, strict=False):
            p.grad = found
        self.optimizer.step()
        self.delays.append(self.version - version)
        self.version += 1

    def send(self, tensor: Tensor, to: int) -> None:
        """Send without waiting; keeps what may still be on its way."""
        self.sent.append((dist.isend(tensor.contiguous(), to), tensor))
        while len(self.sent) > 2 * (self.delay + 4):
            self.sent.popleft()[0].wait()


def load() -> tuple[list[Tensor], list[Tensor]]:
    """Images and labels, to train on and to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16 - 0.5, labels, test_size=360, random_state=0)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return [x.float(), y], [x_test.float(), y_test]


def batches(data: list[Tensor], seed: int, micro_batch: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches in the order of a seed; an epoch's last samples that fill none are left out."""
    x, y = data
    order, whole = torch.Generator().manual_seed(seed), len(x) // micro_batch * micro_batch
    epochs = [torch.randperm(len(x), generator=order)[:whole] for _ in range(EPOCHS)]
    return [(x[part], y[part]) for part in torch.cat(epochs).split(micro_batch)]


def train(setting: Setting, seed: int, data: list[Tensor]) -> nn.Module:
    """Trains a network, its stages in the processes that there are, or emulated in one."""
    stages = make_stages(setting.num_stages, seed)
    parts = batches(data, seed, setting.micro_batch)
    if not dist.is_initialized():
        emulate(stages, make_optimizer(dict(enumerate(stages)), setting, len(parts)), parts)
        return nn.Sequential(*stages)
    rank, own = dist.get_rank(), stages[dist.get_rank()]
    process = StageProcess(own, make_optimizer({rank: own}, setting, len(parts)), WIDTH)
    process.train(parts)
    delays = [min(step, process.delay) for step in range(len(parts))]
    assert process.delays == delays, process.delays[:20]
    states: list[Any] = [None] * setting.num_stages
    dist.all_gather_object(states, own.state_dict())
    for stage, state in zip(stages, states, strict=True):
        stage.load_state_dict(state)
    return nn.Sequential(*stages)


@torch.no_grad()
def measure(net: nn.Module, data: list[Tensor], test: list[Tensor]) -> dict[str, str]:
    """The loss of all training samples, and the accuracy on the others, with the weights as is."""
    accuracy = (net(test[0]).argmax(1) == test[1]).double().mean().item()
    loss = cross_entropy(net(data[0]), data[1]).item()
    return {"train_loss": f"{loss:.5f}", "test_accuracy": f"{accuracy:.4f}"}


def study(setting: Setting, path: Path) -> None:
    """Writes a row for each seed."""
    data, test = load()
    where = "processes" if dist.is_initialized() else "emulated"
    stages, variant, lr, micro_batch = setting
    rows = []
    for seed in range(SEEDS):
        key = {
            "thing": "pipelined backpropagation of the digits",
            "variant": variant if stages > 1 else "synchronous",
            "mode": f"{stages} stages, {where}, lr {lr}, seed {seed}",
            "dtype": "float32",
            "shape": f"{EPOCHS} epochs, micro-batch {micro_batch}, {BLOCKS} blocks",
            "device": name_of("cpu"),
        }
        place = {"stages": stages, "lr": lr, "micro_batch": micro_batch, "seed": seed}
        result = measure(train(setting, seed, data), data, test)
        numbers = {name: str(value) for name, value in place.items()}
        rows.append({**key, **numbers, **result, **describe("torch", "lightning")})
    if not dist.is_initialized() or dist.get_rank() == 0:
        write(rows, path)
        print(setting, *(row["train_loss"] for row in rows), flush=True)


def settings_for(num_stages: int) -> list[Setting]:
    """All variants at all rates; without a delay they are the same."""
    variants = VARIANTS if num_stages > 1 else ["late"]
    return [Setting(num_stages, variant, lr) for variant in variants for lr in RATES]


def main() -> None:
    """Under torchrun the stages that are processes, else the others and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batch", type=int, choices=[1, MICRO_BATCH], help="only this one")
    only = parser.parse_args().micro_batch
    torch.set_num_threads(1)
    path = ROOT / "benchmarks" / "results" / "pipelined_backprop.csv"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        for setting in settings_for(dist.get_world_size()):
            study(setting, path)
        dist.destroy_process_group()
        return
    chosen = [x for num_stages in EMULATED for x in settings_for(num_stages)] + SINGLE
    for setting in chosen:
        if only in (None, setting.micro_batch):
            study(setting, path)
    lines = summarize(path)
    print_table(lines)
    draw(lines, ROOT / "docs" / "pipelined_backprop.png")


if __name__ == "__main__":
    main()
