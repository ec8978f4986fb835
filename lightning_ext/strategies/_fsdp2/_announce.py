"""Tells what is gathered by itself, and what is gathered whole."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_ext.strategies._fsdp2._units import Wrap, classes, find_roots

# 40 MB in float32: below it, what a gather of all holds is small beside what a process needs.
LARGE = 10_000_000


def announce(module: LightningModule, units: Sequence[nn.Module], wrap: Wrap, ranks: int) -> None:
    """Says it on rank 0; warns where a large module is gathered at once and nobody asked for it.

    Args:
        module: Before it is sharded, but for what the user did.
        units: What is gathered by itself.
        wrap: What asked for these.
        ranks: Over which parameters are split.
    """
    name = type(module).__name__
    if units:
        rank_zero_info(f"{name}: {len(units)} layers are gathered one by one.")
        return
    if any(isinstance(one, FSDPModule) for one in module.modules()):
        rank_zero_info(f"{name}: layers are gathered as `configure_model` has sharded them.")
        return
    sizes = [sum(p.numel() for p in root.parameters()) for root in find_roots(module)]
    largest = max(sizes, default=0)
    told = f"{name}: no {_sought(wrap)} found, {largest:,} parameters are gathered at once"
    if wrap is None or ranks == 1 or largest <= LARGE:
        rank_zero_info(f"{told}.")
        return
    rank_zero_warn(
        f"{told}, by each of {ranks} ranks, which saves little of the memory at the peak. Hint:"
        f" wrap= the name of a class, of {classes(module)}; wrap=None for one unit on purpose."
    )


def _sought(wrap: Wrap) -> str:
    return "repeated layers" if isinstance(wrap, str) else "layers to gather one by one"
