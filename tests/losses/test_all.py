"""The contract of the room: the naive formula; chunked = whole; gradients under accumulation."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import assert_accurate
from harness.functional_parts import contrastive_tiles
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ext import losses


def _clip(loss: Any, x: Tensor, y: Tensor) -> Tensor:
    z, own = loss.scale * (x @ y.T), torch.arange(len(x))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def _info_nce(loss: Any, q: Tensor, k: Tensor) -> Tensor:
    return F.cross_entropy(q @ k.T / loss.temperature, torch.arange(len(q)))


def _nt_xent(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    views = torch.cat([a, b])
    z = (views @ views.T / loss.temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(z, torch.arange(len(views)).roll(len(a)))


def _siglip(loss: Any, x: Tensor, y: Tensor) -> Tensor:
    z = loss.scale * (x @ y.T) + loss.bias
    return -F.logsigmoid(z * (2 * torch.eye(len(z)).to(z) - 1)).sum(1).mean()


@dataclass(frozen=True)
class Contract:
    """The dense formula of rows of length 1, settings of its own, and names of its state."""

    naive: Callable[[Any, Tensor, Tensor], Tensor]
    settings: dict[str, Any]
    state: tuple[str, ...] = ()


CONTRACTS = {
    "CLIPLoss": Contract(_clip, {"temperature": 0.2}, ("log_scale",)),
    "InfoNCELoss": Contract(_info_nce, {"temperature": 0.2}),
    "NTXentLoss": Contract(_nt_xent, {"temperature": 0.2}),
    "SigLIPLoss": Contract(_siglip, {"scale": 5.0, "bias": -3.0}, ("log_scale", "bias")),
}
every_name = pytest.mark.parametrize("name", losses.__all__)


def _made(name: str, **settings: Any) -> Any:
    return getattr(losses, name)(**CONTRACTS[name].settings | settings).double()


def _features(rows: int = 13, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 6, dtype=torch.float64)
    y = x + torch.randn(rows, 6, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def _naive(name: str, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return CONTRACTS[name].naive(loss, F.normalize(x), F.normalize(y))


def _value_and_grads(loss: nn.Module, call: Any, *features: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in features]
    value = call(*leaves)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *loss.parameters()])]


def test_every_public_name_has_a_contract() -> None:
    assert sorted(losses.__all__) == sorted(CONTRACTS)


@every_name
def test_it_is_the_naive_formula(name: str) -> None:
    loss, features = _made(name), _features()
    got = _value_and_grads(loss, loss, *features)
    expected = _value_and_grads(loss, lambda *x: _naive(name, loss, *x), *features)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_name
def test_rows_may_be_taken_as_they_are(name: str) -> None:
    loss, features = _made(name, normalize=False), _features()
    got = _value_and_grads(loss, loss, *features)
    expected = _value_and_grads(loss, lambda *x: CONTRACTS[name].naive(loss, *x), *features)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_name
def test_chunked_is_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, features = _made(name), _features()
    whole = _value_and_grads(loss, loss, *features)
    monkeypatch.setattr(contrastive_tiles, "CPU_TILE", 4)
    torch.testing.assert_close(
        _value_and_grads(loss, loss, *features), whole, rtol=1e-12, atol=1e-12
    )


@every_name
def test_accumulation_is_the_mean_of_losses_within_micro_batches(name: str) -> None:
    loss, (x, y) = _made(name), _features(12)
    x, y = x.requires_grad_(), y.requires_grad_()
    for i in range(0, 12, 4):
        (loss(x[i : i + 4], y[i : i + 4]) / 3).backward()
    parts = [_naive(name, loss, x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]
    expected = torch.autograd.grad(torch.stack(parts).mean(), [x, y])
    torch.testing.assert_close([x.grad, y.grad], list(expected), rtol=1e-12, atol=1e-12)


@every_name
def test_accumulation_adds_no_negatives_and_a_larger_micro_batch_does(name: str) -> None:
    loss, (x, y) = _made(name), _features(12)
    accumulated = torch.stack([loss(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]).mean()
    assert loss(x, y) > accumulated + 0.1


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_torchs(name: str, dtype: torch.dtype) -> None:
    loss, features = _made(name), _features(40, dtype)
    exact = [x.double() for x in features]
    truth = _value_and_grads(loss, lambda *x: _naive(name, loss, *x), *exact)
    loss = loss.float()
    got = _value_and_grads(loss, loss, *features)
    naive = _value_and_grads(loss, lambda *x: _naive(name, loss, *x), *features)
    assert got[0].dtype == torch.float32
    assert [x.dtype for x in got[1:3]] == [dtype] * 2
    for out, exactly, own in zip(got, truth, naive, strict=True):
        # What is summed in float32 of rows in bfloat16 is compared as the latter.
        assert_accurate(out.to(dtype), exactly, torch_out=own.to(dtype))


@every_name
def test_the_kernel_is_the_same(name: str) -> None:
    features = _features(5, torch.float32)
    found = [
        _value_and_grads(loss, loss, *features)
        for loss in (_made(name, fused=fused).float() for fused in (True, False))
    ]
    for out, own in zip(*found, strict=True):
        assert_accurate(out, own.double())


@every_name
def test_a_state_dict_makes_the_same_loss(name: str) -> None:
    loss, features = _made(name), _features()
    assert tuple(loss.state_dict()) == CONTRACTS[name].state
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(0.5)
    other = _made(name)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(*features), loss(*features))


@every_name
def test_it_can_be_copied_and_pickled(name: str) -> None:
    loss, features = _made(name), _features()
    for other in (deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(*features), loss(*features))


@every_name
@pytest.mark.parametrize("rows", [1, 2])
def test_a_small_batch_is_right(name: str, rows: int) -> None:
    loss, features = _made(name), _features(rows)
    torch.testing.assert_close(loss(*features), _naive(name, loss, *features))


X = torch.randn(4, 3)


@every_name
@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (X, X[:3], ValueError, "one shape"),
        (X, X[:, :2], ValueError, "one shape"),
        (X[0], X[0], ValueError, "two matrices"),
        (X[None], X[None], ValueError, "two matrices"),
        (X, X.double(), TypeError, "one floating-point dtype"),
        (X.long(), X.long(), TypeError, "one floating-point dtype"),
    ],
)
def test_features_that_are_no_pairs_are_refused(
    name: str, x: Tensor, y: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _made(name)(x, y)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("CLIPLoss", {"temperature": 0.0}, "temperature=0.0"),
        ("CLIPLoss", {"temperature": math.nan}, "temperature=nan"),
        ("CLIPLoss", {"max_scale": -1.0}, "max_scale=-1.0"),
        ("CLIPLoss", {"temperature": 0.005}, "above max_scale=100.0"),
        ("InfoNCELoss", {"temperature": -0.1}, "temperature=-0.1"),
        ("NTXentLoss", {"temperature": math.inf}, "temperature=inf"),
        ("SigLIPLoss", {"scale": 0.0}, "scale=0.0"),
        ("SigLIPLoss", {"bias": math.inf}, "bias=inf"),
    ],
)
def test_settings_out_of_range_are_refused(
    name: str, settings: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(losses, name)(**settings)
