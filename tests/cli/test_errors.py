"""A wrong name or value on the command line: what was given, and what is allowed, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.cli_parts import made, parsed

CALLBACKS, OPTIM = "lightning_ext.callbacks", "lightning_ext.optim"
ADAPTIVE = f"--trainer.callbacks={CALLBACKS}.AdaptiveBatchSize"
# The line, and what is said of it.
REFUSED_BY_TYPE = {
    f"--trainer.callbacks={CALLBACKS}.EMAA": ("'lightning_ext.callbacks' has no attribute 'EMAA'",),
    f"--trainer.callbacks={CALLBACKS}.EMA --trainer.callbacks.decay=much": (
        'Parser key "decay"',
        "Expected a <class 'float'>. Got value: much",
    ),
    f"--trainer.callbacks={CALLBACKS}.GradientNoiseScale --trainer.callbacks.source=all": (
        'Parser key "source"',
        "'micro_batches'",
        "Got value: all",
    ),
    f"--trainer.callbacks={CALLBACKS}.LargeBatchRecipe --trainer.callbacks.on_problem=stop": (
        "['print', 'warn', 'raise']. Got value: stop",
    ),
    f"{ADAPTIVE} --trainer.callbacks.rule=0:8 --trainer.callbacks.progress=epochs": (
        "['auto', 'samples', 'gain', 'steps']. Got value: epochs",
    ),
    f"{ADAPTIVE} --trainer.callbacks.max_samples=9": ("arguments are required: rule",),
    f"--optimizer={OPTIM}.LAMBB": ("'lightning_ext.optim' has no attribute 'LAMBB'",),
    f"--optimizer={OPTIM}.LAMB --optimizer.form=nv": ("['paper', 'nvlamb']. Got value: nv",),
    f"--optimizer={OPTIM}.LAMB --optimizer.rate=1": ("Option 'rate' is not accepted",),
    f"--optimizer={OPTIM}.LAMB --optimizer.lr=high": ('Parser key "lr"', "<class 'float'>"),
    f"--model.wrap={OPTIM}.LAWN": ("arguments are required: free_steps",),
    f"--model.schedule={OPTIM}.SampleWSD --model.schedule.shape=cosine": (
        "['linear', 'sqrt']. Got value: cosine",
    ),
    "--trainer.strategy=lightning_ext.strategies.ZeroPPStrategy --trainer.strategy.hpz=maybe": (
        'Parser key "hpz"',
        "Expected a <class 'bool'>. Got value: maybe",
    ),
}
REFUSED_BY_US = {
    f"{ADAPTIVE} --trainer.callbacks.rule=nois": "rule 'nois' is not known; choose 'noise_scale'",
    f"{ADAPTIVE} --trainer.callbacks.rule=geodamp": "has no default for factor and every_samples",
    f"{ADAPTIVE} --trainer.callbacks.rule=0:8 --trainer.callbacks.lr_rule=cubic": "lr_rule was",
    f"--trainer.callbacks={CALLBACKS}.EMA --trainer.callbacks.decay=2": "decay was 2.0",
}


@pytest.mark.parametrize("line", REFUSED_BY_TYPE)
def test_the_parser_says_what_is_wrong(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(*line.split())
    assert end.value.code == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert all(text in error for text in REFUSED_BY_TYPE[line]), error


@pytest.mark.parametrize("line", REFUSED_BY_US)
def test_what_the_parser_cannot_know_is_said_by_the_object(line: str) -> None:
    with pytest.raises(ValueError, match=REFUSED_BY_US[line]):
        made(parsed(*line.split()))


def test_a_file_with_a_wrong_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"trainer:\n  callbacks:\n  - class_path: {CALLBACKS}.EMA\n    init_args: {{dekay: 0.9}}\n",
        "utf-8",
    )
    with pytest.raises(SystemExit):
        parsed(f"--config={path}")
    assert "Option 'dekay' is not accepted" in capsys.readouterr().err
