"""The names under which a Trainer finds the strategies of this package."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_ext.strategies._deepspeed_zeropp import DeepSpeedZeroPPStrategy
from lightning_ext.strategies._fsdp2_strategy import FSDP2Strategy
from lightning_ext.strategies._pipeline_strategy import PipelineStrategy
from lightning_ext.strategies._zeropp_strategy import ZeroPPStrategy

# Each with the arguments that the name stands for.
NAMES: dict[str, tuple[type[Strategy], dict[str, Any]]] = {
    "fsdp2": (FSDP2Strategy, {}),
    "zeropp": (ZeroPPStrategy, {}),
    "zeropp_deepspeed": (DeepSpeedZeroPPStrategy, {}),
    "breadth_first_pipeline": (PipelineStrategy, {"schedule": "breadth_first"}),
    "gpipe": (PipelineStrategy, {"schedule": "gpipe"}),
    "pipeline_1f1b": (PipelineStrategy, {"schedule": "1f1b"}),
    "pipeline_interleaved_1f1b": (PipelineStrategy, {"schedule": "interleaved_1f1b"}),
}


def register_strategies() -> None:
    """Tells Lightning the names, for ``Trainer(strategy=…)``; done by importing ``lightning_ext``.

    A name that somebody else has registered before is left to them, with a warning.
    """
    for name, (strategy, arguments) in NAMES.items():
        if name not in StrategyRegistry:
            summary = (strategy.__doc__ or "").partition("\n")[0]
            StrategyRegistry.register(name, strategy, description=summary, **arguments)
        elif StrategyRegistry[name]["strategy"] is not strategy:
            warnings.warn(
                f"Trainer(strategy={name!r}) is {StrategyRegistry[name]['strategy']}, registered by"
                f" another package. Hint: Trainer(strategy={strategy.__name__}()).",
                stacklevel=2,
            )
