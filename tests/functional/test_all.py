"""The contract of the room: gradcheck, a hand-worked value, an invariance, a second opinion."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from harness.adaptive_contracts import ADAPTIVE_CONTRACTS
from harness.bounded_contracts import BOUNDED_CONTRACTS
from harness.feedback_contracts import FEEDBACK_CONTRACTS
from harness.low_rank_contracts import LOW_RANK_CONTRACTS
from harness.normuon_contracts import NORMUON_CONTRACTS
from harness.second_order_contracts import SECOND_ORDER_CONTRACTS
from harness.sharpness_contracts import SHARPNESS_CONTRACTS
from harness.trust_contracts import TRUST_CONTRACTS
from harness.unit_contracts import UNIT_CONTRACTS
from harness.vote_contracts import VOTE_CONTRACTS
from harness.wrapper_contracts import WRAPPER_CONTRACTS
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import (
    Quantized,
    QuantizedState,
    accumulated_sq_norms,
    accumulated_sq_norms_,
    adam_instability_sums,
    adam_preconditioned,
    affine_sample_gradients,
    block_logsumexp,
    block_logsumexp_grads,
    bulk_edges,
    clip_loss,
    coordinate_quantiles,
    coordinate_sums,
    coordinate_variance,
    decode_state,
    dequantize,
    dequantize_reduce,
    dequantize_reduce_quantize,
    deviation_sum,
    diff_sq_norms,
    ema_update_,
    encode_state,
    export_state,
    fold_norms,
    gradient_snr,
    import_state,
    info_nce_loss,
    inner_products,
    join_weight,
    lanczos,
    layer_norm,
    majority_vote,
    matrix_covariance,
    mean_gradient_snr,
    merge_logsumexp,
    newton_schulz,
    normalized_singular_values,
    nt_xent_loss,
    orthogonalize,
    pack_signs,
    part_sq_norms,
    per_sample_gradients,
    quantize,
    quantized_bytes,
    random_bits,
    ritz_values,
    rms_norm,
    round_stochastic,
    sample_sq_norms,
    saved_bytes,
    scale_state_,
    siglip_grads,
    siglip_loss,
    small_gram,
    spectral_density,
    split_weight,
    sq_norms,
    state_bytes,
    state_from_rows,
    state_to_rows,
    sum_signs,
    total_sq_norm,
    trace_sqrt,
    unit_norms,
    unpack_signs,
    unpack_votes,
    vrgd_scale,
    zero_state,
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


def _grad_total_sq_norm() -> bool:
    inputs = tuple(x.requires_grad_() for x in _tensors())
    return torch.autograd.gradcheck(lambda *x: total_sq_norm(x), inputs)


def _hand_total_sq_norm() -> tuple[Tensor, float]:
    tensors = [torch.tensor([3.0, 4.0]) * 2.0**-80, torch.tensor(12.0 * 2.0**-80)]
    return total_sq_norm(tensors) * 2.0**160, 169.0


def _scale_total_sq_norm() -> tuple[Tensor, Tensor]:
    x = [g.float() for g in _tensors()]
    return total_sq_norm([g * 2.0**80 for g in x]) * 2.0**-160, sq_norms(x).double()


def _numpy_total_sq_norm() -> tuple[Tensor, list[float]]:
    tensors = _tensors()
    return total_sq_norm(tensors), float(sum(np.linalg.norm(x.numpy()) ** 2 for x in tensors))


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


def _split(x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums and means of two parts of tensors, one after the other."""
    n = len(SHAPES)
    parts = [x[:n], x[n:]]
    return coordinate_sums(parts, [1, 1]), [(a + b) / 2 for a, b in zip(*parts, strict=True)]


def _grad_gradient_snr() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(2) for x in part)
    return torch.autograd.gradcheck(lambda *x: _flat(gradient_snr(*_split(x), 2)), inputs)


def _hand_gradient_snr() -> tuple[Tensor, list[float]]:
    sums, whole = [torch.tensor([10.0, 8.0, 34.0])], [torch.tensor([2.0, 2.0, 1.0])]
    return gradient_snr(sums, whole, 2)[0], [4, float("inf"), 1 / 16]


def _scaled_gradient_snr() -> tuple[Tensor, Tensor]:
    parts = _parts(2)
    scaled = [-3 * x for part in parts for x in part]
    plain = _flat(gradient_snr(*_split([x for part in parts for x in part]), 2))
    return _flat(gradient_snr(*_split(scaled), 2)), plain


def _numpy_gradient_snr() -> tuple[Tensor, list[float]]:
    parts, whole = _parts_and_whole(5)
    flat = np.stack([_flat(part).numpy() for part in parts])
    expected = (flat.mean(0) ** 2 / flat.var(0)).tolist()
    return _flat(gradient_snr(coordinate_sums(parts, [2] * 5), whole, 10)), expected


def _grad_mean_gradient_snr() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(2) for x in part)
    return torch.autograd.gradcheck(lambda *x: mean_gradient_snr(*_split(x), 2, 5), inputs)


def _hand_mean_gradient_snr() -> tuple[Tensor, list[float]]:
    sums = [torch.tensor([20.0, 0.0]), torch.tensor([8.0])]
    whole = [torch.tensor([2.0, 0.0]), torch.tensor([1.0])]  # variances 4/3, none, and 4/3
    return mean_gradient_snr(sums, whole, 4, 4).view(1), [0.375]  # of 3/4 and 0


def _scaled_mean_gradient_snr() -> tuple[Tensor, Tensor]:
    parts = [x for part in _parts(2) for x in part]
    scaled = mean_gradient_snr(*_split([7 * x for x in parts]), 2, 5)
    return scaled, mean_gradient_snr(*_split(parts), 2, 5)


def _numpy_mean_gradient_snr() -> tuple[Tensor, float]:
    parts, whole = _parts_and_whole(6)
    flat = np.stack([_flat(part).numpy() for part in parts])
    ratios = flat.mean(0) ** 2 / (3 * flat.var(0, ddof=1))  # of parts of 3 samples
    expected = (3 / 5 * ratios - 1 / 18).mean()
    return mean_gradient_snr(coordinate_sums(parts, [3] * 6), whole, 18, 6), float(expected)


def _grad_vrgd_scale() -> bool:
    inputs = tuple(x.requires_grad_() for x in _positive())
    return torch.autograd.gradcheck(lambda *x: _flat(vrgd_scale(x)), inputs)


def _hand_vrgd_scale() -> tuple[Tensor, list[float]]:
    return vrgd_scale([torch.tensor([3.0, 1.0, 0.125, 3.875])], gamma=0.25)[0], [1, 0.5, 0.25, 1]


def _scaled_vrgd_scale() -> tuple[Tensor, Tensor]:
    snr = _positive()
    return _flat(vrgd_scale([(i + 2) * x for i, x in enumerate(snr)])), _flat(vrgd_scale(snr))


def _numpy_vrgd_scale() -> tuple[Tensor, list[float]]:
    snr = _positive()
    expected = [np.clip(x.numpy() / x.numpy().mean(), 0.1, 1).flatten() for x in snr]
    return _flat(vrgd_scale(snr)), np.concatenate(expected).tolist()


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


def _symmetric(n: int = 5) -> Tensor:
    x = torch.randn(n, n, dtype=torch.float64)
    return x + x.T


def _tridiagonal(matrix: Tensor, start: Tensor, steps: int = 5) -> Tensor:
    return torch.cat(lanczos(lambda v: matrix @ v, start, steps))


def _coefficients() -> tuple[Tensor, Tensor]:
    return torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5


def _dense(diagonal: Tensor, beside: Tensor) -> Tensor:
    inner = beside[:-1]
    return torch.diag(diagonal) + torch.diag(inner, 1) + torch.diag(inner, -1)


def _grad_lanczos() -> bool:
    matrix, start = torch.randn(4, 4).double().requires_grad_(), torch.randn(4).double()
    return torch.autograd.gradcheck(
        lambda a, v: _tridiagonal(a + a.T, v, 3), (matrix, start.requires_grad_())
    )


def _hand_lanczos() -> tuple[Tensor, list[float]]:
    return _tridiagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([4.0, 0.0])), [
        *(2, 3),
        *(1, 0),
    ]


def _rotation_lanczos() -> tuple[Tensor, Tensor]:
    matrix, start = _symmetric(), torch.randn(5, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    turned = _tridiagonal(rotation @ matrix @ rotation.T, rotation @ start, 4)
    return turned, _tridiagonal(matrix, start, 4)


def _eigvalsh_lanczos() -> tuple[Tensor, Tensor]:
    matrix, start = _symmetric(), torch.randn(5, dtype=torch.float64)
    diagonal, beside = lanczos(lambda v: matrix @ v, start, 5)
    return torch.linalg.eigvalsh(_dense(diagonal, beside)), torch.linalg.eigvalsh(matrix)


def _grad_ritz_values() -> bool:
    inputs = tuple(x.requires_grad_() for x in _coefficients())
    return torch.autograd.gradcheck(lambda *x: torch.cat(ritz_values(*x)), inputs)


def _hand_ritz_values() -> tuple[Tensor, list[float]]:
    found = ritz_values(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]))
    return torch.cat(found), [1, 3, 1, 0, 0, 2]


def _signs_ritz_values() -> tuple[Tensor, Tensor]:
    diagonal, beside = _coefficients()
    return torch.cat(ritz_values(diagonal, -beside)), torch.cat(ritz_values(diagonal, beside))


def _moments_ritz_values() -> tuple[Tensor, Tensor]:
    matrix, start = _symmetric(9), torch.randn(9, dtype=torch.float64)
    values, weights, _ = ritz_values(*lanczos(lambda v: matrix @ v, start, 3))
    moments = [start @ torch.linalg.matrix_power(matrix, k) @ start for k in range(6)]
    got = torch.stack([weights @ values**k for k in range(6)])
    return got, torch.stack(moments) / (start @ start)


def _grad_spectral_density() -> bool:
    values, weights = (x.requires_grad_() for x in _coefficients())
    points = torch.linspace(-2, 2, 3, dtype=torch.float64)
    return torch.autograd.gradcheck(lambda *x: spectral_density(*x, points, 0.7), (values, weights))


def _hand_spectral_density() -> tuple[Tensor, list[float]]:
    at = torch.tensor([2.0], dtype=torch.float64)
    return spectral_density(at, torch.tensor([3.0], dtype=torch.float64), at, 1.0), [
        3 / (2 * np.pi) ** 0.5
    ]


def _shifted_spectral_density() -> tuple[Tensor, Tensor]:
    values, weights = _coefficients()
    points = torch.linspace(-2, 2, 5, dtype=torch.float64)
    shifted = spectral_density(values + 3, weights, points + 3, 0.5)
    return shifted, spectral_density(values, weights, points, 0.5)


def _torch_spectral_density() -> tuple[Tensor, Tensor]:
    values, weights = _coefficients()
    points = torch.linspace(-2, 2, 5, dtype=torch.float64)
    bells = [torch.distributions.Normal(v, 0.5).log_prob(points).exp() for v in values]
    return spectral_density(values, weights, points, 0.5), weights @ torch.stack(bells)


def _grad_bulk_edges() -> bool:
    return torch.autograd.gradcheck(bulk_edges, tuple(x.requires_grad_() for x in _coefficients()))


def _hand_bulk_edges() -> tuple[Tensor, list[float]]:
    return bulk_edges(torch.tensor([9.0, 1.0, 1.0]), torch.tensor([4.0, 2.0, 2.0])), [-3, 5]


