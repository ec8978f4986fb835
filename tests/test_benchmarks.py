"""`make bench`: the table of README.md is what the rows say, and the slices are called rightly."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import _ema_peers, _noise_peers, bench, contrastive, noise_scale, table
from benchmarks._optimizer_peers import ANCHOR
from benchmarks._pairs import interval, interval_of_rounds
from benchmarks._peers import found_module, versions_of
from benchmarks._table_entries import ENTRIES, Row, Rows
from benchmarks.ema import Weights

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
TIME = {"ratio": "0.8123", "low": "0.7", "high": "0.9", "ms": "4.561", "ms_base": "1234"}
VERSIONS = {x: "1.2.3" for x in ("gns_pytorch", "timm", "open_clip", "torchao", "lightning")}
WHERE = {"device": "Some CPU, 2 threads", "commit": "abc", "torch": "2.13.0", "date": "2026-11-23"}
SHARES = {"share": "0.026", "share_base": "2.31", "coverage": "0.955", "bias_median": "-0.012"}
SHARES |= {"error_median": "0.047", "windows": "60"}
SHARES |= {"samples_base": "4", "samples": "32", "tensors_base": "10", "tensors": "28"}
REST = {"mib": "43", "mib_base": "1289", "bytes": "2.03", "ms_without": "91.3", "ms_added": "1.49"}


def row_of(key: tuple[str, str, str, str], base: str = "timm") -> Row:
    named = dict(zip(("thing", "variant", "mode", "shape"), key, strict=True))
    figures = TIME | SHARES | REST | {"pairs": "30", "base": base, "dtype": "float32"}
    return WHERE | VERSIONS | figures | named


def all_rows() -> Rows:
    """A row for each entry, and those of the peers that two of them read."""
    rows: Rows = {}
    for entry in ENTRIES:
        rows.setdefault(entry.slice, []).append(row_of(entry.key))
    for slice, variant in (
        ("low_bit", "timm"),
        ("optimizers", ANCHOR),
        ("noise_scale", "gns-pytorch, single samples"),
    ):
        rows[slice] += [x | {"variant": variant, "bytes": "3.5"} for x in rows[slice]]
    return rows


def test_the_table_of_the_front_page_is_what_the_rows_say() -> None:
    assert table.main(["--check"]) == 0


def test_every_figure_of_the_front_page_is_in_its_row() -> None:
    rows = table.rows_of(table.RESULTS)
    inside = table.README.read_text().partition(table.BEGIN)[2].partition(table.END)[0]
    lines = [x for x in inside.splitlines() if x.startswith("| ") and not x.startswith("| |")]
    there = [(entry, entry.find(rows)) for entry in ENTRIES]
    assert not rows or not table.missing(rows)
    assert len(lines) == sum(row is not None for _, row in there)
    for text, (entry, row) in zip(lines, [x for x in there if x[1]], strict=True):
        assert row is not None
        words, ours, theirs, ratio, _ = (x.strip() for x in text.strip("|").split(" | "))
        assert words.strip("| ") == entry.thing
        same = [x for x in rows[entry.slice] if x["shape"] == row["shape"]]
        values = [abs(float(x)) for each in same for x in each.values() if is_number(x)]
        for figure in NUMBER.findall(f"{ours} {strip_versions(theirs, same)} {ratio}"):
            assert near(figure, values), f"{figure} of {entry.thing} is in no row"


def strip_versions(text: str, rows: list[Row]) -> str:
    found = {
        y for x in rows for name, y in x.items() if name in (*bench.PEERS, "lightning", "torch")
    }
    for version in sorted(found, key=len, reverse=True):
        text = text.replace(version, "")
    return text


def is_number(text: str | None) -> bool:
    return bool(text) and re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text or "") is not None


def near(figure: str, values: list[float]) -> bool:
    """Whether it is a value or a percentage, rounded to the digits that it has."""
    value, digits = float(figure.replace(",", "")), len(figure.partition(".")[2])
    step = 10.0**-digits if digits or value < 100 else 1.0
    return any(abs(value - y) <= 0.51 * step for x in values for y in (x, 100 * x))


def test_each_entry_is_a_line_with_its_peer_and_its_interval() -> None:
    rows = all_rows()
    text = table.block(rows)
    lines = text.splitlines()
    assert len(lines) == 2 + len(ENTRIES) + 4
    assert table.missing(rows) == []
    lion = next(x for x in lines if x.startswith("| `Lion`"))
    anchor = "(torch's fused AdamW: 4.56 ms, 3.50 bytes)"
    assert f"| 4.56 ms | 1,234 ms, timm 1.2.3 {anchor} | 0.81 (0.70 to 0.90) |" in lion
    int8 = next(x for x in lines if "int8" in x)
    assert "4.56 ms, 2.03 bytes | 1,234 ms, 3.50 bytes, timm 1.2.3" in int8
    assert "+2.6 % | +231 %, timm 1.2.3: 4 of 32 samples, 10 of 28 tensors" in next(
        x for x in lines if "added to a step that measures" in x
    )
    errors = "4.7 %, bias -1.2 %, 60 windows"
    known = next(x for x in lines if "scale of 4,096" in x)
    assert f"| {errors}; its interval holds in 95.5 % | {errors}; gns-pytorch 1.2.3, mean" in known
    assert lines[-3] == "Measured on Some CPU; torch 2.13.0, 2026-11-23, commit abc."


def test_what_was_not_measured_is_left_out_and_named() -> None:
    rows = all_rows()
    del rows["ema"]
    assert "`EMA` update" not in table.block(rows)
    assert "`EMA` update" in table.missing(rows)
    assert table.block({}) == "No rows yet: `make bench` measures them."


def test_a_check_fails_where_rows_are_there_but_not_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    monkeypatch.setattr(table, "README", page)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert (table.main([]), table.main(["--check"])) == (0, 0)
    rows = all_rows()
    for name, each in rows.items():
        named = [dict.fromkeys(contrastive.KEY, "") | x for x in each]
        contrastive.write(named, tmp_path / f"bench_{name}.csv")
    assert (table.main([]), table.main(["--check"])) == (0, 0)
    (tmp_path / "bench_ema.csv").unlink()
    capsys.readouterr()
    assert (table.main([]), table.main(["--check"])) == (0, 1)
    assert "no row: `EMA` update" in capsys.readouterr().out


def test_a_peer_that_differs_is_marked_and_its_difference_told() -> None:
    rows = all_rows()
    lamb = next(x for x in rows["optimizers"] if x["thing"] == "LAMB")
    rows["optimizers"].append(lamb | {"variant": "timm", "differs": "no bias correction"})
    lines = table.block(rows).splitlines()
    assert [x for x in lines if "timm 1.2.3 †" in x] == [x for x in lines if "| `LAMB`" in x]
    assert lines[-1] == "† `LAMB`, a step: no bias correction."


def test_pairs_of_a_round_are_drawn_together() -> None:
    ratios = np.repeat(np.array([[1.0], [2.0], [3.0]]), 50, axis=1)
    assert interval_of_rounds(ratios) == {"ratio": 2.0, "low": 1.0, "high": 3.0}
    assert interval(ratios[:, 0]) == interval_of_rounds(ratios)


def test_few_pairs_are_told_and_the_last_measurement_counts() -> None:
    rows = all_rows()
    lion = next(x for x in rows["optimizers"] if x["thing"] == "Lion")
    rows["optimizers"].append(lion | {"date": "2027-01-01", "ms": "9.0", "pairs": "7"})
    (text,) = (x for x in table.block(rows).splitlines() if x.startswith("| `Lion`"))
    assert "| 9.00 ms |" in text
    assert text.endswith("7 pairs |")


def test_a_page_without_markers_is_refused() -> None:
    assert table.put(f"a {table.BEGIN} b {table.END} c", "x").split("\n")[1] == "x"
    with pytest.raises(ValueError, match="once each"):
        table.put("no block", "x")


def test_entries_are_of_slices_and_once_each() -> None:
    assert {entry.slice for entry in ENTRIES} == set(bench.SLICES)
    assert len({(entry.slice, entry.key) for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("name", bench.SLICES)
def test_a_slice_is_a_script_that_knows_its_options(name: str) -> None:
    command = bench.SLICES[name].command(Path("rows.csv"), 9)
    script = Path(command[1])
    known = script.read_text()
    assert all(f'"{x}"' in known for x in command[2:] if x.startswith("--"))
    assert not [x for x in command if "{" in x]
    assert command[-2:] == ["--results", "rows.csv"]


def test_a_slice_that_fails_is_told_and_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {"ema": "raise SystemExit(3)", "optimizers": "", "low_bit": "import time; time.sleep(9)"}
    monkeypatch.setattr(
        bench.Slice, "command", lambda self, *_: [sys.executable, "-c", code[self.script]]
    )
    short = bench.SLICES["low_bit"]._replace(seconds=1)
    monkeypatch.setitem(bench.SLICES, "low_bit", short)
    names = "ema,low_bit,optimizers"
    assert bench.main(["--only", names, "--results", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED with exit code 3" in out
    assert "STOPPED after 1 s" in out
    assert re.search(r"optimizers\W+\d+\W+done", out)


def test_a_peer_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "PEERS", {"no_such_package": "no-such-package"})
    bench.say_what_is_missing(Console(width=200))
    assert "no-such-package is not installed: its rows are left out" in capsys.readouterr().out
    assert versions_of("no_such_package", "torch")["no_such_package"] == "absent"
    with pytest.raises(ModuleNotFoundError):
        found_module("no_such_package")


def test_averages_of_others_are_checked_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = Weights.__new__(Weights)
    torch.nn.Module.__init__(weights)
    weights.kept = torch.nn.ParameterList(torch.randn(3, 2) for _ in range(4))
    _ema_peers.check(weights, 0.9)
    monkeypatch.setattr(_ema_peers.kernels, "ema_update_", lambda *_: None)
    with pytest.raises(AssertionError, match=r"average of callbacks\.EMA"):
        _ema_peers.check(weights, 0.9)


def test_losses_of_others_are_checked_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["contrastive.py", "--width", "8", "--threads", "1"]
    monkeypatch.setattr("sys.argv", words)
    args = contrastive.arguments()
    contrastive.check("siglip_loss", args)
    wrong = {"siglip_loss": contrastive.dense_clip}
    monkeypatch.setattr(contrastive, "PEERS", wrong)
    monkeypatch.setattr(contrastive, "present", lambda _: True)
    with pytest.raises(AssertionError, match="siglip_loss, open_clip"):
        contrastive.check("siglip_loss", args)


def test_windows_of_known_gradients_have_the_noise_scale_that_they_say() -> None:
    found = noise_scale.our_errors(64, 4)
    assert abs(found["bias_mean"]) < 0.05
    assert found["windows"] == 4
    assert found["error_median"] >= abs(found["bias_median"])
    noise_scale.check(64, steps=20)


def test_intervals_that_hold_too_seldom_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noise_scale.binomial_bounds(60, 0.95) == (50, 60)
    narrow = noise_scale.our_window
    monkeypatch.setattr(
        noise_scale, "our_window", lambda *x: (y := narrow(*x))._replace(low=y.value, high=y.value)
    )
    with pytest.raises(AssertionError, match="0 of 4 intervals hold"):
        noise_scale.our_errors(64, 4)


def test_a_wrong_noise_scale_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = _noise_peers.draw
    monkeypatch.setattr(noise_scale, "draw", lambda truth, *rest: draw(4 * truth, *rest))
    with pytest.raises(AssertionError, match="noise scale 64"):
        noise_scale.check(64, steps=40)


def test_rows_of_other_columns_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    key = dict.fromkeys(contrastive.KEY, "a")
    contrastive.write([key | {"old": "1"}], path)
    contrastive.write([key | {"device": "b", "new": "2"}], path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(x["old"], x["new"]) for x in found] == [("1", ""), ("", "2")]
