"""The only place that touches Lightning's private attributes, one file per concern."""

from lightning_ext._lightning._agreement import require_agreement, require_whole_parameters
from lightning_ext._lightning._base_view import DistributedView, View
from lightning_ext._lightning._branch import branching, check_branches, present_sizes
from lightning_ext._lightning._branch_data import BranchData
from lightning_ext._lightning._closure import (
    OutOfMemoryRecovery,
    recover_from_oom,
    runs_in_parts,
)
from lightning_ext._lightning._deepspeed_view import DeepSpeedView
from lightning_ext._lightning._export import (
    export_with,
    exporting,
    weights_only_checkpoint,
)
from lightning_ext._lightning._functional_step import FunctionalStep
from lightning_ext._lightning._lengths import epoch_end, sync_lengths
from lightning_ext._lightning._loader import install_sampler, live_sampler, uninstall_sampler
from lightning_ext._lightning._local_gradients import keep_gradients_local, share_overflow
from lightning_ext._lightning._micro_batches import MicroBatches
from lightning_ext._lightning._monitored import (
    monitored_metrics,
    restore_monitored_metrics,
    step_plateau_schedulers,
)
from lightning_ext._lightning._optimizer_steps import (
    StepCounter,
    gradient_scale,
    logs_now,
    step_gradient_scale,
    steps_now,
)
from lightning_ext._lightning._out_of_memory import is_out_of_memory
from lightning_ext._lightning._own_gradients import (
    OwnGradients,
    drop_unreduced,
    holds_unreduced,
    note_units,
    own_parameters,
    reshard,
)
from lightning_ext._lightning._pipeline_step import (
    batches_before,
    ends_window,
    run_backward_in_step,
    zero_grad_of_window,
)
from lightning_ext._lightning._pipeline_view import PipelineView
from lightning_ext._lightning._random_state import random_state, restore_random_state
from lightning_ext._lightning._resume import (
    resume_position,
    sync_first_batch,
)
from lightning_ext._lightning._second_pass import SecondPass
from lightning_ext._lightning._sharded_view import FullyShardedView, ShardedView, local_part
from lightning_ext._lightning._silent import silent_log, untouched
from lightning_ext._lightning._trial_process import Outcome
from lightning_ext._lightning._trials import (
    TrialMemory,
    batch_maker,
    loader_sizes,
    trial_setting,
    trials,
)
from lightning_ext._lightning._units import Units
from lightning_ext._lightning._view import view
from lightning_ext._lightning._window import BatchShare, batch_share, reference_batch

__all__ = [
    "BatchShare",
    "BranchData",
    "DeepSpeedView",
    "DistributedView",
    "FullyShardedView",
    "FunctionalStep",
    "MicroBatches",
    "OutOfMemoryRecovery",
    "Outcome",
    "OwnGradients",
    "PipelineView",
    "SecondPass",
    "ShardedView",
    "StepCounter",
    "TrialMemory",
    "Units",
    "View",
    "batch_maker",
    "batch_share",
    "batches_before",
    "branching",
    "check_branches",
    "drop_unreduced",
    "ends_window",
    "epoch_end",
    "export_with",
    "exporting",
    "gradient_scale",
    "holds_unreduced",
    "install_sampler",
    "is_out_of_memory",
    "keep_gradients_local",
    "live_sampler",
    "loader_sizes",
    "local_part",
    "logs_now",
    "monitored_metrics",
    "note_units",
    "own_parameters",
    "present_sizes",
    "random_state",
    "recover_from_oom",
    "reference_batch",
    "require_agreement",
    "require_whole_parameters",
    "reshard",
    "restore_monitored_metrics",
    "restore_random_state",
    "resume_position",
    "run_backward_in_step",
    "runs_in_parts",
    "share_overflow",
    "silent_log",
    "step_gradient_scale",
    "step_plateau_schedulers",
    "steps_now",
    "sync_first_batch",
    "sync_lengths",
    "trial_setting",
    "trials",
    "uninstall_sampler",
    "untouched",
    "view",
    "weights_only_checkpoint",
    "zero_grad_of_window",
]
