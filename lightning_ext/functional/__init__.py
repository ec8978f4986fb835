"""Tensors in, tensors out: each formula once, in plain torch."""

from lightning_ext.functional._adam_instability import adam_instability_sums
from lightning_ext.functional._contrastive._blocks import (
    block_logsumexp,
    block_logsumexp_grads,
    merge_logsumexp,
)
from lightning_ext.functional._contrastive._losses import (
    clip_loss,
    info_nce_loss,
    nt_xent_loss,
    siglip_loss,
)
from lightning_ext.functional._contrastive._siglip import siglip_grads
from lightning_ext.functional._coordinates import (
    coordinate_quantiles,
    coordinate_sums,
    coordinate_variance,
)
from lightning_ext.functional._diff_norms import (
    accumulated_sq_norms,
    accumulated_sq_norms_,
    diff_sq_norms,
)
from lightning_ext.functional._ema import ema_update_
from lightning_ext.functional._geometry import (
    adam_preconditioned,
    deviation_sum,
    fold_norms,
    matrix_covariance,
    small_gram,
)
from lightning_ext.functional._gradient_snr import (
    gradient_snr,
    mean_gradient_snr,
    smoothed_vrgd_scale,
    vrgd_scale,
)
from lightning_ext.functional._lanczos import (
    bulk_edges,
    lanczos,
    ritz_values,
    spectral_density,
)
from lightning_ext.functional._layer_norm import layer_norm, rms_norm
from lightning_ext.functional._low_rank._gaussian import gaussian_projection
from lightning_ext.functional._low_rank._lazy_refresh import lazy_refresh_gap, subspace_similarity
from lightning_ext.functional._low_rank._subspace import (
    gradient_subspace,
    project_back,
    project_gradient,
)
from lightning_ext.functional._low_rank._update import (
    limit_norm_growth,
    low_rank_scales,
    low_rank_update,
)
from lightning_ext.functional._low_rank._weight_norm import weight_norm_gradients, weight_norm_step
from lightning_ext.functional._newton_schulz import newton_schulz
from lightning_ext.functional._norm_layers import affine_sample_gradients, sample_sq_norms
from lightning_ext.functional._norm_loss import norm_loss, norm_loss_grad_
from lightning_ext.functional._normalized_singular_values import normalized_singular_values
from lightning_ext.functional._orthogonalize import orthogonalize, trace_sqrt
from lightning_ext.functional._part_norms import part_sq_norms, sq_norms, total_sq_norm
from lightning_ext.functional._per_sample import per_sample_gradients
from lightning_ext.functional._projections import inner_products
from lightning_ext.functional._quantization._dequantize_reduce import (
    dequantize_reduce,
    dequantize_reduce_quantize,
)
from lightning_ext.functional._quantization._error_feedback import error_feedback
from lightning_ext.functional._quantization._quantize import quantize
from lightning_ext.functional._quantization._quantized import Quantized, dequantize, quantized_bytes
from lightning_ext.functional._quantization._random_bits import random_bits
from lightning_ext.functional._quantization._round_stochastic import round_stochastic
from lightning_ext.functional._quantization._sign_sums import pack_sign_sums, unpack_sign_means
from lightning_ext.functional._quantization._signs import (
    majority_vote,
    pack_signs,
    sum_signs,
    unpack_signs,
    unpack_votes,
)
from lightning_ext.functional._saved_bytes import saved_bytes
from lightning_ext.functional._second_order._gauss_newton import (
    gauss_newton_direction,
    gauss_newton_multipliers,
    jacobian_gram,
    loss_derivatives,
)
from lightning_ext.functional._second_order._rank_one import (
    mkor_direction,
    rank_one_inverse_update,
)
from lightning_ext.functional._sharpness import sharpness_perturbation
from lightning_ext.functional._states._formats import decode_state, encode_state
from lightning_ext.functional._states._quantized_state import (
    QuantizedState,
    export_state,
    import_state,
    scale_state_,
    state_bytes,
    zero_state,
)
from lightning_ext.functional._states._state_rows import state_from_rows, state_to_rows
from lightning_ext.functional._unit_norms import unit_norms
from lightning_ext.functional._unitwise_clip import unitwise_clip, unitwise_clip_
from lightning_ext.functional._updates._accumulated_moments import (
    accum_adam_update,
    accum_adam_update_,
)
from lightning_ext.functional._updates._adagrad_norm import (
    adagrad_norm_update,
    adagrad_norm_update_,
    l2_gradients,
)
from lightning_ext.functional._updates._bounded import diffgrad_update, gravity_update
from lightning_ext.functional._updates._delay import predicted_weight, spike_correction
from lightning_ext.functional._updates._elementwise import adamw_update, lion_update, sgd_update
from lightning_ext.functional._updates._factored import (
    FactoredState,
    came_update,
    came_vector_update,
)
from lightning_ext.functional._updates._foreach_bounded import diffgrad_update_, gravity_update_
from lightning_ext.functional._updates._foreach_elementwise import (
    adamw_update_,
    lion_update_,
    sgd_update_,
)
from lightning_ext.functional._updates._foreach_factored import came_update_, came_vector_update_
from lightning_ext.functional._updates._foreach_normuon import (
    normuon_update_,
    stacked_newton_schulz,
)
from lightning_ext.functional._updates._foreach_polyak import polyak_sgd_update_
from lightning_ext.functional._updates._foreach_radial_projection import adamp_update_, sgdp_update_
from lightning_ext.functional._updates._foreach_trust import lamb_update_, lars_update_
from lightning_ext.functional._updates._multi_task import mt_adamw_update, mt_adamw_update_
from lightning_ext.functional._updates._normuon import normuon_update
from lightning_ext.functional._updates._polyak import polyak_sgd_update
from lightning_ext.functional._updates._radial_projection import (
    adamp_update,
    radial_part,
    sgdp_update,
)
from lightning_ext.functional._updates._sphere import renormalize_, tangent_gradients
from lightning_ext.functional._updates._split_weight import join_weight, split_weight
from lightning_ext.functional._updates._trust import clip_coefficient, lamb_update, lars_update
from lightning_ext.functional._updates._voted_lion import (
    lion_directions,
    voted_lion_update,
    voted_lion_update_,
)

