"""What a strategy on FSDP2 sends, by the formulas of ``scaling``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ext.scaling import CommunicationBytes, communication_bytes


def on_paper(
    module: nn.Module,
    sizes: Mapping[str, int],
    policy: MixedPrecisionPolicy,
    *args: Any,
    **how: Any,
) -> CommunicationBytes:
    """What a rank sends in an optimizer step.

    Args:
        module: A sharded one.
        sizes: Of its units, by name; the root's has none.
        policy: With the dtypes of what is sent.
        args: Ranks in all, and those of a node.
        how: Further options of ``communication_bytes``.
    """
    gathered = policy.param_dtype or next(module.parameters()).dtype
    return communication_bytes(
        [size for name, size in sizes.items() if name],
        *args,
        root_params=sizes.get("", 0),
        weight_bytes=gathered.itemsize,
        gradient_bytes=(policy.reduce_dtype or gathered).itemsize,
        **how,
    )
