"""Tensors in, tensors out: each formula once, in plain torch."""

from lightning_ext.functional._coordinates import (
    coordinate_quantiles,
    coordinate_sums,
    coordinate_variance,
)
from lightning_ext.functional._part_norms import part_sq_norms, sq_norms
from lightning_ext.functional._per_sample import per_sample_gradients
from lightning_ext.functional._projections import inner_products
from lightning_ext.functional._saved_bytes import saved_bytes

__all__ = [
    "coordinate_quantiles",
    "coordinate_sums",
    "coordinate_variance",
    "inner_products",
    "part_sq_norms",
    "per_sample_gradients",
    "saved_bytes",
    "sq_norms",
]
