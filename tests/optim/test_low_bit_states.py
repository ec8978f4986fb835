"""Every class with ``state_dtype`` in every format."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness.low_bit_cases import CLASSES, FORMATS, LARGE, Steps, same
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

from lightning_ext import functional, optim
from lightning_ext.functional import QuantizedState, decode_state, state_bytes

LOW = FORMATS[1:]
# Besides int8, which every class has: the other formats of these are not slow.
FEW = {"LowBitAdamW": FORMATS, "NorMuon": ("int8", "int4"), "LAMB": ("int8", "int4")}
every_class = pytest.mark.parametrize("name", CLASSES)


def pairs(formats: Sequence[str], short: dict[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    """All classes in these formats, of which those that are not in the short list are slow."""
    return pytest.mark.parametrize(
        ("name", "format"),
        [
            pytest.param(name, x, marks=[pytest.mark.slow] * (x not in short.get(name, ())))
            for name in CLASSES
            for x in formats
        ],
    )


SHORT = {name: FEW.get(name, ("int8",)) for name in CLASSES}
every_class_and_format = pairs(FORMATS, SHORT)
every_class_in_few_bits = pairs(LOW, SHORT)
a_few = pairs(FORMATS, FEW)
a_few_in_few_bits = pairs(LOW, FEW)
# Steps by signs, or of orthogonal matrices, do not follow a small difference of moments.
ROUGH = {"Lion", "NorMuon"}
LOW_RANK = {"APOLLO", "APOLLOMini", "Fira", "GaLore", "GradNormLoRP", "QGaLore"}


def moments_of(run: Steps) -> list[Any]:
    places = range(len(run.params) - 1)
    return [x for place in places for x in run.moments(place).values()]


def exactly(a: Any, b: Any) -> bool:
    if isinstance(a, QuantizedState):
        return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    return torch.equal(a, b) and a.dtype == b.dtype


@every_class_in_few_bits
def test_large_matrices_have_moments_in_the_format_and_all_else_in_float32(
    name: str, format: str
) -> None:
    run = Steps(name, state_dtype=format).run(2)
    for place in range(4):
        found = run.moments(place)
        found.pop("accumulated_grad", None)  # a sum, which is not rounded at every step
        assert found
        for x in found.values():
            if place in LARGE:
                assert isinstance(x, QuantizedState)
                assert x.format == format
            else:
                assert isinstance(x, Tensor)
                assert x.dtype == torch.float32


@every_class_and_format
def test_a_resumed_run_is_the_uninterrupted_one(name: str, format: str) -> None:
    first = Steps(name, state_dtype=format).run(5)
    second = Steps(name, state_dtype=format).resume(first)
    assert all(map(exactly, moments_of(first), moments_of(second)))
    assert same(first.run(4), second.run(4))


@a_few
def test_copies_go_on_alike(name: str, format: str) -> None:
    first = Steps(name, state_dtype=format).run(2)
    copied, unpickled = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    first.run(2)
    assert same(first, copied.run(2))
    assert same(first, unpickled.run(2))


@a_few
def test_states_that_are_saved_are_tensors_alone_of_the_rows_of_parameters(
    name: str, format: str
) -> None:
    run = Steps(name, state_dtype=format).run(1)
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    for place, state in run.saved()["state"].items():
        rows = len(params[place])
        for key, x in state.items():
            assert isinstance(x, Tensor)
            numbers = x.dim() == 0
            assert numbers or key.endswith("_column_scales") or len(x) == rows, key


@every_class_and_format
def test_a_checkpoint_of_another_format_is_converted(name: str, format: str) -> None:
    for other in FORMATS:
        first = Steps(name, state_dtype=other).run(3)
        second = Steps(name, state_dtype=format).resume(first)
        assert {g["state_dtype"] for g in second.optimizer.param_groups} == {format}
        for old, new in zip(moments_of(first), moments_of(second), strict=True):
            if isinstance(old, QuantizedState):
                assert new.format == format if format != "float32" else isinstance(new, Tensor)
                old = decode_state(old)
            numbers = decode_state(new) if isinstance(new, QuantizedState) else new
            assert error_is_half_a_step(new, old, numbers)
        assert second.run(2).weights().isfinite().all()


def error_is_half_a_step(new: Any, old: Tensor, numbers: Tensor) -> bool:
    """The largest error beside the largest entry that shares a scale: half of the widest step."""
    format = new.format if isinstance(new, QuantizedState) else "float32"
    if format == "float32":
        return torch.equal(numbers, old)
    if format == "bfloat16":
        return torch.equal(numbers, old.bfloat16().float())
    bound = {"int8": 0.45 / 64, "int4": 0.1125, "fp8": 1 / 16}[format]
    return bool((numbers - old).abs().max() <= bound * (1 + 1e-5) * old.abs().max())


@every_class
def test_none_is_bit_for_bit_what_the_formula_of_one_parameter_does(name: str) -> None:
    run, truth = (Steps(name, state_dtype=None, foreach=False) for _ in range(2))
    run.run(1)  # which makes states
    truth.resume(run)
    for _ in range(3):
        run.run(1)
        truth.give()
        step_by_formula(name, truth)
        truth.taken += 1
    assert same(run, truth)


def step_by_formula(name: str, run: Steps) -> None:
    """The step as `functional` has it, with whatever settings of a group it takes."""
    for group in run.optimizer.param_groups:
        formula = formula_of(name, group)
        known = inspect.signature(formula).parameters
        settings = {k: v for k, v in group.items() if k in known}
        if name == "MTAdamW":
            grads = [p.grad for p in run.params if p.grad is not None]
            settings["sq_norm"] = functional.total_sq_norm(grads, foreach=True)
        if name == "NorMuon" and group["algorithm"] == "muon":
            settings["rows"] = len(group["params"][0])
        for param in group["params"]:
            if param.grad is None:
                continue
            state = run.optimizer.state[param]
            state["step"] += 1
            kept = {k: state[k] for k in known if k in state}
            old = [param.detach(), *(x for k, x in kept.items() if k != "step")]
            new = formula(param.detach(), param.grad, **kept, **settings)
            for x, y in zip(old, new, strict=True):
                x.copy_(y)


def formula_of(name: str, group: dict[str, Any]) -> Any:
    if name == "NorMuon" and group["algorithm"] == "muon":
        return functional.normuon_update
    names = {"LowBitAdamW": "adamw", "NorMuon": "adamw", "MTAdamW": "mt_adamw"}
    names["AccumAdam"] = "accum_adam"
    return getattr(functional, f"{names.get(name, name.lower())}_update")


@every_class
def test_float32_of_float32_parameters_is_none(name: str) -> None:
    assert same(*(Steps(name, state_dtype=x).run(4) for x in (None, "float32")))


@pairs(["int8", "int4", "fp8"], SHORT)
def test_one_by_one_is_all_at_once(name: str, format: str) -> None:
    whole = Steps(name, state_dtype=format).run(1)
    single = Steps(name, state_dtype=format, foreach=False).run(1)
    torch.testing.assert_close(single.weights(), whole.weights(), rtol=1e-5, atol=1e-6)
    for a, b in zip(moments_of(single), moments_of(whole), strict=True):
        if isinstance(a, QuantizedState):
            assert (a.codes != b.codes).double().mean() <= 1e-3


@every_class
def test_weights_of_16_bits_may_have_moments_of_32(name: str) -> None:
    run = Steps(name, torch.bfloat16, state_dtype="float32").run(2)
    assert {x.dtype for x in moments_of(run)} - {torch.float32} <= {torch.bfloat16}
    other = Steps(name, torch.bfloat16, state_dtype="float32").resume(run)
    for place in range(4):
        for key, x in other.moments(place).items():
            assert x.dtype == (torch.bfloat16 if key == "accumulated_grad" else torch.float32)
    assert same(run.run(3), other.run(3))


@a_few_in_few_bits
def test_weights_of_16_and_64_bits_resume_bit_for_bit(name: str, format: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        first = Steps(name, dtype, state_dtype=format).run(2)
        second = Steps(name, dtype, state_dtype=format).resume(first)
        assert same(first.run(2), second.run(2))


@a_few_in_few_bits
def test_a_step_along_a_rate_of_0_moves_no_weight(name: str, format: str) -> None:
    run = Steps(name, state_dtype=format)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = run.weights()
    assert torch.equal(run.run(2).weights(), before)
    assert moments_of(run)


@a_few_in_few_bits
def test_a_rate_may_be_a_tensor(name: str, format: str) -> None:
    plain, run = (Steps(name, state_dtype=format) for _ in range(2))
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    found, wanted = run.run(1).weights(), plain.run(1).weights()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@every_class
def test_a_schedule_sets_the_rate_of_a_step(name: str) -> None:
    run, fixed = (Steps(name, state_dtype="int8") for _ in range(2))
    schedule = StepLR(run.optimizer, 1, gamma=0.5)
    run.run(1)
    schedule.step()
    fixed.run(1)
    for group in fixed.optimizer.param_groups:
        group["lr"] *= 0.5
    assert same(run.run(1), fixed.run(1))


@every_class
def test_a_closure_comes_first(name: str) -> None:
    run, plain = (Steps(name, state_dtype="int8") for _ in range(2))

    def closure() -> float:
        run.give()
        return 7.0

    assert run.optimizer.step(closure) == 7.0
    assert same(run, plain.run(1))


@every_class
def test_a_name_that_no_format_has_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"state_dtype='int2'.*'int8', 'int4', 'fp8'"):
        Steps(name, state_dtype="int2")


@every_class
def test_int8_follows_float32(name: str) -> None:
    start = Steps(name).weights()
    truth = Steps(name, state_dtype="float32").run(4).weights()
    found = Steps(name, state_dtype="int8").run(4).weights()
    apart = (found - truth).norm() / (truth - start).norm()
    assert 0 < apart < (0.3 if name in ROUGH else 0.05)


@a_few_in_few_bits
def test_a_state_takes_the_bytes_of_its_format(name: str, format: str) -> None:
    run = Steps(name, state_dtype=format).run(1)
    most = {"bfloat16": 2.0, "int8": 1.02, "int4": 0.63, "fp8": 1.07}[format]
    for place in LARGE:
        count = run.params[place].numel()
        coded = [x for x in run.moments(place).values() if isinstance(x, QuantizedState)]
        assert coded
        assert all(state_bytes(x) / count <= most for x in coded)


def test_classes_with_the_setting_are_in_the_list() -> None:
    members = {name: getattr(optim, name) for name in optim.__all__}
    takes = {k for k, v in members.items() if inspect.isclass(v) and _has_setting(v)}
    elsewhere = {"CAME", *LOW_RANK}  # beside their own tests
    assert takes - elsewhere == set(CLASSES)


def _has_setting(kind: type) -> bool:
    return "state_dtype" in inspect.signature(kind).parameters
