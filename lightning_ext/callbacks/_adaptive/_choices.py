"""What the arguments of AdaptiveBatchSize leave to be chosen."""

from __future__ import annotations

from lightning_ext import scaling
from lightning_ext.scaling import BatchRule


def lr_rule_of(lr_rule: str, rule: BatchRule) -> str:
    """How hyper-parameters follow: what was chosen, else what the batch rule asks for."""
    return str(getattr(rule, "lr_rule", "auto")) if lr_rule == "auto" else lr_rule


def unit_of(progress: str, lr_rule: str) -> str:
    """What a step counts: what was chosen, else what belongs to the rule.

    Raises:
        ValueError: A gain that the rule does not have.
    """
    if progress == "gain" and lr_rule != "adascale":
        raise ValueError(
            f"progress='gain' is AdaScale's, and lr_rule is {lr_rule!r}. Hint: lr_rule='adascale',"
            " or progress='samples'."
        )
    if progress != "auto":
        return progress
    return "gain" if lr_rule == "adascale" else "samples"


def rule_and_limit(rule: str | BatchRule, max_global_batch: int | None) -> tuple[BatchRule, int]:
    """The rule as an object, and the largest batch that it may reach.

    Raises:
        TypeError: No rule.
        ValueError: An unknown rule, or nothing limits it.
    """
    parsed = scaling.parse_rule(rule)
    if max_global_batch is None:
        max_global_batch = getattr(parsed, "max_global_batch", None)
    if max_global_batch is None:
        raise ValueError(
            f"rule={rule!r} needs max_global_batch, the largest batch it may"
            " reach. Hint: max_global_batch=4096."
        )
    return parsed, max_global_batch
