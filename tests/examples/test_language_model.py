"""The language model: its size, its data and a short run, as a user would start it."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from examples.language_model.data import TextFolder
from examples.language_model.module import GPT

ROOT = Path(__file__).parent.parent.parent
MAIN = ROOT / "examples" / "language_model" / "main.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of text in two folders, one of them hidden from a pattern."""
    for number in range(40):
        path = tmp_path / "texts" / str(number % 2) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number} says {number**3}. " * 40)
    return tmp_path / "texts"


def start(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the example in that folder, without a W&B account."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRITON"))}
    environ = kept | {"PYTHONPATH": "", "NETRC": str(out / "none"), "COLUMNS": "100"}
    command = [sys.executable, str(MAIN), *options]
    return subprocess.run(
        command, cwd=out, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def steps(metrics: Path) -> list[dict[str, float]]:
    """The optimizer steps in a run's CSV file."""
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["samples_seen"]]
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def test_it_has_half_a_million_parameters() -> None:
    assert 450_000 <= sum(p.numel() for p in GPT().parameters()) <= 550_000


def test_it_knows_nothing_at_first() -> None:
    seed_everything(0, verbose=False)
    windows = torch.randint(256, (8, 65), dtype=torch.uint8)
    assert GPT().loss(windows).item() == pytest.approx(math.log(256), abs=0.05)


def test_a_prediction_sees_only_what_is_before_it() -> None:
    windows = torch.randint(256, (1, 64), dtype=torch.uint8)
    model, changed = GPT(), windows.clone()
    changed[0, 40] += 1
    same = (model(windows) == model(changed)).all(-1)[0]
    assert same[:40].all()
    assert not same[40:].any()


def test_biases_norms_and_embeddings_do_not_decay() -> None:
    model = GPT()
    decayed, kept = model.configure_optimizers().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for p in kept["params"]}
    assert plain == {name for name in names.values() if "norm" in name or name.endswith("bias")} | {
        "bytes.weight",
        "positions.weight",
    }
    assert len(decayed["params"]) + len(plain) == len(names)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of adamw, sgd"):
        GPT(optimizer="adam")


def test_the_standard_library_is_cut_the_same_way_each_time() -> None:
    first, second = (TextFolder(max_bytes=1_000_000) for _ in range(2))
    assert first.train_files == second.train_files
    assert torch.equal(first.train.rows, second.train.rows)
    assert torch.equal(first.validation.rows, second.validation.rows)


def test_no_file_is_on_both_sides() -> None:
    data = TextFolder(max_bytes=1_000_000)
    assert data.train_files
    assert data.validation_files
    assert not set(data.train_files) & set(data.validation_files)
    assert not [f for f in data.train_files if "site-packages" in f or "/test/" in f]


def test_more_bytes_leave_files_on_their_side() -> None:
    small, large = TextFolder(max_bytes=1_000_000), TextFolder(max_bytes=2_000_000)
    assert set(small.train_files) <= set(large.train_files)
    assert set(small.validation_files) <= set(large.validation_files)


def test_another_folder_works(folder: Path) -> None:
    data = TextFolder(folder, context=32)
    assert len(data.train_files) + len(data.validation_files) == 40
    text = b"".join((folder / name).read_bytes() for name in data.train_files)
    assert bytes(data.train.rows.flatten().tolist()) == text[: data.train.rows.numel()]
    assert data.train.rows.shape == (len(text) // 33, 33)


def test_a_file_keeps_its_side_when_others_go(folder: Path) -> None:
    before = TextFolder(folder)
    for name in before.train_files[:10]:
        (folder / name).unlink()
    after = TextFolder(folder)
    assert after.train_files == before.train_files[10:]
    assert after.validation_files == before.validation_files


def test_a_pattern_chooses_files(folder: Path) -> None:
    assert all(name[:2] == "1/" for name in TextFolder(folder, pattern="1/*").train_files)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 0 files.*one in ten is for validation"):
        TextFolder(tmp_path)


# One test, because each part needs the same run; a second one shows that the seed decides.
def test_it_ends_with_a_table_and_logs_and_the_seed_decides(tmp_path: Path, folder: Path) -> None:
    options = "--data", str(folder), "--samples", "96", "--batch", "4", "--rule", "0:4 32:16"
    done, again = start(tmp_path, *options), start(tmp_path, *options, "--wandb", "off")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning

    line = next(line for line in done.stdout.splitlines() if "│" in line)
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[1:4] == ["adamw", "12", "96"]
    assert cells[-2] == "16"

    out = tmp_path / "runs" / "language_model"
    first, second = (steps(out / "adamw" / f"version_{k}" / "metrics.csv") for k in (0, 1))
    assert first == second
    assert [step["global_batch"] for step in first] == [4] * 8 + [16] * 4
    # Given at 16, and the batch begins with 4.
    assert [first[k]["lr_scaled"] for k in (0, -1)] == pytest.approx([5e-4, 1e-3])
    assert first[-1]["loss"] < first[0]["loss"]
    assert done.stdout.splitlines()[-1] == again.stdout.splitlines()[-1].replace("_1", "_0")
    assert len(list((out / "wandb").glob("offline-run-*"))) == (1 if find_spec("wandb") else 0)
