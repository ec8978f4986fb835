"""Bytes of a training step as a function of samples and length, fitted or worked out.

Source: Xia et al. 2024 (arXiv:2408.04693), the largest batch as a closed form whose coefficients
    come from a short sweep; Liang et al. 2023 (RITA, arXiv:2306.01926), a predictor fitted to
    measurements and asked whenever the cost of a sample changes; Rajbhandari et al. 2020 (ZeRO,
    arXiv:1910.02054, section 3.1), bytes per parameter.
Differs: linear in samples with a fixed part, up to quadratic in the length, no coefficient below
    0; relative errors are fitted, and a term that the measurements cannot tell is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_ext.scaling._validate import (
    require_count,
    require_non_negative,
    require_number,
    require_positive,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

_HINTS = {
    "fixed_bytes": "measure at least two micro-batches",
    "token_bytes": "measure at least two lengths, or leave the length out",
    "token_pair_bytes": "measure at least three lengths, or set quadratic=False where attention "
    "does not keep its scores",
}


@dataclass(frozen=True)
class MemoryModel:
    """Predicts the bytes of a step, and the largest micro-batch that fits.

        bytes(n, L) = fixed + n·(a + b·L + c·L²)

    Args:
        fixed_bytes: weights, gradients, optimizer state, context; at least 0.
        sample_bytes: a, per sample; at least 0.
        token_bytes: b, per sample and token; ``None`` where samples have no length.
        token_pair_bytes: c, per sample and pair of tokens, such as attention scores.

    Raises:
        TypeError: if a coefficient is not a number.
        ValueError: if one is below 0 or not finite.

    Example:
        >>> model = MemoryModel.fit([(1, None, 130), (2, None, 160), (4, None, 220)])
        >>> round(model.bytes(8)), model.largest(1000, margin=0.1)
        (340, 26)
    """

    fixed_bytes: float
    sample_bytes: float
    token_bytes: float | None = None
    token_pair_bytes: float = 0.0

    def __post_init__(self) -> None:
        """Refuses coefficients that would make more samples cost less."""
        require_non_negative("fixed_bytes", self.fixed_bytes)
        require_non_negative("sample_bytes", self.sample_bytes)
        require_non_negative("token_pair_bytes", self.token_pair_bytes)
        if self.token_bytes is not None:
            require_non_negative("token_bytes", self.token_bytes)
        elif self.token_pair_bytes:
            raise ValueError(
                f"token_pair_bytes={self.token_pair_bytes} needs token_bytes; give 0.0 if a token "
                "costs nothing beside its pairs"
            )

    @classmethod
    def fit(
        cls, samples: Iterable[tuple[int, int | None, float]], *, quadratic: bool = True
    ) -> MemoryModel:
        """Fit the coefficients to measured peaks, by least squares of the relative errors.

        Args:
            samples: rows ``(micro_batch, length, bytes)``, the length ``None`` in all or in none.
            quadratic: whether pairs of tokens are a term, where there are lengths.

        Returns:
            The model; a coefficient that would be negative is 0.

        Raises:
            TypeError: if an entry is not a number.
            ValueError: if rows are out of range, mix lengths with none, or cannot tell a term.
        """
        import numpy as np
        from scipy.optimize import nnls

        rows = _checked(samples)
        columns = _columns(rows, quadratic=quadratic)
        measured = np.array([row[2] for row in rows], dtype=np.float64)
        design = np.stack(list(columns.values()), axis=1) / measured[:, None]
        scales = np.linalg.norm(design, axis=0)
        _require_told_apart(list(columns), design / scales)
        found, _ = nnls(design / scales, np.ones(len(rows)))
        return cls(**dict(zip(columns, (found / scales).tolist(), strict=True)))

    @classmethod
    def analytic(
        cls,
        parameters: int,
        *,
        sample_bytes: float,
        token_bytes: float | None = None,
        token_pair_bytes: float = 0.0,
        weight_bytes: float = 4,
        gradient_bytes: float = 4,
        optimizer_bytes: float = 8,
    ) -> MemoryModel:
        """Work the fixed part out from the number of parameters; activations are given.

            fixed = parameters · (weight_bytes + gradient_bytes + optimizer_bytes)

        The defaults are Adam in float32. Mixed precision with float32 master weights in the
        optimizer is 2, 2 and 12.

        Args:
            parameters: weights of the model; at least 1.
            sample_bytes: activations per sample, as ``functional.saved_bytes`` measures them.
            token_bytes: the same per sample and token.
            token_pair_bytes: the same per sample and pair of tokens.
            weight_bytes: bytes per parameter of the weights.
            gradient_bytes: bytes per parameter of the gradients.
            optimizer_bytes: bytes per parameter of the optimizer's state.

        Raises:
            TypeError: if a value is not a number.
            ValueError: if a value is out of range.

        Example:
            >>> MemoryModel.analytic(1000, sample_bytes=64).bytes(2)
            16128
        """
        require_count("parameters", parameters)
        parts = {
            "weight_bytes": weight_bytes,
            "gradient_bytes": gradient_bytes,
            "optimizer_bytes": optimizer_bytes,
        }
        for name, value in parts.items():
            require_non_negative(name, value)
        fixed = parameters * sum(parts.values())
        return cls(fixed, sample_bytes, token_bytes, token_pair_bytes)

    def bytes(self, micro_batch: int, length: int | None = None) -> float:
        """Return the predicted bytes.

        Args:
            micro_batch: n in samples; at least 0.
            length: L in tokens, if and only if the model has a term for it; at least 1.

        Raises:
            TypeError: if a value is not an integer.
            ValueError: if a value is out of range, or the length given or missing by mistake.
        """
        if micro_batch != 0:
            require_count("micro_batch", micro_batch)
        return self.fixed_bytes + micro_batch * self._per_sample(length)

    def largest(
        self, budget_bytes: float, length: int | None = None, *, margin: float = 0.1
    ) -> int:
        """Return the largest micro-batch n with bytes(n) ≤ budget·(1 − margin).

        Args:
            budget_bytes: what there is; above 0.
            length: as in :meth:`bytes`.
            margin: part of the budget to leave free, in [0, 1).

        Raises:
            TypeError: if a value is not a number.
            ValueError: if a value is out of range, not one sample fits, or any number does.
        """
        require_positive("budget_bytes", budget_bytes)
        require_number("margin", margin)
        if not 0 <= margin < 1:
            raise ValueError(f"margin={margin!r} is not allowed; it must lie in [0, 1)")
        limit, each = budget_bytes * (1 - margin), self._per_sample(length)
        if each == 0:
            raise ValueError("a sample costs 0 bytes in this model, so there is no largest batch")
        if self.fixed_bytes + each > limit:
            raise ValueError(
                f"budget_bytes={budget_bytes:.4g} leaves {limit:.4g} after a margin of {margin}; "
                f"the fixed part takes {self.fixed_bytes:.4g} and one sample {each:.4g}: raise the "
                "budget, or make model, optimizer state or samples smaller"
            )
        found = math.floor((limit - self.fixed_bytes) / each) + 1
        while found > 1 and self.bytes(found, length) > limit:  # rounding may be off either way
            found -= 1
        return found

    def _per_sample(self, length: int | None) -> float:
        if (length is None) != (self.token_bytes is None):
            stated = "needs a length" if length is None else "has no term for a length"
            raise ValueError(
                f"length={length} was given to a model that {stated}; fit it to rows "
                f"{'with' if length is not None else 'without'} lengths, or change the call"
            )
        if length is None or self.token_bytes is None:
            return self.sample_bytes
        require_count("length", length)
        return self.sample_bytes + length * (self.token_bytes + length * self.token_pair_bytes)


def _checked(samples: Iterable[tuple[int, int | None, float]]) -> list[tuple[int, int, float]]:
    """Rows with length 0 where there is none."""
    rows = list(samples)
    if not rows:
        raise ValueError("samples is empty; measure a step at two micro-batches or more")
    for index, (micro_batch, length, measured) in enumerate(rows):
        require_count(f"micro_batch of samples[{index}]", micro_batch)
        require_positive(f"bytes of samples[{index}]", measured)
        if length is not None:
            require_count(f"length of samples[{index}]", length)
    without = sum(length is None for _, length, _ in rows)
    if 0 < without < len(rows):
        raise ValueError(
            f"{without} of {len(rows)} samples have no length; give it in all of them or in none"
        )
    return [(micro_batch, length or 0, float(measured)) for micro_batch, length, measured in rows]


def _columns(rows: Sequence[tuple[int, int, float]], *, quadratic: bool) -> dict[str, Array]:
    """What each coefficient is multiplied with, by the name of the coefficient."""
    import numpy as np

    micro_batch, length = np.array([row[:2] for row in rows], dtype=np.float64).T
    columns: dict[str, Any] = {"sample_bytes": micro_batch, "fixed_bytes": np.ones(len(rows))}
    if length.any():
        columns["token_bytes"] = micro_batch * length
        if quadratic:
            columns["token_pair_bytes"] = micro_batch * length**2
    return columns


def _require_told_apart(names: Sequence[str], design: Array) -> None:
    import numpy as np

    for count, name in enumerate(names, start=1):
        if np.linalg.matrix_rank(design[:, :count]) < count:
            raise ValueError(
                f"these {len(design)} samples cannot tell {name} from the other terms; "
                f"{_HINTS[name]}"
            )
