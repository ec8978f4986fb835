"""ZeRO++ by DeepSpeed, with Lightning's defaults kept.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209), as DeepSpeed implements it.
Differs: from Lightning's ``DeepSpeedStrategy``, a config is merged into the defaults and not taken
    in their place; a loss is divided by the micro-batches of a step once and not twice; a cut last
    window is stepped; a parameter that a step does not use has no gradient left from the step
    before; accumulation may change in flight; ZeRO-3 and hpZ run on CPUs; whole weights can be read
    and written, and folders of any world be evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ext._lightning import DeepSpeedView, require_agreement
from lightning_ext.strategies._deepspeed._checks import check_optimizer, check_run
from lightning_ext.strategies._deepspeed._config import Config, check_given, check_stage, merged
from lightning_ext.strategies._deepspeed._cpu import import_deepspeed, prepare_cpu
from lightning_ext.strategies._deepspeed._engines import make_engine, partitioned, release
from lightning_ext.strategies._deepspeed._gradients import (
    drop_gradients,
    hidden_parameters,
    show_parameters,
)
from lightning_ext.strategies._deepspeed._options import ZeroPPOptions
from lightning_ext.strategies._deepspeed._weights import (
    check_folder,
    check_world,
    export_weights,
    load_weights,
    read_whole,
)
from lightning_ext.strategies._fsdp2._faults import explain, fingerprint, require_module
from lightning_ext.strategies._nodes import check_ranks


class DeepSpeedZeroPPStrategy(DeepSpeedStrategy):
    """ZeRO stage 3 by DeepSpeed, with the three parts of ZeRO++.

    Every rank holds a part of each parameter. What travels between nodes becomes less: gathered
    weights go as INT8 (``quantize_weights``), the backward pass gathers inside of a node
    (``hpz_partition_size``), gradients go as INT4 and INT8 in two hops (``quantize_gradients``).

    Args:
        hpz_partition_size: Ranks over which a second copy of the weights is split, for the backward
            pass; ``"auto"``: those of a node, unless it has one or all; ``None``: no second copy.
        quantize_weights: ``"auto"``: on CUDA devices, and not on CPUs, where DeepSpeed cannot.
        quantize_gradients: The same.
        quantize_nontrainable_weights: Whether frozen weights are kept as INT8, too.
        ranks_per_node: Neighbouring ranks that share a node; ``"auto"``: the Trainer's ``devices``.
        stage: 3, the only one that ZeRO++ refines.
        config: A DeepSpeed config, or the path of one: merged into Lightning's defaults, and left
            as it is. What it says of ``zero_optimization`` counts where no argument does.
        kwargs: Of Lightning's ``DeepSpeedStrategy``, such as ``offload_optimizer``.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        MisconfigurationException: Another stage, or what disagrees with config, ranks or device.

    Example:
        >>> from lightning_ext.strategies import DeepSpeedZeroPPStrategy
        >>> strategy = DeepSpeedZeroPPStrategy(hpz_partition_size=8, quantize_gradients=False)
    """

    strategy_name = "zeropp_deepspeed"

    def __init__(
        self,
        *,
        hpz_partition_size: int | Literal["auto"] | None = "auto",
        quantize_weights: bool | Literal["auto"] = "auto",
        quantize_gradients: bool | Literal["auto"] = "auto",
        quantize_nontrainable_weights: bool = False,
        ranks_per_node: int | Literal["auto"] = "auto",
        stage: int = 3,
        config: str | Path | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        import_deepspeed()
        check_ranks("ranks_per_node", ranks_per_node, least=1, others=("auto",))
        self._ranks_per_node = ranks_per_node
        self.holds_gradients = False
        self._given: Config = {}
        self._options = ZeroPPOptions(
            hpz_partition_size, quantize_weights, quantize_gradients, quantize_nontrainable_weights
        )
        check_stage(stage, kwargs)
        super().__init__(stage=3, config=config, **kwargs)
        check_given(self._given, self._options.set_by_user(), kwargs)
        self._base: Config = merged(self.config or {}, self._given)
        self.config = merged(self._base, {"zero_optimization": self._options.set_by_user()})

    @property
    def ranks_per_node(self) -> int:
        """Neighbouring ranks that share a node."""
        return self.num_processes if self._ranks_per_node == "auto" else self._ranks_per_node

    def view(self) -> DeepSpeedView:
        """What callbacks ask of this strategy."""
        return DeepSpeedView(self._lightning().trainer)

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """``False``: the Trainer says when to step, so that the last window of an epoch counts."""
        return False

    @override
    def setup_environment(self) -> None:
        if not self._on_cpu:
            super().setup_environment()
            return
        prepare_cpu(self.ranks_per_node)
        super(DeepSpeedStrategy, self).setup_environment()  # Lightning's own wants CUDA

    @override
    def setup_distributed(self) -> None:
        if not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self._lightning()
        check_run(trainer)
        settings = {
            "arguments and config": self._base,
            "ZeRO++": self._options,
            "ranks_per_node": self.ranks_per_node,
            "the module": fingerprint(module),
        }
        require_agreement(trainer, type(self).__name__, settings)
        release(module)
        super().setup(trainer)

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain(exception, self._timeout)

    @override
    def teardown(self) -> None:
        self._config_initialized = False  # the next fit may accumulate or clip otherwise
        super().teardown()

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        self._init_config_if_needed()
        with partitioned(self.config or {}, self.remote_device):
            yield

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.holds_gradients = True
        # Lightning has divided it by the micro-batches already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        with hidden_parameters(self._sharded):
            result = super().optimizer_step(*args, **kwargs)
        self._drop_gradients()
        return result

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        module = self._lightning()
        begins = batch_idx % module.trainer.accumulate_grad_batches == 0
        if begins and module.automatic_optimization and self.holds_gradients:
            self._drop_gradients()  # of an epoch that was cut short

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: DeepSpeed writes its own, each rank its part."""
        return {}

    def export(self, path: str | Path) -> None:
        """Writes whole weights to one file, for ``load_from_checkpoint`` and other strategies.

        Args:
            path: Of the file, on rank 0; all ranks must call.
        """
        export_weights(self._lightning(), Path(path))

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        show_parameters(self._sharded)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a folder of DeepSpeed's, or weights from one file of any strategy."""
        path = Path(self.broadcast(checkpoint_path))
        fitting = self._lightning().trainer.state.fn == TrainerFn.FITTING
        self.load_full_weights = path.is_file() or not fitting
        if path.is_file():
            return super().load_checkpoint(path, weights_only)
        check_folder(path)
        if not fitting:
            return read_whole(path)
        check_world(path, self.world_size)
        found = super().load_checkpoint(path, weights_only)
        show_parameters(self._sharded)
        return found

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.load_full_weights:
            load_weights(self._lightning(), checkpoint["state_dict"], strict=strict)

    @override
    def _load_config(self, config: str | Path | dict[str, Any] | None) -> None:
        """Keeps what was given; told that there is none, Lightning fills in its defaults."""
        self._given = copy.deepcopy(super()._load_config(config) or {})

    @override
    def _format_config(self) -> None:
        options = self._options.resolved(
            self._base["zero_optimization"],
            world=self.world_size,
            ranks_per_node=self.ranks_per_node,
            devices=0 if self._on_cpu else torch.cuda.device_count(),
        )
        self.config = merged(self._base, {"zero_optimization": options})
        super()._format_config()

    @override
    def _auto_select_batch_size(self) -> int:
        return 1  # for DeepSpeed's reports alone; Lightning would make a second train loader

    @override
    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)
        # Callbacks and schedulers know the user's optimizer, not DeepSpeed's around it.
        self.optimizers = [self._sharded.optimizer]
        show_parameters(self._sharded)

    @override
    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        if optimizer is not None:
            check_optimizer(optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        config = self.config or {}
        return make_engine(model, config, self.local_rank, trained, optimizer, lr_scheduler)

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        names = ("fp16", "bf16", "zero_allow_untested_optimizer", "zero_optimization")
        config = {name: value for name, value in (self.config or {}).items() if name in names}
        config["train_micro_batch_size_per_gpu"] = 1
        self.model, _ = make_engine(model, config, self.local_rank, [])

    def _lightning(self) -> LightningModule:
        return require_module(self.lightning_module, type(self).__name__)

    @property
    def _sharded(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer, which holds gradients and the float32 weights."""
        return self.deepspeed_engine.optimizer

    def _drop_gradients(self) -> None:
        drop_gradients(self._sharded)
        self.holds_gradients = False

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)
