"""Codes of blocks, sums of what ranks sent, and signs: bytes read and bytes written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks._gpu._quantization_peers import decoders, encoders
from benchmarks._gpu._timing import Call, Measurement, in_one, ways
from lightning_ext import functional, kernels
from lightning_ext.functional import Quantized

RANKS = 8
FORMATS = ("int8", "int4", "fp8_e4m3", "mxfp8_e4m3", "mxfp4_e2m1")
SENT = ("int8", "int4")  # over the wire, by ZeRO++


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield encoding and decoding, to nearest and at random, sums over ranks and signs."""
    rows, columns = (2, 256) if small else (1024, 2**17)
    shape = f"{rows} x {columns}"
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    for format in FORMATS:
        yield from coded(x, format, shape, small)
    for format in SENT:
        yield from received(x, format, shape, small)
    yield from signs(x, shape, small)
    yield rounded(x.float(), shape, small)


def own(call: Callable[[bool | None], object], small: bool) -> dict[str, Call]:
    """Return the suite's own variants and the plain one compiled."""
    return ways(call) | in_one(call, small=small)


def coded(x: Tensor, format: str, shape: str, small: bool) -> Iterator[Measurement]:
    """Yield one format's encoding and decoding."""
    codes = functional.quantize(x, format)
    moved = x.nbytes + codes.nbytes
    calls = own(lambda fused: kernels.quantize(x, format, fused=fused), small)
    calls |= encoders(x, codes, small=small)
    yield Measurement("quantize", f"{format}, nearest", "bfloat16", shape, calls, moved)
    calls = own(lambda fused: kernels.quantize(x, format, seed=1, fused=fused), small)
    yield Measurement("quantize", f"{format}, stochastic", "bfloat16", shape, calls, moved)
    calls = own(lambda fused: kernels.dequantize(codes, dtype=x.dtype, fused=fused), small)
    calls |= decoders(x, codes, small=small)
    yield Measurement("dequantize", format, "bfloat16", shape, calls, moved)


def received(x: Tensor, format: str, shape: str, small: bool) -> Iterator[Measurement]:
    """Yield the mean over ranks of what they sent, in float32 and encoded again."""
    one = functional.quantize(x, format)
    found = Quantized(
        torch.stack([one.codes] * RANKS),
        torch.stack([one.scales] * RANKS),
        None,
        *one[3:],
    )
    calls = own(lambda fused: kernels.dequantize_reduce(found, fused=fused), small)
    moved = found.nbytes + 4 * x.numel()
    yield Measurement(
        "dequantize_reduce", f"{format}, {RANKS} ranks", "float32", shape, calls, moved
    )
    calls = own(lambda fused: kernels.dequantize_reduce_quantize(found, fused=fused), small)
    moved = found.nbytes + one.nbytes
    yield Measurement(
        "dequantize_reduce_quantize", f"{format}, {RANKS} ranks", "uint8", shape, calls, moved
    )


def signs(x: Tensor, shape: str, small: bool) -> Iterator[Measurement]:
    """Yield the packing of signs and the vote over ranks."""
    packed = functional.pack_signs(x)
    ballots = torch.stack([packed] * RANKS)
    calls = own(lambda fused: kernels.pack_signs(x, fused=fused), small)
    yield Measurement("pack_signs", "all", "bfloat16", shape, calls, x.nbytes + packed.nbytes)
    votes = functional.majority_vote(ballots)
    calls = own(lambda fused: kernels.majority_vote(ballots, fused=fused), small)
    moved = ballots.nbytes + votes.nbytes
    yield Measurement("majority_vote", f"{RANKS} ranks", "uint8", shape, calls, moved)


def rounded(x: Tensor, shape: str, small: bool) -> Measurement:
    """Return rounding at random, and torch's to nearest, which has no bits to make."""
    calls = own(lambda fused: kernels.round_stochastic(x, seed=1, fused=fused), small)
    calls["torch cast, nearest"] = lambda: x.bfloat16()
    moved = x.nbytes + 2 * x.numel()
    return Measurement("round_stochastic", "to bfloat16", "float32", shape, calls, moved)
