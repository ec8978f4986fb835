"""Clipping by the global norm of parameters of which ranks hold parts, and of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

from lightning_ext._lightning import View


def clip_over_ranks(plugin: Precision, view: Callable[[], View]) -> None:
    """Has a precision plugin clip what ranks hold parts of.

    Args:
        plugin: Lightning's, which would clip by the norm of one rank's part.
        view: Gives that of the Trainer.
    """
    setattr(plugin, "clip_grad_by_norm", partial(_by_norm, plugin, view))  # noqa: B010
    setattr(plugin, "clip_grad_by_value", partial(_by_value, plugin))  # noqa: B010


def _by_norm(plugin: Precision, view: Callable[[], View], optimizer: Any, clip_val: float) -> None:
    clip_by_global_norm(view(), list(plugin.main_params(optimizer)), clip_val)


def _by_value(plugin: Precision, optimizer: Any, clip_val: float) -> None:
    clip_by_value(list(plugin.main_params(optimizer)), clip_val)


def clip_by_global_norm(view: View, parameters: Sequence[Parameter], max_norm: float) -> Tensor:
    """Scales gradients by min(max_norm/(‖g‖ + 1e-6), 1), as torch does.

    Args:
        view: Of the Trainer, for the norm of what ranks hold parts of.
        parameters: DTensors on several meshes and plain ones, as they come.
        max_norm: At least 0.

    Returns:
        ‖g‖, over all ranks.
    """
    trained = [one for one in parameters if one.grad is not None]
    norm = view.sq_norm([one.grad for one in trained if one.grad is not None]).sqrt()
    for members in _by_mesh(trained):
        clip_grads_with_norm_(members, max_norm, norm)
    return norm


def clip_by_value(parameters: Sequence[Parameter], limit: float) -> None:
    """Clamps each element of a gradient to [−limit, limit].

    Args:
        parameters: DTensors on several meshes and plain ones, as they come.
        limit: At least 0.
    """
    for members in _by_mesh([one for one in parameters if one.grad is not None]):
        clip_grad_value_(members, limit)


def _by_mesh(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    kinds: dict[Any, list[Parameter]] = defaultdict(list)
    for one in parameters:
        kinds[one.device_mesh if isinstance(one, DTensor) else None].append(one)
    return list(kinds.values())
