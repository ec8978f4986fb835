"""Modules, and functions that swap them into a model."""

from lightning_ext.nn._convert_int8 import convert_int8_linear, undo_int8_linear
from lightning_ext.nn._int8_linear import Int8Linear
from lightning_ext.nn._int8_weight import Int8Weight

__all__ = ["Int8Linear", "Int8Weight", "convert_int8_linear", "undo_int8_linear"]
