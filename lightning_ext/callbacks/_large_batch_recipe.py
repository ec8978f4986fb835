"""Says what an expert in large batches would say of a run, and changes nothing.

Source: Goyal et al. 2017, arXiv:1706.02677 (section 3, "Subtleties and Pitfalls"); the others in
    the advice itself.
Differs: their remarks are compared with the run at hand, not with ImageNet's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_ext import _lightning
from lightning_ext.callbacks._adaptive._clipping import ClippedFraction
from lightning_ext.callbacks._arguments import require_choice, require_count, require_number
from lightning_ext.callbacks._recipe import _checks as checks
from lightning_ext.callbacks._recipe import _rates as rates
from lightning_ext.callbacks._recipe._run import Advice, RecipeRun, known_noise, sizes_of

CHECKS: tuple[Callable[[RecipeRun], list[Advice]], ...] = (
    rates.warmup,
    rates.learning_rate,
    rates.steps_of_schedules,
    rates.memory,
    rates.noise_scale,
    rates.clipping,
    checks.decayed_vectors,
    checks.uneven_loss,
    checks.summed_loss,
    checks.statistics_batch,
    checks.shuffling,
    checks.residual_branches,
)
_GROWN = 4


class LargeBatchRecipe(Callback):
    """Compares a run with what is known of training with large batches.

    It looks at the optimizer, schedulers, loader, module and other callbacks before the first
    batch, and once more when the global batch has grown by a factor of 4 or a
    :class:`GradientNoiseScale` has an estimate with an upper limit. What there is to say is printed
    once, on rank zero, as a table where ``rich`` is installed. Nothing of the run is changed.

    Args:
        reference_batch: The global batch of the recipe that this run follows; ``None`` means the
            one of :class:`AdaptiveBatchSize`, if it is there.
        reference_lr: The learning rate of that recipe, its peak; needs a reference batch.
        on_problem: What warnings do: ``"print"`` them with the rest, ``"warn"``, or ``"raise"``.

    Attributes:
        advice: What the last look has found: ``topic``, ``severity`` (``"note"``, ``"advice"``,
            ``"warning"``), ``found``, ``recommended`` and ``source``.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: During fit, a warning under ``on_problem="raise"``.
    """

    def __init__(
        self,
        *,
        reference_batch: int | None = None,
        reference_lr: float | None = None,
        on_problem: Literal["print", "warn", "raise"] = "print",
    ) -> None:
        require_count("reference_batch", reference_batch, optional=True)
        if reference_lr is not None:
            require_number("reference_lr", reference_lr, above=0)
        require_choice("on_problem", on_problem, ("print", "warn", "raise"))
        self.reference_batch = reference_batch
        self.reference_lr = reference_lr
        self.on_problem = on_problem
        self._key = self._generate_state_key(
            reference_batch=reference_batch, reference_lr=reference_lr
        )
        self._reset()

    def _reset(self) -> None:
        self.advice: list[Advice] = []
        self._told: list[Advice] = []
        self._began_with = 0  # samples; not known yet
        self._looked = self._looked_again = self._awaits = False
        self._clipped = ClippedFraction()

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._key

    @property
    def text(self) -> str:
        """The advice of the last look, one line each."""
        return "\n".join(_line(advice) for advice in self.advice)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew; a checkpoint is loaded after this."""
        if stage == "fit":
            self._reset()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the run before its first batch, when all others have set it up."""
        if not self._looked:
            self._looked = True
            self._look(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Counts clipped steps for the second look."""
        if self._awaits:
            self._clipped.count(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks once more, when there is something new to see."""
        if not self._awaits or not _lightning.steps_now(trainer):
            return
        sizes = sizes_of(trainer, batch, batch_idx)
        grown = sizes is not None and sizes.global_batch >= _GROWN * self._began_with
        if grown or (_lightning.logs_now(trainer) and known_noise(trainer) is not None):
            self._looked_again, self._awaits = True, False
            self._look(trainer, pl_module, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """What was said already, so that a resumed run does not say it again."""
        return {
            "told": [list(advice) for advice in self._told],
            "began_with": self._began_with,
            "looked_again": self._looked_again,
            "clipped": self._clipped.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what the run before it has said."""
        self._told = [Advice(*fields) for fields in state_dict["told"]]
        self._began_with = state_dict["began_with"]
        self._looked_again = state_dict["looked_again"]
        self._clipped.load_state_dict(state_dict["clipped"])

    def _look(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        sizes = sizes_of(trainer, batch, batch_idx)
        if sizes is None:
            rank_zero_info("LargeBatchRecipe: neither loader nor batch tells the batch size.")
            return
        self._began_with = self._began_with or sizes.global_batch
        steps, clipped = self._clipped.state_dict() if self._looked_again else (0, 0)
        run = RecipeRun(
            trainer,
            pl_module,
            sizes,
            began_with=self._began_with,
            given_reference=self.reference_batch,
            reference_lr=self.reference_lr,
            clipped=clipped / steps if steps else None,
            steps=steps,
        )
        self._awaits = not self._looked_again and run.may_tell_more
        self.advice = [advice for check in CHECKS for advice in check(run)]
        self._tell([advice for advice in self.advice if advice not in self._told])

    def _tell(self, news: list[Advice]) -> None:
        self._told += news
        # What was said in the run before is no less a reason to stop.
        looked_at = self.advice if self.on_problem == "raise" else news
        problems = [advice for advice in looked_at if advice.severity == "warning"]
        text = "LargeBatchRecipe:\n" + "\n".join(_line(advice) for advice in problems)
        if problems and self.on_problem == "raise":
            raise MisconfigurationException(text)
        if problems and self.on_problem == "warn":
            rank_zero_warn(text)
            news = [advice for advice in news if advice not in problems]
        if news:
            _print(news)


def _line(advice: Advice) -> str:
    topic, severity, found, recommended, source = advice
    return f"{severity}, {topic}: {found}. Recommended: {recommended}. ({source})"


@rank_zero_only
def _print(news: list[Advice]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        rank_zero_info("LargeBatchRecipe:\n" + "\n".join(_line(advice) for advice in news))
        return
    table = Table(title="Large-batch recipe", show_lines=True)
    for column in Advice._fields:
        table.add_column(column, overflow="fold")
    for advice in news:
        table.add_row(*advice)
    Console().print(table)
