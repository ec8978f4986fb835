"""The functions of `functional`, faster: one launch each where there is a CUDA device."""

from lightning_ext.kernels._contrastive import (
    clip_loss,
    info_nce_loss,
    nt_xent_loss,
    siglip_grads,
    siglip_loss,
)
from lightning_ext.kernels._contrastive_blocks import block_logsumexp, block_logsumexp_grads
from lightning_ext.kernels._ema import ema_update_
from lightning_ext.kernels._factored_updates import came_update_, came_vector_update_
from lightning_ext.kernels._layer_norm import layer_norm, rms_norm
from lightning_ext.kernels._newton_schulz import newton_schulz
from lightning_ext.kernels._quantize import (
    dequantize,
    dequantize_reduce,
    dequantize_reduce_quantize,
    quantize,
)
from lightning_ext.kernels._radial_projection import adamp_update_
from lightning_ext.kernels._round_stochastic import round_stochastic
from lightning_ext.kernels._signs import (
    majority_vote,
    pack_signs,
    sum_signs,
    unpack_signs,
    unpack_votes,
)
from lightning_ext.kernels._sq_norms import (
    accumulated_sq_norms,
    accumulated_sq_norms_,
    diff_sq_norms,
    sq_norms,
)
from lightning_ext.kernels._state_formats import decode_state, encode_state
from lightning_ext.kernels._trust_updates import lamb_update_, lars_update_
from lightning_ext.kernels._unit_norms import unit_norms
from lightning_ext.kernels._updates import adamw_update_, lion_update_, sgd_update_

__all__ = [
    "accumulated_sq_norms",
    "accumulated_sq_norms_",
    "adamp_update_",
    "adamw_update_",
    "block_logsumexp",
    "block_logsumexp_grads",
    "came_update_",
    "came_vector_update_",
    "clip_loss",
    "decode_state",
    "dequantize",
    "dequantize_reduce",
    "dequantize_reduce_quantize",
    "diff_sq_norms",
    "ema_update_",
    "encode_state",
    "info_nce_loss",
    "lamb_update_",
    "lars_update_",
    "layer_norm",
    "lion_update_",
    "majority_vote",
    "newton_schulz",
    "nt_xent_loss",
    "pack_signs",
    "quantize",
    "rms_norm",
    "round_stochastic",
    "sgd_update_",
    "siglip_grads",
    "siglip_loss",
    "sq_norms",
    "sum_signs",
    "unit_norms",
    "unpack_signs",
    "unpack_votes",
]
