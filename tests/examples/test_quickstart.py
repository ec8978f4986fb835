"""Runs the quickstart once, small, as a user would, and looks at what it leaves behind."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RUNS = ["small", "large", "adaptive"]


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs it in that folder, without a W&B account."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRITON"))}
    environ = kept | {"PYTHONPATH": str(ROOT), "NETRC": str(folder / "none"), "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--samples", "1300"]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def steps(out: Path, name: str) -> list[dict[str, float]]:
    """The optimizer steps in a run's CSV file."""
    with (out / name / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["samples_seen"]]
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


# One test, because each part needs the same twenty seconds.
def test_it_ends_with_a_table_curves_and_logs(tmp_path: Path) -> None:
    done, out = start(tmp_path), tmp_path / "runs" / "quickstart"
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning

    table = [line.split("│") for line in done.stdout.splitlines() if "│" in line]
    assert [cells[1].strip() for cells in table] == RUNS
    assert [cells[2].strip() for cells in table[:2]] == ["82", "3"]
    assert all(cells[k].strip().endswith("%") for cells in table for k in (5, 6))

    printed = [out.relative_to(tmp_path) / name / "version_0" / "metrics.csv" for name in RUNS]
    assert done.stdout.splitlines()[-3:] == [
        f"{name}: {path}" for name, path in zip(RUNS, printed, strict=True)
    ]

    small, large, adaptive = (steps(out, name) for name in RUNS)
    # Each stops at its first step beyond 1,300; an epoch of 1,280 has two large batches.
    assert [run[-1]["samples_seen"] for run in (small, large)] == [1312, 1920]
    assert 1300 <= adaptive[-1]["samples_seen"] < 1300 + adaptive[-1]["global_batch"]
    assert adaptive[-1]["global_batch"] > 16
    assert all("noise_scale" in step for step in adaptive)
    for step in [*small, *large, *adaptive]:
        root = (step["global_batch"] / 16) ** 0.5
        assert step["lr_scaled"] == pytest.approx(4e-3 * root, rel=1e-5)

    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    offline = list((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == (3 if find_spec("wandb") else 0)
