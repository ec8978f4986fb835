"""What a layout of pipeline and data-parallel ranks costs: seconds, memory and bytes of a step.

Source: Lamy-Poirier 2023 (arXiv:2211.05953) and 2021 (arXiv:2106.02679), that schedules differ in
    what hides behind computing; the formulas are derived here.
Differs: a model. Layers are alike, embeddings are not counted, tensor parallelism is left out, and
    what pipelines send does not slow down what data-parallel ranks send.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lightning_ext.scaling._communication._memory import sharded_memory
from lightning_ext.scaling._communication._time import Links
from lightning_ext.scaling._communication._traffic import Traffic
from lightning_ext.scaling._communication._volume import communication_bytes
from lightning_ext.scaling._pipeline._gathers import TORCH_ACTIVE_STAGES, torch_gathers
from lightning_ext.scaling._pipeline._seconds import DATA_PARALLEL, Shape
from lightning_ext.scaling._pipeline._stages import (
    batch_seconds,
    fullest_ranks,
    stage_layers,
    stashed_layers,
)
from lightning_ext.scaling._validate import (
    require_count,
    require_non_negative,
    require_positive,
)

_FORWARD, _BACKWARD = 1 / 3, 2 / 3
GATHERS = ("torch", "paper")


@dataclass(frozen=True)
class PipelineModel:
    """A model of equal layers, as far as its layout needs it.

    Args:
        layers: number of layers.
        layer_params: parameters of one.
        layer_s: seconds of one rank for the forward and backward pass of a layer and one sample.
        boundary_bytes: output of a layer for one sample, which pipeline ranks send.
        stashed_bytes: what a layer keeps of one sample from its forward to its backward pass.
        overhead_s: seconds that both passes of a layer cost besides, whatever the micro-batch.
        weight_bytes: bytes of a parameter as it is computed with and gathered.
        gradient_bytes: bytes of a gradient as it is reduced.
        optimizer_bytes: bytes of a parameter's optimizer state, with master weights.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.
    """

    layers: int
    layer_params: int
    layer_s: float
    boundary_bytes: int
    stashed_bytes: float
    overhead_s: float = 0.0
    weight_bytes: int = 2
    gradient_bytes: int = 2
    optimizer_bytes: float = 12

    def __post_init__(self) -> None:
        """Refuses what has no size."""
        for name in ("layers", "layer_params", "boundary_bytes", "weight_bytes", "gradient_bytes"):
            require_count(name, getattr(self, name))
        require_positive("layer_s", self.layer_s)
        for name in ("stashed_bytes", "overhead_s", "optimizer_bytes"):
            require_non_negative(name, getattr(self, name))


@dataclass(frozen=True)
class PipelineCluster:
    """Ranks, their memory and their links. Data-parallel ranks are neighbours.

    Args:
        ranks: all of them.
        memory_bytes: of one rank.
        links: how fast one rank sends.
        ranks_per_node: ranks of a node.

    Raises:
        TypeError: if a number is not one.
        ValueError: if a number is out of range.
    """

    ranks: int
    memory_bytes: float
    links: Links
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        """Refuses what has no size."""
        require_count("ranks", self.ranks)
        require_count("ranks_per_node", self.ranks_per_node)
        require_positive("memory_bytes", self.memory_bytes)


class Candidate(NamedTuple):
    """A layout to be looked at."""

    shape: Shape
    data_parallel: str
    data_parallel_size: int
    micro_batch: int
    recompute: bool
    gathers: str = "torch"


class _Network(NamedTuple):
    """What a rank sends for one stage, and how long that takes."""

    gather_s: float
    reduce_s: float
    gather_bytes: int
    reduce_bytes: int


def memory_bytes(model: PipelineModel, cluster: PipelineCluster, it: Candidate) -> float:
    """Return the bytes of states, gathered stages and activations on the rank that needs most.

    A stage that is computed again keeps its input of each micro-batch, and what its layers keep of
    the one that goes backward.
    """
    sizes = stage_layers(model.layers, it.shape)
    return max(
        _states_bytes(model, cluster, it, sizes[rank :: it.shape.pipeline_ranks])
        + it.micro_batch * _activation_bytes(model, it, sizes, rank)
        for rank in fullest_ranks(sizes, it.shape.pipeline_ranks)
    )


def _states_bytes(
    model: PipelineModel, cluster: PipelineCluster, it: Candidate, own: Sequence[int]
) -> float:
    """Of a rank, from the layers of each of its stages."""
    shape = it.shape
    states = sharded_memory(
        sum(own) * model.layer_params,
        it.data_parallel_size,
        math.gcd(it.data_parallel_size, cluster.ranks_per_node),
        it.data_parallel,
        weight_bytes=model.weight_bytes,
        gradient_bytes=model.gradient_bytes,
        optimizer_bytes=model.optimizer_bytes,
        # Breadth-first reduces a stage before the next one has gradients; others keep all whole.
        accumulate=1 if shape.is_breadth_first else shape.num_microbatches,
    ).total
    if it.data_parallel != "fsdp2" or it.data_parallel_size == 1:
        return states
    # The last stages are the largest.
    gathered = sum(own[-TORCH_ACTIVE_STAGES:]) * model.weight_bytes
    reduced = sum(own[-2:]) * model.gradient_bytes if shape.is_breadth_first else 0
    return states + model.layer_params * (gathered + reduced)


def _activation_bytes(
    model: PipelineModel, it: Candidate, sizes: tuple[int, ...], rank: int
) -> float:
    """Of a rank and one sample of each micro-batch."""
    if not it.recompute:
        return stashed_layers(it.shape, rank, sizes) * model.stashed_bytes
    inputs = stashed_layers(it.shape, rank, (1,) * len(sizes))
    largest = max(sizes[rank :: it.shape.pipeline_ranks])
    return inputs * model.boundary_bytes + largest * model.stashed_bytes


def step_seconds(
    model: PipelineModel, cluster: PipelineCluster, it: Candidate
) -> tuple[float, float, float]:
    """Return the seconds of a step, those of computing alone, and the bytes that a rank sends.

    What the rank with most layers gathers and reduces is that of stages of their mean size.
    """
    shape = it.shape
    sizes = stage_layers(model.layers, shape)
    rank = fullest_ranks(sizes, shape.pipeline_ranks)[-1]
    layers = sum(sizes[rank :: shape.pipeline_ranks]) / shape.stages_per_rank
    layer_s = model.layer_s * it.micro_batch + model.overhead_s
    forward_s = layer_s * _FORWARD
    backward_s = layer_s * (_BACKWARD + _FORWARD * it.recompute)
    crossing = it.micro_batch * model.boundary_bytes
    send_s = cluster.links.seconds(_one_message(crossing, cluster))
    network = _network(
        round(layers * model.layer_params),
        it.data_parallel_size,
        it.data_parallel,
        model.weight_bytes,
        model.gradient_bytes,
        cluster.links,
        cluster.ranks_per_node,
    )
    gathers = _gathers(shape, it.gathers)
    waits = _exposed_seconds(
        shape, layers, layers * forward_s, layers * backward_s, network, gathers
    )
    useful = shape.num_microbatches * model.layers / shape.pipeline_ranks
    compute_s = useful * (model.layer_s * it.micro_batch)
    passes = shape.num_microbatches * shape.stages_per_rank
    sent: float = 2 * passes * crossing if shape.pipeline_ranks > 1 else 0
    sent += sum(gathers) * network.gather_bytes + shape.stages_per_rank * network.reduce_bytes
    step_s = batch_seconds(shape, sizes, forward_s, backward_s, send_s) + waits
    return step_s, compute_s, sent


def _gathers(shape: Shape, counted_as: str) -> tuple[float, float]:
    """Gathers of a rank in the forward and the backward passes of a batch, under "fsdp2"."""
    schedule, ranks, loops, count = shape
    # A single stage stays gathered, the last of several is gathered again.
    if loops == 1:
        return 1, 0
    if counted_as == "paper" or schedule == DATA_PARALLEL:  # without torch's pipeline runtime
        return loops * shape.groups, loops * shape.groups
    total = torch_gathers(
        schedule, pipeline_ranks=ranks, stages_per_rank=loops, num_microbatches=count
    )
    forward = loops if shape.groups == 1 or total == loops else total / 2
    return forward, total - forward


def _exposed_seconds(
    shape: Shape,
    layers: float,
    forward_s: float,
    backward_s: float,
    network: _Network,
    gathers: tuple[float, float],
) -> float:
    """Return for how long a rank waits for gathers and reductions.

    What is sent for all visits of stages but the first (last) hides behind the passes of the
    others; within a stage, layer by layer behind one pass. Reductions can start in the last group.
    """
    first, again = gathers
    visit = shape.num_microbatches / shape.groups
    loops, within = shape.stages_per_rank, (layers - 1) / layers
    late = (loops - 1) * visit
    # Stages that are all kept are gathered in the first group.
    others = (loops * shape.groups - 1) * visit if first + again > loops else late
    forward = max(
        network.gather_s / layers, first * network.gather_s - (others + within) * forward_s
    )
    reduces = loops * network.reduce_s
    backward = max(
        network.reduce_s / layers,
        reduces - (late + within) * backward_s,
        reduces + again * network.gather_s - (others + within) * backward_s,
    )
    return forward + backward


def _one_message(size: int, cluster: PipelineCluster) -> Traffic:
    """A send between pipeline ranks, of which some are on other nodes if there are any."""
    if cluster.ranks > cluster.ranks_per_node:
        return Traffic(inter_bytes=size, inter_messages=1)
    return Traffic(intra_bytes=size, intra_messages=1)


@lru_cache(maxsize=1024)
def _network(
    unit: int,
    size: int,
    data_parallel: str,
    weight_bytes: int,
    gradient_bytes: int,
    links: Links,
    ranks_per_node: int,
) -> _Network:
    """Of one stage, by rings among its data-parallel ranks."""
    if size == 1:
        return _Network(0.0, 0.0, 0, 0)
    sent = communication_bytes(
        unit,
        size,
        math.gcd(size, ranks_per_node),
        data_parallel,
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        route="ring",
    )
    return _Network(
        links.seconds(sent.forward),
        links.seconds(sent.gradients),
        sent.forward.total_bytes,
        sent.gradients.total_bytes,
    )
