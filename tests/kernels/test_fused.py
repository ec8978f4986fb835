"""What ``fused`` means, and what is refused before anything is launched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from harness import launches, run_distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_ext import kernels
from lightning_ext.kernels import _fused

Op = Callable[..., object]
NORMS: list[Op] = [
    lambda x: kernels.sq_norms([x], fused=True),
    lambda x: kernels.diff_sq_norms([x], [x], fused=True),
    lambda x: kernels.accumulated_sq_norms([x], [x.clone()], fused=True),
    lambda x: kernels.accumulated_sq_norms_([x], [x.clone()], fused=True),
    lambda x: kernels.unit_norms([x], fused=True),
]


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_are_no_values(op: Op, dtype: torch.dtype) -> None:
    with launches() as found, pytest.raises(TypeError):
        op(torch.ones(2, 4, dtype=dtype))
    assert found == []


@pytest.mark.parametrize("op", NORMS)
def test_double_precision_is_not_for_kernels(op: Op) -> None:
    with launches() as found, pytest.raises(TypeError, match=r"does not take torch\.float64"):
        op(torch.ones(2, 4, dtype=torch.float64))
    assert found == []


def test_tensors_of_several_devices_are_refused() -> None:
    tensors = [torch.ones(2), torch.ones(2, device="meta")]
    with pytest.raises(ValueError, match="must be on one device"):
        kernels.sq_norms(tensors, fused=True)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(RuntimeError, match="kernels run on CUDA devices"):
        kernels.sq_norms([torch.ones(2, device="meta")], fused=True)


def test_without_triton_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        kernels.sq_norms([torch.ones(2)], fused=True)
    assert kernels.sq_norms([torch.ones(1)]) == 1


def _message() -> str:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x: Tensor = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(TypeError) as caught:
        kernels.sq_norms([x], fused=True)
    return str(caught.value)


def test_a_sharded_tensor_is_refused_and_not_read_at_address_zero() -> None:
    (message,) = run_distributed(_message, world_size=1)
    assert "got DTensor" in message
    assert "to_local()" in message
