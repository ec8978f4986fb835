"""Weights as codes for the all-gather of FSDP2.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209), section 3.1 (qwZ) and 3.2 (hpZ).
Differs: int4 as an option; a rank reads its own part from codes, too, so that all ranks compute
    with the same weights, bitwise; gathers inside a node are of the weights as they are.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ext import kernels
from lightning_ext.functional import Quantized
from lightning_ext.strategies._zeropp._extension_points import AllGather, Allocates, all_gather
from lightning_ext.strategies._zeropp._packed import check_wire_format, pack, unpack

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class QuantizedAllGather(Allocates, AllGather):
    """Gathers a unit's weights as codes of 8 or 4 bits with a scale for each block.

    The shard is rounded, the copies are s·round(w/s) with s = max|w|/127 of a block (int8), off by
    at most s/2; the sharded parameters and what the optimizer does to them stay exact. One object
    serves all units.

    Only gathers over ``group_size`` ranks are quantized. Others, over the secondary partition of
    ``fully_shard(reshard_after_forward=ranks_per_node)``, move what the forward pass has read from
    codes, as it is: backward sees the weights of forward, bitwise. As they are go also integers
    and bytes, which is how FSDP2 hands over a unit of several dtypes.

    Args:
        group_size: ranks that parameters are sharded over.
        format: "int8" or "int4".
        block_size: entries of a block, a power of two from 16 to 4096.

    Raises:
        TypeError: if a size is no integer.
        ValueError: for another format or block size.
    """

    def __init__(self, group_size: int, *, format: str = "int8", block_size: int = 256) -> None:
        check_wire_format(format, block_size)
        self.group_size = group_size
        self.format = format
        self.block_size = block_size

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather; FSDP2 calls it.

        Args:
            output_tensor: flat, of all ranks' parts.
            input_tensor: this rank's part, a view of the output.
            group: ranks.
            async_op: returns before it is done.

        Returns:
            ``None`` where it is done on the current stream, else what is to be waited for.
        """
        if not self._quantizes(input_tensor, group):
            return all_gather(output_tensor, input_tensor, group, async_op)
        sent = kernels.quantize(input_tensor, self.format, block_size=self.block_size)
        packed = pack(sent)
        # These buffers are allocated, filled and read on the stream that is current here, FSDP2's
        # all-gather stream, which waits for the backend's own at the end of the collective; they
        # go back to that stream's pool, behind all that used them, and need no record_stream.
        # FSDP2 keeps the output, of another stream, until an event after its copy-out.
        gathered = packed.new_empty(group.size() * packed.numel())
        work = all_gather(gathered, packed, group, async_op)
        if not async_op or work is None:
            _read(output_tensor, gathered, sent)
            return None
        return _Gathering(work, output_tensor, gathered, sent, packed)

    def _quantizes(self, shard: Tensor, group: dist.ProcessGroup) -> bool:
        return shard.dtype in _FLOATS and shard.numel() > 0 and group.size() == self.group_size


def _read(output: Tensor, gathered: Tensor, like: Quantized) -> None:
    """Write what codes stand for over all parts, this rank's included."""
    rows = output.view(-1, like.length)
    received = unpack(gathered.view(len(rows), -1), like)
    rows.copy_(kernels.dequantize(received, dtype=output.dtype))


class _Gathering(dist.Work):
    """A gather under way; codes are read where it is waited for, on the stream that waits."""

    def __init__(
        self, work: dist.Work, output: Tensor, gathered: Tensor, like: Quantized, packed: Tensor
    ) -> None:
        super().__init__()
        self._work = work
        # The packed codes are kept as well: the backend reads them until the work is done.
        self._buffers: tuple[Tensor, Tensor, Quantized, Tensor] | None
        self._buffers = (output, gathered, like, packed)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the codes and read them, once.

        Args:
            timeout: of the wait; the group's by default.
        """
        done = self._work.wait() if timeout is None else self._work.wait(timeout)
        if self._buffers is not None:
            output, gathered, like, _ = self._buffers
            _read(output, gathered, like)
            self._buffers = None
        return done
