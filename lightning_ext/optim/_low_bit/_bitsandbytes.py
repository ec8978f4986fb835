"""AdamW and Lion by bitsandbytes' 8-bit steps, on states in "int8": the same codes and scales.

Source: Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861).
Differs: bitsandbytes' own optimizers count steps in whole numbers, and on CUDA the decay takes its
    share of the step, too; both are folded into the numbers that its step is given. Its step on a
    CPU has no code for 0 and gives such an entry of m the next one; here it stays 0. What shares a
    block with a gradient that is not finite is not always so itself when read: look at gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from lightning_ext import kernels
from lightning_ext._require import require
from lightning_ext.functional import QuantizedState
from lightning_ext.optim._low_bit._bitsandbytes_step import (
    Numbers,
    UpdateOptions,
    check_options,
    finish,
    folded,
    is_paged,
    read,
    rows_of,
    update,
)

Tensors = Sequence[Tensor]
States = Sequence[Tensor | QuantizedState]

OPTIMIZERS = ("LowBitAdamW", "Lion")
_NO_TRUST_RATIO = ("LAMB", "LARS")
_PAGED_FROM = 100_000  # entries, as in bitsandbytes: below, pages save nothing


def require_bitsandbytes(
    optimizer: str,
    backend: str | None,
    state_dtype: str | None,
    *,
    paged: bool = False,
    weight_rounding: str = "nearest",
) -> None:
    """Refuse a back-end that an optimizer, its states or this machine do not have.

    Args:
        optimizer: name of its class.
        backend: ``None`` or "bitsandbytes".
        state_dtype: format of its states.
        paged: whether states are in pages that go between the GPU and the CPU.
        weight_rounding: of weights in bfloat16.

    Raises:
        ValueError: if they do not fit together.
        ModuleNotFoundError: if bitsandbytes is not installed.
    """
    if backend not in (None, "bitsandbytes"):
        raise ValueError(f"{optimizer} got backend={backend!r}; choose None or 'bitsandbytes'")
    if paged and backend is None:
        raise ValueError(f"{optimizer} got paged=True; only backend='bitsandbytes' has pages")
    if backend is None:
        return
    if optimizer in _NO_TRUST_RATIO:
        raise ValueError(
            f"{optimizer} got backend='bitsandbytes', whose 8-bit LAMB and LARS apply no trust"
            f" ratio; leave backend out: {optimizer}(state_dtype='int8') applies it"
        )
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"{optimizer} got backend='bitsandbytes'; it is there for {' and '.join(OPTIMIZERS)}"
        )
    if state_dtype != "int8":
        raise ValueError(
            f"{optimizer} got state_dtype={state_dtype!r} with backend='bitsandbytes', which has"
            " 'int8' alone; set that, or leave backend out"
        )
    if weight_rounding != "nearest":
        raise ValueError(
            f"{optimizer} got weight_rounding={weight_rounding!r} with backend='bitsandbytes', that"
            " rounds to 'nearest' alone; set that, or leave backend out"
        )
    require("bitsandbytes", "bnb")
    if paged and not torch.cuda.is_available():
        raise ValueError(
            f"{optimizer} got paged=True; pages need CUDA, and there is none. On a CPU leave it out"
        )


@torch.no_grad()
def adamw_update_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Tensors,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``kernels.adamw_update_`` by bitsandbytes where both moments are in "int8".

    With c₁ = 1 − β₁ᵗ and c₂ = 1 − β₂ᵗ it is given lr·√c₂/c₁ and ε·√c₂ at a count of steps at which
    its own corrections are 1, so that t may be a fraction. What is on a device is read in one copy,
    the one time that a step waits.

    Args:
        params: w of each parameter, in float32, float16 or bfloat16.
        grads: g of each.
        exp_avgs: m of each, in "int8", or a float32 tensor or state: then our own update is done.
        exp_avg_sqs: v of each, as m.
        steps: t of each, already counting this step; best on the CPU.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: must be True where there is a decay.
        maximize: take −g for g.
        fused: of our own update.
        options: as in ``kernels.adamw_update_``; weights are rounded to nearest alone.

    Raises:
        ValueError: if lists, settings or states do not fit together.
        TypeError: for dtypes that bitsandbytes does not have.
    """
    op = "adamw_update_"
    if weight_decay and not decoupled_weight_decay:
        raise ValueError(f"{op} of bitsandbytes has a decoupled weight decay only; set it to 0")
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_options(op, options)
    rows, others = rows_of(op, lists, steps)
    if others:
        kernels.adamw_update_(
            *map(list, zip(*others, strict=True)),
            **options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
        )
    found = read(lr, options, [row[-1] for row in rows], maximize=maximize) if rows else None
    if found is None:
        return
    given = Numbers(betas, found.lr, eps, weight_decay, found.grad_factor)
    for (param, grad, *moments, _), count in zip(rows, found.steps, strict=True):
        numbers = folded(op, count, given, decay_last=param.is_cuda)
        update("adam", param, grad, moments, numbers)
    finish(row[:-1] for row in rows)


@torch.no_grad()
def lion_update_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: States,
    steps: Tensors | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``kernels.lion_update_`` by bitsandbytes where the moment is in "int8".

    Args:
        params: w of each parameter, in float32, float16 or bfloat16.
        grads: g of each.
        exp_avgs: m of each, in "int8", or a float32 tensor or state: then our own update is done.
        steps: not read.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        weight_decay: λ.
        maximize: take −g for g.
        fused: of our own update.
        options: as in ``kernels.adamw_update_``; weights are rounded to nearest alone.

    Raises:
        ValueError: if lists or states do not fit together.
        TypeError: for dtypes that bitsandbytes does not have.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs}
    check_options("lion_update_", options)
    rows, others = rows_of("lion_update_", lists, None)
    if others:
        kernels.lion_update_(
            *map(list, zip(*others, strict=True)),
            **options,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
        )
    found = read(lr, options, [], maximize=maximize) if rows else None
    if found is None:
        return
    numbers = Numbers(betas, found.lr, 0.0, weight_decay, found.grad_factor)
    for param, grad, *moments in rows:
        update("lion", param, grad, moments, numbers)
    finish(rows)


def page_state(state: QuantizedState) -> QuantizedState:
    """Return a state whose codes are in pages that CUDA moves between the GPU and the CPU.

    Scales stay on the GPU, small states where they are. The pages are bitsandbytes': a copy, a cast
    or a load of a checkpoint makes a plain tensor of them, to be paged again.

    Args:
        state: in "int8", on a GPU.

    Raises:
        ValueError: if it is not.
    """
    device = state.scales.device
    if state.format != "int8" or device.type != "cuda":
        raise ValueError(
            f"a state in {state.format} on {device} cannot be paged; that takes 'int8' on CUDA"
        )
    if state.codes.numel() < _PAGED_FROM or is_paged(state.codes):
        return state
    make = require("bitsandbytes.functional", "bnb").get_paged
    codes = make(*state.codes.shape, dtype=torch.uint8, device=device)
    codes.copy_(state.codes)
    return state._replace(codes=codes)
