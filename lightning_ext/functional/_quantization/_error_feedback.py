"""What rounding has withheld, kept for what is sent next.

Source: Xie et al. 2024 (LoCo, arXiv:2407.04480): a moving average of the errors of compression is
    added to a gradient before it is compressed; Seide et al. 2014 (1-bit SGD) for β = 0.
Differs: β weighs the old error, as ``err_beta`` of DeepSpeed's LoCo did, so that β = 0 is plain
    error feedback; an error of what is not finite is not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain


def error_feedback(error: Tensor, wanted: Tensor, read: Tensor, *, beta: float = 0.0) -> Tensor:
    """Return the error e′ that is added to what is sent next.

        h = x + e,   d = dequantize(quantize(h)),   e′ = β·e + (1 − β)·(h − d)

    As d = x + e − (h − d), every step sends d = x − (e′ − e)/(1 − β), and these differences add up
    to Σd = Σx − (e_T − e_0)/(1 − β): steps lose one error together, not one each. From e_0 = 0 an
    error is an average of roundings, so |e| ≤ s/2 for the largest step s of the codes so far, and
    the mean of T steps is off by at most s / (2·T·(1 − β)).

    Where h − d is not finite the old error stays, as an overflow is not to be sent again.

    Args:
        error: e, of any shape.
        wanted: h, what was to be sent, of the shape of error.
        read: d, what is read by those who receive it, of the same shape.
        beta: β in [0, 1). Near 1 the error moves slowly, and h hardly differs from x.

    Returns:
        e′, of the shape of error.

    Raises:
        TypeError: if one of them is a DTensor.
        ValueError: if shapes differ, or β is outside of [0, 1).

    Example:
        >>> error = torch.zeros(1)
        >>> for _ in range(2):
        ...     wanted = 0.4 + error
        ...     error = error_feedback(error, wanted, wanted.round())
        >>> error
        tensor([-0.2000])
    """
    check_plain(error=error, wanted=wanted, read=read)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta={beta} is not allowed; it is in [0, 1), 0 for plain feedback")
    if not error.shape == wanted.shape == read.shape:
        raise ValueError(
            f"error, wanted and read have shapes {tuple(error.shape)}, {tuple(wanted.shape)} and "
            f"{tuple(read.shape)}; they must be of one shape"
        )
    missing = wanted - read
    return torch.where(missing.isfinite(), beta * error + (1.0 - beta) * missing, error)
