"""Gradients of parameters that several ranks have whole.

They are those outside of the stages, those of several stages, and what FSDP2 cannot cut. A rank's
gradient is of what its own stages made of the parameter; the sum over pipeline ranks is the whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DeviceMesh
from torch.nn import Parameter

from lightning_ext.strategies._pipeline._parts import Parts

Homes = frozenset[int]
_ROUNDING = 1e-5  # relative, at most
_ULPS = 64


class SharedGradients:
    """Adds gradients over pipeline ranks, and averages them over data-parallel ones.

    Args:
        shared: Parameters of this rank, with the pipeline ranks that have them.
        mesh: (data_parallel, pipeline).
        kinds: All sets of pipeline ranks for which groups are made, the same on all ranks.
    """

    def __init__(
        self, shared: Mapping[Parameter, Homes], mesh: DeviceMesh, kinds: Iterable[Homes]
    ) -> None:
        self._replicas = mesh.size(0)
        self._groups = {kind: _group(mesh, kind) for kind in sorted(kinds, key=sorted)}
        self._members: dict[tuple[Homes, torch.dtype], list[Parameter]] = defaultdict(list)
        for parameter, homes in shared.items():
            self._members[homes, parameter.dtype].append(parameter)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those of this rank."""
        return [group for group in self._groups.values() if group is not None]

    def align(self) -> None:
        """Gives all ranks the values of the first that has a parameter."""
        for (homes, _), members in self._members.items():
            group = self._groups[homes]
            if group is not None:
                for one in members:
                    dist.broadcast(one.data, dist.get_global_rank(group, 0), group=group)

    def reduce(self) -> None:
        """Reduces the gradients of this optimizer step; all ranks must call."""
        for (homes, _), members in self._members.items():
            trained = [one for one in members if one.requires_grad]
            if trained and (group := self._groups[homes]) is not None:
                Reduction(trained, group, self._replicas).finish()


def require_equal_copies(parts: Parts, device: torch.device) -> None:
    """Refuses parameters whose copies have become different; all ranks must call.

    Args:
        parts: What of the module is here.
        device: Of the collective.

    Raises:
        MisconfigurationException: On all ranks, with their names.
    """
    names = [name for name in parts.parameter_names if parts.has_copies(name)]
    if not names or dist.get_world_size() == 1:
        return
    found = {parts.first_name(name): one for name, one in parts.root.named_parameters()}
    norms = [_norms(found.get(name), device) for name in names]
    extremes = torch.stack([torch.stack(norms), -torch.stack(norms)])
    extremes[extremes.isinf()] = -torch.inf  # of those that are elsewhere
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes[0], -extremes[1]
    bounds = highest[:, -1:] * highest.abs()
    differ = (highest - lowest > bounds).any(1).tolist()
    wrong = [name for name, differs in zip(names, differ, strict=True) if differs]
    if wrong:
        raise MisconfigurationException(
            f"Copies of {', '.join(map(repr, wrong[:5]))}{' …' * (len(wrong) > 5)} differ between"
            " ranks: a hook has changed gradients or weights by what one rank alone has, as"
            " torch's clip_grad_norm_ does. Allowed are quantities of all ranks. Hint:"
            " gradient_clip_val of the Trainer, or self.clip_gradients(optimizer, …) in"
            " configure_gradient_clipping, which take the norm over all ranks."
        )


def _norms(value: Parameter | None, device: torch.device) -> Tensor:
    """Three norms of a copy, and by how much they may differ; sums miss softmax gradients."""
    if value is None:
        return torch.full((4,), torch.inf, dtype=torch.float64, device=device)
    if not value.is_floating_point():
        return torch.zeros(4, dtype=torch.float64, device=device)
    own = value.detach()
    norms = [torch.linalg.vector_norm(own, order, dtype=torch.float64) for order in (1, 2, 3)]
    bound = min(_ROUNDING, _ULPS * torch.finfo(own.dtype).eps)
    return torch.stack([*norms, norms[0].new_tensor(bound)]).nan_to_num(nan=-1.0, posinf=-1.0)


def _group(mesh: DeviceMesh, homes: Homes) -> dist.ProcessGroup | None:
    """The ranks with a parameter; none if it is one rank only."""
    ranks = sorted(int(mesh.mesh[d, p]) for d in range(mesh.size(0)) for p in homes)
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    found = dist.new_group(ranks)
    return found if dist.get_rank() in ranks else None


class Reduction:
    """Gradients of one dtype on their way to the mean over replicas; starts at once.

    Args:
        members: Trained parameters, of which ranks may have no gradient.
        group: Over which gradients are added; all of its ranks have the same members.
        replicas: By which sums are divided.
    """

    def __init__(
        self, members: Sequence[Parameter], group: dist.ProcessGroup, replicas: int
    ) -> None:
        self._members, self._replicas = members, replicas
        self._gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        used = torch.tensor([p.grad is not None for p in members], device=members[0].device)
        parts = [used.to(members[0].dtype), *(g.detach().flatten() for g in self._gradients)]
        self._flat = torch.cat(parts)
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def finish(self) -> None:
        """Waits for it, and puts the means into place."""
        self._work.wait()
        members = self._members
        counts, *sums = self._flat.split([len(members), *(p.numel() for p in members)])
        unused = _unused(members, counts)
        for parameter, gradient, total in zip(members, self._gradients, sums, strict=True):
            if parameter not in unused:
                parameter.grad = gradient.copy_(total.view_as(parameter) / self._replicas)


def _unused(members: Sequence[Parameter], counts: Tensor) -> set[Parameter]:
    """Parameters that no rank has a gradient of; asked for only where this one has none."""
    if all(p.grad is not None for p in members):
        return set()
    return {p for p, count in zip(members, counts.tolist(), strict=True) if not count}
