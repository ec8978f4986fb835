"""``python -m lightning_ext.scaling pipeline``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_ext.scaling import pipeline_timeline

SMALL = ["pipeline", "--schedule", "1f1b", "--ranks", "2", "--microbatches", "4"]


def main(words: list[str]) -> Any:
    """Run the command; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scaling", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("lightning_ext.scaling", run_name="__main__")
    return end.value.code


def test_the_timeline_is_printed_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    found = pipeline_timeline("1f1b", pipeline_ranks=2, num_microbatches=4)
    assert lines[:2] == found.text().splitlines()
    assert lines[3:] == [
        "total            15 ms",
        "idle             0.2000 of it; by the formula 0.2000",
        "stashed at most  2, 1 by rank",
    ]


def test_costs_and_stages_reach_the_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline", "--ranks", "2", "--stages-per-rank", "4", "--microbatches", "8"]
    costs = ["--forward-ms", "2", "--backward-ms", "3", "--send-ms", "1", "--data-parallel"]
    assert main([*words, *costs, "fsdp2", "--gather-ms", "4", "--reduce-ms", "5"]) == 0
    found = pipeline_timeline(
        "breadth_first",
        pipeline_ranks=2,
        stages_per_rank=4,
        num_microbatches=8,
        forward_ms=2.0,
        backward_ms=3.0,
        send_ms=1.0,
        gather_ms=4.0,
        reduce_ms=5.0,
        data_parallel="fsdp2",
    )
    out = capsys.readouterr().out
    assert f"total            {found.total_ms:g} ms" in out
    assert "gathers          5; one stage at a time: 8" in out
    assert "reductions       4" in out


def test_a_figure_is_written(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    assert main([*SMALL, "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_numbers_that_do_not_fit_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[:-1], "1"]) == 2
    assert "num_microbatches=1 is below pipeline_ranks=2" in capsys.readouterr().err