def _scaled_bulk_edges() -> tuple[Tensor, Tensor]:
    diagonal, beside = _coefficients()
    return bulk_edges(3 * diagonal + 7, 3 * beside), 3 * bulk_edges(diagonal, beside) + 7


def _chebyshev_bulk_edges() -> tuple[Tensor, list[float]]:
    # The uniform measure on [-1, 1] (Legendre): β_k = k/√(4k² − 1), its edges are ±1.
    k = torch.arange(1, 4001, dtype=torch.float64)
    found = bulk_edges(torch.zeros_like(k), k / (4 * k.square() - 1).sqrt())
    return (found * 1e6).round() / 1e6, [-1.0, 1.0]


def _adam_state() -> tuple[Tensor, Tensor, Tensor]:
    grad, mean = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    return grad, mean / 3, torch.rand(7, dtype=torch.float64) + 0.5


def _instability(grad: Tensor, mean: Tensor, square: Tensor, **settings: float) -> Tensor:
    given = {"step": 3, "betas": (0.9, 0.99), "eps": 1e-3} | settings
    return adam_instability_sums(grad, mean, square, **given)


def _grad_adam_instability_sums() -> bool:
    return torch.autograd.gradcheck(_instability, tuple(x.requires_grad_() for x in _adam_state()))


def _hand_adam_instability_sums() -> tuple[Tensor, list[float]]:
    # At the first step m̂ = g and v̂ = g²: every entry but the zero is a sign.
    grad = torch.tensor([2.0, -4.0, 0.0])
    found = _instability(grad, grad / 2, grad**2 / 4, step=1, betas=(0.5, 0.75), eps=0.0)
    return found, [3, 2, 2, 6, 20, 20]


def _added_adam_instability_sums() -> tuple[Tensor, Tensor]:
    state = _adam_state()
    halves = [_instability(*(x[part] for x in state)) for part in (slice(3), slice(3, 7))]
    return _instability(*state), halves[0] + halves[1]


def _optimizer_adam_instability_sums() -> tuple[Tensor, Tensor]:
    weight = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-3)
    for _ in range(3):
        before, weight.grad = weight.detach().clone(), torch.randn(7, dtype=torch.float64)
        optimizer.step()
    update, state = before - weight.detach(), optimizer.state[weight]
    found = _instability(weight.grad, state["exp_avg"], state["exp_avg_sq"])
    return found[2:4], torch.stack([update @ update, update @ weight.grad])


def _affine(d: Tensor, x: Tensor, dims: Sequence[int] = (2,)) -> Tensor:
    return torch.stack(affine_sample_gradients(d, x, dims))


def _two_inputs() -> tuple[Tensor, Tensor]:
    d, x = (torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(2))
    return d, x


def _grad_affine_sample_gradients() -> bool:
    return torch.autograd.gradcheck(_affine, tuple(x.requires_grad_() for x in _two_inputs()))


def _hand_affine_sample_gradients() -> tuple[Tensor, list[Any]]:
    d, x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[2.0, 1.0], [1.0, 5.0]]])
    return _affine(d, x), [[[5, 2]], [[4, 2]]]


def _order_affine_sample_gradients() -> tuple[Tensor, Tensor]:
    d, x = _two_inputs()
    positions = torch.randperm(4)
    return _affine(d[:, positions], x[:, positions]), _affine(d, x)


def _autograd_affine_sample_gradients() -> tuple[Tensor, Tensor]:
    d, x = _two_inputs()
    weight, bias = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    alone = [
        torch.autograd.grad((weight * x[i] + bias).mul(d[i]).sum(), [weight, bias])
        for i in range(3)
    ]
    return _affine(d, x), torch.stack([torch.stack(found) for found in zip(*alone, strict=True)])


def _sample_stacks() -> list[Tensor]:
    return [torch.randn(4, *shape, dtype=torch.float64) for shape in SHAPES]


def _grad_sample_sq_norms() -> bool:
    inputs = tuple(x.requires_grad_() for x in _sample_stacks())
    return torch.autograd.gradcheck(lambda *x: sample_sq_norms(x), inputs)


def _hand_sample_sq_norms() -> tuple[Tensor, list[float]]:
    stacks = [torch.tensor([[[3.0, 4.0]], [[1.0, 2.0]]]), torch.tensor([1.0, 3.0])]
    return sample_sq_norms(stacks), [26, 14]


def _order_sample_sq_norms() -> tuple[Tensor, Tensor]:
    stacks, order = _sample_stacks(), torch.randperm(4)
    return sample_sq_norms([x[order] for x in stacks[::-1]]), sample_sq_norms(stacks)[order]


def _parts_sample_sq_norms() -> tuple[Tensor, Tensor]:
    stacks = _sample_stacks()
    return sample_sq_norms(stacks), part_sq_norms([[x[i] for x in stacks] for i in range(4)])


def _matrices() -> Tensor:
    return torch.randn(2, 3, 5, dtype=torch.float64)


def _grams() -> Tensor:
    return small_gram(_matrices()) + 0.1 * torch.eye(3, dtype=torch.float64)


def _rotation(size: int) -> Tensor:
    rotation, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return rotation


def _grad_orthogonalize() -> bool:
    return all(
        torch.autograd.gradcheck(lambda x: orthogonalize(x, steps=6), x.requires_grad_())
        for x in (_matrices(), torch.randn(2, 7, dtype=torch.float64))
    )


def _hand_orthogonalize() -> tuple[Tensor, list[Any]]:
    found = orthogonalize(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
    return found.round(decimals=2), [[0, -1], [1, 0]]


def _rotation_orthogonalize() -> tuple[Tensor, Tensor]:
    left, right, x = _rotation(3), _rotation(5), _matrices()
    got = orthogonalize(left @ x @ right, steps=8)
    return got, left @ orthogonalize(x, steps=8) @ right


def _svd_orthogonalize() -> tuple[Tensor, Tensor]:
    x = _matrices()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return orthogonalize(x).round(decimals=2) + 0.0, (u @ vh).round(decimals=2) + 0.0


def _grad_normalized_singular_values() -> bool:
    return torch.autograd.gradcheck(normalized_singular_values, _matrices().requires_grad_())


def _hand_normalized_singular_values() -> tuple[Tensor, list[Any]]:
    weight = torch.stack([torch.diag(torch.tensor([3.0, -1.0, 2.0])), -torch.eye(3)])
    return normalized_singular_values(weight).round(decimals=6), [[1, 0.5, 0], [1, 1, 1]]


def _rotation_normalized_singular_values() -> tuple[Tensor, Tensor]:
    x = _matrices()
    rotated = -7 * _rotation(3) @ x @ _rotation(5)
    return normalized_singular_values(rotated), normalized_singular_values(x)


def _numpy_normalized_singular_values() -> tuple[Tensor, Any]:
    x = _matrices()
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return normalized_singular_values(x), (values - low) / (high - low)


def _norm_inputs() -> list[Tensor]:
    shapes = ((3, 4, 5), (5,), (5,))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _grad_layer_norm() -> bool:
    return all(
        torch.autograd.gradcheck(
            lambda x, w, b, into=into: layer_norm(x, 5, w, b, sample_sq_norms=into), _norm_inputs()
        )
        for into in (None, _zeros(2, 3))
    )


def _hand_layer_norm() -> tuple[Tensor, list[float]]:
    # Of two features the normalized ones are -1 and 1, or 1 and -1; d is 1, 2 for both samples.
    x = torch.tensor([[[0.0, 4.0], [3.0, 1.0]], [[1.0, 7.0], [2.0, 5.0]]])
    weight, bias = torch.tensor([2.0, 3.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    found = torch.zeros(2, 2)
    y = layer_norm(x, 2, weight, bias, eps=0.0, sample_sq_norms=found)
    y.backward(torch.tensor([1.0, 2.0]).expand(x.shape))
    return torch.cat([y[0].flatten(), *found]), [-2, 3, 2, -3, 0, 4 + 16, 4 + 16, 4 + 16]


def _affine_layer_norm() -> tuple[Tensor, Tensor]:
    x, weight, bias = _norm_inputs()
    moved, turned = (layer_norm(y, 5, weight, bias, eps=0.0) for y in (-3 * x + 2, -x))
    return moved, turned


def _lone_norms(normalize: Callable[..., Tensor], parameters: int) -> tuple[Tensor, Tensor]:
    """Norms that a backward pass of ours leaves, and autograd's, one sample at a time."""
    x, *given = _norm_inputs()[: 1 + parameters]
    d, found = torch.randn_like(x), _zeros(parameters, 3)
    (normalize(x, *given, into=found) * d).sum().div(3).backward()
    alone = [
        torch.autograd.grad((normalize(x[i], *given) * d[i]).sum(), given) for i in range(len(x))
    ]
    return 9 * found, torch.stack([torch.stack([g.square().sum() for g in a]) for a in alone]).T


def _torch_layer_norm() -> tuple[Tensor, Tensor]:
    def normalize(x: Tensor, *given: Tensor, into: Tensor | None = None) -> Tensor:
        if into is None:
            return torch.nn.functional.layer_norm(x, (5,), *given)
        return layer_norm(x, 5, *given, sample_sq_norms=into)

    return _lone_norms(normalize, 2)


def _grad_rms_norm() -> bool:
    return all(
        torch.autograd.gradcheck(
            lambda x, w, into=into: rms_norm(x, 5, w, sample_sq_norms=into), _norm_inputs()[:2]
        )
        for into in (None, _zeros(1, 3))
    )


def _hand_rms_norm() -> tuple[Tensor, list[float]]:
    x = torch.tensor([[[0.0, 0.0, 0.0, 4.0], [3.0, 3.0, -3.0, 3.0]]])
    weight, found = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True), torch.zeros(1, 1)
    y = rms_norm(x, 4, weight, eps=0.0, sample_sq_norms=found)
    y.sum().backward()
    return torch.cat([y.flatten(), found[0]]), [0, 0, 0, 8, 1, 2, -3, 4, 1 + 1 + 1 + 9]


def _scaled_rms_norm() -> tuple[Tensor, Tensor]:
    x, weight, _ = _norm_inputs()
    return rms_norm(-3 * x, 5, weight, eps=0.0), -rms_norm(x, 5, weight, eps=0.0)


def _torch_rms_norm() -> tuple[Tensor, Tensor]:
    def normalize(x: Tensor, *given: Tensor, into: Tensor | None = None) -> Tensor:
        if into is None:
            return torch.nn.functional.rms_norm(x, (5,), *given, eps=1e-6)
        return rms_norm(x, 5, *given, 1e-6, sample_sq_norms=into)

    return _lone_norms(normalize, 1)


def _grad_newton_schulz() -> bool:
    return all(
        torch.autograd.gradcheck(lambda x: newton_schulz(x, steps=2), x.requires_grad_())
        for x in (_matrices(), torch.randn(2, 2, 7, 3, dtype=torch.float64))
    )


def _hand_newton_schulz() -> tuple[Tensor, list[Any]]:
    # Four singular values of 7, the norm is 14: a/2 + b/8 + c/32.
    found = newton_schulz(torch.eye(4).flip(0) * 8, steps=1, coefficients=(2.0, 4.0, 8.0))
    return found, (1.75 * torch.eye(4).flip(0)).tolist()


def _rotation_newton_schulz() -> tuple[Tensor, Tensor]:
    left, right, x = _rotation(3), _rotation(5), _matrices()
    return newton_schulz(left @ x @ right * 8), left @ newton_schulz(x) @ right


def _svd_newton_schulz() -> tuple[Tensor, Tensor]:
    x = _matrices()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return newton_schulz(x), u @ torch.diag_embed(s) @ vh


def _grad_trace_sqrt() -> bool:
    return torch.autograd.gradcheck(lambda x: trace_sqrt(x + x.mT), _grams().requires_grad_())


def _hand_trace_sqrt() -> tuple[Tensor, float]:
    return trace_sqrt(torch.diag(torch.tensor([9.0, 0.0, 4.0]))).round(decimals=2), 5


def _rotation_trace_sqrt() -> tuple[Tensor, Tensor]:
    rotation, x = _rotation(3), _grams()
    return trace_sqrt(rotation @ x @ rotation.T), trace_sqrt(x)


def _eigvalsh_trace_sqrt() -> tuple[Tensor, Tensor]:
    x = _grams()
    ratio = trace_sqrt(x) / torch.linalg.eigvalsh(x).sqrt().sum(-1)
    return ratio.round(decimals=2), torch.ones(2)


def _grad_fold_norms() -> bool:
    folds = [torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    return all(
        torch.autograd.gradcheck(lambda *x, dual=dual: fold_norms(x, [1, 2, 3], dual), folds)
        for dual in (torch.sign, orthogonalize)
    )


def _hand_fold_norms() -> tuple[Tensor, list[float]]:
    folds = [torch.tensor([3.0, 1.0]), torch.tensor([1.0, -3.0])]
    return fold_norms(folds, [1, 3], torch.sign), [1.5 + 2, 4, 4, 3 - 1, 1 - 3]


def _repeated_fold_norms() -> tuple[Tensor, Tensor]:
    folds = list(torch.randn(3, 6, dtype=torch.float64))
    once, twice = (fold_norms(folds, [n, 2 * n, n], torch.sign) for n in (1, 2))
    return once, twice


def _euclidean_fold_norms() -> tuple[Tensor, Tensor]:
    def unit(x: Tensor) -> Tensor:
        return x / x.norm()

    a, b = torch.randn(2, 6, dtype=torch.float64)
    norms = [((a + b) / 2).norm(), b.norm(), a.norm()]
    products = [a @ b / b.norm(), a @ b / a.norm()]
    return fold_norms([a, b], [1, 1], unit), torch.stack([*norms, *products])


def _grad_deviation_sum() -> bool:
    return torch.autograd.gradcheck(deviation_sum, _grams().abs().requires_grad_())


def _hand_deviation_sum() -> tuple[Tensor, float]:
    return deviation_sum(torch.tensor([[4.0, 9.0], [0.0, 0.25]])), 5.5


def _scaled_deviation_sum() -> tuple[Tensor, Tensor]:
    x = _grams().abs()
    return deviation_sum(9 * x), 3 * deviation_sum(x)


def _torch_deviation_sum() -> tuple[Tensor, Tensor]:
    samples = torch.randn(9, 4, 3, dtype=torch.float64)
    return deviation_sum(samples.var(0)), samples.std(0).sum()


def _grad_small_gram() -> bool:
    return all(
        torch.autograd.gradcheck(small_gram, x.requires_grad_()) for x in (_matrices(), _grams())
    )


def _hand_small_gram() -> tuple[Tensor, list[Any]]:
    return small_gram(torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]])), [[5, 2], [2, 5]]


