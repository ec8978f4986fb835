"""What follows the micro-batches of each optimizer step of a fit, by source and geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_ext._lightning import (
    PipelineView,
    View,
    gradient_scale,
    reshard,
    step_gradient_scale,
    view,
)
from lightning_ext.callbacks._noise._choice import Choice, choose, stays, warn_of_few_parts
from lightning_ext.callbacks._noise._consecutive_parts import ConsecutiveParts, PreviousStep
from lightning_ext.callbacks._noise._geometry import GeometryParts
from lightning_ext.callbacks._noise._gradient_parts import GradientParts
from lightning_ext.callbacks._noise._measurement import Measurement, Parts
from lightning_ext.callbacks._noise._norm_factor import NormFactor
from lightning_ext.callbacks._noise._norm_layer_parts import NormLayerParts, NormSource
from lightning_ext.callbacks._noise._parameter_groups import ParameterGroups, submodules
from lightning_ext.callbacks._noise._pipeline_parts import PipelineParts
from lightning_ext.callbacks._noise._sample_gradients import SampleGradients, refuse_batch_norm
from lightning_ext.callbacks._noise._sample_parts import SampleParts
from lightning_ext.callbacks._noise._settings import NoiseSettings
from lightning_ext.callbacks._noise._sharded_parts import ShardedParts
from lightning_ext.scaling import NoiseScale

# Steps between two measurements, where the user leaves it open: the cost of one differs.
_EVERY = {"micro_batches": 4, "norm_layers": 4, "per_sample": 20, "consecutive_steps": 4}
_EVERY_OF_GEOMETRY = {"euclidean": 1, "adam": 20, "l1": 20, "nuclear": 100}


class Lasting:
    """What sources keep from window to window, and in checkpoints.

    Args:
        learnt: What is known of norm layers, and to be used as it is; ``None`` learns it.

    Raises:
        TypeError: It is nothing that was learnt.
    """

    def __init__(self, learnt: Mapping[str, Any] | None) -> None:
        self.factor = NormFactor() if learnt is None else NormFactor(0, None, memory=1.0)
        if learnt is not None:
            if not (
                isinstance(learnt, Mapping) and learnt.keys() >= self.factor.state_dict().keys()
            ):
                raise TypeError(
                    f"norm_factor was {learnt!r}; allowed is the norm_factor of another"
                    " GradientNoiseScale, or None."
                )
            self.factor.load_state_dict(dict(learnt))
        self.previous = PreviousStep()
        self.choice: Choice | None = None

    def clear(self) -> None:
        """Forgets a run; what was learnt on another one and handed over stays."""
        self.previous.clear()
        self.choice = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        found: dict[str, Any] = {"choice": None if self.choice is None else list(self.choice)}
        if self.previous.gradients:
            found["previous"] = self.previous.state_dict()
        return found | ({"factor": self.factor.state_dict()} if self.factor.used else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from them."""
        self.choice = Choice(*state["choice"]) if state.get("choice") else None
        if "factor" in state:
            self.factor.load_state_dict(state["factor"])
        if "previous" in state:
            self.previous.load_state_dict(state["previous"])


