"""Where collectives are put in FSDP2: the only file that knows torch's private paths of them.

The setters are public. The classes to inherit from, and the state that modules share which were
sharded together, have private names; torch 2.11 to 2.13 have them under the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
else:
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
    except ImportError:

        class AllGather:
            """In place of torch's class, so that what needs none of it can be imported."""

            def __new__(cls, *args: object, **kwargs: object) -> AllGather:
                """Say what is missing."""
                raise ImportError(
                    f"torch {torch.__version__} has no AllGather and ReduceScatter in "
                    "torch.distributed.fsdp._fully_shard._fsdp_api, which quantized collectives "
                    "extend; they are tested with torch 2.11 to 2.13"
                )

        ReduceScatter = AllGather

__all__ = ["AllGather", "Allocates", "ReduceScatter", "all_gather", "sharded_units"]


class Allocates:
    """Buffers from where torch's own collectives have theirs."""

    def allocate(
        self, size: Any, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # the names are FSDP2's
        """Return memory for what FSDP2 sends or receives.

        Args:
            size: shape.
            dtype: of the entries.
            device: of the memory.
        """
        return torch.empty(*size, dtype=dtype, device=device)


def all_gather(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """Gather one tensor from all ranks, under the name that this torch has for it.

    Args:
        output: flat, as long as all inputs.
        input: this rank's.
        group: ranks.
        async_op: returns before it is done.
    """
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(output, input, group=group, async_op=async_op)


def sharded_units(module: nn.Module) -> dict[str, FSDPModule]:
    """Return the modules that were sharded, by name, once where several are one unit.

    Args:
        module: any, itself included.
    """
    found = {name: m for name, m in module.named_modules() if isinstance(m, FSDPModule)}
    firsts: dict[int, str] = {}
    for name, unit in found.items():
        firsts.setdefault(id(unit._get_fsdp_state()), name)
    return {name: found[name] for name in firsts.values()}
