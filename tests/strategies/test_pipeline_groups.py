"""Values that ranks of a pipeline have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ext.strategies._pipeline._groups import reduced

VALUES = torch.tensor([1.0, 3.0, 10.0, 20.0])  # of two pipelines of two ranks


def over(value: Any, group: Any, reduce_op: Any) -> Any:
    """What Lightning's reduction would give over four ranks."""
    if not isinstance(value, Tensor):
        return value
    return VALUES.sum() if reduce_op == "sum" else VALUES.mean()


@pytest.mark.parametrize(("reduce_op", "expected"), [("mean", 8.5), ("sum", 17.0)])
def test_ranks_of_a_pipeline_count_as_one(reduce_op: str, expected: float) -> None:
    assert float(reduced(over, 2, VALUES[0], None, reduce_op)) == expected


def test_a_group_of_the_users_own_is_reduced_as_it_is() -> None:
    assert float(reduced(over, 2, VALUES[0], object(), "sum")) == 34.0


def test_what_is_no_tensor_stays() -> None:
    assert reduced(over, 2, "text", None, "sum") == "text"
