"""The benchmark of optimizers for small memory, as far as it goes without timing what matters."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import _low_bit_bytes, low_bit
from benchmarks._low_bit_peers import BACKEND, THINGS
from benchmarks._optimizer_peers import OURS

SMALL = {"small": [(72, 80), (80,)]}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(low_bit, "SHAPES", SMALL)
    monkeypatch.setattr(low_bit, "RESULTS", tmp_path / "low_bit.csv")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return tmp_path / "low_bit.csv"


@pytest.mark.parametrize("name", THINGS)
def test_steps_are_right_before_they_are_timed(name: str) -> None:
    assert OURS in low_bit.errors(name, "small", "cpu")


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    thing = THINGS["AdamW int8"]
    wrong = thing.variants[BACKEND]
    wrong = wrong._replace(settings=wrong.settings | {"weight_decay": 50.0})
    monkeypatch.setitem(THINGS, "AdamW int8", thing._replace(variants={BACKEND: wrong}))
    with pytest.raises(AssertionError, match=f"AdamW int8 of {BACKEND}"):
        low_bit.errors("AdamW int8", "small", "cpu")


def test_rows_tell_the_ratio_the_bytes_and_which_peers_were_there(
    monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    words = ["low_bit.py", "--pairs", "2", "--shapes", "small", "--things", "AdamW int8"]
    monkeypatch.setattr("sys.argv", words)
    low_bit.main()
    with small.open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(rows[OURS]["low"]) <= float(rows[OURS]["ratio"]) <= float(rows[OURS]["high"])
    entries, blocks = 72 * 80 + 80, 23
    expected = (2 * (72 * 80 + 4 * blocks + 4 * 80) + 2 * 4) / entries
    assert float(rows[OURS]["bytes"]) == pytest.approx(expected, rel=1e-3)
    assert rows[BACKEND]["bytes"] == rows[OURS]["bytes"]
    assert float(rows["bitsandbytes"]["bytes"]) > float(rows[OURS]["bytes"])  # its code books


def test_storages_are_counted_once() -> None:
    x = torch.zeros(8)
    found = [*_low_bit_bytes.tensors_in({"a": x[:4], "b": (x[4:], [torch.nn.Parameter(x)])})]
    assert {y.untyped_storage().data_ptr() for y in found} == {x.data_ptr()}


@pytest.mark.parametrize(("format", "bytes_of"), [("float32", 8.0), ("int8", 2.03)])
def test_bytes_of_a_format_are_measured(format: str, bytes_of: float) -> None:
    assert _low_bit_bytes.measured("LowBitAdamW", format) == pytest.approx(bytes_of, rel=2e-3)
