"""The study of the critical batch: one small run, as a user would start it, and its figure."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.critical_batch.figure import draw
from examples.critical_batch.measure import Point
from lightning_ext.scaling import StepsToTarget, SweepRow, fit_critical_batch

ROOT = Path(__file__).parent.parent.parent
SMALL = """
model: {width: 16, layers: 1}
data: {context: 8}
study:
  batches: [2, 4, 8, 16]
  target: 5.2
  max_samples: 800
  evaluate_every_samples: 16
  noise_batch: 16
  branch_samples: 64
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of text."""
    for number in range(40):
        path = tmp_path / "texts" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {number} says {number**3}. " * 40)
    return tmp_path / "texts"


def start(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the study from the repository's root."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    command = [sys.executable, "-m", "examples.critical_batch", "--out", str(out), *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=kept | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# One test, because each part needs the same run.
def test_it_ends_with_a_table_and_a_figure(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    done = start(tmp_path / "out", f"--config={tmp_path / 'small.yaml'}", f"--data.folder={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "Seed set to 0\n"  # no warning

    for name in ("knee", "overhead", "sfo_minimum", "euclidean", "l1", "nuclear", "adam"):
        assert f"│ {name} " in done.stdout
    assert done.stdout.count("│ branched ") == 4
    assert (tmp_path / "out" / "critical_batch.png").stat().st_size > 10_000

    rows = read(tmp_path / "out" / "sweep.csv")
    assert {row["global_batch"] for row in rows if row["outcome"] == "reached"} == {
        "2",
        "4",
        "8",
        "16",
    }
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"critical_batch" in run.read_bytes()
    measured = {row["name"] for row in read(tmp_path / "out" / "run.csv")}
    assert measured == {"euclidean", "l1", "nuclear", "adam", "branched"}


def test_the_figure_shows_every_part_also_where_limits_are_infinite(tmp_path: Path) -> None:
    table = [StepsToTarget(b, 100 * (1 + 16 / b)) for b in (2, 4, 8, 16, 32, 64)]
    rows = [SweepRow(b, 1.0, 0, s, b * s, "reached", 3, 2.0, "loss", 2.0) for b, s, *_ in table]
    fit = fit_critical_batch(table)
    points = [
        Point("adam", 64, 3.0, 20.0, 10.0, float("inf")),
        Point("branched", 64, 3.0, 8.0, 8.0, float("inf")),
        Point("l1", 64, 3.0, float("inf"), 9.0, float("inf")),
        Point("nuclear", 64, 3.0, 1e6, -1e5, 1e7),
    ]
    draw(tmp_path / "new" / "figure.png", rows, table, fit, points, {"adam": 20.0})
    assert (tmp_path / "new" / "figure.png").stat().st_size > 10_000


def test_an_agent_of_the_sweep_runs_one_batch(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    sweep = yaml.safe_load((ROOT / "examples" / "critical_batch" / "sweep.yaml").read_text())
    (swept,) = sweep["parameters"].items()
    own = [word for word in sweep["command"] if word[0] == "-" and "wandb" not in word]
    batch = f"--{swept[0]}={swept[1]['values'][1]}"
    small = f"--config={tmp_path / 'small.yaml'}"
    done = start(tmp_path / "out", small, *own, batch, f"--data.folder={folder}", "--wandb=off")
    assert done.returncode == 0, done.stderr
    assert {row["global_batch"] for row in read(tmp_path / "out" / "sweep.csv")} == {"4"}
    assert ROOT / sweep["program"] == ROOT / "examples" / "critical_batch" / "main.py"
