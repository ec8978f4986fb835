"""The one place that decides whether an operation runs as a Triton kernel.

Differs: torch's optimizers let ``fused=True`` fail inside the launch; here it fails before.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from operator import attrgetter

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_dtype_of = attrgetter("dtype")


def use_triton(
    fused: bool | None, tensors: Iterable[Tensor], *, op: str, integers: Iterable[Tensor] = ()
) -> bool:
    """Decide by what ``fused`` means in ``torch.optim``.

    Args:
        fused: ``None``, the kernel where it can run and nothing else will do better: plain tensors
            in float32, bfloat16 or float16, on the current CUDA device, outside of
            ``torch.compile``, which fuses the plain operations itself, and of ``torch.func``;
            ``True``, the kernel or an error; ``False``, the plain operations.
        tensors: floating point values that the operation reads and writes, at least one of them if
            there are no integers.
        op: the operation's name, for the errors.
        integers: codes, indices and masks, which count for their device alone.

    Raises:
        RuntimeError: ``fused=True`` without triton, on a device where kernels do not run, or on one
            that is not the current one.
        TypeError: ``fused=True`` with a dtype that kernels do not take, or a DTensor.
        ValueError: ``fused=True`` with tensors on several devices.
    """
    if fused is None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        return HAS_TRITON and _are_on_the_card(list(tensors), list(integers))
    if fused:
        floats = list(tensors)
        _require_device([*floats, *integers], op)
        _require_type([*floats, *integers], op)
        _require_dtype(floats, op)
    return fused


def takes_codes(fused: bool | None, tensors: Iterable[Tensor], *, op: str) -> bool:
    """Decide as ``use_triton`` does, where tensors that are not floating point are codes."""
    found = list(tensors)
    integers = [x for x in found if not (x.is_floating_point() or x.is_complex())]
    floats = [x for x in found if x.is_floating_point() or x.is_complex()]
    return use_triton(fused, floats, op=op, integers=integers)


def _are_on_the_card(floats: list[Tensor], integers: list[Tensor]) -> bool:
    """Whether kernels take them; fast, for lists of hundreds of small tensors."""
    found = [*floats, *integers]
    if not found or found[0].device.type != "cuda":
        return False
    if set(map(Tensor.get_device, found)) != {torch.cuda.current_device()}:
        return False
    return not _wrappers(found) and set(map(_dtype_of, floats)) <= set(DTYPES)


def _wrappers(tensors: list[Tensor]) -> list[str]:
    """Names of types that hold other tensors, such as DTensor, and have no memory of their own."""
    kinds = set(map(type, tensors))
    return sorted(kind.__name__ for kind in kinds if hasattr(kind, "__tensor_flatten__"))


def _require_device(tensors: list[Tensor], op: str) -> None:
    if not HAS_TRITON:
        raise RuntimeError(
            f"{op}(fused=True) needs triton, which is not installed: pip install triton"
        )
    from lightning_ext.kernels._triton import _interpret

    devices = {x.device for x in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"{op}(fused=True) got tensors on {names}; they must be on one device")
    for device in devices:
        if not _interpret.runs_on(device):
            raise RuntimeError(
                f"{op}(fused=True) got tensors on {device}; kernels run on CUDA devices. Leave "
                "fused=None to have the plain operations elsewhere"
            )
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            raise RuntimeError(
                f"{op}(fused=True) got tensors on {device}, but kernels are launched on the "
                f"current device; call it under torch.cuda.device({device.index})"
            )


def _require_type(tensors: list[Tensor], op: str) -> None:
    wrappers = _wrappers(tensors)
    if wrappers:
        raise TypeError(
            f"{op}(fused=True) got {', '.join(wrappers)}; a kernel takes the memory of one rank. "
            "Give what to_local() returns"
        )


def _require_dtype(tensors: list[Tensor], op: str) -> None:
    wrong = sorted({str(x.dtype) for x in tensors if x.dtype not in DTYPES})
    if wrong:
        raise TypeError(
            f"{op}(fused=True) does not take {', '.join(wrong)}, but torch.float32, torch.bfloat16 "
            "and torch.float16. Leave fused=None to have the plain operations for others"
        )
