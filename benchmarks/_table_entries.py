"""What the table of README.md shows: which rows, and which of their columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks._optimizer_peers import ANCHOR

Row = dict[str, str]
Rows = dict[str, list[Row]]
Cells = tuple[str, str, str]
Show = Callable[[Row, list[Row]], Cells]

MARK = "†"  # of a peer whose definition differs; a note below the table says in what

# Columns of versions, by how the names of peers begin.
VERSIONS = {
    "gns-pytorch": "gns_pytorch",
    "Lightning": "lightning",
    "torch ": "torch",
    "torchao": "torchao",
    "ema_pytorch": "ema_pytorch",
    "timm": "timm",
    "pytorch_optimizer": "pytorch_optimizer",
    "bitsandbytes": "bitsandbytes",
    "open_clip": "open_clip",
}


def three(text: str) -> str:
    """Three digits, of 1,000 and more all before the point."""
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def percent(text: str) -> str:
    """A share with its sign."""
    value = 100 * float(text)
    return f"{value:+.1f} %" if abs(value) < 10 else f"{value:+,.0f} %"


def ratio(row: Row) -> str:
    """A ratio of times and its interval."""
    value, low, high = (float(row[name]) for name in ("ratio", "low", "high"))
    digits = 3 if 0.95 < value < 1.05 else 2
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def differs(row: Row, rows: list[Row]) -> str:
    """In what the definition of its peer differs from ours; empty where it does not."""
    there = [x for x in rows if beside(row, x) and x["variant"] == row.get("base")]
    return only(there).get("differs") or "" if there else ""


def peer(base: str, row: Row) -> str:
    """The name of a peer with its version."""
    column = next((y for x, y in VERSIONS.items() if base.startswith(x)), None)
    if column is None:
        return base
    name, comma, rest = base.partition(",")
    return f"{name.strip()} {row[column]}{comma}{rest}"


def times(row: Row, rows: list[Row]) -> Cells:
    """Times of a call, marked where the peer does something else."""
    mark = f" {MARK}" if differs(row, rows) else ""
    theirs = f"{three(row['ms_base'])} ms, {peer(row['base'], row)}{mark}"
    return f"{three(row['ms'])} ms", theirs, ratio(row)


def times_and_anchor(row: Row, rows: list[Row]) -> Cells:
    """Times of a step, and that of torch's fused AdamW."""
    ours, theirs, found = times(row, rows)
    return ours, theirs + anchor(row, rows), found


def anchor(row: Row, rows: list[Row]) -> str:
    """What a step of torch's fused AdamW takes beside it, where that was timed."""
    there = [x for x in rows if beside(row, x) and x["variant"] == ANCHOR != row["base"]]
    if not there:
        return ""
    found = only(there)
    return f" (torch's fused AdamW: {three(found['ms'])} ms, {three(found['bytes'])} bytes)"


def times_and_mib(row: Row, rows: list[Row]) -> Cells:
    """Times of a call and the memory it takes."""
    ours = f"{three(row['ms'])} ms, {int(row['mib']):,} MiB"
    theirs = f"{three(row['ms_base'])} ms, {int(row['mib_base']):,} MiB"
    return ours, f"{theirs}, {peer(row['base'], row)}", ratio(row)


def times_and_bytes(row: Row, rows: list[Row]) -> Cells:
    """Times of a step and bytes of states for each parameter."""
    other = only([x for x in rows if beside(row, x) and x["variant"] == row["base"]])
    ours = f"{three(row['ms'])} ms, {three(row['bytes'])} bytes"
    theirs = f"{three(row['ms_base'])} ms, {three(other['bytes'])} bytes"
    mark = f" {MARK}" if differs(row, rows) else ""
    return ours, f"{theirs}, {peer(row['base'], row)}{mark}" + anchor(row, rows), ratio(row)


def shares(row: Row, rows: list[Row]) -> Cells:
    """What measuring adds to a step, and the ratio of measured steps."""
    samples = f"{row['samples_base']} of {row['samples']} samples"
    used = f"{samples}, {row['tensors_base']} of {row['tensors']} tensors"
    theirs = f"{percent(row['share_base'])}, {peer(row['base'], row)}: {used}"
    return percent(row["share"]), theirs, ratio(row)


def errors(row: Row, rows: list[Row]) -> Cells:
    """Typical errors and biases of windows, and how often the interval holds the truth."""
    variant = "gns-pytorch, single samples"
    others = [x for x in rows if x["shape"] == row["shape"] and x["variant"] == variant]
    held = f"its interval holds in {100 * float(row['coverage']):.1f} %"
    if not others:
        return f"{error(row)}; {held}", "", ""
    other = only(others)
    theirs = f"{error(other)}; {peer('gns-pytorch, mean of values', other)}"
    return f"{error(row)}; {held}", theirs, ""


def error(row: Row) -> str:
    """Medians over windows of errors without and with their signs."""
    typical = percent(row["error_median"]).removeprefix("+")
    return f"{typical}, bias {percent(row['bias_median'])}, {float(row['windows']):.0f} windows"


def added(row: Row, rows: list[Row]) -> Cells:
    """What callbacks add to a step of the Trainer."""
    without = f"{three(row['ms_without'])} ms, without"
    return f"{float(row['ms_added']):+.2f} ms", without, ratio(row)


