"""What the study trains: the language model, at its start as often as a sweep needs it."""

from __future__ import annotations

from lightning.pytorch import Callback

from examples.language_model.module import GPT
from lightning_ext.callbacks import EMA
from lightning_ext.scaling import half_life_to_decay

HALF_LIFE_SAMPLES = 512  # of the average that is evaluated


class FreshGPT(GPT):
    """The language model, with what each run of the study needs anew."""

    def fresh(self, lr: float) -> GPT:
        """Another one, with weights drawn from the seeded generator."""
        settings = {key: value for key, value in self.hparams.items() if key[0] != "_"}  # the CLI's
        return GPT(**settings | {"lr": lr})


def average(global_batch: int) -> list[Callback]:
    """The averaged weights, which are what is evaluated."""
    decay = half_life_to_decay(half_life_samples=HALF_LIFE_SAMPLES, global_batch=global_batch)
    return [EMA(decay, reference_batch=global_batch, warmup=True)]
