"""APOLLO and APOLLO-Mini: gradients as they are, only their lengths by Adam in a random subspace.

Source: Zhu et al. 2025 (APOLLO, arXiv:2412.05270), Algorithm 1, and its authors' code.
Differs: the projection is made again of its seed at every step; weight decay comes before the step.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_ext.optim._low_bit._moments import StateDtype
from lightning_ext.optim._low_rank._low_rank import LowRank


class APOLLO(LowRank):
    r"""Steps along the gradient, each of its channels as long as Adam in a random subspace says.

    .. math::
        R = G P^\top, \quad s_j = \frac{\|N_j\|}{\|R_j\| + 10^{-8}}, \quad
        W \leftarrow (1 - \mathrm{lr}\,\lambda) W
            - \mathrm{lr}\,\frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \sqrt{\alpha}\,\mathrm{limit}(s \circ G)

    with N as in ``GaLore``, P of r rows of normal entries with variance 1/r, another one every
    ``update_proj_gap`` steps, and j a row of the longer side. The limit keeps the norm from growing
    by more than 1.01 a step. Convolutions are matrices with a row for each output channel; what is
    no matrix, or has no side above the rank, goes to AdamW.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r; a number below 1 is a share of the shorter side.
        update_proj_gap: steps after which P is another one.
        scale: α.
        scale_type: "channel", an s for each row j; "tensor", one.
        norm_growth: of the limit; ``None`` for none.
        scale_front: √α stands inside the limit, for short warm-ups.
        state_dtype: as in ``GaLore``.
        seed: of P.
        maximize: climb instead of descend.
        foreach: as in ``GaLore``.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = APOLLO([model.weight])
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> {
        ...     name: tuple(x.shape)
        ...     for name, x in optimizer.state[model.weight].items()
        ...     if x.dim() > 1
        ... }
        {'exp_avg': (64, 8), 'exp_avg_sq': (64, 8)}
    """

    form = "apollo"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 0.25,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: Literal["channel", "tensor"] = "channel",
        norm_growth: float | None = 1.01,
        scale_front: bool = False,
        state_dtype: StateDtype | None = None,
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
            "scale_type": scale_type,
            "norm_growth": norm_growth,
            "scale_front": scale_front,
            "state_dtype": state_dtype,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, settings)


class APOLLOMini(APOLLO):
    r"""APOLLO with a subspace of one dimension, one s for a matrix, and α = 128.

    .. math::
        s = \frac{\|N\|}{\|R\| + 10^{-8}}, \qquad P \text{ of one row}

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r.
        update_proj_gap: steps after which P is another one.
        scale: α.
        scale_type: as in ``APOLLO``.
        norm_growth: as in ``APOLLO``.
        scale_front: as in ``APOLLO``.
        state_dtype: as in ``GaLore``.
        seed: of P.
        maximize: climb instead of descend.
        foreach: as in ``GaLore``.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = APOLLOMini([model.weight])
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].shape
        torch.Size([64, 1])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 1,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        scale_type: Literal["channel", "tensor"] = "tensor",
        norm_growth: float | None = 1.01,
        scale_front: bool = False,
        state_dtype: StateDtype | None = None,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            scale_type=scale_type,
            norm_growth=norm_growth,
            scale_front=scale_front,
            state_dtype=state_dtype,
            seed=seed,
            maximize=maximize,
            foreach=foreach,
        )
