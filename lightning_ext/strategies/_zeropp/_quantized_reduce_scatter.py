"""Gradients as codes for the reduce-scatter of FSDP2, in one or two all-to-alls.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209), section 3.3 (qgZ); Xie et al. 2024 (LoCo,
    arXiv:2407.04480) for the feedback of errors.
Differs: the chunk of a destination is a row with blocks of its own, so that no block straddles two
    destinations; codes and scales go in one collective a hop; feedback for both hops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_ext import kernels
from lightning_ext.functional import Quantized
from lightning_ext.strategies._zeropp._error_feedback import ErrorFeedback
from lightning_ext.strategies._zeropp._extension_points import Allocates, ReduceScatter
from lightning_ext.strategies._zeropp._node_groups import NodeGroups
from lightning_ext.strategies._zeropp._packed import check_wire_format, pack, unpack


class QuantizedReduceScatter(Allocates, ReduceScatter):
    """Reduces a unit's gradients as codes of 4 or 8 bits with a scale for each block.

    With two hops, over ranks (n, l) of nodes n and places l on them, where ḡ is what codes of g
    stand for, and chunk (n, l) the part of the gradient that rank (n, l) keeps:

        hop 1, inside a node    rank (m, l) reads the chunks (n, l), for all n, of its node's ranks:
                                a_m(n) = mean_k ḡ_(m, k)(n, l)
        hop 2, across nodes     rank (n, l) reads them of (m, l), for all m:  mean_m ā_m(n)

    Both means are taken in full precision; only what is sent is rounded, by at most half a step.
    Across nodes goes 1/ranks_per_node of what a single hop would send. A single node, or one rank
    on each, has a single hop. A block that holds inf or nan arrives as nan.

    One object serves one unit, as it keeps the errors and the count of the unit.

    Args:
        groups: of ``node_groups``, of the ranks that parameters are sharded over.
        format: "int4" or "int8".
        block_size: entries of a block, a power of two from 16 to 4096.
        seed: rounds up or down at random, so that the mean is the gradient; to nearest where
            ``None``, which has the smaller error.
        error_feedback: adds to a gradient what rounding withheld from those before. It costs
            a bit more than 1 byte (4 with "float32") for each entry of the whole gradient of the
            unit on every rank, and that divided by ``ranks_per_node`` for the second hop.
        error_beta: weight of the old error in [0, 1), as in ``functional.error_feedback``.
        error_reset_every: reductions, which are optimizer steps where each has one, after which
            errors start at zero; 0 for never.
        error_format: of the errors in memory, "int8" or "float32".

    Raises:
        TypeError: if the block size is no integer.
        ValueError: if a setting is outside of its range.
    """

    def __init__(
        self,
        groups: NodeGroups,
        *,
        format: str = "int4",
        block_size: int = 256,
        seed: int | None = None,
        error_feedback: bool = False,
        error_beta: float = 0.8,
        error_reset_every: int = 1024,
        error_format: str = "int8",
    ) -> None:
        check_wire_format(format, block_size)
        if error_reset_every < 0:
            raise ValueError(
                f"error_reset_every={error_reset_every} is not allowed; it is 0 or more"
            )
        self.groups = groups
        self.format = format
        self.block_size = block_size
        self.seed = seed
        self.error_reset_every = error_reset_every
        feedback = ErrorFeedback(beta=error_beta, format=error_format)
        self._feedback = feedback if error_feedback else None
        self._reductions = 0

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce; FSDP2 calls it.

        All is done, on the current stream, where it returns. What it allocates is used by that
        stream alone, FSDP2's reduce-scatter stream; FSDP2 keeps the input until an event after it.

        Args:
            output_tensor: flat, of this rank's chunk.
            input_tensor: flat, of the chunks of all ranks.
            group: ranks.
            op: mean or sum.
            async_op: without effect.

        Raises:
            ValueError: for another op, or other ranks than those of ``groups``.
        """
        reduction = _reduction(op)
        self.groups.check(group)
        if input_tensor.numel():
            rows = input_tensor.view(len(self.groups.ranks), -1)
            received = self._exchange(rows, reduction)
            dtype = output_tensor.dtype
            mean = kernels.dequantize_reduce(received, reduction=reduction, dtype=dtype)
            output_tensor.copy_(mean)
        self._reductions += 1
        if self.error_reset_every and self._reductions % self.error_reset_every == 0:
            self.reset()

    def reset(self) -> None:
        """Forget the errors, for instance where the loss is scaled by another factor."""
        if self._feedback is not None:
            self._feedback.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's errors and count as plain values, to be saved for each rank."""
        errors = [] if self._feedback is None else self._feedback.state()
        return {**self._layout(), "reductions": self._reductions, "errors": errors}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from what the same rank has saved.

        Errors of other ranks, nodes, or another format are left out, and the feedback starts at
        zero; so it does, at the next reduction, with chunks of another length.

        Args:
            state: of ``state_dict``.

        Returns:
            Whether the errors were taken over.
        """
        self._reductions = int(state["reductions"])
        same = {key: state[key] for key in self._layout()} == self._layout()
        if self._feedback is not None:
            self._feedback.load(state["errors"] if same else [])
        return same

    def _layout(self) -> dict[str, Any]:
        """What errors belong to."""
        return {
            "ranks": len(self.groups.ranks),
            "ranks_per_node": self.groups.ranks_per_node,
            "error_format": None if self._feedback is None else self._feedback.format,
        }

    def _exchange(self, rows: Tensor, reduction: str) -> Quantized:
        """Return what is to be reduced to this rank's chunk, shape (senders, chunk)."""
        groups, sent = self.groups, self._encode(0, rows)
        if groups.local is None or groups.across is None:
            return _all_to_all(sent, groups.local or groups.across)
        # Rows (node, local) are sent to local: its rows of all nodes are to be one message.
        nodes = (groups.nodes, groups.ranks_per_node)
        by_local = sent._replace(
            codes=sent.codes.unflatten(0, nodes).transpose(0, 1),
            scales=sent.scales.unflatten(0, nodes).transpose(0, 1),
        )
        received = _all_to_all(by_local, groups.local)
        return _all_to_all(self._encode_again(received, reduction), groups.across)

    def _encode(self, hop: int, rows: Tensor) -> Quantized:
        def encoded(x: Tensor) -> Quantized:
            return kernels.quantize(x, self.format, block_size=self.block_size, **self._bits(hop))

        if self._feedback is None:
            return encoded(rows)
        return self._feedback.encode(hop, rows, encoded)

    def _encode_again(self, received: Quantized, reduction: str) -> Quantized:
        """Reduce over the ranks of the node, and encode a row for every node."""
        if self._feedback is not None:
            return self._encode(1, kernels.dequantize_reduce(received, reduction=reduction))
        return kernels.dequantize_reduce_quantize(received, reduction=reduction, **self._bits(1))

    def _bits(self, hop: int) -> dict[str, Any]:
        """A stream for each rank and hop, so that their roundings are independent."""
        if self.seed is None:
            return {}
        stream = hop * len(self.groups.ranks) + dist.get_rank()
        return {"seed": self.seed, "step": self._reductions, "stream": stream}


def _all_to_all(sent: Quantized, group: dist.ProcessGroup | None) -> Quantized:
    """Send the k-th row of codes and scales to the k-th rank, and return the rows received."""
    packed = pack(sent)
    received = packed.new_empty(packed.shape)
    dist.all_to_all_single(received, packed, group=group)
    return unpack(received, sent)


def _reduction(op: Any) -> str:
    # The name on the left decides: torch compares an op with its kind, and not the other way.
    if op == dist.ReduceOp.AVG:
        return "mean"
    if op == dist.ReduceOp.SUM:
        return "sum"
    raise ValueError(
        f"gradients can be reduced by ReduceOp.AVG or ReduceOp.SUM, and not by {op}; "
        "instead of set_gradient_divide_factor alone, call set_force_sum_reduction_for_comms(True) "
        "on the module, which divides after a sum"
    )
