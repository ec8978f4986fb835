"""GaLore: Adam in the subspace where gradients mostly lie.

Source: Zhao et al. 2024 (GaLore, arXiv:2403.03507), Algorithm 2, and its authors' code.
Differs: weight decay comes before the step, as in ``torch.optim.AdamW``; see ``_low_rank`` and
    ``functional.low_rank_update``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_ext.optim._low_bit._moments import StateDtype
from lightning_ext.optim._low_rank._low_rank import LowRank


class GaLore(LowRank):
    r"""Adam on what a subspace of rank r keeps of gradients, looked for every few steps.

    .. math::
        R = G P^\top, \qquad N = \frac{m(R)}{\sqrt{v(R)} + \epsilon}, \qquad
        W \leftarrow (1 - \mathrm{lr}\,\lambda) W
            - \mathrm{lr}\,\frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\,\alpha\, N P

    with P the first r right singular vectors of G; of a matrix with more columns than rows the same
    of Gᵀ. Convolutions are matrices with a row for each output channel. What is no matrix, or has
    no side above the rank, goes to AdamW, and so do groups with ``algorithm="adamw"``;
    ``param_groups_for`` makes those of embeddings and output layers.

    Under FSDP2 (``fully_shard``) each matrix has an owner: it gets the gradient's rows of the
    others, keeps the subspace and the moments, and sends back rows of the update.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r; a number below 1 is a share of the shorter side.
        update_proj_gap: steps after which P is looked for again.
        scale: α.
        subspace: how, "svd", "randomized" or "iteration"; see ``functional.gradient_subspace``.
        projection_dtype: of P, "float32" or "int4".
        state_dtype: of m and v, "float32", "bfloat16", "int8", "int4" or "fp8"; ``None``: float32,
            or float64 where the parameter is. AdamW's, too, but of vectors and of at most 4096
            entries, which have float32; ``None``: as the parameter.
        spread_refresh: matrices take turns, so that no step looks for all subspaces but the first;
            False looks for all at once, as the paper.
        seed: of random bits.
        maximize: climb instead of descend.
        foreach: False updates what goes to AdamW one after the other by the plain formula.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = GaLore([model.weight], rank=4)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> {
        ...     name: tuple(x.shape)
        ...     for name, x in optimizer.state[model.weight].items()
        ...     if x.dim() > 1
        ... }
        {'exp_avg': (64, 4), 'exp_avg_sq': (64, 4), 'projection': (4, 32)}
    """

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
