"""Time LAMB, LARS, AdamP and CAME next to pytorch_optimizer's and to torch's fused AdamW.

    pip install --target /tmp/peer --no-deps pytorch_optimizer
    PYTHONPATH=.:/tmp/peer python benchmarks/trust_updates.py --device cpu

Side by side in one process, in pairs. First it asserts each update against its formula in float64.
Rows go to `benchmarks/results/updates.csv`. `ratio` is the time of the variant to that of `base`:
of the peer's step, where the peer is installed, to that of ours, and of ours to fused AdamW's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks._rows import KEY, describe, name_of, write
from benchmarks.updates import CALLS, RESULTS, SHAPES, Lists, Thing, compare, torch_adamw
from lightning_ext import functional, kernels
from lightning_ext.functional import FactoredState

PEER = "pytorch_optimizer"
SHAPES |= {
    "16 x (256 x 256 + 256)": [torch.Size(x) for _ in range(16) for x in ([256, 256], [256])],
    "96 x 512 x 512": [torch.Size([512, 512])] * 96,
}
CALLS |= {"16 x (256 x 256 + 256)": 5, "96 x 512 x 512": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "lamb": {"lr": 1e-3, "weight_decay": 0.01},
    "lars": {"lr": 1e-3, "weight_decay": 0.01},
    "adamp": {"lr": 1e-3, "weight_decay": 0.01},
    "came": {"lr": 1e-4, "weight_decay": 0.01},
}
CLASSES = {"lamb": "Lamb", "lars": "LARS", "adamp": "AdamP", "came": "CAME"}

Call = Callable[[], Any]


def lists_of(shape: str, device: str) -> Lists:
    """Parameters, gradients, moments and steps in float32."""
    params, grads, first, second = (
        [torch.randn(size, device=device) for size in SHAPES[shape]] for _ in range(4)
    )
    steps = [torch.tensor(3.0, device=device) for _ in SHAPES[shape]]
    return Lists(params, grads, first, [x.square() for x in second], steps)


def factors_of(params: list[Tensor]) -> list[FactoredState]:
    """What CAME keeps of matrices."""
    sizes = [(len(x), x[0].numel()) * 2 for x in params]
    return [FactoredState(*(torch.ones(n, device=params[0].device) for n in x)) for x in sizes]


def ours(name: str, x: Lists) -> Call:
    """Our step of all parameters, with the counting of steps."""
    settings, one = SETTINGS[name], torch.ones((), device=x.steps[0].device)
    if name == "lars":
        return lambda: kernels.lars_update_(*x[:3], **settings)
    if name == "came":
        return _came(x, settings)
    update: Callable[..., Tensor] = getattr(kernels, f"{name}_update_")

    def step() -> None:
        torch._foreach_add_(x.steps, one, alpha=1.0)
        update(*x, **settings)

    return step


def _came(x: Lists, settings: dict[str, Any]) -> Call:
    ways = [[i for i, w in enumerate(x.params) if (w.dim() > 1) == flat] for flat in (True, False)]
    matrices, vectors = ([[column[i] for i in way] for column in x[:4]] for way in ways)
    factors = factors_of(matrices[0]) if matrices[0] else []

    def step() -> None:
        kernels.came_update_(matrices[0], matrices[1], matrices[2], factors, **settings)
        kernels.came_vector_update_(*vectors, **settings)

    return step


def peer(name: str, shape: str, device: str) -> Call:
    """The step of the peer's optimizer, on parameters of its own."""
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in SHAPES[shape]]
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    optimizer = getattr(import_module(PEER), CLASSES[name])(params, **SETTINGS[name])
    step: Call = optimizer.step
    return step


def formula(name: str, row: list[Tensor]) -> Tensor:
    """What one parameter becomes, in float64."""
    weight, grad, first, second, step = row
    states: dict[str, list[Any]] = {
        "lamb": [first, second, step + 1],
        "adamp": [first, second, step + 1],
        "lars": [first],
        "came": [first, second],
    }
    kept, update = states[name], f"{name}_update"
    if name == "came" and weight.dim() < 2:
        update = "came_vector_update"
    elif name == "came":
        kept[1] = FactoredState(*(x.double() for x in factors_of([weight.float()])[0]))
    moved: Tensor = getattr(functional, update)(weight, grad, *kept, **SETTINGS[name])[0]
    return moved


def check(name: str, shape: str, device: str) -> None:
    """Assert our update against the formula in float64."""
    x = lists_of(shape, device)
    exact = [[t.double() for t in row] for row in zip(*x, strict=True)]
    ours(name, x)()
    for weight, row in zip(x.params, exact, strict=True):
        truth = formula(name, row)
        error = (weight.double() - truth).norm() / truth.norm()
        assert error < 1e-6, f"{name}: relative error {error:.2g}"


def rows_of(name: str, shape: str, device: str, threads: int, pairs: int) -> list[dict[str, str]]:
    """Assert accuracy, then time the peer next to ours and ours next to fused AdamW."""
    check(name, shape, device)
    x, rows = lists_of(shape, device), []
    ours_name, ours_call = f"kernels.{name}_update_", ours(name, x)
    adamw = torch_adamw(lists_of(shape, device), fused=True)
    things = [(ours_name, ours_call, "torch fused AdamW", adamw)]
    if find_spec(PEER) is not None:
        with torch.enable_grad():
            things.append((PEER, peer(name, shape, device), ours_name, ours_call))
    for variant, call, base, base_call in things:
        even = Thing(lambda _: {}, base, 1, 1, lambda _: None)  # ratios of times
        key = (name, variant, "step", "float32", shape, name_of(device, threads))
        found = compare(even, call, base_call, shape, device, pairs)
        rows.append(dict(zip(KEY, key, strict=True)) | {"base": base} | found | describe())
        print(name, variant, shape, f"{threads} threads", found)
    return rows


@torch.no_grad()
def main() -> None:
    """Measure every update at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["16 x (256 x 256 + 256)"])
    parser.add_argument("--things", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    threads, written = args.threads if args.device == "cpu" else [1], []
    for count, shape, name in itertools.product(threads, args.shapes, args.things):
        torch.set_num_threads(count)
        written += rows_of(name, shape, args.device, count, args.pairs)
    write(written, RESULTS)


if __name__ == "__main__":
    main()
