"""Batch size as a quantity that is measured, changed in flight and kept consistent."""

from importlib.metadata import PackageNotFoundError, version

from lightning_ext._strategy_names import register_strategies

try:
    __version__ = version("lightning_ext")
except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
    __version__ = "0+unknown"

register_strategies()

__all__ = ["__version__"]
