"""What AdaptiveBatchSize looks for in a Trainer before it starts."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext._lightning import require_agreement, view
from lightning_ext.callbacks._adaptive._running_batch import RunningBatch
from lightning_ext.callbacks._adaptive._step_schedules import warn_of_step_schedules
from lightning_ext.callbacks._arguments import require_bool, require_choice, require_count
from lightning_ext.callbacks._batch_norm import warn_batch_norm
from lightning_ext.callbacks._critical_batch_size import CriticalBatchSize
from lightning_ext.callbacks._curvature import Curvature
from lightning_ext.callbacks._find_source import present_source
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.callbacks._trainer_callbacks import callbacks_of, insert_after
from lightning_ext.optim import PowerScheduler, sample_schedules
from lightning_ext.scaling import BatchRule

_MEASURED = frozenset({"noise", "inner_products", "coordinates"})  # by GradientNoiseScale
_BRANCHED = frozenset({"critical_batch"})  # by CriticalBatchSize
_OFFERED = frozenset({"loss", "lr_decay", "step_seconds"}) | _BRANCHED
_RIVALS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "give AdaptiveBatchSize a schedule and leave the other out",
    BatchSizeFinder: "find the size first, with a Trainer of its own",
    LearningRateFinder: "find the learning rate first, with a Trainer of its own",
}


def check_arguments(
    counts: dict[str, int | None],
    switches: dict[str, bool],
    choices: dict[str, tuple[str, tuple[str, ...]]],
    source: object,
) -> None:
    """Refuses single arguments of the wrong type or out of range.

    Raises:
        TypeError: With the argument's name, its value and what is allowed.
        ValueError: The same.
    """
    for name, value in counts.items():
        require_count(name, value, optional=True)
    for name, switch in switches.items():
        require_bool(name, switch)
    for name, (choice, allowed) in choices.items():
        require_choice(name, choice, allowed)
    if source is not None and not isinstance(source, str | GradientNoiseScale):
        raise TypeError(
            f"source was {source!r}; allowed is a GradientNoiseScale of the Trainer, its prefix, or"
            " None."
        )


def check_fit(trainer: Trainer, pl_module: LightningModule, batch: RunningBatch) -> None:
    """Refuses settings that do not fit together.

    Raises:
        MisconfigurationException: With what was set, what is allowed, and a hint.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "AdaptiveBatchSize changes accumulate_grad_batches, which manual optimization"
            " (automatic_optimization=False) does not use. Hint: let the Trainer call the"
            " optimizer."
        )
    for other, hint in _RIVALS.items():
        if callbacks_of(trainer, other):
            raise MisconfigurationException(
                f"{other.__name__} and AdaptiveBatchSize cannot share a fit. Hint: {hint}."
            )
    seen, controller = view(trainer), batch.controller  # raises for one that is not supported
    if seen.cuts_batches:  # stages pass on micro-batches of one shape
        controller.max_micro_batch = None
    _check_fields(controller.rule)
    _check_unit(batch)
    if controller.max_micro_batch is not None:
        warn_batch_norm(pl_module)


def _check_fields(rule: BatchRule) -> None:
    unknown = rule.needs - (_OFFERED | _MEASURED)
    if unknown:
        raise MisconfigurationException(
            f"{rule} needs {', '.join(sorted(unknown))}, which a run does not offer; it offers"
            f" {', '.join(sorted(_OFFERED | _MEASURED))}. Hint: names are fields of"
            " scaling.Observation."
        )


def _check_unit(batch: RunningBatch) -> None:
    unit = getattr(batch.controller.rule, "unit", "samples")
    if unit == "percent" and batch.progress.total_samples is None:
        raise MisconfigurationException(
            "A schedule in percent needs the length of the run. Hint: set max_samples."
        )
    if unit == "percent" and batch.progress.unit != "samples":
        raise MisconfigurationException(
            "A schedule in percent counts samples, and under progress="
            f"{batch.progress.unit!r} max_samples does not. Hint: write the schedule in samples."
        )
    if unit == "tokens" and batch.progress.tokens_per_sample is None:
        raise MisconfigurationException(
            "A schedule in tokens needs to count them. Hint: set tokens_per_sample."
        )


def check_ranks(trainer: Trainer, batch: RunningBatch) -> None:
    """Refuses to start where ranks would take different batches.

    Raises:
        MisconfigurationException: On every rank, with what each of them has.
    """
    controller = batch.controller
    settings = {
        "the number of samples": batch.sampler.plan.num_samples,
        "the samples seen": batch.progress.samples_seen,
        "micro-batch and accumulate_grad_batches": tuple(batch.in_force),
        "rule": controller.rule,
        "max_global_batch": controller.max_global_batch,
        "max_micro_batch": controller.max_micro_batch,
        "growth": controller.growth,
        "dwell_samples": controller.dwell_samples,
        "threshold": controller.threshold,
        "monotone": controller.monotone,
        "reference_batch": batch.reference_batch,
        "max_samples": batch.progress.total_samples,
        "progress": batch.progress.unit,
        "lr_rule": batch.rates.rule,
        "clamp_lr": batch.rates.clamp,
        "scale_weight_decay": batch.rates.scale_weight_decay,
        "scale_second_moment": batch.rates.scale_second_moment,
    }
    require_agreement(trainer, "AdaptiveBatchSize", settings)


