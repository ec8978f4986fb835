"""States of the low-rank family: their formats, checkpoints, and weights in codes."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness.low_rank_steps import EVERY, LR, RANK, SHAPES, gradients, parameters, run
from torch import Tensor
from torch.nn import Parameter

from lightning_ext import optim
from lightning_ext.nn import Int8Weight
from lightning_ext.optim import APOLLO, Fira, GaLore, GradNormLoRP, QGaLore
from lightning_ext.optim._low_rank._states import layout_of, read_moments


def resumed(make: Callable[[list[Parameter]], Any], dtype: Any, at: int) -> bool:
    """Whether steps behind a checkpoint are those of the run without it."""
    params, grads = parameters(dtype=dtype), gradients(24, dtype=dtype)
    optimizer = make(params)
    run(optimizer, params, grads[:at])
    file = io.BytesIO()
    torch.save([[x.detach() for x in params], optimizer.state_dict()], file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others = [Parameter(x.clone()) for x in values]
    second = make(others)
    second.load_state_dict(state)
    kept = (x.state_dict()["state"].values() for x in (optimizer, second))
    same = all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k])
        for a, b in zip(*kept, strict=True)
        for k in a
    )
    found = run(optimizer, params, grads[at:]), run(second, others, grads[at:])
    return same and all(torch.equal(*pair) for pair in zip(*found, strict=True))


FORMATS = (None, "bfloat16", "int8", "int4", "fp8")
CASES = list(itertools.product(EVERY, (torch.float64, torch.bfloat16), FORMATS))
# Of each method, of each format and of each dtype one is enough; `slow` has the rest.
FAST = [(name, torch.float64, None) for name in EVERY]
FAST += [("QGaLore", torch.bfloat16, x) for x in FORMATS] + [("APOLLO", torch.float64, "int8")]


@pytest.mark.parametrize(
    ("name", "dtype", "state_dtype"),
    [pytest.param(*x, marks=[] if x in FAST else pytest.mark.slow) for x in CASES],
)
def test_a_run_goes_on_bitwise_in_the_middle_of_a_cycle(
    name: str, dtype: Any, state_dtype: Any
) -> None:
    def make(params: list[Parameter]) -> Any:
        how = {"state_dtype": state_dtype, "update_proj_gap": 2, "rank": RANK}
        return getattr(optim, name)(params, **how)

    assert resumed(make, dtype, 13)


def to_adamw(params: list[Parameter], **how: Any) -> QGaLore:
    """An optimizer that sends all to AdamW, in codes also where there are few entries."""
    return QGaLore([{"params": params, "algorithm": "adamw", "min_quantized_numel": 0}], **how)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_what_goes_to_adamw_goes_on_bitwise(state_dtype: Any) -> None:
    assert resumed(partial(to_adamw, state_dtype=state_dtype), torch.bfloat16, 3)


def test_moments_of_adamw_have_the_format_of_the_others() -> None:
    params = [Parameter(torch.ones(80, 64)), Parameter(torch.ones(64))]
    optimizer = QGaLore([{"params": params, "algorithm": "adamw"}])
    run(optimizer, params, [[torch.randn(x.shape) for x in params]])
    matrix, vector = (optimizer.state[x]["exp_avg"] for x in params)
    assert (matrix.format, matrix.codes.nbytes) == ("int8", 80 * 64)
    assert vector.dtype == torch.float32
    saved = optimizer.state_dict()["state"][0]
    assert {"exp_avg.int8", "exp_avg_sq.int8"} < set(saved)


def stepped(kind: Any, state_dtype: Any) -> Any:
    params = parameters(SHAPES[:1])
    optimizer = kind(params, rank=RANK, state_dtype=state_dtype)
    run(optimizer, params, gradients(3, SHAPES[:1]))
    return optimizer


@pytest.mark.parametrize("state_dtype", FORMATS)
def test_names_tell_formats(state_dtype: Any) -> None:
    names = set(stepped(QGaLore, state_dtype).state_dict()["state"][0])
    dtypes = {"int8", "int4", "fp8"} & {state_dtype}
    stems = {f"{name}.{x}" for name in ("exp_avg", "exp_avg_sq") for x in dtypes}
    expected = stems | {f"{x}_scales" for x in stems} or {"exp_avg", "exp_avg_sq"}
    assert {x for x in names if x.startswith("exp_avg")} == expected


def moments(optimizer: Any) -> list[Tensor]:
    (group,) = optimizer.param_groups
    layout = layout_of(group["params"][0], group)
    assert layout is not None
    return read_moments(optimizer.state[group["params"][0]], layout)


@pytest.mark.parametrize(
    ("before", "after"), [("int8", None), (None, "int8"), ("int4", "bfloat16"), ("int8", "fp8")]
)
def test_moments_are_loaded_in_the_optimizers_own_format(before: Any, after: Any) -> None:
    source, other = stepped(Fira, before), stepped(Fira, after)
    names = set(other.state_dict()["state"][0])
    other.load_state_dict(source.state_dict())
    assert other.param_groups[0]["state_dtype"] == after
    assert set(other.state_dict()["state"][0]) == names
    for x, y in zip(moments(source), moments(other), strict=True):
        assert x.norm() > 0
        assert (x - y).norm() <= 0.05 * x.norm()


@pytest.mark.parametrize(("before", "after"), [("int4", "float32"), ("float32", "int4")])
def test_subspaces_are_loaded_in_the_optimizers_own_format(before: Any, after: Any) -> None:
    made = []
    for projection_dtype in (before, after):
        params = parameters(SHAPES[:1])
        optimizer = GaLore(params, rank=RANK, projection_dtype=projection_dtype)
        run(optimizer, params, gradients(3, SHAPES[:1]))
        made.append(optimizer)
    names = [set(x.state_dict()["state"][0]) for x in made]
    made[1].load_state_dict(made[0].state_dict())
    assert names[0] != names[1] == set(made[1].state_dict()["state"][0])


@pytest.mark.parametrize(
    ("kind", "other"), [(GaLore, Fira), (GaLore, GradNormLoRP), (APOLLO, Fira), (Fira, APOLLO)]
)
def test_states_of_another_method_are_refused(kind: Any, other: Any) -> None:
    saved = stepped(other, None).state_dict()
    with pytest.raises(ValueError, match=f"{kind.__name__} got the state of {other.__name__}"):
        stepped(kind, None).load_state_dict(saved)


def test_states_of_adamw_are_refused() -> None:
    params = parameters()
    saved = torch.optim.AdamW(params).state_dict()
    with pytest.raises(ValueError, match="GaLore got the state of another optimizer"):
        GaLore(params).load_state_dict(saved)


def test_a_lazy_cycle_is_in_the_middle_there() -> None:
    params = parameters()
    optimizer = QGaLore(params, rank=RANK, update_proj_gap=2, cos_threshold=0.1)
    run(optimizer, params, gradients(13))
    assert any(x["gap"] > 2 and x["refresh_in"] > 0 for x in optimizer.state.values())


def test_states_have_the_bytes_of_their_formats() -> None:
    sizes = {}
    for state_dtype in (None, "int8"):
        param = Parameter(torch.randn(128, 64))
        optimizer = QGaLore([param], rank=16, state_dtype=state_dtype)
        run(optimizer, [param], [[torch.randn(128, 64)]])
        kept = optimizer.state[param]
        sizes[state_dtype] = sum(x.nbytes for name, x in kept.items() if name.startswith("exp_avg"))
        basis = sum(x.nbytes for name, x in kept.items() if name.startswith("projection"))
        assert basis == 16 * 64 // 2 + 16 * 4
    assert sizes == {None: 8 * 128 * 16, "int8": 2 * (128 * 16 + 4 * 8)}


class Codes(Parameter):
    """A weight in codes of eighths."""

    calls: list[tuple[int, int, int]]

    def dequantize(self, dtype: Any) -> Tensor:
        return self.data.to(dtype) / 8

    def requantize_(self, new: Tensor, *, seed: int, step: int, stream: int) -> None:
        self.calls.append((seed, step, stream))
        self.data.copy_((new * 8).round())


def test_weights_in_codes_are_written_by_their_own_rule() -> None:
    value = torch.randint(-50, 50, (9, 6)).double()
    coded, plain = Codes(value.clone()), Parameter(value / 8)
    coded.calls = []
    grads = gradients(3, SHAPES[:1])
    for param in (coded, plain):
        optimizer = QGaLore([param], rank=RANK, state_dtype=None, seed=5)
        run(optimizer, [param], grads[:1])
    assert torch.equal(coded.detach(), (plain.detach() * 8).round())
    run(QGaLore([coded], rank=RANK, seed=5), [coded], grads)
    assert coded.calls == [(5, 0, 3), (5, 0, 3), (5, 1, 3), (5, 2, 3)]


def in_codes(dtype: Any = torch.float64) -> Parameter:
    return Parameter(Int8Weight.of(parameters(SHAPES[:1], dtype)[0].detach(), block_size=16))


def test_adamw_writes_weights_in_codes() -> None:
    coded, grads = in_codes(), gradients(2, SHAPES[:1])
    plain, expected = Parameter(coded.dequantize()), copy.deepcopy(coded)
    optimizer = to_adamw([coded], lr=LR, seed=5, state_dtype=None)
    for step in range(2):
        with torch.no_grad():
            plain.copy_(expected.dequantize())
        if step == 0:
            adamw = torch.optim.AdamW([plain], LR, weight_decay=0.0)
        run(adamw, [plain], grads[step : step + 1])
        expected.requantize_(plain, seed=5, step=step, stream=3)
        run(optimizer, [coded], grads[step : step + 1])
        assert torch.equal(coded.codes, expected.codes)


@pytest.mark.parametrize("make", [to_adamw, partial(GaLore, rank=RANK)])
def test_codes_seen_in_bfloat16_stay_where_nothing_moves(make: Any) -> None:
    coded = in_codes(torch.bfloat16)
    before = coded.codes.clone()
    optimizer = make([coded], lr=0.0)
    for grads in gradients(30, SHAPES[:1], torch.bfloat16):
        run(optimizer, [coded], [grads])
    assert torch.equal(coded.codes, before)


def test_weights_in_codes_of_adamw_go_on_bitwise() -> None:
    grads, runs = gradients(6, SHAPES[:1]), []
    coded = in_codes()
    optimizer = to_adamw([coded], lr=LR)
    run(optimizer, [coded], grads[:3])
    other = copy.deepcopy(coded)
    second = to_adamw([other], lr=LR)
    second.load_state_dict(optimizer.state_dict())
    for made, param in ((optimizer, coded), (second, other)):
        run(made, [param], grads[3:])
        runs.append(param.codes)
    assert torch.equal(*runs)
