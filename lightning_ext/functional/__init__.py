"""Tensors in, tensors out: each formula once, in plain torch."""

from lightning_ext.functional._part_norms import part_sq_norms, sq_norms

__all__ = ["part_sq_norms", "sq_norms"]
