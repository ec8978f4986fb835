"""Schedules by samples whose value also depends on the global batch, at every step anew.

Source: Shen et al. 2024, arXiv:2408.13359, equation 8 (Power); You et al. 2019, arXiv:1901.08256
    (LEGW: warm-up epochs grow with the batch).
Differs: both follow a batch that changes in flight. LEGW's rule for the peak, √κ, is the
    business of the rule for the batch (``lr_rule="legw"``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_ext import scaling
from lightning_ext.optim._schedules._sample_schedule import SampleSchedule


class PowerScheduler(SampleSchedule):
    r"""Sets :math:`\eta = \min(\eta_{max}, \beta\,a\,n^b)` from tokens seen and the live batch.

    The law gives the learning rate itself, and the ``lr`` of a group multiplies it: build the
    optimizer with ``lr=1.0``, and give μP's inner matrices ``lr=1/width_multiplier``. The batch
    β is in the law already: beside :class:`~lightning_ext.callbacks.AdaptiveBatchSize` use
    ``lr_rule="none"``, or it counts twice. A change of ``samples_per_step`` between two steps sets
    the learning rate of the coming step.

    Args:
        optimizer: The wrapped optimizer; at least one of its groups has ``lr=1.0``.
        tokens_per_sample: Tokens of a sequence; the constants belong to sequences of 4096.
        a: Amplitude, above 0.
        b: Exponent, at most 0.
        lr_max: Largest value of the law.
        warmup_samples: Length of a linear ramp up to the law's value at its end.
        total_samples: Samples of the run; needed by a decay only.
        decay_samples: Length of a decay from the law's value at its begin.
        final: What the decay ends at, as a factor of that value, in [0, 1].
        shape: Of the decay, ``"linear"`` or ``"sqrt"``.
        samples_per_step: Sequences of one optimizer step (global batch), β.

    Raises:
        ValueError: A value out of range, or no group has ``lr=1.0``.

    Example:
        >>> import torch
        >>> from lightning_ext.optim import PowerScheduler
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> PowerScheduler(optimizer, tokens_per_sample=4096, samples_per_step=1024).get_last_lr()
        [0.02]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        tokens_per_sample: int,
        a: float = 4.0,
        b: float = -0.51,
        lr_max: float = 0.02,
        warmup_samples: int = 0,
        total_samples: int | None = None,
        decay_samples: int = 0,
        final: float = 0.0,
        shape: Literal["linear", "sqrt"] = "linear",
        samples_per_step: int,
    ) -> None:
        _check_unit_lr(optimizer)
        if tokens_per_sample < 1:
            raise ValueError(f"tokens_per_sample was {tokens_per_sample}; it must be positive.")
        self._tokens_per_sample = tokens_per_sample
        self._law: Callable[..., float] = partial(
            scaling.power_lr,
            a=a,
            b=b,
            lr_max=lr_max,
            warmup_tokens=warmup_samples * tokens_per_sample,
            total_tokens=None if total_samples is None else total_samples * tokens_per_sample,
            decay_tokens=decay_samples * tokens_per_sample,
            final=final,
            shape=shape,
        )
        super().__init__(optimizer, self._lr_at, samples_per_step=samples_per_step)

    @property
    def samples_per_step(self) -> int:
        """Sequences of the coming optimizer step."""
        return self._samples_per_step

    @samples_per_step.setter
    def samples_per_step(self, samples: int) -> None:
        before = getattr(self, "_samples_per_step", samples)
        self._samples_per_step = samples
        if samples != before and self._rules():
            for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                _set_lr(group, lr)
            self._last_lr = [_copied(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and what the constructor was given."""
        given = ("_law", "_tokens_per_sample")
        return {key: value for key, value in super().state_dict().items() if key not in given}

    def _lr_at(self, samples: float) -> float:
        tokens = samples * self._tokens_per_sample
        return self._law(tokens, global_batch=self._samples_per_step)

    def _rules(self) -> bool:
        """Whether the groups show what this schedule wrote last: in a composite it may be idle."""
        groups = self.optimizer.param_groups
        pairs = zip(groups, self._last_lr, strict=True)
        return self.last_epoch >= 0 and all(float(g["lr"]) == float(lr) for g, lr in pairs)


class LEGWWarmup(SampleSchedule):
    r"""Warms up over :math:`\kappa` times as many samples at :math:`\kappa` times the batch.

    That is as many steps, whatever the batch: one step of a batch :math:`\kappa B_{ref}` goes
    :math:`\kappa B_{ref} / (\kappa w)` of the way. A batch that changes during the warm-up changes
    its speed, and the factor does not jump. The peak, √κ times the reference's, comes
    from :class:`~lightning_ext.callbacks.AdaptiveBatchSize` with ``lr_rule="legw"``.

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak at the reference batch.
        warmup_samples: w, length of the warm-up at the reference batch.
        reference_batch: The global batch that ``warmup_samples`` belongs to.
        then: A factor by samples that the warm-up is multiplied with, such as
            ``partial(scaling.linear_factor, total_samples=...)``; ``None`` stays at the peak.
        start: Factor of the first step, in [0, 1].
        samples_per_step: Samples of one optimizer step (global batch).

    Raises:
        ValueError: A value out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_samples: int,
        reference_batch: int,
        then: Callable[[float], float] | None = None,
        start: float = 0.0,
        samples_per_step: int,
    ) -> None:
        if reference_batch < 1:
            raise ValueError(f"reference_batch was {reference_batch}; it must be positive.")
        self._reference_batch = reference_batch
        self._ramp = partial(scaling.warmup_factor, warmup_samples=warmup_samples, start=start)
        self._then = then
        super().__init__(optimizer, self._factor, samples_per_step=samples_per_step)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and what the constructor was given."""
        given = ("_ramp", "_then", "_reference_batch")
        return {key: value for key, value in super().state_dict().items() if key not in given}

    def _factor(self, samples: float) -> float:
        """What holds after so many samples, if the batch stays as it is."""
        steps = self._counted_steps + (samples - self.samples_seen) / self._samples_of_a_step()
        ramp = self._ramp(max(0.0, steps) * self._reference_batch)
        return ramp if self._then is None else ramp * self._then(samples)


def _check_unit_lr(optimizer: Optimizer) -> None:
    lrs = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if 1.0 not in lrs:
        raise ValueError(
            f"The groups have lr={lrs}; PowerScheduler multiplies them with the learning rate of"
            " its law, so one of them must be 1.0. Hint: build the optimizer with lr=1.0."
        )


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _copied(lr: Any) -> Any:
    return lr.clone() if isinstance(lr, Tensor) else lr
