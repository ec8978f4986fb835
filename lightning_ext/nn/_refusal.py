"""What is said of operations that weights of 8 bits do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import Tensor

T = TypeVar("T", bound=type[Tensor])
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")


def refusal(name: str) -> str:
    """Return the error of an operation, with what to do instead.

    Args:
        name: of the operation.
    """
    return (
        f"{name} is not defined for an Int8Weight, whose codes change by requantize_() alone. Hint:"
        " train it with an optimizer that calls it (QGaLore), not with one of torch.optim, and"
        " under DDP, not fully_shard; read it with weight.dequantize(); or take the conversion back"
        " with lightning_ext.nn.undo_int8_linear(module)"
    )


def refuse_operators(cls: T) -> T:
    """Let operators raise that error: torch turns a TypeError of theirs into one of Python's own.

    Args:
        cls: the class of tensors.

    Returns:
        The class.
    """
    for name in _BINARY:
        for place in ("", "r", "i"):
            setattr(cls, f"__{place}{name}__", _refuses(f"__{place}{name}__"))
    return cls


def _refuses(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Tensor, other: Any) -> NoReturn:
        raise TypeError(refusal(name))

    return refuse