class Windows:
    """Makes the parts of the windows of a fit, by the source and in the geometry that it gets.

    Args:
        trainer: The Trainer at the start of fit.
        module: Its module.
        settings: What was asked for.
        tests: What is measured beside.
        lasting: What outlives a window.

    Attributes:
        choice: Source and geometry.
        subsets: Names of the subsets of parameters that a window measures by themselves.

    Raises:
        MisconfigurationException: The source that was asked for has nothing to measure here.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        settings: NoiseSettings,
        tests: tuple[str, ...],
        lasting: Lasting,
    ) -> None:
        self._trainer, self._module = trainer, module
        self._settings, self._lasting = settings, lasting
        self._modules = submodules(module, settings.per_module)
        self._is_cut = view(trainer).cuts_batches
        if self._is_cut and settings.per_module is True:
            raise MisconfigurationException(
                "per_module=True takes the first submodules that have parameters, which differ over"
                " the ranks of a pipeline. Allowed are names, and False. Hint: the names, as in"
                " named_modules()."
            )
        self.subsets: list[str] = []
        self._samples: SampleGradients | None = None
        self._norms: NormSource | None = None
        self._tests = tests
        # Others may not yet have brought back the accumulation that a checkpoint goes with.
        kept = lasting.choice if settings.source == "auto" else None
        self._use(kept or choose(trainer, module, settings, tests, lasting.choice))
        if self.choice.source == "norm_layers":
            self._norms = NormSource(module, lasting.factor)

    @property
    def every(self) -> int:
        """Optimizer steps from one measurement to the next."""
        if self._settings.every_n_steps is not None:
            return self._settings.every_n_steps
        return max(_EVERY[self.choice.source], _EVERY_OF_GEOMETRY[self.choice.geometry])

    @property
    def geometry(self) -> str:
        """In which norms are taken."""
        return self.choice.geometry

    @property
    def biased(self) -> bool:
        """Whether the source is."""
        return self.choice.source == "consecutive_steps"

    @property
    def widen(self) -> Callable[[NoiseScale, int], NoiseScale] | None:
        """What becomes of the limits of an estimate that the source extrapolates."""
        return self._lasting.factor.widened if self.choice.source == "norm_layers" else None

    def update(self, tests: tuple[str, ...]) -> None:
        """Takes another source where a global batch has got parts, or has none any more."""
        self._tests = tests
        if self._settings.source == "auto" and not stays(self.choice.source, view(self._trainer)):
            self._use(choose(self._trainer, self._module, self._settings, tests, self.choice))

    def measure(self, parts: Parts, optimizer: Optimizer) -> Measurement | None:
        """What a window comes to; consecutive steps take over from a chosen source that fails."""
        try:
            return parts.measure(
                view(self._trainer),
                loss_scale=gradient_scale(self._trainer),
                step_scale=step_gradient_scale(self._trainer, optimizer),
            )
        except (RuntimeError, MisconfigurationException) as error:
            if not self._falls_back(error):
                raise
            return None

    def parts(self, window: int, tests: tuple[str, ...]) -> Parts | None:
        """What follows the micro-batches of a window.

        Args:
            window: Its index.
            tests: What is measured beside.

        Returns:
            ``None`` where it is not to be measured.
        """
        due = window % self.every == 0
        if self.choice.source == "consecutive_steps":
            wanted = ConsecutiveParts.wanted(window, self.every)
            if not any(wanted.values()):
                return None
            return ConsecutiveParts(self._parameters(), self._lasting.previous, **wanted)
        if not due:
            return None
        if self.choice.source == "norm_layers":
            return self._norm_layer_parts()
        parameters, seen = self._parameters(), view(self._trainer)
        if self.choice.source == "per_sample":
            return self._sample_parts(parameters, tests)
        if isinstance(seen, PipelineView):
            return PipelineParts(parameters, seen)
        if seen.splits_gradients:
            return ShardedParts(parameters, seen)
        geometry = self._geometry_parts(parameters, seen)
        return GradientParts(parameters, tests=tests, geometry=geometry)

    def _parameters(self) -> ParameterGroups:
        if view(self._trainer).splits_gradients:  # whole ones may still be in their places
            reshard(self._module)
        found = ParameterGroups(
            self._trainer.optimizers[0],
            per_group=self._settings.per_group,
            modules=self._modules,
            every_cell=self._is_cut,
        )
        self.subsets = list(found.subsets)
        return found

    def _sample_parts(self, parameters: ParameterGroups, tests: tuple[str, ...]) -> SampleParts:
        if self._samples is None:
            self._samples = SampleGradients(self._trainer, self._module, self.choice.chunk_size)
        refuse_batch_norm(self._module)
        geometry = self._geometry_parts(parameters, view(self._trainer))
        return SampleParts(parameters, self._samples, tests=tests, geometry=geometry)

    def _norm_layer_parts(self) -> NormLayerParts:
        factor = self._lasting.factor
        if self._norms is None:
            self._norms = NormSource(self._module, factor)
        parameters = self._parameters()
        beside = self._sample_parts(parameters, ()) if factor.due else None
        return NormLayerParts(parameters, self._norms, beside)

    def _geometry_parts(self, parameters: ParameterGroups, seen: View) -> GeometryParts | None:
        if self.choice.geometry == "euclidean":
            return None
        return GeometryParts(
            parameters,
            self._trainer.optimizers[0],
            self.choice.geometry,
            rank=seen.data_parallel_rank,
            ranks=seen.data_parallel_size,
        )

    def _falls_back(self, error: Exception) -> bool:
        """Whether there is something instead of single samples: these one by one, or steps."""
        choice, settings = self.choice, self._settings
        if settings.source != "auto" or choice.source not in ("per_sample", "norm_layers"):
            return False
        told = (
            f"GradientNoiseScale(source='auto') chose {choice.source!r}, which runs training_step"
            f" for single samples, and that failed: {_first_line(error)}"
        )
        if choice.chunk_size != 1:
            rank_zero_warn(f"{told} From now on it takes one sample after another (chunk_size=1).")
            self._use(choice._replace(chunk_size=1))
            return True
        if settings.geometry not in ("auto", "euclidean") or self._tests:
            return False
        rank_zero_warn(
            f"{told} From now on it compares consecutive steps: biased by the motion of the"
            " weights, and Euclidean. Hint: Trainer(accumulate_grad_batches=2) measures without"
            " bias."
        )
        self._use(Choice("consecutive_steps", "euclidean", 1))
        return True

    def _use(self, choice: Choice) -> None:
        self.choice = self._lasting.choice = choice
        self._samples = None
        warn_of_few_parts(view(self._trainer), choice)
        settings = self._settings
        if "auto" in (settings.source, settings.geometry) or settings.every_n_steps is None:
            text = f"{choice.source}, geometry {choice.geometry}, every {self.every} steps"
            rank_zero_info(f"GradientNoiseScale measures {text}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
