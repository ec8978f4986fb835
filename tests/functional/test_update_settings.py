"""What updates of lists are given is looked at before anything changes, whoever does them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.functional import FactoredState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 4), (5, 2)]
BETAS = {"adamw": 2, "lion": 2, "lamb": 2, "adamp": 2, "came": 3, "came_vector": 3}
KINDS = [*BETAS, "sgd", "lars"]
FUSED = [False, True]

Change = Callable[[dict[str, Any], dict[str, Any]], None]

every_kind = pytest.mark.parametrize("kind", KINDS)
either_way = pytest.mark.parametrize("fused", FUSED)


def _lists(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def made() -> list[Tensor]:
        return [torch.rand(shape, device=DEVICE).to(dtype) for shape in SHAPES]

    lists: dict[str, Any] = {"params": made(), "grads": made()}
    if kind in ("sgd", "lars"):
        lists["momentum_buffers"] = made()
    else:
        lists["exp_avgs"] = made()
    if kind == "came":
        lengths = [[*shape, *shape] for shape in SHAPES]
        lists["states"] = [
            FactoredState(*(torch.rand(n, device=DEVICE) for n in each)) for each in lengths
        ]
    elif kind not in ("lion", "sgd", "lars"):
        lists["exp_avg_sqs"] = made()
    lists["steps"] = [torch.tensor(2.0, device=DEVICE) for _ in SHAPES]
    return lists


def _run(kind: str, lists: dict[str, Any], fused: bool | None = False, **settings: Any) -> None:
    given = {"lr": 0.1, "fused": fused} | ({"momentum": 0.9} if kind == "sgd" else {}) | settings
    getattr(kernels, f"{kind}_update_")(**lists, **given)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [z for y in x or () for z in _tensors(y)] if isinstance(x, (list, tuple)) else []


def _cloned(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def _refused(
    kind: str,
    fused: bool | None,
    error: type[Exception],
    words: str,
    change: Change | None = None,
    **settings: Any,
) -> None:
    lists = _lists(kind)
    if change is not None:
        change(lists, settings)
    tensors = _tensors([*lists.values()])
    kept = _cloned(tensors)
    with pytest.raises(error, match=words):
        _run(kind, lists, fused, **settings)
    assert all(torch.equal(x, y) for x, y in zip(tensors, kept, strict=True))


@every_kind
@either_way
@pytest.mark.parametrize(
    "wrong", [{"seed": -5}, {"seed": 2**64}, {"stream": -1}, {"stream": 2**32 - 7}], ids=str
)
def test_bits_that_there_are_none_of_are_refused(
    kind: str, fused: bool, wrong: dict[str, int]
) -> None:
    _refused(kind, fused, ValueError, next(iter(wrong)), **wrong)


@either_way
def test_the_last_streams_are_there(fused: bool) -> None:
    lists = _lists("sgd", torch.bfloat16)
    _run("sgd", lists, fused, rounding="stochastic", stream=2**32 - 8, seed=2**64 - 1)


def test_a_seed_is_a_whole_number() -> None:
    _refused("adamw", False, TypeError, "seed=0.5", seed=0.5)


@pytest.mark.parametrize("count", [-1.0, 2.0**32, torch.inf])
def test_random_bits_have_no_such_step(count: float) -> None:
    def change(lists: dict[str, Any], _: dict[str, Any]) -> None:
        lists["params"] = [x.bfloat16() for x in lists["params"]]
        lists["steps"][1].fill_(count)

    settings: dict[str, Any] = {"rounding": "stochastic"}
    _refused("adamw", False, ValueError, r"steps\[1\]=", change, **settings)


@every_kind
@either_way
def test_a_rate_is_one_number(kind: str, fused: bool) -> None:
    _refused(kind, fused, ValueError, r"lr of shape \(2,\)", lr=torch.ones(2, device=DEVICE))
    _refused(
        kind, fused, ValueError, "lr on meta and parameters on", lr=torch.ones((), device="meta")
    )
    _refused(kind, fused, TypeError, "lr of type str", lr="0.1")
    _refused(kind, fused, TypeError, "complex", lr=torch.tensor(1j))


@every_kind
@either_way
@pytest.mark.parametrize("name", ["clip", "grad_scale", "found_inf"])
def test_options_are_one_number(kind: str, fused: bool, name: str) -> None:
    _refused(kind, fused, ValueError, f"{name} of shape", **{name: torch.ones(2, device=DEVICE)})
    _refused(kind, fused, ValueError, f"{name} on meta", **{name: torch.ones((), device="meta")})
    _refused(kind, fused, TypeError, f"{name} of type list", **{name: [1.0]})


@every_kind
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [torch.tensor, lambda x: torch.tensor([x])], ids=["()", "(1,)"])
def test_numbers_and_tensors_of_one_entry_are_the_same(
    kind: str, fused: bool, dtype: torch.dtype, make: Callable[[float], Tensor]
) -> None:
    numbers = {"lr": 0.125, "clip": 0.5, "grad_scale": 4.0, "found_inf": False}
    lists = _lists(kind, dtype)
    found = []
    for settings in (numbers, {name: make(float(x)) for name, x in numbers.items()}):
        copied = {
            name: [
                x.clone() if isinstance(x, Tensor) else FactoredState(*_cloned(x)) for x in column
            ]
            for name, column in lists.items()
        }
        _run(kind, copied, fused, **settings)
        found.append(_tensors([*copied.values()]))
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0][0], lists["params"][0])


@every_kind
@either_way
def test_a_number_leaves_the_step_out(kind: str, fused: bool) -> None:
    lists = _lists(kind)
    kept = _cloned(lists["params"])
    _run(kind, lists, fused, found_inf=True)
    assert all(torch.equal(x, y) for x, y in zip(lists["params"], kept, strict=True))


@pytest.mark.parametrize("kind", BETAS)
@either_way
@pytest.mark.parametrize("extra", [-1, 1])
def test_there_are_as_many_betas_as_the_update_has(kind: str, fused: bool, extra: int) -> None:
    count = BETAS[kind]
    _refused(kind, fused, ValueError, f"give {count} numbers", betas=(0.9,) * (count + extra))
    _refused(kind, fused, TypeError, "give a tuple", betas=0.9)


@pytest.mark.parametrize("kind", BETAS)
def test_betas_are_looked_at_in_functional_too(kind: str) -> None:
    lists = _lists(kind)
    with pytest.raises(ValueError, match="each must lie in"):
        getattr(functional, f"{kind}_update_")(**lists, lr=0.1, betas=(1.0,) * BETAS[kind])


@pytest.mark.parametrize("kind", ["came", "came_vector"])
@either_way
def test_came_has_two_eps(kind: str, fused: bool) -> None:
    _refused(kind, fused, ValueError, "eps", eps=(1e-30,))


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
@either_way
def test_lars_keeps_its_momentum_in_range(momentum: float, fused: bool) -> None:
    _refused("lars", fused, ValueError, "momentum=", momentum=momentum)
    with pytest.raises(ValueError, match="momentum="):
        functional.lars_update(*torch.ones(3, 2), lr=0.1, momentum=momentum)


@every_kind
@either_way
def test_what_is_written_shares_no_memory(kind: str, fused: bool) -> None:
    for name in _lists(kind):
        if name in ("grads", "steps"):
            continue

        def change(lists: dict[str, Any], _: dict[str, Any], name: str = name) -> None:
            one = torch.ones(1, device=DEVICE)
            if name == "states":
                lists[name][1] = FactoredState(one.expand(5), *lists[name][1][1:])
            else:
                lists[name][1] = one.expand(5, 2)

        _refused(kind, fused, ValueError, rf"{name}\[\d\] of shape .* share memory", change)


@every_kind
def test_gradients_may_be_expanded(kind: str) -> None:
    lists = _lists(kind)
    lists["grads"][1] = torch.ones(1, device=DEVICE).expand(5, 2)
    kept = lists["params"][1].clone()
    _run(kind, lists)
    assert not torch.equal(lists["params"][1], kept)


@every_kind
@pytest.mark.parametrize("fused", [None, False, True])
def test_a_parameter_without_a_gradient_is_named(kind: str, fused: bool | None) -> None:
    def change(lists: dict[str, Any], _: dict[str, Any]) -> None:
        lists["grads"][1] = None

    _refused(kind, fused, TypeError, r"None for grads\[1\]; leave parameters", change)


@every_kind
@pytest.mark.parametrize("fused", [None, False, True])
def test_counts_are_tensors(kind: str, fused: bool | None) -> None:
    def change(lists: dict[str, Any], _: dict[str, Any]) -> None:
        lists["steps"] = [1.0, 1.0]

    _refused(kind, fused, TypeError, r"a float for steps\[0\]; give a float32", change)


@every_kind
@either_way
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_counts_are_in_float32(kind: str, fused: bool, dtype: torch.dtype) -> None:
    def change(lists: dict[str, Any], _: dict[str, Any]) -> None:
        lists["steps"][1] = lists["steps"][1].to(dtype)

    _refused(kind, fused, TypeError, r"steps\[1\] in torch|steps.*float16", change)


@every_kind
@pytest.mark.parametrize("fused", [None, False, True])
def test_lists_are_lists(kind: str, fused: bool | None) -> None:
    for name in _lists(kind):
        if name == "steps" or (kind == "sgd" and name == "momentum_buffers"):
            continue

        def change(lists: dict[str, Any], _: dict[str, Any], name: str = name) -> None:
            lists[name] = None

        _refused(kind, fused, TypeError, f"None for {name}; give a list", change)


def test_parameters_that_can_be_read_once_are_no_list() -> None:
    def change(lists: dict[str, Any], _: dict[str, Any]) -> None:
        lists["params"] = iter(lists["params"])

    _refused("adamw", None, TypeError, "list_iterator for params", change)


@every_kind
@pytest.mark.parametrize("format", [None, "bfloat16"])
def test_random_rounding_traces_as_one_graph(kind: str, format: str | None) -> None:
    lists = []
    for _ in range(2):
        torch.manual_seed(0)
        lists.append(_lists(kind, torch.bfloat16))
        for name in {"exp_avgs", "momentum_buffers"} & {*lists[-1]} if format else ():
            lists[-1][name] = [functional.encode_state(x, format) for x in lists[-1][name]]
    options = {"rounding": "stochastic", "seed": 5}
    torch._dynamo.reset()
    torch.compile(_run, fullgraph=True, backend="eager")(kind, lists[0], None, **options)
    _run(kind, lists[1], None, **options)
    found, expected = (_tensors([*each.values()]) for each in lists)
    torch.testing.assert_close(found, expected)
