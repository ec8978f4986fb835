"""Strategies by name: FSDP2 under an unmodified LightningModule, and ZeRO++ on two engines."""

from lightning_ext._strategy_names import register_strategies
from lightning_ext.strategies._deepspeed_zeropp import DeepSpeedZeroPPStrategy
from lightning_ext.strategies._fsdp2_strategy import FSDP2Strategy
from lightning_ext.strategies._pipeline_strategy import PipelineStrategy
from lightning_ext.strategies._zeropp._install import install_collectives
from lightning_ext.strategies._zeropp._node_groups import NodeGroups, node_groups
from lightning_ext.strategies._zeropp._quantized_all_gather import QuantizedAllGather
from lightning_ext.strategies._zeropp._quantized_reduce_scatter import QuantizedReduceScatter
from lightning_ext.strategies._zeropp_strategy import ZeroPPStrategy

__all__ = [
    "DeepSpeedZeroPPStrategy",
    "FSDP2Strategy",
    "NodeGroups",
    "PipelineStrategy",
    "QuantizedAllGather",
    "QuantizedReduceScatter",
    "ZeroPPStrategy",
    "install_collectives",
    "node_groups",
    "register_strategies",
]
