"""The optimizers of the room under its contract, one file for each family."""

from harness.optimizer_cases import (
    _adaptive,
    _bounded,
    _came,
    _distributed_lion,
    _low_bit,
    _low_rank,
    _matrix,
    _offloaded,
    _radial,
    _second_order,
    _trust,
    _wrappers,
)

CASES = {
    name: case
    for family in (
        _adaptive,
        _bounded,
        _came,
        _distributed_lion,
        _low_bit,
        _low_rank,
        _matrix,
        _offloaded,
        _radial,
        _second_order,
        _trust,
        _wrappers,
    )
    for name, case in family.CASES.items()
}

__all__ = ["CASES"]
