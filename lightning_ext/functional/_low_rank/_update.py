"""Adam in the coordinates of a subspace, and what is done with the rest of the gradient.

Source: Zhao et al. 2024 (GaLore, arXiv:2403.03507), Algorithm 1; Chen et al. 2024 (Fira,
    arXiv:2410.01623), norm-based scaling and norm-growth limiter; Zhu et al. 2025 (APOLLO,
    arXiv:2412.05270), Algorithm 1; their authors' codes for the places of ε and α.
Differs: Fira's α stays out of the residual unless ``alpha_in_residual`` asks for it: G − αPᵀPG, as
    the authors compute it, keeps 1 − α of the gradient inside the subspace. The limiter counts
    from the first norm that is not 0, and passes over those that are.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_ext.functional._low_rank._subspace import (
    as_tall,
    is_tall,
    project_back,
    project_gradient,
)
from lightning_ext.functional._updates._adam_directions import adam_direction, complement
from lightning_ext.functional._widen import widen

Form = Literal["galore", "fira", "apollo"]
Per = Literal["channel", "tensor"]
_TINY = 1e-8  # of the authors' codes, beside norms


def low_rank_scales(direction: Tensor, low: Tensor, *, per: Per = "channel") -> Tensor:
    """Return how much an optimizer lengthens gradients in a subspace.

        s_j = ‖N_j‖/(‖R_j‖ + 10⁻⁸) of each row,  or  ‖N‖/(‖R‖ + 10⁻⁸)

    Args:
        direction: N, what the optimizer makes of R, shape (long, r).
        low: R, the gradient in the subspace, of the same shape.
        per: "channel" or "tensor".

    Returns:
        Shape (long, 1), or (1, 1) per tensor.

    Raises:
        ValueError: if there is no such ``per``.

    Example:
        >>> low_rank_scales(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]]))
        tensor([[0.5000]])
    """
    if per not in ("channel", "tensor"):
        raise ValueError(f"per={per!r} is not allowed; choose 'channel' or 'tensor'")
    sizes = [x.norm(dim=1, keepdim=True) for x in (direction, low)]
    if per == "tensor":
        sizes = [x.norm().view(1, 1) for x in sizes]
    return sizes[0] / (sizes[1] + _TINY)


def limit_norm_growth(
    update: Tensor, previous: Tensor, *, gamma: float = 1.01
) -> tuple[Tensor, Tensor]:
    """Return an update whose norm has grown by no more than a factor, and that norm.

        u ← u/max(1, ‖u‖/(γ(n + 10⁻⁸))) where n > 0,  n ← ‖u‖ where that is not 0

    Args:
        update: u.
        previous: n, the norm of the update before, of no dimension; 0 where there was none.
        gamma: γ, at least 1.

    Returns:
        u, and n of no dimension. Nothing waits for the device.

    Raises:
        ValueError: if ``gamma`` is below 1.

    Example:
        >>> limit_norm_growth(torch.tensor([3.0, 4.0]), torch.tensor(2.5), gamma=1.0)
        (tensor([1.5000, 2.0000]), tensor(2.5000))
    """
    if not gamma >= 1:
        raise ValueError(f"gamma={gamma} is not allowed; it must be at least 1")
    excess, norm = _excess(update.norm(), previous, gamma)
    return update / excess, norm


def low_rank_update(
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | float,
    norm: Tensor | None = None,
    *,
    form: Form = "galore",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    scale: float = 1.0,
    gamma: float | None = 1.01,
    per: Per = "channel",
    alpha_in_residual: bool = False,
    scale_front: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    r"""Return what a matrix moves by for each unit of its rate, and the states after that.

        R = project(G),  m ← β₁m + (1 − β₁)R,  v ← β₂v + (1 − β₂)R²,  N = m/(√v + ε)
        "galore"  U = α back(N)
        "fira"    U = α back(N) + limit(s ∘ (G − back(R)))
        "apollo"  U = √α limit(s ∘ G)
        W ← W − lr·U·√(1 − β₂ᵗ)/(1 − β₁ᵗ)

    s are the ``low_rank_scales`` of N and R, one for each row of the longer side, or one.

    Args:
        grad: G, shape (m, n).
        basis: P, shape (r, min(m, n)).
        exp_avg: m before the step, shape (max(m, n), r), zeros at first.
        exp_avg_sq: v, as m.
        step: t, steps taken when this one is done.
        norm: what the limiter remembers, 0 at first; not read by "galore".
        form: as above.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, beside √v as in the authors' codes.
        scale: α.
        gamma: of the limiter, ``None`` for none.
        per: of s in "apollo".
        alpha_in_residual: Fira's residual as its authors compute it, G − α back(R).
        scale_front: "apollo" limits behind √α, not before.

    Returns:
        The update with its bias correction, shape (m, n), at least float32; m, v and the norm.

    Raises:
        ValueError: if there is no such form.

    Example:
        >>> g, zero = torch.tensor([[3.0, 0.0], [0.0, -2.0]]), torch.zeros(2, 1)
        >>> basis = torch.tensor([[1.0, 0.0]])
        >>> low_rank_update(g, basis, zero, zero, 1, scale=0.5)[0].round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]])
    """
    grad = widen(grad)
    basis = basis.to(grad.dtype)
    low = project_gradient(grad, basis)
    moments = adam_direction(
        low, exp_avg, exp_avg_sq, step, betas=betas, eps=eps, bias_correction=False
    )
    mean, square, direction = moments
    first, second = (complement(beta, step, grad) for beta in betas)
    correction = second.sqrt() / first
    # What is the same for all entries is multiplied into what is small.
    if form == "galore":
        return project_back((scale * correction) * direction, basis, grad.shape), mean, square, norm
    tall = as_tall(grad)
    if form == "fira":
        inside = scale if alpha_in_residual else 1.0
        rest = low_rank_scales(direction, low) * (tall - (inside * low) @ basis)
        excess, norm = _limited(rest.norm(), norm, gamma)
        update = (scale * correction * direction) @ basis + (correction / excess) * rest
    elif form == "apollo":
        front, behind = (math.sqrt(scale), 1.0) if scale_front else (1.0, math.sqrt(scale))
        scales = front * low_rank_scales(direction, low, per=per)
        size = (scales * tall.norm(dim=1, keepdim=True)).norm()
        excess, norm = _limited(size, norm, gamma)
        update = (behind * correction / excess * scales) * tall
    else:
        raise ValueError(f"form={form!r} is not allowed; choose 'galore', 'fira' or 'apollo'")
    return (update if is_tall(grad) else update.T), mean, square, norm


def _excess(norm: Tensor, previous: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """What an update of a norm is divided by, and its norm then; the last one where that is 0."""
    previous = previous.to(norm.dtype)
    excess = norm / (gamma * (previous + _TINY))
    excess = torch.where(previous > 0, excess.clamp_min(1.0), torch.ones_like(excess))
    limited = norm / excess
    return excess, torch.where(limited > 0, limited, previous)


def _limited(
    size: Tensor, norm: Tensor | None, gamma: float | None
) -> tuple[Tensor | float, Tensor | None]:
    if gamma is None or norm is None:
        return 1.0, norm
    excess, new = _excess(size, norm, gamma)
    return excess, new.to(norm.dtype)
