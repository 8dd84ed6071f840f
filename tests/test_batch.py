"""Batches: which examples come next, and how they are cut into micro-batches."""

import itertools
import weakref

import pytest
import torch
from test_sasr import ragged_batch

from data.batch import Batch, TokenBudget, default_max_tokens, micro_batches, shuffled

CPU = torch.device("cpu")


def sequences_of(micro):
    """Which sequences of the batch are in a micro-batch, in its order."""
    return list(dict.fromkeys(micro.batch_index.tolist()))


@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_keep_the_budget_and_every_sequence(shared):
    batch = ragged_batch(count=40)
    for i, prompt in enumerate(batch.prompts):
        batch.prompts[i] = batch.prompts[i // 8] if shared else [*prompt, i]
    before = [0, *itertools.accumulate(map(len, batch.completions))]
    pieces = micro_batches(batch, 50, CPU)
    assert sorted(itertools.chain(*map(sequences_of, pieces))) == list(range(40))
    assert any(len(piece.prompts) < len(sequences_of(piece)) for piece in pieces) == shared
    for piece in pieces:
        sequences = sequences_of(piece)
        assert len(piece.prompt_index) == len(piece.completions) == len(sequences)
        assert piece.prompts.numel() + piece.completions.numel() <= 50
        assert piece.targets.tolist() == [token for i in sequences for token in batch.completions[i]]
        assert piece.token_index.tolist() == [n for i in sequences for n in range(before[i], before[i + 1])]
        assert [sequences[row] for row in piece.sequence_index.tolist()] == piece.batch_index.tolist()
        real = 0
        for row, i in enumerate(sequences):
            length = piece.prompt_lengths[piece.prompt_index[row]]
            read = piece.prompts[piece.prompt_index[row], :length].tolist()
            read += piece.completions[row, : max(len(batch.completions[i]) - 1, 0)].tolist()
            assert read == batch.prompts[i] + batch.completions[i][:-1]
            real += len(batch.completions[i]) - 1
        distinct = {tuple(batch.prompts[i]) for i in sequences}
        read = piece.prompts.numel() + piece.completions.numel()
        assert piece.padding == read - real - sum(map(len, distinct))


def test_the_cut_that_reads_less_is_taken():
    ragged_prompts = Batch([[1] * n for n in (2, 100, 3, 99)], [[1] * n for n in (5, 6, 7, 8)])
    pieces = micro_batches(ragged_prompts, 230, CPU)
    assert [sequences_of(piece) for piece in pieces] == [[0, 2], [3, 1]]
    ragged_completions = Batch([[1], [1], [2], [2]], [[1] * n for n in (3, 100, 4, 99)])
    pieces = micro_batches(ragged_completions, 210, CPU)
    assert [sequences_of(piece) for piece in pieces] == [[0, 2], [3, 1]]


def test_a_batch_without_any_token_to_learn_has_no_micro_batch():
    assert micro_batches(Batch([[1, 2], [3]], [[], []]), 100, CPU) == []


def test_shuffled_epochs_show_everything_once_each_however_it_is_cut():
    whole = shuffled(10, 0, 30, 7, "prompts")
    assert [sorted(whole[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert whole[:10] != whole[10:20]
    cut = [i for start in range(0, 30, 4) for i in shuffled(10, start, min(4, 30 - start), 7, "prompts")]
    assert cut == whole
    assert shuffled(3, 0, 12, 7, "prompts")[:3] != [0, 1, 2] or shuffled(3, 0, 12, 8, "prompts")[:3] != [0, 1, 2]
    assert shuffled(10, 0, 10, 7, "demonstrations") != whole[:10]


def test_out_of_memory_halves_the_tokens_until_it_fits_and_keeps_that():
    texts = []
    budget = TokenBudget(default_max_tokens(0, CPU), texts.append)

    def needs(limit, tokens):
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tokens

    assert budget.retry_on_oom(needs, 600) == 512
    assert budget.retry_on_oom(needs, 2000) == 512
    assert texts == [f"out of memory: --tokens-per-microbatch is {tokens} from here on" for tokens in (1024, 512)]
    with pytest.raises(torch.OutOfMemoryError):
        budget.retry_on_oom(needs, 0)


def test_what_a_failed_attempt_held_in_a_circle_is_gone_before_the_next():
    held = []

    def attempt(tokens):
        if not held:
            circle = torch.nn.Module()
            object.__setattr__(circle, "itself", circle)
            held.append(weakref.ref(circle))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return held[0]()

    assert TokenBudget(64, print).retry_on_oom(attempt) is None
