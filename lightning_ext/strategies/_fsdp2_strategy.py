"""FSDP2 by name, under a LightningModule as it is.

Source: Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), torch's ``fully_shard``;
    Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), stage 3.
Differs: from Lightning's ``ModelParallelStrategy``, the module need not shard itself; gradients are
    reduced once for each optimizer step; what cannot be cut is reduced, too; clipping takes
    parameters of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ext._lightning import FullyShardedView, drop_unreduced, require_agreement, reshard
from lightning_ext.scaling import CommunicationBytes
from lightning_ext.strategies._fsdp2._arguments import checked
from lightning_ext.strategies._fsdp2._checkpoints import load_checkpoint, save_parts
from lightning_ext.strategies._fsdp2._clipping import clip_over_ranks
from lightning_ext.strategies._fsdp2._earlier import require_as_before
from lightning_ext.strategies._fsdp2._export import export
from lightning_ext.strategies._fsdp2._faults import explain, require_module, run_settings
from lightning_ext.strategies._fsdp2._mesh import check_mesh_shape, check_reshard, make_mesh
from lightning_ext.strategies._fsdp2._optimizer_states import saved_state
from lightning_ext.strategies._fsdp2._outside import gather_when_called, let_go_after_steps
from lightning_ext.strategies._fsdp2._paper import on_paper
from lightning_ext.strategies._fsdp2._precision import check_precision
from lightning_ext.strategies._fsdp2._prepare import to_device
from lightning_ext.strategies._fsdp2._reduction import Reduction
from lightning_ext.strategies._fsdp2._secondary import limit_waiting
from lightning_ext.strategies._fsdp2._sharding import settle, shard, sharded_modules, unit_sizes
from lightning_ext.strategies._fsdp2._steps import steps_gather
from lightning_ext.strategies._fsdp2._units import TRANSFORMER_LAYERS, Wrap
from lightning_ext.strategies._nodes import check_nodes


class FSDP2Strategy(ModelParallelStrategy):
    """Every rank holds a part of each parameter, and gathers a layer while it runs.

    The LightningModule stays as it is. Its layers become units, each gathered by one collective and
    reduced by one; what is outside of them, and used anywhere in a step, is gathered for the whole
    step. What ``configure_model`` sharded stays so. With several micro-batches, gradients are
    reduced in the last one only; until then each rank keeps them whole.

    Args:
        wrap: Which modules are units: ``"transformer_layers"`` (those that a ``ModuleList`` or
            ``Sequential`` repeats), a class name, classes, a policy of
            ``torch.distributed.fsdp.wrap``, or a function that says it of a module; ``None``: the
            whole is one unit.
        device_mesh: (replicate, shard): parameters are split over ``shard`` neighbouring ranks and
            the same in each of ``replicate`` such groups. ``None``: split over all ranks.
        reshard_after_forward: Whether a unit is let go of between its forward and its backward
            pass, and gathered again; an integer keeps it split over so many neighbouring ranks,
            and is ``True`` on a single rank.
        mp_policy: torch's own mixed precision, beside Lightning's ``precision``: with
            ``param_dtype`` units are gathered and computed in it.
        offload_policy: Where parameters rest, such as torch's ``CPUOffloadPolicy``.
        find_unused_parameters: For ranks of which each uses other parameters of a unit: what a rank
            has not used counts zero there, and has a gradient, if of zeros. Units must run on
            all ranks alike, which they then ask each other in each step, and else in the first.
        ranks_per_node: Neighbouring ranks that share a node; ``"auto"``: the Trainer's ``devices``.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes its
            part, or one file of whole weights and states, as single-device training writes it.
        process_group_backend: ``"nccl"``, ``"gloo"``, …; by default what fits the device.
        timeout: How long a rank waits for the others.

    Raises:
        MisconfigurationException: For precisions that would train wrongly, a mesh that is not the
            world, classes that the module does not have, options that differ between ranks, and
            ranks that run different layers.
        TypeError: For an argument of another kind, with what is allowed.
        ValueError: For a mesh that is not two counts, or too few ranks.
    """

    def __init__(
        self,
        wrap: Wrap = TRANSFORMER_LAYERS,
        *,
        device_mesh: tuple[int, int] | None = None,
        reshard_after_forward: bool | int = True,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: OffloadPolicy | CPUOffloadPolicy | None = None,
        find_unused_parameters: bool = False,
        ranks_per_node: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=checked("timeout", timeout),
        )
        self._wrap = checked("wrap", wrap)
        self._mesh_shape = check_mesh_shape(device_mesh)
        self._reshard_after_forward = checked("reshard_after_forward", reshard_after_forward)
        self._mp_policy = checked("mp_policy", mp_policy) or MixedPrecisionPolicy()
        self._offload_policy = checked("offload_policy", offload_policy) or OffloadPolicy()
        self._ranks_per_node = checked("ranks_per_node", ranks_per_node)
        self._find_unused_parameters = checked("find_unused_parameters", find_unused_parameters)
        self._reduction: Reduction | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def ranks_per_node(self) -> int:
        """Neighbouring ranks that share a node."""
        return self.num_processes if self._ranks_per_node == "auto" else self._ranks_per_node

    @property
    def shard_size(self) -> int:
        """Ranks over which a parameter is split."""
        return self._mesh_shape[1] if self._mesh_shape else self.world_size

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None:
            check_precision(plugin, type(self).__name__)
            clip_over_ranks(plugin, self.view)
        self._precision_plugin = plugin

    def view(self) -> FullyShardedView:
        """What callbacks ask of a strategy."""
        return FullyShardedView(self._lightning().trainer)

    def units(self) -> dict[str, int]:
        """Parameters of each unit by its name, with the padding that collectives carry."""
        reshard(self._lightning())
        return unit_sizes(self._lightning(), self.shard_size)

    def communication(self) -> CommunicationBytes:
        """What this rank sends in an optimizer step, on paper, if all of each unit is trained."""
        args = self._lightning(), self.units(), self._mp_policy
        ranks, how = (self.world_size, self.ranks_per_node), self._on_paper()
        return on_paper(*args, *ranks, accumulate=self.view().accumulate, **how)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()
        check_nodes(self.world_size, self.ranks_per_node)
        self._reshard_after_forward = check_reshard(self._reshard_after_forward, self.shard_size)
        if self._mesh_shape is not None:
            self._device_mesh = make_mesh(self._mesh_shape, self.world_size, self.root_device)
            self._lightning()._device_mesh = self._device_mesh

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._lightning()
        if self._layer_sync is not None and not sharded_modules(module):
            self._layer_sync.apply(module)
        self.model = self.precision_plugin.convert_module(module)
        settings = self._settings()
        require_as_before(module, type(self).__name__, settings)
        settings |= run_settings(trainer, module)
        require_agreement(trainer, type(self).__name__, settings)
        self._shard(module)
        to_device(module, self.root_device)
        self.barrier()
        if self._is_fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if self._is_fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._undo += [h.remove for h in let_go_after_steps(module, self.optimizers)]

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        assert self._reduction is not None
        with self._reduction.blocked():
            yield

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        assert self._reduction is not None
        self._reduction.before_backward(closure_loss)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        module = self._lightning()
        return saved_state(optimizer, module, in_parts=self._save_distributed_checkpoint)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        if self._save_distributed_checkpoint and storage_options is None:
            save_parts(Path(self.broadcast(filepath)), checkpoint)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        optimizers = self.optimizers if self._is_fitting else ()  # those of an earlier fit stay
        return load_checkpoint(path, self._lightning(), optimizers, weights_only)

    @override
    def on_validation_end(self) -> None:
        reshard(self._lightning())

    on_train_end = on_test_end = on_predict_end = on_validation_end

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain(exception, self._timeout)

    @override
    def teardown(self) -> None:
        drop_unreduced(self._lightning())  # of a window that was not ended
        while self._undo:
            self._undo.pop()()
        super().teardown()

    def export(self, path: str | Path) -> None:
        """Writes whole weights to one file, for ``load_from_checkpoint`` and other strategies.

        Args:
            path: Of the file, on rank 0; all ranks must call.
        """
        export(self._lightning(), Path(path))

    @property
    def _is_fitting(self) -> bool:
        return self._lightning().trainer.state.fn == TrainerFn.FITTING

    def _lightning(self) -> LightningModule:
        return require_module(self.lightning_module, type(self).__name__)

    def _on_paper(self) -> dict[str, Any]:
        replicas = self._mesh_shape[0] if self._mesh_shape else 1
        again = self._reshard_after_forward
        return {"strategy": "fsdp2", "reshard_after_forward": again, "replicas": replicas}

    def _settings(self) -> dict[str, object]:
        """What all ranks must have alike, and Trainers that a module goes through."""
        return {
            "wrap": self._wrap,
            "device_mesh": self._mesh_shape,
            "reshard_after_forward": self._reshard_after_forward,
            "mp_policy": self._mp_policy,
            "offload_policy": self._offload_policy,
            "find_unused_parameters": self._find_unused_parameters,
            "ranks_per_node": self.ranks_per_node,
        }

    def _shard(self, module: LightningModule) -> None:
        mesh = self.device_mesh if self._mesh_shape else self.device_mesh["data_parallel"]
        policies = {"mp_policy": self._mp_policy, "offload_policy": self._offload_policy}
        options = {"mesh": mesh, **policies}
        shard(module, self._wrap, self._reshard_after_forward, self.root_device, options)
        limit_waiting(sharded_modules(module).values(), self._timeout)
        settle(module)
        differ, gloo = self._find_unused_parameters, self._process_group_backend == "gloo"
        self._reduction = Reduction(
            module, self.root_device, type(self).__name__, find_unused_parameters=differ, sums=gloo
        )
        hooks = gather_when_called(module)
        self._undo += [steps_gather(module), self._reduction.remove, *(h.remove for h in hooks)]
