"""Bytes as they are, or pairs of bytes that training files have often.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units";
    on bytes as in Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
    section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BYTES = 256


class Bytes:
    """Every byte is a token.

    Args:
        vocabulary: 256.

    Raises:
        ValueError: Another vocabulary.
    """

    def __init__(self, vocabulary: int = BYTES) -> None:
        if vocabulary != BYTES:
            raise ValueError(
                f"vocabulary={vocabulary}; there are {BYTES} bytes. Hint: tokenizer='bpe'."
            )

    def encode(self, texts: Iterable[bytes]) -> Tensor:
        """Bytes of all texts in a row, uint8."""
        joined = bytearray()
        for text in texts:
            joined += text
        if not joined:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(joined, dtype=torch.uint8)

    def decode(self, tokens: Tensor) -> bytes:
        """The text again."""
        return tokens.numpy().tobytes()

    def bytes_per_token(self, tokens: Tensor) -> float:
        """One."""
        return 1.0


class BytePairs:
    """Byte-level pair encoding, learnt on the spot; any text can be written with it.

    What is no UTF-8 is read as the replacement character.

    Args:
        texts: To learn on, once.
        vocabulary: At most as many tokens, the 256 bytes among them.

    Raises:
        ValueError: Fewer than 256 tokens.
        ModuleNotFoundError: The package ``tokenizers`` is missing.
    """

    def __init__(self, texts: Iterable[bytes], vocabulary: int) -> None:
        if vocabulary < BYTES:
            raise ValueError(f"vocabulary={vocabulary}; at least {BYTES}, one for every byte.")
        if find_spec("tokenizers") is None:
            raise ModuleNotFoundError(
                "tokenizer='bpe' needs the package tokenizers, of the extra 'examples': pip install"
                " -c constraints.txt -e '.[examples]'. Hint: or tokenizer='bytes'."
            )
        self._pairs = _learnt(texts, vocabulary)
        # The library writes every byte of a token as one character.
        names = map(self._pairs.id_to_token, range(self._pairs.get_vocab_size()))
        self._lengths = torch.tensor([len(name) for name in names])

    def encode(self, texts: Iterable[bytes]) -> Tensor:
        """Tokens of all texts in a row, int32."""
        found = (self._pairs.encode(_read(text)).ids for text in texts)
        rows = [torch.tensor(ids, dtype=torch.int32) for ids in found]
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int32)

    def decode(self, tokens: Tensor) -> bytes:
        """The text again."""
        text: str = self._pairs.decode(tokens.tolist())
        return text.encode()

    def bytes_per_token(self, tokens: Tensor) -> float:
        """Mean length of these tokens in bytes."""
        return self._lengths[tokens.long()].double().mean().item()


def _learnt(texts: Iterable[bytes], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(map(_read, texts), trainer)
    return pairs


def _read(text: bytes) -> str:
    return text.decode("utf-8", "replace")
