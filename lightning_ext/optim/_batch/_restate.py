"""An optimizer's state, restated for another batch, and a word where its rate is not."""

from __future__ import annotations

import warnings

import torch
from torch.optim import Optimizer

from lightning_ext.functional import scale_state_
from lightning_ext.optim._batch._base_optimizer import base_optimizer
from lightning_ext.optim._batch._group import normalizes_gradient
from lightning_ext.scaling import momentum_buffer_scale, scale_step_count

_SECOND_MOMENTS = (
    *("exp_avg_sq", "max_exp_avg_sq", "square_avg"),
    *("sq_row", "sq_col", "length_avg_sq"),
)


def divide_step_counts(optimizer: Optimizer, ratio: float) -> None:
    """Counts the steps taken so far in steps of a batch ``ratio`` times as large.

    Steps that no moment holds yet stay: the class says in ``open_steps`` which state counts them.
    """
    name = getattr(base_optimizer(optimizer), "open_steps", None)
    for state in optimizer.state.values():
        step, waiting = state.get("step"), state.get(name, 0)
        if isinstance(step, torch.Tensor):
            step.copy_(scale_step_count(step - waiting, ratio) + waiting)
        elif step is not None:
            state["step"] = scale_step_count(step - waiting, ratio) + waiting


def scale_second_moments(optimizer: Optimizer, factor: float) -> None:
    """Multiplies the running mean of squared gradients of Adam-like optimizers and RMSprop.

    That of gradients whose norm is set does not know the batch, and stays.
    """
    if normalizes_gradient(optimizer):
        return
    for state in optimizer.state.values():
        for key, kept in state.items():
            name, _, format = key.partition(".")  # of what lives in a subspace, the format behind
            if name in _SECOND_MOMENTS and not format:
                scale_state_(kept, factor)
            elif name in _SECOND_MOMENTS and format.endswith("_scales"):
                scales = kept[:, 0] if format.startswith("fp8") else kept
                scales.mul_(factor)


def scale_momentum_buffers(optimizer: Optimizer, previous: float, kappa: float) -> None:
    """Keeps the mean gradient that SGD's buffers hold while μ goes from one power to another.

    The learning rate multiplies a buffer afterwards. So what it moves per sample stays as well, and
    where the learning rate is held back, it falls as much as what a new gradient moves.

    Args:
        optimizer: Its groups have the momentum of the reference batch.
        previous: Global batch over reference batch so far.
        kappa: The same from now on.
    """
    for group in optimizer.param_groups:
        old, new = (momentum_buffer_scale(group["momentum"], k) for k in (previous, kappa))
        for parameter in group["params"]:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                scale_state_(buffer, new / old)


def warn_of_clamping(global_batch: float, noise_scale: float, rule: str) -> None:
    """Warns that the learning rate stops growing with the batch."""
    warnings.warn(
        f"The global batch of {global_batch:g} is above the noise scale of {noise_scale:.4g}"
        " samples (AdaptiveBatchSize takes the upper limit of its interval): from there on the"
        f" learning rate no longer grows as {rule!r} has it. Hint: clamp_lr=False in"
        " AdaptiveBatchSize (clamp=False in BatchScaling) lets it grow all the same; a smaller"
        " max_global_batch saves samples.",
        stacklevel=4,
    )
