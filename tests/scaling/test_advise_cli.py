"""``python -m lightning_ext.scaling advise``."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_ext import scaling
from lightning_ext.scaling import advise

PACKAGE = Path(scaling.__file__).parent.parent
RUN = ["advise", "--params", "1e9", "--tokens", "100B"]


def main(words: list[str]) -> Any:
    """Run the command; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scaling", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("lightning_ext.scaling", run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e9", 1e9), ("1B", 1e9), ("100M", 1e8), ("1.5T", 1.5e12), ("64k", 64e3), ("0.5", 0.5),
     ("3E-4", 3e-4), ("1_000", 1000.0), (".25b", 2.5e8)],
)  # fmt: skip
def test_a_number_may_have_a_suffix(
    monkeypatch: pytest.MonkeyPatch, text: str, value: float
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(scaling, "advise", lambda **inputs: asked.update(inputs) or [])
    assert main(["advise", "--params", text, "--tokens", "1"]) == 0
    assert asked["params"] == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "B", "1X", "1e", "-1", "1 B 2", "nan"])
def test_what_is_no_number_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["advise", f"--params={text}", "--tokens", "1"]) == 2
    assert f"{text!r} is no number such as 1e9, 1B" in capsys.readouterr().err


def test_the_table_has_numbers_laws_ranges_and_refusals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*RUN, "--sequence-length", "2048"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["law", "quantity", "value", "unit", "note"]
    assert lines[1].split()[:3] == ["step_law", "lr", "0.001632"]
    assert lines[3].split()[:3] == ["step_law", "batch_sequences", "540.9"]
    assert any(line.split()[:3] == ["porian", "lr", "refused"] for line in lines)
    assert lines[-1].startswith("chinchilla_refit: Besiroglu et al. 2024, arXiv:2404.10102; fitted")


def test_json_has_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--json", "--loss", "2.5", "--reference-lr", "3e-4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = advise(params=1e9, tokens=1e11, loss=2.5, reference_lr=3e-4)
    assert rows == [row._asdict() for row in expected]


def test_one_law_may_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--json", "--law", "step_law", "--law", "video_dit"]) == 0
    assert {row["law"] for row in json.loads(capsys.readouterr().out)} == {"step_law", "video_dit"}


def test_outside_the_range_of_a_law_that_was_asked_for_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*RUN, "--law", "porian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: params=1e+09 is outside 5.1e+06 to 9.1e+08")


def test_a_law_that_was_asked_for_and_can_say_something_is_no_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*RUN, "--compute", "1e18", "--law", "step_law", "--law", "kaplan"]) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["kaplan", "loss_of_tokens", "refused"] in lines
    assert ["kaplan", "optimal_params", "5.015e+07"] in lines
    assert ["step_law", "lr", "0.001632"] in lines


def test_a_law_by_size_is_refused_in_the_table_where_the_run_is_too_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(RUN) == 0
    lines = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines()}
    for row in (("zhang", "critical_batch_tokens"), ("kaplan", "lr")):
        assert lines[row].split()[2] == "refused"
        assert "refused: tokens=1e+11 is outside" in lines[row]


def test_a_law_of_compute_optimal_runs_that_was_asked_for_another_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["advise", "--params", "100M", "--tokens", "1T", "--law", "porian"]) == 2
    assert capsys.readouterr().err.startswith("error: tokens_per_param=1e+04 is outside 10 to 40")


def test_a_law_that_there_is_not_is_refused_with_the_laws(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*RUN, "--law", "none"]) == 2
    assert "step_law" in capsys.readouterr().err


def test_the_room_runs_as_a_module_without_torch() -> None:
    # Without the package's own import, which tells Lightning the names of strategies.
    code = (
        "import runpy, sys, types\n"
        "sys.argv = ['x', 'advise', '--params', '1B', '--tokens', '20B']\n"
        "package = sys.modules['lightning_ext'] = types.ModuleType('lightning_ext')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]\n"
        "try: runpy.run_module('lightning_ext.scaling', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'lightning', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "step_law" in done.stdout
