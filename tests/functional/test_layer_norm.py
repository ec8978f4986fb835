"""Both normalizations beside autograd, with the norms that their backward passes leave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_accurate
from torch import Tensor
from torch.nn import functional as F

from lightning_ext.functional import layer_norm, rms_norm


def _layer(x: Tensor, *given: Any, **options: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], *given, **options)


def _rms(x: Tensor, *given: Any, eps: float = 1e-6, **options: Any) -> Tensor:
    return rms_norm(x, x.shape[-1:], *given, eps=eps, **options)


NORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "layer_norm": (_layer, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), 2),
    "rms_norm": (_rms, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), 1),
}
SHAPES = {
    "one position": (7, 12),
    "several": (3, 5, 12),
    "two dimensions of positions": (2, 3, 4, 8),
    "more than a tile": (2, 700, 130),
    "many samples": (600, 2, 130),
    "none": (3, 0, 12),
}
every_norm = pytest.mark.parametrize("name", NORMS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x, given = torch.randn(shape) + 0.5, torch.randn(NORMS[name][2], shape[-1])
    return x.to(dtype).requires_grad_(), [p.to(dtype).requires_grad_() for p in given]


def alone(name: str, x: Tensor, given: list[Tensor], d: Tensor) -> Tensor:
    """Squared norms by torch, one sample at a time, in float64."""
    wide = [p.detach().double().requires_grad_() for p in given]
    rows = []
    for one, gradient in zip(x.detach().double(), d.double(), strict=True):
        found = torch.autograd.grad((NORMS[name][1](one, *wide) * gradient).sum(), wide)
        rows.append(torch.stack([g.square().sum() for g in found]))
    return torch.stack(rows, dim=1)


@every_norm
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_the_samples_alone(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, given = inputs(name, shape, dtype)
    found, d = torch.zeros(len(given), shape[0]), torch.randn(shape).to(dtype)
    NORMS[name][0](x, *given, sample_sq_norms=found).backward(d)
    assert_accurate(found, alone(name, x, given, d))


@every_norm
@every_shape
def test_gradients_are_torchs(name: str, shape: tuple[int, ...]) -> None:
    x, given = inputs(name, shape, torch.float64)
    mine, torchs, _ = NORMS[name]
    into, d = torch.zeros(len(given), shape[0], dtype=torch.float64), torch.randn_like(x)
    y = mine(x, *given, sample_sq_norms=into)
    assert_accurate(y, torchs(x, *given))
    truth = torch.autograd.grad(torchs(x, *given), [x, *given], d)
    for found, expected in zip(torch.autograd.grad(y, [x, *given], d), truth, strict=True):
        assert_accurate(found, expected)


@every_norm
def test_every_backward_pass_adds_to_what_is_there(name: str) -> None:
    x, given = inputs(name, (3, 5, 12), torch.float32)
    found = torch.ones(len(given), 3)
    y = NORMS[name][0](x, *given, sample_sq_norms=found)
    y.sum().backward(retain_graph=True)
    once = found - 1
    y.sum().backward()
    torch.testing.assert_close(found, 1 + 2 * once)


@every_norm
def test_calls_side_by_side_have_the_products_between_them(name: str) -> None:
    x, given = inputs(name, (3, 5, 12), torch.float64)
    apart, together = torch.zeros(2, len(given), 3, dtype=torch.float64).unbind()
    for _ in range(2):
        NORMS[name][0](x, *given, sample_sq_norms=apart).sum().backward()
    NORMS[name][0](torch.cat([x, x], 1), *given, sample_sq_norms=together).sum().backward()
    torch.testing.assert_close(together, 2 * apart)  # |2 g|² = 4 |g|², not 2 |g|²


@every_norm
def test_weights_may_be_wider_than_x(name: str) -> None:
    x, given = inputs(name, (3, 5, 12), torch.bfloat16)
    given = [p.detach().float() for p in given]
    y = NORMS[name][0](x, *given)
    assert y.dtype == torch.bfloat16
    assert y.equal(NORMS[name][1](x.float(), *given).bfloat16())


@every_norm
def test_statistics_of_half_precision_are_not_rounded(name: str) -> None:
    x, given = (torch.rand(2, 5, 4000) + 8).bfloat16(), [torch.ones(4000)] * NORMS[name][2]
    truth = NORMS[name][1](x.double(), *(p.double() for p in given))
    found = NORMS[name][0](
        x, *(p.bfloat16() for p in given), sample_sq_norms=torch.zeros(len(given), 2)
    )
    assert_accurate(found, truth)


# Dynamo makes an instance of every autograd.Function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_norm
def test_it_compiles_as_one_graph(name: str) -> None:
    def run(x: Tensor, given: list[Tensor], found: Tensor) -> Tensor:
        return NORMS[name][0](x, *given, sample_sq_norms=found).sin()

    x, given = inputs(name, (3, 5, 12), torch.float64)
    eager, compiled = torch.zeros(2, len(given), 3, dtype=torch.float64).unbind()
    run(x, given, eager).sum().backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(x, given, compiled).sum().backward()
    torch.testing.assert_close(compiled, eager)


@every_norm
def test_without_norms_gradients_have_gradients(name: str) -> None:
    x, given = inputs(name, (2, 3), torch.float64)
    assert torch.autograd.gradgradcheck(NORMS[name][0], [x, *given])


@every_norm
def test_with_norms_they_have_none(name: str) -> None:
    x, given = inputs(name, (2, 3), torch.float32)
    y = NORMS[name][0](x, *given, sample_sq_norms=torch.zeros(len(given), 2))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


X = torch.zeros(3, 2, 4)
W = torch.zeros(4)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no features": ((torch.zeros(3, 0),), {}, ValueError, "give floats with features"),
    "integers": ((X.int(),), {}, ValueError, "give floats with features"),
    "another width": ((X, torch.zeros(5)), {}, ValueError, r"it must have shape \(4,\)"),
    "another device": ((X, W.to("meta")), {}, ValueError, "on the device of x"),
    "narrower": ((X, W.half()), {}, TypeError, "as x is, or wider"),
    "eps": ((X, W), {"eps": -1.0}, ValueError, "eps=-1.0 is not allowed"),
    "norms of no weight": ((X,), {"sample_sq_norms": torch.zeros(1, 3)}, ValueError, "a weight"),
    "samples": ((X, W), {"sample_sq_norms": torch.zeros(1, 2)}, ValueError, r"shape \(1, 3\)"),
    "no samples": ((W, W), {"sample_sq_norms": torch.zeros(1, 1)}, ValueError, "without samples"),
    "dtype": ((X, W), {"sample_sq_norms": torch.zeros(1, 3).double()}, TypeError, "float32"),
    "a leaf": (
        (X, W),
        {"sample_sq_norms": torch.zeros(1, 3, requires_grad=True)},
        TypeError,
        "require none",
    ),
}


@every_norm
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(name: str, case: str) -> None:
    given, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        NORMS[name][0](*given, **options)


def test_a_bias_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="give both, or the weight alone"):
        layer_norm(X, 4, None, W)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("shape", [5, (2,), (4, 2), (1, 3, 2, 4), ()])
def test_a_normalized_shape_that_is_not_that_of_x_is_refused(
    norm: Callable[..., Tensor], shape: int | tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="must be its last dimension"):
        norm(X, shape)


@pytest.mark.parametrize("shape", [6, (6,), (5, 6), torch.Size([4, 5, 6])], ids=str)
def test_positional_arguments_are_those_of_torch(shape: int | tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    sizes = (shape,) if isinstance(shape, int) else shape
    weight, bias = torch.randn(2, *sizes, dtype=torch.float64)
    assert_accurate(
        layer_norm(x, shape, weight, bias, 0.1), F.layer_norm(x, sizes, weight, bias, 0.1)
    )
    assert_accurate(rms_norm(x, shape, weight, 0.1), F.rms_norm(x, sizes, weight, 0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_by_default_eps_is_torchs(dtype: torch.dtype) -> None:
    x = torch.full((3, 8), 2e-2 if dtype == torch.bfloat16 else 1e-6, dtype=dtype)
    assert rms_norm(x, 8).equal(F.rms_norm(x, (8,)))
    assert layer_norm(x, 8).equal(F.layer_norm(x, (8,)))


def test_norms_of_samples_are_those_of_all_features_in_one() -> None:
    x, weight = torch.randn(3, 5, 2, 4), torch.randn(2, 4, requires_grad=True)
    found, flat = torch.zeros(2, 1, 3).unbind()
    layer_norm(x, (2, 4), weight, sample_sq_norms=found).square().sum().backward()
    layer_norm(x.flatten(2), 8, weight.flatten(), sample_sq_norms=flat).square().sum().backward()
    assert found.equal(flat)
    assert found.gt(0).all()
