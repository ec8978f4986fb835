"""The benchmark of the optimizers, as far as it goes without timing anything that matters."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import optimizers
from benchmarks._optimizer_peers import OURS, THINGS
from benchmarks._peers import present

SMALL = {"small": [(6, 4), (4,), (3, 5)]}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(optimizers, "SHAPES", SMALL)
    monkeypatch.setattr(optimizers, "RESULTS", tmp_path / "optimizers.csv")
    return tmp_path / "optimizers.csv"


@pytest.mark.parametrize("name", THINGS)
def test_steps_are_right_before_they_are_timed(name: str) -> None:
    optimizers.check(name, "small", "cpu")


@pytest.mark.parametrize("name", [x for x, y in THINGS.items() if any(p.differs for p in y.peers)])
def test_a_peer_that_is_not_compared_does_differ(name: str) -> None:
    thing = THINGS[name]
    steps = [
        optimizers.moved(maker, "small", "cpu", thing.settings, torch.float32)
        for maker in (thing.ours, next(x for x in thing.peers if x.differs))
    ]
    assert (steps[0] - steps[1]).norm() > 1e-3 * steps[0].norm()


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    lion = THINGS["Lion"]
    wrong = lion.peers[0]._replace(settings={"weight_decay": 0.5})
    monkeypatch.setitem(THINGS, "Lion", lion._replace(peers=(wrong,)))
    with pytest.raises(AssertionError, match="Lion of pytorch_optimizer"):
        optimizers.check("Lion", "small", "cpu")


def test_a_row_tells_the_ratio_the_states_and_which_peers_were_there(
    monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    words = ["optimizers.py", "--pairs", "2", "--shapes", "small", "--things", "Lion"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    optimizers.main()
    with small.open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(rows[OURS]["low"]) <= float(rows[OURS]["ratio"]) <= float(rows[OURS]["high"])
    entries = 6 * 4 + 4 + 3 * 5
    assert float(rows[OURS]["bytes"]) == pytest.approx(4 + 3 * 4 / entries, rel=1e-3)
    assert (rows[OURS]["timm"] == "absent") == (not present("timm"))
    assert rows[rows[OURS]["base"]]["base"] == OURS
