"""A decay that comes last, in the numbers that bitsandbytes takes."""

from __future__ import annotations

import pytest
import torch

from lightning_ext import functional
from lightning_ext.optim._low_bit import _bitsandbytes_step as inside

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("step", [0.5, 7.0])
def test_a_decay_that_comes_last_is_folded_into_the_rate(step: float) -> None:
    w, m, v = (torch.rand(9, dtype=torch.float64) for _ in range(3))
    given = inside.Numbers((0.0, 0.0), 0.3, 1e-3, 0.9, 1.0)
    expected = functional.adamw_update(
        w, m, m, v, torch.tensor(step), lr=0.3, eps=1e-3, weight_decay=0.9, betas=(0.9, 0.99)
    )
    new_m, new_v = expected[1:]
    found = inside.folded("op", step, given._replace(betas=(0.9, 0.99)), decay_last=True)
    after = (w - found.lr * new_m / (new_v.sqrt() + found.eps)) * (
        1 - found.lr * found.weight_decay
    )
    torch.testing.assert_close(after, expected[0], rtol=1e-12, atol=0)


def test_a_decay_that_leaves_nothing_is_refused_where_it_comes_last() -> None:
    given = inside.Numbers((0.9, 0.99), 2.0, 1e-8, 0.5, 1.0)
    with pytest.raises(ValueError, match="must be < 1"):
        inside.folded("op", 1.0, given, decay_last=True)