def _rotation_small_gram() -> tuple[Tensor, Tensor]:
    x = _matrices()
    return small_gram(x @ _rotation(5)), small_gram(x)


def _numpy_small_gram() -> tuple[Tensor, Any]:
    x = torch.randn(6, 4, dtype=torch.float64)
    return small_gram(x), np.einsum("ij,ik->jk", x.numpy(), x.numpy())


def _grad_matrix_covariance() -> bool:
    inputs = _grams().requires_grad_(), _matrices().requires_grad_()
    return torch.autograd.gradcheck(lambda x, y: matrix_covariance(x, y, 6, 3), inputs)


def _hand_matrix_covariance() -> tuple[Tensor, list[Any]]:
    # Parts (1, 0) and (3, 0) of one sample each.
    return matrix_covariance(torch.tensor([[10.0]]), torch.tensor([[2.0, 0.0]]), 2, 2), [[2]]


def _shifted_matrix_covariance() -> tuple[Tensor, Tensor]:
    parts = torch.randn(4, 3, 5, dtype=torch.float64)
    first, second = (
        matrix_covariance(small_gram(x).sum(0), x.mean(0), 4, 4) for x in (parts, parts + 3)
    )
    return first, second


def _numpy_matrix_covariance() -> tuple[Tensor, Any]:
    parts = torch.randn(4, 3, 5, dtype=torch.float64)
    found = matrix_covariance(small_gram(parts).sum(0), parts.mean(0), 4, 4)
    return found, sum(np.cov(column.T.numpy()) for column in parts.unbind(-1))


def _grad_adam_preconditioned() -> bool:
    inputs = _matrices().requires_grad_(), (_matrices().abs() + 0.1).requires_grad_()
    return torch.autograd.gradcheck(
        lambda g, v: adam_preconditioned(g, v, beta2=0.9, step=3, eps=0.1), inputs
    )


def _hand_adam_preconditioned() -> tuple[Tensor, list[float]]:
    g, v = torch.tensor([1.0, 3.0]), torch.tensor([4.5, 0.5])
    return adam_preconditioned(g, v, beta2=0.5, step=1, eps=1.0), [0.25, 1.5]


def _scaled_adam_preconditioned() -> tuple[Tensor, Tensor]:
    g, v = _matrices(), _matrices().abs()
    scaled = adam_preconditioned(-5 * g, 25 * v, beta2=0.9, step=3, eps=0.0)
    return scaled, -adam_preconditioned(g, v, beta2=0.9, step=3, eps=0.0)


def _torch_adam_preconditioned() -> tuple[Tensor, Tensor]:
    weight = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    weight.grad = torch.randn(6, dtype=torch.float64)
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.0, 0.9), eps=0.1)
    adam.step()
    moment = adam.state[weight]["exp_avg_sq"]
    found = adam_preconditioned(weight.grad, moment, beta2=0.9, step=1, eps=0.1)
    return found, -weight.detach()


def _no_gradient(*results: Tensor) -> bool:
    """Bits and codes are no smooth function of anything; nothing may pretend that they are."""
    return not any(x.requires_grad for x in results)


def _words_of_philox(counter: int, seed: int) -> list[int]:
    """In Python's own integers, for step 3 and stream 4."""
    state, key = [counter % 2**32, counter >> 32, 3, 4], [seed % 2**32, seed >> 32]
    for _ in range(10):
        one, other = 0xD2511F53 * state[0], 0xCD9E8D57 * state[2]
        state = [
            other // 2**32 ^ state[1] ^ key[0],
            other % 2**32,
            one // 2**32 ^ state[3] ^ key[1],
            one % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return state


def _grad_random_bits() -> bool:
    return _no_gradient(random_bits(5, seed=0))


def _hand_random_bits() -> tuple[Tensor, list[int]]:
    return random_bits(3, seed=0, offset=1), [0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def _offset_random_bits() -> tuple[Tensor, Tensor]:
    halves = [random_bits(5, seed=1, offset=k) for k in (0, 5)]
    return torch.cat(halves), random_bits(10, seed=1)


def _python_random_bits() -> tuple[Tensor, list[int]]:
    start, seed = 2**33 + 5, 2**63 + 12345
    expected = [word for k in range(3) for word in _words_of_philox(start + k, seed)]
    return random_bits(12, seed=seed, step=3, stream=4, offset=4 * start), expected


def _grad_round_stochastic() -> bool:
    return _no_gradient(round_stochastic(torch.randn(5, requires_grad=True), seed=0))


def _hand_round_stochastic() -> tuple[Tensor, list[float]]:
    # The low halves of the words are 0xe8d5 and 0xc58d: one adds up to a carry, the other does not.
    x = torch.tensor([0x3F804000, 0x3F803000], dtype=torch.int32).view(torch.float32)
    return round_stochastic(x, seed=0), [1.0078125, 1.0]


def _mirrored_round_stochastic() -> tuple[Tensor, Tensor]:
    x = torch.randn(100)
    return round_stochastic(-x, seed=1), -round_stochastic(x, seed=1)


def _numpy_round_stochastic() -> tuple[Tensor, list[float]]:
    x = torch.randn(500)
    wide = x.double().numpy()
    unit = 2.0 ** (np.floor(np.log2(np.abs(wide))) - 7)
    noise = (random_bits(500, seed=3).numpy() % 2**16) / 2**16
    expected = np.sign(wide) * np.floor(np.abs(wide) / unit + noise) * unit
    return round_stochastic(x, seed=3), expected.tolist()


STATES = [("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8", True)]


def _state(format: str, signed: bool, shape: Sequence[int] = (3, 50)) -> QuantizedState:
    x = torch.randn(shape, dtype=torch.float64)
    return encode_state(x if signed else x.square(), format, signed=signed)


def _grad_through(read: Callable[[QuantizedState], Tensor]) -> bool:
    states = [_state(*kind) for kind in STATES]
    return all(
        torch.autograd.gradcheck(
            lambda scales, state=state: read(state._replace(scales=scales)),
            state.scales.requires_grad_(),
        )
        for state in states
    )


def _dynamic_numbers(bits: int, signed: bool) -> np.ndarray:
    """The dynamic data type read off its bit strings; of two zeros and what is left, one is 1."""
    numbers = [0.0, 1.0]
    for pattern in range(1 if signed else 2, 1 << (bits - signed)):
        string = f"{pattern:0{bits - signed}b}"
        zeros = len(string) - len(string.lstrip("0"))
        fraction = string[zeros + 1 :]
        share = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
        number = 10.0**-zeros * (0.1 * (1 - share) + share)
        numbers += [number, -number] if signed else [number]
    return np.sort(numbers)


def _twice(state: QuantizedState) -> QuantizedState:
    factor = torch.tensor([2.0, 1.0]) if state.format == "fp8" else 2.0
    return state._replace(scales=state.scales * factor)


def _hand_decode_state() -> tuple[Tensor, list[list[float]]]:
    codes, scales = [0xF0, 0x73], [2.0, 1.0, 4.0, 1.0]  # of two rows, then of two columns
    codes, scales = torch.tensor(codes, dtype=torch.uint8), torch.tensor(scales)
    state = QuantizedState(codes, scales, "int4", (2, 2), False)
    return decode_state(state), [[2 / 16, 1], [4 / 16, 8 / 16]]


def _scaled_decode_state() -> tuple[Tensor, Tensor]:
    states = [_state(*kind) for kind in STATES]
    return _flat([decode_state(_twice(x)) for x in states]), 2 * _flat(
        [decode_state(x) for x in states]
    )


def _numpy_decode_state() -> tuple[Tensor, np.ndarray]:
    state = _state("int8", True, (300,))
    scales = np.repeat(state.scales.numpy(), [256, 44])
    return decode_state(state), _dynamic_numbers(8, True)[state.codes.numpy()] * scales


def _grad_encode_state() -> bool:
    x = torch.randn(5, requires_grad=True)
    states = [encode_state(x, format) for format in ("float32", "bfloat16", "int8", "int4", "fp8")]
    return _no_gradient(*(x.scales for x in states), *(decode_state(x) for x in states))


def _hand_encode_state() -> tuple[Tensor, list[int]]:
    # Of the map …, −0.8875 (0); 0 (7), 0.0055, 0.0325, 0.0775 (10), …, 0.4375 (12), …, 1 (15).
    x = torch.tensor([2.0, -2.0, 0.0, 0.15, 0.9])
    return encode_state(x, "int4").codes, [15 + 16 * 0, 7 + 16 * 10, 12]


def _scaled_encode_state() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 50)
    inputs = [(x if signed else x.square(), format, signed) for format, signed in STATES]
    plain = [encode_state(y, format, signed=signed).codes for y, format, signed in inputs]
    eighth = [encode_state(y / 8, format, signed=signed).codes for y, format, signed in inputs]
    return _flat(eighth), _flat(plain)


def _numpy_encode_state() -> tuple[Tensor, np.ndarray]:
    x = torch.randn(2, 256, dtype=torch.float64)
    shares = (x / x.abs().amax(1, keepdim=True)).numpy()
    nearest = np.abs(shares[..., None] - _dynamic_numbers(8, True)).argmin(-1)
    return encode_state(x, "int8").codes, nearest


def _grad_zero_state() -> bool:
    state = zero_state((3,), "fp8")
    return _no_gradient(state.codes, state.scales)


def _hand_zero_state() -> tuple[Tensor, list[int]]:
    return zero_state((3,), "int4").codes, [0x77, 0x07]


def _read_zero_state() -> tuple[Tensor, Tensor]:
    read = [decode_state(zero_state((3, 50), kind, signed=signed)) for kind, signed in STATES]
    return _flat(read), torch.zeros(len(STATES) * 150)


def _encoded_zero_state() -> tuple[Tensor, Tensor]:
    made = [zero_state((3, 51), kind, signed=signed) for kind, signed in STATES]
    found = [encode_state(torch.zeros(3, 51), kind, signed=signed) for kind, signed in STATES]
    flat = [_flat([y for x in states for y in x[:2]]) for states in (made, found)]
    return flat[0], flat[1]


def _scaled(x: Tensor, format: str, signed: bool, factor: float) -> Tensor:
    state = encode_state(x, format, signed=signed)
    scale_state_(state, factor)
    return decode_state(state)


def _grad_scale_state() -> bool:
    state = encode_state(torch.randn(3), "fp8")
    scale_state_(state, 2.0)
    return _no_gradient(state.codes, state.scales)


def _hand_scale_state() -> tuple[Tensor, list[float]]:
    state = torch.tensor([1.0, -2.0])
    scale_state_(state, 0.5)
    return state, [0.5, -1.0]


def _undone_scale_state() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 50).abs()
    formats = [("float32", True), *STATES]
    found = [_scaled(x, kind, signed, 8.0) / 8.0 for kind, signed in formats]
    return _flat(found), _flat([_scaled(x, kind, signed, 1.0) for kind, signed in formats])


