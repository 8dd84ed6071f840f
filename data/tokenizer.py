"""The small tokenizer of a model that is built from scratch: byte-level BPE, trained on the task's own texts.

Byte-level, so that every text can be encoded and decodes to itself; merges never cross words, so in the terse
wordings each word ends up as one token. The library is Hugging Face's `tokenizers`, and the
tokenizer.json that it saves loads in `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # ends every completion; the only special token, always id 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn at most `vocab_size` tokens (256 bytes and the end token among them) from these texts."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END}), not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
