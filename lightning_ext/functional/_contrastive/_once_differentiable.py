"""What a hand-written backward pass answers when it is to be differentiated itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnceDifferentiable(torch.autograd.Function):
    """A function whose backward pass is an error.

    torch's own ``once_differentiable`` says nothing where only saved tensors need gradients: the
    second derivative would be missing in silence.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Refuse."""
        raise RuntimeError(
            "a contrastive loss by tiles can be differentiated once; for second derivatives write "
            "it out on the whole matrix of logits"
        )
