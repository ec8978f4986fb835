"""What DeepSpeed's ZeRO-3 optimizer shows of its parameters, and keeps of gradients.

Private: ``_set_fp32_optimizer_param_groups``, ``_clear_fp32_optimizer_param_groups`` and
    ``grad_partitions_flat_buffer`` of that optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def show_parameters(sharded: Any) -> None:
    """Puts parameters into the groups, from which DeepSpeed takes them, for callbacks to find.

    They are flat float32 parts, those of a parameter group one after the other.

    Args:
        sharded: DeepSpeed's ZeRO-3 optimizer; those of inference have none.
    """
    if hasattr(sharded, "_set_fp32_optimizer_param_groups"):
        sharded._clear_fp32_optimizer_param_groups()
        sharded._set_fp32_optimizer_param_groups()


@contextmanager
def hidden_parameters(sharded: Any) -> Iterator[None]:
    """Takes them out again for a step, in which DeepSpeed puts in one part after the other."""
    sharded._clear_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        show_parameters(sharded)


def drop_gradients(sharded: Any) -> None:
    """Forgets gradients, also of parameters that the next window does not use.

    DeepSpeed writes over the gradient of a parameter where there is a new one, and else would take
    the old one again.
    """
    sharded.zero_grad()
    sharded.grad_partitions_flat_buffer.zero_()
