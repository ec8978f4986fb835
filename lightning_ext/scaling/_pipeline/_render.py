"""Timelines of pipelines as text and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ext.scaling._pipeline._timing import PipelineAction
from lightning_ext.scaling._validate import require_positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from lightning_ext.scaling._pipeline._timeline import PipelineTimeline

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST_SLOTS = 10_000
_NETWORK = {"gather": "0.6", "reduce": "0.2"}


def timeline_text(timeline: PipelineTimeline, slot_ms: float | None) -> str:
    """Return one line of slots for each rank."""
    passes = [a for a in timeline.actions if a.micro_batch is not None]
    lengths = [a.end_ms - a.start_ms for a in passes if a.end_ms > a.start_ms]
    slot = min(lengths, default=1.0) if slot_ms is None else slot_ms
    require_positive("slot_ms", slot)
    slots = max(1, round(timeline.total_ms / slot))
    if slots > _MOST_SLOTS:
        raise ValueError(
            f"slot_ms={slot:g} makes {slots} slots of {timeline.total_ms:g} ms; the most is "
            f"{_MOST_SLOTS}: give a larger slot_ms"
        )
    width = 1 + len(str(timeline.num_microbatches - 1))
    margin = len(f"rank {timeline.pipeline_ranks - 1}")
    lines = []
    for rank in range(timeline.pipeline_ranks):
        marks = _marks(timeline.of_rank(rank, is_pass=True), slots, slot, timeline.pipeline_ranks)
        cells = " ".join((mark * width if mark == "-" else mark).ljust(width) for mark in marks)
        lines.append(f"{f'rank {rank}':<{margin}}  {cells}".rstrip())
    return "\n".join(lines)


def draw_timeline(timeline: PipelineTimeline, path: str | Path | None) -> Figure:
    """Return the figure of one timeline, and save it where there is a path."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = 'a figure needs matplotlib. Run: pip install "lightning_ext[examples]"'
        raise ModuleNotFoundError(message, name="matplotlib") from error

    figure = Figure(figsize=(11, 1.2 + 0.5 * timeline.pipeline_ranks), layout="constrained")
    axes = figure.add_subplot()
    patches = draw_rows(axes, timeline)
    axes.set_xlabel("ms")
    figure.legend(handles=patches, loc="outside right upper", fontsize="small")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def draw_rows(axes: Axes, timeline: PipelineTimeline) -> list[Patch]:
    """Draw a row for each rank, name the schedule above, and return what the colours mean."""
    ranks = timeline.pipeline_ranks
    room = timeline.total_ms / 300 * (1 + len(str(timeline.num_microbatches - 1)))
    for a in timeline.actions:
        length, is_pass = a.end_ms - a.start_ms, a.micro_batch is not None
        low, height = (a.rank - 0.4, 0.7) if is_pass else (a.rank + 0.32, 0.12)
        axes.broken_barh(
            [(a.start_ms, length)],
            (low, height),
            facecolors=_colour(a, ranks),
            edgecolors="white",
            linewidth=0.4,
        )
        if is_pass and length > room:
            axes.text(
                a.start_ms + length / 2,
                a.rank - 0.05,
                f"{a.micro_batch}",
                ha="center",
                va="center",
                fontsize=6,
            )
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, timeline.total_ms)
    axes.set_yticks(range(ranks), labels=[f"rank {rank}" for rank in range(ranks)])
    loops = f", {timeline.stages_per_rank} stages a rank" if timeline.stages_per_rank > 1 else ""
    idle = f"{timeline.bubble_fraction:.1%} idle"
    axes.set_title(f"{timeline.schedule}{loops}: {idle}", fontsize="medium", loc="left")
    return _patches(timeline)


def _patches(timeline: PipelineTimeline) -> list[Patch]:
    """What the colours of a timeline mean."""
    from matplotlib.patches import Patch

    known = {(a.stage // timeline.pipeline_ranks, a.kind): a for a in timeline.actions}
    patches = []
    for (local, kind), action in sorted(known.items(), key=_place):
        if kind in _NETWORK and local:
            continue
        label = kind if kind in _NETWORK else f"local stage {local}, {kind}"
        patches.append(Patch(color=_colour(action, timeline.pipeline_ranks), label=label))
    return patches


def _place(entry: tuple[tuple[int, str], PipelineAction]) -> tuple[bool, int, bool]:
    """Passes first, by local stage, forward before backward; then what the network does."""
    (local, kind), _ = entry
    return kind in _NETWORK, local, kind in ("backward", "reduce")


def _colour(action: PipelineAction, ranks: int) -> Any:
    """A colour for each local stage, pale in the forward pass."""
    from matplotlib import colormaps

    if action.kind in _NETWORK:
        return _NETWORK[action.kind]
    paired = colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed map has them
    local = action.stage // ranks % 10
    return paired[2 * local + (action.kind == "forward")]


def _marks(passes: Sequence[PipelineAction], slots: int, slot_ms: float, ranks: int) -> list[str]:
    """What stands in each slot: its pass where that starts, "-" where it goes on, "." idle."""
    marks: list[str] = []
    shown = position = 0
    for index in range(slots):
        middle = (index + 0.5) * slot_ms
        while position < len(passes) and passes[position].end_ms <= middle:
            position += 1
        if position == len(passes) or passes[position].start_ms > middle:
            marks.append(".")
        elif shown > position:
            marks.append("-")
        else:
            shown, action = position + 1, passes[position]
            letter = _LETTERS[action.stage // ranks % len(_LETTERS)]
            name = letter if action.kind == "forward" else letter.lower()
            marks.append(f"{name}{action.micro_batch}")
    return marks
