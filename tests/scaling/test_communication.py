"""Bytes of a step on paper, and the claims about ZeRO++ on 2 × 2 ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_ext.scaling import Traffic, communication_bytes

FP16 = {"weight_bytes": 2, "gradient_bytes": 2}
PLAIN = {"quantize_weights": False, "hpz": False, "quantize_gradients": False}
UNIT, BLOCK = 4096, 256
CHUNK = UNIT // 4
SCALES = CHUNK // BLOCK * 4
Message = tuple[int, int, int]  # from, to, bytes


def zeropp(**options: Any) -> Any:
    return communication_bytes(UNIT, 4, 2, "zeropp", **options)


def test_quantized_weights_gather_a_quarter_of_float32_and_scales() -> None:
    plain, quantized = zeropp(quantize_weights=False).forward, zeropp().forward
    assert plain.inter_bytes == 2 * CHUNK * 4
    assert quantized.inter_bytes == plain.inter_bytes // 4 + 2 * SCALES
    assert quantized.intra_bytes == plain.intra_bytes // 4 + SCALES


def test_no_backward_gather_leaves_the_node_under_hpz() -> None:
    secondary = UNIT // 2
    assert zeropp().backward == Traffic(secondary * 4, 0, 1, 0)
    assert zeropp(hpz=False).backward == zeropp().forward


def test_the_hop_between_nodes_takes_a_sixteenth_of_float32_and_scales() -> None:
    plain, quantized = zeropp(quantize_gradients=False).gradients, zeropp().gradients
    assert quantized.inter_bytes == plain.inter_bytes // (8 * 2) + SCALES
    # The hop before it takes the chunks of both nodes.
    assert quantized.intra_bytes == 2 * (CHUNK // 2 + SCALES)


def test_all_together_send_a_quarter_of_fp16_zero_3_between_nodes() -> None:
    plain = communication_bytes(UNIT, 4, 2, "fsdp2", **FP16).total.inter_bytes
    quantized = zeropp(**FP16).total.inter_bytes
    assert plain / quantized == pytest.approx(4.71, abs=0.01)


def test_round_a_ring_scales_take_some_of_the_quarter() -> None:
    # 3/(0.5·(1 + 4/256) + 0.25·(1 + 8/256)) where the model is large and the nodes are many.
    ring = {**FP16, "route": "ring"}
    plain, quantized = (
        communication_bytes(2**30, 2**13, 8, name, **ring).total.inter_bytes
        for name in ("fsdp2", "zeropp")
    )
    assert plain / quantized == pytest.approx(3 / (0.5 * 1.015625 + 0.25 * 1.03125), rel=1e-3)


@pytest.mark.parametrize(
    ("part", "volume"), [("forward", 0.5), ("backward", 0), ("gradients", 0.25)]
)
def test_the_published_volumes_of_a_node(part: str, volume: float) -> None:
    options = {**FP16, "block_size": 2**20, "route": "ring"}
    sent = getattr(communication_bytes(2**40, 2**13, 8, "zeropp", **options), part)
    assert 8 * sent.inter_bytes / 2**41 == pytest.approx(volume, rel=2e-3)


def test_a_ring_sends_as_many_bytes_in_all() -> None:
    direct, ring = (
        communication_bytes([4000, 1000], 8, 2, "fsdp2", route=route).total
        for route in ("direct", "ring")
    )
    assert (ring.total_bytes, ring.total_messages) == (direct.total_bytes, direct.total_messages)
    assert ring.inter_bytes * 2 == ring.total_bytes


def to_each(ranks: range, counts: Callable[[int, int], int]) -> Iterator[Message]:
    for source in ranks:
        yield from ((source, to, counts(source, to)) for to in ranks if to != source)


def played(messages: Iterator[Message], node: int) -> Traffic:
    """What rank 0 sends in an exchange that is written down message by message."""
    sent = [(to // node == 0, size) for source, to, size in messages if source == 0]
    inside = [size for is_local, size in sent if is_local]
    outside = [size for is_local, size in sent if not is_local]
    return Traffic(sum(inside), sum(outside), len(inside), len(outside))


@pytest.mark.parametrize(("world", "node"), [(2, 1), (2, 2), (4, 2), (8, 2), (12, 4)])
def test_the_two_hops_deliver_every_chunk_of_every_rank(world: int, node: int) -> None:
    chunk = 100
    row = 100 // 2 + 4 * 7  # int4 in blocks of 16, the last one short
    # By its rank on its own node, then by its node: where a chunk goes on its way home.
    first = to_each(range(node), lambda _, to: sum(row for c in range(world) if c % node == to))
    second = to_each(range(0, world, node), lambda *_: row)
    found = communication_bytes(chunk * world, world, node, "zeropp", block_size=16).gradients
    assert found == played(first, node) + played(second, node)


@pytest.mark.parametrize(
    ("world", "node", "replicas"), [(8, 2, 2), (8, 4, 4), (8, 2, 4), (8, 2, 8)]
)
def test_replicas_reduce_among_themselves(world: int, node: int, replicas: int) -> None:
    shard = world // replicas
    chunk = 96 // shard
    scattered = to_each(range(shard), lambda *_: chunk * 4)
    copies = to_each(range(0, world, shard), lambda *_: chunk * 4 // replicas)
    found = communication_bytes(96, world, node, "fsdp2", replicas=replicas)
    assert found.gradients == played(scattered, node) + 2 * played(copies, node)
    assert found.forward == played(to_each(range(shard), lambda *_: chunk * 4), node)


@pytest.mark.parametrize(
    ("world", "node", "replicas", "again"),
    [(4, 2, 1, 2), (8, 4, 1, 2), (8, 2, 1, 4), (8, 4, 2, 2), (8, 8, 2, 4)],
)
def test_units_split_over_neighbours_are_gathered_again_among_them(
    world: int, node: int, replicas: int, again: int
) -> None:
    layout: Any = {"replicas": replicas, "weight_bytes": 2, "accumulate": 3}
    found, plain = (
        communication_bytes(96, world, node, "fsdp2", **layout, reshard_after_forward=value)
        for value in (again, True)
    )
    assert found.backward == 3 * played(to_each(range(again), lambda *_: 96 * 2 // again), node)
    assert (found.forward, found.gradients) == (plain.forward, plain.gradients)


def test_the_neighbours_of_a_node_are_those_of_hpz() -> None:
    found = communication_bytes(UNIT, 4, 2, "fsdp2", reshard_after_forward=2)
    assert found == zeropp(**PLAIN | {"hpz": True})


def test_every_switch_off_is_fsdp2() -> None:
    assert zeropp(**PLAIN) == communication_bytes(UNIT, 4, 2, "fsdp2")


def test_one_node_reduces_in_one_hop_and_gathers_twice_alike() -> None:
    found = communication_bytes(UNIT, 4, 4, "zeropp")
    assert found.gradients == Traffic(3 * (CHUNK // 2 + SCALES), 0, 3, 0)
    assert found.backward == found.forward


def test_nodes_of_one_rank_reduce_in_one_hop_and_gather_once() -> None:
    found = communication_bytes(UNIT, 4, 1, "zeropp")
    assert found.gradients == Traffic(0, 3 * (CHUNK // 2 + SCALES), 0, 3)
    assert found.backward == Traffic()


def test_the_outermost_unit_is_gathered_once() -> None:
    found = communication_bytes([], 4, 2, "fsdp2", root_params=UNIT)
    assert found.forward.total_bytes == found.gradients.total_bytes == 3 * CHUNK * 4
    assert found.backward == Traffic()


def test_units_that_stay_gathered_are_gathered_once() -> None:
    found = zeropp(reshard_after_forward=False)
    assert (found.forward, found.backward) == (zeropp().forward, Traffic())


def test_micro_batches_gather_each_and_reduce_once() -> None:
    once, four_times = zeropp(), zeropp(accumulate=4)
    assert four_times.forward == 4 * once.forward
    assert four_times.backward == 4 * once.backward
    assert four_times.gradients == once.gradients


def test_each_unit_is_padded_and_quantized_by_itself() -> None:
    found = communication_bytes([9, 5], 4, 2, "zeropp", block_size=2)
    rows = (3 + 2 * 4) + (2 + 1 * 4)
    assert found.forward == Traffic(rows, 2 * rows, 2, 4)
    codes = (2 + 2 * 4) + (1 + 1 * 4)
    assert found.gradients == Traffic(2 * codes, codes, 2, 2)


def test_ddp_reduces_whole_gradients_and_gathers_nothing() -> None:
    found = communication_bytes([100, 60], 4, 2, "ddp", gradient_bytes=2)
    assert found.total == found.gradients == Traffic(160, 320, 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 6, "node": 4}, "does not divide"),
        ({"node": 8}, "does not divide"),
        ({"strategy": "zero"}, "must be one of ddp"),
        ({"replicas": 3}, "do not fit"),
        ({"world": 12, "node": 4, "replicas": 2}, "do not fit"),
        ({"strategy": "zeropp", "replicas": 2}, "goes with fsdp2"),
        ({"strategy": "zeropp", "weight_format": "fp8"}, "int8, int4"),
        ({"strategy": "zeropp", "block_size": 0}, "block_size"),
        ({"route": "tree"}, "direct, ring"),
        ({"reshard_after_forward": 0}, "reshard_after_forward"),
        ({"reshard_after_forward": 3}, "does not fit 4 ranks"),
        ({"world": 12, "node": 3, "reshard_after_forward": 4}, "on nodes of 3"),
        ({"strategy": "zeropp", "reshard_after_forward": 2}, "goes with fsdp2"),
        ({"params": [1, -1]}, r"params\[1\]"),
        ({"root_params": -1}, "root_params"),
        ({"accumulate": 0}, "accumulate"),
        ({"weight_bytes": 0}, "weight_bytes"),
    ],
)
def test_a_step_that_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        communication_bytes(**{"params": 96, "world": 4, "node": 2, "strategy": "fsdp2", **options})


@pytest.mark.parametrize("params", [96.0, "96", [96.0], None])
def test_parameters_are_whole_numbers(params: Any) -> None:
    with pytest.raises(TypeError, match="params"):
        communication_bytes(params, 4, 2, "fsdp2")
