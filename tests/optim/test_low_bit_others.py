"""The state of an optimizer that keeps something else is refused in words, and nothing changes."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from lightning_ext.optim import LAMB, GaLore, Lion, LowBitAdamW


def stepped(kind: Any, **how: Any) -> Optimizer:
    params = [Parameter(torch.ones(128, 64)), Parameter(torch.ones(128, 64))]
    optimizer: Optimizer = kind(params, **how)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("writer", "lacks"),
    [
        (stepped(GaLore, rank=8), r"exp_avg\[128, 8\]"),
        (stepped(Lion), r"has exp_avg\[128, 64\], step\[\]"),
        (stepped(SGD, lr=0.1, momentum=0.9), r"has momentum_buffer\[128, 64\]"),
    ],
    ids=["another shape", "no second moment", "no moment"],
)
@pytest.mark.parametrize("reader", [LowBitAdamW, LAMB])
def test_the_state_of_another_optimizer_is_refused(
    reader: Any, writer: Optimizer, lacks: str
) -> None:
    optimizer = stepped(reader)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=lacks):
        optimizer.load_state_dict(writer.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()


def test_that_of_torchs_adamw_is_taken() -> None:
    optimizer = stepped(LowBitAdamW)
    optimizer.load_state_dict(stepped(AdamW).state_dict())
    assert all(state["exp_avg"].format == "int8" for state in optimizer.state.values() if state)
