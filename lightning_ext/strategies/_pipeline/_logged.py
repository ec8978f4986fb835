"""What steps log on the last rank, logged again on all ranks of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

_SIGNATURE = inspect.signature(LightningModule.log)
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "min": lambda values: values.amin(0),
    "max": lambda values: values.amax(0),
    "sum": lambda values: values.sum(0),
}


class Logged(NamedTuple):
    """What a name has in a batch.

    Args:
        value: Reduced over micro-batches as Lightning reduces it over batches.
        samples: Of the micro-batches in which it was logged: its weight in the mean of an epoch.
        options: Further arguments of ``log``.
    """

    value: Tensor
    samples: int
    options: dict[str, Any]


@dataclass
class _Entry:
    options: dict[str, Any]
    values: list[Tensor] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)


class Records:
    """Takes the place of ``LightningModule.log`` while micro-batches run.

    Args:
        device: Of numbers that are logged.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples = 1
        self._entries: dict[str, _Entry] = {}

    @contextmanager
    def listening(self, module: LightningModule, samples: int) -> Iterator[None]:
        """Records what a module logs, in a ``with`` block.

        Args:
            module: Runs one micro-batch.
            samples: Of it.
        """
        own, self._samples = vars(module), samples
        own["log"] = self._log
        try:
            yield
        finally:
            del own["log"]

    def pop(self) -> dict[str, Logged]:
        """What was logged since the last call, by name."""
        entries, self._entries = self._entries, {}
        return {name: _reduced(entry) for name, entry in entries.items()}

    def _log(self, *args: Any, **kwargs: Any) -> None:
        bound = _SIGNATURE.bind(None, *args, **kwargs).arguments
        name, value = bound.pop("name"), bound.pop("value")
        del bound["self"]
        size = bound.pop("batch_size", None)
        number = _number(name, value, self._device)
        _require_known(name, bound)
        entry = self._entries.setdefault(name, _Entry(bound))
        entry.values.append(number)
        entry.samples.append(self._samples if size is None else int(size))


@contextmanager
def refusing_logs(module: LightningModule) -> Iterator[None]:
    """Refuses what a module logs, in a ``with`` block within one of :meth:`Records.listening`.

    Args:
        module: Runs ``pipeline_inputs``.

    Raises:
        MisconfigurationException: It logs.
    """
    before = vars(module)["log"]
    vars(module)["log"] = _refuse
    try:
        yield
    finally:
        vars(module)["log"] = before


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise MisconfigurationException(
        f"pipeline_inputs logs {name!r} on the first rank of a pipeline, and it is the last one"
        " that tells what was logged. Allowed are no logs there. Hint: self.log in pipeline_loss."
    )


def _number(name: str, value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Metric):
        raise MisconfigurationException(
            f"training_step logs {name!r} as a {type(value).__name__}, whose state the last"
            " rank of a pipeline alone would have. Allowed are numbers and tensors. Hint:"
            f" self.log({name!r}, value_of_this_batch); metrics of validation are whole."
        )
    found = torch.as_tensor(value, device=device).detach()
    if found.numel() != 1:
        raise MisconfigurationException(
            f"training_step logs {name!r} as a tensor of shape {tuple(found.shape)}; allowed is"
            f" one number. Hint: self.log({name!r}, value.mean())."
        )
    exact = isinstance(value, Tensor) and found.is_floating_point()
    return (found if exact else found.to(_dtype_of_numbers())).reshape(()).clone()


def _dtype_of_numbers() -> torch.dtype:
    """That of numbers that are no tensors, and of whole ones; bfloat16-true has it wide, too."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _require_known(name: str, options: dict[str, Any]) -> None:
    if options.get("sync_dist_group") is not None:
        raise MisconfigurationException(
            f"training_step logs {name!r} with sync_dist_group=; allowed under a pipeline is"
            " sync_dist=True, which reduces over the data-parallel ranks."
        )
    if _reduction(options) not in ("mean", *_REDUCTIONS):
        raise MisconfigurationException(
            f"training_step logs {name!r} with reduce_fx={options['reduce_fx']!r}; allowed are"
            " 'mean', 'sum', 'min' and 'max', as in Lightning."
        )


def _reduction(options: dict[str, Any]) -> str:
    asked = options.get("reduce_fx", "mean")
    name = str(asked if isinstance(asked, str) else getattr(asked, "__name__", asked)).lower()
    return "mean" if name == "avg" else name


def _reduced(entry: _Entry) -> Logged:
    values, samples = torch.stack(entry.values), sum(entry.samples)
    reduction = _reduction(entry.options)
    if reduction != "mean":
        return Logged(_REDUCTIONS[reduction](values), samples, entry.options)
    if len(set(entry.samples)) == 1:
        return Logged(values.mean(0), samples, entry.options)
    weights = torch.tensor(entry.samples, dtype=values.dtype, device=values.device)
    return Logged((values * weights).sum(0) / weights.sum(), samples, entry.options)
