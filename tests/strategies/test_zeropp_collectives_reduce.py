"""The two-hop reduction of quantized gradients, with threads as ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from harness.thread_ranks import ThreadRanks
from torch import Tensor

from lightning_ext import functional
from lightning_ext.scaling import communication_bytes
from lightning_ext.strategies import QuantizedReduceScatter, node_groups

LEVELS = {"int4": 7, "int8": 127}
SHAPES = [(4, 2), (6, 2), (6, 3), (4, 4), (4, 1), (1, 1)]  # ranks, ranks of a node
SHAPE_NAMES = [f"{world // k}x{k}" for world, k in SHAPES]


def gradients(world: int, chunk: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of each rank for each chunk, shape (ranks, ranks, chunk)."""
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(world)[:, None]  # so that no chunk hides another one's error
    drawn = torch.randn(world, world, chunk, generator=generator, dtype=torch.float64)
    return (drawn * scales).to(dtype)


def reduced(
    ranks: ThreadRanks, grads: Tensor, op: Any = dist.ReduceOp.AVG, **settings: Any
) -> Tensor:
    """What all ranks have together, shape (ranks, chunk)."""

    def one(rank: int) -> Tensor:
        reduce = QuantizedReduceScatter(ranks.node_groups(rank), **settings)
        output = grads.new_empty(grads.shape[-1])
        assert reduce(output, grads[rank].flatten(), ranks.group, op) is None
        return output

    return torch.stack(ranks.run(one))


