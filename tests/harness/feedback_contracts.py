"""What the contract of `functional` asks of error feedback.

Each entry: gradcheck, a value worked by hand, an invariance, an independent implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_ext.functional import dequantize, error_feedback, quantize

Four = tuple[Callable[[], bool], Callable[[], tuple], Callable[[], tuple], Callable[[], tuple]]

STEPS = 5


def _grad() -> bool:
    inputs = tuple(torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    return torch.autograd.gradcheck(lambda *x: error_feedback(*x, beta=0.8), inputs)


def _hand() -> tuple[Tensor, list[float]]:
    error, wanted, read = torch.tensor([[1.0, 4.0], [3.0, 0.5], [2.0, 1.0]]).unbind(0)
    return error_feedback(error, wanted, read, beta=0.75), [1.0, 2.875]


def _sent_and_error(grads: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """What was read of each step, what was withheld, and the last error."""
    error, read, withheld = torch.zeros_like(grads[0]), [], []
    for grad in grads:
        wanted = grad + error
        read.append(dequantize(quantize(wanted, "int4", block_size=16)))
        withheld.append(wanted - read[-1])
        error = error_feedback(error, wanted, read[-1], beta=beta)
    return torch.stack(read), torch.stack(withheld), error


def _sum_of_steps() -> tuple[Tensor, Tensor]:
    grads, beta = torch.randn(STEPS, 40, dtype=torch.float64), 0.8
    read, _, error = _sent_and_error(grads, beta)
    return read.sum(0), grads.sum(0) - error / (1 - beta)


def _average_by_numpy() -> tuple[Tensor, list[float]]:
    beta = 0.6
    _, withheld, error = _sent_and_error(torch.randn(STEPS, 40, dtype=torch.float64), beta)
    weights = (1 - beta) * beta ** np.arange(STEPS - 1, -1, -1)
    return error, (weights @ withheld.numpy()).tolist()


FEEDBACK_CONTRACTS: dict[str, Four] = {
    "error_feedback": (_grad, _hand, _sum_of_steps, _average_by_numpy)
}
