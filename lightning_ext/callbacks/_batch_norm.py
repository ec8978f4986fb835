"""A word about the third batch size, the one that normalization layers see."""

from __future__ import annotations

from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

_warned: WeakSet[Module] = WeakSet()


def warn_batch_norm(module: Module) -> None:
    """Warns, once for a module, that batch normalization will see another batch size."""
    layers = [name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    if layers and module not in _warned:
        _warned.add(module)
        rank_zero_warn(
            f"The micro-batch may change, and with it the statistics batch of {len(layers)} batch"
            f" normalization layers (the first is {layers[0]!r}). Hint: leave max_micro_batch at"
            " None, so that only accumulation changes, or use GroupNorm or LayerNorm."
        )