def _decoded_scale_state() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 50).abs()
    read = [decode_state(encode_state(x, kind, signed=signed)) * 0.25 for kind, signed in STATES]
    return _flat([_scaled(x, kind, signed, 0.25) for kind, signed in STATES]), _flat(read)


def _grad_state_bytes() -> bool:
    return isinstance(state_bytes(zero_state((3,), "int8")), int)


def _hand_state_bytes() -> tuple[Tensor, list[int]]:
    states = [zero_state((256,), format) for format in ("bfloat16", "int8", "int4", "fp8")]
    return torch.tensor([state_bytes(x) for x in states]), [512, 260, 136, 272]


def _doubled_state_bytes() -> tuple[Tensor, Tensor]:
    sizes = [[state_bytes(zero_state((n,), kind)) for kind, _ in STATES] for n in (512, 1024)]
    return torch.tensor(sizes[1]), 2 * torch.tensor(sizes[0])


def _storage_state_bytes() -> tuple[Tensor, list[int]]:
    states = [_state(*kind) for kind in STATES]
    expected = [sum(y.untyped_storage().nbytes() for y in x[:2]) for x in states]
    return torch.tensor([state_bytes(x) for x in states]), expected


def _hand_export_state() -> tuple[Tensor, list[int]]:
    return export_state(encode_state(torch.tensor([0.5, -1.0, 0.0]), "int4"))["codes"], [12, 0, 7]


def _loaded_export_state() -> tuple[Tensor, Tensor]:
    file, states = io.BytesIO(), [_state(*kind) for kind in STATES]
    torch.save([export_state(x) for x in states], file)
    file.seek(0)
    loaded = [import_state(x) for x in torch.load(file, weights_only=True)]
    return _flat([decode_state(x) for x in loaded]), _flat([decode_state(x) for x in states])


def _numpy_export_state() -> tuple[Tensor, np.ndarray]:
    state = _state("int4", True, (3, 5))
    strings = "".join(f"{byte:08b}"[::-1] for byte in state.codes.tolist())
    codes = [int(strings[4 * i : 4 * i + 4][::-1], 2) for i in range(15)]
    return export_state(state)["codes"], np.array(codes).reshape(3, 5)


def _coded() -> list[QuantizedState]:
    return [_state(*kind, (5, 3, 50)) for kind in STATES if kind[0] in ("int8", "int4", "fp8")]


def _from_rows(rows: dict[str, Tensor], like: QuantizedState) -> QuantizedState:
    return state_from_rows(rows, like.format, signed=like.signed)


def _grad_state_to_rows() -> bool:
    return _no_gradient(*(x for state in _coded() for x in state_to_rows(state).values()))


def _grad_state_from_rows() -> bool:
    back = [_from_rows(state_to_rows(x), x) for x in _coded()]
    return _no_gradient(*(y for x in back for y in x[:2]))


def _hand_state_to_rows() -> tuple[Tensor, list[list[float]]]:
    x = torch.arange(600.0).view(3, 200)
    return state_to_rows(encode_state(x, "int8"))["scales"], [[255, 511], [255, 511], [511, 599]]


def _scaled_state_to_rows() -> tuple[Tensor, Tensor]:
    states = _coded()
    rows = [state_to_rows(x)["codes"] for x in states]
    larger = [state_to_rows(x._replace(scales=x.scales * 2))["codes"] for x in states]
    return _flat(larger), _flat(rows)


def _numpy_state_to_rows() -> tuple[Tensor, np.ndarray]:
    x = torch.randn(7, 150).abs()
    most = np.array([part.max() for part in np.split(x.view(-1).numpy(), range(128, 1050, 128))])
    met = np.minimum(np.arange(7)[:, None] * 150 // 128 + np.arange(3), len(most) - 1)
    return state_to_rows(encode_state(x, "int4"))["scales"], most[met]


def _hand_state_from_rows() -> tuple[Tensor, list[int]]:
    rows = {"codes": torch.tensor([[12, 0], [7, 15]], dtype=torch.uint8)}
    rows |= {"scales": torch.ones(2, 2), "offsets": torch.tensor([0, 2], dtype=torch.int16)}
    return state_from_rows(rows, "int4").codes, [12, 7 + 16 * 15]


def _round_trip_state_from_rows() -> tuple[Tensor, Tensor]:
    made = _coded()
    back = [_from_rows(state_to_rows(x), x) for x in made]
    both = [_flat([y for x in states for y in x[:2]]) for states in (back, made)]
    return both[0], both[1]


def _sliced_state_from_rows() -> tuple[Tensor, Tensor]:
    """Of rows of whole blocks some are by themselves what they were."""
    whole = [encode_state(torch.randn(4, 256), format) for format in ("int8", "int4", "fp8")]
    parts = [{k: x[1:3] for k, x in state_to_rows(state).items()} for state in whole]
    read = [decode_state(_from_rows(*pair)) for pair in zip(parts, whole, strict=True)]
    return _flat(read), _flat([decode_state(state)[1:3] for state in whole])


def _hand_import_state() -> tuple[Tensor, list[int]]:
    saved = {"codes": torch.tensor([12, 0, 7], dtype=torch.uint8), "scales": torch.ones(1)}
    return import_state({**saved, "format": "int4", "signed": True}).codes, [12, 7]


def _round_trip_import_state() -> tuple[Tensor, Tensor]:
    states = [_state(*kind) for kind in STATES]
    back = [import_state(export_state(x)) for x in states]
    return _flat([y for x in back for y in x[:2]]), _flat([y for x in states for y in x[:2]])


def _encoded_import_state() -> tuple[Tensor, Tensor]:
    state = _state("int4", False, (5, 7))
    codes = (decode_state(state) * 16 / _rank_one(state) - 1).round().to(torch.uint8)
    saved = {"codes": codes, "scales": state.scales, "format": "int4", "signed": False}
    return import_state(saved).codes, state.codes


def _rank_one(state: QuantizedState) -> Tensor:
    return torch.minimum(*torch.meshgrid(state.scales[:5], state.scales[5:], indexing="ij"))


def _expanded(scales: Tensor, codes: Sequence[int] = (0x7E, 0x76, 0xF6, 0x00)) -> Tensor:
    codes = torch.tensor(codes, dtype=torch.uint8)
    return decode_state(QuantizedState(codes, scales, "fp8", tuple(codes.shape), True))


def _grad_quantized_state() -> bool:
    return torch.autograd.gradcheck(_expanded, torch.rand(1, 2).double().add(1).requires_grad_())


def _hand_quantized_state() -> tuple[Tensor, list[float]]:
    return _expanded(torch.tensor([[2.0, 1.0]])), [2, 1, -1, 0]  # of 448, 224, −224 and 0


def _powers_quantized_state() -> tuple[Tensor, Tensor]:
    squares, roots = (_expanded(torch.tensor([[1.0, power]])) for power in (1.0, 2.0))
    return roots * roots.abs(), squares


def _numpy_quantized_state() -> tuple[Tensor, np.ndarray]:
    codes = [code for code in range(256) if code & 0x7F != 0x7F][:128]
    numbers = torch.tensor(codes).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    expected = np.sign(numbers) * 3 * (np.abs(numbers) / 448) ** (1 / 1.375)
    return _expanded(torch.tensor([[3.0, 1.375]]).double(), codes), expected


UPDATES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.0, "weight_decay": 0.5},
    "lion": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.5},
    "sgd": {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.5, "nesterov": True},
}
UPDATE_SCALES = {"adamw": [1, 4, 4, 16, 1], "lion": [1, 4, 4], "sgd": [4, 4, 4]}


def _update_lists(kind: str) -> list[list[Tensor]]:
    """Parameters, gradients, moments and, for AdamW, steps."""
    lists = [_tensors() for _ in range(4 if kind == "adamw" else 3)]
    if kind != "adamw":
        return lists
    steps = [torch.tensor(k + 1.0) for k in range(len(SHAPES))]
    return [*lists[:3], [x.abs() + 0.1 for x in lists[3]], steps]


def _update_one(kind: str, *row: Tensor) -> Tensor:
    return _flat(getattr(functional, f"{kind}_update")(*row, **UPDATES[kind]))


def _update_all(kind: str, lists: Sequence[Sequence[Tensor]]) -> Tensor:
    lists = [[x.clone() for x in column] for column in lists]
    getattr(functional, f"{kind}_update_")(*lists, **UPDATES[kind])
    return torch.cat([_flat([w, *states]) for w, _, *states in zip(*lists[:4], strict=True)])


def _grad_update(kind: str) -> bool:
    row = [column[0] for column in _update_lists(kind)]
    inputs = [x.requires_grad_() for x in row[:4]]
    return torch.autograd.gradcheck(lambda *x: _update_one(kind, *x, *row[4:]), inputs)


def _grad_update_(kind: str) -> bool:
    lists = _update_lists(kind)
    for x in lists[0] + lists[1]:
        x.requires_grad_()
    getattr(functional, f"{kind}_update_")(*lists, **UPDATES[kind])
    return all(x.is_leaf for column in lists for x in column)


