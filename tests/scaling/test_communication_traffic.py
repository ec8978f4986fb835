"""The convention of bytes, and the sizes of what is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_ext.functional import quantized_bytes
from lightning_ext.scaling import (
    COLLECTIVES,
    Traffic,
    block_bytes,
    collective_traffic,
    exchange_traffic,
    padded_parameters,
)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all_gather", Traffic(120, 240, 1, 2)),
        ("all_reduce", Traffic(60, 120, 2, 4)),
        ("all_to_all", Traffic(30, 60, 1, 2)),
        ("broadcast", Traffic(120, 240, 1, 2)),
        ("reduce_scatter", Traffic(30, 60, 1, 2)),
        ("scatter", Traffic(30, 60, 1, 2)),
        ("gather", Traffic()),
        ("reduce", Traffic()),
        ("send", Traffic(0, 120, 0, 1)),
    ],
)
def test_a_root_of_2_x_2_ranks_sends_by_the_convention(kind: str, sent: Traffic) -> None:
    assert collective_traffic(kind, 120, size=4, local=2, peer_local=False) == sent


def test_the_convention_covers_every_listed_collective() -> None:
    for kind in COLLECTIVES:
        assert collective_traffic(kind, 0, size=4, local=2) == Traffic()


@pytest.mark.parametrize(("peer_local", "sent"), [(True, (7, 0, 1, 0)), (False, (0, 7, 0, 1))])
@pytest.mark.parametrize("kind", ["gather", "reduce"])
def test_the_others_send_to_the_root(kind: str, peer_local: bool, sent: tuple[int, ...]) -> None:
    found = collective_traffic(kind, 7, size=4, local=2, root=False, peer_local=peer_local)
    assert found == Traffic(*sent)


@pytest.mark.parametrize("kind", ["broadcast", "scatter"])
def test_the_others_receive_from_the_root(kind: str) -> None:
    assert collective_traffic(kind, 8, size=4, local=2, root=False) == Traffic()


@pytest.mark.parametrize(("local", "sent"), [(1, Traffic(0, 7, 0, 1)), (2, Traffic(7, 0, 1, 0))])
def test_a_group_on_one_node_or_alone_says_where_its_peer_is(local: int, sent: Traffic) -> None:
    assert collective_traffic("send", 7, size=2, local=local) == sent


def test_an_all_reduce_of_few_bytes_is_rounded_up() -> None:
    assert collective_traffic("all_reduce", 4, size=3, local=1).inter_bytes == 2 * 2 * 2


def test_an_exchange_counts_neither_the_rank_itself_nor_empty_parts() -> None:
    found = exchange_traffic([5, 0, 7, 11], rank=3, local_ranks=[2, 3])
    assert found == Traffic(7, 5, 1, 1)


def test_traffics_add_up_and_multiply() -> None:
    one = Traffic(1, 2, 3, 4)
    assert (one + one, one * 2, 2 * one) == (Traffic(2, 4, 6, 8),) * 3
    assert (one.total_bytes, one.total_messages) == (3, 7)


def test_a_traffic_is_not_multiplied_with_a_fraction() -> None:
    with pytest.raises(TypeError):
        Traffic(1) * 0.5


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_padded_parameters_are_those_of_the_padded_chunks(world: int) -> None:
    shapes = [(10, 3), (10,), (1,), (8, 2, 2)]
    chunk = sum(math.ceil(rows / world) * math.prod(rest) for rows, *rest in shapes)
    assert padded_parameters(shapes, world) == world * chunk


@pytest.mark.parametrize(("bits", "format"), [(8, "int8"), (4, "int4")])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 1001])
def test_a_row_takes_what_the_quantizer_says(length: int, bits: int, format: str) -> None:
    assert block_bytes(length, bits=bits, block_size=256) == quantized_bytes(
        length, format, block_size=256
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "all_scatter"}, "must be one of all_gather"),
        ({"kind": "gather", "root": False}, "peer_local"),
        ({"kind": "send"}, "peer_local"),
        ({"input_bytes": 121}, "exchange_traffic"),
        ({"input_bytes": -1}, "at least 0"),
        ({"size": 0}, "at least 1"),
        ({"local": 5}, "more than size=4"),
    ],
)
def test_a_collective_that_cannot_be_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collective_traffic(
            **{"kind": "all_to_all", "input_bytes": 120, "size": 4, "local": 2, **arguments}
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4}, "rank 4"),
        ({"local_ranks": [-1]}, "rank -1"),
        ({"bytes_to": [1, -1, 0, 0]}, r"bytes_to\[1\]"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exchange_traffic(**{"bytes_to": [1] * 4, "rank": 0, "local_ranks": [0], **arguments})


@pytest.mark.parametrize(
    ("shapes", "error"), [([()], ValueError), ([(0, 3)], ValueError), ([(2.0,)], TypeError)]
)
def test_a_shape_that_cannot_be_sharded_is_refused(shapes: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        padded_parameters(shapes, 4)
