"""SigLIP's loss as a module.

Source: Zhai et al. 2023 (SigLIP, arXiv:2303.15343), eq. 1, algorithm 1, and section 3.3 for blocks.
Differs: no rank holds the logits, see ``kernels.siglip_loss``; blocks as in ``_ranks``.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor, nn

from lightning_ext.kernels import siglip_loss
from lightning_ext.losses import _features as features
from lightning_ext.losses import _ranks as ranks
from lightning_ext.losses._sigmoid import spread_siglip


class SigLIPLoss(nn.Module):
    """Telling for each image and text of all ranks whether they match:

        z_ij = s x_i·y_j / (‖x_i‖ ‖y_j‖) + b,    s = exp(log_scale)
        L = −(1/B) Σ_i Σ_j log σ(±z_ij),    + for i = j, − for all others

    Over ranks, each with as many rows, and under DDP: every rank returns the L of one process with
    the whole batch, its features get W ∂L/∂·, scale and bias ∂L/∂·, as in ``CLIPLoss``.
    Accumulation adds no negatives, a larger micro-batch does.

    Args:
        scale: s at the start, above 0.
        bias: b at the start.
        learnable: whether ``log_scale`` and ``bias``, shape (1,), are trained.
        normalize: whether rows are taken at length 1.
        gather_features: False, negatives of this rank alone.
        process_group: ranks that share negatives; by default all.
        fused: as in ``kernels.siglip_loss``.

    Raises:
        TypeError: as ``kernels.siglip_loss``.
        ValueError: if an argument is out of range, shapes do not fit, or ranks have different ones.

    Example:
        >>> SigLIPLoss(4.0, bias=-2.0)(torch.eye(2), torch.eye(2)).item()  # 2 log(1 + e⁻²)
        0.2538...
    """  # noqa: D415

    def __init__(
        self,
        scale: float = 10.0,
        *,
        bias: float = -10.0,
        learnable: bool = True,
        normalize: bool = True,
        gather_features: bool = True,
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        features.check_positive(scale, "scale")
        if not math.isfinite(bias):
            raise ValueError(f"bias={bias} is not allowed; give a finite number")
        self.log_scale = features.number(math.log(scale), learnable)
        self.bias = features.number(bias, learnable)
        self.normalize, self.fused = normalize, fused
        self.gather_features, self.process_group = gather_features, process_group

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return L.

        Args:
            image: x, shape (b, d), floating point.
            text: y, of the same shape and dtype; row i belongs to row i of ``image``.

        Returns:
            Shape (), at least float32.
        """
        group = ranks.sharing_group(self.gather_features, self.process_group)
        ranks.check_ranks(image, text, group, self.log_scale, self.bias)
        features.check_pairs(image, text, ("image", "text"))
        image, text = (features.prepared(x, self.normalize) for x in (image, text))
        bias = features.scalar(self.bias)
        if group is None:
            return siglip_loss(image, text, self.scale, bias, fused=self.fused)
        losses = spread_siglip(image, text, self.scale, bias, group, fused=self.fused)
        return ranks.mean_loss(losses, image, group)

    @property
    def scale(self) -> Tensor:
        """The factor s of the cosines, shape ()."""
        return features.scalar(self.log_scale).exp()

    def extra_repr(self) -> str:
        """Say how it was set."""
        return features.told(self)
