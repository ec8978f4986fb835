"""Calls of both normalizations: samples of one and of several runs, narrow and wide rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase, Run
from lightning_ext import kernels


def _run(
    *shape: int, bias: bool = True, norms: bool = True, centered: bool = True, mixed: bool = False
) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        wide = torch.float32 if mixed else None
        x = cast(torch.randn(shape, dtype=torch.float64) + 0.5).requires_grad_()
        given = {"weight": _parameter(cast, shape[-1], wide)}
        if bias:
            given["bias"] = _parameter(cast, shape[-1], wide)
        d = cast(torch.randn(shape, dtype=torch.float64))
        found = None
        if norms:
            found = cast(torch.rand(len(given), shape[0], dtype=torch.float64), torch.float32)
        op: Callable[..., Tensor] = kernels.layer_norm if centered else kernels.rms_norm
        y = op(x, x.shape[-1:], *given.values(), eps=1e-3, sample_sq_norms=found, fused=fused)
        y.backward(d)
        assert x.grad is not None
        outputs = {"y": y, "x gradient": x.grad} | ({} if found is None else {"norms": found})
        return outputs | {
            f"{name} gradient": p.grad for name, p in given.items() if p.grad is not None
        }

    return run


def _parameter(cast: Cast, features: int, dtype: torch.dtype | None) -> Tensor:
    return cast(torch.randn(features, dtype=torch.float64) + 1, dtype).requires_grad_()


def _plain(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    x = cast(torch.randn(3, 7, dtype=torch.float64)).requires_grad_()
    y = kernels.layer_norm(x, 7, fused=fused)
    (gradient,) = torch.autograd.grad(y, x, cast(torch.randn(3, 7, dtype=torch.float64)))
    return {"y": y, "x gradient": gradient}


def _rms(*shape: int, norms: bool = True) -> Run:
    return _run(*shape, bias=False, norms=norms, centered=False)


CASES = [
    KernelCase("layer_norm", "several runs", _run(3, 37, 65)),
    KernelCase("layer_norm", "rows that are samples", _run(19, 40)),
    KernelCase("layer_norm", "two dimensions of positions", _run(2, 3, 4, 128)),
    KernelCase("layer_norm", "no norms", _run(5, 33, 24, norms=False)),
    KernelCase("layer_norm", "no bias", _run(3, 5, 7, bias=False)),
    KernelCase("layer_norm", "wide weights", _run(2, 5, 64, mixed=True)),
    KernelCase("layer_norm", "one position, one feature", _run(1, 1, 1)),
    KernelCase("layer_norm", "a block and a half", _run(2, 3, 1536)),
    KernelCase("layer_norm", "widest block", _run(1, 2, 8192), layouts=()),
    KernelCase("layer_norm", "wide rows", _run(1, 9, 8200), layouts=()),
    KernelCase("layer_norm", "wider rows", _run(1, 1, 16448), (torch.float32,), ()),
    KernelCase("layer_norm", "wide rows that are samples", _run(9, 8448), layouts=()),
    KernelCase("layer_norm", "no parameters", _plain),
    KernelCase("layer_norm", "empty", _run(2, 0, 5)),
    KernelCase("rms_norm", "several runs", _rms(3, 37, 65)),
    KernelCase("rms_norm", "rows that are samples", _rms(19, 40)),
    KernelCase("rms_norm", "no norms", _rms(5, 33, 24, norms=False)),
    KernelCase("rms_norm", "one block", _rms(2, 9, 1024)),
    KernelCase("rms_norm", "wide rows", _rms(1, 9, 8200), layouts=()),
    KernelCase("rms_norm", "wider rows", _rms(1, 1, 16448), (torch.bfloat16,), ()),
]
