"""Counts on the CPU beside parameters elsewhere: they do not keep a launch away, and are copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.functional_parts import Options
from torch import Tensor

from lightning_ext.kernels import _update_calls

Copies = list[tuple[torch.device, bool]]


def _lists() -> dict[str, list[Tensor]]:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    return {name: [torch.empty(3, device="meta"), torch.empty(2, device="meta")] for name in names}


def _steps() -> list[Tensor]:
    return [torch.tensor(1.0), torch.tensor([2.0])]


@pytest.mark.parametrize("fused", [None, True])
def test_they_have_no_part_in_the_choice(
    fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def takes_codes(_: Any, tensors: list[Tensor], *, op: str) -> bool:
        seen.extend(tensors)
        return True

    monkeypatch.setattr(_update_calls, "takes_codes", takes_codes)
    monkeypatch.setattr(_update_calls, "use_triton", lambda *_, **__: True)
    steps = [*_steps()[:1], torch.empty((), device="meta")]
    assert _update_calls.wants_launch("adamw_update_", fused, _lists(), steps)
    assert all(x.device.type == "meta" for x in seen)
    assert any(x is steps[1] for x in seen)


def test_they_go_there_in_one_copy_that_nothing_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: Copies = []
    to = Tensor.to

    def recorded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copies.append((x.device, kwargs.get("non_blocking", False)))
        return to(x, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", recorded)
    _, _, counts = _update_calls.for_launch("adamw_update_", _lists(), _steps(), Options(), 0.1)
    assert copies == [(torch.device("cpu"), True)]
    assert all(x.device.type == "meta" and x.shape == () for x in counts)
    assert [x.storage_offset() * x.element_size() % 16 for x in counts] == [0, 0]


def test_they_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda x, *_, **__: to(x, "cpu"))
    _, _, counts = _update_calls.for_launch("adamw_update_", _lists(), _steps(), Options(), 0.1)
    assert [x.item() for x in counts] == [1.0, 2.0]


def test_those_on_a_third_device_are_refused() -> None:
    lists = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    steps = [torch.empty((), device="meta")]
    with pytest.raises(ValueError, match=r"steps\[0\] on meta"):
        _update_calls.for_launch("adamw_update_", lists, steps, Options(), 0.1)


def test_numbers_on_the_cpu_go_there_too() -> None:
    numbers = {"clip": torch.tensor(1.0), "found_inf": 0.0, "grad_scale": torch.tensor([2.0])}
    rate, options, _ = _update_calls.for_launch(
        "adamw_update_", _lists(), _steps(), Options(**numbers), torch.tensor(0.1)
    )
    for x in (rate, options.clip, options.found_inf, options.grad_scale):
        assert x.device.type == "meta"
        assert x.dtype == torch.float32
