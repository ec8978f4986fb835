"""Run every GPU test and benchmark on this machine's card; needs only the library and pytest.

    PYTHONPATH=. python benchmarks/gpu.py
    PYTHONPATH=. python benchmarks/gpu.py --only accuracy,ema

In slices, each well under 8 minutes: `tests`, those marked gpu; `accuracy`, every kernel against
float64; then timings of each family of kernels beside torch's own and those of the packages that
are there. Rows go to `benchmarks/results/gpu_<slice>.csv`; a new run replaces its rows. Scripts of
this folder that have a `--device` are slices, too, run where they are named; not those of a CPU
which have the name of a family.
Exit codes: 0 all passed, 1 something failed, 2 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks._gpu import SLICES, Ceilings, failures, rows
from benchmarks._rows import ROOT, describe, name_of, write
from lightning_ext import kernels

RESULTS = ROOT / "benchmarks" / "results"
KERNELS = ROOT / "tests" / "kernels" / "test_all.py"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
PROCESSES = 8
SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("[a-z]*.py")
    if path.stem not in ("gpu", *SLICES)
    and '.add_argument("--device"' in path.read_text(encoding="utf-8")
)


def main(arguments: list[str] | None = None) -> int:
    """Run the slices that were asked for, and return the exit code."""
    names = parse(arguments)
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was run and no row was written.", file=sys.stderr)
        return 2
    print(name_of("cuda"), describe("torch", "triton", "lightning"))
    return 0 if all([run(name) for name in names]) else 1


def parse(arguments: list[str] | None) -> list[str]:
    """Return the slices that are to be run."""
    usual = ["tests", "accuracy", *SLICES]
    known = [*usual, *SCRIPTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"of {', '.join(known)}; separated by commas")
    names = parser.parse_args(arguments).only
    found = usual if names is None else names.split(",")
    wrong = [name for name in found if name not in known]
    if wrong:
        parser.error(f"--only {','.join(wrong)}: no such slice; there are {', '.join(known)}")
    return found


def run(name: str) -> bool:
    """Run a slice and say whether it passed; what fails does not keep others from running."""
    start = time.monotonic()
    if name in ("tests", "accuracy"):
        passed = run_tests(name)
    elif name in SLICES:
        passed = run_timings(name)
    else:
        script = [sys.executable, str(Path(__file__).parent / f"{name}.py"), "--device", "cuda"]
        passed = subprocess.run(script, cwd=ROOT).returncode == 0
    print(f"{name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s")
    return passed


def run_tests(name: str) -> bool:
    """Run the tests marked `gpu`, those of all kernels or the others, and add a row."""
    start = time.monotonic()
    commands = accuracy() if name == "accuracy" else others()
    # Most of the time goes into compiling, one kernel after another in each process.
    with ThreadPoolExecutor(PROCESSES) as pool:
        passed = all(list(pool.map(succeeds, commands)))
    figures = {"passed": str(passed), "seconds": f"{time.monotonic() - start:.1f}"}
    key = {"thing": name, "variant": "", "mode": "", "dtype": "", "shape": ""}
    versions = describe("torch", "triton", "lightning")
    write([key | {"device": name_of("cuda")} | figures | versions], RESULTS / "gpu_tests.csv")
    return passed


def accuracy() -> list[list[str]]:
    """Return a command for each operation of the kernels: all its cases against float64."""
    return [[*PYTEST, "-k", f"[{op}-", str(KERNELS)] for op in kernels.__all__]


def others() -> list[list[str]]:
    """Return one for the other files that need the card: others import what may not be there."""
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text("utf-8")]
    return [[*PYTEST, *(str(path) for path in sorted({*marked} - {KERNELS}))]]


def succeeds(command: list[str]) -> bool:
    """Run tests in a process of their own, and print what they said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    print(
        said if done.returncode else said.rpartition("\n")[2], *command[len(PYTEST) :], flush=True
    )
    return done.returncode == 0


def run_timings(name: str) -> bool:
    """Time a family of kernels and write its rows, also those before one that failed."""
    ceilings = Ceilings.measured()
    found: list[dict[str, str]] = []
    passed = attempt(lambda: measure(name, ceilings, found))
    if found:
        write(found, RESULTS / f"gpu_{name}.csv")
    return passed


def measure(name: str, ceilings: Ceilings, found: list[dict[str, str]]) -> None:
    """Add the rows of a slice to those found."""
    for measurement in SLICES[name](torch.device("cuda"), False):
        found += rows(measurement, ceilings)
        times = {row["variant"]: row["ms_median"] for row in found[-len(measurement.variants) :]}
        print(measurement.thing, measurement.mode, measurement.dtype, measurement.shape, times)
        del measurement  # and its inputs, before the next ones are made


def attempt(work: Callable[[], None]) -> bool:
    """Do something and say whether it went well; what went wrong is printed."""
    try:
        work()
    except failures():
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
