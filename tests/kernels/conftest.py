"""Tensors of more entries than 32 bits can count, at the cost of a few pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ext.kernels._triton._interpret import INTERPRETED


@pytest.fixture
def lazy_memory() -> Iterator[None]:
    """Fresh memory is not touched, so that large tensors cost nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each launch the interpreter runs the last program alone; a GPU runs all of them.

    What the others would have left for the next launch is 0.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    run = InterpretedFunction.run

    def run_last(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
        whole = (*grid, 1, 1)[:3]
        last = tuple(n - 1 for n in whole)
        place = interpreter_builder.__class__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, "set_grid_dim", lambda b, *_: setattr(b, "grid_dim", whole))
            patch.setattr(place, "set_grid_idx", lambda b, *_: setattr(b, "grid_idx", last))
            return run(self, *args, grid=(1,), **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run_last)
    monkeypatch.setattr(torch.Tensor, "new_empty", _new_zeros)


def _new_zeros(like: Tensor, *size: Any, **options: Any) -> Tensor:
    x = torch.empty(*size, **({"dtype": like.dtype, "device": like.device} | options))
    return x.zero_() if x.numel() < 2**28 else x
