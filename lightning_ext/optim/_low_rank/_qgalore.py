"""Q-GaLore: GaLore with a projection of 4 bits, moments of 8, and subspaces that rest.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296), and its authors' code.
Differs: |cos|, as singular vectors have no sign, against the previous first vector as it was kept;
    4-bit codes are symmetric; weights of 8 bits are the module's affair: one with ``requantize_``
    is written by it. See ``_galore``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_ext.optim._low_bit._moments import StateDtype
from lightning_ext.optim._low_rank._low_rank import LowRank


class QGaLore(LowRank):
    r"""GaLore whose projection has 4 bits and moments 8, and whose subspaces are sought lazily.

    .. math::
        \mathrm{gap} \leftarrow 2\,\mathrm{gap} \quad\text{where the mean of the last five}\quad
        |\cos(p_k, p_{k-1})| \ge 0.4

    with p the first singular vectors found by a matrix; each matrix has a gap of its own. The
    rest is ``GaLore``. A weight that has ``requantize_(new, seed=, step=, stream=)`` and
    ``dequantize()`` is read and written by these.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r; a number below 1 is a share of the shorter side.
        update_proj_gap: the first gap, in steps.
        scale: α.
        cos_threshold: from which mean on the gap is doubled; ``None``: never.
        subspace: as in ``GaLore``.
        projection_dtype: of the projection, "int4" or "float32".
        state_dtype: of both moments, as in ``GaLore``.
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
        >>> optimizer = QGaLore([model.weight], rank=4)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["projection.int4"].shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.015,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 256,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        cos_threshold: float | None = 0.4,
        subspace: Literal["svd", "randomized", "iteration"] = "randomized",
        projection_dtype: Literal["float32", "int4"] = "int4",
        state_dtype: StateDtype | None = "int8",
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
            "cos_threshold": cos_threshold,
            "subspace": subspace,
            "projection_dtype": projection_dtype,
            "state_dtype": state_dtype,
            "spread_refresh": spread_refresh,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, settings)
