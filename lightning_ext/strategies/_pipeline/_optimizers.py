"""Optimizers that need more than the layers of one rank of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS, Optimizer

from lightning_ext.optim import (
    EGN,
    MKOR,
    MKORH,
    VRGD,
    AdaGradNorm,
    DistributedLion,
    Gravity,
    MTAdamW,
    PolyakSGD,
)

_WHOLE = "takes sums over all parameters in its step"
_LAYERS = "reads what layers see and send back in one pass of the whole module"
_REASONS: dict[type[Optimizer], tuple[str, str]] = {
    AdaGradNorm: (_WHOLE, "LARS, or Adagrad"),
    MTAdamW: (_WHOLE, "AdamW"),
    PolyakSGD: (_WHOLE, "SGD"),
    LBFGS: (_WHOLE, "AdamW"),
    EGN: (_LAYERS, "AdamW, or NorMuon"),
    MKOR: (_LAYERS, "NorMuon"),
    MKORH: (_LAYERS, "NorMuon"),
    VRGD: ("tells the micro-batches and the ranks apart by itself", "its base alone"),
    DistributedLion: ("exchanges the gradients of ranks by itself", "Lion"),
}


def check_optimizers(optimizers: Sequence[Optimizer], ranks: int) -> None:
    """Refuses optimizers that would step otherwise than in one process.

    Args:
        optimizers: As the module configured them.
        ranks: Of the pipeline.

    Raises:
        MisconfigurationException: With the optimizer, the reason and another one.
    """
    if ranks == 1:
        return
    for optimizer in (x for each in optimizers for x in _with_bases(each)):
        for kind, (reason, instead) in _REASONS.items():
            if isinstance(optimizer, kind):
                _refuse(type(optimizer).__name__, reason, instead)
        norms = {group.get("max_grad_norm") for group in optimizer.param_groups} - {None}
        if isinstance(optimizer, Gravity) and any(x["alpha"] for x in optimizer.param_groups):
            reason = "draws velocities by the place of a parameter among all"
            _refuse("Gravity with alpha above 0", reason, "alpha=0")
        if norms:
            name = f"{type(optimizer).__name__} with max_grad_norm={norms.pop()}"
            _refuse(name, _WHOLE, "max_grad_norm=None and Trainer(gradient_clip_val=…)")


def _with_bases(optimizer: Optimizer) -> Iterator[Optimizer]:
    yield optimizer
    base = getattr(optimizer, "base", None)
    if isinstance(base, Optimizer):
        yield from _with_bases(base)


def _refuse(name: str, reason: str, instead: str) -> None:
    raise MisconfigurationException(
        f"{name} {reason}, and each rank of a pipeline steps the layers that it has. Allowed are"
        f" optimizers that take each parameter by itself. Hint: {instead}."
    )
