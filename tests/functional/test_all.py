"""The contract of the room: gradcheck, a hand-worked value, an invariance, a second opinion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import (
    coordinate_quantiles,
    coordinate_sums,
    coordinate_variance,
    inner_products,
    part_sq_norms,
    per_sample_gradients,
    saved_bytes,
    sq_norms,
)

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
GROUPS = [1, 0, 1, 3]


def _tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def _parts(count: int = 3) -> list[list[Tensor]]:
    return [_tensors() for _ in range(count)]


def _grad_sq_norms() -> bool:
    inputs = tuple(x.requires_grad_() for x in [*_tensors(), torch.zeros(2, dtype=torch.float64)])
    whole = torch.autograd.gradcheck(lambda *x: sq_norms(x), inputs)
    return whole and torch.autograd.gradcheck(lambda *x: sq_norms(x, [*GROUPS, 2]), inputs)


def _grad_part_sq_norms() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(2) for x in part)
    return torch.autograd.gradcheck(
        lambda *x: part_sq_norms([x[: len(SHAPES)], x[len(SHAPES) :]], GROUPS), inputs
    )


def _hand_sq_norms() -> tuple[Tensor, list[float]]:
    return sq_norms([torch.tensor([3.0, 4.0]), None, torch.tensor(-2.0)], [0, 2, 3]), [25, 0, 0, 4]


def _hand_part_sq_norms() -> tuple[Tensor, list[float]]:
    return part_sq_norms([[torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 2.0])]]), [25, 5]


def _rotation_sq_norms() -> tuple[Tensor, Tensor]:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    x = torch.randn(5, dtype=torch.float64)
    return sq_norms([rotation @ x]), sq_norms([x])


def _sum_of_groups_part_sq_norms() -> tuple[Tensor, Tensor]:
    parts = _parts()
    return part_sq_norms(parts, GROUPS).sum(dim=1), part_sq_norms(parts)


def _numpy_sq_norms() -> tuple[Tensor, list[float]]:
    tensors = _tensors()
    return sq_norms(tensors), float(sum(np.linalg.norm(x.numpy()) ** 2 for x in tensors))


def _flat_part_sq_norms() -> tuple[Tensor, Tensor]:
    parts = _parts()
    flat = torch.stack([torch.cat([x.flatten() for x in part]) for part in parts])
    return part_sq_norms(parts), torch.einsum("ki,ki->k", flat, flat)


def _mlp() -> torch.nn.Sequential:
    layers = (torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4), torch.nn.Softmax(-1))
    return torch.nn.Sequential(*layers).double()


def _grad_saved_bytes() -> bool:
    def measured(x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        saved_bytes(lambda: outputs.append(module(x)))
        return outputs[0]

    module = _mlp()
    return torch.autograd.gradcheck(
        measured, torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    )


def _hand_saved_bytes() -> tuple[Tensor, list[float]]:
    # Of 3 samples in float64: the input, 4; what ReLU gives to the next layer, 6; the softmax, 4.
    x = torch.randn(3, 4, dtype=torch.float64)
    return torch.tensor([saved_bytes(_mlp(), x)]), [8 * 3 * (4 + 6 + 4)]


def _twice_the_samples_saved_bytes() -> tuple[Tensor, Tensor]:
    x, module = torch.randn(5, 4, dtype=torch.float64), _mlp()
    twice = saved_bytes(module, torch.cat([x, x]))
    return torch.tensor(twice), torch.tensor(2 * saved_bytes(module, x))


def _walked_graph_saved_bytes() -> tuple[Tensor, float]:
    module, x = _mlp(), torch.randn(5, 4, dtype=torch.float64)
    parameters = {p.data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}
    nodes = [module(x).grad_fn]
    while nodes:
        node = nodes.pop()
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        found |= {v.data_ptr(): v.nbytes for v in values if isinstance(v, Tensor)}
        nodes += [after for after, _ in node.next_functions if after is not None]
    total = sum(size for address, size in found.items() if address not in parameters)
    return torch.tensor(saved_bytes(module, x)), total


def _parts_and_whole(count: int = 3) -> tuple[list[list[Tensor]], list[Tensor]]:
    parts = _parts(count)
    return parts, [torch.stack(found).mean(0) for found in zip(*parts, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _grad_inner_products() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(3) for x in part)
    n = len(SHAPES)
    return torch.autograd.gradcheck(
        lambda *x: inner_products([x[:n], x[n : 2 * n]], x[2 * n :]), inputs
    )


def _hand_inner_products() -> tuple[Tensor, list[float]]:
    whole = [torch.tensor([1.0, 2.0]), None]
    parts = [[torch.tensor([3.0, 4.0]), torch.ones(1)], [None, torch.ones(1)]]
    return inner_products(parts, whole), [11, 0]


def _rotation_inner_products() -> tuple[Tensor, Tensor]:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    x, y = torch.randn(2, 5, dtype=torch.float64)
    return inner_products([[rotation @ x]], [rotation @ y]), inner_products([[x]], [y])


def _numpy_inner_products() -> tuple[Tensor, list[float]]:
    parts, whole = _parts_and_whole()
    mean = _flat(whole).numpy()
    return inner_products(parts, whole), [float(_flat(part).numpy() @ mean) for part in parts]


def _grad_coordinate_sums() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(2) for x in part)
    n = len(SHAPES)
    return torch.autograd.gradcheck(
        lambda *x: _flat(coordinate_sums([x[:n], x[n:]], [2, 3])), inputs
    )


def _hand_coordinate_sums() -> tuple[Tensor, list[float]]:
    parts = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]]
    return coordinate_sums(parts, [1, 2])[0], [19, 6]


def _added_coordinate_sums() -> tuple[Tensor, Tensor]:
    parts, sizes = _parts(4), [1, 2, 3, 4]
    halves = [coordinate_sums(parts[i : i + 2], sizes[i : i + 2]) for i in (0, 2)]
    return _flat(coordinate_sums(parts, sizes)), _flat(halves[0]) + _flat(halves[1])


def _numpy_coordinate_sums() -> tuple[Tensor, list[float]]:
    parts = _parts()
    squares = np.stack([_flat(part).numpy() ** 2 for part in parts])
    return _flat(coordinate_sums(parts, [1, 2, 3])), (np.array([1, 2, 3]) @ squares).tolist()


def _variance(parts: list[list[Tensor]], whole: list[Tensor]) -> Tensor:
    sums = coordinate_sums(parts, [1.0] * len(parts))
    return _flat(coordinate_variance(sums, whole, len(parts), len(parts)))


def _grad_coordinate_variance() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(2) for x in part)
    n = len(SHAPES)
    return torch.autograd.gradcheck(
        lambda *x: _flat(coordinate_variance(x[:n], x[n:], 6, 3)), inputs
    )


def _hand_coordinate_variance() -> tuple[Tensor, list[float]]:
    sums, whole = [torch.tensor([10.0, 8.0])], [torch.tensor([2.0, 1.0])]
    return coordinate_variance(sums, whole, 2, 3)[0], [1, 3]


def _shifted_coordinate_variance() -> tuple[Tensor, Tensor]:
    parts, whole = _parts_and_whole()
    shifted = [[x + 3 for x in part] for part in parts]
    return _variance(shifted, [x + 3 for x in whole]), _variance(parts, whole)


def _torch_coordinate_variance() -> tuple[Tensor, Tensor]:
    parts, whole = _parts_and_whole()
    return _variance(parts, whole), torch.stack([_flat(part) for part in parts]).var(0)


def _positive() -> list[Tensor]:
    return [x.abs() + 0.1 for x in _tensors()]


def _grad_coordinate_quantiles() -> bool:
    inputs = tuple(x.requires_grad_() for x in [*_positive(), *_tensors()])
    n = len(SHAPES)
    return torch.autograd.gradcheck(
        lambda *x: coordinate_quantiles(x[:n], x[n:], [0.5, 1.0]), inputs
    )


def _hand_coordinate_quantiles() -> tuple[Tensor, list[float]]:
    variances, whole = [torch.tensor([4.0, 0.0, 0.0, 9.0])], [torch.tensor([2.0, 0.0, 5.0, 3.0])]
    return coordinate_quantiles(variances, whole, [0.3, 0.6, 1.0]), [0, 1, 1]


def _scaled_coordinate_quantiles() -> tuple[Tensor, Tensor]:
    variances, whole, fractions = _positive(), _tensors(), [0.5, 0.9, 1.0]
    scaled = coordinate_quantiles([9 * x for x in variances], [-3 * x for x in whole], fractions)
    return scaled, coordinate_quantiles(variances, whole, fractions)


def _numpy_coordinate_quantiles() -> tuple[Tensor, list[float]]:
    variances, whole, fractions = _positive(), _tensors(), [0.25, 0.5, 0.9, 1.0]
    ratios = (_flat(variances) / _flat(whole).square()).numpy()
    expected = np.quantile(ratios, fractions, method="inverted_cdf").tolist()
    return coordinate_quantiles(variances, whole, fractions), expected


def _cubic(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (params["w"] ** 3 * x).sum(-1).mean()


def _of_samples(w: Tensor, x: Tensor, chunk_size: int | None = None) -> Tensor:
    return torch.cat(
        [g["w"] for g in per_sample_gradients(_cubic, {"w": w}, x, chunk_size=chunk_size)]
    )


def _grad_per_sample_gradients() -> bool:
    w, x = _parts(1)[0][1].requires_grad_(), torch.randn(3, 5, dtype=torch.float64)
    return torch.autograd.gradcheck(_of_samples, (w, x))


def _hand_per_sample_gradients() -> tuple[Tensor, list[float]]:
    return _of_samples(torch.tensor([1.0]), torch.tensor([[2.0], [0.0]]))[:, 0], [6, 0]


def _chunked_per_sample_gradients() -> tuple[Tensor, Tensor]:
    w, x = torch.randn(5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    return torch.stack([_of_samples(w, x, size) for size in (1, 2, 7)]), _of_samples(w, x).expand(
        3, 7, 5
    )


def _looped_per_sample_gradients() -> tuple[Tensor, Tensor]:
    w, x = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5).double()
    alone = [torch.autograd.grad(_cubic({"w": w}, one[None]), w)[0] for one in x]
    return _of_samples(w.detach(), x), torch.stack(alone)


@dataclass(frozen=True)
class Contract:
    gradcheck: Callable[[], bool]
    by_hand: Callable[[], tuple]
    invariance: Callable[[], tuple]
    independent: Callable[[], tuple]


CONTRACTS = {
    "sq_norms": Contract(_grad_sq_norms, _hand_sq_norms, _rotation_sq_norms, _numpy_sq_norms),
    "part_sq_norms": Contract(
        _grad_part_sq_norms,
        _hand_part_sq_norms,
        _sum_of_groups_part_sq_norms,
        _flat_part_sq_norms,
    ),
    "inner_products": Contract(
        _grad_inner_products,
        _hand_inner_products,
        _rotation_inner_products,
        _numpy_inner_products,
    ),
    "coordinate_sums": Contract(
        _grad_coordinate_sums,
        _hand_coordinate_sums,
        _added_coordinate_sums,
        _numpy_coordinate_sums,
    ),
    "coordinate_variance": Contract(
        _grad_coordinate_variance,
        _hand_coordinate_variance,
        _shifted_coordinate_variance,
        _torch_coordinate_variance,
    ),
    "coordinate_quantiles": Contract(
        _grad_coordinate_quantiles,
        _hand_coordinate_quantiles,
        _scaled_coordinate_quantiles,
        _numpy_coordinate_quantiles,
    ),
    "per_sample_gradients": Contract(
        _grad_per_sample_gradients,
        _hand_per_sample_gradients,
        _chunked_per_sample_gradients,
        _looped_per_sample_gradients,
    ),
    "saved_bytes": Contract(
        _grad_saved_bytes,
        _hand_saved_bytes,
        _twice_the_samples_saved_bytes,
        _walked_graph_saved_bytes,
    ),
}

every_function = pytest.mark.parametrize("name", functional.__all__)


def test_the_table_of_contents_is_sorted_and_has_no_strangers() -> None:
    assert functional.__all__ == sorted(CONTRACTS)


@every_function
def test_gradient_agrees_with_finite_differences_in_float64(name: str) -> None:
    assert CONTRACTS[name].gradcheck()


@every_function
def test_value_worked_by_hand(name: str) -> None:
    got, expected = CONTRACTS[name].by_hand()
    assert got.tolist() == expected


@every_function
def test_invariance(name: str) -> None:
    got, expected = CONTRACTS[name].invariance()
    torch.testing.assert_close(got, expected)


@every_function
def test_independent_implementation(name: str) -> None:
    got, expected = CONTRACTS[name].independent()
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype))
