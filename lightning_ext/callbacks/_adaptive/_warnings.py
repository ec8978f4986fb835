"""What a user should know of a change of the batch that does not go as written."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_warn


def warn_of_waiting(global_batch: int, before: int, after: int) -> None:
    """Warns of a schedule's change that waits because two accumulations do not fit.

    Args:
        global_batch: The batch that stays for now.
        before: Accumulation at present.
        after: Accumulation to come.
    """
    common = math.lcm(before, after)
    if common > max(before, after):
        rank_zero_warn(
            f"The batch of {global_batch} changes with the next epoch only: from"
            f" accumulation {before} to {after} it takes a batch that is"
            f" a multiple of {common}. Hint: sizes of which one divides the other."
        )


def warn_of_short_epochs(global_batch: int, samples: int) -> bool:
    """Warns where a step would take more samples than an epoch has; whether it did."""
    if global_batch <= samples:
        return False
    rank_zero_warn(
        f"The global batch of {global_batch} is more than the {samples} samples of an"
        f" epoch: each step takes {samples}, with hyper-parameters for {global_batch}."
        " Hint: a smaller max_global_batch, or a longer epoch."
    )
    return True
