"""Weights of 8 bits in training: on several processes, and under a Trainer that resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader, run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_ext.nn import Int8Weight, convert_int8_linear


class RoundingSGD(Optimizer):
    """SGD that rounds weights of 8 bits at random."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for stream, p in enumerate(group["params"]):
                count = self.state[p].setdefault("step", torch.zeros(()))
                count += 1
                if isinstance(p, Int8Weight):
                    new = p.dequantize() - group["lr"] * p.grad
                    p.requantize_(new, seed=0, step=int(count), stream=stream)
                else:
                    p.sub_(group["lr"] * p.grad)
        return loss


class Int8Classifier(Classifier):
    """Converts itself."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        convert_int8_linear(self)

    def configure_optimizers(self) -> Optimizer:
        return RoundingSGD(self.parameters())


def _net(seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    return convert_int8_linear(net)


def _bits(net: nn.Module) -> list[Tensor]:
    return [x.clone() for x in net.state_dict().values()]


def _steps(net: nn.Module, x: Tensor, optimizer: Optimizer) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def _inputs() -> Tensor:
    return torch.sin(torch.arange(8.0 * 300, dtype=torch.float64)).view(8, 300)


def _train_on_two() -> tuple[list[Tensor], list[Tensor]]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    net = _net(seed=rank)
    model = DistributedDataParallel(net)
    begun = _bits(net)
    _steps(model, _inputs().chunk(2)[rank], RoundingSGD(net.parameters()))
    return begun, _bits(net)


def test_two_processes_have_the_bits_of_one() -> None:
    net = _net(seed=0)
    begun = _bits(net)
    _steps(net, _inputs(), RoundingSGD(net.parameters()))
    assert not torch.equal(_bits(net)[0], begun[0])
    ranks = run_distributed(_train_on_two)
    for name, first, *others in zip(net.state_dict(), begun, *(r[0] for r in ranks), strict=True):
        assert all(torch.equal(first, x) for x in others), name
    for first, second in zip(*(r[1] for r in ranks), strict=True):
        assert torch.equal(first, second)
    for one, two in zip(_bits(net), ranks[0][1], strict=True):
        same = torch.equal if one.dtype == torch.uint8 else torch.allclose
        assert same(one, two)


def _start(dtype: torch.dtype) -> list[Tensor]:
    torch.distributed.init_process_group("gloo")
    net = _net(torch.distributed.get_rank(), dtype)
    DistributedDataParallel(net)
    return _bits(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_processes_start_with_the_bits_of_the_first(dtype: torch.dtype) -> None:
    for tensors in zip(_bits(_net(0, dtype)), *run_distributed(_start, args=(dtype,)), strict=True):
        assert all(torch.equal(tensors[0], x) for x in tensors)


def _shard_fully() -> None:
    torch.distributed.init_process_group("gloo")
    fully_shard(_net(seed=0), mesh=init_device_mesh("cpu", (2,)))


def test_fully_shard_is_refused() -> None:
    with pytest.raises(TypeError, match=r"split is not defined .* under DDP, not fully_shard"):
        run_distributed(_shard_fully)


def _fit(folder: str, **kwargs: Any) -> list[Tensor]:
    keep = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    module, _ = fit(
        [keep],
        module=Int8Classifier(),
        train=loader(shuffle=False),
        gradient_clip_val=0.05,
        enable_checkpointing=True,
        max_epochs=2,
        **kwargs,
    )
    return _bits(module)


def _resumed(folder: str, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    whole = _fit(folder, **options)
    return whole, _fit(folder, ckpt_path=f"{folder}/epoch=0.ckpt", **options)


def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    begun = _bits(Int8Classifier())
    whole, resumed = _resumed(str(tmp_path), {})
    assert not torch.equal(whole[0], begun[0])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_run_on_two_processes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {"strategy": "ddp", "devices": 2}
    ranks = run_distributed(_resumed, args=(str(tmp_path), options))
    for tensors in zip(*(x for rank in ranks for x in rank), strict=True):
        assert all(torch.equal(tensors[0], x) for x in tensors)


def test_the_loss_falls_though_a_step_is_often_below_half_a_quantum() -> None:
    module, _ = fit(module=Int8Classifier(), train=loader(shuffle=False), max_epochs=8)
    per_epoch = len(module.losses) // 8
    assert sum(module.losses[-per_epoch:]) < 0.9 * sum(module.losses[:per_epoch])
