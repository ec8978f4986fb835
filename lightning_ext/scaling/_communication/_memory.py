"""Bytes that the states of a model take on each rank, under data-parallel strategies.

Source: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3 and figure 1); Wang et al. 2023
    (ZeRO++, arXiv:2306.10209, section 3.2), the secondary partition; Xie et al. 2024 (LoCo,
    arXiv:2407.04480), the compensation of low-bit gradients.
Differs: bytes per parameter are given, not those of mixed-precision Adam alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ext.scaling._validate import require_count, require_non_negative

# Of weights, gradients and optimizer states, what is divided by the number of ranks.
_DIVIDED = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
    "zeropp": (True, True, True),
}
_ONE_REDUCTION = frozenset({"fsdp2", "zeropp"})


@dataclass(frozen=True)
class ShardedMemory:
    """Bytes of the model's states on one rank.

    Args:
        weights: parameters.
        gradients: their gradients.
        optimizer: states of the optimizer, with a second copy of the weights where it has one.
        secondary: of hpZ, the part of the gathered weights that is kept until the backward pass.
        error_feedback: of quantized gradients, what the last step left out.
    """

    weights: float
    gradients: float
    optimizer: float
    secondary: float = 0.0
    error_feedback: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def sharded_memory(
    params: int,
    world: int,
    node: int,
    strategy: str,
    *,
    weight_bytes: float = 4,
    gradient_bytes: float = 4,
    optimizer_bytes: float = 8,
    accumulate: int = 1,
    hpz: bool = True,
    gathered_bytes: float | None = None,
    error_bytes: float = 0.0,
) -> ShardedMemory:
    """Return the bytes of weights, gradients and optimizer states on each rank.

    With w, g and K bytes per parameter, Ψ parameters, n ranks, k of them on a node:

    ====================  =========================================
    strategy              bytes
    ====================  =========================================
    ddp                   (w + g + K)·Ψ
    zero1                 (w + g)·Ψ + K·Ψ/n
    zero2                 w·Ψ + (g + K)·Ψ/n
    zero3, fsdp2, zeropp  (w + g + K)·Ψ/n
    zeropp besides        hpZ gathered_bytes·Ψ/k, error_bytes·Ψ
    ====================  =========================================

    FSDP2 reduces once in a step, and keeps whole gradients while micro-batches accumulate: then
    fsdp2 and zeropp hold g·Ψ of them. Of two hops, the second has errors of its own, a k-th more.
    Activations are not counted, nor are the units that are gathered at the moment with their
    gradients. The defaults are Adam in float32; mixed precision with float32 master weights in the
    optimizer is 2, 2 and 12.

    Args:
        params: Ψ, of the model; at least 1.
        world: n, ranks over which states are divided.
        node: k, ranks of a node.
        strategy: "ddp", "zero1", "zero2", "zero3", "fsdp2" or "zeropp".
        weight_bytes: w, bytes per parameter of the weights as they are kept.
        gradient_bytes: g, of the gradients.
        optimizer_bytes: K, of the optimizer's states.
        accumulate: micro-batches of a step.
        hpz: of zeropp, whether there is a secondary partition. On a single node there is none.
        gathered_bytes: bytes per parameter of the secondary partition; ``None``: ``weight_bytes``.
        error_bytes: of zeropp, error feedback per parameter, held for the gradient of the whole
            model on each rank. 0 without; 4 in float32; in int8 1 and the scales.

    Returns:
        Bytes of one rank.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if one is out of range, or the strategy unknown.

    Example:
        >>> mixed = dict(weight_bytes=2, gradient_bytes=2, optimizer_bytes=12)
        >>> sharded_memory(7_500_000_000, 64, 8, "zero3", **mixed).total / 1e9
        1.875
    """
    counts = {"params": params, "world": world, "node": node, "accumulate": accumulate}
    for name, count in counts.items():
        require_count(name, count)
    if strategy not in _DIVIDED:
        raise ValueError(
            f"strategy={strategy!r} is unknown; it must be one of {', '.join(_DIVIDED)}"
        )
    kept = weight_bytes if gathered_bytes is None else gathered_bytes
    each = {
        "weight_bytes": weight_bytes,
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": optimizer_bytes,
        "gathered_bytes": kept,
        "error_bytes": error_bytes,
    }
    for name, value in each.items():
        require_non_negative(name, value)
    divided = _DIVIDED[strategy]
    if accumulate > 1 and strategy in _ONE_REDUCTION:
        divided = (divided[0], False, divided[2])
    states = (weight_bytes, gradient_bytes, optimizer_bytes)
    weights, gradients, optimizer = (
        value * params / (world if is_divided else 1)
        for value, is_divided in zip(states, divided, strict=True)
    )
    if strategy != "zeropp":
        return ShardedMemory(weights, gradients, optimizer)
    secondary = kept * params / node if hpz and node < world else 0.0
    errors = error_bytes * params * (1 + 1 / node if 1 < node < world else 1)
    return ShardedMemory(weights, gradients, optimizer, secondary, errors)
