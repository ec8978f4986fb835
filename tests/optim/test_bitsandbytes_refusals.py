"""What the back-end of bitsandbytes does not take."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lightning_ext.functional import zero_state
from lightning_ext.optim._low_bit import _bitsandbytes as backend

pytest.importorskip("bitsandbytes")

SHAPE = (100, 700)


GIVEN = {"optimizer": "Lion", "backend": "bitsandbytes", "state_dtype": "int8"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": "LAMB"}, "no trust ratio"),
        ({"optimizer": "LARS"}, "no trust ratio"),
        ({"optimizer": "AdamP"}, "there for LowBitAdamW and Lion"),
        ({"state_dtype": "int4"}, "'int8' alone"),
        ({"state_dtype": None}, "'int8' alone"),
        ({"backend": "bnb"}, "None or 'bitsandbytes'"),
        ({"backend": None, "paged": True}, "only backend='bitsandbytes' has pages"),
        ({"weight_rounding": "stochastic"}, "'nearest' alone"),
    ],
)
def test_what_it_does_not_have_is_refused(changes: dict[str, Any], match: str) -> None:
    backend.require_bitsandbytes(**GIVEN)
    with pytest.raises(ValueError, match=match):
        backend.require_bitsandbytes(**GIVEN | changes)


@pytest.mark.parametrize("optimizer", ["AdamP", "LAMB", "Lion"])
def test_without_a_back_end_nothing_is_asked_for(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    backend.require_bitsandbytes(optimizer, None, "int4", weight_rounding="stochastic")


def test_pages_need_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="pages need CUDA"):
        backend.require_bitsandbytes("Lion", "bitsandbytes", "int8", paged=True)
    with pytest.raises(ValueError, match="cannot be paged"):
        backend.page_state(zero_state(SHAPE, "int8"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_ext\[bnb\]"):
        backend.require_bitsandbytes("Lion", "bitsandbytes", "int8")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"exp_avgs": [zero_state(SHAPE, "int4")]}, ValueError, "moments in int4 and int8"),
        ({"exp_avgs": [torch.zeros(SHAPE)]}, ValueError, "moments in int8 and tensor"),
        ({"exp_avgs": [zero_state(SHAPE, "int8", signed=False)]}, ValueError, "m has a sign"),
        ({"exp_avgs": [zero_state((7,), "int8")]}, ValueError, "shapes must be equal"),
        ({"grads": [torch.zeros(7)]}, ValueError, "shapes"),
        ({"grads": []}, ValueError, "0 grads"),
        ({"params": [torch.zeros(SHAPE, dtype=torch.float64)]}, TypeError, "torch.float64"),
        ({"steps": [torch.tensor(0.0)]}, ValueError, "a count of 0.0 steps"),
        ({"decoupled_weight_decay": False}, ValueError, "decoupled weight decay only"),
        ({"rounding": "stochastic"}, ValueError, "to nearest alone"),
        ({"weight_errors": []}, ValueError, "to nearest alone"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    lists: dict[str, Any] = {
        "params": [torch.zeros(SHAPE)],
        "grads": [torch.zeros(SHAPE)],
        "exp_avgs": [zero_state(SHAPE, "int8")],
        "exp_avg_sqs": [zero_state(SHAPE, "int8", signed=False)],
        "steps": [torch.tensor(1.0)],
    }
    with pytest.raises(error, match=match):
        backend.adamw_update_(**lists | changes, lr=0.1)
