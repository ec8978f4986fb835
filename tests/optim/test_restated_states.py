"""Second moments of few bits, and of subspaces, follow another batch as plain ones do."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_ext.optim import BatchScaling, GaLore, GradNormLoRP, LowBitAdamW, QGaLore

FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")
EVERY = [
    *((LowBitAdamW, {"state_dtype": x, "min_quantized_numel": 0}) for x in FORMATS),
    *((GaLore, {"state_dtype": x, "rank": 8}) for x in FORMATS),
    (QGaLore, {"rank": 8}),
]


def trained(kind: Any, how: dict[str, Any]) -> tuple[Parameter, torch.optim.Optimizer]:
    weight = Parameter(torch.ones(64, 48))
    optimizer: torch.optim.Optimizer = kind([weight], lr=1e-3, weight_decay=0.0, **how)
    mean, draw = torch.arange(48.0).sin() + 2, torch.Generator().manual_seed(0)
    for _ in range(20):
        weight.grad = mean + 0.1 * torch.randn(64, 48, generator=draw)
        optimizer.step()
    return weight, optimizer


def length(weight: Parameter, optimizer: torch.optim.Optimizer) -> float:
    """Of a step without a gradient, by the moments alone."""
    before, weight.grad = weight.detach().clone(), torch.zeros_like(weight)
    optimizer.step()
    return float((weight.detach() - before).norm())


@pytest.mark.parametrize(("kind", "how"), EVERY)
def test_a_quarter_of_the_second_moment_makes_steps_twice_as_long(
    kind: Any, how: dict[str, Any]
) -> None:
    plain = length(*trained(kind, how))
    weight, optimizer = trained(kind, how)
    scaling = BatchScaling(optimizer, "sde", scale_second_moment=True, scale_weight_decay=False)
    scaling.set_kappa(4.0)
    scaling.detach()
    for state in optimizer.state.values():
        state["step"].fill_(20.0)  # the bias correction of the plain one
    assert length(weight, optimizer) / plain == pytest.approx(2.0, rel=2e-3)


def test_second_moments_of_lengths_follow() -> None:
    weight, optimizer = trained(GradNormLoRP, {"rank": 8})
    before = optimizer.state[weight]["length_avg_sq"].clone()
    BatchScaling(optimizer, "sde", scale_second_moment=True).set_kappa(4.0)
    torch.testing.assert_close(optimizer.state[weight]["length_avg_sq"], before / 4)
