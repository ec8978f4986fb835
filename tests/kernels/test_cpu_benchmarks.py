"""Scripts of `benchmarks` for a CPU, as far as they go without timing anything."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contrastive, normalization


def test_the_usual_batches_have_thirty_pairs_but_the_largest() -> None:
    assert contrastive.BATCHES == ["2048:30", "8192:30", "16384:10"]


def test_minutes_are_said_before_they_pass(capsys: pytest.CaptureFixture[str]) -> None:
    contrastive.say_minutes("clip_loss", 8192, 29, [500.0, 1500.0])
    assert "batch 8192: about 1.0 minutes for 29 pairs" in capsys.readouterr().out


def test_a_batch_whose_logits_fit_nowhere_is_left_out() -> None:
    assert contrastive.fits("clip_loss", 256, "cpu")
    assert not contrastive.fits("clip_loss", 10**7, "cpu")


def test_minutes_alone_leave_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["contrastive.py", "--minutes-only", "--things", "clip_loss", "--batches", "64:3"]
    monkeypatch.setattr("sys.argv", [*words, "--width", "8", "--threads", "1"])
    monkeypatch.setattr(contrastive, "write", lambda *_: pytest.fail("a row was written"))
    contrastive.main()


@pytest.mark.parametrize("thing", ["layer_norm", "rms_norm", "newton_schulz"])
def test_norms_and_matrices_are_right_before_they_are_timed(
    thing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalization, "LAYERS", ((3, 5, 8), (4, 1, 8)))
    monkeypatch.setattr(normalization, "MATRICES", ((6, 10), (8, 8)))
    found = list(normalization.all_rows([thing], "cpu"))
    for _, row in found:
        row.base_call()
        row.call()
    assert len({(shape, row.variant, row.mode, row.dtype) for shape, row in found}) == 6


def test_a_wrong_norm_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = normalization.inputs_of("layer_norm", (3, 5, 8), "cpu")
    own = normalization.own_layer
    monkeypatch.setattr(
        normalization, "own_layer", lambda thing, norms: own(thing, torch.zeros_like(norms))
    )
    with pytest.raises(AssertionError, match="layer_norm"):
        normalization.check_layer("layer_norm", inputs)
