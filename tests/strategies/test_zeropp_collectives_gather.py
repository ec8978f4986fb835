"""Weights as codes: what ranks compute with, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_ext import functional
from lightning_ext.scaling import communication_bytes
from lightning_ext.strategies import QuantizedAllGather, install_collectives

WORLD = 2
SHARD = 301


def shard(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHARD, generator=torch.Generator().manual_seed(rank)).to(dtype)


def half_steps(x: Tensor, format: str = "int8", block_size: int = 256) -> Tensor:
    """Of the block of each entry of rows."""
    padded = torch.nn.functional.pad(x.abs().double(), (0, -x.shape[-1] % block_size))
    largest = padded.unflatten(-1, (-1, block_size)).amax(-1)
    steps = largest / (127 if format == "int8" else 7)
    return steps.repeat_interleave(block_size, -1)[..., : x.shape[-1]] / 2


def _gathered(
    x: Tensor, *, async_op: bool = False, group_size: int = WORLD, **settings: Any
) -> Tensor:
    """Gathers as FSDP2 does: the input lies in the output."""
    group = dist.group.WORLD
    assert group is not None
    output = x.new_zeros(WORLD * len(x))
    mine = output.chunk(WORLD)[dist.get_rank()] if len(x) else output
    mine.copy_(x)
    work = QuantizedAllGather(group_size, **settings)(output, mine, group, async_op)
    assert (work is None) != async_op
    if work is not None:
        assert isinstance(work, dist.Work)
        work.wait()
        work.wait()  # reads once
    return output


def _gathers() -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    mine = shard(dist.get_rank())
    return {
        "int8": _gathered(mine),
        "int4": _gathered(mine, format="int4", block_size=64),
        "async": _gathered(mine, async_op=True),
        "bfloat16": _gathered(mine.bfloat16()),
        "other group": _gathered(mine, group_size=3),
        "other group async": _gathered(mine, group_size=3, async_op=True),
        "bytes": _gathered(mine.view(torch.uint8)),
        "complex": _gathered(torch.view_as_complex(mine[:300].view(-1, 2))),
        "empty": _gathered(mine[:0]),
    }


@pytest.fixture(scope="module")
def gathers() -> list[dict[str, Tensor]]:
    return run_distributed(_gathers, WORLD)


@pytest.mark.parametrize(("format", "block_size"), [("int8", 256), ("int4", 64)])
def test_a_weight_is_off_by_half_a_step_of_its_block(
    format: str, block_size: int, gathers: list[dict[str, Tensor]]
) -> None:
    whole = torch.stack([shard(rank) for rank in range(WORLD)])
    error = (gathers[0][format].view(WORLD, -1) - whole).abs()
    half = half_steps(whole, format, block_size)
    assert (error <= half * (1 + 1e-5)).all()
    assert (error > half / 2).any()


@pytest.mark.parametrize("case", ["int8", "int4", "bfloat16"])
def test_all_ranks_read_the_same_weights(case: str, gathers: list[dict[str, Tensor]]) -> None:
    assert gathers[0][case].equal(gathers[1][case])


def test_what_is_waited_for_is_the_same(gathers: list[dict[str, Tensor]]) -> None:
    assert all(found["async"].equal(found["int8"]) for found in gathers)


def test_low_precision_is_read_in_its_dtype(gathers: list[dict[str, Tensor]]) -> None:
    sent = [functional.quantize(shard(rank, torch.bfloat16), "int8") for rank in range(WORLD)]
    expected = torch.cat([functional.dequantize(x, dtype=torch.bfloat16) for x in sent])
    assert gathers[0]["bfloat16"].equal(expected)


@pytest.mark.parametrize("case", ["other group", "other group async", "bytes", "complex", "empty"])
def test_other_groups_and_what_has_no_blocks_go_as_they_are(
    case: str, gathers: list[dict[str, Tensor]]
) -> None:
    whole = [shard(rank) for rank in range(WORLD)]
    parts = {"bytes": [x.view(torch.uint8) for x in whole], "empty": [x[:0] for x in whole]}
    parts["complex"] = [torch.view_as_complex(x[:300].view(-1, 2)) for x in whole]
    assert gathers[1][case].equal(torch.cat(parts.get(case, whole)))


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'int8' or 'int4'"):
        QuantizedAllGather(2, format="mxint8")


class Watched(nn.Linear):
    """Keeps the weights that forward and backward see."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.seen: dict[str, Tensor] = {}
        self.register_forward_pre_hook(lambda *_: self._see("forward"))
        self.register_full_backward_pre_hook(lambda *_: self._see("backward"))

    def _see(self, when: str) -> None:
        assert not isinstance(self.weight, DTensor)
        seen = torch.cat([self.weight.flatten(), self.bias])
        self.seen[when] = seen.detach().clone()


