"""Memory and time on paper: the published bytes per rank, and from where on ZeRO++ pays."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_ext.scaling import (
    CommunicationBytes,
    Links,
    Traffic,
    break_even_bandwidth,
    break_even_micro_batch,
    communication_bytes,
    sharded_memory,
    step_time,
)

LINKS = Links(100e9, 1e9, latency_s=1e-3)
# 2.001 s behind the forward pass; 1 s of gathers and 1 s of gradients behind the backward pass.
SENT = CommunicationBytes(
    Traffic(10**10, 2 * 10**9, 1, 0), Traffic(inter_bytes=10**9), Traffic(inter_bytes=10**9)
)
FP16 = {"weight_bytes": 2, "gradient_bytes": 2}
PLAIN = communication_bytes([2**28] * 4, 64, 8, "fsdp2", **FP16)
QUANTIZED = communication_bytes([2**28] * 4, 64, 8, "zeropp", **FP16)


def test_zeropp_pays_for_its_secondary_part_and_its_errors() -> None:
    plain = sharded_memory(640, 64, 8, "fsdp2")
    found = sharded_memory(640, 64, 8, "zeropp", gathered_bytes=2, error_bytes=1)
    assert (found.secondary, found.error_feedback) == (640 * 2 / 8, 640 + 640 / 8)
    assert found.total == plain.total + 160 + 720


@pytest.mark.parametrize(("world", "node"), [(8, 8), (8, 1)])
def test_one_hop_has_errors_of_one(world: int, node: int) -> None:
    assert sharded_memory(64, world, node, "zeropp", error_bytes=1).error_feedback == 64


def test_fsdp2_keeps_whole_gradients_while_it_accumulates() -> None:
    once, twice = (sharded_memory(64, 8, 4, "fsdp2", accumulate=k) for k in (1, 2))
    assert (once.gradients, twice.gradients) == (64 * 4 / 8, 64 * 4)
    assert sharded_memory(64, 8, 4, "zero3", accumulate=2).gradients == 64 * 4 / 8


@pytest.mark.parametrize(("node", "hpz"), [(8, True), (4, False)])
def test_no_secondary_part_without_hpz_or_on_one_node(node: int, hpz: bool) -> None:
    assert sharded_memory(64, 8, node, "zeropp", hpz=hpz) == sharded_memory(64, 8, node, "fsdp2")


def test_the_secondary_part_is_kept_as_the_weights_are() -> None:
    assert sharded_memory(64, 8, 4, "zeropp", weight_bytes=2).secondary == 64 * 2 / 4


@pytest.mark.parametrize(("intra", "seconds"), [(10**10, 2.0), (10**12, 10.0)])
def test_the_slower_link_and_all_messages_take_their_time(intra: int, seconds: float) -> None:
    assert LINKS.seconds(Traffic(intra, 2 * 10**9, 3, 4)) == pytest.approx(seconds + 0.007)


@pytest.mark.parametrize(("overlap", "seconds"), [(1, 2.001 + 4), (0, 6 + 4.001), (0.5, 8.001)])
def test_the_shorter_of_each_phase_hides(overlap: float, seconds: float) -> None:
    assert step_time(SENT, LINKS, 6.0, overlap=overlap) == pytest.approx(seconds)


def test_forward_gathers_do_not_hide_behind_the_backward_pass() -> None:
    assert step_time(SENT, LINKS, 6.0, forward_part=1 / 4) == pytest.approx(2.001 + 4.5)


@pytest.mark.parametrize("communication", [PLAIN, QUANTIZED])
def test_at_break_even_bandwidth_communication_just_hides(
    communication: CommunicationBytes,
) -> None:
    options: dict[str, float] = {"intra_bandwidth": 300e9, "latency_s": 5e-6}
    bandwidth = break_even_bandwidth(communication, 2.0, **options)
    for factor, hides in [(1.001, True), (0.999, False)]:
        links = Links(300e9, factor * bandwidth, 5e-6)
        assert (step_time(communication, links, 2.0) == pytest.approx(2.0, rel=1e-9)) is hides


@pytest.mark.parametrize("communication", [PLAIN, QUANTIZED])
def test_at_break_even_micro_batch_communication_just_hides(
    communication: CommunicationBytes,
) -> None:
    links = Links(300e9, 10e9, 5e-6)
    samples = break_even_micro_batch(communication, links, 0.1, accumulate=2)
    for factor, hides in [(1.001, True), (0.999, False)]:
        compute = 2 * 0.1 * samples * factor
        assert (step_time(communication, links, compute) == pytest.approx(compute)) is hides


def test_zeropp_hides_on_half_the_bandwidth_and_behind_half_the_batch() -> None:
    # Half, not a quarter: what is left is gathered in the forward pass and hides behind it alone.
    slowest = [break_even_bandwidth(sent, 2.0) for sent in (PLAIN, QUANTIZED)]
    smallest = [
        break_even_micro_batch(sent, Links(300e9, 10e9), 0.1) for sent in (PLAIN, QUANTIZED)
    ]
    assert slowest[1] / slowest[0] == pytest.approx(0.5, rel=0.02)
    assert smallest[1] / smallest[0] == pytest.approx(0.5, rel=0.02)


def test_above_the_break_even_of_fsdp2_zeropp_saves_no_time() -> None:
    bandwidth = break_even_bandwidth(PLAIN, 2.0, intra_bandwidth=300e9)
    for factor, saves in [(1.01, False), (0.9, True)]:
        links = Links(300e9, factor * bandwidth)
        saved = step_time(PLAIN, links, 2.0) - step_time(QUANTIZED, links, 2.0)
        assert (saved > 1e-9) is saves


def test_no_link_between_nodes_helps_where_the_node_is_too_slow() -> None:
    assert break_even_bandwidth(SENT, 0.2, intra_bandwidth=1e9) == math.inf


def test_any_link_will_do_on_one_node() -> None:
    alone = communication_bytes(2**20, 8, 8, "fsdp2")
    assert break_even_bandwidth(alone, 2.0, intra_bandwidth=100e9) == 0


def test_no_micro_batch_hides_what_has_no_compute() -> None:
    assert break_even_micro_batch(SENT, LINKS, 0.1, forward_part=0) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "zero4"}, "must be one of ddp"),
        ({"world": 0}, "world"),
        ({"error_bytes": -1}, "error_bytes"),
        ({"optimizer_bytes": math.nan}, "optimizer_bytes"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharded_memory(**{"params": 8, "world": 8, "node": 2, "strategy": "zero1", **arguments})


@pytest.mark.parametrize("values", [(0, 1, 0), (1, math.inf, 0), (1, 1, -1)])
def test_links_that_cannot_be_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        Links(*values)


@pytest.mark.parametrize("options", [{"overlap": 2}, {"forward_part": -1}, {"compute_s": -1}])
def test_a_time_that_cannot_be_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        step_time(SENT, LINKS, **{"compute_s": 1.0, **options})


def test_break_evens_refuse_what_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="intra_bandwidth"):
        break_even_bandwidth(SENT, 1.0, intra_bandwidth=0)
    with pytest.raises(ValueError, match="sample_s"):
        break_even_micro_batch(SENT, LINKS, 0.0)
