"""Time the contrastive losses by tiles beside their dense formulas, and measure their memory.

    PYTHONPATH=. python benchmarks/contrastive.py --device cpu
    PYTHONPATH=. python benchmarks/contrastive.py --things clip_loss --batches 16384:10

Side by side in one process: the loss forward and backward by tiles, the dense one that has the
whole matrix of logits, and that of open_clip where it has one and is installed (`pip install
--no-deps open_clip_torch`; it is read without torchvision), in turn, as many rounds as are given
after the colon; with `--minutes-only` it times one round of each and says how many minutes all of
them would take. Where the dense formula does not fit into the memory there is no row. Inputs are
normalised rows that resemble each other in pairs. First all are compared with float64 on a smaller
batch.
Memory is the peak above the inputs, of one pass in a fresh process. Rows go to
`benchmarks/results/contrastive.csv`; `ratio` is the time of tiles to that of `base`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._pairs import Times, in_turn, interval
from benchmarks._peers import found_member, present, versions_of
from benchmarks._rows import KEY, describe, name_of, write
from benchmarks.geometry import timed
from lightning_ext.functional import clip_loss, info_nce_loss, nt_xent_loss, siglip_loss

RESULTS = Path(__file__).resolve().parent / "results" / "contrastive.csv"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = ["2048:30", "8192:30", "16384:10"]  # the last in about ten minutes on 2 cores
Loss = Callable[..., Tensor]


def dense_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy over rows and over columns."""
    z, own = scale * (x @ y.T), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def dense_info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy over rows."""
    return F.cross_entropy(scale * (x @ y.T), torch.arange(len(x), device=x.device))


def dense_nt_xent(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy over both views, without the diagonal."""
    views = torch.cat([x, y])
    z = (scale * (views @ views.T)).fill_diagonal_(-torch.inf)
    return F.cross_entropy(z, torch.arange(len(views), device=x.device).roll(len(x)))


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Binary cross-entropy of every pair."""
    z = scale * (x @ y.T) - 10
    truth = torch.eye(len(x), dtype=z.dtype, device=z.device)
    return F.binary_cross_entropy_with_logits(z, truth, reduction="sum") / len(x)


def tiled_siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """With the bias of the paper's start."""
    return siglip_loss(x, y, scale, -10.0)


def open_clip_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The ClipLoss of open_clip, of one process."""
    loss: Tensor = found_member("open_clip.loss.ClipLoss")()(x, y, scale)
    return loss


def open_clip_siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The SigLipLoss of open_clip, of one process."""
    loss: Tensor = found_member("open_clip.loss.SigLipLoss")()(x, y, scale, -10.0)
    return loss


LOSSES: dict[str, dict[str, Loss]] = {
    "clip_loss": {"tiles": clip_loss, "dense": dense_clip},
    "info_nce_loss": {"tiles": info_nce_loss, "dense": dense_info_nce},
    "nt_xent_loss": {"tiles": nt_xent_loss, "dense": dense_nt_xent},
    "siglip_loss": {"tiles": tiled_siglip, "dense": dense_siglip},
}
PEERS: dict[str, Loss] = {"clip_loss": open_clip_clip, "siglip_loss": open_clip_siglip}


def losses_of(thing: str) -> dict[str, Loss]:
    """Tiles, dense, and open_clip's where it is there."""
    theirs = {"open_clip": PEERS[thing]} if thing in PEERS and present("open_clip") else {}
    return LOSSES[thing] | theirs


