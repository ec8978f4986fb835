"""VRGD: gradients scaled, coordinate by coordinate, by how well the parts of a batch agree.

Source: Jiang et al. 2023 (VRGD, arXiv:2309.13681).
Differs: parts are the backward passes between two steps, of all ranks. The ratio is taken of the
    gradients as each pass makes them, so clipping and loss scales do not enter it; coordinates in
    which the parts do not differ keep their gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ext import functional
from lightning_ext.optim._batch._base_optimizer import base_optimizer
from lightning_ext.optim._step._checks import SHARE, Range, check_groups
from lightning_ext.optim._step._rows import count
from lightning_ext.optim._step._shards import local_part, local_parts, placed_like, reduction
from lightning_ext.optim._wrappers._backward_parts import BackwardParts
from lightning_ext.optim._wrappers._lent import dense_gradients, lent_gradients
from lightning_ext.optim._wrappers._wrapper import Wrapper

_RANGES = {"gamma": Range(lambda x: 0 < x <= 1, "lie in (0, 1]"), "beta3": SHARE}


class VRGD(Wrapper):
    r"""Lets another optimizer step along gradients scaled by their signal-to-noise ratio.

    .. math::
        r = \bar g^2/\sigma^2, \qquad
        s = \mathrm{clip}(r/\mathrm{mean}(r), \gamma, 1), \qquad \hat g = s \odot g

    with mean and variance over k parts: each backward pass since the last step is one, on each
    rank. Two losses of one batch, each with a backward pass of its own, are two parts too, which
    differ for other reasons than noise: add them up first. The paper asks for 8 parts. The mean of
    r is that of a parameter's tensor. After the step ``p.grad`` is what it was.

    Under FSDP2 the parts are the backward passes alone, each averaged over the ranks; each has to
    be reduced, so gradients must not be left unsharded between them, as ``FSDP2Strategy`` does.

    Args:
        base: the optimizer that steps; of ours, of torch, or another wrapper.
        gamma: γ in (0, 1].
        beta3: β₃ in [0, 1) of a running mean of s; ``None`` for none. ``"auto"``: 0.9 where the
            base has a second moment, as Adam and LAMB do, and none for SGD, LARS and Lion.
        process_group: the ranks that hold the same parameters and see different samples; all of
            them by default. A group of this rank alone where there are no others. Copies of the
            optimizer have the default.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if ``base`` is no optimizer, does not step along ``p.grad``, is or was in a VRGD,
            or has complex parameters.
        RuntimeError: in a step, if fewer than two parts were seen, and never more before. A later
            step of one part, the rest of an epoch, takes the running mean, or the bare gradient;
            so does the first one after a checkpoint.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = VRGD(torch.optim.SGD([w], lr=1.0))
        >>> for noise in (-1.0, 1.0):  # two parts, which agree in the first coordinate
        ...     (w * torch.tensor([1.0 + 0.1 * noise, 0.1 + noise])).sum().backward()
        >>> optimizer.step()
        >>> w.data  # a whole step, and γ = 0.1 of one
        tensor([-2.0000, -0.0200])
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        gamma: float = 0.1,
        beta3: float | Literal["auto"] | None = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if beta3 == "auto" and isinstance(base, Optimizer):
            beta3 = 0.9 if _has_second_moment(base_optimizer(base)) else None
        super().__init__(base, {"gamma": gamma, "beta3": beta3})
        self._process_group = process_group
        self._measured: set[bool] = set()  # whether plain parameters were, and sharded ones
        self._resumed = False
        self._parts = BackwardParts()
        self._parts.watch(self._params())

    def check_settings(self) -> None:
        """Refuse what is out of range."""
        check_groups(self, _RANGES)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget what the backward passes so far have made.

        Args:
            set_to_none: as in ``torch.optim.Optimizer``.
        """
        super().zero_grad(set_to_none)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base's, and see its gradients.

        Args:
            param_group: as in ``torch.optim.Optimizer``.
        """
        super().add_param_group(param_group)
        if "_parts" in self.__dict__:
            self._parts.watch(self._params())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Args:
            state_dict: of an optimizer of the same groups; of the base alone will do.
        """
        super().load_state_dict(state_dict)
        self._measured, self._resumed = set(), bool(state_dict["state"])

    def own_names(self) -> frozenset[str]:
        """The running mean and the count of its steps."""
        return frozenset({"vrgd_scale", "vrgd_step"})

    def around_step(self) -> AbstractContextManager[None]:
        """The scaled gradients."""
        params = [x for x in self._params() if x.grad is not None]
        dense_gradients("VRGD", params)
        scales = self._scales(params)
        found = [x for x in params if x in scales]
        grads = [local_part(placed_like(x.grad, x)) for x in found if x.grad is not None]
        return lent_gradients(found, [g * scales[x] for x, g in zip(found, grads, strict=True)])

    def after_step(self) -> None:
        """The next step has parts of its own."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be copied.
        return super().__getstate__() | {"_process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parts.watch(self._params())

    def _forget(self) -> None:
        self._parts.reset()
        self._parts.watch(self._params())  # what was frozen may be so no longer

    def _params(self) -> list[Tensor]:
        return [x for group in self.param_groups for x in group["params"]]

    def _scales(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """The factors of parameters, what this rank holds of them."""
        sharded: list[Tensor] = [x for x in params if isinstance(x, DTensor)]
        plain: list[Tensor] = [x for x in params if not isinstance(x, DTensor)]
        ratios: dict[Tensor, Tensor] = {}
        for members, group in ((plain, self._ranks()), (sharded, None)):
            means, squares, parts = self._parts.means(members, group)
            if members and self._are_enough(parts, members):
                self._measured.add(members is sharded)
                found = functional.gradient_snr(squares, means, 1)
                ratios.update(zip(members, found, strict=True))
        self._resumed = False
        scales: dict[Tensor, Tensor] = {}
        for settings in self.param_groups:
            scales.update(self._scales_of(settings, ratios))
        return scales

    def _scales_of(
        self, group: dict[str, Any], ratios: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        known = [x for x in group["params"] if x in ratios]
        found = functional.vrgd_scale(
            [ratios[x] for x in known], gamma=group["gamma"], reduce=reduction(known)
        )
        scales = dict(zip(known, found, strict=True))
        if group["beta3"] is None:
            return scales
        moving = [x for x in group["params"] if x.grad is not None]
        return {x: self._smoothed(x, scales.get(x), group["beta3"]) for x in moving}

    def _smoothed(self, param: Tensor, scale: Tensor | None, beta3: float) -> Tensor:
        own = self.own[param]
        if not own:
            wide = torch.promote_types(param.dtype, torch.float32)
            own |= {"vrgd_scale": torch.ones_like(param, dtype=wide), "vrgd_step": count(param)}
        average = local_part(own["vrgd_scale"])
        if scale is not None:
            step = own["vrgd_step"].add_(1)
            average.copy_(functional.smoothed_vrgd_scale(scale, average, step, beta3=beta3))
        return average

    def _ranks(self) -> dist.ProcessGroup | None:
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self._process_group or dist.group.WORLD
        return group if group is not None and group.size() > 1 else None

    def _are_enough(self, parts: int, params: list[Tensor]) -> bool:
        # Without a backward pass and with gradients of 0 it is the step by which
        # torch.distributed.checkpoint makes the states that are to be loaded.
        known = self._resumed or isinstance(params[0], DTensor) in self._measured
        if parts < 2 and not known and (parts == 1 or _any(params)):
            raise RuntimeError(
                f"VRGD saw {parts or 'no'} backward {'pass' if parts == 1 else 'passes'} since the"
                " last step, and needs at least 2 for a variance; its paper takes 8 or more. Hint:"
                " accumulate_grad_batches=8, or more ranks. Under FSDP2, where ranks do not count,"
                " every pass has to reduce its gradients (set_requires_gradient_sync(True)), which"
                " FSDP2Strategy leaves to the last one; ModelParallelStrategy reduces them all."
            )
        return parts > 1


def _has_second_moment(base: Optimizer) -> bool:
    return "betas" in base.defaults and "eps" in base.defaults


def _any(params: Iterable[Tensor]) -> bool:
    return any(bool(local_parts([x.grad])[0].any()) for x in params if x.grad is not None)
