"""ZeRO++ by name, on FSDP2.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209): qwZ, hpZ and qgZ; Xie et al. 2024 (LoCo,
    arXiv:2407.04480) for the feedback of errors.
Differs: gathers inside a node are not quantized, so that backward passes see the weights of their
    forward passes; what is outside of the units stays gathered between both.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from typing_extensions import override

from lightning_ext.strategies._fsdp2._arguments import checked
from lightning_ext.strategies._fsdp2._units import TRANSFORMER_LAYERS, Wrap
from lightning_ext.strategies._fsdp2_strategy import FSDP2Strategy
from lightning_ext.strategies._zeropp._install import install_collectives
from lightning_ext.strategies._zeropp._node_groups import NodeGroups, node_groups
from lightning_ext.strategies._zeropp._nodes import check_secondary
from lightning_ext.strategies._zeropp._packed import check_wire_format
from lightning_ext.strategies._zeropp._quantized_all_gather import QuantizedAllGather
from lightning_ext.strategies._zeropp._quantized_reduce_scatter import QuantizedReduceScatter
from lightning_ext.strategies._zeropp._saved_errors import load_errors, save_errors


class ZeroPPStrategy(FSDP2Strategy):
    """FSDP2 that sends a fraction of the bytes between nodes; three switches, each by itself.

    Weights are gathered as INT8 codes, the backward pass gathers inside the node, from a second
    copy that a node keeps between forward and backward, and gradients are reduced as INT4 codes
    inside the node first, so that one part of them crosses to other nodes. The parameters that the
    optimizer steps are exact; copies and gradients are rounded.

    Args:
        wrap: Which modules are units, as in :class:`FSDP2Strategy`.
        quantize_weights: qwZ: blocks of codes in the gathers over all ranks.
        hpz: The backward gathers inside the node; costs weights/ranks_per_node of memory.
        quantize_gradients: qgZ: blocks of codes in two all-to-alls, for reduce-scatters.
        ranks_per_node: Neighbouring ranks that share a node; ``"auto"``: the Trainer's ``devices``.
        weight_format: Of codes, ``"int8"`` or ``"int4"``.
        gradient_format: Of codes, ``"int4"`` or ``"int8"``.
        block_size: Numbers that share a scale, a power of two from 16 to 4096.
        error_feedback: LoCo: adds to a gradient what rounding withheld from those before. Costs a
            number per parameter on every rank, which undoes what sharding gradients saves.
        error_beta: Weight of the old error, in [0, 1).
        error_reset_every: Steps after which errors start at zero; 0 for never.
        error_format: Of the errors in memory, ``"int8"`` or ``"float32"``.
        mp_policy: As in :class:`FSDP2Strategy`.
        find_unused_parameters: As in :class:`FSDP2Strategy`.
        offload_policy: As in :class:`FSDP2Strategy`.
        save_distributed_checkpoint: As in :class:`FSDP2Strategy`; errors are saved in folders.
        process_group_backend: As in :class:`FSDP2Strategy`.
        timeout: How long a rank waits for the others.

    Raises:
        MisconfigurationException: As :class:`FSDP2Strategy`, and where ranks do not make nodes.
        TypeError: For an argument of another kind.
        ValueError: For a format, block size or weight that is not allowed.
    """

    def __init__(
        self,
        wrap: Wrap = TRANSFORMER_LAYERS,
        *,
        quantize_weights: bool = True,
        hpz: bool = True,
        quantize_gradients: bool = True,
        ranks_per_node: int | Literal["auto"] = "auto",
        weight_format: Literal["int8", "int4"] = "int8",
        gradient_format: Literal["int4", "int8"] = "int4",
        block_size: int = 256,
        error_feedback: bool = False,
        error_beta: float = 0.8,
        error_reset_every: int = 1024,
        error_format: Literal["int8", "float32"] = "int8",
        mp_policy: MixedPrecisionPolicy | None = None,
        find_unused_parameters: bool = False,
        offload_policy: OffloadPolicy | CPUOffloadPolicy | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            wrap,
            mp_policy=mp_policy,
            find_unused_parameters=find_unused_parameters,
            offload_policy=offload_policy,
            ranks_per_node=ranks_per_node,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        check_wire_format(weight_format, block_size, name="weight_format")
        check_wire_format(gradient_format, block_size, name="gradient_format")
        self._hpz = checked("hpz", hpz)
        self._quantize_weights = checked("quantize_weights", quantize_weights)
        self._quantize_gradients = checked("quantize_gradients", quantize_gradients)
        self._weights: dict[str, Any] = {"format": weight_format, "block_size": block_size}
        self._gradients: dict[str, Any] = {
            "format": gradient_format,
            "block_size": block_size,
            "error_feedback": checked("error_feedback", error_feedback),
            "error_beta": error_beta,
            "error_reset_every": error_reset_every,
            "error_format": error_format,
        }
        self._reductions: dict[str, QuantizedReduceScatter] = {}
        self._installed_on: LightningModule | None = None
        # Refuses what is not allowed.
        QuantizedReduceScatter(NodeGroups((0,), 1, None, None), **self._gradients)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._hpz:
            check_secondary(self.world_size, self.ranks_per_node)
        rounds = self._quantize_weights or self._quantize_gradients
        if rounds and self.ranks_per_node == self.world_size > 1:
            rank_zero_warn(
                f"{type(self).__name__} has one node of {self.world_size} ranks: it rounds weights"
                " and gradients and saves no bytes between nodes. Hint: strategy='fsdp2', or"
                " ranks_per_node= what shares a fast link."
            )
        # On one node the secondary partition would be the first one.
        if self._hpz and self.ranks_per_node < self.world_size:
            self._reshard_after_forward = self.ranks_per_node

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self._gradients["error_feedback"] and self._save_distributed_checkpoint:
            save_errors(self._reductions, Path(self.broadcast(filepath)))

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._gradients["error_feedback"]:
            load_errors(self._reductions, Path(self.broadcast(checkpoint_path)))
        return checkpoint

    @override
    def _on_paper(self) -> dict[str, Any]:
        return {
            "strategy": "zeropp",
            "quantize_weights": self._quantize_weights,
            "hpz": self._hpz,
            "quantize_gradients": self._quantize_gradients,
            "weight_format": self._weights["format"],
            "gradient_format": self._gradients["format"],
            "block_size": self._weights["block_size"],
        }

    @override
    def _settings(self) -> dict[str, object]:
        own = {
            "quantize_weights": self._quantize_weights and self._weights,
            "hpz": self._hpz,
            "quantize_gradients": self._quantize_gradients and self._gradients,
        }
        return {**super()._settings(), **own}

    @override
    def _shard(self, module: LightningModule) -> None:
        super()._shard(module)
        if self._installed_on is module:  # set up again, for evaluation: errors are kept
            return
        self._installed_on = module
        groups = node_groups(self.ranks_per_node, timeout=self._timeout)
        gather = QuantizedAllGather(self.world_size, **self._weights)
        self._reductions = install_collectives(
            module,
            all_gather=gather if self._quantize_weights else None,
            reduce_scatter=(
                (lambda _: QuantizedReduceScatter(groups, **self._gradients))
                if self._quantize_gradients
                else None
            ),
        )
