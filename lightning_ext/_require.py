"""Import optional packages, with an error that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: Dotted name of the module, such as `"wandb"`.
        extra: Extra of `lightning_ext` that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: The package is not installed. An installed package that fails to import
            raises its own error.

    Example:
        >>> require("math", "none").sqrt(4.0)
        2.0
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        message = f'{package} is not installed. Run: pip install "lightning_ext[{extra}]"'
        raise ModuleNotFoundError(message, name=package) from error