def make(batch: int, width: int, scale: float, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs of a loss, which need gradients."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(batch, width))
    y = F.normalize(x + 2 * torch.randn(batch, width) / width**0.5)
    pair = [v.to(device, dtype).requires_grad_() for v in (x, y)]
    return [*pair, torch.tensor(scale, device=device, requires_grad=True)]


def run(loss: Loss, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Value and gradients."""
    value = loss(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


def check(thing: str, args: argparse.Namespace) -> None:
    """Assert that all are at most twice as far from float64 as the dense formula is."""
    inputs = make(1500, args.width, args.scale, DTYPES[args.dtype], args.device)
    floor = 1e-6 if args.dtype == "float32" else 8e-3
    exact = run(LOSSES[thing]["dense"], [v.detach().double().requires_grad_() for v in inputs])
    errors = {}
    for name, loss in losses_of(thing).items():
        pairs = zip(run(loss, inputs), exact, strict=True)
        errors[name] = [((v.double() - y).norm() / y.norm()).item() for v, y in pairs]
    for name, each in errors.items():
        for error, dense in zip(each, errors["dense"], strict=True):
            assert error <= max(2 * dense, floor), f"{thing}, {name}: {error}, dense {dense}"


def compare(thing: str, batch: int, pairs: int, args: argparse.Namespace) -> dict[str, Times]:
    """Milliseconds of all of them in turn; none with `--minutes-only`."""
    inputs = make(batch, args.width, args.scale, DTYPES[args.dtype], args.device)
    calls = {name: partial(run, loss, inputs) for name, loss in losses_of(thing).items()}
    first = [timed(call, args.device, 1) for call in calls.values()]
    say_minutes(thing, batch, pairs, first)
    return {} if args.minutes_only else in_turn(calls, args.device, pairs)


def say_minutes(thing: str, batch: int, pairs: int, first: list[float]) -> None:
    """Print how long the pairs will take, and each variant once more for its memory."""
    minutes = (pairs + 1) * sum(first) / 60e3
    print(f"{thing}, batch {batch}: about {minutes:.1f} minutes for {pairs} pairs", flush=True)


def fits(thing: str, batch: int, device: str) -> bool:
    """Return whether there is memory for the dense logits, their derivatives and copies."""
    rows = 2 * batch if thing == "nt_xent_loss" else batch
    free = torch.cuda.mem_get_info()[0] / 2**20 if device == "cuda" else available()
    return 6 * 4 * rows**2 / 2**20 < free


def available() -> float:
    """MiB that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kib) / 1024


def peak(thing: str, variant: str, batch: int, args: argparse.Namespace) -> float:
    """MiB above the inputs, in this process, which has done nothing else."""
    loss = losses_of(thing)[variant]
    run(loss, make(4, args.width, args.scale, DTYPES[args.dtype], args.device))
    inputs = make(batch, args.width, args.scale, DTYPES[args.dtype], args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run(loss, inputs)
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    before = resident("VmRSS")
    run(loss, inputs)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB of this process; `ru_maxrss` would have what its parent had when it was started."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kib) / 1024


def peak_of_fresh_process(thing: str, variant: str, batch: int, args: argparse.Namespace) -> float:
    """Run this script again for one figure."""
    options = {"--dtype": args.dtype, "--width": args.width, "--scale": args.scale}
    options |= {"--device": args.device, "--threads": args.threads}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, __file__, "--peak", thing, variant, str(batch), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--things", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--batches", nargs="+", default=BATCHES, help="batch:pairs")
    parser.add_argument("--minutes-only", action="store_true", help="print them and write no row")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1 / 0.07)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows go")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every loss at every batch."""
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        thing, variant, batch = args.peak
        print(json.dumps(peak(thing, variant, int(batch), args)))
        return
    for thing in args.things:
        check(thing, args)
        for batch, pairs in (map(int, words.split(":")) for words in args.batches):
            if fits(thing, batch, args.device):
                measure(thing, batch, pairs, args)
            else:
                print(f"{thing}, batch {batch}: no memory for the dense formula", flush=True)


def measure(thing: str, batch: int, pairs: int, args: argparse.Namespace) -> None:
    """Write the rows of a loss at a batch: tiles beside each of the others."""
    times = compare(thing, batch, pairs, args)
    mib = {name: peak_of_fresh_process(thing, name, batch, args) for name in times}
    rows = [row(thing, batch, base, times, mib, args) for base in times if base != "tiles"]
    if rows:
        write(rows, args.results)


def row(
    thing: str,
    batch: int,
    base: str,
    times: dict[str, Times],
    mib: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, str]:
    """Tiles beside one other."""
    mode = "forward and backward" + ("" if base == "dense" else f" beside {base}")
    shape = f"batch={batch},width={args.width},scale={args.scale:.3g}"
    device = name_of(args.device, args.threads)
    key = dict(zip(KEY, (thing, "tiles", mode, args.dtype, shape, device), strict=True))
    found = interval(times["tiles"] / times[base])
    found |= {"ms": float(np.median(times["tiles"])), "ms_base": float(np.median(times[base]))}
    texts = {name: f"{value:.4g}" for name, value in found.items()}
    texts |= {"pairs": str(len(times[base]))}
    texts |= {"mib": f"{mib['tiles']:.0f}", "mib_base": f"{mib[base]:.0f}"}
    print(thing, shape, "beside", base, texts, flush=True)
    return key | {"base": base} | texts | describe() | versions_of("open_clip")


if __name__ == "__main__":
    main()
