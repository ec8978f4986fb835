"""One way to run an operation for its truth, for torch's own result and as a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness._accuracy import assert_accurate

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "misaligned", "strided")
_GUARD = 64  # entries before and behind each tensor, a multiple of 16 bytes


@dataclass
class Cast:
    """Makes the inputs of a case: rounded to a dtype, then in the dtype and place they run in.

    Args:
        dtype: what inputs are rounded to where the case names no other.
        device: where they go.
        exact: widen them to float64 after rounding, for the truth.
        layout: of their memory.
        guarded: put each of them into a larger buffer full of NaN.
    """

    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exact: bool = False
    layout: str = "contiguous"
    guarded: bool = False
    _buffers: list[tuple[Tensor, int, int]] = field(default_factory=list)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return x for this run; integers and booleans are only moved."""
        if not x.is_floating_point():
            return x.to(self.device)
        x = x.detach().to(dtype or self.dtype)
        if self.exact:
            x = x.double()
        return self._guard(x.to(self.device)) if self.guarded else x.to(self.device)

    def assert_untouched(self) -> None:
        """Assert that nothing was written before or behind an input, nor between its entries."""
        for buffer, start, stop in self._buffers:
            around = torch.cat([buffer[:start], buffer[stop:]])
            assert around.isnan().all(), "written outside of a tensor"
            if self.layout == "strided":
                assert buffer[start + 1 : stop : 2].isnan().all(), "written between entries"

    def _guard(self, x: Tensor) -> Tensor:
        step = 2 if self.layout == "strided" and x.ndim > 0 else 1
        start = _GUARD + (1 if self.layout == "misaligned" else 0)
        stop = start + step * x.numel()
        buffer = torch.full((stop + _GUARD,), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[start:stop:step].view(x.shape) if step == 1 else _strided(buffer, start, x)
        view.copy_(x)
        if step == 1 or x.ndim > 0:
            self._buffers.append((buffer, start, stop))
        return view


def _strided(buffer: Tensor, start: int, x: Tensor) -> Tensor:
    """A view of x's shape on every second entry of the buffer."""
    strides = [2 * stride for stride in torch.empty(x.shape, device="meta").stride()]
    return buffer.as_strided(x.shape, strides, start)


Run = Callable[[Cast, bool | None], dict[str, Tensor]]


@dataclass(frozen=True)
class KernelCase:
    """One call of an operation.

    Args:
        op: the operation's name in ``kernels``.
        name: what is special about the case.
        run: makes the inputs by what it is given and calls the operation; returns the results,
            changed inputs and gradients by name.
        dtypes: in which it is run.
        layouts: of the inputs' memory in which it is run.
    """

    op: str
    name: str
    run: Run
    dtypes: tuple[torch.dtype, ...] = FLOATS
    layouts: tuple[str, ...] = LAYOUTS

    def check(self, dtype: torch.dtype, layout: str, device: torch.device) -> None:
        """Assert that the kernel is as exact as the plain operation and stays in its tensors."""
        truth = self.outputs(Cast(dtype, exact=True), False)
        own = self.outputs(Cast(dtype, device), False)
        cast = Cast(dtype, device, layout=layout, guarded=True)
        out = self.outputs(cast, True)
        assert out.keys() == own.keys() == truth.keys()
        assert out, "a case returns what it wants compared"
        for name, found in out.items():
            _compare(found, own[name], truth[name])
        cast.assert_untouched()

    def launch(self, dtype: torch.dtype, device: torch.device, fused: bool | None = True) -> None:
        """Run it once, without a look at the results."""
        self.outputs(Cast(dtype, device), fused)

    def outputs(self, cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        """Return the results of one run; its random numbers are the same in each."""
        torch.manual_seed(0)
        return self.run(cast, fused)

    def __str__(self) -> str:
        """The name that a test shows."""
        return f"{self.op}-{self.name}"


def _compare(out: Tensor, own: Tensor, truth: Tensor) -> None:
    if out.is_floating_point():
        assert_accurate(out, truth, torch_out=own if own.dtype == out.dtype else None)
        return
    assert out.shape == own.shape
    assert out.dtype == own.dtype
    apart = (out.long() - own.long()).abs()
    if apart.numel():
        assert apart.max() <= 1, "codes differ by more than one"
        assert (apart > 0).double().mean() <= 1e-4, "too many codes differ"


def variants(cases: Iterable[KernelCase]) -> list[tuple[KernelCase, torch.dtype, str]]:
    """Return every case with each of its dtypes, and its first dtype in every layout."""
    found = []
    for case in cases:
        found += [(case, dtype, "contiguous") for dtype in case.dtypes]
        others = [layout for layout in case.layouts if layout != "contiguous"]
        found += [(case, case.dtypes[0], layout) for layout in others]
    return found
