"""A weight that is kept as codes of 8 bits, and is a parameter with a gradient all the same.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296): weights in INT8 blocks of
    256, which take their updates by stochastic rounding.
Differs: the gradient is in ``.grad`` of the parameter, where clipping, gradient scalers and DDP
    look for it, not in an attribute beside a tensor of integers; rows need not be whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_ext import kernels
from lightning_ext.functional import Quantized
from lightning_ext.nn._linear_of_codes import linear_of_codes
from lightning_ext.nn._nearest_codes import nearest_codes
from lightning_ext.nn._refusal import refusal, refuse_operators

_aten = torch.ops.aten


@refuse_operators
class Int8Weight(Tensor):
    """A matrix of codes from 0 to 255 with a scale and a shift for each block of its rows.

        W = z + s·q,   s = (max W − z)/255,   z = min W,   of ``block_size`` entries of a row

    It has the shape, dtype and gradient of W and the memory of q, s and z. Only reading it in
    ``torch.nn.functional.linear``, copies, moves and ``requantize_`` are defined.

    Args:
        codes: uint8, shape (rows, length).
        scales: shape (rows, ⌈length/block_size⌉).
        shifts: of the shape and dtype of the scales.
        block_size: entries that share a scale, a power of two from 16 to 4096.
        dtype: that W is seen in.

    Example:
        >>> weight = Int8Weight.of(torch.tensor([[0.0, 1.0, 2.55]]))
        >>> weight.codes.tolist(), weight.nbytes
        ([[0, 100, 255]], 11)
    """

    codes: Tensor
    scales: Tensor
    shifts: Tensor
    block_size: int

    @staticmethod
    def __new__(
        cls: type[Int8Weight],
        codes: Tensor,
        scales: Tensor,
        shifts: Tensor,
        block_size: int,
        dtype: torch.dtype,
    ) -> Int8Weight:
        """Wrap the tensors, without a copy."""
        self = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        self.codes, self.scales, self.shifts = codes, scales, shifts
        self.block_size = block_size
        return self

    @classmethod
    def of(cls, value: Tensor, *, block_size: int = 256) -> Int8Weight:
        """Return a weight with each entry rounded to the nearest code.

        Args:
            value: real floats, shape (rows, length).
            block_size: entries that share a scale.

        Raises:
            TypeError: if it is not of real floats, or is a DTensor.
            ValueError: if it is no matrix, or the block size is not allowed.
        """
        if value.ndim != 2:
            raise ValueError(
                f"value has shape {tuple(value.shape)}; an Int8Weight is a matrix: (rows, length)"
            )
        found = nearest_codes(value.detach(), block_size)
        assert found.shifts is not None
        return cls(found.codes, found.scales, found.shifts, block_size, value.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and shifts."""
        return self._quantized.nbytes

    @property
    def _quantized(self) -> Quantized:
        length = self.codes.shape[-1]
        return Quantized(self.codes, self.scales, self.shifts, "int8", self.block_size, length)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W as a plain tensor, without gradient.

        Args:
            dtype: of the result; by default the one that the weight is seen in.
        """
        return kernels.dequantize(self._quantized, dtype=dtype or self.dtype)

    def requantize_(
        self, new_value: Tensor, *, seed: int, step: int, stream: int = 0
    ) -> Int8Weight:
        """Take new numbers, each rounded up or down at random so that its mean is the number.

            q = ⌊(x − z)/s + u⌋,   u uniform in [0, 1) from a counter of seed, step and stream

        Blocks get new scales and shifts from the numbers. An update of less than s/2, which
        rounding to nearest would lose each time, moves the weight on average.

        Args:
            new_value: real floats in the shape of the weight.
            seed: 64 bits.
            step: 32 bits, the number of the optimizer step.
            stream: 32 bits, one for each weight of a model; the same on ranks that have to agree.

        Returns:
            The weight.

        Raises:
            ValueError: if the shape is another one, or a number does not fit.
        """
        found = kernels.quantize(
            self._wide(new_value),
            "int8",
            block_size=self.block_size,
            symmetric=False,
            seed=seed,
            step=step,
            stream=stream,
        )
        self._fill(found)
        torch.autograd.graph.increment_version(self)
        return self

    def share_memory_(self) -> Int8Weight:
        """Let processes share codes, scales and shifts."""
        self._map(Tensor.share_memory_)
        return self

    def _fill(self, found: Quantized) -> None:
        """Take codes into the memory that there is."""
        assert found.shifts is not None
        self.codes.copy_(found.codes)
        self.scales.copy_(found.scales)
        self.shifts.copy_(found.shifts)

    def _wide(self, value: Tensor) -> Tensor:
        """Numbers in the precision of scales."""
        if value.shape != self.shape:
            raise ValueError(
                f"the new value has shape {tuple(value.shape)}; the weight has {tuple(self.shape)}"
            )
        return value.detach().to(self.codes.device, self.scales.dtype)

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Int8Weight:
        codes, scales, shifts = (fn(x) for x in (self.codes, self.scales, self.shifts))
        return Int8Weight(codes, scales, shifts, self.block_size, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype]]:
        """Names of what it is made of, for torch.compile."""
        return ["codes", "scales", "shifts"], (self.block_size, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: tuple[int, torch.dtype], size: Any, stride: Any
    ) -> Int8Weight:
        """The inverse of ``__tensor_flatten__``."""
        return Int8Weight(parts["codes"], parts["scales"], parts["shifts"], *context)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for torch.compile."""
        seen = (self.shape, self.dtype, self.device, self.requires_grad, self.block_size)
        text = repr((*seen, self.scales.dtype, self.codes.stride(), self.scales.stride()))
        return sha256(text.encode()).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = (self.codes, self.scales, self.shifts, self.block_size, self.dtype)
        return _rebuild, (parts, isinstance(self, torch.nn.Parameter), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only leaves of a graph can be copied; call detach() first")
        copied = self._map(torch.clone)
        is_parameter = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = found = _restored(copied, is_parameter, self.requires_grad)
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"Int8Weight(shape={tuple(self.shape)}, block_size={self.block_size}, "
            f"dtype={self.dtype}, device={self.device}, requires_grad={self.requires_grad})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear:
            return linear_of_codes(*args, **(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise TypeError(_refusal(func))
        return handler(func, *args, **(kwargs or {}))


def _refusal(func: Any) -> str:
    return refusal(func.overloadpacket.__name__)


def _restored(weight: Int8Weight, is_parameter: bool, requires_grad: bool) -> Any:
    if is_parameter:
        return torch.nn.Parameter(weight, requires_grad)
    return weight.requires_grad_(requires_grad)


def _rebuild(parts: tuple[Any, ...], is_parameter: bool, requires_grad: bool) -> Any:
    return _restored(Int8Weight(*parts), is_parameter, requires_grad)


def _alias(func: Any, x: Int8Weight) -> Int8Weight:
    return x._map(lambda part: part.detach())


def _clone(func: Any, x: Int8Weight, **kwargs: Any) -> Int8Weight:
    return x._map(torch.clone)


def _to_copy(
    func: Any,
    x: Int8Weight,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> Int8Weight:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype} is not allowed; an Int8Weight is seen as real floats")
    return x._map(lambda part: part.to(device, non_blocking=non_blocking, copy=True), dtype)


def _copy(func: Any, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(to, Int8Weight):
        assert isinstance(source, Int8Weight)
        return to.copy_(source.dequantize(), non_blocking)
    if isinstance(source, Int8Weight) and _alike(to, source):
        for name in ("codes", "scales", "shifts"):
            getattr(to, name).copy_(getattr(source, name), non_blocking)
    else:
        numbers = source.dequantize(to.scales.dtype) if isinstance(source, Int8Weight) else source
        to._fill(nearest_codes(to._wide(numbers), to.block_size))
    return to


def _alike(one: Int8Weight, other: Int8Weight) -> bool:
    """Whether codes of one mean the same in the other's place."""
    blocks = one.block_size == other.block_size and one.scales.dtype == other.scales.dtype
    return blocks and one.shape == other.shape


def _like(func: Any, x: Int8Weight, *, device: Any = None, **kwargs: Any) -> Tensor:
    shape = torch.empty(x.shape, dtype=x.dtype, device="meta")
    return func(shape, device=device or x.device, **kwargs)


def _flattened(func: Any, x: Int8Weight, shape: Any) -> Tensor:
    """What DDP sends when it starts: the numbers, in the precision that gives codes back."""
    if list(shape) not in ([-1], [x.numel()]):
        raise TypeError(_refusal(func))
    return x.dequantize(x.scales.dtype).view(-1)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy,
    _aten.empty_like.default: _like,
    _aten.zeros_like.default: _like,
    _aten.ones_like.default: _like,
    _aten.view.default: _flattened,
}
