"""Batches: which examples come next, and how they go through the model, padded and a few at a time.

Each draw is a function of the seed, its purpose and a count, so that a resumed run draws the same ones.

Shape letters: B sequences of a batch, b of a micro-batch, q distinct prompts of it, T time, N completion tokens.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PURPOSES = {"demonstrations": 1, "prompts": 2, "alpha": 3, "samples": 4, "probe": 5, "evaluation": 6, "hints": 7}


def rng_for(seed: int, purpose: str, count: int) -> np.random.Generator:
    return np.random.default_rng([seed, PURPOSES[purpose], count])


def shuffled(population: int, start: int, count: int, seed: int, purpose: str) -> list[int]:
    """Indices start ... start+count of an endless sequence of epochs, each its own permutation of the population."""
    if not count:
        return []
    epochs = range(start // population, (start + count - 1) // population + 1)
    order = np.concatenate([rng_for(seed, purpose, epoch).permutation(population) for epoch in epochs])
    return order[start % population :][:count].tolist()


@dataclass
class Batch:
    """B prompts with a completion each, as token ids, and what a loss needs beside them, on the model's device.

    What belongs to tokens is flat, over the N completion tokens of the batch in order. No mask depends on token values.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    temperature: float = 1.0
    denominators: Tensor | None = None  # [B] what each token of a sequence is divided by; None: the batch's tokens
    advantages: Tensor | None = None  # [B] what multiplies the log-probs of a sequence; None in SFT: 1
    old_logprobs: Tensor | None = None  # [N]; None: on-policy, the ratio is 1
    ref_logprobs: Tensor | None = None  # [N]; None: no reference policy
    sampled_logprobs: Tensor | None = None  # [N] as the sampler gave them; only compared with

    @classmethod
    def of(cls, pairs: Iterable[tuple[list[int], list[int]]], *more) -> Self:
        """pairs: a prompt and its completion each."""
        return cls(*map(list, zip(*pairs, strict=True)), *more)


@dataclass
class MicroBatch:
    """Some sequences of a batch, padded on the right. A prompt that several of them share is there once.

    The last token of a completion is never read: nothing follows it. Where no two sequences share a prompt, `prompts`
    are the whole sequences and `completions` has no columns: plain causal attention is faster.
    """

    prompts: Tensor  # [q, T_prompt] int64
    prompt_lengths: Tensor  # [q]
    prompt_index: Tensor  # [b] the prompt of each sequence
    completions: Tensor  # [b, T - 1] int64
    sequence_index: Tensor  # [N] the sequence of each completion token, among those here
    position: Tensor  # [N] its place in the completion; in a whole sequence, that of the token before it
    targets: Tensor  # [N] the token itself
    batch_index: Tensor  # [N] the sequence of each completion token, among those of the batch
    token_index: Tensor  # [N] its place among all completion tokens of the batch
    padding: int  # entries of prompts and completions that hold no token


def micro_batches(
    batch: Batch, max_tokens: int, device: torch.device, rows: Iterable[int] | None = None, share_prompts: bool = True
) -> list[MicroBatch]:
    """Cut a batch, or those rows of it, into pieces that read at most `max_tokens`, padding included.

    Completions of like length need little padding; those of one prompt share it. Whichever reads fewer tokens is taken.
    """
    rows = range(len(batch.prompts)) if rows is None else rows
    numbers: dict[tuple[int, ...], int] = {}
    group = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in batch.prompts]
    group = group if share_prompts else list(range(len(group)))
    prompt_lengths = list(map(len, batch.prompts))
    read_lengths = [max(len(completion) - 1, 0) for completion in batch.completions]

    def tokens_read(piece: list[int]) -> int:
        of_prompts = len({group[i] for i in piece}) * max(prompt_lengths[i] for i in piece)
        return of_prompts + len(piece) * max(read_lengths[i] for i in piece)

    by_completion = sorted(rows, key=lambda i: (read_lengths[i], group[i]))
    by_prompt = sorted(rows, key=lambda i: (prompt_lengths[i], group[i], read_lengths[i]))
    cuts = [pack_by_tokens(order, tokens_read, max_tokens) for order in (by_completion, by_prompt)]
    best = min(cuts, key=lambda pieces: sum(map(tokens_read, pieces)))
    before = [0, *accumulate(map(len, batch.completions))]  # completion tokens before each sequence
    pieces = [piece for piece in best if any(batch.completions[i] for i in piece)]
    return [collate(batch, piece, before, device, share_prompts) for piece in pieces]


def pack_by_tokens(order: list[int], tokens_read: Callable[[list[int]], int], max_tokens: int) -> list[list[int]]:
    """Consecutive pieces, each as long as it reads at most `max_tokens`, or of a single sequence."""
    pieces: list[list[int]] = []
    for i in order:
        if pieces and tokens_read([*pieces[-1], i]) <= max_tokens:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


def collate(
    batch: Batch, piece: list[int], before: list[int], device: torch.device, share_prompts: bool = True
) -> MicroBatch:
    """The sequences `piece` of a batch as tensors; before [B + 1]: how many tokens of the batch come before each."""
    prompts = [tuple(batch.prompts[i]) for i in piece]
    prompts = list(dict.fromkeys(prompts)) if share_prompts else prompts
    completions = [batch.completions[i] for i in piece]
    read = [completion[:-1] for completion in completions]
    if len(prompts) < len(piece):
        prompt_index = [prompts.index(tuple(batch.prompts[i])) for i in piece]
        first = [0] * len(piece)  # the place of each completion's first token
    else:
        prompt_index = list(range(len(piece)))
        first = [len(prompt) - 1 for prompt in prompts]
        prompts = [(*prompt, *rest) for prompt, rest in zip(prompts, read, strict=True)]
        read = [[]] * len(piece)
    lengths = list(map(len, completions))
    flat = {
        "prompt_lengths": map(len, prompts),
        "prompt_index": prompt_index,
        "sequence_index": chain(*([row] * length for row, length in enumerate(lengths))),
        "position": chain(*(range(start, start + length) for start, length in zip(first, lengths, strict=True))),
        "targets": chain(*completions),
        "batch_index": chain(*([i] * length for i, length in zip(piece, lengths, strict=True))),
        "token_index": chain(*(range(before[i], before[i + 1]) for i in piece)),
    }
    padded = {
        name: pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in sequences], batch_first=True).to(device)
        for name, sequences in (("prompts", prompts), ("completions", read))
    }
    return MicroBatch(
        **padded,
        **{name: torch.tensor(list(values), dtype=torch.long, device=device) for name, values in flat.items()},
        padding=sum(tensor.numel() for tensor in padded.values()) - sum(map(len, [*prompts, *read])),
    )


def default_max_tokens(limit: int, device: torch.device) -> int:
    """Tokens that go through the model at once, padding included, where --tokens-per-microbatch is `limit`."""
    return limit or (2048 if device.type == "cpu" else 16384)


class TokenBudget:
    """How many tokens go through the model at once: fewer from the moment that memory runs out."""

    def __init__(self, tokens: int, say: Callable[[str], None]):
        self.tokens, self.say = tokens, say

    def retry_on_oom(self, function, *args):
        """function(*args, tokens); while it runs out of memory, again with half the tokens at once."""
        while True:
            try:
                return function(*args, self.tokens)
            except torch.OutOfMemoryError:
                if self.tokens < 32:  # by now each sequence has long been alone
                    raise
            gc.collect()  # the error, its traceback and with them tensors may refer to each other in a circle
            self.tokens //= 2
            self.say(f"out of memory: --tokens-per-microbatch is {self.tokens} from here on")
