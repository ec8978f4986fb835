"""The contract of the room: exact against float64, in its tensors only, nothing where not asked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from harness import Cast, KernelCase, launches, variants
from harness.kernel_cases import CASES

from lightning_ext import functional, kernels

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "lightning_ext" / "kernels" / "_triton").rglob("*.py"))
KERNELS = {
    node.name
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("case", "dtype", "layout"), variants(CASES), ids=_name)
def test_a_kernel_is_exact(case: KernelCase, dtype: torch.dtype, layout: str) -> None:
    case.check(dtype, layout, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype", "layout"), variants(CASES), ids=_name)
def test_a_compiled_kernel_is_exact(case: KernelCase, dtype: torch.dtype, layout: str) -> None:
    case.check(dtype, layout, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_left_to_choose_nothing_is_launched_on_a_cpu(case: KernelCase) -> None:
    with launches() as found:
        case.launch(case.dtypes[0], torch.device("cpu"), fused=None)
    assert found == []


# Dynamo, of every autograd.Function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", kernels.__all__)
def test_an_operation_is_one_graph(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.op == op and not case.name.startswith("empty"))
    dtype, cpu = case.dtypes[0], torch.device("cpu")
    expected = case.outputs(Cast(dtype, cpu), None)
    torch.compiler.reset()  # of other operations that share a part
    compiled = torch.compile(getattr(kernels, op), fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(kernels, op, compiled)
    found = case.outputs(Cast(dtype, cpu), None)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_kernel_is_launched_by_a_case() -> None:
    with launches(run=False) as found:
        for case in CASES:
            for dtype in case.dtypes:
                case.launch(dtype, DEVICE)
    assert set(found) == KERNELS


def test_every_operation_has_cases() -> None:
    assert {case.op for case in CASES} == set(kernels.__all__)


@pytest.mark.parametrize("op", kernels.__all__)
def test_every_operation_is_one_of_functional(op: str) -> None:
    assert op in functional.__all__
