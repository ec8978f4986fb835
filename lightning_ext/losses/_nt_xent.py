"""SimCLR's loss as a module.

Source: Chen et al. 2020 (SimCLR, arXiv:2002.05709), eq. 1; τ = 0.1 is that of its section 5.
Differs: over ranks each pair of views of two ranks is computed by both, as nothing is sent back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ext.kernels import nt_xent_loss
from lightning_ext.losses import _features as features
from lightning_ext.losses import _ranks as ranks
from lightning_ext.losses._softmax import spread_logsumexp


class NTXentLoss(nn.Module):
    """Cross-entropy of finding each view's other view among all views of all ranks, u = [a; b]:

        z_ij = u_i·u_j / (τ ‖u_i‖ ‖u_j‖),    L = (1/2B) Σ_i (log Σ_{j≠i} exp z_ij − z_i,pair(i))

    Over ranks, each with as many rows, and under DDP: every rank returns the L of one process with
    the whole batch and its features get W ∂L/∂·, as in ``CLIPLoss``. Accumulation adds no
    negatives, a larger micro-batch does.

    Args:
        temperature: τ, above 0; not trained.
        normalize: whether rows are taken at length 1.
        gather_features: False, views of this rank alone.
        process_group: ranks that share views; by default all.
        fused: as in ``kernels.nt_xent_loss``.

    Raises:
        TypeError: as ``kernels.nt_xent_loss``.
        ValueError: if an argument is out of range, shapes do not fit, or ranks have different ones.

    Example:
        >>> NTXentLoss(temperature=1.0)(torch.eye(2), torch.eye(2)).item()  # log(e + 2) − 1
        0.5514...
    """  # noqa: D415

    def __init__(
        self,
        temperature: float = 0.1,
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

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return L.

        Args:
            a: the first views, shape (n, d), floating point.
            b: the second views, of the same shape and dtype.

        Returns:
            Shape (), at least float32.
        """
        group = ranks.sharing_group(self.gather_features, self.process_group)
        ranks.check_ranks(a, b, group)
        features.check_pairs(a, b, ("a", "b"))
        a, b = (features.prepared(x, self.normalize) for x in (a, b))
        if group is None:
            return nt_xent_loss(a, b, 1 / self.temperature, fused=self.fused)
        views, own = torch.cat([a, b]), torch.arange(2 * len(a), device=a.device)
        found = spread_logsumexp(
            *(views, views, 1 / self.temperature, group),
            labels=own.roll(len(a)),
            own=own,
            columns=False,
            fused=self.fused,
        )
        return ranks.mean_loss(found[0] - found[2], a, group)

    def extra_repr(self) -> str:
        """Say how it was set."""
        return f"temperature={self.temperature}, {features.told(self)}"
