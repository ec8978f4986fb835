"""Tests of the batch gradient: the least batch that passes.

Source: norm test, Byrd et al. 2012 (Math. Program. 134); inner-product and orthogonality tests,
    Bollapragada et al. 2018 (arXiv:1710.11258, sections 2 and 3); with adaptive gradient methods
    and per coordinate, Lau et al. 2024 (AdAdaGrad, arXiv:2402.11215).
Differs: the norm test divides by the unbiased |G|² instead of |ḡ|², whose mean is |G|² + S/B and
    holds the proposal below B/η²; ``plug_in=True`` is that form. The others are as published, with
    ḡ in the place of G. Their unbiased forms would need GᵀΣG and |G|⁴: products of gradients of
    different samples, which averages over the samples of one batch do not give. What that does:

        E variance / E|ḡ|⁴ ≈ (GᵀΣG + tr Σ²/B) / (|G|² + S/B)²  ≤  λ_max(Σ)/S · B

    The inner-product target is at most B/θ² where one direction has all the noise, and B/(d·θ²)
    where d have it alike. The orthogonality target is below B·B_noise/((B + B_noise)·ν²): it
    cannot grow the batch for ν ≥ 1, 5.84 and 1 among them, except where measured noise fluctuates.
    The coordinate test divides by each ḡ_c² alone, which is near 0 somewhere however small the
    noise: it errs to the other side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_ext.scaling._batch_rule import InnerProducts, Observation, Proposal
from lightning_ext.scaling._noise import NoiseScale
from lightning_ext.scaling._noise_rules import describe, supported_noise_scale
from lightning_ext.scaling._validate import require_positive

COORDINATE_FRACTIONS = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class NormTest:
    """Keep the batch passing S/B ≤ η²·|G|²: target = S / (η²·|G|²).

    ``plug_in=True`` puts the squared norm of the batch gradient, |G|² + S/B, in the place of
    |G|²: with |G|² ≥ 0 the target then never exceeds B/η², whatever the interval. Without it, a
    noise scale that has no upper limit is treated as by ``NoiseScaleRule``.

    Args:
        eta: η, the noise allowed relative to the gradient; finite and above 0.
        plug_in: use the published, biased denominator.

    Example:
        >>> noise = NoiseScale(512.0, 400.0, 700.0, 1.0, 512.0, 10_000)
        >>> NormTest(eta=0.5).propose(Observation(64, 10_000, noise)).target_batch
        2048.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise"})

    eta: float = 0.5
    plug_in: bool = False

    def __post_init__(self) -> None:
        """Check η."""
        require_positive("eta", self.eta)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the least batch that passes the test, or ``None`` before it is known.

        ``statistic`` is the tested ratio, S/(B·|G|²) or its plug-in form; the test passes while it
        is at most η².
        """
        noise, batch = observation.noise, observation.global_batch
        size = _plug_in(noise, batch) if self.plug_in else supported_noise_scale(noise)
        if noise is None or size is None:
            return None
        statistic = size / batch
        reason = f"norm test {statistic:.4g} against η² {self.eta**2:.4g}: {describe(noise)}"
        return Proposal(size / self.eta**2, statistic, reason)


@dataclass(frozen=True)
class InnerProductTest:
    """Keep ⟨g_i, ḡ⟩ of one sign: Var⟨g_i, ḡ⟩/B ≤ θ²·|ḡ|⁴, target = Var⟨g_i, ḡ⟩/(θ²·|ḡ|⁴).

    Only noise along the gradient counts. See the module for how far ḡ may stand for G.

    Args:
        theta: θ, spread of ⟨g_i, ḡ⟩ allowed relative to |ḡ|²; finite and above 0. 0.9 is
            published, 0.5 by Lau et al.

    Example:
        >>> lie = InnerProducts(4.0, batch_sq_norm=0.5, batch_quad_norm=0.25, grad_trace=64.0)
        >>> seen = Observation(64, 10_000, inner_products=lie)
        >>> InnerProductTest(theta=0.5).propose(seen).target_batch
        64.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inner_products"})

    theta: float = 0.9

    def __post_init__(self) -> None:
        """Check θ."""
        require_positive("theta", self.theta)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the least batch that passes the test, or ``None`` before it is known.

        ``statistic`` is Var⟨g_i, ḡ⟩/(B·θ²·|ḡ|⁴); the test passes while it is at most 1.
        """
        target = _inner_product_target(observation.inner_products, self.theta)
        if target is None:
            return None
        statistic = target / observation.global_batch
        return Proposal(target, statistic, f"inner-product test {statistic:.4g} against 1")


@dataclass(frozen=True)
class AugmentedTest:
    """Pass the inner-product test and the orthogonality test.

        target = max(Var⟨g_i, ḡ⟩ / (θ²·|ḡ|⁴),  (S − Var⟨g_i, ḡ⟩/|ḡ|²) / (ν²·|ḡ|²))

    The second bounds the noise across the gradient, which the first leaves out.

    Args:
        theta: θ of ``InnerProductTest``.
        nu: ν, the noise across ḡ allowed relative to |ḡ|; finite and above 0. 5.84, about tan 80°,
            is published, 1 by Lau et al.; neither makes a batch grow, see the module.

    Example:
        >>> lie = InnerProducts(4.0, batch_sq_norm=0.5, batch_quad_norm=0.25, grad_trace=64.0)
        >>> seen = Observation(64, 10_000, inner_products=lie)
        >>> AugmentedTest(theta=0.5, nu=1.0).propose(seen).target_batch
        112.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inner_products"})

    theta: float = 0.9
    nu: float = 5.84

    def __post_init__(self) -> None:
        """Check θ and ν."""
        require_positive("theta", self.theta)
        require_positive("nu", self.nu)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the least batch that passes both tests, or ``None`` before it is known.

        ``statistic`` is the larger of the tested ratios, each over its bound; both pass while it is
        at most 1.
        """
        lie = observation.inner_products
        along = _inner_product_target(lie, self.theta)
        if lie is None or along is None:
            return None
        outside = lie.grad_trace - lie.variance / lie.batch_sq_norm
        across = outside / (self.nu**2 * lie.batch_sq_norm)
        if math.isnan(across):
            return None
        target, name = max((along, "inner-product"), (across, "orthogonality"))
        statistic = target / observation.global_batch
        return Proposal(target, statistic, f"{name} test {statistic:.4g} against 1")


@dataclass(frozen=True)
class CoordinateTest:
    """Keep var_c/B ≤ η²·ḡ_c² for a fraction of the coordinates: target = max_c var_c/(η²·ḡ_c²).

    As published for every coordinate. Among many one ḡ_c is always near 0, by chance or because it
    is nothing but noise, and the target then has no limit: ``fraction=1.0`` asks for the largest
    batch allowed, whatever the noise. Lower fractions leave out the worst coordinates.

    Args:
        eta: η, the noise allowed relative to the gradient; finite and above 0.
        fraction: of the coordinates, one of ``COORDINATE_FRACTIONS``.

    Example:
        >>> seen = Observation(64, 10_000, coordinates={0.5: 32.0, 0.9: 512.0, 1.0: 1e9})
        >>> CoordinateTest(eta=0.5, fraction=0.9).propose(seen).target_batch
        2048.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"coordinates"})

    eta: float = 0.5
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_positive("eta", self.eta)
        if self.fraction not in COORDINATE_FRACTIONS:
            raise ValueError(
                f"fraction={self.fraction!r} is not allowed; choose one of {COORDINATE_FRACTIONS}, "
                "which are measured"
            )

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the least batch that passes the test, or ``None`` before it is known.

        ``statistic`` is the largest var_c/(B·ḡ_c²) of the fraction; the test passes while it is at
        most η². It may be infinite.
        """
        ratio = (observation.coordinates or {}).get(self.fraction)
        if ratio is None or not ratio > 0:
            return None
        statistic = ratio / observation.global_batch
        reason = (
            f"coordinate test {statistic:.4g} of {self.fraction:.4g} of the coordinates "
            f"against η² {self.eta**2:.4g}"
        )
        return Proposal(ratio / self.eta**2, statistic, reason)


def _plug_in(noise: NoiseScale | None, global_batch: int) -> float | None:
    if noise is None:
        return None
    batch_sq_norm = noise.grad_sq_norm + noise.grad_trace / global_batch
    if not (batch_sq_norm > 0 and noise.grad_trace > 0):
        return None
    size = noise.grad_trace / batch_sq_norm
    return size if 0 < size < math.inf else None


def _inner_product_target(lie: InnerProducts | None, theta: float) -> float | None:
    if lie is None or not all(x > 0 for x in lie[:3]):
        return None
    target = lie.variance / (theta**2 * lie.batch_quad_norm)
    return target if 0 < target < math.inf else None
