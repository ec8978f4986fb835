"""Settings of updates: decay rates, momentum, and where random bits begin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ext.functional._quantization._random_bits import check_counter
from lightning_ext.functional._updates._adam_directions import STREAMS


def check_betas(betas: Sequence[float], count: int = 2) -> None:
    """Refuse decay rates out of range.

    Args:
        betas: each in [0, 1).
        count: how many there must be.

    Raises:
        TypeError: if they are no tuple or list.
        ValueError: if one is out of range, or there are more or less of them.
    """
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas={betas!r} is not allowed; give a tuple of {count} numbers")
    if len(betas) != count:
        raise ValueError(f"betas={betas} is not allowed; give {count} numbers")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} is not allowed; each must lie in [0, 1)")


def check_came(betas: Sequence[float], eps: Sequence[float]) -> None:
    """Refuse decay rates of CAME out of range, and another number of them or of its ε.

    Args:
        betas: three.
        eps: two.

    Raises:
        TypeError: if one of both is no tuple or list.
        ValueError: if they do not fit.
    """
    check_betas(betas, 3)
    if not isinstance(eps, (tuple, list)):
        raise TypeError(f"eps={eps!r} is not allowed; give a tuple of 2 numbers")
    if len(eps) != 2:
        raise ValueError(f"eps={eps} is not allowed; give 2 numbers, for V and for the residuals")


def check_momentum(momentum: float, dampening: float, has_buffer: bool, *, nesterov: bool) -> None:
    """Refuse settings of SGD that do not fit together.

    Args:
        momentum: μ.
        dampening: τ.
        has_buffer: whether there is one to keep the momentum in.
        nesterov: whether the step looks ahead.

    Raises:
        ValueError: if they do not.
    """
    if momentum and not has_buffer:
        raise ValueError(f"momentum={momentum} needs a momentum buffer, zeros at first; none given")
    if nesterov and (not momentum or dampening):
        raise ValueError(
            f"nesterov=True with momentum={momentum} and dampening={dampening} is not allowed; it "
            "needs a momentum above 0 and no dampening"
        )


def check_share(name: str, value: float) -> None:
    """Refuse a share that is kept at each step.

    Args:
        name: the setting's name.
        value: in [0, 1).

    Raises:
        ValueError: if it is out of range.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is not allowed; it must lie in [0, 1)")


def check_streams(op: str, seed: int, stream: int, count: int) -> None:
    """Refuse a key and a first stream whose random bits do not last for all parameters.

    Args:
        op: the operation's name.
        seed: in [0, 2⁶⁴).
        stream: of the first parameter.
        count: parameters.

    Raises:
        TypeError: if one is no whole number.
        ValueError: if one does not fit.
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not isinstance(value, int):
            raise TypeError(f"{op} got {name}={value!r}; give a whole number")
    check_counter(seed, 0, stream)
    last = stream + STREAMS * count - 1
    if last >> 32 > 0:
        raise ValueError(
            f"{op} got stream={stream} for {count} parameters, each of which takes {STREAMS}; the "
            f"last one would be {last}, but must lie in [0, 2**32)"
        )


def check_counts(op: str, steps: Sequence[Tensor]) -> None:
    """Refuse counts of steps on the CPU by which no random bits go.

    Args:
        op: the operation's name.
        steps: each in [0, 2³²); those elsewhere are not waited for.

    Raises:
        ValueError: if one is out of range.
    """
    for i, step in enumerate(steps):
        if step.is_cpu and not 0 <= float(step) < 2**32:
            raise ValueError(
                f"{op} got steps[{i}]={float(step)}; random bits go by counts in [0, 2**32)"
            )
