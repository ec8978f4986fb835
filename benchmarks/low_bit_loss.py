r"""Loss of the small GPT with states of few bits or of low rank, beside the band of float32.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/low_bit_loss.py

Every run takes the same number of steps of 16 windows, with a warm-up over a tenth of them and a
cosine to a tenth of the rate, and no weight decay. A seed gives weights and order of data, the same
for all optimizers. The band is what AdamW with states in float32 reaches over its seeds; a method
is inside of it where its mean over seeds is. `--tune` runs rates on a seed that is not used again;
`RATES` are the best of them. Rows that exist are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks._low_bit_figure import draw
from benchmarks._rows import ROOT, describe, name_of, write
from examples.language_model.data import TextFolder
from examples.language_model.module import GPT
from lightning_ext import optim
from lightning_ext.nn import convert_int8_linear

MICRO_BATCH = 16
LAST = 50  # steps that a training loss is the mean of
TUNING_SEED = 100
THING = "loss of a small GPT"
REFRESH = {"rank": 0.25, "update_proj_gap": 50}  # of 300 steps; papers: 200 of 10,000 and more


class Method(NamedTuple):
    """An optimizer to train with.

    Attributes:
        kind: its class.
        settings: of it.
        rate: the method whose rate it takes.
        grid: rates to try, where that is itself.
        int8_weights: whether the linear layers of blocks are in 8 bits.
    """

    kind: Callable[..., Optimizer]
    settings: dict[str, Any]
    rate: str
    grid: tuple[float, ...] = ()
    int8_weights: bool = False


def adamw(state_dtype: str, grid: tuple[float, ...] = ()) -> Method:
    """AdamW with states in a format, all at the rate of float32."""
    return Method(optim.LowBitAdamW, {"state_dtype": state_dtype}, "float32", grid)


METHODS = {
    "float32": adamw("float32", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "bfloat16": adamw("bfloat16"),
    "int8": adamw("int8"),
    "fp8": adamw("fp8"),
    "int4": adamw("int4"),
    "CAME": Method(optim.CAME, {}, "CAME", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)),
    "CAME, int8": Method(optim.CAME, {"state_dtype": "int8"}, "CAME"),
    "GaLore": Method(optim.GaLore, REFRESH, "GaLore", (0.005, 0.01, 0.02)),
    "Q-GaLore": Method(optim.QGaLore, REFRESH, "Q-GaLore", (0.005, 0.01, 0.02), int8_weights=True),
    "Q-GaLore, float32 weights": Method(optim.QGaLore, REFRESH, "Q-GaLore"),
    "Fira": Method(optim.Fira, REFRESH, "Fira", (0.0025, 0.005, 0.01)),
    "GradNormLoRP": Method(optim.GradNormLoRP, REFRESH, "GradNormLoRP", (0.005, 0.01, 0.02)),
    "APOLLO": Method(optim.APOLLO, REFRESH, "APOLLO", (0.0025, 0.005, 0.01, 0.02)),
    "APOLLO-Mini": Method(
        optim.APOLLOMini, {"update_proj_gap": 50}, "APOLLO-Mini", (0.0025, 0.005, 0.01, 0.02)
    ),
}
SEEDS = {"float32": 5}  # others: 3
RATES = {
    "float32": 1e-3,
    "CAME": 2e-4,
    "GaLore": 0.01,
    "Q-GaLore": 0.01,
    "Fira": 0.005,
    "GradNormLoRP": 0.01,
    "APOLLO": 0.005,
    "APOLLO-Mini": 0.005,
}


class Run(NamedTuple):
    """What a training gave.

    Attributes:
        train: loss of each step.
        val: loss of the validation windows at the end.
        state_bytes: of all states.
        matrix_bytes: of those of the blocks' matrices.
        few_bits: share of the parameters whose moments are in fewer than 32 bits.
        seconds: of the process.
    """

    train: list[float]
    val: float
    state_bytes: float
    matrix_bytes: float
    few_bits: float
    seconds: float


def made(method: Method, module: GPT, lr: float, adamw_lr: float, seed: int) -> Optimizer:
    """The optimizer; embeddings, output layer and vectors go to AdamW in the low-rank family."""
    settings = {"lr": lr, "weight_decay": 0.0, "seed": seed, **method.settings}
    if "update_proj_gap" not in method.settings:
        return method.kind(module.parameters(), **settings)
    chosen = {id(p) for p in matrices(module)}
    others = [p for p in module.parameters() if id(p) not in chosen]
    rest = {"params": others, "algorithm": "adamw", "lr": adamw_lr}
    return method.kind([{"params": matrices(module)}, rest], **settings)


def matrices(module: GPT) -> list[nn.Parameter]:
    """Those of the blocks."""
    return [p for p in module.blocks.parameters() if p.ndim == 2]


def rate_at(step: int, steps: int) -> float:
    """Share of the rate: a warm-up over a tenth of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def run(data: TextFolder, variant: str, seed: int, steps: int, lr: float, adamw_lr: float) -> Run:
    """Trains a new model."""
    torch.manual_seed(seed)
    method, module, start = METHODS[variant], GPT(), time.process_time()
    if method.int8_weights:
        convert_int8_linear(module, include=["blocks.*"])
    optimizer = made(method, module, lr, adamw_lr, seed)
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, steps))
    train = []
    for _, windows in zip(range(steps), data.train_dataloader(), strict=False):
        loss = module.loss(windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        train.append(loss.item())
    val = validation_loss(module, data)
    return Run(train, val, *sizes(optimizer, module), time.process_time() - start)


@torch.no_grad()
def validation_loss(module: GPT, data: TextFolder) -> float:
    """Nats per byte."""
    parts = [(len(x), module.loss(x).item()) for x in data.val_dataloader()]
    return sum(n * x for n, x in parts) / sum(n for n, _ in parts)


def sizes(optimizer: Optimizer, module: GPT) -> tuple[float, float, float]:
    """Bytes a parameter of states, of those of matrices, and the share that is in few bits."""
    params, chosen = list(module.parameters()), matrices(module)
    total = sum(p.numel() for p in params)
    small = sum(p.numel() for p in params if has_few_bits(optimizer.state[p]))
    held = [storage_bytes([optimizer.state[p] for p in some]) for some in (params, chosen)]
    return held[0] / total, held[1] / sum(p.numel() for p in chosen), small / total


def storage_bytes(states: Any) -> int:
    """Bytes of the storages of tensors, each once."""
    storages = (x.untyped_storage() for x in tensors(states))
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def has_few_bits(state: Any) -> bool:
    """Whether a state has a tensor in fewer than 32 bits."""
    return any(x.element_size() < 4 for x in tensors(state) if x.numel() > 1)


def tensors(held: Any) -> Iterator[Tensor]:
    """Tensors in dictionaries, lists and tuples."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from tensors(part)


def row(variant: str, mode: str, steps: int, lr: float, found: Run) -> dict[str, str]:
    """A row of results."""
    return {
        "thing": THING,
        "variant": variant,
        "mode": mode,
        "dtype": "float32",
        "shape": shape(steps),
        "device": name_of("cpu"),
        "lr": f"{lr:g}",
        "train_loss": f"{sum(found.train[-LAST:]) / len(found.train[-LAST:]):.4f}",
        "val_loss": f"{found.val:.4f}",
        "state_bytes": f"{found.state_bytes:.3f}",
        "matrix_state_bytes": f"{found.matrix_bytes:.3f}",
        "few_bits": f"{found.few_bits:.4f}",
        "cpu_seconds": f"{found.seconds:.1f}",
        **describe("torch", "lightning"),
    }


def shape(steps: int) -> str:
    """What a run is made of."""
    return f"{steps} steps of {MICRO_BATCH} windows"


def known(path: Path, steps: int) -> set[tuple[str, str]]:
    """Variants and modes that have a row."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (x["variant"], x["mode"]) for x in csv.DictReader(file) if x["shape"] == shape(steps)
        }


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, str, int, float]]:
    """Variant, mode, seed and rate of each run, seed by seed."""
    if args.tune:
        for variant in args.only:
            for lr in args.rates or METHODS[variant].grid:
                yield variant, f"seed {TUNING_SEED}, lr {lr:g}", TUNING_SEED, lr
        return
    for seed in range(max(args.seeds or 0, *SEEDS.values())):
        for variant in args.only:
            if seed < (args.seeds or SEEDS.get(variant, 3)):
                yield variant, f"seed {seed}", seed, RATES[METHODS[variant].rate]


def main() -> None:
    """Runs what has no row yet, and draws what has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, help="by default 5 of float32 and 3 of others")
    parser.add_argument("--only", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="try rates")
    parser.add_argument("--rates", type=float, nargs="+", help="with --tune: other ones")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "low_bit_loss.png")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data, path = TextFolder(micro_batch=MICRO_BATCH), args.out / "low_bit_loss.csv"
    for variant, mode, seed, lr in jobs(args):
        if (variant, mode) not in known(path, args.steps):
            found = run(data, variant, seed, args.steps, lr, RATES.get("float32", lr))
            new = row(variant, mode, args.steps, lr, found)
            write([new], path)
            print(*(new[x] for x in ("variant", "mode", *list(new)[6:13])), flush=True)
    if not args.tune:
        draw(path, args.figure, shape(args.steps))


if __name__ == "__main__":
    main()
