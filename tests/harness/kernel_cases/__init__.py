"""Calls of every kernel, for its tests, its compilation ahead of time and the GPU."""

from __future__ import annotations

from harness._kernel_case import KernelCase
from harness.kernel_cases import (
    _contrastive,
    _ema,
    _factored_updates,
    _layer_norm,
    _newton_schulz,
    _norms,
    _quantize,
    _radial_projection,
    _round_stochastic,
    _signs,
    _state_formats,
    _trust_updates,
    _updates,
)

CASES: list[KernelCase] = [
    *_contrastive.CASES,
    *_ema.CASES,
    *_factored_updates.CASES,
    *_layer_norm.CASES,
    *_newton_schulz.CASES,
    *_norms.CASES,
    *_quantize.CASES,
    *_radial_projection.CASES,
    *_round_stochastic.CASES,
    *_signs.CASES,
    *_state_formats.CASES,
    *_trust_updates.CASES,
    *_updates.CASES,
]

__all__ = ["CASES"]
