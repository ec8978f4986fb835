"""The options of ZeRO++: which are set, and what "auto" means where training runs.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209), §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext.strategies._nodes import check_nodes, check_ranks

QUANTIZED = {
    "quantize_weights": "zero_quantized_weights",
    "quantize_gradients": "zero_quantized_gradients",
    "quantize_nontrainable_weights": "zero_quantized_nontrainable_weights",
}
HPZ = "zero_hpz_partition_size"


@dataclass(frozen=True)
class ZeroPPOptions:
    """What was asked for; ``"auto"`` is decided where training runs.

    Args:
        hpz_partition_size: Ranks of a secondary partition, ``None`` for none.
        quantize_weights: Whether gathered weights travel as INT8.
        quantize_gradients: Whether gradients travel as INT4 and INT8 in two hops.
        quantize_nontrainable_weights: Whether frozen weights are kept as INT8.

    Raises:
        TypeError: An option of another type.
        ValueError: A partition of fewer than two ranks.
    """

    hpz_partition_size: int | Literal["auto"] | None = "auto"
    quantize_weights: bool | Literal["auto"] = "auto"
    quantize_gradients: bool | Literal["auto"] = "auto"
    quantize_nontrainable_weights: bool = False

    def __post_init__(self) -> None:
        """Checks each option by itself."""
        check_ranks("hpz_partition_size", self.hpz_partition_size, least=2, others=("auto", None))
        for name in QUANTIZED:
            value = getattr(self, name)
            auto = value == "auto" and name != "quantize_nontrainable_weights"
            if not (isinstance(value, bool) or auto):
                allowed = (
                    "True or False" if name.endswith("able_weights") else "True, False, 'auto'"
                )
                raise TypeError(f"{name} was {value!r}; allowed is {allowed}.")

    def set_by_user(self) -> dict[str, Any]:
        """The options that are not left to us, by DeepSpeed's names."""
        found = {key: getattr(self, name) for name, key in QUANTIZED.items()}
        if not self.quantize_nontrainable_weights:
            del found[QUANTIZED["quantize_nontrainable_weights"]]  # the default, not a wish
        found = {key: value for key, value in found.items() if value != "auto"}
        if self.hpz_partition_size != "auto":
            found[HPZ] = self.hpz_partition_size or 1
        return found

    def resolved(
        self, zero: Mapping[str, Any], *, world: int, ranks_per_node: int, devices: int
    ) -> dict[str, Any]:
        """The settings of ZeRO++ for a number of ranks.

        Args:
            zero: The section of the config so far; what it says is not changed.
            world: Ranks in all.
            ranks_per_node: Ranks that share a node.
            devices: CUDA devices that DeepSpeed sees on a node, 0 on a CPU.

        Raises:
            MisconfigurationException: They do not fit the ranks, or need CUDA and have none.
        """
        check_nodes(world, ranks_per_node)
        found = {key: zero[key] for key in (HPZ, *QUANTIZED.values()) if key in zero}
        found = self.set_by_user() | found
        undecided = [key for key in list(QUANTIZED.values())[:2] if key not in found]
        found |= dict.fromkeys(undecided, devices > 0)
        if undecided and not devices:
            rank_zero_info(
                "DeepSpeed has its quantizer for CUDA only: quantize_weights and"
                " quantize_gradients are off on this CPU."
            )
        if HPZ not in found:
            found[HPZ] = ranks_per_node if 1 < ranks_per_node < world else 1
        _check_devices(found, devices, world, ranks_per_node)
        _check_partition(found[HPZ], world, ranks_per_node)
        return found


def _check_devices(found: Mapping[str, Any], devices: int, world: int, ranks_per_node: int) -> None:
    asked = [name for name, key in QUANTIZED.items() if found.get(key)]
    if asked and not devices:
        raise MisconfigurationException(
            f"{', '.join(asked)} is on and training runs on a CPU: DeepSpeed has its quantizer for"
            " CUDA only; allowed there is hpz_partition_size. Hint: leave it at 'auto', or"
            " Trainer(strategy='zeropp'), which quantizes on any device."
        )
    if "quantize_gradients" in asked and ranks_per_node not in (devices, world):
        raise MisconfigurationException(
            f"ranks_per_node={ranks_per_node}, and for quantize_gradients DeepSpeed takes the"
            f" {devices} devices that it sees for a node. Hint: CUDA_VISIBLE_DEVICES with as many"
            " devices as ranks, or quantize_gradients=False."
        )


def _check_partition(size: int, world: int, ranks_per_node: int) -> None:
    if size == 1:
        return
    if world % size:
        raise MisconfigurationException(
            f"hpz_partition_size={size} does not divide the {world} ranks; allowed are divisors of"
            f" it above 1. Hint: 'auto' is the {ranks_per_node} ranks of a node."
        )
    if ranks_per_node % size:
        raise MisconfigurationException(
            f"hpz_partition_size={size} does not divide the {ranks_per_node} ranks of a node, so"
            " that weights would be gathered between nodes in the backward pass, which it is to"
            " save. Hint: 'auto', or ranks_per_node=... where the nodes are others than devices."
        )
