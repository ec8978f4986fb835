"""What is not defined for weights of 8 bits, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.int8_parts import int8_layer, int8_weight


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimizers_are_refused(kind: Any, options: dict[str, bool]) -> None:
    layer = int8_layer()
    layer(torch.randn(2, 300)).sum().backward()
    before = layer.weight.codes.clone()
    with pytest.raises(TypeError, match=r"is not defined for an Int8Weight.*QGaLore.*undo_int8"):
        kind(layer.parameters(), lr=0.1, **options).step()
    assert torch.equal(layer.weight.codes, before)


@pytest.mark.parametrize("name", ["t", "norm", "exp", "chunk"])
def test_other_operations_name_themselves(name: str) -> None:
    arguments = (2,) if name == "chunk" else ()
    with pytest.raises(TypeError, match=r"^\w+ is not defined for an Int8Weight"):
        getattr(int8_weight().detach(), name)(*arguments)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w - 1,
        lambda w: torch.ones(6, 300) - w,
        lambda w: 2 * w,
        lambda w: torch.ones(2, 300) @ w,
        lambda w: w @ torch.ones(300, 2),
    ],
)
def test_operators_are_refused_in_the_same_words(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^__\w+__ is not defined for an Int8Weight"):
        use(int8_weight())
