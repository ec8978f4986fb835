"""Weights in bfloat16 that lose nothing of small steps.

Source: Zamirai et al. 2020 (arXiv:2010.06192), section 3, rounding at random and the error kept
    beside the weight.
Differs: the error is an int8 of 1/256 of the weight's last place; see ``functional.split_weight``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ext.optim._low_bit._moments import WEIGHT_ERROR


def weight_error(state: dict[str, Any], param: Tensor) -> Tensor:
    """Return what rounding has left of a weight, at first nothing.

    Args:
        state: of the parameter.
        param: the parameter.

    Raises:
        TypeError: if the parameter is not in bfloat16.
    """
    if WEIGHT_ERROR not in state:
        if param.dtype != torch.bfloat16:
            raise TypeError(
                f'weight_rounding="compensated" is for weights in torch.bfloat16, and one of shape'
                f" {tuple(param.shape)} is in {param.dtype}. Hint: module.to(torch.bfloat16), or"
                ' a group of its own with weight_rounding="nearest" for others'
            )
        state[WEIGHT_ERROR] = torch.zeros_like(param, dtype=torch.int8)
    found: Tensor = state[WEIGHT_ERROR]
    return found
