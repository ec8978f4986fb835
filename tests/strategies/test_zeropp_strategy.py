"""ZeRO++ by name: what each switch changes, on nodes that are ranks of this host."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, fit, loader, run_distributed
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ext.callbacks import CommunicationVolume
from lightning_ext.scaling import communication_bytes
from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy

OFF = {"quantize_weights": False, "hpz": False, "quantize_gradients": False}
SWITCHES = tuple(OFF)


class Deep(Classifier):
    """Layers that become units, and two around them."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(dropout=0)
        inner = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(layers)]
        self.net = nn.Sequential(nn.Linear(6, 64), *inner, nn.Linear(64, 3))


def run(strategy: Any, callbacks: Any = (), *, layers: int = 2, **settings: Any) -> Any:
    torch.manual_seed(0)
    return fit(
        callbacks,
        module=Deep(layers),
        strategy=strategy,
        devices=dist_size(),
        accumulate_grad_batches=1,
        **{"max_steps": 3, "train": loader(64, 4), **settings},
    )


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


class Seen(Callback):
    """Gathered weights of a layer in the forward and in the backward pass, and its gradient."""

    def __init__(self) -> None:
        self.forward: list[Tensor] = []
        self.backward: list[Tensor] = []
        self.exact: list[Tensor] = []
        self.gradient: Tensor | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        layer = module.net[1]
        self.exact.append(whole(layer[0].weight))
        layer[0].register_forward_hook(lambda m, a, o: self.forward.append(m.weight.clone()))
        layer[0].register_full_backward_hook(lambda m, g, o: self.backward.append(m.weight.clone()))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradient = whole(module.net[1][0].weight.grad)


def one_step(options: dict[str, Any]) -> Any:
    seen = Seen()
    run(ZeroPPStrategy(ranks_per_node=2, **options), [seen], max_steps=1)
    return [x.detach() for x in (*seen.exact, *seen.forward, *seen.backward)], seen.gradient


def alone(switch: str) -> list[Any]:
    return run_distributed(one_step, 4, args=({**OFF, switch: True},))


def test_without_a_switch_nothing_is_rounded() -> None:
    for (exact, forward, backward), _ in run_distributed(one_step, 4, args=(OFF,)):
        assert torch.equal(exact, forward)
        assert torch.equal(exact, backward)


def test_quantized_weights_are_the_same_on_all_ranks_and_near_the_exact_ones() -> None:
    found = alone("quantize_weights")
    (exact, forward, backward), _ = found[0]
    assert all(torch.equal(forward, other[0][1]) for other in found)
    assert torch.equal(forward, backward)  # gathered twice, of the same shards
    assert 0 < (forward - exact).abs().max() <= exact.abs().max() / 127 / 2 * (1 + 1e-5)


def test_the_second_partition_holds_what_the_forward_pass_has_read() -> None:
    options = {**OFF, "hpz": True, "quantize_weights": True}
    for (exact, forward, backward), _ in run_distributed(one_step, 4, args=(options,)):
        assert torch.equal(forward, backward)
        assert not torch.equal(exact, forward)


def test_quantized_gradients_are_near_the_exact_ones() -> None:
    ((_, exact),) = run_distributed(one_step, 4, args=(OFF,))[:1]
    ((weights, rounded),) = alone("quantize_gradients")[:1]
    assert torch.equal(weights[0], weights[1])
    error = (rounded - exact).norm() / exact.norm()
    assert 0.01 < error < 0.25


def volume(options: dict[str, Any]) -> Any:
    meter = CommunicationVolume(1)
    _, trainer = run(ZeroPPStrategy(ranks_per_node=2, **options), [meter])
    return meter.last, trainer.strategy.communication()


@pytest.mark.parametrize("on", [*((switch,) for switch in SWITCHES), SWITCHES], ids="+".join)
def test_bytes_on_the_wire_are_those_on_paper(on: tuple[str, ...]) -> None:
    for counted, paper in run_distributed(volume, 4, args=({**OFF, **dict.fromkeys(on, True)},)):
        assert counted.parts == paper


def test_a_quarter_of_the_bytes_of_fp16_go_between_nodes() -> None:
    ((counted, _), *_) = run_distributed(volume, 4, args=({},))
    sizes = [64 * 64 + 64] * 2
    fp16 = {"weight_bytes": 2, "gradient_bytes": 2}
    plain = communication_bytes(sizes, 4, 2, "fsdp2", root_params=6 * 64 + 64 + 4 * 65, **fp16)
    assert counted.parts.backward.inter_bytes == 0
    assert plain.total.inter_bytes / counted.parts.total.inter_bytes > 4


