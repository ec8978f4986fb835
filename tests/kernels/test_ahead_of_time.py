"""Every kernel compiles without a GPU, into what a GPU runs fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import launches
from harness.ahead_of_time import bfloat16_roundings
from harness.kernel_cases import CASES

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program may have
SHARDS = 4
# Bound by memory: they must load 16 bytes at once.
VECTORISED = {
    "adamp_step_kernel",
    "came_vector_step_kernel",
    "ema_update_kernel",
    "encode_state_kernel",
    "lamb_moments_kernel",
    "lamb_step_kernel",
    "lars_step_kernel",
    "sq_norms_kernel",
    "update_kernel",
}
# Products in half precision belong to the tensor cores.
PRODUCTS = {"_gradient_kernel", "_partial_kernel", "_product_kernel", "symmetric_product_kernel"}


def compiled(arch: int, shard: int, folder: Path) -> dict[str, Any]:
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    report = folder / "report.json"
    arguments = [str(arch), str(report), str(shard), str(SHARDS)]
    command = [sys.executable, "-m", "harness.ahead_of_time", *arguments]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def launching(shard: int) -> set[str]:
    """Operations of the cases of a shard that come to a launch: those without entries do not."""
    ops = set()
    for case in CASES[shard::SHARDS]:
        with launches(run=False) as found:
            case.launch(case.dtypes[0], torch.device("cpu"))
        ops |= {case.op} if found else set()
    return ops


def test_kernels_that_are_looked_at_are_there() -> None:
    sources = (ROOT / "lightning_ext" / "kernels" / "_triton").rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert [name for name in VECTORISED | PRODUCTS if f"def {name}(" not in text] == []


@pytest.mark.timeout(900)  # a fresh machine has nothing in the compiler's cache
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("arch", sorted(SHARED_BYTES))
def test_kernels_compile_without_a_gpu(arch: int, shard: int, tmp_path: Path) -> None:
    found = compiled(arch, shard, tmp_path)
    assert set(found["ops"]) == launching(shard)
    kernels = found["kernels"]
    assert [entry for entry in kernels if entry["shared_bytes"] > SHARED_BYTES[arch]] == []
    assert [entry for entry in kernels if entry["spill_bytes"] > 0] == []
    memory_bound = [entry for entry in kernels if entry["kernel"] in VECTORISED]
    assert [entry for entry in memory_bound if not entry["vector_loads"]] == []
    products = [x for x in kernels if x["kernel"] in PRODUCTS and x["dtype"] != "float32"]
    assert [entry for entry in products if not entry["tensor_cores"]] == []
    # What the interpreter cannot show: it truncates.
    rounding = [entry for entry in kernels if entry["bfloat16_roundings"] is not None]
    assert rounding != []
    assert [entry for entry in rounding if entry["bfloat16_roundings"] != ["rn"]] == []


STORE = "tt.store %1, %2 : tensor<256x!tt.ptr<bf16>>\n"
CUT = "%2 = tt.bitcast %4 : tensor<256xi16> -> tensor<256xbf16>\n"


@pytest.mark.parametrize(
    ("ttir", "ptx", "expected"),
    [
        (STORE, "cvt.rn.bf16.f32 %rs1, %r1;\ncvt.rn.bf16x2.f32 %r1, %r2, %r3;", ["rn"]),
        (STORE, "cvt.rn.bf16.f32 %rs1, %r1;\ncvt.rz.bf16.f32 %rs2, %r2;", ["rn", "rz"]),
        (STORE, "cvt.rn.bf16.s32 %rs1, %r1;", ["rn"]),
        (STORE, "cvt.f32.bf16 %r1, %rs1;\nmov.b32 {_, %rs1}, %r1;", []),
        (CUT + STORE, "cvt.rn.bf16.f32 %rs1, %r1;", ["cut", "rn"]),
        ("tt.store %1, %2 : tensor<256x!tt.ptr<f32>>", "cvt.f32.bf16 %r1, %rs1;", None),
    ],
    ids=["nearest", "towards 0", "integers", "upper half", "upper half beside", "float32"],
)
def test_truncation_would_be_seen(ttir: str, ptx: str, expected: list[str] | None) -> None:
    assert bfloat16_roundings(ttir, ptx) == expected
