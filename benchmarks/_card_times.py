"""Times that stand on cards beside no peer: medians of CPU time, of one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.language_model.module import GPT
from lightning_ext import functional, optim, scaling
from lightning_ext.callbacks import LargeBatchRecipe, WireMeter, memory_plan
from lightning_ext.nn import convert_int8_linear

Figures = Iterator[tuple[str, str, float]]


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    """The median CPU time of several calls, after one that does not count."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(1e3 * (time.process_time() - start))
    return median(taken)


def sweeps() -> Figures:
    """A fit of a critical batch."""
    errors = np.exp(0.05 * np.random.default_rng(0).standard_normal(7))
    table = [(4 * 2**k, 100 * (1 + 10 / 2**k) * e) for k, e in enumerate(errors)]
    for name, exponent in (("given", 1.0), ("free", None)):
        found = milliseconds(partial(scaling.fit_critical_batch, table, exponent=exponent))
        yield "fit_critical_batch, CPU ms", f"exponent {name}", found


class Layers(BoringModel):
    """Linear layers, with batch normalizations behind them where that is asked for."""

    def __init__(self, count: int, norms: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(count):
            layers += [nn.Linear(32, 32), nn.BatchNorm1d(32)] if norms else [nn.Linear(32, 32)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The output of all."""
        y: Tensor = self.net(x)
        return y

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Timed(LargeBatchRecipe):
    """Takes the time of its first look."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Looks."""
        start = time.process_time()
        super().on_train_batch_start(*args)
        self.ms = 1e3 * (time.process_time() - start)


def recipes() -> Figures:
    """A look of the large-batch recipe."""
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    for name, count, norms in (("2 linear layers", 2, False), ("100, and 100 norms", 100, True)):
        taken = []
        for _ in range(7):
            recipe = Timed(reference_batch=8, reference_lr=0.1, on_problem="warn")
            trainer = Trainer(
                max_steps=1, limit_val_batches=0, enable_model_summary=False, callbacks=[recipe],
                **options,
            )  # fmt: skip
            trainer.fit(Layers(count, norms), DataLoader(RandomDataset(32, 64), batch_size=8))
            taken.append(recipe.ms)
        yield "a look of LargeBatchRecipe, CPU ms", name, median(taken)


def offload() -> Figures:
    """What moving states takes a step, for each of 1000 parameters with two states."""
    found = []
    for wrapped in (False, True):
        weights = [nn.Parameter(torch.zeros(8)) for _ in range(1000)]
        for w in weights:
            w.grad = torch.ones(8)
        base = optim.LowBitAdamW(weights, state_dtype="float32")
        optimizer = optim.OffloadedStates(base) if wrapped else base
        found.append(milliseconds(optimizer.step))
    yield "OffloadedStates, CPU µs a state", "2000 states", 1e3 * (found[1] - found[0]) / 2000


def passes(module: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    module(x).sum().backward()


def int8_linear() -> Figures:
    """Forward and backward of a layer of 512 × 2048, and rounding it at random."""
    plain = nn.Sequential(nn.Linear(512, 2048))
    codes = convert_int8_linear(nn.Sequential(nn.Linear(512, 2048)))
    for rows in (64, 1024):
        x = torch.randn(rows, 512)
        one, other = (milliseconds(partial(passes, m, x)) for m in (codes, plain))
        yield "Int8Linear over Linear", f"{rows} rows", one / other
    weight: Any = codes[0].weight
    new = weight.dequantize()
    found = milliseconds(lambda: weight.requantize_(new, seed=0, step=1))
    yield "requantize_, CPU ms", "512 x 2048", found


def apollo() -> Figures:
    """Projections that are made at each step again."""
    yield (
        "gaussian_projection, CPU ms",
        "128 x 512",
        milliseconds(lambda: functional.gaussian_projection(128, 512, seed=0)),
    )
    makes: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "APOLLO, rank 128": lambda w: optim.APOLLO(w, rank=128),
        "GaLore, rank 32": lambda w: optim.GaLore(w, rank=32),
    }
    for name, make in makes.items():
        weight = nn.Parameter(torch.randn(1024, 512))
        optimizer, weight.grad = make([weight]), torch.randn(1024, 512)
        yield "a step of 1024 x 512, CPU ms", name, milliseconds(optimizer.step)


def pipelines() -> Figures:
    """Timelines and plans."""
    for ranks, stages, count in ((4, 2, 8), (64, 4, 256)):
        shape: dict[str, Any] = {
            "pipeline_ranks": ranks,
            "stages_per_rank": stages,
            "num_microbatches": count,
        }
        found = milliseconds(partial(scaling.pipeline_timeline, "breadth_first", **shape), 5)
        yield "pipeline_timeline, CPU ms", f"{ranks} ranks, {stages} stages, {count} parts", found
    for layers, ranks, critical in ((64, 4096, 2000), (64, 64, 20_000), (60, 64, 20_000)):
        model = scaling.PipelineModel(
            layers=layers,
            layer_params=12 * 8192**2,
            layer_s=0.066,
            boundary_bytes=2 * 8192 * 2048,
            stashed_bytes=34 * 8192 * 2048,
        )
        links = scaling.Links(250e9, 3e9, 5e-6)
        cluster = scaling.PipelineCluster(ranks=ranks, memory_bytes=80e9, links=links)
        found = milliseconds(
            partial(scaling.advise_pipeline, model, cluster, critical_batch=critical),
            5,
        )
        setting = f"{layers} layers, {ranks} ranks, critical batch {critical}"
        yield "advise_pipeline, CPU ms", setting, found


def plans() -> Figures:
    """A memory plan of 24 encoder layers on meta."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True) for _ in range(24)]
        module, batch = nn.Sequential(*layers), torch.empty(4, 512, 2048)
    plan: Any = None

    def make() -> None:
        nonlocal plan
        plan = memory_plan(module, optimizer=torch.optim.AdamW, micro_batch=batch)

    found = milliseconds(make, 3)
    yield "memory_plan, CPU ms", "24 encoder layers of width 2048", found
    yield "memory_plan, GiB", "24 encoder layers of width 2048", plan.total_bytes / 2**30


def meters() -> Figures:
    """A step under the meter of traffic over one without, in turn, in one process."""
    block = partial(nn.TransformerEncoderLayer, 96, 4, 384, dropout=0.0, batch_first=True)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "6-12-3, 4 samples": (nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3)), torch.randn(4, 6)),
        "4 layers of 512, 64 samples": (
            nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))),
            torch.randn(64, 512),
        ),
        "4 encoder layers of 96, 8 x 128 tokens": (
            nn.Sequential(*(block() for _ in range(4))),
            torch.randn(8, 128, 96),
        ),
    }
    for name, (module, x) in cases.items():
        adamw, ratios = torch.optim.AdamW(module.parameters()), []
        for _ in range(31):
            taken = []
            for meter in (nullcontext(), WireMeter(ranks_per_node=1)):
                start = time.process_time()
                with meter:
                    passes(module, x)
                    adamw.step()
                taken.append(time.process_time() - start)
            ratios.append(taken[1] / taken[0])
        yield "a step under WireMeter over one without", name, median(ratios[1:])


def products() -> Figures:
    """A product of the Hessian with a vector over a step, 32 windows of the small GPT."""
    gpt, x = GPT(), torch.randint(256, (32, 65), dtype=torch.uint8)
    params = [p for p in gpt.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(gpt.loss(x), params, create_graph=True)
        along = [torch.randn_like(p) for p in params]
        product = milliseconds(
            partial(torch.autograd.grad, gradient, params, along, retain_graph=True), 7
        )
    for name, kind in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        optimizer: torch.optim.Optimizer = kind(params, lr=1e-3)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            gpt.loss(x).backward()
            optimizer.step()

        yield "a Hessian-vector product over a step", name, product / milliseconds(step, 7)


CARDS = {
    "sweep_times": sweeps,
    "large_batch_recipe": recipes,
    "state_offload": offload,
    "int8_linear": int8_linear,
    "apollo": apollo,
    "pipeline_timeline": pipelines,
    "memory_plan": plans,
    "communication_volume": meters,
    "curvature_products": products,
}