def _local(module: nn.Module) -> list[Tensor]:
    parameters = [p for p in module.parameters() if isinstance(p, DTensor)]
    return [p.to_local().detach().clone() for p in parameters]


def _trained(
    reshard_after_forward: int | bool, param_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """One step of a module with parameters smaller than the world; which gathers it took."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    torch.manual_seed(0)
    blocks = [nn.Sequential(Watched(9, 7), nn.GELU()), nn.Sequential(Watched(7, 1), nn.GELU())]
    module = nn.Sequential(*blocks)
    exact = [torch.cat([b[0].weight.flatten(), b[0].bias]).detach().clone() for b in blocks]
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    for block in [*blocks, module]:
        fully_shard(block, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    install_collectives(module, all_gather=QuantizedAllGather(world))
    before, sent = _local(module), []
    plain = dist.all_gather_single

    def counted(output: Tensor, input: Tensor, *, group: Any, async_op: bool) -> Any:
        sent.append((group.size(), input.dtype, input.nbytes))
        return plain(output, input, group=group, async_op=async_op)

    dist.all_gather_single = counted  # a process of its own
    module(torch.randn(4, 9, requires_grad=True)).sum().backward()
    kept = all(map(torch.equal, before, _local(module)))
    return {"seen": [b[0].seen for b in blocks], "exact": exact, "kept": kept, "sent": sent}


@pytest.fixture(scope="module")
def hpz() -> list[dict[str, Any]]:
    return run_distributed(_trained, 4, args=(2,))


@pytest.mark.parametrize("unit", [0, 1])
def test_backward_inside_a_node_sees_the_weights_of_forward(
    unit: int, hpz: list[dict[str, Any]]
) -> None:
    first = hpz[0]["seen"][unit]["forward"]
    assert not first.equal(hpz[0]["exact"][unit])
    for rank in hpz:
        assert rank["seen"][unit]["forward"].equal(first)
        assert rank["seen"][unit]["backward"].equal(first)


def test_only_gathers_inside_a_node_are_exact(hpz: list[dict[str, Any]]) -> None:
    # Weights (7, 9) and (1, 7) with their biases are filled up to 8 and 4 rows: a rank has a fourth
    # of them, and of its node's secondary partition half.
    whole = [8 * 9 + 8, 4 * 7 + 4]
    forward = [(4, torch.uint8, functional.quantized_bytes(n // 4, "int8")) for n in whole]
    backward = [(2, torch.float32, 4 * n // 2) for n in reversed(whole)]
    assert hpz[0]["sent"] == forward + backward
    paper = communication_bytes(whole, 4, 2, "zeropp")
    assert paper.forward.total_bytes == sum(3 * sent for _, _, sent in forward)
    assert paper.backward.intra_bytes == sum(sent for _, _, sent in backward)
    assert paper.backward.inter_bytes == 0


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_backward_over_all_ranks_reads_the_same_codes(param_dtype: torch.dtype | None) -> None:
    ranks = run_distributed(_trained, 2, args=(True, param_dtype))
    for seen in ranks[0]["seen"]:
        assert seen["backward"].equal(seen["forward"])
    assert {x[:2] for x in ranks[0]["sent"]} == {(2, torch.uint8)}


def test_the_sharded_weights_stay_exact(hpz: list[dict[str, Any]]) -> None:
    assert all(rank["kept"] for rank in hpz)