__all__ = [
    "FactoredState",
    "Quantized",
    "QuantizedState",
    "accum_adam_update",
    "accum_adam_update_",
    "accumulated_sq_norms",
    "accumulated_sq_norms_",
    "adagrad_norm_update",
    "adagrad_norm_update_",
    "adam_instability_sums",
    "adam_preconditioned",
    "adamp_update",
    "adamp_update_",
    "adamw_update",
    "adamw_update_",
    "affine_sample_gradients",
    "block_logsumexp",
    "block_logsumexp_grads",
    "bulk_edges",
    "came_update",
    "came_update_",
    "came_vector_update",
    "came_vector_update_",
    "clip_coefficient",
    "clip_loss",
    "coordinate_quantiles",
    "coordinate_sums",
    "coordinate_variance",
    "decode_state",
    "dequantize",
    "dequantize_reduce",
    "dequantize_reduce_quantize",
    "deviation_sum",
    "diff_sq_norms",
    "diffgrad_update",
    "diffgrad_update_",
    "ema_update_",
    "encode_state",
    "error_feedback",
    "export_state",
    "fold_norms",
    "gauss_newton_direction",
    "gauss_newton_multipliers",
    "gaussian_projection",
    "gradient_snr",
    "gradient_subspace",
    "gravity_update",
    "gravity_update_",
    "import_state",
    "info_nce_loss",
    "inner_products",
    "jacobian_gram",
    "join_weight",
    "l2_gradients",
    "lamb_update",
    "lamb_update_",
    "lanczos",
    "lars_update",
    "lars_update_",
    "layer_norm",
    "lazy_refresh_gap",
    "limit_norm_growth",
    "lion_directions",
    "lion_update",
    "lion_update_",
    "loss_derivatives",
    "low_rank_scales",
    "low_rank_update",
    "majority_vote",
    "matrix_covariance",
    "mean_gradient_snr",
    "merge_logsumexp",
    "mkor_direction",
    "mt_adamw_update",
    "mt_adamw_update_",
    "newton_schulz",
    "norm_loss",
    "norm_loss_grad_",
    "normalized_singular_values",
    "normuon_update",
    "normuon_update_",
    "nt_xent_loss",
    "orthogonalize",
    "pack_sign_sums",
    "pack_signs",
    "part_sq_norms",
    "per_sample_gradients",
    "polyak_sgd_update",
    "polyak_sgd_update_",
    "predicted_weight",
    "project_back",
    "project_gradient",
    "quantize",
    "quantized_bytes",
    "radial_part",
    "random_bits",
    "rank_one_inverse_update",
    "renormalize_",
    "ritz_values",
    "rms_norm",
    "round_stochastic",
    "sample_sq_norms",
    "saved_bytes",
    "scale_state_",
    "sgd_update",
    "sgd_update_",
    "sgdp_update",
    "sgdp_update_",
    "sharpness_perturbation",
    "siglip_grads",
    "siglip_loss",
    "small_gram",
    "smoothed_vrgd_scale",
    "spectral_density",
    "spike_correction",
    "split_weight",
    "sq_norms",
    "stacked_newton_schulz",
    "state_bytes",
    "state_from_rows",
    "state_to_rows",
    "subspace_similarity",
    "sum_signs",
    "tangent_gradients",
    "total_sq_norm",
    "trace_sqrt",
    "unit_norms",
    "unitwise_clip",
    "unitwise_clip_",
    "unpack_sign_means",
    "unpack_signs",
    "unpack_votes",
    "voted_lion_update",
    "voted_lion_update_",
    "vrgd_scale",
    "weight_norm_gradients",
    "weight_norm_step",
    "zero_state",
]
