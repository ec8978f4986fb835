"""CLIP's loss as a module.

Source: Radford et al. 2021 (CLIP, arXiv:2103.00020), section 2.3 to 2.5.
Differs: no rank holds the logits, see ``kernels.clip_loss``; above its cap the scale can come down.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor, nn

from lightning_ext.kernels import clip_loss
from lightning_ext.losses import _features as features
from lightning_ext.losses import _ranks as ranks
from lightning_ext.losses._softmax import spread_logsumexp


class CLIPLoss(nn.Module):
    """Symmetric cross-entropy of matching images and texts, over the batch of all ranks:

        z_ij = s x_i·y_j / (‖x_i‖ ‖y_j‖),    s = min(exp(log_scale), max_scale)
        L = (1/B) Σ_i ½(log Σ_j exp z_ij − z_ii) + ½(log Σ_j exp z_ji − z_ii)

    On W data-parallel ranks of b pairs, B = W·b: every rank returns L, the loss of one process that
    has the whole batch. Rank k's features get W ∂L/∂x_k and the scale ∂L/∂log_scale, so that DDP's
    mean of gradients is that of one process, and nothing is left to multiply; where gradients are
    summed instead, divide by W. All ranks have to call it, with as many pairs each, and all have to
    go backward through it, or none: that is collective too, and one rank alone waits or fails.

    Accumulation adds no negatives: k micro-batches of b are k losses over W·b pairs, not one over
    k·W·b. A larger micro-batch does.

    Args:
        temperature: the scale starts at its inverse; above 0.
        learnable: whether ``log_scale``, shape (1,), is trained.
        max_scale: cap of s.
        normalize: whether rows are taken at length 1.
        gather_features: False, negatives of this rank alone: L is then that of its own b pairs.
        process_group: ranks that share negatives; by default all.
        fused: as in ``kernels.clip_loss``.

    Raises:
        TypeError: as ``kernels.clip_loss``.
        ValueError: if an argument is out of range, shapes do not fit, or ranks have different ones.

    Example:
        >>> CLIPLoss(temperature=1 / 3)(torch.eye(2), torch.eye(2)).item()  # log(1 + e⁻³)
        0.0485...
    """  # noqa: D415

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        max_scale: float = 100.0,
        normalize: bool = True,
        gather_features: bool = True,
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        features.check_positive(temperature, "temperature")
        features.check_positive(max_scale, "max_scale")
        if temperature * max_scale < 1:
            raise ValueError(
                f"temperature={temperature} is a scale of {1 / temperature:.4g}, above "
                f"max_scale={max_scale}; raise one of the two"
            )
        self.log_scale = features.number(math.log(1 / temperature), learnable)
        self.max_scale, self.normalize, self.fused = max_scale, normalize, fused
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
        ranks.check_ranks(image, text, group, self.log_scale)
        features.check_pairs(image, text, ("image", "text"))
        image, text = (features.prepared(x, self.normalize) for x in (image, text))
        if group is None:
            return clip_loss(image, text, self.scale, fused=self.fused)
        rows, columns, positives = spread_logsumexp(
            image, text, self.scale, group, fused=self.fused
        )
        return ranks.mean_loss((rows + columns) / 2 - positives, image, group)

    @property
    def scale(self) -> Tensor:
        """The factor s of the cosines, shape ()."""
        log_scale = features.scalar(self.log_scale)
        return features.Capped.apply(log_scale, math.log(self.max_scale)).exp()

    def extra_repr(self) -> str:
        """Say how it was set."""
        return f"max_scale={self.max_scale}, {features.told(self)}"
