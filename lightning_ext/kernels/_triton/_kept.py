"""Small tables on a device, kept from launch to launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_KEPT = 64  # of each kind; a training loop needs a handful

P = ParamSpec("P")
T = TypeVar("T")


def kept(build: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function of hashable arguments, the first one a device, has put there.

    It is kept for the stream that it was put there on, since others do not wait for the copy and
    may still read what is let go. A CUDA graph takes what an earlier call has made, on any stream,
    and that is never let go. Under a dispatch mode, such as that of fake tensors, nothing is kept.

    Raises:
        RuntimeError: while a graph is captured, if there was no such call before.
    """
    found: OrderedDict[Any, dict[int, T]] = OrderedDict()
    captured: list[T] = []

    @wraps(build)
    def find(*arguments: P.args, **options: P.kwargs) -> T:
        if _get_current_dispatch_mode() is not None:
            return build(*arguments, **options)
        stream, capturing = _stream(arguments[0])
        streams = found.get(arguments, {})
        if capturing:
            if not streams:
                raise RuntimeError(
                    "a launch has no tables yet for what a CUDA graph captures; call the operation "
                    "once with the same tensors before"
                )
            captured.append(next(iter(streams.values())))
            return captured[-1]
        if stream not in streams:
            streams[stream] = build(*arguments, **options)
            found[arguments] = streams
            if len(found) > _KEPT:
                found.popitem(last=False)
        found.move_to_end(arguments)
        return streams[stream]

    return find


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device, without waiting for it."""
    return moved(torch.tensor(values, dtype=dtype, device="cpu"), device)


def moved(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _stream(device: Any) -> tuple[int, bool]:
    """The current stream of a device, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
