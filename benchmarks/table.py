"""Write the table of README.md from the rows that `make bench` has left.

    PYTHONPATH=. python benchmarks/table.py           # write it
    PYTHONPATH=. python benchmarks/table.py --check   # fail where it is not what the rows say

What is in the table is declared in `_table_entries.py`, by the keys of rows; figures are only in
the rows, `benchmarks/results/bench_*.csv`. An entry without its row, as of a peer that was not
installed, is named and left out, and `--check` fails unless there are no rows at all. Of several
machines the row measured last counts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._rows import ROOT
from benchmarks._table_entries import ENTRIES, MARK, Entry, Rows, differs

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
HEAD = "| | ours | beside it | ours to theirs, 95 % interval | shape |\n|---|---|---|---|---|"
RATIOS = (
    "Below 1 ours takes less time. Of noise scales the ratio is that of steps that measure, of\n"
    "callbacks that of a fit with them to one without. Rows: `benchmarks/results/bench_*.csv`."
)
ENOUGH = 30  # pairs; a row that has fewer says so


def rows_of(results: Path) -> Rows:
    """Return all rows by slice."""
    found: Rows = {}
    for path in sorted(results.glob("bench_*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            found[path.stem.removeprefix("bench_")] = list(csv.DictReader(file))
    return found


def block(rows: Rows) -> str:
    """Return what stands between the markers."""
    found = {entry: entry.find(rows) for entry in ENTRIES}
    there = {entry: row for entry, row in found.items() if row is not None}
    if not there:
        return "No rows yet: `make bench` measures them."
    lines = [line(entry, row, rows) for entry, row in there.items()]
    return "\n".join([HEAD, *lines, "", caption(there.values()), *notes(there, rows)])


def notes(there: dict[Entry, dict[str, str]], rows: Rows) -> list[str]:
    """Return in what marked peers differ."""
    found = {entry: differs(row, rows[entry.slice]) for entry, row in there.items()}
    return [f"{MARK} {entry.thing}: {text}." for entry, text in found.items() if text]


def line(entry: Entry, row: dict[str, str], rows: Rows) -> str:
    """Return one line of the table."""
    ours, theirs, ratio = entry.show(row, rows[entry.slice])
    few = int(row.get("pairs") or ENOUGH) < ENOUGH
    shape = f"{entry.where(row)}, {row['pairs']} pairs" if few else entry.where(row)
    return f"| {entry.thing} | {ours} | {theirs} | {ratio} | {shape} |"


def caption(rows: Iterable[dict[str, str]]) -> str:
    """Return where and with what the rows were measured."""
    rows = list(rows)
    devices = {row["device"].rpartition(", ")[0] for row in rows} - {""}
    torch, commits = ({row[name] for row in rows} for name in ("torch", "commit"))
    where = f"Measured on {', '.join(sorted(devices)) or 'any machine'}"
    dates = sorted(row["date"] for row in rows)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    versions = f"torch {', '.join(sorted(torch))}, {when}, commit {', '.join(sorted(commits))}"
    return f"{where}; {versions}.\n{RATIOS}"


def missing(rows: Rows) -> list[str]:
    """Return the entries that have no row."""
    return [entry.thing for entry in ENTRIES if entry.find(rows) is None]


def put(text: str, inside: str) -> str:
    """Return a page with another block.

    Raises:
        ValueError: if the page does not have each of the markers once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN} and {END} once each, around the table")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{inside}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    """Write the block, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if it differs or lacks"
    )
    check = parser.parse_args(arguments).check
    rows = rows_of(RESULTS)
    lacking = missing(rows)
    for thing in lacking:
        print(f"no row: {thing}")
    text = README.read_text(encoding="utf-8")
    wanted = put(text, block(rows))
    if check:
        if wanted != text:
            print("README.md differs from the rows; python benchmarks/table.py writes it")
        return int(wanted != text or bool(rows and lacking))
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
