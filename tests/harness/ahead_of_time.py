"""Compile what the cases launch, for a GPU that is not there; run it as a script.

    python -m harness.ahead_of_time 90 REPORT.json [SHARD OF]

It runs the cases without the interpreter, under a driver that knows what to compile for and has no
device: each launch ends when its kernel is compiled. The report has the operations that launched
one, and an entry for each kernel and what it was specialised for.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lightning_ext.kernels._triton import _interpret


class NoDevice:
    """A driver that can be compiled for, and no more."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the device that binaries are kept for."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream that nothing runs on."""
        return 0


def main(arch: int, path: Path, shard: int, shards: int) -> None:
    """Write what the launches of every `shards`-th case, from `shard` on, compile to."""
    from harness.kernel_cases import CASES

    assert not _interpret.INTERPRETED, "unset TRITON_INTERPRET"
    triton.runtime.driver.set_active(NoDevice(arch))
    _interpret.runs_on = lambda device: True
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    found: dict[str, dict[str, Any]] = {}
    ops: set[str] = set()
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        ops.add(case.op)
        if kernel.hash not in found:
            name = str(dtype).removeprefix("torch.")
            which = {"op": case.op, "case": case.name, "dtype": name}
            found[kernel.hash] = which | describe(kernel, arch)

    JITFunction.run = compile_only
    for case in CASES[shard::shards]:
        for dtype in case.dtypes:
            if dtype != torch.float16 or torch.bfloat16 not in case.dtypes:  # the same code
                case.launch(dtype, torch.device("cpu"))
    report = {"ops": sorted(ops), "kernels": list(found.values())}
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


def describe(kernel: Any, arch: int) -> dict[str, Any]:
    """Return what a compiled kernel needs, and the instructions that matter."""
    ptx = kernel.asm["ptx"]
    assert f".target sm_{arch}" in ptx
    registers, spill_bytes = resources(kernel.asm["cubin"])
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
        "bfloat16_roundings": bfloat16_roundings(kernel.asm["ttir"], ptx),
        "vector_loads": re.search(r"(ld\.global|cp\.async)\S*(\.v[248]|\.cg)", ptx) is not None,
    }


def bfloat16_roundings(ttir: str, ptx: str) -> list[str] | None:
    """Return how a kernel rounds what it writes in bfloat16, "rn" to nearest; None if none is.

    Bits that are cut out of a float32 are "cut": they are rounded towards 0, if at all.
    """
    if re.search(r"tt\.store .*!tt\.ptr<bf16>", ttir) is None:
        return None
    found = set(re.findall(r"cvt\.(r\w)\S*\.bf16(?:x2)?\.\w+", ptx))
    cut = re.search(r"tt\.bitcast .*-> (tensor<[\dx]*x)?bf16\b", ttir) is not None
    return sorted(found | ({"cut"} if cut else set()))


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it keeps in memory instead."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *(int(x) for x in sys.argv[3:5] or ("0", "1")))
