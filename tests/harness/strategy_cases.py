"""Runs of one module under each strategy of the room, and beside them in one process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from harness._distributed import run_distributed
from harness._fits import fit
from harness.deepspeed_parts import deepspeed
from harness.mixed_module import ACCUMULATE, Mixed, batches
from lightning_ext.strategies import FSDP2Strategy, PipelineStrategy, ZeroPPStrategy
from lightning_ext.strategies._deepspeed._weights import whole_weights

Weights = dict[str, Tensor]


def flat(weights: Weights) -> Tensor:
    """All of them in a row, in float64."""
    return torch.cat([weights[name].detach().double().flatten() for name in sorted(weights)])


def distance(one: Weights, other: Weights) -> float:
    """The greatest difference of any element."""
    assert one.keys() == other.keys()
    return float((flat(one) - flat(other)).abs().max())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which ranks may hold parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _weights(module: nn.Module) -> Weights:
    return {n: whole(p).detach().clone() for n, p in module.named_parameters()}


def _gradients(module: nn.Module) -> Weights:
    found = {n: p.grad for n, p in module.named_parameters()}
    return {n: whole(g).clone() for n, g in found.items() if g is not None}


def _weights_of_deepspeed(module: nn.Module) -> Weights:
    found, names = whole_weights(module, keep=True), dict(module.named_parameters())
    return {name: found[name] for name in names}


def _gradients_of_deepspeed(module: nn.Module) -> Weights:
    from deepspeed.utils import safe_get_full_grad

    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return {n: safe_get_full_grad(p).clone() for n, p in trained.items()}


def _of_all_ranks(own: Weights) -> Weights:
    """What is here, and beside it what is on other ranks of a pipeline alone."""
    found: list[Weights] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    return {n: x for one in (*found, own) for n, x in one.items()}


class Case(NamedTuple):
    """A strategy, and how close to one process it comes.

    Args:
        make: Builds it for so many ranks.
        dtype: Of the parameters that are compared after 50 steps.
        parameters: Greatest difference of any element of them.
        gradients: ‖g − g₁‖/‖g₁‖ of any parameter in the first step, in float32.
        bf16: ‖w − w₁‖/‖w₁ − w₀‖ over all parameters after 10 steps, by Lightning's precision.
        scalar: Shape of parameters that are one number; DeepSpeed has none without a dimension.
        by_value: Whether gradients clipped by value are compared; DeepSpeed clips by norm alone.
        weights: Whole parameters by name.
        first_gradients: Whole gradients by name, before the optimizer steps.
        replicas: Data-parallel ranks of so many.
        micro_batches: Into how many the strategy cuts a batch.
    """

    make: Callable[[int], Strategy | str]
    dtype: torch.dtype = torch.float64
    parameters: float = 1e-10
    gradients: float = 1e-6
    bf16: float = 0.03
    scalar: tuple[int, ...] = ()
    by_value: bool = True
    weights: Callable[[nn.Module], Weights] = _weights
    first_gradients: Callable[[nn.Module], Weights] = _gradients
    replicas: Callable[[int], int] = int
    micro_batches: int = 1

    def module(self, optimizer: str = "sgd") -> Mixed:
        """What is trained."""
        return Mixed(optimizer, scalar=self.scalar)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded on its way between ranks."""
        return self.parameters < 1e-3

    def export(self, trainer: Trainer, path: Path) -> None:
        """Writes a file for `load_from_checkpoint`."""
        if hasattr(trainer.strategy, "export"):
            trainer.strategy.export(path)
        else:
            trainer.save_checkpoint(path, weights_only=True)


def _exact_zeropp(world: int) -> Strategy:
    return ZeroPPStrategy(quantize_weights=False, quantize_gradients=False, ranks_per_node=2)


def _pipeline(replicas: Callable[[int], int] = lambda world: 1, **options: Any) -> Case:
    """Batches of two micro-batches, for all that is trained with two batches in a step."""
    return Case(
        lambda world: PipelineStrategy(
            num_microbatches=2, data_parallel_size=replicas(world), **options
        ),
        weights=lambda module: _of_all_ranks(_weights(module)),
        first_gradients=lambda module: _of_all_ranks(_gradients(module)),
        replicas=replicas,
        micro_batches=2,
    )


