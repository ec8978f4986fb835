"""Time averages of weights and squared norms of many tensors next to what torch has for them.

    PYTHONPATH=. python benchmarks/ema.py --device cpu

Side by side in one process, in pairs of one call each: an operation, and the plainest way in
torch to the same result, `torch._foreach_lerp_` for averages. First it asserts that averages are
the same in every bit, and norms against float64. Rows go to `benchmarks/results/ema.csv`; `ratio`
is the time of the variant to that of `base`.

    pip install --target /tmp/peers --no-deps ema-pytorch timm
    PYTHONPATH=.:/tmp/peers python benchmarks/ema.py --beside

times the update of `callbacks.EMA` and those of other packages' classes, all in turn and each in
its fastest form, instead: a row for each of them as `base`, and one for the fastest. One more row
has our kernel beside torch's call, both of lists that are there.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks import _ema_peers
from benchmarks._pairs import in_turn, interval
from benchmarks._peers import versions_of
from benchmarks._rows import KEY, describe, name_of, write
from benchmarks.geometry import timed
from lightning_ext import kernels

RESULTS = Path(__file__).resolve().parent / "results" / "ema.csv"
DECAY, DECAYS = 0.999, [0.9, 0.99, 0.999]
SHAPES = {"800 x 2075": (800, (2075,)), "96 x 512 x 256": (96, (512, 256))}

Call = Callable[[], Any]


class Row(NamedTuple):
    """What is compared: the calls, and what the figures are of."""

    thing: str
    variant: str
    mode: str
    dtype: str
    base: str
    call: Call
    base_call: Call


class Weights(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, shape: str, device: str) -> None:
        super().__init__()
        count, sizes = SHAPES[shape]
        self.kept = nn.ParameterList(torch.randn(sizes, device=device) for _ in range(count))


def averages_of(weights: Weights) -> list[Tensor]:
    """Tensors to average into."""
    return [torch.zeros_like(x) for x in weights.parameters()]


def ema_rows(weights: Weights) -> Iterator[Row]:
    """Averages: ours, Lightning's, and those of torch."""
    values: list[Tensor] = list(weights.parameters())
    averages = averages_of(weights)
    flat, flat_average = (torch.cat([x.flatten() for x in each]) for each in (values, averages))
    models = {
        # What Lightning's EMAWeightAveraging does at a step.
        "Lightning EMAWeightAveraging": {"avg_fn": get_ema_avg_fn(DECAY)},
        "AveragedModel multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    }
    calls: dict[str, Call] = {
        "kernels.ema_update_": lambda: kernels.ema_update_(averages, values, DECAY),
        "flat lerp_": lambda: flat_average.lerp_(flat, 1 - DECAY),
    }
    for name, settings in models.items():
        model = AveragedModel(weights, use_buffers=True, **settings)
        calls[name] = partial(model.update_parameters, weights)
    other = averages_of(weights)
    base = "torch._foreach_lerp_"
    for name, call in calls.items():
        yield Row(
            "ema", name, "one decay", "float32", base, call, lambda: lerp(other, values, DECAY)
        )
    three, others = ([averages_of(weights) for _ in DECAYS] for _ in range(2))
    yield Row(
        *("ema", "kernels.ema_update_", "3 decays", "float32", base),
        lambda: kernels.ema_update_(three, values, DECAYS),
        lambda: [*map(lerp, others, [values] * len(DECAYS), DECAYS)],
    )
    half = [x.detach().bfloat16() for x in values]
    yield Row(
        *("ema", "kernels.ema_update_", "one decay", "bfloat16", f"{base} of x.float()"),
        lambda: kernels.ema_update_(averages, half, DECAY),
        lambda: lerp(other, [x.float() for x in half], DECAY),
    )


def norm_rows(weights: Weights) -> Iterator[Row]:
    """Squared norms: ours, and those of torch's foreach functions."""
    xs = [x.detach() for x in weights.parameters()]
    ys, zs = ([x + 1 for x in xs] for _ in range(2))
    pairs: dict[tuple[str, str], tuple[Call, str, Call]] = {
        ("sq_norms", "one group"): (
            lambda: kernels.sq_norms(xs),
            "torch._foreach_norm, stack, square, sum",
            lambda: squares(xs).sum(),
        ),
        ("sq_norms", "each tensor"): (
            lambda: kernels.sq_norms(xs, range(len(xs))),
            "torch._foreach_norm, stack, square",
            lambda: squares(xs),
        ),
        ("diff_sq_norms", "one group"): (
            lambda: kernels.diff_sq_norms(xs, ys),
            "torch._foreach_sub, _norm, stack, square, sum",
            lambda: squares(torch._foreach_sub(xs, ys)).sum(),
        ),
        ("accumulated_sq_norms_", "one group"): (
            lambda: kernels.accumulated_sq_norms_(xs, ys),
            "torch._foreach_sub, _norm, _mul, _copy_ and sums",
            lambda: accumulated(xs, zs),
        ),
    }
    for (thing, mode), (call, base, base_call) in pairs.items():
        yield Row(thing, f"kernels.{thing}", mode, "float32", base, call, base_call)


def lerp(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """One call of torch."""
    torch._foreach_lerp_(averages, values, 1 - decay)


def squares(xs: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Squared norms of each tensor."""
    return torch.stack(torch._foreach_norm(xs)).square()


def accumulated(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """What accumulated_sq_norms_ returns and does."""
    changes = torch._foreach_sub(xs, ys)
    products = torch.stack([x.sum() for x in torch._foreach_mul(changes, ys)]).sum()
    found = torch.stack([squares(changes).sum(), squares(xs).sum(), products])
    torch._foreach_copy_(ys, xs)
    return found


def check(weights: Weights) -> None:
    """Assert that averages are those of torch in every bit on a CPU, and norms those in float64."""
    values: list[Tensor] = list(weights.parameters())
    ours, theirs = averages_of(weights), averages_of(weights)
    for _ in range(3):
        kernels.ema_update_(ours, values, DECAY)
        lerp(theirs, values, DECAY)
    for one, other in zip(ours, theirs, strict=True):
        if one.device.type == "cpu":
            assert torch.equal(one, other), "another average than torch's"
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    exact = [x.double() for x in values]
    before = [x / 2 for x in values]
    truth = torch.stack([kernels.sq_norms(exact), kernels.sq_norms(exact) / 4])
    whole = torch.stack([kernels.sq_norms(values), kernels.diff_sq_norms(values, before)])
    norms = kernels.accumulated_sq_norms_(values, before)
    for found, expected in ((whole, truth), (norms, truth[[1, 0, 1]])):
        error = (found / expected - 1).abs().max().item()
        assert error < 1e-6, f"relative error {error:.2g}"


def compare(row: Row, device: str, pairs: int) -> dict[str, str]:
    """Time the two in turn and return their ratio."""
    calls = (row.base_call, row.call)
    for call in calls:
        timed(call, device, 1)
    times = np.empty((pairs, 2))
    for pair in range(pairs):
        for place in (0, 1) if pair % 2 else (1, 0):
            times[pair, place] = timed(calls[place], device, 1)
    ratios = times[:, 1] / times[:, 0]
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    found = {"ratio": median(ratios), "low": low, "high": high}
    found |= {"ms": np.median(times[:, 1]), "ms_base": np.median(times[:, 0])}
    return {name: f"{value:.4g}" for name, value in found.items()} | {"pairs": str(pairs)}


def beside(weights: Weights, shape: str, threads: int, pairs: int) -> list[dict[str, str]]:
    """Time ours and the averages of other packages in turn."""
    kind = next(weights.parameters()).device.type
    _ema_peers.check(weights, DECAY)
    made = _ema_peers.averages(weights, DECAY)
    lists = _ema_peers.calls_of_lists(weights, DECAY)
    times = in_turn({name: each.update for name, each in (made | lists).items()}, kind, pairs)
    medians = {name: float(np.median(x)) for name, x in times.items()}
    ours = _ema_peers.OURS
    best = min((x for x in made if x != ours), key=lambda name: medians[name])
    compared = [(ours, f"beside {name}", name) for name in made if name != ours]
    compared.append((ours, "beside the fastest", best))
    compared.append((_ema_peers.KERNEL, f"beside {_ema_peers.LERP}", _ema_peers.LERP))
    rows = []
    for variant, mode, base in compared:
        key = ("ema", variant, mode, "float32", shape, name_of(kind, threads))
        figures = interval(times[variant] / times[base])
        figures |= {"ms": medians[variant], "ms_base": medians[base]}
        texts = {column: f"{value:.4g}" for column, value in figures.items()}
        row = dict(zip(KEY, key, strict=True)) | {"base": base} | texts | {"pairs": str(pairs)}
        rows.append(row | describe() | versions_of(*_ema_peers.PACKAGES))
        print(shape, variant, mode, texts, flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    """Measure every operation at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--beside", action="store_true", help="ours and other packages instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows go")
    args = parser.parse_args()
    written = []
    threads = args.threads if args.device == "cpu" else [1]
    for count, shape in itertools.product(threads, args.shapes):
        torch.set_num_threads(count)
        device = name_of(args.device, count)
        weights = Weights(shape, args.device)
        if args.beside:
            written += beside(weights, shape, count, args.pairs)
            continue
        check(weights)
        for row in (*ema_rows(weights), *norm_rows(weights)):
            found = compare(row, args.device, args.pairs)
            key = (row.thing, row.variant, row.mode, row.dtype, shape, device)
            named = dict(zip(KEY, key, strict=True)) | {"base": row.base}
            written.append(named | found | describe())
            print(count, *key[:5], found)
    write(written, args.results)


if __name__ == "__main__":
    main()