def check_schedules(trainer: Trainer, batch: RunningBatch) -> None:
    """Refuses schedules by samples that would not do what they say, and names those by steps.

    Raises:
        MisconfigurationException: With the interval, or the rule, that was set.
    """
    if batch.controller.may_change:
        warn_of_step_schedules(trainer)
    lr_rule = batch.rates.rule
    if "lr_decay" in batch.controller.rule.needs and not trainer.lr_scheduler_configs:
        raise MisconfigurationException(
            f"{batch.controller.rule} follows the decay of a learning-rate schedule, and there is"
            " none. Hint: optim.SampleCosine, or scaling.GeoDamp, which needs no schedule."
        )
    for config in trainer.lr_scheduler_configs:
        often = config.interval == "step" and config.frequency == 1
        if not often and any(sample_schedules(config.scheduler)):
            raise MisconfigurationException(
                f"A SampleSchedule is stepped with interval={config.interval!r} and"
                f" frequency={config.frequency}; samples are counted at every optimizer step. Hint:"
                " return {'scheduler': schedule, 'interval': 'step'}."
            )
        powers = [s for s in sample_schedules(config.scheduler) if isinstance(s, PowerScheduler)]
        if powers and batch.progress.unit != "samples":
            raise MisconfigurationException(
                "PowerScheduler reads the batch from the samples of a step, and progress="
                f"{batch.progress.unit!r} counts others. Hint: progress='samples'."
            )
        if powers and lr_rule not in ("none", "constant"):
            raise MisconfigurationException(
                f"PowerScheduler makes the learning rate from the batch, and lr_rule={lr_rule!r}"
                " would multiply it for the batch again. Hint: lr_rule='constant', or 'none', which"
                " keeps decoupled weight decay per sample."
            )


def the_noise_scale(
    trainer: Trainer, owner: Callback, given: str | GradientNoiseScale | None, batch: RunningBatch
) -> GradientNoiseScale | None:
    """The chosen or the one GradientNoiseScale of the Trainer, made where it is needed.

    Args:
        trainer: Whose callbacks are searched.
        owner: Which callback asks.
        given: Which one, or the prefix of its logged names.
        batch: What decides whether it is needed.

    Raises:
        MisconfigurationException: There are several, the chosen one does not take part, or it
            would have nothing to measure.
    """
    measured = batch.controller.rule.needs & _MEASURED
    needed = bool(measured) or batch.rates.needs_noise
    chosen = _named(trainer, given) if isinstance(given, str) else given
    source = present_source(trainer, owner, chosen, required=needed)
    if source is None and needed:
        source = GradientNoiseScale()
        insert_after(trainer, owner, source)
    if source is not None and needed:
        _check_parts(trainer, source, batch)
        if measured - {"noise"}:
            source.add_tests(measured - {"noise"})
    return source


def _named(trainer: Trainer, prefix: str) -> GradientNoiseScale:
    present = callbacks_of(trainer, GradientNoiseScale)
    found = [one for one in present if one.settings.prefix == prefix]
    if len(found) != 1:
        prefixes = ", ".join(repr(one.settings.prefix) for one in present) or "none"
        raise MisconfigurationException(
            f"source={prefix!r} is the prefix of {len(found)} GradientNoiseScale callbacks; allowed"
            f" is that of one. Those of the Trainer are: {prefixes}. Hint:"
            f" GradientNoiseScale(prefix={prefix!r})."
        )
    return found[0]


def the_critical_batch(trainer: Trainer, batch: RunningBatch) -> CriticalBatchSize | None:
    """The CriticalBatchSize of the Trainer; it is not made, because its branches cost samples.

    Raises:
        MisconfigurationException: The rule needs one and there is none.
    """
    found = callbacks_of(trainer, CriticalBatchSize)
    if not found and batch.controller.rule.needs & _BRANCHED:
        raise MisconfigurationException(
            f"{batch.controller.rule} follows what branches of the run measure, and nothing does."
            " Hint: add CriticalBatchSize(every_samples=...) to the callbacks, behind"
            " AdaptiveBatchSize; its branches cost samples, so when is yours to say."
        )
    return found[0] if found else None


def the_curvature(trainer: Trainer, batch: RunningBatch) -> Curvature | None:
    """The Curvature of the Trainer, where the learning-rate rule reads it.

    Raises:
        MisconfigurationException: There is none, or several.
    """
    if batch.rates.rule != "rmt":
        return None
    found = [c for c in callbacks_of(trainer, Curvature) if c.parts > 0]
    if len(found) != 1:
        raise MisconfigurationException(
            "lr_rule='rmt' reads the batch where the curvature saturates, and there are"
            f" {len(found)} Curvature callbacks with parts > 0; allowed is one. Hint:"
            " Trainer(callbacks=[Curvature(every_n_steps=1000), AdaptiveBatchSize(...)])."
        )
    return found[0]


def _check_parts(trainer: Trainer, source: GradientNoiseScale, batch: RunningBatch) -> None:
    seen, passes = view(trainer), trainer.accumulate_grad_batches
    ranks = seen.data_parallel_size
    if seen.cuts_batches:
        return  # the source looks itself, when batches are known
    if source.settings.source == "micro_batches" and ranks * passes < 2:
        asks = batch.controller.rule if batch.controller.rule.needs else batch.rates.rule
        raise MisconfigurationException(
            f"{asks} needs a global batch of at least two parts; there are"
            f" accumulate_grad_batches={passes} and one data-parallel rank. Hint:"
            " Trainer(accumulate_grad_batches=2), or GradientNoiseScale(source='auto')."
        )


def define_wandb_axis(trainer: Trainer) -> None:
    """Puts the samples seen on the x-axis of a W&B run."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.define_metric("samples_seen")
            logger.experiment.define_metric("*", step_metric="samples_seen")
