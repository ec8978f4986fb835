"""The names under which a Trainer finds the strategies of this package."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry


@dataclass(frozen=True)
class Named:
    """What a name stands for; its class is imported when a Trainer asks for it.

    Attributes:
        strategy: its name in ``lightning_ext.strategies``.
        summary: what ``StrategyRegistry`` says of it.
        arguments: that the name stands for.
    """

    strategy: str
    summary: str
    arguments: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Strategy:
        """Make the strategy."""
        room = import_module("lightning_ext.strategies")
        made: Strategy = getattr(room, self.strategy)(*args, **kwargs)
        return made


_PIPELINE = "One submodule in stages over ranks."
NAMES: dict[str, Named] = {
    "fsdp2": Named("FSDP2Strategy", "FSDP2 under a module as it is.", {}),
    "zeropp": Named("ZeroPPStrategy", "ZeRO++ on FSDP2.", {}),
    "zeropp_deepspeed": Named("DeepSpeedZeroPPStrategy", "ZeRO++ on DeepSpeed's engine.", {}),
    "breadth_first_pipeline": Named("PipelineStrategy", _PIPELINE, {"schedule": "breadth_first"}),
    "gpipe": Named("PipelineStrategy", _PIPELINE, {"schedule": "gpipe"}),
    "pipeline_1f1b": Named("PipelineStrategy", _PIPELINE, {"schedule": "1f1b"}),
    "pipeline_interleaved_1f1b": Named(
        "PipelineStrategy", _PIPELINE, {"schedule": "interleaved_1f1b"}
    ),
}


def register_strategies() -> None:
    """Tells Lightning the names, for ``Trainer(strategy=…)``; done by importing ``lightning_ext``.

    A name that somebody else has registered before is left to them, with a warning.
    """
    for name, named in NAMES.items():
        if name not in StrategyRegistry:
            summary, arguments = named.summary, named.arguments
            StrategyRegistry.register(name, named, description=summary, **arguments)
        elif StrategyRegistry[name]["strategy"] is not named:
            warnings.warn(
                f"Trainer(strategy={name!r}) is {StrategyRegistry[name]['strategy']}, registered by"
                f" another package. Hint: Trainer(strategy={named.strategy}()).",
                stacklevel=2,
            )
