"""A compact ResNet: as small as digits want it, or ResNet-18 for 224 pixels.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition" (basic blocks; ResNet-18 is
    width 64 and two blocks in each of four stages); Wu & He 2018, "Group Normalization" (16
    channels a group); Goyal et al. 2017, arXiv:1706.02677, section 5.1 (the last norm of a block
    begins at 0).
Differs: one stage more or less is an argument, and group normalization is the default: its output
    does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["group", "batch"]
convolution = partial(nn.Conv2d, bias=False)


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a residual, which is projected where the shape changes."""

    def __init__(
        self, channels: int, width: int, stride: int, norm: Norm, *, zero_init: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = convolution(channels, width, 3, stride=stride, padding=1)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = convolution(width, width, 3, padding=1)
        self.bn2 = norm_layer(norm, width)
        if zero_init:
            nn.init.zeros_(self.bn2.weight)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            shortcut = convolution(channels, width, 1, stride=stride)
            self.downsample = nn.Sequential(shortcut, norm_layer(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (images, channels, height, width) to ``width`` channels."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.downsample(x) + self.bn2(self.conv2(inner)))


class ResNet(nn.Module):
    """Stages of residual blocks; each halves the resolution and doubles the channels.

    Args:
        channels: Of the images.
        classes: Number of labels.
        width: Channels of the first stage.
        depth: Blocks of each stage. (2, 2, 2, 2) at width 64 is ResNet-18.
        stem: ``"small"``, a 3 × 3 convolution, for images of up to 64 pixels; ``"large"``, 7 × 7
            and pooling, which leave a quarter of the resolution.
        pool: Side of the map that the last stage is averaged to; 1 forgets where things are.
        norm: ``"group"``, or ``"batch"``, whose statistics are those of a micro-batch: then leave
            ``batch.max_micro_batch`` at ``null``, so that they do not change in flight.
        zero_init: Whether residual branches begin at 0, which large batches want in long runs;
            short ones of few layers learn faster without.

    Raises:
        ValueError: A size below 1, or an unknown stem or norm.

    Example:
        >>> import torch
        >>> ResNet(width=8, depth=(1, 1))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        classes: int = 10,
        width: int = 8,
        depth: Sequence[int] = (1, 1),
        stem: Literal["small", "large"] = "small",
        pool: int = 1,
        norm: Norm = "group",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if min(channels, classes, width, pool, len(depth), *depth) < 1:
            raise ValueError(
                f"channels={channels}, classes={classes}, width={width}, pool={pool},"
                f" depth={tuple(depth)}; each must be at least 1, and there must be a stage."
            )
        if stem not in ("small", "large"):
            raise ValueError(f"stem={stem!r}; choose one of small, large")
        large = stem == "large"
        self.stem = nn.Sequential(
            convolution(channels, width, 7, stride=2, padding=3)
            if large
            else convolution(channels, width, 3, padding=1),
            norm_layer(norm, width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity(),
        )
        self.stages = nn.Sequential(*_blocks(width, depth, norm, zero_init=zero_init))
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.head = nn.Linear(width * 2 ** (len(depth) - 1) * pool**2, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (images, classes)."""
        return self.head(self.pool(self.stages(self.stem(images))).flatten(1))


def norm_layer(norm: Norm, width: int) -> nn.GroupNorm | nn.BatchNorm2d:
    """A norm of so many channels."""
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm != "group":
        raise ValueError(f"norm={norm!r}; choose one of group, batch")
    groups = max(1, width // 16)
    return nn.GroupNorm(groups if width % groups == 0 else 1, width)


def _blocks(width: int, depth: Sequence[int], norm: Norm, *, zero_init: bool) -> list[nn.Module]:
    found: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(depth):
        wide = width * 2**stage
        for number in range(count):
            stride = 2 if stage and not number else 1
            found.append(Block(channels, wide, stride, norm, zero_init=zero_init))
            channels = wide
    return found
