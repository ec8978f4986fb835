"""DTensors are refused in words where an operation does not know how to split them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

from lightning_ext.functional import (
    Quantized,
    block_logsumexp,
    clip_loss,
    decode_state,
    dequantize,
    encode_state,
    layer_norm,
    nt_xent_loss,
    quantize,
    rms_norm,
    round_stochastic,
    siglip_loss,
)


def _calls(x: DTensor) -> dict[str, Callable[[], object]]:
    plain = torch.ones(2, 4)
    codes = quantize(plain, "int8")
    state = encode_state(plain, "int8")
    return {
        "clip_loss": lambda: clip_loss(x, plain, 1.0),
        "nt_xent_loss": lambda: nt_xent_loss(x, x, 1.0),
        "siglip_loss": lambda: siglip_loss(plain, x, 1.0, 0.0),
        "block_logsumexp": lambda: block_logsumexp(plain, plain, x.sum()),
        "layer_norm": lambda: layer_norm(plain, 4, x[0], x[0]),
        "rms_norm": lambda: rms_norm(x, 4, plain[0]),
        "norms": lambda: layer_norm(x, 4, x[0], sample_sq_norms=torch.zeros(1, 2)),
        "round_stochastic": lambda: round_stochastic(x, seed=0),
        "encode_state": lambda: encode_state(x, "int8"),
        "decode_state": lambda: decode_state(state._replace(scales=x[0])),
        "quantize": lambda: quantize(x, "int8"),
        "dequantize": lambda: dequantize(Quantized(codes.codes, x, *codes[2:])),
    }


def _outcome() -> dict[str, str]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x: Tensor = distribute_tensor(torch.ones(2, 4), mesh, [Replicate()])
    assert isinstance(x, DTensor)
    found = {}
    for name, call in _calls(x).items():
        with pytest.raises(TypeError) as caught:
            call()
        found[name] = str(caught.value)
    found["all of them"] = str(layer_norm(x, 4, x[0], x[0]).to_local().abs().sum().item())
    return found


def test_distributed_tensors_are_refused_in_words() -> None:
    (found,) = run_distributed(_outcome, world_size=1)
    assert found.pop("all of them") == "8.0"  # torch's own norms take them
    assert {name for name, message in found.items() if "to_local()" not in message} == set()
