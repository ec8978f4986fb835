"""Which of Lightning's precisions fit parameters that ranks hold parts of."""

from __future__ import annotations

from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

ALLOWED = ("32-true", "bf16-mixed", "bf16-true", "16-true")
_UNKNOWN = ("which knows nothing of how it keeps and converts parameters", "'bf16-mixed'")
_REASONS: dict[str, tuple[str, str]] = {
    "16-mixed": ("whose ranks would not agree on which steps overflow", "'bf16-mixed'"),
    "64-true": (
        "as Lightning's ModelParallelStrategy, of which it is one, does not take it",
        "a module that `.double()` has made float64 trains at 32-true",
    ),
}


def check_precision(plugin: Precision, owner: str) -> None:
    """Refuses what would train wrongly.

    Args:
        plugin: Lightning's.
        owner: The strategy's name.

    Raises:
        MisconfigurationException: With what is allowed.
    """
    if plugin.precision not in ALLOWED:
        reason, hint = _REASONS.get(plugin.precision, _UNKNOWN)
        raise MisconfigurationException(
            f"precision={plugin.precision!r} does not go with {owner}, {reason}; allowed are"
            f" {', '.join(ALLOWED)}. Hint: {hint}."
        )
