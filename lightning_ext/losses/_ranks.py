"""What losses over the rows of several ranks share: who takes part, blocks in turn, the mean.

Differs: a block is broadcast while the one before it is used, instead of handed round a ring:
    plain collectives, which every backend has, and as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FACTS = 5  # of each features: dimensions, rows, width, dtype, whether they want a gradient


def sharing_group(
    gather_features: bool, process_group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """Return the ranks that share their negatives, None for this one alone."""
    if not (gather_features and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_rank(group) < 0:
        raise ValueError("process_group does not have this rank; give each rank a group of its own")
    return group if dist.get_world_size(group) > 1 else None


def check_ranks(
    x: Tensor, y: Tensor, group: dist.ProcessGroup | None, *numbers: nn.Parameter
) -> None:
    """Refuse, on all ranks at once, what is not of one shape and kind on all of them.

    Comes before any other check, so that what is left to refuse is refused by every rank. Of the
    numbers of a loss, its scale and bias, all ranks have to train the same.
    """
    if group is None:
        return
    own = torch.tensor(
        [*_facts(x), *_facts(y), *(_needs_grad(z) for z in numbers)], device=x.device
    )
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    facts = torch.stack(found).tolist()
    if any(other != facts[0] for other in facts):
        told = "; ".join(f"rank {rank}: {_told(row)}" for rank, row in enumerate(facts))
        raise ValueError(
            f"ranks have different features or gradients ({told}); freeze the same on all of them, "
            "and give them as many samples, as drop_last=True does (under AdaptiveBatchSize: "
            "DataLoader(drop_last=True)), or set gather_features=False"
        )


def _facts(x: Tensor) -> list[int]:
    shape = [*x.shape, 0, 0][:2]
    kind = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else -1
    return [x.ndim, *shape, kind, _needs_grad(x)]


def _needs_grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _told(facts: list[int]) -> str:
    features = " and ".join(_told_one(*facts[i : i + _FACTS]) for i in (0, _FACTS))
    numbers = zip(("scale", "bias"), facts[2 * _FACTS :], strict=False)
    return ", ".join([features, *(f"{x} {'trained' if y else 'frozen'}" for x, y in numbers)])


def _told_one(ndim: int, rows: int, width: int, kind: int, needs_grad: int) -> str:
    shape = str((rows, width)[:ndim]) if ndim <= 2 else f"({rows}, {width}, …)"
    dtype = str(_DTYPES[kind]) if kind >= 0 else "another dtype"
    return f"{shape} {dtype} {'with' if needs_grad else 'without'} gradient"


def blocks(group: dist.ProcessGroup, *own: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each rank's tensors, of the same shapes on all; the next are under way meanwhile."""
    world = dist.get_world_size(group)
    ahead = _send(group, 0, own)
    for source in range(world):
        held, works = ahead
        if source + 1 < world:
            ahead = _send(group, source + 1, own)
        for work in works:
            work.wait()
        yield source, held


def _send(
    group: dist.ProcessGroup, source: int, own: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Any]]:
    here = source == dist.get_rank(group)
    held = [x.contiguous() if here else x.new_empty(x.shape) for x in own]
    return held, [dist.broadcast(x, group=group, group_src=source, async_op=True) for x in held]


def exchange(group: dist.ProcessGroup, parts: Tensor) -> Tensor:
    """Return what each rank has for this one, given what this one has for each; shape (W, …)."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def sum_at(group: dist.ProcessGroup, source: int, x: Tensor) -> Tensor | None:
    """Return the sum over ranks at one of them, None elsewhere; x is used up."""
    x = x.contiguous()  # a kernel pads rows, over which gloo would go in silence
    dist.reduce(x, group=group, group_dst=source)
    return x if source == dist.get_rank(group) else None


def mean_over(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """Return the mean over ranks on all of them; x is used up."""
    dist.all_reduce(x, group=group)
    return x.div_(dist.get_world_size(group))


def refuse_second_derivative() -> None:
    """Raise where a backward pass is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a contrastive loss over ranks can be differentiated once: create_graph=True does not "
            "go with it. Set gather_features=False, and write the loss out on all logits"
        )


def mean_loss(losses: Tensor, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the mean of the losses of all rows of all ranks, at least in float32."""
    own = losses.mean().to(torch.promote_types(like.dtype, torch.float32))
    return MeanOfRanks.apply(own, group)


class MeanOfRanks(torch.autograd.Function):
    """The mean of one number over ranks; its gradient is that of the own number.

    With L = Σ_k L_k / W and backward passes that start at 1 for the L_k of each rank k, rank j gets
    ∂Σ_k L_k/∂x_j = W ∂L/∂x_j, of which DDP's mean over ranks is the gradient of L.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the mean."""
        return mean_over(group, own.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on."""
        return grad, None
