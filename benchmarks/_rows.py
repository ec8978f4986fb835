"""Rows of results: their key, where they were measured, and the file they go to."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
KEY = ("thing", "variant", "mode", "dtype", "shape", "device")


def describe(*packages: str) -> dict[str, str]:
    """Return what a row needs so that its figures can be placed, with versions of packages."""
    commit = first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    versions = {name: version(name) for name in packages or ("torch", "lightning")}
    return {"commit": commit, **versions, "date": time.strftime("%Y-%m-%d")}


def first_line(command: list[str]) -> str:
    """Return the first line that a command prints, or `unknown` where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def name_of(device: str, threads: int = 1) -> str:
    """Return the card, or the processor and its threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    plural = "" if threads == 1 else "s"
    return f"{names[0] if names else platform.processor()}, {threads} thread{plural}"


def write(rows: list[dict[str, str]], path: Path) -> None:
    """Put the rows in the place of those with the same key."""
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    new = {tuple(row[key] for key in KEY) for row in rows}
    kept = [row for row in kept if tuple(row[key] for key in KEY) not in new]
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(name for row in (*rows, *kept) for name in row)
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: [row[key] for key in KEY]))
