"""A pipeline of stages by name, under a LightningModule as it is.

Source: Lamy-Poirier 2023 (Breadth-First Pipeline Parallelism, arXiv:2211.05953); Lamy-Poirier 2021
    (layered gradient accumulation and modular pipeline parallelism, arXiv:2106.02679); Huang et al.
    2019 (GPipe, arXiv:1811.06965); Narayanan et al. 2021 (interleaved 1F1B, arXiv:2104.04473).
    The schedules are those of ``torch.distributed.pipelining``.
Differs: the module declares no stages and computes its loss where it always did.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ext._lightning import (
    MicroBatches,
    PipelineView,
    batches_before,
    ends_window,
    run_backward_in_step,
    zero_grad_of_window,
)
from lightning_ext.strategies._fsdp2._checkpoints import save_parts
from lightning_ext.strategies._fsdp2._clipping import clip_over_ranks
from lightning_ext.strategies._fsdp2._faults import explain, require_module
from lightning_ext.strategies._pipeline._arguments import (
    check_run,
    check_world,
    checked,
    checked_argument,
)
from lightning_ext.strategies._pipeline._backward_hooks import call_backward_hooks
from lightning_ext.strategies._pipeline._build import Pipeline, build
from lightning_ext.strategies._pipeline._data_parallel import DataParallel
from lightning_ext.strategies._pipeline._engine import ScheduleName
from lightning_ext.strategies._pipeline._groups import limit_waiting, make_mesh, reduced
from lightning_ext.strategies._pipeline._ready import require_own
from lightning_ext.strategies._pipeline._settings import ANY_NUMBER, Settings
from lightning_ext.strategies._pipeline._split import Split


class PipelineStrategy(ModelParallelStrategy):
    """Every rank holds some layers of the module, and micro-batches pass from rank to rank.

    The LightningModule stays as it is. One submodule is split into stages, stage s on rank s mod P.
    A batch of the loader is cut into micro-batches; of each, the first rank runs ``training_step``
    up to the call of the submodule, and the last rank runs it with what the stages have made of
    the arguments. What is outside is on all ranks; ``parameters()`` has that and a rank's own
    stages. In evaluation all ranks run the step as it is, and the submodule as it is called.

    Args:
        module: Name of the submodule that is split, an ``nn.Sequential`` or anything with a method
            ``pipeline_layers()``; ``None``: the only one there is.
        schedule: In which order stages and micro-batches run.
        stages_per_rank: Stages of each rank; ``"layers"``: as many as make one layer a stage;
            ``"auto"``: 2, or 1 where the schedule has no more.
        num_microbatches: Into how many a batch is cut; ``"auto"``: twice the stages.
        num_eval_microbatches: Into how many equal parts, at most, a call of the submodule is cut
            in evaluation; the outputs are joined along their first dimension.
        split: Where stages begin: balanced by the number of layers, their parameters or their time,
            or the index of the first layer of each stage but the first.
        data_parallel: How replicas of a stage share it: each holds a part, or all of it.
        data_parallel_size: Replicas of each stage, which see different data.
        activation_checkpointing: Whether what is computed within a stage is computed again in the
            backward pass, so that only the inputs of stages are kept.
        mp_policy: torch's own mixed precision of FSDP2, beside Lightning's ``precision``.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes its
            part, or one file of all weights and states, as single-device training writes it.
        process_group_backend: ``"nccl"``, ``"gloo"``, …; by default what fits the device.
        timeout: How long a rank waits for the others.

    Raises:
        MisconfigurationException: For a module that cannot be split so, and for runs that a
            pipeline would train wrongly.
        TypeError: For an argument of another kind, with what is allowed.
        ValueError: For a number that is too small, or a name that there is not.
    """

    def __init__(
        self,
        module: str | None = None,
        *,
        schedule: ScheduleName = "breadth_first",
        stages_per_rank: int | Literal["layers", "auto"] = "auto",
        num_microbatches: int | Literal["auto"] = "auto",
        num_eval_microbatches: int = 1,
        split: Split = "uniform",
        data_parallel: DataParallel = "fsdp2",
        data_parallel_size: int = 1,
        activation_checkpointing: bool = False,
        mp_policy: MixedPrecisionPolicy | None = None,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=checked_argument(
                "save_distributed_checkpoint", save_distributed_checkpoint
            ),
            process_group_backend=process_group_backend,
            timeout=checked_argument("timeout", timeout),
        )
        self._settings = checked(
            Settings(
                module,
                schedule,
                stages_per_rank,
                num_microbatches,
                num_eval_microbatches,
                split,
                data_parallel,
                data_parallel_size,
                activation_checkpointing,
                mp_policy or MixedPrecisionPolicy(),
            )
        )
        self._pipeline: Pipeline | None = None
        self._micro_batches = MicroBatches()

    @property
    def num_stages(self) -> int:
        """Stages of all ranks of a pipeline."""
        return len(self._built().engine.owners)

    @property
    def num_microbatches(self) -> int:
        """Into how many the first batch is cut."""
        asked = self._settings.num_microbatches
        return 2 * self.num_stages if asked == "auto" else asked

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        replicas = self.device_mesh["data_parallel"]
        return {"num_replicas": replicas.size(), "rank": replicas.get_local_rank()}

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None:
            clip_over_ranks(plugin, self.view)
        self._precision_plugin = plugin

    def view(self) -> PipelineView:
        """What callbacks ask of a strategy."""
        mesh, trainer = self.device_mesh, self._lightning().trainer
        replicas, pipeline = mesh.get_group("data_parallel"), mesh.get_group("pipeline")
        return PipelineView(trainer, replicas, pipeline, self._built, self._micro_batches)

    @override
    def setup_environment(self) -> None:
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        check_world(self._settings, self.world_size)
        mesh = make_mesh(self._settings.data_parallel_size, self.root_device, self._timeout)
        self._device_mesh = self._lightning()._device_mesh = mesh

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._lightning()
        require_own(module, None if self._pipeline is None else self._pipeline.parts)
        if self._pipeline is not None:
            self._pipeline.show()  # all ranks have all names again
        check_run(trainer, module, type(self).__name__)
        self.model = self.precision_plugin.convert_module(module)
        pipeline = self._split_module(module)
        if self._is_fitting:
            run_backward_in_step(trainer)
            pipeline.parts.show()
            self.setup_optimizers(trainer)
            sizes = self.num_microbatches, trainer.accumulate_grad_batches
            any_number = self._settings.schedule in ANY_NUMBER
            self._micro_batches.begin(*sizes, any_number=any_number)
            pipeline.begin_fit(self.optimizers, self._micro_batches)
        pipeline.parts.hide()
        self.setup_precision_plugin()
        if self._is_fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
        self.barrier()

    @override
    def training_step(self, batch: Any, *rest: Any) -> Tensor:
        module, pipeline = self._lightning(), self._built()
        trainer = module.trainer
        zero_grad_of_window(trainer)
        ends = ends_window(trainer)
        parts = trainer.accumulate_grad_batches / self._micro_batches.weight
        loss, logged = pipeline.run.train(
            lambda part: module.training_step(part, *rest),
            *(batch, batches_before(trainer), self._micro_batches.count, parts),
            reduces=ends,
        )
        if ends:
            pipeline.shared.reduce()
        for name, (value, options) in logged.items():
            module.log(name, value, **options)
        part, weight = loss / trainer.accumulate_grad_batches, self._micro_batches.weight
        call_backward_hooks(part, weight, self.precision_plugin, module)
        return loss

    @override
    def on_train_start(self) -> None:
        self._built().align()

    on_validation_start = on_test_start = on_predict_start = on_train_start

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return reduced(super().reduce, self.device_mesh.size(1), tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        replicas = self.device_mesh.get_group("data_parallel")
        return super().all_gather(tensor, group or replicas, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        found = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(found)
        return bool(found == self.world_size) if all else bool(found)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._built().share()
        return self._built().checkpoints.weights(in_parts=self._save_distributed_checkpoint)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        in_parts = self._save_distributed_checkpoint
        return self._built().checkpoints.state(optimizer, self.optimizers, in_parts=in_parts)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        if self._save_distributed_checkpoint and storage_options is None:
            save_parts(Path(self.broadcast(filepath)), checkpoint, writes_whole=True)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        optimizers = self.optimizers if self._is_fitting else ()  # those of an earlier fit stay
        path = Path(self.broadcast(checkpoint_path))
        return self._built().checkpoints.load(path, optimizers, weights_only)

    def export(self, path: str | Path) -> None:
        """Writes whole weights to one file, for ``load_from_checkpoint`` and other strategies.

        Args:
            path: Of the file, on rank 0; all ranks must call.
        """
        self._built().checkpoints.export(Path(path))

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain(exception, self._timeout)

    @property
    def _is_fitting(self) -> bool:
        return self._lightning().trainer.state.fn == TrainerFn.FITTING

    def _lightning(self) -> LightningModule:
        return require_module(self.lightning_module, type(self).__name__)

    def _built(self) -> Pipeline:
        self._lightning()
        assert self._pipeline is not None  # set up together with the module
        return self._pipeline

    def _split_module(self, module: LightningModule) -> Pipeline:
        if self._pipeline is None:
            args = self.device_mesh, self.root_device, self.precision_plugin.forward_context
            seed = self.broadcast(torch.initial_seed())
            self._pipeline = build(module, self._settings, *args, seed)
            limit_waiting(self._pipeline.shared.groups, self._timeout)
            self._pipeline.run.install()
        return self._pipeline
