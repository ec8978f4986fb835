"""Run every GPU test and benchmark on this machine's card; needs only the library and pytest.

    PYTHONPATH=. python benchmarks/gpu.py

Each run adds a row to `benchmarks/results/gpu_tests.csv`. Every other script of this folder is
then run with `--device cuda` and writes its own rows. Exit codes: 0 all passed, 1 something
failed, 2 there is no CUDA device.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Run tests, then benchmarks, and return the exit code."""
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was run and no row was written.", file=sys.stderr)
        return 2
    machine = describe_machine()
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    passed = run_tests(machine)
    return 0 if run_benchmarks() and passed else 1


def describe_machine() -> dict[str, str]:
    """Return what a row needs so that its figures can be placed."""
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "card": torch.cuda.get_device_name(),
        "driver": first_line(smi),
        "cuda": str(torch.version.cuda),
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        **{name: version(name) for name in ("torch", "triton", "lightning")},
    }


def first_line(command: list[str]) -> str:
    """Return the first line that a command prints, or `unknown` where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def run_tests(machine: dict[str, str]) -> bool:
    """Run the tests marked `gpu`, add a row, and say whether all passed."""
    tests = (ROOT / "tests").rglob("test_*.py")
    # Only files that need the card: others import packages that this machine may lack.
    files = sorted(str(p) for p in tests if "pytest.mark.gpu" in p.read_text(encoding="utf-8"))
    if not files:
        print("No test is marked gpu.")
        return True
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *files], cwd=ROOT)
    seconds = f"{time.monotonic() - start:.1f}"
    passed = done.returncode == 0
    add_row({**machine, "files": str(len(files)), "passed": str(passed), "seconds": seconds})
    return passed


def run_benchmarks() -> bool:
    """Run the other scripts of this folder and say whether all succeeded."""
    scripts = sorted(p for p in Path(__file__).parent.glob("*.py") if p.name != Path(__file__).name)
    commands = [[sys.executable, str(script), "--device", "cuda"] for script in scripts]
    return all([subprocess.run(command, cwd=ROOT).returncode == 0 for command in commands])


def add_row(row: dict[str, str]) -> None:
    """Append a row to the results, with a header where the file is new."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "gpu_tests.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