HAND_UPDATES: dict[str, tuple[list[list[float]], list[float]]] = {
    # m̂ = g and v̂ = g² at the first step.
    "adamw": ([[1, 1], [4, -2], [0, 0], [0, 0]], [0.85, 1.05, 0.8, -0.4, 1.6, 0.4]),
    "lion": ([[1, 1, 2], [4, -1, 0], [-2, 0, 0]], [1.05, 1.05, 1.9, -1.4, -0.1, 0]),
    # d = g + w/2 and b = b/2 + d; w loses a tenth of d + b/2.
    "sgd": ([[2, -4], [3, 1], [4, 0]], [1.3, -3.85, 6, -1]),
}


def _hand_inputs(kind: str) -> list[Tensor]:
    inputs = [torch.tensor(x, dtype=torch.float64) for x in HAND_UPDATES[kind][0]]
    return inputs + [torch.tensor(1.0)] * (kind == "adamw")


def _rounded(found: Tensor) -> Tensor:
    return found.mul(1e9).round() / 1e9 + 0.0


def _hand_update(kind: str) -> tuple[Tensor, list[float]]:
    return _rounded(_update_one(kind, *_hand_inputs(kind))), HAND_UPDATES[kind][1]


def _hand_update_(kind: str) -> tuple[Tensor, list[float]]:
    found = _update_all(kind, [[x] for x in _hand_inputs(kind)])
    return _rounded(found), HAND_UPDATES[kind][1]


def _scaled_update(kind: str) -> tuple[Tensor, Tensor]:
    row = [column[0] for column in _update_lists(kind)]
    scales, size = UPDATE_SCALES[kind], row[0].numel()
    scaled = [x * scale for x, scale in zip(row, scales, strict=True)]
    return _update_one(kind, *scaled)[:size], scales[0] * _update_one(kind, *row)[:size]


def _one_by_one_update_(kind: str) -> tuple[Tensor, Tensor]:
    lists = _update_lists(kind)
    single = [_update_all(kind, [[x] for x in row]) for row in zip(*lists, strict=True)]
    return torch.cat(single), _update_all(kind, lists)


def _lion_in_python(weights: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """Algorithm 2 of the paper, number by number."""
    theta, eta, decay = _flat(weights).tolist(), 0.1, 0.5
    m = [0.0] * len(theta)
    for step in grads:
        for i, g in enumerate(_flat(step).tolist()):
            c = 0.8 * m[i] + (1 - 0.8) * g
            theta[i] = theta[i] - eta * ((c > 0) - (c < 0) + decay * theta[i])
            m[i] = 0.9 * m[i] + (1 - 0.9) * g
    return torch.tensor(theta, dtype=torch.float64)


def _outside_steps(
    kind: str, weights: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> Tensor:
    if kind == "lion":
        return _lion_in_python(weights, grads)
    parameters = [torch.nn.Parameter(x.clone()) for x in weights]
    optimizer_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    optimizer = optimizer_class(parameters, foreach=False, **UPDATES[kind])
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return _flat([x.detach() for x in parameters])


def _outside_update(kind: str) -> tuple[Tensor, Tensor]:
    weights, grads = _tensors(), _parts(50)
    after = []
    for i, weight in enumerate(weights):
        moments = [torch.zeros_like(weight)] * (2 if kind == "adamw" else 1)
        for t, step in enumerate(grads, 1):
            count = [torch.tensor(float(t))] * (kind == "adamw")
            row = [weight, step[i], *moments, *count]
            weight, *moments = getattr(functional, f"{kind}_update")(*row, **UPDATES[kind])
        after.append(weight)
    return _flat(after), _outside_steps(kind, weights, grads)


def _outside_update_(kind: str) -> tuple[Tensor, Tensor]:
    weights, grads = _tensors(), _parts(50)
    after = [x.clone() for x in weights]
    moments = [[torch.zeros_like(x) for x in weights] for _ in range(1 + (kind == "adamw"))]
    for t, step in enumerate(grads, 1):
        count = [[torch.tensor(float(t)) for _ in weights]] * (kind == "adamw")
        lists = [after, step, *moments, *count]
        getattr(functional, f"{kind}_update_")(*lists, **UPDATES[kind])
    return _flat(after), _outside_steps(kind, weights, grads)


def _grad_split_weight() -> bool:
    return _no_gradient(*split_weight(torch.randn(5, requires_grad=True)))


def _hand_split_weight() -> tuple[Tensor, list[list[float]]]:
    # A place of bfloat16 is 1/128 at 1 and 1/256 just below it; an error counts 256ths of a place.
    rounded, errors = split_weight(torch.tensor([1 + 5 / 2**15, 1 - 3 / 2**16, -6.0]))
    return torch.stack([rounded, errors]), [[1, 1, -6], [5, -3, 0]]


def _scaled_split_weight() -> tuple[Tensor, Tensor]:
    x = torch.randn(100)
    plain, other = split_weight(x), split_weight(-8 * x)
    return torch.stack([other[0] / -8, -other[1]]).abs(), torch.stack(plain).abs()


def _numpy_split_weight() -> tuple[Tensor, np.ndarray]:
    x = 1 + 0.99 * torch.rand(500)  # of one exponent, so that all places are 1/128
    wide = x.double().numpy()
    short = np.round(wide * 2**15)
    nearest = np.floor((short + 128) / 256)
    return torch.stack(split_weight(x)).double(), np.stack([nearest / 128, short - 256 * nearest])


def _grad_join_weight() -> bool:
    return _no_gradient(join_weight(*split_weight(torch.randn(5, requires_grad=True))))


def _hand_join_weight() -> tuple[Tensor, list[float]]:
    rounded = torch.tensor([1.0, 1.0, -6.0], dtype=torch.bfloat16)
    errors = torch.tensor([5, -3, 0], dtype=torch.int8)
    return join_weight(rounded, errors), [1 + 5 / 2**15, 1 - 3 / 2**16, -6]


def _round_trip_join_weight() -> tuple[Tensor, Tensor]:
    once = join_weight(*split_weight(torch.randn(100)))
    return join_weight(*split_weight(once)), once


def _numpy_join_weight() -> tuple[Tensor, np.ndarray]:
    x = torch.randn(500)
    fraction, exponent = np.frexp(x.double().numpy())
    return join_weight(*split_weight(x)), np.ldexp(np.round(fraction * 2**16), exponent - 16)


def _quantized(
    *shape: int, format: str = "int8", symmetric: bool = True, dtype: torch.dtype = torch.float64
) -> Quantized:
    return quantize(torch.randn(shape, dtype=dtype), format, block_size=16, symmetric=symmetric)


def _grad_of_scales(read: Callable[[Quantized], Tensor]) -> bool:
    found = _quantized(3, 37, format="int4", symmetric=False)
    assert found.shifts is not None
    inputs = (found.scales.requires_grad_(), found.shifts.requires_grad_())
    return torch.autograd.gradcheck(
        lambda scales, shifts: read(found._replace(scales=scales, shifts=shifts)), inputs
    )


def _grad_quantized() -> bool:
    return _grad_of_scales(lambda found: dequantize(Quantized(*found)))


def _hand_quantized() -> tuple[Tensor, list[int]]:
    found = quantize(torch.randn(3, 1000), "int4", block_size=64)
    return torch.tensor([found.nbytes, *found.shape]), [3 * (500 + 4 * 16), 3, 1000]


def _sliced_quantized() -> tuple[Tensor, Tensor]:
    found = _quantized(5, 20)
    rows = found._replace(codes=found.codes[1:3], scales=found.scales[1:3])
    return dequantize(rows), dequantize(found)[1:3]


def _numpy_quantized() -> tuple[Tensor, list[list[float]]]:
    found = _quantized(2, 32, dtype=torch.float32)
    codes = found.codes.numpy().view(np.int8).reshape(2, 2, 16).astype(np.float32)
    return dequantize(found), (codes * found.scales.numpy()[..., None]).reshape(2, 32).tolist()


def _grad_quantize() -> bool:
    found = quantize(torch.randn(3, 20, requires_grad=True), "int4", symmetric=False)
    return _no_gradient(*(x for x in found if isinstance(x, Tensor)))


def _hand_quantize() -> tuple[Tensor, list[int]]:
    x = torch.tensor([7.0, -3.4, 0.5, 1.5, -7.0])  # ties go to the even code
    return quantize(x, "int4").codes, [0xD7, 0x20, 0x09]


def _scaled_quantize() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 100)
    codes = [quantize(y, name).codes for name in ("int8", "mxfp4_e2m1") for y in (x, 2.0**-9 * x)]
    return torch.cat([codes[1], codes[3]], -1), torch.cat([codes[0], codes[2]], -1)


def _numpy_quantize() -> tuple[Tensor, list[int]]:
    x = torch.randn(64)
    blocks = x.numpy().reshape(4, 16)
    scales = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks * (np.float32(1) / scales)).astype(np.int8)
    return quantize(x, "int8", block_size=16).codes, codes.flatten().view(np.uint8).tolist()


def _grad_dequantize() -> bool:
    return _grad_of_scales(dequantize)


def _hand_dequantize() -> tuple[Tensor, list[float]]:
    codes = torch.tensor([0x7F, 0x81], dtype=torch.uint8)  # 127 and −127 of 64 in units of 2³
    scales = torch.tensor([130], dtype=torch.uint8)
    return dequantize(Quantized(codes, scales, None, "mxint8", 32, 2)), [15.875, -15.875]


def _again_dequantize() -> tuple[Tensor, Tensor]:
    read = dequantize(quantize(torch.randn(2, 100), "mxfp6_e2m3"))
    return dequantize(quantize(read, "mxfp6_e2m3")), read


def _torch_dequantize() -> tuple[Tensor, Tensor]:
    found = quantize(torch.randn(16), "fp8_e4m3", block_size=16)
    return dequantize(found), found.codes.view(torch.float8_e4m3fn).float() * found.scales


def _grad_quantized_bytes() -> bool:
    return isinstance(quantized_bytes(3, "int8"), int)  # a number of Python's: nothing to derive


def _hand_quantized_bytes() -> tuple[Tensor, list[int]]:
    sizes = [
        quantized_bytes(256, "int8"),
        quantized_bytes(257, "int8", symmetric=False),
        quantized_bytes(33, "mxfp4_e2m1"),
    ]
    return torch.tensor(sizes), [256 + 4, 257 + 2 * 8, 17 + 2]


def _added_quantized_bytes() -> tuple[Tensor, Tensor]:
    sizes = torch.tensor([quantized_bytes(n, "int4", block_size=64) for n in (640, 77, 717)])
    return sizes[0] + sizes[1], sizes[2]  # rows of whole blocks add up


def _measured_quantized_bytes() -> tuple[Tensor, list[int]]:
    x = torch.randn(77)
    names = ["int8", "int4", "fp8_e5m2", "mxint8", "mxfp6_e3m2", "mxfp4_e2m1"]
    sizes = torch.tensor([quantized_bytes(77, name) for name in names])
    return sizes, [quantize(x, name).nbytes for name in names]


def _grad_dequantize_reduce() -> bool:
    return _grad_of_scales(dequantize_reduce)


def _hand_dequantize_reduce() -> tuple[Tensor, list[float]]:
    sent = torch.tensor([[7.0, -2.0], [-7.0, 4.0]])
    return dequantize_reduce(quantize(sent, "int4")), [0.0, 1.0]


def _order_dequantize_reduce() -> tuple[Tensor, Tensor]:
    found = _quantized(5, 40)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = found._replace(codes=found.codes[order], scales=found.scales[order])
    return dequantize_reduce(turned), dequantize_reduce(found)


