"""A linear layer with its weight in codes of 8 bits.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_ext.nn._apply_in_place import apply_in_place
from lightning_ext.nn._int8_weight import Int8Weight


class Int8Linear(nn.Linear):
    """``torch.nn.Linear`` whose weight is an ``Int8Weight``: y = x·(z + s·q)ᵀ + b.

    The state dict has the codes as ``weight``, and beside them ``weight_scales`` and
    ``weight_shifts``, all plain tensors. It loads such a one bit for bit, and that of a
    ``torch.nn.Linear`` to the nearest codes.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether there is one; it is not quantized.
        device: of the parameters.
        dtype: that the weight is seen in, and of the bias.
        block_size: entries of a row of the weight that share scale and shift, a power of two from
            16 to 4096.

    Raises:
        TypeError: if the dtype is complex, or the block size no integer.
        ValueError: if the block size is not allowed.
        RuntimeError: from ``load_state_dict``, if what it gives for the weight does not fit.

    Example:
        >>> layer = Int8Linear(512, 10)
        >>> layer.weight.nbytes, layer(torch.ones(3, 512)).shape
        (5280, torch.Size([3, 10]))
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 256,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight = nn.Parameter(Int8Weight.of(self.weight.detach(), block_size=block_size))

    def reset_parameters(self) -> None:
        """Draw new numbers, as ``torch.nn.Linear`` does."""
        if not isinstance(self.weight, Int8Weight):
            return super().reset_parameters()
        drawn = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            self.weight.device,
            self.weight.dtype,
        )
        with torch.no_grad():
            self.weight.copy_(drawn.weight)
            if self.bias is not None:
                self.bias.copy_(drawn.bias)
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self._parameters.get("weight")
        if not isinstance(weight, Int8Weight):
            return super()._apply(fn, recurse)
        moved = apply_in_place(weight, fn)
        self._parameters["weight"] = None  # torch would swap it
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = moved

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        assert isinstance(weight, Int8Weight)
        destination[f"{prefix}weight"] = weight.codes
        destination[f"{prefix}weight_scales"] = weight.scales
        destination[f"{prefix}weight_shifts"] = weight.shifts

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.weight
        assert isinstance(own, Int8Weight)
        scales = state_dict.pop(f"{prefix}weight_scales", None)
        shifts = state_dict.pop(f"{prefix}weight_shifts", None)
        found = state_dict.get(f"{prefix}weight")
        if isinstance(found, Tensor) and not isinstance(found, Int8Weight):
            try:
                weight = _read(found, scales, shifts, own)
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
            state_dict = {**state_dict, f"{prefix}weight": weight}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _read(found: Tensor, scales: Any, shifts: Any, own: Int8Weight) -> Int8Weight:
    """What a state dict has for a weight: codes, or numbers."""
    if found.shape != own.shape:
        raise ValueError(f"it has shape {tuple(found.shape)}; the weight has {tuple(own.shape)}")
    if found.is_floating_point():
        return Int8Weight.of(found.to(own.scales.dtype), block_size=own.block_size)._map(
            lambda part: part, own.dtype
        )
    if scales is None or shifts is None:
        raise ValueError(
            f"it is {found.dtype} without weight_scales and weight_shifts beside it, as codes have"
        )
    if scales.shape != own.scales.shape or shifts.shape != own.shifts.shape:
        raise ValueError(
            f"its scales have shape {tuple(scales.shape)}; in blocks of {own.block_size} they have"
            f" {tuple(own.scales.shape)}. Hint: convert with the block_size that was saved"
        )
    return Int8Weight(found, scales, shifts, own.block_size, own.dtype)
