"""Settings that ranks compare by what they say of themselves."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_ext._lightning._agreement import _text


@pytest.mark.parametrize("kind", [set, frozenset])
def test_equal_sets_say_the_same_in_whatever_order_they_are(kind: Any) -> None:
    one, other = kind([0, 8]), kind([8, 0])  # that collide, as addresses may
    assert list(one) != list(other)
    assert _text(one) == _text(other)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_sets_of_other_items_differ(kind: Any) -> None:
    assert _text(kind([nn.Linear])) != _text(kind([nn.Conv2d]))
    assert _text(kind([1, 2])) != _text(kind([1]))