# A name up to its comma is that of the class.
CASES = {
    "ddp": Case(lambda world: DDPStrategy(find_unused_parameters=True)),
    "FSDP2Strategy": Case(lambda world: FSDP2Strategy()),
    "ZeroPPStrategy": Case(
        lambda world: ZeroPPStrategy(hpz=world > 2, ranks_per_node=world // 2),
        parameters=0.01,
        gradients=0.15,
        bf16=0.1,
        by_value=False,  # with Adam, which makes whole steps of what rounding leaves of nothing
    ),
    "ZeroPPStrategy, exact": Case(_exact_zeropp),
    "DeepSpeedZeroPPStrategy": Case(
        lambda world: deepspeed(),
        dtype=torch.float32,
        parameters=1e-5,
        bf16=0.35,  # "bf16-true" has float32 weights in its optimizer, one process has none
        scalar=(1,),
        by_value=False,
        weights=_weights_of_deepspeed,
        first_gradients=_gradients_of_deepspeed,
    ),
    "PipelineStrategy": _pipeline(stages_per_rank="layers"),
    "PipelineStrategy, gpipe": _pipeline(schedule="gpipe"),
    "PipelineStrategy, fsdp2": _pipeline(lambda world: 2, stages_per_rank="layers"),
    "PipelineStrategy, ddp": _pipeline(
        lambda world: 2, schedule="1f1b", data_parallel="ddp", split="params"
    ),
}


class Export(Callback):
    """Writes whole weights at the end."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case, self.path = case, path

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the strategy is taken down."""
        self.case.export(trainer, self.path)


class Record(Callback):
    """Keeps what a case finds in the first step and at the end."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.gradients: Weights = {}
        self.weights: Weights = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Before clipping."""
        if not self.gradients:
            self.gradients = self.case.first_gradients(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the strategy is taken down."""
        self.weights = self.case.weights(module)


def trained(case: Case, module: LightningModule, steps: int, **kwargs: Any) -> Record:
    """What a fit by a case's strategy on all ranks came to."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    record = Record(case)
    ranks = world // case.replicas(world)
    options = {
        "accumulate_grad_batches": ACCUMULATE // case.micro_batches,
        "use_distributed_sampler": False,
        "strategy": case.make(world),
        "devices": world,
        "max_steps": steps,
        "max_epochs": -1,
    }
    callbacks = [record, *kwargs.pop("callbacks", ())]
    train = batches(ranks, case.micro_batches)
    fit(callbacks, module=module, train=train, **(options | kwargs))
    return record


NORM: dict[str, Any] = {"gradient_clip_val": 0.1}
VALUE: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
PRECISIONS: tuple[Any, ...] = ("bf16-true", "bf16-mixed")


class Facts(NamedTuple):
    """What one rank came to.

    Args:
        norm: Weights after 50 steps, clipped by norm, in the case's dtype.
        gradients: Of the first step in float32, before clipping.
        value: Weights after 5 steps, clipped by value, in the case's dtype.
        bf16: Weights after 10 steps by Lightning's precision.
        straight: Weights after 4 steps.
        resumed: The same by way of a checkpoint after 2 of them.
        exported: The same by way of `export` and `load_from_checkpoint`.
    """

    norm: Weights
    gradients: Weights
    value: Weights
    bf16: dict[str, Weights]
    straight: Weights
    resumed: Weights
    exported: Weights


@functools.cache
def alone(name: str) -> Facts:
    """What one process came to with the module and dtype of a case."""
    case = CASES[name]._replace(make=lambda world: "auto", weights=_weights)
    case = case._replace(first_gradients=_gradients, replicas=int, micro_batches=1)
    return Facts(*_norms(case), *_more(case), {}, {}, {})


@functools.cache
def on_ranks(name: str, world: int) -> list[Facts]:
    """What each rank of a case came to; with more than two of them the first two facts only."""
    with TemporaryDirectory() as folder:
        return run_distributed(_facts, world, args=(name, Path(folder)), timeout=180.0)


def _facts(name: str, folder: Path) -> Facts:
    case = CASES[name]
    if os.environ["WORLD_SIZE"] != "2":
        return Facts(*_norms(case), {}, {}, {}, {}, {})
    return Facts(*_norms(case), *_more(case), *_through_files(case, folder))


def _norms(case: Case) -> tuple[Weights, Weights]:
    norm = trained(case, case.module().to(case.dtype), 50, **NORM).weights
    return norm, trained(case, case.module(), 1, **NORM).gradients


def _more(case: Case) -> tuple[Weights, dict[str, Weights]]:
    module = case.module("adamw").to(case.dtype)
    value = trained(case, module, 5, **VALUE).weights if case.by_value else {}
    runs = {one: trained(case, case.module(), 10, precision=one, **NORM) for one in PRECISIONS}
    return value, {one: run.weights for one, run in runs.items()}


def _through_files(case: Case, folder: Path) -> tuple[Weights, Weights, Weights]:
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    batches_of_step = ACCUMULATE // case.micro_batches
    options: dict[str, Any] = {"limit_train_batches": 2 * batches_of_step, **NORM}
    export = Export(case, folder / "whole.ckpt")
    options |= {"callbacks": [save, export], "enable_checkpointing": True}
    straight = trained(case, case.module("adamw"), 4, **options)
    last = str(folder / "step=2.ckpt")
    resumed = trained(case, case.module("adamw"), 4, ckpt_path=last, **options)
    loaded = Mixed.load_from_checkpoint(export.path, optimizer="adamw", scalar=case.scalar)
    return straight.weights, resumed.weights, _weights(loaded)
