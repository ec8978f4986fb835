"""Fira: what GaLore leaves of a gradient is used, too, at the length that Adam would give it.

Source: Chen et al. 2024 (Fira, arXiv:2410.01623), and its authors' code.
Differs: α multiplies what goes back from the subspace and not what is taken away from the gradient.
    The authors' code has it in both places, so that with α = 0.25 three quarters of the gradient
    inside the subspace are in the residual. Their steps inside are N/4 and 3/4 of the scaled
    gradient, as long together as N; α = 1 here keeps that length at their rates.
    ``alpha_in_residual=True, scale=0.25`` is their code. See ``_galore``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_ext.optim._low_bit._moments import StateDtype
from lightning_ext.optim._low_rank._low_rank import LowRank


class Fira(LowRank):
    r"""Adam in a subspace, and the gradient outside of it scaled as Adam scales inside.

    .. math::
        U = \alpha N P + \mathrm{limit}\left(\phi \circ (G - R P)\right), \qquad
        \phi_j = \frac{\|N_j\|}{\|R_j\| + 10^{-8}}

    for each row j of the longer side; the limit keeps the norm of the second term from growing by
    more than 1.01 a step. N, R, P and the rest are those of ``GaLore``. It needs the whole
    gradient at the step.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r; a number below 1 is a share of the shorter side.
        update_proj_gap: steps after which the subspace is looked for again.
        scale: α.
        alpha_in_residual: take α R P away from G, as the authors' code, whose α is 0.25.
        norm_growth: of the limit; ``None`` for none.
        subspace: as in ``GaLore``.
        projection_dtype: as in ``GaLore``.
        state_dtype: as in ``GaLore``.
        spread_refresh: as in ``GaLore``.
        seed: of random bits.
        maximize: climb instead of descend.
        foreach: as in ``GaLore``.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = Fira([model.weight], rank=4)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["update_norm"].shape
        torch.Size([])
    """

    form = "fira"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        alpha_in_residual: bool = False,
        norm_growth: float | None = 1.01,
        subspace: Literal["svd", "randomized", "iteration"] = "randomized",
        projection_dtype: Literal["float32", "int4"] = "float32",
        state_dtype: StateDtype | None = None,
        spread_refresh: bool = True,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "alpha_in_residual": alpha_in_residual,
            "norm_growth": norm_growth,
            "subspace": subspace,
            "projection_dtype": projection_dtype,
            "state_dtype": state_dtype,
            "spread_refresh": spread_refresh,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, settings)
