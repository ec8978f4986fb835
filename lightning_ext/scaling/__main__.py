"""``python -m lightning_ext.scaling``: published laws as a table, schedules as timelines."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from lightning_ext.scaling import (
    ADVICE_INPUTS,
    LAWS,
    PIPELINE_SCHEDULES,
    Advice,
    PipelineTimeline,
    advise,
    bubble_fraction,
    pipeline_timeline,
)

_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)([kmbgt]?)", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, print the answer, and return the exit status."""
    options = vars(_parser().parse_args(arguments))
    command = {"advise": _advice, "pipeline": _pipeline}[options.pop("command")]
    try:
        lines = command(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def number(text: str) -> float:
    """Return the number that ``1e9``, ``1B``, ``100M`` or ``0.5`` stands for."""
    match = _NUMBER.fullmatch(text.strip().replace("_", ""))
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 1e9, 1B, 100M or 0.5")
    digits, suffix = match.groups()
    return float(digits) * _SUFFIXES[suffix.lower()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_ext.scaling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _advise_arguments(
        commands.add_parser(
            "advise", help="learning rate, batch, size, tokens and loss by the published laws"
        )
    )
    _pipeline_arguments(
        commands.add_parser("pipeline", help="the timeline of one batch through a pipeline")
    )
    return parser


def _advise_arguments(command: argparse.ArgumentParser) -> None:
    for name, text in ADVICE_INPUTS.items():
        required = name in ("params", "tokens")
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, type=number, required=required, metavar="X", help=text)
    command.add_argument("--sequence-length", type=number, metavar="X", help="tokens in a sequence")
    command.add_argument(
        "--law",
        action="append",
        choices=[law.name for law in LAWS],
        help="only this law; may be given again. An error where it refuses all that it could say.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _pipeline_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--schedule", choices=PIPELINE_SCHEDULES, default="breadth_first")
    add("--ranks", type=int, required=True, metavar="P", help="pipeline ranks")
    add("--stages-per-rank", type=int, default=1, metavar="N", help="stages on each rank")
    add("--microbatches", type=int, required=True, metavar="M", help="micro-batches of a batch")
    add("--forward-ms", type=float, default=1.0, metavar="X", help="of a stage and micro-batch")
    add("--backward-ms", type=float, default=2.0, metavar="X", help="the same")
    add("--send-ms", type=float, default=0.0, metavar="X", help="from rank to rank")
    add("--gather-ms", type=float, default=0.0, metavar="X", help="of a stage, with fsdp2")
    add("--reduce-ms", type=float, default=0.0, metavar="X", help="of a stage, with ddp and fsdp2")
    add("--data-parallel", choices=("ddp", "fsdp2"), help="what gathers and reduces")
    add("--png", metavar="FILE", help="draw it, too (matplotlib)")


def _advice(options: dict[str, Any]) -> list[str]:
    as_json, laws = options.pop("json"), options.pop("law")
    rows = advise(laws=laws, **options)
    if as_json:
        return [json.dumps([row._asdict() for row in rows], indent=2, allow_nan=False)]
    return _table(rows)


def _pipeline(options: dict[str, Any]) -> list[str]:
    path, ranks, count = (options.pop(name) for name in ("png", "ranks", "microbatches"))
    timeline = pipeline_timeline(**options, pipeline_ranks=ranks, num_microbatches=count)
    if path:
        timeline.figure(path)
    return [timeline.text(), "", *_numbers(timeline, is_sharded=bool(options["data_parallel"]))]


def _numbers(timeline: PipelineTimeline, *, is_sharded: bool) -> list[str]:
    formula = bubble_fraction(
        timeline.pipeline_ranks, timeline.num_microbatches, timeline.stages_per_rank
    )
    lines = [
        f"total            {timeline.total_ms:g} ms",
        f"idle             {timeline.bubble_fraction:.4f} of it; by the formula {formula:.4f}",
        f"stashed at most  {_by_rank(timeline.peak_stashed)}",
    ]
    if is_sharded:
        paper = timeline.paper_gathers
        lines.append(f"gathers          {_by_rank(timeline.gathers)}; one stage at a time: {paper}")
        lines.append(f"reductions       {_by_rank(timeline.reduces)}")
    return lines


def _by_rank(counts: Sequence[int]) -> str:
    """One number if all ranks have it, else all of them."""
    return f"{counts[0]}" if len(set(counts)) == 1 else ", ".join(map(str, counts)) + " by rank"


def _table(rows: Sequence[Advice]) -> list[str]:
    cells = [("law", "quantity", "value", "unit", "note")]
    for row in sorted(rows, key=lambda row: row.value is None):  # answers first
        value = "refused" if row.value is None else f"{row.value:.4g}"
        cells.append((row.law, row.quantity, value, row.unit, row.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    fits = dict.fromkeys(f"{row.law}: {row.source}; fitted to {row.valid}" for row in rows)
    return [*lines, "", *fits]


if __name__ == "__main__":
    raise SystemExit(main())
