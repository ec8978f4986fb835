"""Checks of a large-batch recipe: parameters, loss, normalization and data.

Source: Goyal et al. 2017, arXiv:1706.02677, sections 2.3, 3 and 5.1; Hoffer et al. 2017,
    arXiv:1705.08741 (ghost batch normalization).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.loss import _Loss
from torch.utils.data import RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_ext.callbacks._recipe._run import Advice, RecipeRun, order_of
from lightning_ext.data import SeededPermutation

GOYAL = "Goyal et al. 2017, arXiv:1706.02677"
HOFFER = "Hoffer et al. 2017, arXiv:1705.08741"
_STATISTICS = (16, 128)  # samples; Goyal et al. normalize over 32, Hoffer et al. over 128


def decayed_vectors(run: RecipeRun) -> list[Advice]:
    """Weight decay on biases and on the γ and β of normalization layers."""
    names = {parameter: name for name, parameter in run.module.named_parameters()}
    groups = [group for o in run.trainer.optimizers for group in o.param_groups]
    decayed = [
        names.get(parameter, "one without a name")
        for group in groups
        if group.get("weight_decay", 0) > 0
        for parameter in group["params"]
        if parameter.ndim <= 1
    ]
    if not decayed:
        return []
    found = f"weight decay on {len(decayed)} parameters of one dimension ({_some(decayed)})"
    wanted = "weight_decay=0 in a group of their own: biases and the γ and β of normalization"
    return [Advice("weight decay", "advice", found, wanted, f"{GOYAL}, section 5.1")]


def uneven_loss(run: RecipeRun) -> list[Advice]:
    """A last batch or a last window whose samples weigh more or less than others."""
    accumulate = run.trainer.accumulate_grad_batches
    samples, per_batch = run.samples_per_epoch, run.global_batch // accumulate
    if samples is None or (run.adaptive is not None and run.adaptive.rescale_last_window):
        return []
    found = []
    batches, last = run.trainer.num_training_batches, samples % per_batch
    if last and batches > samples // per_batch:
        found.append(
            f"the last batch of an epoch has {last} of {per_batch} samples, each of which weighs"
            f" {per_batch / last:.3g} times as much as any other"
        )
    rest = 0 if math.isinf(batches) else batches % accumulate
    if rest:
        found.append(
            f"the last step of an epoch has {rest} of {accumulate} micro-batches, its gradient is"
            f" {rest / accumulate:.3g} of a mean"
        )
    if not found:
        return []
    heavy = last and per_batch >= 2 * last
    wanted = "drop_last=True and whole windows, or AdaptiveBatchSize, which weighs losses by sample"
    severity = "advice" if heavy or rest else "note"
    return [Advice("loss average", severity, "; ".join(found), wanted, f"{GOYAL}, section 3")]


def summed_loss(run: RecipeRun) -> list[Advice]:
    """A loss that is summed over the micro-batch, while ranks and accumulation are averaged."""
    losses = run.layers(_Loss)
    summed = [name for name, loss in losses.items() if loss.reduction == "sum"]
    if not summed:
        return []
    found = f'reduction="sum" in {_some(summed)}: the gradient grows with the micro-batch'
    wanted = 'reduction="mean": the loss of a step is the mean over its global batch'
    return [Advice("loss average", "warning", found, wanted, f"{GOYAL}, section 3")]


def statistics_batch(run: RecipeRun) -> list[Advice]:
    """The number of samples that batch normalization sees."""
    layers = {name: n for name, n in run.layers(_BatchNorm).items() if n.training}
    if not layers:
        return []
    synced = {name: n for name, n in layers.items() if isinstance(n, nn.SyncBatchNorm)}
    plain = layers.keys() - synced.keys()
    micro_batch, ranks = run.sizes.micro_batch, run.sizes.data_parallel_size
    seen = {micro_batch: sorted(plain), micro_batch * ranks: sorted(synced)} if ranks > 1 else {}
    seen = seen or {micro_batch: sorted(layers)}
    advice = [_of_size(size, names) for size, names in seen.items() if names]
    return [a for a in (*advice, _changing_statistics(run, layers)) if a is not None]


def _of_size(size: int, names: list[str]) -> Advice | None:
    low, high = _STATISTICS
    if low <= size <= high:
        return None
    found = f"{len(names)} batch normalizations ({_some(names)}) over {size} samples"
    wanted = f"{low} to {high}; accumulation does not enlarge them: " + (
        "a larger micro-batch, SyncBatchNorm, GroupNorm or LayerNorm"
        if size < low
        else "a smaller micro-batch with more accumulation, no SyncBatchNorm, or ghosts of 32 to"
        " 128 samples"
    )
    source = f"{GOYAL}, section 2.3 (32); {HOFFER} (128)"
    return Advice("batch normalization", "advice", found, wanted, source)


def _changing_statistics(run: RecipeRun, layers: dict[str, Any]) -> Advice | None:
    controller = run.adaptive.batch.controller if run.adaptive is not None else None
    largest = controller and controller.max_micro_batch
    if not controller or not largest or largest == controller.start.micro_batch:
        return None
    found = f"a micro-batch of up to {largest} under {len(layers)} batch normalizations"
    wanted = "max_micro_batch=None, so that accumulation alone changes and their statistics do not"
    return Advice("batch normalization", "warning", found, wanted, f"{GOYAL}, section 2.3")


def residual_branches(run: RecipeRun) -> list[Advice]:
    """Blocks with bn1, bn2, … and a shortcut, whose last γ begins at 1."""
    if run.trainer.global_step > 0:
        return []
    ends = {name: _last_of_branch(block) for name, block in run.layers(nn.Module).items()}
    ones = [
        name
        for name, last in ends.items()
        if last is not None and last.weight is not None and bool(torch.all(last.weight == 1))
    ]
    if not ones:
        return []
    found = f"γ = 1 in the last normalization of {len(ones)} residual branches ({_some(ones)})"
    wanted = "γ = 0 there at the start, so that every block begins as the identity"
    return [Advice("initialization", "note", found, wanted, f"{GOYAL}, section 5.1")]


def _last_of_branch(block: nn.Module) -> Any:
    children = dict(block.named_children())
    norms = [name for name in children if re.fullmatch(r"(bn|norm)\d+", name)]
    skips = any(hasattr(block, name) for name in ("downsample", "shortcut"))
    last = children[max(norms, key=_number)] if skips and len(norms) > 1 else None
    return last if isinstance(last, _BatchNorm) else None


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def shuffling(run: RecipeRun) -> list[Advice]:
    """One permutation of all samples per epoch, split over the ranks."""
    order = order_of(run.loader)
    source = f"{GOYAL}, section 3"
    wanted = "one shuffle of all samples per epoch, split over ranks (shuffle=True)"
    fixed = isinstance(order, SequentialSampler)
    if isinstance(order, (DistributedSampler, SeededPermutation)):
        fixed = not order.shuffle
    if fixed:
        return [Advice("order of samples", "advice", "the same in each epoch", wanted, source)]
    if not isinstance(order, RandomSampler):
        return []
    if order.replacement:
        found = "samples are drawn with replacement"
        return [Advice("order of samples", "note", found, wanted, source)]
    if run.sizes.data_parallel_size > 1 and order.generator is None:
        found = "every rank shuffles all samples for itself"
        return [Advice("order of samples", "warning", found, wanted, source)]
    return []


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown}, …"
