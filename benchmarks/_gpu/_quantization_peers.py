"""What torch, bitsandbytes and torchao have for codes of blocks of one size, to nearest."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu._timing import Call, compiled, later, peers
from lightning_ext.functional import Quantized

NATIVE = {"int8": (torch.int8, 127.0), "fp8_e4m3": (torch.float8_e4m3fn, 448.0)}
PRIMITIVES = "torchao.quantization.quant_primitives"


def encoders(x: Tensor, codes: Quantized, *, small: bool) -> dict[str, Call]:
    """Return ways to the codes and scales of x; bitsandbytes has codes of its own."""
    format, size = codes.format, codes.block_size
    found: dict[str, Call] = {}
    if format in NATIVE:
        found["torch cast"] = lambda: cast(x, format, size)
        if not small:
            found["torch cast compiled"] = later(lambda: called(compiled(cast), x, format, size))
    if small or format not in ("int8", "int4"):
        return found
    found |= peers(bitsandbytes=lambda package: bitsandbytes_encoder(package, x, codes))
    return found | (peers(torchao=lambda _: torchao_calls(x, size)[0]) if format == "int8" else {})


def decoders(x: Tensor, codes: Quantized, *, small: bool) -> dict[str, Call]:
    """Return ways back to the dtype of x, of codes that each of them made."""
    format, size = codes.format, codes.block_size
    found: dict[str, Call] = {}
    if format in NATIVE:
        made = cast(x, format, size)
        found["torch cast"] = lambda: uncast(*made, x.dtype)
        if not small:
            found["torch cast compiled"] = later(lambda: called(compiled(uncast), *made, x.dtype))
    if small or format not in ("int8", "int4"):
        return found
    found |= peers(bitsandbytes=lambda package: bitsandbytes_decoder(package, x, codes))
    return found | (peers(torchao=lambda _: torchao_calls(x, size)[1]) if format == "int8" else {})


def called(function: Any, *given: Any) -> Call:
    """Return a call of a function."""
    return lambda: function(*given)


def cast(x: Tensor, format: str, size: int) -> tuple[Tensor, Tensor]:
    """Codes in a dtype of torch, and the scales of blocks."""
    dtype, largest = NATIVE[format]
    blocks = x.view(-1, size).float()
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    units = blocks / scales
    return (units.round() if dtype == torch.int8 else units).to(dtype), scales


def uncast(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that they stand for."""
    return (codes.float() * scales).to(dtype)


def bitsandbytes_encoder(package: Any, x: Tensor, codes: Quantized) -> Call:
    """Its 8-bit map of floating point numbers, or its 4-bit one."""
    if codes.format == "int8":
        return lambda: package.functional.quantize_blockwise(x, blocksize=codes.block_size)
    return lambda: package.functional.quantize_4bit(x, blocksize=codes.block_size)


def bitsandbytes_decoder(package: Any, x: Tensor, codes: Quantized) -> Call:
    """Of what its encoder made."""
    made: Any = bitsandbytes_encoder(package, x, codes)()
    if codes.format == "int8":
        return lambda: package.functional.dequantize_blockwise(*made)
    return lambda: package.functional.dequantize_4bit(*made)


def torchao_calls(x: Tensor, size: int) -> tuple[Call, Call]:
    """Its symmetric integers: their encoding, which looks for the scales, too, and decoding."""
    kit = import_module(PRIMITIVES)
    block = (1, size)

    def encode() -> tuple[Tensor, Tensor, Tensor]:
        found = kit.choose_qparams_affine(x, kit.MappingType.SYMMETRIC, block, torch.int8)
        return kit.quantize_affine(x, block, *found, torch.int8), *found

    codes, *scales = encode()
    return encode, lambda: kit.dequantize_affine(
        codes, block, *scales, torch.int8, output_dtype=x.dtype
    )
