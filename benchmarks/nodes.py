"""Time steps of sharded training on two nodes of two ranks, over links of several speeds.

    PYTHONPATH=.:tests python benchmarks/nodes.py

A node is a network namespace of this machine; its link to the other is limited by `tc`, so that it
needs root on Linux. The variants take turns in short fits of one process group. First it asserts
that each of them trains as plain FSDP2 does, up to what rounding may change. Rows go to
`benchmarks/results/nodes.csv`, one for each variant and link; a new run replaces its rows.

Gloo reduces by an all-reduce, twice what has to be sent. `direct` sends each rank its part instead:
that is the peer which speaks for a better backend, and which `speed_up_direct` is against.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from harness import run_on_nodes, sent_by_node
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils.data import DataLoader

from benchmarks._pairs import interval
from benchmarks._rows import KEY, describe, name_of, write
from examples.language_model.data import TextFolder, Windows
from examples.language_model.module import GPT
from lightning_ext.callbacks import CommunicationVolume
from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy

RESULTS = Path(__file__).resolve().parent / "results" / "nodes.csv"
NODES, RANKS_PER_NODE = 2, 2
MICRO_BATCH = 4
WINDOWS_PER_STEP = MICRO_BATCH * NODES * RANKS_PER_NODE
WARM_UP, STEPS = 2, 5  # of one fit
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


class Direct:
    """A reduce-scatter that sends to each rank what it keeps, and no more."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what FSDP2 sends and receives."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sums what has come."""
        assert op == dist.ReduceOp.SUM, op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(-1, output_tensor.numel()), 0, out=output_tensor)


class Reduces(Callback):
    """Puts `Direct` into every unit."""

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        """After the strategy has sharded."""
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                direct: Any = Direct()  # the class to inherit from has no public name
                unit.set_custom_reduce_scatter(direct)


class Clock(Callback):
    """Notes the time, and what the node has sent, at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.sent: list[int] = []
        self.loss = 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Reads clock and counter."""
        self.seconds.append(time.perf_counter())
        self.sent.append(sent_by_node())
        self.loss = float(outputs["loss"])


class Variant(NamedTuple):
    """A way to train.

    Args:
        dtype: Of what is sent.
        strategy: Makes it.
        callbacks: Besides those that measure.
    """

    dtype: str
    strategy: Callable[[], Any]
    callbacks: tuple[Callback, ...] = ()


class Fit(NamedTuple):
    """What one fit has shown.

    Args:
        ms: Of each step after the warm-up.
        link_bytes: That this rank's node has sent in one of them.
        loss: Of the last.
    """

    ms: list[float]
    link_bytes: float
    loss: float


def only(switch: str) -> ZeroPPStrategy:
    """One of the three switches by itself."""
    names = ("quantize_weights", "hpz", "quantize_gradients")
    weights, hpz, gradients = (name == switch for name in names)
    return ZeroPPStrategy(quantize_weights=weights, hpz=hpz, quantize_gradients=gradients)


def bfloat16() -> FSDP2Strategy:
    """Two bytes for each weight and each gradient."""
    return FSDP2Strategy(mp_policy=BF16)


VARIANTS = {
    "fsdp2": Variant("float32", FSDP2Strategy),
    "fsdp2, direct": Variant("float32", FSDP2Strategy, (Reduces(),)),
    "fsdp2, bfloat16": Variant("bfloat16", bfloat16),
    "fsdp2, bfloat16, direct": Variant("bfloat16", bfloat16, (Reduces(),)),
    "zeropp": Variant("int8, int4", ZeroPPStrategy),
    "quantize_weights": Variant("int8", partial(only, "quantize_weights")),
    "hpz": Variant("float32", partial(only, "hpz")),
    "quantize_gradients": Variant("int4", partial(only, "quantize_gradients")),
}


def train(variant: Variant, rows: Tensor, callback: Callback) -> None:
    """Take as many steps as there are rows for, the same in every variant."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        num_nodes=NODES,
        devices=RANKS_PER_NODE,
        strategy=variant.strategy(),
        max_epochs=1,
        callbacks=[*variant.callbacks, callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(GPT(), DataLoader(Windows(rows), batch_size=MICRO_BATCH))


def fit(variant: Variant, rows: Tensor) -> Fit:
    """Train with a clock."""
    clock = Clock()
    train(variant, rows, clock)
    seconds, sent = np.array(clock.seconds)[WARM_UP - 1 :], np.array(clock.sent)[WARM_UP - 1 :]
    return Fit([*(1e3 * np.diff(seconds))], float(np.diff(sent).mean()), clock.loss)


def volume(variant: Variant, rows: Tensor) -> dict[str, int]:
    """What this rank sends in a step, counted under direct exchange."""
    meter = CommunicationVolume(every_n_steps=1)
    train(variant, rows[: 2 * WINDOWS_PER_STEP], meter)
    assert meter.last is not None
    return {name: getattr(meter.last.total, name) for name in ("inter_bytes", "intra_bytes")}


def measure(rows: Tensor, names: list[str], rounds: int) -> dict[str, Any]:
    """On each rank: all variants in each round, each round from another one on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    volumes = {name: volume(VARIANTS[name], rows) for name in names}
    fits: dict[str, list[Fit]] = {name: [] for name in names}
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            fits[name].append(fit(VARIANTS[name], rows))
    return {"volumes": volumes, "fits": fits}


def check(found: dict[str, Any]) -> None:
    """Assert that all have trained, to a loss that rounding explains."""
    plain = found["fits"]["fsdp2"][0].loss
    for name, fits in found["fits"].items():
        allowed = 1e-5 if VARIANTS[name].dtype == "float32" else 2e-2
        error = abs(fits[0].loss / plain - 1)
        assert error <= allowed, f"the loss of {name} is {error:.2g} off"


def figures(found: dict[str, Any], name: str) -> dict[str, str]:
    """Medians of a variant, and how much faster it is, step by step, than two peers."""
    times = {key: np.array([fit.ms for fit in fits]).ravel() for key, fits in found["fits"].items()}
    over = {key: interval(times[key] / times[name]) for key in ("fsdp2", "fsdp2, direct")}
    values = {
        "speed_up": over["fsdp2"]["ratio"],
        "low": over["fsdp2"]["low"],
        "high": over["fsdp2"]["high"],
        "speed_up_direct": over["fsdp2, direct"]["ratio"],
        "ms": float(np.median(times[name])),
    }
    texts = {key: f"{value:.4g}" for key, value in values.items()}
    link = median(fit.link_bytes for fit in found["fits"][name])
    sent = {key: str(value) for key, value in found["volumes"][name].items()}
    return texts | {"link_bytes": f"{link:.0f}"} | sent | {"steps": str(times[name].size)}


def row(found: dict[str, Any], name: str, mbit: float) -> dict[str, str]:
    """What goes to the table of results."""
    mode = f"{NODES}x{RANKS_PER_NODE} ranks, {mbit:g} Mbit/s"
    shape = f"language_model,micro={MICRO_BATCH}"
    key = ("sharded step", name, mode, VARIANTS[name].dtype, shape, name_of("cpu"))
    values = figures(found, name)
    print(mode, name, values, flush=True)
    return dict(zip(KEY, key, strict=True)) | values | describe()


def main() -> None:
    """Measure every variant over every link."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    names = list(dict.fromkeys(["fsdp2", "fsdp2, direct", *args.variants]))
    count = (WARM_UP + STEPS) * WINDOWS_PER_STEP
    windows = TextFolder(max_bytes=1_000_000).train.rows[:count]
    for mbit in args.mbit:
        how = {"inter_node_mbit": mbit, "timeout": 3600.0}
        given = (windows, names, args.rounds)
        found = run_on_nodes(measure, NODES, RANKS_PER_NODE, **how, args=given)[0]
        check(found)
        write([row(found, name, mbit) for name in names], RESULTS)


if __name__ == "__main__":
    main()