def beside(row: Row, other: Row) -> bool:
    """Whether two rows differ in the variant alone."""
    return all(row[x] == other[x] for x in ("thing", "mode", "dtype", "shape", "device"))


def only(rows: list[Row]) -> Row:
    """The row that was measured last."""
    return max(rows, key=lambda row: row["date"])


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
        thing: in words.
        slice: whose rows they are.
        key: thing, variant, mode and shape of the row.
        show: its cells.
        shape: in words; that of the row by default.
    """

    thing: str
    slice: str
    key: tuple[str, str, str, str]
    show: Show
    shape: str = ""

    def find(self, rows: Rows) -> Row | None:
        """Return its row."""
        names = ("thing", "variant", "mode", "shape")
        found = [x for x in rows.get(self.slice, []) if tuple(x[y] for y in names) == self.key]
        return only(found) if found else None

    def where(self, row: Row) -> str:
        """Return shape and threads."""
        threads = row["device"].rpartition(", ")[2]
        shape = self.shape or row["shape"].replace(" x ", " × ")
        return ", ".join([shape, *([threads] if threads != "any" else [])])


def noise_time(words: str, source: str, other: str) -> Entry:
    """A step that measures."""
    key = ("noise scale, time", f"lightning_ext, {source}", f"measured step beside {other}")
    model = "GPT of 0.5 M parameters, 2 × 16 windows"
    return Entry(words, "noise_scale", (*key, "language_model,micro=16"), shares, model)


def noise_accuracy(truth: int) -> Entry:
    """Known gradients."""
    key = ("noise scale, accuracy", "lightning_ext", "ratio of averages, 500")
    words = f"Noise scale of {truth:,}: typical error from 500 measurements"
    shape = "64 samples each, known Gaussian gradients"
    return Entry(words, "noise_scale", (*key, f"truth={truth},batch=64"), errors, shape)


def average(words: str, mode: str, shape: str, variant: str = "callbacks.EMA") -> Entry:
    """An update of an average."""
    return Entry(words, "ema", ("ema", variant, mode, shape), times)


def step(name: str, shape: str = "16 x (256 x 256 + 256)") -> Entry:
    """A step of an optimizer."""
    key = (name, "lightning_ext", "step", shape)
    return Entry(f"`{name}`, a step", "optimizers", key, times_and_anchor)


def low_bit(format: str) -> Entry:
    """A step with states of few bits."""
    key = (f"AdamW {format}", "lightning_ext", "step", "16 x (256 x 256 + 256)")
    words = f'`LowBitAdamW(state_dtype="{format}")`, a step; states for each parameter'
    return Entry(words, "low_bit", key, times_and_bytes)


def loss(name: str, batch: int, base: str) -> Entry:
    """A contrastive loss."""
    mode = "forward and backward" + ("" if base == "dense" else f" beside {base}")
    key = (name, "tiles", mode, f"batch={batch},width=256,scale=14.3")
    shape = f"batch {batch:,}, width 256"
    return Entry(f"`{name}`, forward and backward", "contrastive", key, times_and_mib, shape)


def loop(words: str, thing: str, variant: str) -> Entry:
    """Callbacks in a fit."""
    key = (thing, variant, "fit", "language_model,micro=16")
    model = "GPT of 0.5 M parameters, 2 × 16 windows"
    return Entry(words, "callback_overhead", key, added, model)


ENTRIES = (
    noise_time(
        "Noise scale from micro-batches, added to a step that measures",
        "micro_batches",
        "gns-pytorch, defaults",
    ),
    noise_time("The same", "micro_batches", "gns-pytorch, defaults, no gc.collect"),
    noise_time("From norm layers, factors known", "norm_layers", "gns-pytorch, defaults"),
    noise_time(
        "From all gradients of single samples",
        "per_sample",
        "gns-pytorch, all parameters and samples",
    ),
    noise_time("The same", "per_sample", "gns-pytorch, all parameters and samples, no gc.collect"),
    noise_accuracy(64),
    noise_accuracy(512),
    noise_accuracy(4096),
    average("`EMA` update, beside the fastest", "beside the fastest", "800 x 2075"),
    average("`EMA` update, beside the fastest", "beside the fastest", "96 x 512 x 256"),
    average("`EMA` update", "beside Lightning EMAWeightAveraging", "800 x 2075"),
    average(
        "`ema_update_`, lists",
        "beside torch._foreach_lerp_",
        "800 x 2075",
        "kernels.ema_update_",
    ),
    step("LAMB"),
    step("LARS"),
    step("Lion"),
    step("AdamP"),
    step("NorMuon"),
    low_bit("int8"),
    low_bit("int4"),
    low_bit("fp8"),
    loss("clip_loss", 2048, "open_clip"),
    loss("clip_loss", 8192, "open_clip"),
    loss("siglip_loss", 2048, "open_clip"),
    loss("siglip_loss", 8192, "open_clip"),
    loop("`EMA` in a fit, added to a step", "EMA", "every step"),
    loop("`GradientNoiseScale` in a fit", "GradientNoiseScale", "as it comes"),
    loop("with `AdaptiveBatchSize`", "both, noise_scale", "as it comes"),
)