def _stacked_dequantize_reduce() -> tuple[Tensor, Tensor]:
    found = _quantized(5, 3, 40, format="int4", symmetric=False)
    return dequantize_reduce(found, reduction="sum"), dequantize(found).sum(0)


def _grad_dequantize_reduce_quantize() -> bool:
    found = _quantized(3, 20)
    found = dequantize_reduce_quantize(found._replace(scales=found.scales.requires_grad_()))
    return _no_gradient(found.codes, found.scales)


def _hand_dequantize_reduce_quantize() -> tuple[Tensor, list[int]]:
    sent = quantize(torch.tensor([[7.0, -2.0], [-7.0, 4.0]]), "int4")
    return dequantize_reduce_quantize(sent).codes, [0x70]  # 0 and 1, in units of 1/7


def _alone_dequantize_reduce_quantize() -> tuple[Tensor, Tensor]:
    found = _quantized(1, 100, dtype=torch.float32)
    return dequantize_reduce_quantize(found).codes, found.codes[0]


def _steps_dequantize_reduce_quantize() -> tuple[Tensor, Tensor]:
    found = _quantized(3, 100)
    expected = quantize(dequantize(found).mean(0), "int4", block_size=16)
    return dequantize_reduce_quantize(found, format="int4").codes, expected.codes


def _signs(*shape: int) -> Tensor:
    return torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)


def _grad_pack_signs() -> bool:
    return _no_gradient(pack_signs(torch.randn(9, requires_grad=True)))


def _hand_pack_signs() -> tuple[Tensor, list[int]]:
    x = torch.tensor([-1.0, 0.0, -0.0, -1e-40, torch.nan, 2.0, 1.0, -3.0, -1.0])
    return pack_signs(x), [0b10001001, 1]


def _scaled_pack_signs() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 37)
    return pack_signs(torch.rand(3, 37) * x), pack_signs(x)


def _numpy_pack_signs() -> tuple[Tensor, list[list[int]]]:
    x = torch.randn(3, 37)
    return pack_signs(x), np.packbits(x.numpy() < 0, axis=-1, bitorder="little").tolist()


def _grad_unpack_signs() -> bool:
    return _no_gradient(unpack_signs(pack_signs(torch.randn(9, requires_grad=True)), 9))


def _hand_unpack_signs() -> tuple[Tensor, list[float]]:
    return unpack_signs(torch.tensor([0b101, 1], dtype=torch.uint8), 9), [-1, 1, -1] + 5 * [1] + [
        -1
    ]


def _packed_unpack_signs() -> tuple[Tensor, Tensor]:
    signs = _signs(3, 37)
    return unpack_signs(pack_signs(signs), 37), signs


def _numpy_unpack_signs() -> tuple[Tensor, list[list[int]]]:
    packed = pack_signs(_signs(3, 37))
    bits = np.unpackbits(packed.numpy(), axis=-1, count=37, bitorder="little")
    return unpack_signs(packed, 37), (1 - 2.0 * bits).tolist()


def _grad_sum_signs() -> bool:
    return _no_gradient(sum_signs(pack_signs(torch.randn(3, 9, requires_grad=True)), 9))


def _hand_sum_signs() -> tuple[Tensor, list[int]]:
    return sum_signs(torch.tensor([[1], [3], [2], [2]], dtype=torch.uint8), 3), [0, -2, 4]


def _mirrored_sum_signs() -> tuple[Tensor, Tensor]:
    signs = _signs(5, 37)
    return sum_signs(pack_signs(-signs), 37), -sum_signs(pack_signs(signs), 37)


def _torch_sum_signs() -> tuple[Tensor, list[float]]:
    signs = _signs(200, 2, 37)
    return sum_signs(pack_signs(signs), 37), signs.sum(0).tolist()


def _grad_majority_vote() -> bool:
    return _no_gradient(majority_vote(pack_signs(torch.randn(3, 9, requires_grad=True))))


def _hand_majority_vote() -> tuple[Tensor, list[list[int]]]:
    packed = torch.tensor([[0b011], [0b101], [0b001], [0b100]], dtype=torch.uint8)
    return majority_vote(packed), [[0b001], [0b100]]


def _order_majority_vote() -> tuple[Tensor, Tensor]:
    packed = pack_signs(_signs(4, 37))
    return majority_vote(packed.flip(0)), majority_vote(packed)


def _torch_majority_vote() -> tuple[Tensor, list[float]]:
    signs = _signs(6, 2, 37)
    return unpack_votes(majority_vote(pack_signs(signs)), 37), signs.sum(0).sign().tolist()


def _grad_unpack_votes() -> bool:
    votes = majority_vote(pack_signs(torch.randn(4, 9, requires_grad=True)))
    return _no_gradient(unpack_votes(votes, 9))


def _hand_unpack_votes() -> tuple[Tensor, list[float]]:
    votes = torch.tensor([[0b001], [0b100]], dtype=torch.uint8)
    return unpack_votes(votes, 3), [-1, 1, 0]


def _one_plane_unpack_votes() -> tuple[Tensor, Tensor]:
    packed = pack_signs(_signs(2, 37))
    return unpack_votes(packed.unsqueeze(-2), 37), unpack_signs(packed, 37)


def _mode_unpack_votes() -> tuple[Tensor, Tensor]:
    signs = _signs(5, 37)
    return unpack_votes(majority_vote(pack_signs(signs)), 37), signs.mode(0).values


