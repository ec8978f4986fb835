"""What a LightningModule keeps outside of its stages: buffers, metrics, attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_ext._lightning import untouched
from lightning_ext.strategies._pipeline._rehearsal import untouched_metrics


class Outside:
    """Buffers that no layer has, and how steps change them.

    The last rank runs all of a step but the stages, the first one what is before them; a buffer
    that several ranks have changed has the value of the last of these.

    Args:
        module: The LightningModule.
        layers: Of the split submodule.
        group: Of the pipeline.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[nn.Module], group: dist.ProcessGroup
    ) -> None:
        self._module, self._group = module, group
        inner = {id(one) for layer in layers for one in layer.modules()}
        held = {id(x) for layer in layers for x in layer.buffers()}
        self._places = [
            (one._buffers, name)
            for one in module.modules()
            if id(one) not in inner
            for name, value in one._buffers.items()
            if value is not None and id(value) not in held
        ]
        self._align()

    def share(self) -> None:
        """Gives all ranks of the pipeline what one of them has changed; all must call."""
        if not self._places or dist.get_world_size(self._group) == 1:
            return
        own = {
            index: value.detach().cpu()
            for index, (value, before) in enumerate(zip(self._values(), self._known, strict=True))
            if not torch.equal(value, before)
        }
        found: list[dict[int, Tensor]] = [{}] * dist.get_world_size(self._group)
        dist.all_gather_object(found, own, group=self._group)
        self._take({index: value for one in found for index, value in one.items()})

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Puts buffers, metrics and attributes of the module back after a ``with`` block.

        Raises:
            MisconfigurationException: A metric was updated in it.
        """
        metrics = [one for one in self._module.modules() if isinstance(one, Metric)]
        # In place and past autograd, which may have saved them for a backward pass.
        before = [(x.data, x.clone()) for x in (*self._values(), *_states(metrics))]
        try:
            with untouched(self._module), untouched_metrics(self._module):
                yield
        finally:
            for value, saved in before:
                value.copy_(saved)

    def _values(self) -> list[Tensor]:
        return [x for table, name in self._places if (x := table[name]) is not None]

    def _align(self) -> None:
        """Gives all ranks the buffers of the first, which may have been drawn at random."""
        found = [[x.cpu() for x in self._values()]]
        if self._places:
            dist.broadcast_object_list(found, 0)
        self._take(dict(enumerate(found[0])))

    def _take(self, found: dict[int, Tensor]) -> None:
        for index, value in found.items():
            table, name = self._places[index]
            own = table[name]
            assert own is not None
            if own.shape == value.shape and own.dtype == value.dtype:
                own.data.copy_(value)
            else:
                table[name] = value.to(own.device)
        self._known = [x.detach().clone() for x in self._values()]


def _states(metrics: Sequence[Metric]) -> list[Tensor]:
    states = [getattr(one, name) for one in metrics for name in one._defaults]
    return [x for x in states if isinstance(x, Tensor)]


def _metrics_of(module: nn.Module) -> list[Metric]:
    """Its metrics, and those in lists and dicts that are its attributes or its modules'.

    Args:
        module: Of which they are.
    """
    held = [leaf for one in module.modules() for leaf in _leaves(vars(one))]
    parts = [part for one in held if isinstance(one, Metric) for part in one.modules()]
    found = [one for one in (*module.modules(), *parts) if isinstance(one, Metric)]
    return list({id(one): one for one in found}.values())


def _leaves(attributes: dict[str, Any]) -> list[Any]:
    return tree_leaves({n: x for n, x in attributes.items() if type(x) in (dict, list, tuple)})


class _OverReplicas:
    """Gathers a metric's state over data-parallel ranks; copies of the metric share it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, value: Tensor, group: Any = None) -> list[Tensor]:
        return gather_all_tensors(value, group or self._group)

    def __deepcopy__(self, memo: Any) -> _OverReplicas:
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _over_all, ()  # to another process, which has no such group


def _over_all() -> Callable[..., list[Tensor]]:
    return gather_all_tensors


def sync_metrics_over(module: nn.Module, replicas: dist.ProcessGroup) -> None:
    """Has metrics count each sample once, not once on each rank of a pipeline.

    Args:
        module: Whose metrics are changed, where they do not say themselves how they are synced.
        replicas: Ranks that see different data.
    """
    for one in _metrics_of(module):
        if one.process_group is None and one.dist_sync_fn is None:
            one.dist_sync_fn = _OverReplicas(replicas)