def groups_of(layers: int) -> int:
    run(ZeroPPStrategy(ranks_per_node=2), layers=layers, max_steps=1)
    return len(dist.distributed_c10d._world.pg_map)


def test_process_groups_do_not_grow_with_layers() -> None:
    assert run_distributed(groups_of, 4, args=(2,)) == run_distributed(groups_of, 4, args=(5,))


def by_name(name: str) -> str:
    with warnings.catch_warnings(action="ignore"):  # of a single node
        _, trainer = run(name, max_steps=1)
    return type(trainer.strategy).__name__


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fsdp2", FSDP2Strategy), ("zeropp", ZeroPPStrategy)],
    ids=["fsdp2", "zeropp"],
)
def test_a_name_is_enough(name: str, kind: type) -> None:
    assert run_distributed(by_name, 2, args=(name,)) == [kind.__name__] * 2


class Keep(Callback):
    """Saves after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def trained(callbacks: Any = (), **settings: Any) -> list[Tensor]:
    """Whole weights after two epochs of two steps."""
    strategy = ZeroPPStrategy(ranks_per_node=1, hpz=False, error_feedback=True)
    settings = {"max_steps": -1, "max_epochs": 2, "train": loader(16, 4), **settings}
    return [whole(p) for p in run(strategy, callbacks, **settings)[0].parameters()]


def through(path: Path) -> Any:
    return trained([Keep(path)]), trained(ckpt_path=path)


def test_errors_of_rounding_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    for want, found in run_distributed(through, 2, args=(tmp_path / "folder.ckpt",)):
        assert all(map(torch.equal, want, found))
    assert len(list((tmp_path / "folder.ckpt").glob("errors_*.pt"))) == 2


def without_errors(path: Path) -> Any:
    straight = trained([Keep(path)])
    (path / f"errors_{dist.get_rank()}.pt").unlink()
    return straight, trained(ckpt_path=path)


def test_without_them_errors_start_at_zero(tmp_path: Path) -> None:
    for want, found in run_distributed(without_errors, 2, args=(tmp_path / "folder.ckpt",)):
        assert not all(map(torch.equal, want, found))


def two_modules() -> Any:
    """Bytes of the same Trainer with one module, and then with another one."""
    strategy, meter = ZeroPPStrategy(ranks_per_node=1, hpz=False), CommunicationVolume(1)
    _, trainer = run(strategy, [meter])
    first = meter.last
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(Deep(), loader(64, 4))
    return first, meter.last


def test_another_module_under_the_same_trainer_is_quantized_too() -> None:
    for first, second in run_distributed(two_modules):
        assert second.parts == first.parts


def one_module_two_strategies() -> str:
    module, _ = run(ZeroPPStrategy(ranks_per_node=1, hpz=False))
    with pytest.raises(MisconfigurationException) as caught:
        fit(module=module, strategy=FSDP2Strategy(), devices=dist_size(), max_steps=1)
    return str(caught.value)


def test_a_module_is_refused_that_other_settings_have_sharded() -> None:
    for message in run_distributed(one_module_two_strategies):
        assert "sharded before with strategy=ZeroPPStrategy (now FSDP2Strategy)" in message


def on_one_node() -> None:
    run(ZeroPPStrategy(), max_steps=1)


def test_rounding_on_one_node_is_warned_of() -> None:
    with pytest.raises(UserWarning, match="has one node of 2 ranks"):
        run_distributed(on_one_node)


def refused(options: dict[str, Any]) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        run(ZeroPPStrategy(**options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ranks_per_node": 3}, r"ranks_per_node=3 does not divide 2 ranks"),
        ({"ranks_per_node": 1}, r"hpz=True .* ranks_per_node=1 on 2 nodes"),
    ],
    ids=["no nodes", "one rank"],
)
def test_ranks_that_make_no_nodes_are_refused_on_all_of_them(
    options: dict[str, Any], text: str
) -> None:
    for message in run_distributed(refused, 2, args=(options,)):
        assert re.search(text, message)


def differing() -> str:
    switch = os.environ["RANK"] == "0"
    with pytest.raises(MisconfigurationException) as caught:
        run(ZeroPPStrategy(ranks_per_node=1, hpz=False, quantize_weights=switch))
    return str(caught.value)


def test_ranks_that_disagree_about_a_switch_are_refused() -> None:
    for message in run_distributed(differing):
        assert "Ranks disagree about quantize_weights" in message


@pytest.mark.parametrize(
    "options",
    [{"weight_format": "int2"}, {"gradient_format": "fp8"}, {"block_size": 100}, {"error_beta": 1}],
    ids=str,
)
def test_what_codes_cannot_be_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}=.* is not allowed"):
        ZeroPPStrategy(**options)
