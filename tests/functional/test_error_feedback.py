"""What is kept of rounding, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import dequantize, error_feedback, quantize


def mean_of_steps(x: Tensor, beta: float | None, steps: int) -> Tensor:
    """Of what is read of the same number in every step, without feedback where β is ``None``."""
    error, read = torch.zeros_like(x), []
    for _ in range(steps):
        read.append(dequantize(quantize(x + error, "int4")))
        if beta is not None:
            error = error_feedback(error, x + error, read[-1], beta=beta)
    return torch.stack(read).mean(0)


@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_the_mean_of_steps_loses_one_error_together(beta: float) -> None:
    x, steps = torch.linspace(-1, 1, 257, dtype=torch.float64), 50
    step = (1 + 1 / 13) / 7  # of max|x + e|/7 with an error of half a step
    allowed = step / 2 / (steps * (1 - beta))
    assert (mean_of_steps(x, beta, steps) - x).abs().amax() <= allowed
    assert (mean_of_steps(x, None, steps) - x).abs().amax() > 0.9 / 14


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_the_error_of_what_is_not_finite_stays_as_it_was(bad: float) -> None:
    error, wanted = torch.tensor([1.0, 1.0]), torch.tensor([bad, 3.0])
    found = error_feedback(error, wanted, torch.tensor([torch.nan, 2.5]), beta=0.5)
    assert found.tolist() == [1.0, 0.75]


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_a_weight_outside_of_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"it is in \[0, 1\)"):
        error_feedback(*torch.zeros(3, 2), beta=beta)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be of one shape"):
        error_feedback(torch.zeros(2), torch.zeros(2), torch.zeros(1))
