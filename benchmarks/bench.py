"""Measure the suite beside its peers on a CPU with 2 cores, and write the table of README.md.

    make bench
    PYTHONPATH=. python benchmarks/bench.py --only ema,optimizers
    PYTHONPATH=. python benchmarks/bench.py --pairs 3 --results /tmp/rows   # a trial; no table

In slices, each a script of this folder in a process of its own, with a bound on its time; together
they take less than 20 minutes on a machine that does nothing else. Rows go to
`benchmarks/results/bench_<slice>.csv`; a new run replaces its rows. A peer that is not installed is
named and left out.
Exit codes: 0 all were measured, 1 a slice failed or ran out of time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks import table
from benchmarks._peers import present
from benchmarks._rows import ROOT

RESULTS = ROOT / "benchmarks" / "results"
LANGUAGE_MODEL = "language_model,micro=16"
SMALL = "16 x (256 x 256 + 256)"
OPTIMIZERS = ("LAMB", "LARS", "Lion", "AdamP", "NorMuon")
LOW_BIT = ("AdamW int8", "AdamW int4", "AdamW fp8")
CALLBACKS = ("EMA", "GradientNoiseScale", "both, noise_scale")
PEERS = {
    "gns_pytorch": "gns-pytorch",
    "ema_pytorch": "ema-pytorch",
    "timm": "timm",
    "pytorch_optimizer": "pytorch_optimizer",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "open_clip": "open_clip_torch",
}


class Slice(NamedTuple):
    """A script, and how it is called.

    Attributes:
        script: of this folder.
        words: its options; `{pairs}` is put in, `{few}` for calls of seconds.
        pairs: that it times.
        seconds: that it may take.
    """

    script: str
    words: tuple[str, ...]
    pairs: int
    seconds: int

    def command(self, results: Path, pairs: int | None) -> list[str]:
        """Return what is run."""
        count = pairs or self.pairs
        words = [word.format(pairs=count, few=-(-count // 3)) for word in self.words]
        script = str(Path(__file__).parent / f"{self.script}.py")
        return [sys.executable, script, *words, "--results", str(results)]


SLICES = {
    "noise_scale": Slice("noise_scale", ("--pairs", "{pairs}"), 30, 600),
    "ema": Slice("ema", ("--beside", "--threads", "1", "--pairs", "{pairs}"), 100, 180),
    "optimizers": Slice(
        "optimizers",
        ("--pairs", "{pairs}", "--shapes", SMALL, "--things", *OPTIMIZERS),
        30,
        300,
    ),
    "low_bit": Slice(
        "low_bit",
        ("--pairs", "{pairs}", "--shapes", SMALL, "--things", *LOW_BIT),
        30,
        300,
    ),
    "contrastive": Slice(
        "contrastive",
        ("--things", "clip_loss", "siglip_loss", "--batches", "2048:{pairs}", "8192:{few}"),
        30,
        420,
    ),
    "callback_overhead": Slice(
        "callback_overhead",
        ("--pairs", "{pairs}", "--shapes", LANGUAGE_MODEL, "--things", *CALLBACKS),
        30,
        600,
    ),
}


class Outcome(NamedTuple):
    """How a slice went."""

    name: str
    seconds: float
    what: str


def run(name: str, results: Path, pairs: int | None) -> Outcome:
    """Run a slice in a process of its own; what fails does not keep others from running."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    start = time.monotonic()
    command = SLICES[name].command(results / f"bench_{name}.csv", pairs)
    try:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=SLICES[name].seconds
        ).returncode
        what = "done" if code == 0 else f"FAILED with exit code {code}"
    except subprocess.TimeoutExpired:
        what = f"STOPPED after {SLICES[name].seconds} s"
    return Outcome(name, time.monotonic() - start, what)


def say_what_is_missing(console: Console) -> None:
    """Name peers that are not installed, and other work that would spoil the times."""
    for package, name in PEERS.items():
        if not present(package):
            console.print(f"{name} is not installed: its rows are left out")
    load = os.getloadavg()[0]
    if load > 1:
        console.print(f"load average {load:.1f}: times of a machine at work are not worth much")


def summary(outcomes: list[Outcome]) -> Table:
    """Return how the slices went."""
    shown = Table("slice", "seconds", "", title="make bench")
    for name, seconds, what in outcomes:
        shown.add_row(name, f"{seconds:.0f}", what)
    shown.add_row("all", f"{sum(x.seconds for x in outcomes):.0f}", "")
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SLICES), help="slices, separated by commas")
    parser.add_argument("--pairs", type=int, help="instead of those of each slice")
    parser.add_argument("--results", type=Path, default=RESULTS, help="elsewhere: no table")
    args = parser.parse_args(arguments)
    args.only = args.only.split(",")
    if wrong := [name for name in args.only if name not in SLICES]:
        parser.error(f"--only {','.join(wrong)}: no such slice; there are {', '.join(SLICES)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the slices, show how they went, write the table and return the exit code."""
    args, console = parse(arguments), Console()
    say_what_is_missing(console)
    args.results.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in args.only:
        console.rule(f"{name}, at most {SLICES[name].seconds} s")
        outcomes.append(run(name, args.results, args.pairs))
    console.print(summary(outcomes))
    if args.results == RESULTS:
        table.main([])
    return int(any(outcome.what != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
