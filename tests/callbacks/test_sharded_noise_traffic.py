"""What the noise scale sends under FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from harness import Still, dataset, fit, fsdp2, run_distributed, shard
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_ext.callbacks import GradientNoiseScale


class Sharded(Still):
    def configure_model(self) -> None:
        shard(self.net, self.device_mesh)


class Moved(TorchDispatchMode):
    """Counts the elements that collectives are given."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            leaves = torch.utils._pytree.tree_leaves(args)
            self.elements.append(max(x.numel() for x in leaves if isinstance(x, Tensor)))
        return func(*args, **kwargs or {})


def moved(watched: bool) -> list[int]:
    module = Sharded()
    callbacks = [GradientNoiseScale(1)] if watched else []
    with Moved() as mode:
        fit(
            callbacks,
            module=module,
            train=DataLoader(dataset(32, torch.float64), 4),
            max_epochs=1,
            **fsdp2(2),
        )
    return mode.elements


def compared() -> tuple[list[int], list[int]]:
    return moved(False), moved(True)


def test_only_norms_are_communicated() -> None:
    for without, beside in run_distributed(compared):
        assert max(without) >= 6 * 12
        for size in set(without):
            beside = _minus(beside, size, without.count(size))
        assert 0 < max(beside) <= 16
        assert len(beside) <= 2 + 3 * 2  # at the start, and for each of two steps


def _minus(sizes: list[int], size: int, count: int) -> list[int]:
    assert sizes.count(size) >= count
    for _ in range(count):
        sizes.remove(size)
    return sizes
