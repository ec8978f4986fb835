"""A GPT of half a million parameters on bytes.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3
    (pre-norm blocks, residual projections that start smaller with depth).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
REFERENCE_BATCH = 16  # the global batch that the learning rates belong to
LR = {"adamw": 1e-3, "sgd": 0.03}
WEIGHT_DECAY = {"adamw": 0.1, "sgd": 0.0}


class Block(nn.Module):
    """Causal attention and a two-layer network, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (windows, positions, width) to the same shape."""
        parts = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.network_norm(x))))


class GPT(LightningModule):
    """Predicts each byte of a window from those before it.

    Args:
        width: Of the residual stream; a multiple of ``heads``.
        layers: Number of blocks.
        heads: Attention heads of a block.
        context: Bytes that a prediction may look back on; windows have one more.
        embedding_std: Of the bytes' embeddings at the start. Behind a norm the gradient grows as
            they shrink: SGD at large steps wants them larger.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum.
        lr: Learning rate; ``None`` means 1e-3 for AdamW and 0.03 for SGD, at 16 windows a step.
        weight_decay: Of matrices, not of biases, norms and embeddings; ``None`` means 0.1
            (decoupled) for AdamW and 0 for SGD.
        betas: Of AdamW.
        momentum: Of SGD.

    Raises:
        ValueError: An unknown optimizer, or a width that the heads do not divide.

    Example:
        >>> windows = torch.randint(256, (2, 65), dtype=torch.uint8)
        >>> GPT()(windows[:, :-1]).shape
        torch.Size([2, 64, 256])
    """

    def __init__(
        self,
        *,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        context: int = 64,
        embedding_std: float = 0.02,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float | None = None,
        weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if optimizer not in LR:
            raise ValueError(f"optimizer={optimizer!r}; choose one of {', '.join(LR)}")
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}")
        self.save_hyperparameters()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.bytes.weight.data *= embedding_std / 0.02

    def forward(self, windows: Tensor) -> Tensor:
        """Logits (windows, positions, 256) of the byte that follows each."""
        positions = torch.arange(windows.shape[1], device=windows.device)
        x = self.bytes(windows.long()) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))

    def loss(self, windows: Tensor) -> Tensor:
        """Cross-entropy in nats per byte, the mean over windows (n, context + 1)."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].long().flatten())

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Tensor]) -> dict[str, float]:
        """Validation loss in nats per byte, the mean over all windows."""
        parts = [(len(part), self.loss(part.to(self.device)).item()) for part in loader]
        total = sum(size for size, _ in parts)
        return {"validation loss": sum(size * loss for size, loss in parts) / total}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the loss, of the average where there is an ``EMA``."""
        self.log("val_loss", self.loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, with decay on matrices only."""
        chosen, settings = self.hparams["optimizer"], self.hparams
        lr = LR[chosen] if settings["lr"] is None else settings["lr"]
        decay = settings["weight_decay"]
        decay = WEIGHT_DECAY[chosen] if decay is None else decay
        kept = {"bytes.weight", "positions.weight"}
        named = list(self.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and name not in kept]
        others = [p for name, p in named if p.ndim != 2 or name in kept]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if chosen == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=settings["momentum"])
        return torch.optim.AdamW(groups, lr=lr, betas=settings["betas"])
