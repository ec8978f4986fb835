"""Bytes of an optimizer step under data-parallel strategies, worked out before it runs.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209, sections 3 and 4); Rajbhandari et al. 2020
    (ZeRO, arXiv:1910.02054, section 7); FSDP2's padding and order of collectives, torch 2.11 on.
Differs: ZeRO++ states volumes of a node in multiples of the fp16 model; here they are bytes that
    one rank sends, with scales and padding, so that they can be compared with a meter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lightning_ext.scaling._communication._sizes import block_bytes
from lightning_ext.scaling._communication._traffic import (
    Traffic,
    collective_traffic,
    require_whole,
)
from lightning_ext.scaling._validate import require_count

_BITS = {"int8": 8, "int4": 4}
_STRATEGIES = ("ddp", "fsdp2", "zeropp")
_ROUTES = ("direct", "ring")


@dataclass(frozen=True)
class CommunicationBytes:
    """What one rank sends in an optimizer step, by what it sends it for.

    Under the two hops of ZeRO++, ``gradients.intra_bytes`` is the hop inside the node and
    ``gradients.inter_bytes`` the one between nodes.

    Args:
        forward: parameters gathered in the forward passes of all micro-batches.
        backward: parameters gathered in their backward passes.
        gradients: reduced once.
    """

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    gradients: Traffic = field(default_factory=Traffic)

    @property
    def total(self) -> Traffic:
        """All of it."""
        return self.forward + self.backward + self.gradients


@dataclass(frozen=True)
class _Group:
    """Ranks that run a collective together, and how many of them share a node."""

    size: int
    local: int
    route: str

    def sends(self, kind: str, input_bytes: int) -> Traffic:
        sent = collective_traffic(kind, input_bytes, size=self.size, local=self.local)
        if self.route == "direct" or self.local == self.size:
            return sent
        # Of the ranks of a node one sends to the next node; with a ring from each, each a share.
        out_bytes = -(-sent.total_bytes // self.local)
        out_messages = -(-sent.total_messages // self.local)
        return Traffic(
            sent.total_bytes - out_bytes,
            out_bytes,
            sent.total_messages - out_messages,
            out_messages,
        )


def communication_bytes(
    params: int | Sequence[int],
    world: int,
    node: int,
    strategy: str,
    *,
    root_params: int = 0,
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
    accumulate: int = 1,
    reshard_after_forward: bool | int = True,
    replicas: int = 1,
    quantize_weights: bool = True,
    hpz: bool = True,
    quantize_gradients: bool = True,
    weight_format: str = "int8",
    gradient_format: str = "int4",
    block_size: int = 256,
    route: str = "direct",
) -> CommunicationBytes:
    """Return what one rank sends in an optimizer step, exactly as a meter counts it.

    With n ranks, k of them on a node, a chunk c = ⌈unit/n⌉ and q(c) the bytes of c quantized:

    ===================  ==================  ==================  =============================
    strategy             forward             backward            gradients
    ===================  ==================  ==================  =============================
    ddp                                                          2·⌈unit/n⌉ to each of n−1
    fsdp2                c to each of n−1    c to each of n−1    c to each of n−1
    zeropp, all of it    q(c) to each of     n·c/k inside the    n/k·q(c) to each of k−1 in the
                         n−1                 node, as it is      node, q(c) to each of n/k−1
    ===================  ==================  ==================  =============================

    With ``reshard_after_forward=m`` fsdp2 keeps units split over m neighbours, and its backward
    sends n·c/m to each of m−1. With ``replicas`` n stands for the ranks of one of them.

    The units are the modules that are sharded by themselves. FSDP2 pads every parameter, see
    :func:`padded_parameters`; with its sizes the bytes are exact.

    Args:
        params: parameters of each unit but the outermost; for ddp of each bucket.
        world: n, ranks that see different data.
        node: k, ranks of a node; divides ``world``. With one node, give ``world``.
        strategy: "ddp", "fsdp2" or "zeropp".
        root_params: parameters of the outermost unit, which stays gathered until its backward pass.
        weight_bytes: bytes of a parameter as it is gathered.
        gradient_bytes: bytes of a gradient as it is reduced.
        accumulate: micro-batches of the step. Each gathers; gradients are reduced once.
        reshard_after_forward: whether units are gathered again for the backward pass; an integer,
            of fsdp2: inside of groups of so many neighbours, each of which holds the whole unit.
        replicas: of fsdp2, groups of world/replicas neighbours that hold the whole model each;
            their shards of the gradient are all-reduced.
        quantize_weights: of zeropp (qwZ), gathers over all ranks are quantized.
        hpz: of zeropp, the backward gathers are inside the node, as they are. On a single node
            they are those of the forward pass.
        quantize_gradients: of zeropp (qgZ), two quantized hops in place of a reduce-scatter.
        weight_format: of qwZ, "int8" or "int4".
        gradient_format: of qgZ, "int8" or "int4".
        block_size: entries that share a float32 scale.
        route: "direct", the convention of :func:`collective_traffic`; "ring", gathers and
            reductions go round a ring that leaves every node once, as large buffers do in NCCL:
            the same bytes in all, of which 1/k leave the node, rounded up. All-to-alls are direct.

    Returns:
        The traffic of one rank.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is out of range, the world does not factor, or a name is unknown.

    Example:
        >>> fp16 = dict(weight_bytes=2, gradient_bytes=2)
        >>> plain = communication_bytes(2**20, 4, 2, "fsdp2", **fp16)
        >>> quantized = communication_bytes(2**20, 4, 2, "zeropp", **fp16)
        >>> plain.total.inter_bytes / quantized.total.inter_bytes
        4.711656441717792
    """
    units = _units(params, root_params)
    for name, value in {"weight_bytes": weight_bytes, "gradient_bytes": gradient_bytes}.items():
        require_count(name, value)
    require_count("accumulate", accumulate)
    _check_ranks(world, node, replicas)
    _check_names(strategy, replicas, route)
    shard = world // replicas
    _check_again(reshard_after_forward, strategy, shard, node)
    group = _Group(shard, min(shard, node), route)
    chunks = [-(-n // shard) for n in units]
    if strategy == "ddp":
        reduced = (group.sends("all_reduce", n * gradient_bytes) for n in units)
        return CommunicationBytes(gradients=_sum(reduced))

    is_quantized = strategy == "zeropp"
    packed = _packed(weight_format, block_size) if is_quantized and quantize_weights else None
    rows = [packed(c) if packed else c * weight_bytes for c in chunks]
    gathered = [group.sends("all_gather", row) for row in rows]
    again = gathered[:-1] if reshard_after_forward else []
    if again and (inside := _inside(reshard_after_forward, is_quantized and hpz, group)):
        parts = [c * (shard // inside.size) * weight_bytes for c in chunks[:-1]]
        again = [inside.sends("all_gather", part) for part in parts]
    if is_quantized and quantize_gradients:
        codes = _packed(gradient_format, block_size)
        gradients = _sum(_two_hops(codes(c), world, node) for c in chunks)
    else:
        copies = _Group(replicas, max(1, node // shard), route)
        gradients = _sum(_reduced(c * gradient_bytes, group, copies) for c in chunks)
    return CommunicationBytes(_sum(gathered) * accumulate, _sum(again) * accumulate, gradients)


def _inside(reshard_after_forward: bool | int, hpz: bool, group: _Group) -> _Group | None:
    """The neighbours that gather a unit again by themselves, unless they are all of a group."""
    size = group.local if hpz else reshard_after_forward
    if isinstance(size, bool) or size == group.size:
        return None
    return _Group(size, min(size, group.local), group.route)


def _units(params: int | Sequence[int], root_params: int) -> list[int]:
    """Sizes of all units, the outermost one last."""
    is_several = isinstance(params, Sequence)
    units = list(params) if isinstance(params, Sequence) else [params]
    for index, size in enumerate(units):
        require_whole(f"params[{index}]" if is_several else "params", size)
    require_whole("root_params", root_params)
    return [*units, root_params]


def _check_ranks(world: int, node: int, replicas: int) -> None:
    require_count("world", world)
    require_count("node", node)
    require_count("replicas", replicas)
    if world % node:
        raise ValueError(
            f"world={world} does not divide into nodes of node={node} ranks; give a divisor, or "
            f"node={world} if all share one"
        )
    if world % replicas or max(world // replicas, node) % min(world // replicas, node):
        raise ValueError(
            f"replicas={replicas} of {world} ranks do not fit nodes of {node}: a group of "
            "world/replicas ranks must fill nodes, or nodes must fill with such groups"
        )


def _check_names(strategy: str, replicas: int, route: str) -> None:
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"strategy={strategy!r} is unknown; it must be one of {', '.join(_STRATEGIES)}"
        )
    if replicas > 1 and strategy != "fsdp2":
        raise ValueError(f"replicas={replicas} goes with fsdp2, not with {strategy}")
    if route not in _ROUTES:
        raise ValueError(f"route={route!r} is unknown; it must be one of {', '.join(_ROUTES)}")


def _check_again(reshard_after_forward: bool | int, strategy: str, shard: int, node: int) -> None:
    if isinstance(reshard_after_forward, bool):
        return
    require_count("reshard_after_forward", reshard_after_forward)
    size = reshard_after_forward
    if strategy != "fsdp2":
        raise ValueError(f"reshard_after_forward={size} goes with fsdp2, not with {strategy}")
    if shard % size or max(size, node) % min(size, node):
        raise ValueError(
            f"reshard_after_forward={size} does not fit {shard} ranks on nodes of {node}: groups "
            "of so many must divide the ranks, and fill nodes, or nodes must fill with them"
        )


def _packed(format: str, block_size: int) -> Callable[[int], int]:
    """Bytes of a quantized chunk as a function of its entries."""
    if format not in _BITS:
        raise ValueError(f"format={format!r} is unknown; it must be one of {', '.join(_BITS)}")
    return lambda length: block_bytes(length, bits=_BITS[format], block_size=block_size)


def _reduced(chunk_bytes: int, group: _Group, copies: _Group) -> Traffic:
    """A reduce-scatter among the ranks of a shard group, then an all-reduce over its copies."""
    scattered = group.sends("reduce_scatter", chunk_bytes * group.size)
    return scattered + copies.sends("all_reduce", chunk_bytes)


def _two_hops(chunk_bytes: int, world: int, node: int) -> Traffic:
    """Inside the node, of every chunk the part of this node's ranks; then one to each node."""
    nodes = world // node
    inside = collective_traffic("all_to_all", chunk_bytes * world, size=node, local=node)
    between = collective_traffic("all_to_all", chunk_bytes * nodes, size=nodes, local=1)
    return inside + between


def _sum(parts: Iterable[Traffic]) -> Traffic:
    return sum(parts, Traffic())