def _moved(decay: float | Tensor, averages: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    moved = [x.clone() for x in averages]
    ema_update_(moved, values, decay)
    return torch.cat([x.flatten() for x in moved])


def _grad_ema_update_() -> bool:
    count = len(SHAPES)
    inputs = tuple(x.requires_grad_() for x in [*_tensors(), *_tensors()])
    numbers = torch.autograd.gradcheck(lambda *x: _moved(0.7, x[:count], x[count:]), inputs)
    decay = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return numbers and torch.autograd.gradcheck(
        lambda rho, *x: _moved(rho, x[:count], x[count:]), (decay, *inputs)
    )


def _hand_ema_update_() -> tuple[Tensor, list[float]]:
    return _moved(0.75, [torch.tensor([0.0, 8.0])], [torch.tensor([4.0, 0.0])]), [1, 6]


def _two_steps_ema_update_() -> tuple[Tensor, Tensor]:
    averages, values = _tensors(), _tensors()
    once = [x.clone() for x in averages]
    ema_update_(once, values, 0.9)
    return _moved(0.9, once, values), _moved(0.81, averages, values)


def _swa_utils_ema_update_() -> tuple[Tensor, Tensor]:
    averages, values = _tensors(), _tensors()
    theirs = torch.optim.swa_utils.get_ema_avg_fn(0.9)
    moved = [theirs(x, y, torch.tensor(1)) for x, y in zip(averages, values, strict=True)]
    return _moved(0.9, averages, values), torch.cat([x.flatten() for x in moved])


def _grad_diff_sq_norms() -> bool:
    count = len(SHAPES)
    inputs = tuple(x.requires_grad_() for x in [*_tensors(), *_tensors()])
    whole = torch.autograd.gradcheck(lambda *x: diff_sq_norms(x[:count], x[count:]), inputs)
    return whole and torch.autograd.gradcheck(
        lambda *x: diff_sq_norms(x[:count], x[count:], GROUPS), inputs
    )


def _hand_diff_sq_norms() -> tuple[Tensor, list[float]]:
    one = [torch.tensor([3.0, 5.0]), None, torch.tensor(2.0)]
    other = [torch.tensor([0.0, 1.0]), torch.tensor([2.0]), None]
    return diff_sq_norms(one, other, [0, 3, 1]), [25, 4, 0, 4]


def _shifted_diff_sq_norms() -> tuple[Tensor, Tensor]:
    one, other, by = _parts(3)
    moved = [[x + z for x, z in zip(each, by, strict=True)] for each in (one, other)]
    return diff_sq_norms(*moved, GROUPS), diff_sq_norms(one, other, GROUPS)


def _numpy_diff_sq_norms() -> tuple[Tensor, list[float]]:
    one, other = _parts(2)
    pairs = zip(one, other, strict=True)
    return diff_sq_norms(one, other), sum(
        float(np.linalg.norm(x.numpy() - y.numpy()) ** 2) for x, y in pairs
    )


def _grad_accumulated_sq_norms() -> bool:
    count = len(SHAPES)
    inputs = tuple(x.requires_grad_() for x in [*_tensors(), *_tensors()])
    return torch.autograd.gradcheck(
        lambda *x: accumulated_sq_norms(x[:count], x[count:], GROUPS), inputs
    )


def _hand_accumulated_sq_norms() -> tuple[Tensor, list[list[float]]]:
    accumulated = [torch.tensor([3.0, 4.0]), torch.tensor(2.0), None]
    before = [torch.tensor([3.0, 1.0]), None, None]
    return accumulated_sq_norms(accumulated, before, [0, 1, 2]), [[9, 4, 0], [25, 4, 0], [3, 0, 0]]


def _exchanged_accumulated_sq_norms() -> tuple[Tensor, Tensor]:
    # What comes first and what is added to it have the same product.
    first, second = _parts(2)
    whole = [x + y for x, y in zip(first, second, strict=True)]
    return accumulated_sq_norms(whole, first)[1:], accumulated_sq_norms(whole, second)[1:]


def _three_sums_accumulated_sq_norms() -> tuple[Tensor, Tensor]:
    first, second = _parts(2)
    whole = [x + y for x, y in zip(first, second, strict=True)]
    expected = [*sq_norms(second)[None], *sq_norms(whole)[None], *inner_products([second], first)]
    return accumulated_sq_norms(whole, first), torch.stack(expected)


def _in_place(accumulated: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    kept = [x.clone() for x in before]
    found = accumulated_sq_norms_(accumulated, kept, GROUPS)
    return torch.cat([found.flatten(), *(x.flatten() for x in kept)])


def _grad_accumulated_sq_norms_() -> bool:
    return not _in_place([x.requires_grad_() for x in _tensors()], _tensors()).requires_grad


def _hand_accumulated_sq_norms_() -> tuple[Tensor, list[float]]:
    before = [torch.tensor([3.0, 1.0]), torch.tensor([7.0])]
    found = accumulated_sq_norms_([torch.tensor([3.0, 4.0]), None], before)
    return torch.cat([found, *before]), [9 + 49, 25, 3 - 49, 3, 4, 0]


def _sum_of_parts_accumulated_sq_norms_() -> tuple[Tensor, Tensor]:
    # |G|² − Σ|g|² = 2 Σ⟨g, what was there before⟩ however many parts there are.
    parts = _parts(5)
    before, total = ([torch.zeros_like(x) for x in parts[0]] for _ in range(2))
    rows = []
    for part in parts:
        total = [x + y for x, y in zip(total, part, strict=True)]
        rows.append(accumulated_sq_norms_(total, before))
    part, whole, product = torch.stack(rows).T
    return 2 * product.sum(), whole[-1] - part.sum()


def _not_in_place_accumulated_sq_norms_() -> tuple[Tensor, Tensor]:
    accumulated, before = _parts(2)
    expected = [accumulated_sq_norms(accumulated, before, GROUPS), *accumulated]
    return _in_place(accumulated, before), torch.cat([x.flatten() for x in expected])


def _grad_unit_norms() -> bool:
    inputs = tuple(x.requires_grad_() for x in _tensors())
    return torch.autograd.gradcheck(lambda *x: tuple(unit_norms(x)), inputs)


def _hand_unit_norms() -> tuple[Tensor, list[float]]:
    weight = torch.tensor([[[3.0], [4.0]], [[0.0], [-2.0]]])
    norms = unit_norms([weight, torch.tensor([6.0, 8.0])])
    return torch.cat([x.flatten() for x in norms]), [5, 2, 10]


def _rotated_unit_norms() -> tuple[Tensor, Tensor]:
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64)
    return unit_norms([x @ rotation])[0], unit_norms([x])[0]


def _numpy_unit_norms() -> tuple[Tensor, np.ndarray]:
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    return unit_norms([x])[0], np.sqrt((x.numpy() ** 2).sum(axis=(1, 2), keepdims=True))


def _embeddings(rows: int = 4, columns: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Two sets of rows and a scale, as the contrastive losses take them."""
    x, y = (torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (rows, columns))
    return x, y, torch.tensor(1.3, dtype=torch.float64, requires_grad=True)


class _WithGrads(torch.autograd.Function):
    """A function together with what is claimed to be its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Callable, grads: Callable, *inputs: Tensor) -> Tensor:
        ctx.grads, ctx.inputs = grads, inputs
        return value(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.grads(*ctx.inputs, grad))


def _dense_logits(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return scale * (x @ y.T)


def _hand_clip_loss() -> tuple[Tensor, list[float]]:
    loss = clip_loss(torch.eye(2).double(), torch.eye(2).double(), np.log(3))  # log(4/3)
    return (3 * loss.exp()).round(decimals=9).view(1), [4]


def _permuted_clip_loss() -> tuple[Tensor, Tensor]:
    (x, y, scale), order = _embeddings(), torch.randperm(4)
    return clip_loss(y[order], x[order], scale), clip_loss(x, y, scale)


def _cross_entropy_clip_loss() -> tuple[Tensor, Tensor]:
    x, y, scale = _embeddings()
    z, own = _dense_logits(x, y, scale), torch.arange(4)
    both = [torch.nn.functional.cross_entropy(logits, own) for logits in (z, z.T)]
    return clip_loss(x, y, scale), torch.stack(both).mean()


def _hand_info_nce_loss() -> tuple[Tensor, list[float]]:
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    loss = info_nce_loss(key[:1], key, np.log(2), excluded=torch.tensor([False, False, True]))
    return loss.exp().round(decimals=9).view(1), [1.5]  # (2 + 1)/2


def _permuted_info_nce_loss() -> tuple[Tensor, Tensor]:
    (x, y, scale), order = _embeddings(columns=6), torch.randperm(6)
    labels = order.argsort()[:4]
    return info_nce_loss(x, y[order], scale, labels=labels), info_nce_loss(x, y, scale)


def _cross_entropy_info_nce_loss() -> tuple[Tensor, Tensor]:
    (x, y, scale), labels = _embeddings(columns=6), torch.tensor([5, 0, 0, 3])
    z = _dense_logits(x, y, scale)
    truth = torch.nn.functional.cross_entropy(z, labels)
    return info_nce_loss(x, y, scale, labels=labels), truth


def _hand_nt_xent_loss() -> tuple[Tensor, list[float]]:
    loss = nt_xent_loss(torch.eye(2).double(), torch.eye(2).double(), np.log(3))
    return (3 * loss.exp()).round(decimals=9).view(1), [5]  # (3 + 1 + 1)/3


def _exchanged_nt_xent_loss() -> tuple[Tensor, Tensor]:
    (x, y, scale), order = _embeddings(), torch.randperm(4)
    return nt_xent_loss(y[order], x[order], scale), nt_xent_loss(x, y, scale)


def _numpy_nt_xent_loss() -> tuple[Tensor, float]:
    x, y, scale = _embeddings()
    views = torch.cat([x, y]).detach().numpy()
    e, rows = np.exp(scale.item() * views @ views.T), np.arange(8)
    losses = np.log((e.sum(1) - e[rows, rows]) / e[rows, (rows + 4) % 8])
    return nt_xent_loss(x, y, scale), float(losses.mean())


def _hand_siglip_loss() -> tuple[Tensor, list[float]]:
    # Every pair's is −log σ(log 3), of which there are two in a row.
    loss = siglip_loss(torch.eye(2).double(), torch.eye(2).double(), np.log(9), -np.log(3))
    return (9 * loss.exp()).round(decimals=9).view(1), [16]


def _permuted_siglip_loss() -> tuple[Tensor, Tensor]:
    (x, y, scale), order = _embeddings(), torch.randperm(4)
    return siglip_loss(y[order], x[order], scale, -2.0), siglip_loss(x, y, scale, -2.0)


def _cross_entropy_siglip_loss() -> tuple[Tensor, Tensor]:
    x, y, scale = _embeddings(columns=6)
    z, truth = _dense_logits(x, y, scale) - 2, torch.eye(4, 6, dtype=torch.float64)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(z, truth, reduction="sum")
    return siglip_loss(x, y, scale, -2.0), losses / 4


def _grad_siglip_grads() -> bool:
    def losses(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return siglip_loss(x, y, scale, bias, reduction="none")

    inputs = (*_embeddings(3, 5), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True))
    return torch.autograd.gradcheck(lambda *x: _WithGrads.apply(losses, siglip_grads, *x), inputs)


def _hand_siglip_grads() -> tuple[Tensor, list[float]]:
    one = torch.ones(1, 1, dtype=torch.float64)
    *_, scale, bias = siglip_grads(one, one, np.log(3), 0.0, torch.ones(1))  # −σ(−log 3)
    return torch.stack([scale, bias]).round(decimals=9), [-0.25, -0.25]


def _by_blocks_siglip_grads() -> tuple[list[Tensor], list[Tensor]]:
    x, y, scale = (v.detach() for v in _embeddings(4, 6))
    weight, labels = torch.rand(4, dtype=torch.float64), torch.tensor([5, 0, 1, 2])
    whole = siglip_grads(x, y, scale, -1.0, weight, labels=labels)
    parts = [siglip_grads(x, y[i : i + 3], scale, -1.0, weight, labels=labels - i) for i in (0, 3)]
    dx, dy, *scalars = zip(*parts, strict=True)
    return [sum(dx), torch.cat(dy), *map(sum, scalars)], list(whole)


def _autograd_siglip_grads() -> tuple[Tensor, Tensor]:
    x, y, scale = _embeddings()
    weight, bias = torch.rand(4, dtype=torch.float64), torch.tensor(0.5, requires_grad=True)
    signs = 2 * torch.eye(4) - 1
    losses = -torch.nn.functional.logsigmoid(signs * (_dense_logits(x, y, scale) + bias)).sum(1)
    truth = torch.autograd.grad(losses @ weight, (x, y, scale, bias))
    return _flat(siglip_grads(x, y, scale, bias, weight)), _flat([v.double() for v in truth])


def _grad_block_logsumexp() -> bool:
    return torch.autograd.gradcheck(lambda *x: tuple(block_logsumexp(*x)), _embeddings(3, 5))


def _hand_block_logsumexp() -> tuple[Tensor, list[float]]:
    x, y = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0], [1.0], [0.0]]).double()
    rows, columns, positives = block_logsumexp(x, y, np.log(2))
    found = torch.cat([rows.exp(), columns.exp(), positives.exp()])
    return found.round(decimals=9), [3, 4, 2, 3, 2, 1, 2]


def _transposed_block_logsumexp() -> tuple[Tensor, Tensor]:
    x, y, scale = _embeddings()
    rows, columns, positives = block_logsumexp(x, y, scale)
    return torch.cat(block_logsumexp(y, x, scale)), torch.cat([columns, rows, positives])


def _dense_block_logsumexp() -> tuple[Tensor, Tensor]:
    (x, y, scale), labels = _embeddings(columns=6), torch.tensor([7, -1, 2, 2])
    z = _dense_logits(x, y, scale)
    positives = torch.stack([z.new_zeros(()), z.new_zeros(()), z[2, 2], z[3, 2]])
    truth = torch.cat([z.logsumexp(1), z.logsumexp(0), positives])
    return torch.cat(block_logsumexp(x, y, scale, labels=labels)), truth