def bound(grads: Tensor, format: str, block_size: int, hops: int) -> Tensor:
    """Half a step for each hop, for each entry of each chunk.

    The step of a block is max|g|/levels. A mean of such roundings is off by half of their mean
    step; and no mean of what was read exceeds the mean of the maxima, which gives the second hop
    steps of at most that.
    """
    padded = torch.nn.functional.pad(grads.abs(), (0, -grads.shape[-1] % block_size))
    blocks = padded.unflatten(-1, (-1, block_size)).amax(-1).mean(0)
    half = blocks.repeat_interleave(block_size, -1)[..., : grads.shape[-1]] / LEVELS[format] / 2
    return hops * half * (1 + 1e-5)


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("chunk", [1, 100, 256, 777])
@pytest.mark.parametrize(("world", "ranks_per_node"), SHAPES, ids=SHAPE_NAMES)
def test_the_mean_is_off_by_half_a_step_for_each_hop(
    world: int, ranks_per_node: int, chunk: int, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ThreadRanks(world, ranks_per_node, monkeypatch)
    grads = gradients(world, chunk)
    hops = 2 if 1 < ranks_per_node < world else 1
    error = (reduced(ranks, grads, format=format) - grads.mean(0)).abs()
    assert (error <= bound(grads, format, 256, hops)).all()


@pytest.mark.parametrize(("world", "ranks_per_node"), SHAPES, ids=SHAPE_NAMES)
def test_every_rank_gets_its_chunk_from_every_rank(
    world: int, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ThreadRanks(world, ranks_per_node, monkeypatch)
    # Multiples of what a single entry of a block is rounded to are exact, whatever hops do.
    sender, owner = torch.meshgrid(torch.arange(world), torch.arange(world), indexing="ij")
    grads = (2.0**owner + 1000.0 * sender)[..., None].expand(-1, -1, 1).contiguous()
    torch.testing.assert_close(reduced(ranks, grads), grads.mean(0))


def test_a_sum_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, grads = ThreadRanks(6, 2, monkeypatch), gradients(6, 100)
    total = reduced(ranks, grads, dist.ReduceOp.SUM)
    torch.testing.assert_close(total, 6 * reduced(ranks, grads))


def test_the_error_of_a_short_chunk_is_not_that_of_blocks_across_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients(4, 100)
    truth = grads.mean(0)
    straddling = functional.quantize(grads.flatten(1), "int8")
    by_hand = functional.dequantize_reduce(straddling).view(4, 100)

    def of_smallest(found: Tensor) -> float:
        return float((found[0] - truth[0]).norm() / truth[0].norm())

    own = of_smallest(reduced(ranks, grads, format="int8"))
    assert own < 0.01
    assert of_smallest(by_hand) > 4 * own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_to_its_dtype_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients(4, 100, dtype)
    assert reduced(ranks, grads).equal(reduced(ranks, grads.float()).to(dtype))


def test_double_precision_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients(4, 1, torch.float64)
    torch.testing.assert_close(reduced(ranks, grads), grads.mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_its_block_alone(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients(4, 100)
    grads[1, 2, 20] = bad
    found = reduced(ranks, grads, block_size=16)
    expected = torch.zeros(4, 100, dtype=torch.bool)
    expected[2, 16:32] = True
    assert found.isnan().equal(expected)


def test_nothing_is_sent_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(4, 2, monkeypatch)
    assert reduced(ranks, torch.empty(4, 4, 0)).shape == (4, 0)
    assert ranks.sent_bytes == [[]] * 4


@pytest.mark.parametrize(
    ("world", "ranks_per_node", "rows"), [(6, 2, [6, 3]), (4, 4, [4]), (4, 1, [4])]
)
def test_a_hop_sends_codes_and_scales_of_a_row_for_each_chunk_and_no_more(
    world: int, ranks_per_node: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, grads = ThreadRanks(world, ranks_per_node, monkeypatch), gradients(world, 301)
    reduced(ranks, grads, format="int4", block_size=64)
    row = functional.quantized_bytes(301, "int4", block_size=64)
    assert ranks.sent_bytes == [[count * row for count in rows]] * world


@pytest.mark.parametrize(("world", "ranks_per_node"), SHAPES, ids=SHAPE_NAMES)
def test_bytes_are_those_on_paper(
    world: int, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, sizes = ThreadRanks(world, ranks_per_node, monkeypatch), []
    if ranks_per_node > 1 or world == 1:
        sizes.append(ranks_per_node)
    if ranks_per_node < world:
        sizes.append(world // ranks_per_node)
    reduced(ranks, gradients(world, 301), format="int4")
    # Of what goes into an all-to-all of n ranks, n − 1 parts are for others.
    addressed = [sent * (n - 1) // n for sent, n in zip(ranks.sent_bytes[0], sizes, strict=True)]
    paper = communication_bytes(301 * world, world, ranks_per_node, "zeropp").gradients
    assert sum(addressed) == paper.total_bytes
    assert addressed[-1] == (paper.inter_bytes if ranks_per_node < world else paper.intra_bytes)


def test_random_rounding_is_off_by_less_than_a_step_and_is_the_gradient_in_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients(4, 64)
    draws = torch.stack([reduced(ranks, grads, seed=seed) for seed in range(64)])
    errors = draws - grads.mean(0)
    assert not draws[0].equal(draws[1])
    assert (errors.abs() <= 2 * bound(grads, "int4", 256, 2)).all()
    allowed = 4.5 * bound(grads, "int4", 256, 2) / 64**0.5  # standard errors of a step at most
    assert (errors.mean(0).abs() <= allowed).all()


def test_ranks_round_at_random_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(4, 4, monkeypatch)
    grads = gradients(1, 512).expand(4, 4, 512)
    alone = functional.dequantize(functional.quantize(grads[0, 0], "int4", seed=0))
    error = (reduced(ranks, grads, seed=0) - grads[0, 0]).norm(dim=-1).mean()
    assert error < 0.6 * (alone - grads[0, 0]).norm()  # half, where they are independent


def test_another_reduction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(1, 1, monkeypatch)
    with pytest.raises(ValueError, match="set_force_sum_reduction_for_comms"):
        reduced(ranks, gradients(1, 4), dist.ReduceOp.MAX)


def test_a_group_of_other_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, others = ThreadRanks(2, 1, monkeypatch), ThreadRanks(4, 2, monkeypatch)
    reduce = QuantizedReduceScatter(ranks.node_groups(0))
    group: Any = others.group
    with pytest.raises(ValueError, match=r"ranks \[0, 1, 2, 3\], but these node groups"):
        reduce(torch.empty(2), torch.empty(8), group, dist.ReduceOp.AVG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "fp8_e4m3"}, "'int8' or 'int4'"),
        ({"block_size": 100}, "power of two"),
        ({"error_beta": 1.0}, "error_beta=1.0"),
        ({"error_format": "bfloat16"}, "'float32', or 'int8'"),
        ({"error_reset_every": -1}, "error_reset_every=-1"),
    ],
)
def test_settings_outside_of_their_range_are_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = ThreadRanks(1, 1, monkeypatch).node_groups(0)
    with pytest.raises(ValueError, match=message):
        QuantizedReduceScatter(groups, **settings)


def _over_processes(ranks_per_node: int) -> Tensor:
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    reduce = QuantizedReduceScatter(node_groups(ranks_per_node))
    output, whole = torch.empty(777), dist.group.WORLD
    assert whole is not None
    reduce(output, gradients(world, 777)[rank].flatten(), whole, dist.ReduceOp.AVG)
    return output


@pytest.mark.parametrize(("world", "ranks_per_node"), [(4, 2), (2, 2), (2, 1)])
def test_processes_do_what_threads_do(
    world: int, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_distributed(_over_processes, world, args=(ranks_per_node,))
    ranks = ThreadRanks(world, ranks_per_node, monkeypatch)
    assert torch.stack(found).equal(reduced(ranks, gradients(world, 777)))
