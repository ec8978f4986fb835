"""Statistics of parts and gradients of samples: corners, dtypes and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import (
    coordinate_quantiles,
    coordinate_sums,
    coordinate_variance,
    inner_products,
    per_sample_gradients,
    sq_norms,
)
from lightning_ext.scaling import noise_statistics

ONE = torch.ones(1)


def test_the_variances_of_all_coordinates_add_up_to_the_trace() -> None:
    parts, sizes = torch.randn(4, 7, dtype=torch.float64), [1, 2, 3, 4]
    whole = (torch.tensor(sizes, dtype=torch.float64) @ parts) / sum(sizes)
    sums = coordinate_sums([[part] for part in parts], sizes)
    (variance,) = coordinate_variance(sums, [whole], sum(sizes), len(sizes))
    norms = [sq_norms([part]).item() for part in parts]
    _, trace = noise_statistics(norms, sizes, sq_norms([whole]).item())
    assert variance.sum().item() == pytest.approx(trace, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    x = torch.full((4096,), 64.0, dtype=dtype)
    assert inner_products([[x]], [x]).item() == 4096 * 64.0**2
    (square,) = coordinate_sums([[x]], [1024])
    assert square.dtype == torch.float32
    assert square[0] == 1024 * 64.0**2


def test_complex_entries_have_a_real_inner_product() -> None:
    assert inner_products([[torch.tensor([3 + 4j])]], [torch.tensor([1 + 2j])]).item() == 11


def test_a_coordinate_without_any_gradient_is_left_out() -> None:
    variances, whole = [torch.tensor([0.0, 2.0, 0.0])], [torch.tensor([0.0, 1.0, 0.0])]
    assert coordinate_quantiles(variances, whole, [0.1, 1.0]).tolist() == [2, 2]


def test_a_coordinate_that_is_noise_alone_has_an_infinite_ratio() -> None:
    found = coordinate_quantiles([torch.tensor([1.0, 1.0])], [torch.tensor([0.0, 1.0])], [0.5, 1.0])
    assert found.tolist() == [1, math.inf]


def test_a_variance_that_rounding_made_negative_is_none() -> None:
    assert coordinate_quantiles([torch.tensor([-1e-9])], [ONE], [1.0]).item() == 0


def test_no_coordinate_has_no_quantile() -> None:
    assert coordinate_quantiles([torch.zeros(2)], [torch.zeros(2)], [0.5]).isnan().all()


def test_nine_tenths_of_ten_coordinates_are_nine() -> None:
    variances = [torch.arange(1.0, 11.0)]
    assert coordinate_quantiles(variances, [torch.ones(10)], [0.9, 0.99]).tolist() == [9, 10]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: inner_products([], [ONE]), "at least one part"),
        (lambda: inner_products([[ONE, ONE]], [ONE]), "a part has 2 tensors and the whole 1"),
        (lambda: coordinate_sums([], []), "at least one part"),
        (lambda: coordinate_sums([[ONE]], [1, 2]), "1 part_gradients and 2 part_sizes"),
        (lambda: coordinate_variance([ONE], [ONE], 1, 1), "parts=1"),
        (lambda: coordinate_quantiles([ONE], [ONE], [0.0]), "fractions="),
        (lambda: coordinate_quantiles([ONE], [ONE], [1.5]), "fractions="),
        (lambda: samples(torch.ones(3), chunk_size=0), "chunk_size=0"),
        (lambda: samples({"x": torch.ones(3), "y": torch.ones(2)}), r"\[2, 3\] samples"),
        (lambda: samples("text"), r"\[\] samples"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
    x = batch["x"] if isinstance(batch, dict) else batch
    return (params["w"] * x).square().mean()


def samples(batch: Any, loss_fn: Any = loss, **kwargs: Any) -> Tensor:
    found = per_sample_gradients(loss_fn, {"w": torch.tensor(2.0)}, batch, **kwargs)
    return torch.cat([gradients["w"] for gradients in found])


def test_a_sample_is_a_batch_of_one() -> None:
    shapes = []

    def note(params: dict[str, Tensor], batch: Any) -> Tensor:
        shapes.append((batch[0].shape, batch[1][0].shape))
        return loss(params, batch[0])

    samples((torch.ones(3, 4), [torch.ones(3)]), note)
    samples((torch.ones(3, 4), [torch.ones(3)]), note, chunk_size=1)
    assert set(shapes) == {((1, 4), (1,))}


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_what_is_no_tensor_of_samples_goes_to_each(chunk_size: int | None) -> None:
    def scaled(params: dict[str, Tensor], batch: Any) -> Tensor:
        assert batch["name"] == "train"
        return loss(params, batch) * batch["scale"]

    batch = {"x": torch.tensor([1.0, 2.0, 3.0]), "name": "train", "scale": torch.tensor(0.5)}
    assert samples(batch, scaled, chunk_size=chunk_size).tolist() == [2, 8, 18]


def test_chunks_have_the_size_that_was_asked_for() -> None:
    found = per_sample_gradients(loss, {"w": torch.ones(2)}, torch.ones(5, 2), chunk_size=2)
    assert [len(gradients["w"]) for gradients in found] == [2, 2, 1]


def test_one_after_another_takes_what_cannot_be_mapped() -> None:
    def by_value(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(params, x) if x.item() > 1 else loss(params, x) * 0

    assert samples(torch.tensor([1.0, 2.0]), by_value, chunk_size=1).tolist() == [0, 16]
    with pytest.raises(RuntimeError, match="vmap"):
        samples(torch.tensor([1.0, 2.0]), by_value)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_every_sample_draws_its_own_random_numbers(chunk_size: int | None) -> None:
    def noisy(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (params["w"] * torch.rand_like(x)).sum()

    assert len(set(samples(torch.ones(8), noisy, chunk_size=chunk_size).tolist())) == 8