def _grad_block_logsumexp_grads() -> bool:
    def value(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return torch.cat(block_logsumexp(x, y, scale))

    def grads(x: Tensor, y: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        rows, columns, _ = block_logsumexp(x, y, scale)
        weights = grad.split([3, 5, 3])
        return block_logsumexp_grads(x, y, scale, rows, columns, *weights)

    return torch.autograd.gradcheck(
        lambda *x: _WithGrads.apply(value, grads, *x), _embeddings(3, 5)
    )


def _hand_block_logsumexp_grads() -> tuple[Tensor, list[float]]:
    x, y = torch.tensor([[2.0]]).double(), torch.ones(2, 1).double()
    rows, one = torch.full((1,), 2 + np.log(2)), torch.ones(1)  # two equal logits of 2
    found = block_logsumexp_grads(x, y, 1.0, rows, None, one, None, -one)
    return _flat(found).round(decimals=6), [0, -1, 1, 0]


def _transposed_block_logsumexp_grads() -> tuple[Tensor, Tensor]:
    x, y, scale = (v.detach() for v in _embeddings())
    rows, columns, p = block_logsumexp(x, y, scale)
    dx, dy, ds = block_logsumexp_grads(x, y, scale, rows, columns, rows, columns, p)
    return _flat(block_logsumexp_grads(y, x, scale, columns, rows, columns, rows, p)), _flat(
        [dy, dx, ds]
    )


def _autograd_block_logsumexp_grads() -> tuple[Tensor, Tensor]:
    x, y, scale = _embeddings(3, 5)
    z, weights = _dense_logits(x, y, scale), torch.randn(11, dtype=torch.float64)
    rows, columns = z.logsumexp(1), z.logsumexp(0)
    total = weights @ torch.cat([rows, columns, z.diagonal()])
    sums = (rows.detach(), columns.detach())
    found = block_logsumexp_grads(x, y, scale, *sums, *weights.split([3, 5, 3]))
    return _flat(found), _flat(torch.autograd.grad(total, (x, y, scale)))


def _two_sums() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 5, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


def _hand_merge_logsumexp() -> tuple[Tensor, list[float]]:
    nothing = -torch.inf
    found = merge_logsumexp(
        torch.tensor([nothing, 3.0, nothing]), torch.tensor([nothing, nothing, -2.0])
    )
    return found, [nothing, 3, -2]


def _shifted_merge_logsumexp() -> tuple[Tensor, Tensor]:
    a, b = _two_sums()
    return merge_logsumexp(b + 1e3, a + 1e3) - 1e3, merge_logsumexp(a, b)


def _torch_merge_logsumexp() -> tuple[Tensor, Tensor]:
    a, b = _two_sums()
    return merge_logsumexp(a, b), torch.stack([a, b]).logsumexp(0)


@dataclass(frozen=True)
class Contract:
    gradcheck: Callable[[], bool]
    by_hand: Callable[[], tuple]
    invariance: Callable[[], tuple]
    independent: Callable[[], tuple]


CONTRACTS = {
    "accumulated_sq_norms": Contract(
        _grad_accumulated_sq_norms,
        _hand_accumulated_sq_norms,
        _exchanged_accumulated_sq_norms,
        _three_sums_accumulated_sq_norms,
    ),
    "accumulated_sq_norms_": Contract(
        _grad_accumulated_sq_norms_,
        _hand_accumulated_sq_norms_,
        _sum_of_parts_accumulated_sq_norms_,
        _not_in_place_accumulated_sq_norms_,
    ),
    "diff_sq_norms": Contract(
        _grad_diff_sq_norms,
        _hand_diff_sq_norms,
        _shifted_diff_sq_norms,
        _numpy_diff_sq_norms,
    ),
    "ema_update_": Contract(
        _grad_ema_update_,
        _hand_ema_update_,
        _two_steps_ema_update_,
        _swa_utils_ema_update_,
    ),
    "unit_norms": Contract(
        _grad_unit_norms,
        _hand_unit_norms,
        _rotated_unit_norms,
        _numpy_unit_norms,
    ),
    "Quantized": Contract(_grad_quantized, _hand_quantized, _sliced_quantized, _numpy_quantized),
    "quantize": Contract(_grad_quantize, _hand_quantize, _scaled_quantize, _numpy_quantize),
    "dequantize": Contract(
        _grad_dequantize, _hand_dequantize, _again_dequantize, _torch_dequantize
    ),
    "quantized_bytes": Contract(
        _grad_quantized_bytes,
        _hand_quantized_bytes,
        _added_quantized_bytes,
        _measured_quantized_bytes,
    ),
    "dequantize_reduce": Contract(
        _grad_dequantize_reduce,
        _hand_dequantize_reduce,
        _order_dequantize_reduce,
        _stacked_dequantize_reduce,
    ),
    "dequantize_reduce_quantize": Contract(
        _grad_dequantize_reduce_quantize,
        _hand_dequantize_reduce_quantize,
        _alone_dequantize_reduce_quantize,
        _steps_dequantize_reduce_quantize,
    ),
    "pack_signs": Contract(
        _grad_pack_signs, _hand_pack_signs, _scaled_pack_signs, _numpy_pack_signs
    ),
    "unpack_signs": Contract(
        _grad_unpack_signs, _hand_unpack_signs, _packed_unpack_signs, _numpy_unpack_signs
    ),
    "sum_signs": Contract(_grad_sum_signs, _hand_sum_signs, _mirrored_sum_signs, _torch_sum_signs),
    "majority_vote": Contract(
        _grad_majority_vote, _hand_majority_vote, _order_majority_vote, _torch_majority_vote
    ),
    "unpack_votes": Contract(
        _grad_unpack_votes, _hand_unpack_votes, _one_plane_unpack_votes, _mode_unpack_votes
    ),
    **{
        f"{kind}_update": Contract(
            partial(_grad_update, kind),
            partial(_hand_update, kind),
            partial(_scaled_update, kind),
            partial(_outside_update, kind),
        )
        for kind in UPDATES
    },
    **{
        f"{kind}_update_": Contract(
            partial(_grad_update_, kind),
            partial(_hand_update_, kind),
            partial(_one_by_one_update_, kind),
            partial(_outside_update_, kind),
        )
        for kind in UPDATES
    },
    "split_weight": Contract(
        _grad_split_weight, _hand_split_weight, _scaled_split_weight, _numpy_split_weight
    ),
    "join_weight": Contract(
        _grad_join_weight, _hand_join_weight, _round_trip_join_weight, _numpy_join_weight
    ),
    "decode_state": Contract(
        lambda: _grad_through(decode_state),
        _hand_decode_state,
        _scaled_decode_state,
        _numpy_decode_state,
    ),
    "encode_state": Contract(
        _grad_encode_state, _hand_encode_state, _scaled_encode_state, _numpy_encode_state
    ),
    "zero_state": Contract(
        _grad_zero_state, _hand_zero_state, _read_zero_state, _encoded_zero_state
    ),
    "state_bytes": Contract(
        _grad_state_bytes, _hand_state_bytes, _doubled_state_bytes, _storage_state_bytes
    ),
    "scale_state_": Contract(
        _grad_scale_state, _hand_scale_state, _undone_scale_state, _decoded_scale_state
    ),
    "state_to_rows": Contract(
        _grad_state_to_rows,
        _hand_state_to_rows,
        _scaled_state_to_rows,
        _numpy_state_to_rows,
    ),
    "state_from_rows": Contract(
        _grad_state_from_rows,
        _hand_state_from_rows,
        _round_trip_state_from_rows,
        _sliced_state_from_rows,
    ),
    "export_state": Contract(
        lambda: _grad_through(lambda x: export_state(x)["scales"]),
        _hand_export_state,
        _loaded_export_state,
        _numpy_export_state,
    ),
    "import_state": Contract(
        lambda: _grad_through(lambda x: import_state(export_state(x)).scales),
        _hand_import_state,
        _round_trip_import_state,
        _encoded_import_state,
    ),
    "QuantizedState": Contract(
        _grad_quantized_state,
        _hand_quantized_state,
        _powers_quantized_state,
        _numpy_quantized_state,
    ),
    "random_bits": Contract(
        _grad_random_bits, _hand_random_bits, _offset_random_bits, _python_random_bits
    ),
    "round_stochastic": Contract(
        _grad_round_stochastic,
        _hand_round_stochastic,
        _mirrored_round_stochastic,
        _numpy_round_stochastic,
    ),
    "sq_norms": Contract(_grad_sq_norms, _hand_sq_norms, _rotation_sq_norms, _numpy_sq_norms),
    "total_sq_norm": Contract(
        _grad_total_sq_norm, _hand_total_sq_norm, _scale_total_sq_norm, _numpy_total_sq_norm
    ),
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
    "gradient_snr": Contract(
        _grad_gradient_snr,
        _hand_gradient_snr,
        _scaled_gradient_snr,
        _numpy_gradient_snr,
    ),
    "mean_gradient_snr": Contract(
        _grad_mean_gradient_snr,
        _hand_mean_gradient_snr,
        _scaled_mean_gradient_snr,
        _numpy_mean_gradient_snr,
    ),
    "vrgd_scale": Contract(
        _grad_vrgd_scale,
        _hand_vrgd_scale,
        _scaled_vrgd_scale,
        _numpy_vrgd_scale,
    ),
    "per_sample_gradients": Contract(
        _grad_per_sample_gradients,
        _hand_per_sample_gradients,
        _chunked_per_sample_gradients,
        _looped_per_sample_gradients,
    ),
    "lanczos": Contract(_grad_lanczos, _hand_lanczos, _rotation_lanczos, _eigvalsh_lanczos),
    "ritz_values": Contract(
        _grad_ritz_values, _hand_ritz_values, _signs_ritz_values, _moments_ritz_values
    ),
    "spectral_density": Contract(
        _grad_spectral_density,
        _hand_spectral_density,
        _shifted_spectral_density,
        _torch_spectral_density,
    ),
    "bulk_edges": Contract(
        _grad_bulk_edges, _hand_bulk_edges, _scaled_bulk_edges, _chebyshev_bulk_edges
    ),
    "adam_instability_sums": Contract(
        _grad_adam_instability_sums,
        _hand_adam_instability_sums,
        _added_adam_instability_sums,
        _optimizer_adam_instability_sums,
    ),
    "affine_sample_gradients": Contract(
        _grad_affine_sample_gradients,
        _hand_affine_sample_gradients,
        _order_affine_sample_gradients,
        _autograd_affine_sample_gradients,
    ),
    "sample_sq_norms": Contract(
        _grad_sample_sq_norms,
        _hand_sample_sq_norms,
        _order_sample_sq_norms,
        _parts_sample_sq_norms,
    ),
    "orthogonalize": Contract(
        _grad_orthogonalize, _hand_orthogonalize, _rotation_orthogonalize, _svd_orthogonalize
    ),
    "layer_norm": Contract(
        _grad_layer_norm, _hand_layer_norm, _affine_layer_norm, _torch_layer_norm
    ),
    "rms_norm": Contract(_grad_rms_norm, _hand_rms_norm, _scaled_rms_norm, _torch_rms_norm),
    "normalized_singular_values": Contract(
        _grad_normalized_singular_values,
        _hand_normalized_singular_values,
        _rotation_normalized_singular_values,
        _numpy_normalized_singular_values,
    ),
    "newton_schulz": Contract(
        _grad_newton_schulz, _hand_newton_schulz, _rotation_newton_schulz, _svd_newton_schulz
    ),
    "trace_sqrt": Contract(
        _grad_trace_sqrt, _hand_trace_sqrt, _rotation_trace_sqrt, _eigvalsh_trace_sqrt
    ),
    "fold_norms": Contract(
        _grad_fold_norms, _hand_fold_norms, _repeated_fold_norms, _euclidean_fold_norms
    ),
    "deviation_sum": Contract(
        _grad_deviation_sum, _hand_deviation_sum, _scaled_deviation_sum, _torch_deviation_sum
    ),
    "small_gram": Contract(
        _grad_small_gram, _hand_small_gram, _rotation_small_gram, _numpy_small_gram
    ),
    "matrix_covariance": Contract(
        _grad_matrix_covariance,
        _hand_matrix_covariance,
        _shifted_matrix_covariance,
        _numpy_matrix_covariance,
    ),
    "adam_preconditioned": Contract(
        _grad_adam_preconditioned,
        _hand_adam_preconditioned,
        _scaled_adam_preconditioned,
        _torch_adam_preconditioned,
    ),
    "saved_bytes": Contract(
        _grad_saved_bytes,
        _hand_saved_bytes,
        _twice_the_samples_saved_bytes,
        _walked_graph_saved_bytes,
    ),
    "block_logsumexp": Contract(
        _grad_block_logsumexp,
        _hand_block_logsumexp,
        _transposed_block_logsumexp,
        _dense_block_logsumexp,
    ),
    "block_logsumexp_grads": Contract(
        _grad_block_logsumexp_grads,
        _hand_block_logsumexp_grads,
        _transposed_block_logsumexp_grads,
        _autograd_block_logsumexp_grads,
    ),
    "clip_loss": Contract(
        lambda: torch.autograd.gradcheck(clip_loss, _embeddings()),
        _hand_clip_loss,
        _permuted_clip_loss,
        _cross_entropy_clip_loss,
    ),
    "info_nce_loss": Contract(
        lambda: torch.autograd.gradcheck(info_nce_loss, _embeddings(columns=6)),
        _hand_info_nce_loss,
        _permuted_info_nce_loss,
        _cross_entropy_info_nce_loss,
    ),
    "merge_logsumexp": Contract(
        lambda: torch.autograd.gradcheck(merge_logsumexp, _two_sums()),
        _hand_merge_logsumexp,
        _shifted_merge_logsumexp,
        _torch_merge_logsumexp,
    ),
    "nt_xent_loss": Contract(
        lambda: torch.autograd.gradcheck(nt_xent_loss, _embeddings()),
        _hand_nt_xent_loss,
        _exchanged_nt_xent_loss,
        _numpy_nt_xent_loss,
    ),
    "siglip_grads": Contract(
        _grad_siglip_grads,
        _hand_siglip_grads,
        _by_blocks_siglip_grads,
        _autograd_siglip_grads,
    ),
    "siglip_loss": Contract(
        lambda: torch.autograd.gradcheck(partial(siglip_loss, bias=-1.0), _embeddings(4, 6)),
        _hand_siglip_loss,
        _permuted_siglip_loss,
        _cross_entropy_siglip_loss,
    ),
}
CONTRACTS |= {name: Contract(*four) for name, four in TRUST_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in BOUNDED_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in VOTE_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in UNIT_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in SECOND_ORDER_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in ADAPTIVE_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in SHARPNESS_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in LOW_RANK_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in NORMUON_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in WRAPPER_CONTRACTS.items()}
CONTRACTS |= {name: Contract(*four) for name, four in FEEDBACK_CONTRACTS.items()}

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
