"""Gradients of a kernel by the plain operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def with_gradient(launch: Call, formula: Call, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return what a launch finds; its gradient is that of a formula, evaluated in backward.

    Args:
        launch: makes outputs of the tensors.
        formula: makes the same outputs by operations of torch.
        tensors: inputs that may need a gradient.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return launch(tensors)
    found: Sequence[Tensor] = _Recomputed.apply(launch, formula, *tensors)
    return found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launch: Call, formula: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        return tuple(launch(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        return None, None, *recomputed(ctx.formula, ctx.saved_tensors, wanted, gradients)


def recomputed(
    formula: Call, tensors: Sequence[Tensor], wanted: Sequence[bool], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of a formula, which have some themselves where autograd is on.

    Args:
        formula: makes outputs by operations of torch.
        tensors: its inputs.
        wanted: of which of them.
        gradients: of the outputs.
    """
    again = torch.is_grad_enabled()  # the gradient is to be differentiated
    with torch.enable_grad():
        # A tensor that was given twice is two.
        inputs = [x.view_as(x) if want else x for x, want in zip(tensors, wanted, strict=True)]
        outputs = formula(inputs)
    needed = [x for x, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, needed, gradients, create_graph=again))
    return [next(found) if want else None for want in wanted]
