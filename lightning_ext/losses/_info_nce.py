"""InfoNCE as a module.

Source: van den Oord et al. 2018 (CPC, arXiv:1807.03748), eq. 4; the temperature of He et al. 2020
    (MoCo, arXiv:1911.05722).
Differs: cosines instead of a bilinear form, which may be a layer before it.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from lightning_ext.kernels import info_nce_loss
from lightning_ext.losses import _features as features
from lightning_ext.losses import _ranks as ranks
from lightning_ext.losses._softmax import spread_logsumexp


class InfoNCELoss(nn.Module):
    """Cross-entropy of finding each query's key among the keys of all ranks:

        z_ij = q_i·k_j / (τ ‖q_i‖ ‖k_j‖),    L = (1/M) Σ_i (log Σ_j exp z_ij − z_ii)

    Further rows of ``key`` are negatives to the queries of every rank. Over ranks, each with as
    many rows, and under DDP: every rank returns the L of one process with the whole batch and its
    features get W ∂L/∂·, as in ``CLIPLoss``. Accumulation adds no negatives, a larger micro-batch
    does. Other labels, and keys to leave out: ``kernels.info_nce_loss``.

    Args:
        temperature: τ, above 0; not trained.
        normalize: whether rows are taken at length 1.
        gather_features: False, keys of this rank alone.
        process_group: ranks that share keys; by default all.
        fused: as in ``kernels.info_nce_loss``.

    Raises:
        TypeError: as ``kernels.info_nce_loss``.
        ValueError: if an argument is out of range, shapes do not fit, or ranks have different ones.

    Example:
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> InfoNCELoss(temperature=0.5)(key[:1], key).item()  # log(1 + 2 e⁻²)
        0.2395...
    """  # noqa: D415

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        normalize: bool = True,
        gather_features: bool = True,
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        features.check_positive(temperature, "temperature")
        self.temperature, self.normalize, self.fused = temperature, normalize, fused
        self.gather_features, self.process_group = gather_features, process_group

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Return L.

        Args:
            query: q, shape (m, d), floating point.
            key: k, shape (n, d) with n ≥ m, same dtype; row i belongs to row i of ``query``.

        Returns:
            Shape (), at least float32.
        """
        group = ranks.sharing_group(self.gather_features, self.process_group)
        ranks.check_ranks(query, key, group)
        features.check_pairs(query, key[: len(query)], ("query", "key"))
        query, key = (features.prepared(x, self.normalize) for x in (query, key))
        if group is None:
            return info_nce_loss(query, key, 1 / self.temperature, fused=self.fused)
        rows, _, positives = spread_logsumexp(
            query, key, 1 / self.temperature, group, columns=False, fused=self.fused
        )
        return ranks.mean_loss(rows - positives, query, group)

    def extra_repr(self) -> str:
        """Say how it was set."""
        return f"temperature={self.temperature}, {features.told(self)}"
