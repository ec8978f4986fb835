"""A GPT of half a million parameters on bytes, or on the tokens that they make.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3
    (pre-norm blocks, residual projections that start smaller with depth).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_ext.optim import Lion, NorMuon, param_groups_for

REFERENCE_BATCH = 16  # the global batch that the learning rates belong to
LR = {"adamw": 1e-3, "sgd": 0.03, "normuon": 0.01, "lion": 4e-4}
WEIGHT_DECAY = {"adamw": 0.1, "sgd": 0.0, "normuon": 0.01, "lion": 0.5}
UNDECAYED = ("bytes.weight", "positions.weight")  # embeddings


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
    """Predicts each byte, or token, of a window from those before it.

    Args:
        width: Of the residual stream; a multiple of ``heads``.
        layers: Number of blocks.
        heads: Attention heads of a block.
        context: Bytes that a prediction may look back on; windows have one more.
        vocabulary: Different bytes or tokens.
        embedding_std: Of the bytes' embeddings at the start. Behind a norm the gradient grows as
            they shrink: SGD at large steps wants them larger.
        optimizer: ``"adamw"``, ``"sgd"`` with momentum, ``"lion"``, or ``"normuon"``, under which
            embeddings, head and vectors go to AdamW at its own rate.
        lr: Learning rate; ``None`` means that of ``LR``, at 16 windows a step.
        weight_decay: Of matrices, not of biases, norms and embeddings; ``None`` means that of
            ``WEIGHT_DECAY``, decoupled but for SGD.
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
        vocabulary: int = 256,
        embedding_std: float = 0.02,
        optimizer: Literal["adamw", "sgd", "normuon", "lion"] = "adamw",
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
        self.bytes = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.bytes.weight.data *= embedding_std / 0.02

    def forward(self, windows: Tensor) -> Tensor:
        """Logits (windows, positions, vocabulary) of the byte that follows each."""
        positions = torch.arange(windows.shape[1], device=windows.device)
        x = self.bytes(windows.long()) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))

    def loss(self, windows: Tensor) -> Tensor:
        """Cross-entropy in nats per byte or token, the mean over windows (n, context + 1)."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].long().flatten())

    @torch.no_grad()
    def evaluate(self, loader: DataLoader[Tensor]) -> dict[str, float]:
        """Validation loss, the mean over all windows; of tokens in nats per byte, too."""
        parts = [(len(part), self.loss(part.to(self.device)).item()) for part in loader]
        loss = sum(size * loss for size, loss in parts) / sum(size for size, _ in parts)
        found = {"validation loss": loss}
        length = getattr(loader.dataset, "bytes_per_token", 1.0)
        return found if length == 1.0 else found | {"nats per byte": loss / length}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the loss, of the average where there is an ``EMA``."""
        self.log("val_loss", self.loss(batch), batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, with decay on matrices only."""
        chosen, settings = self.hparams["optimizer"], self.hparams
        lr = LR[chosen] if settings["lr"] is None else settings["lr"]
        decay = settings["weight_decay"]
        decay = WEIGHT_DECAY[chosen] if decay is None else decay
        if chosen == "normuon":
            groups = param_groups_for(self, NorMuon, weight_decay=decay, no_decay=UNDECAYED)
            return NorMuon(groups, lr=lr, adamw_lr=LR["adamw"], betas=settings["betas"])
        groups = self._groups(decay)
        if chosen == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=settings["momentum"])
        if chosen == "lion":
            return Lion(groups, lr=lr)
        return torch.optim.AdamW(groups, lr=lr, betas=settings["betas"])

    def _groups(self, decay: float) -> list[dict[str, Any]]:
        named = list(self.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and name not in UNDECAYED]
        others = [p for name, p in named if p.ndim != 2 or name in UNDECAYED]
        return [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
