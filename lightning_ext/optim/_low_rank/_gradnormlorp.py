"""GradNormLoRP: rows as lengths and directions, and GaLore for the directions.

Source: Huang et al. 2024 (GradNormLoRP, arXiv:2412.19616); Salimans and Kingma 2016
    (arXiv:1602.07868) for the gradients.
Differs: each step splits the weight anew, so that there is no second copy of it, and keeps the step
    of the lengths, which the authors' code overwrites at the next one. See ``_galore``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_ext.optim._low_bit._moments import StateDtype
from lightning_ext.optim._low_rank._low_rank import LowRank


class GradNormLoRP(LowRank):
    r"""Adam on the lengths of rows, and GaLore on their directions.

    .. math::
        \partial g = \langle G, w\rangle/\|w\|, \quad \partial v = G - \partial g\, w/\|w\|, \quad
        w \leftarrow (\|w\| - \mathrm{lr}\, N(\partial g))
            \frac{w - \mathrm{lr}\, U(\partial v)}{\|w - \mathrm{lr}\, U(\partial v)\|}

    for each row w, with U the update of ``GaLore`` and N that of Adam. Weight decay is taken from
    w. A row of zeros has no direction and moves as in ``GaLore``.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r; a number below 1 is a share of the shorter side.
        update_proj_gap: steps after which the subspace is looked for again.
        scale: α of directions.
        subspace: as in ``GaLore``.
        projection_dtype: as in ``GaLore``.
        state_dtype: as in ``GaLore``; moments of lengths are plain.
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
        >>> optimizer = GradNormLoRP([model.weight], rank=4)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["length_avg"].shape
        torch.Size([32, 1])
    """

    splits_lengths = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        update_proj_gap: int = 250,
        scale: float = 0.25,
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
            "subspace": subspace,
            "projection_dtype": projection_dtype,
            "state_dtype": state_dtype,
            "spread_refresh": spread_refresh,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, settings)
