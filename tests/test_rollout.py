"""The sampler: greedy against `transformers.generate`, draws against the model's own distribution, and its promises.

What a log-prob should be is worked out here a second time, in fp64 and by a plain loop over the sorted vocabulary,
from a full forward without a cache.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_model import randomise
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rollout
from data.tokenizer import train_tokenizer
from model import ModelConfig, Transformer
from rollout import (
    Rollout,
    Sampler,
    SamplingParams,
    generate,
    graphs_wanted,
    length_buckets,
    resolve_device,
    sample_tokens,
    token_distribution,
)

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
PROMPTS = [[5, 7, 9, 11, 13, 15, 17], [3], [8, 1, 8, 2, 8], [40, 41], [0, 0, 59]]


def random_model(family: str = "qwen3", *, scale: float = 0.25, seed: int = 0, **config) -> Transformer:
    """Every parameter random. A larger scale gives more peaked distributions."""
    return randomise(Transformer(ModelConfig.from_dict({"model_type": family} | SHAPE | config)), seed, scale)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greedy(max_new_tokens: int, stop_token_ids: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_new_tokens, temperature=0.0, stop_token_ids=stop_token_ids)


@pytest.fixture
def batch_sizes(monkeypatch) -> list[int]:
    """The number of rows of each forward: what tells whether ended rows have left."""
    sizes, forward = [], Transformer.forward

    def spy(self, input_ids, *args, **kwargs):
        sizes.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", spy)
    return sizes


# ----------------------------------------------------------------------------- greedy, against transformers


def their_greedy(path: Path, prompts: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[list[int]]:
    """transformers' generate on prompts padded on the left; each completion up to its first stop token, kept."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    longest = max(map(len, prompts))
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=0
    )
    output = theirs.generate(
        input_ids=torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        generation_config=config,
    )
    completions = output[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in completions]
    return [row[:end] for row, end in zip(completions, ends, strict=True)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_equals_transformers_generate(family, tmp_path):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    longest = 14
    free = generate(model, PROMPTS, greedy(longest))
    assert free.completions == their_greedy(tmp_path, PROMPTS, longest, [])
    assert free.finished == [False] * len(PROMPTS)
    assert len({tuple(row) for row in free.completions}) == len(PROMPTS)

    # Two end tokens that some rows meet and others do not, at different steps.
    stops = (free.completions[0][2], free.completions[2][7])
    ended = generate(model, PROMPTS, greedy(longest, stops))
    assert ended.completions == their_greedy(tmp_path, PROMPTS, longest, list(stops))
    assert ended.finished == [row[-1] in stops for row in ended.completions]
    assert len({len(row) for row in ended.completions}) > 1


def test_greedy_tokens_have_log_prob_zero():
    result = generate(random_model(), PROMPTS[:2], greedy(4))
    assert result.logprobs == [[0.0] * 4] * 2


# ----------------------------------------------------------------------------- where completions end


def first_stop(row: list[int], stops: tuple[int, ...]) -> int:
    return next((i + 1 for i, token in enumerate(row) if token in stops), len(row))


def test_rows_that_end_leave_the_batch_without_changing_the_others(batch_sizes):
    model = random_model(seed=3)
    prompts = [[i, 2 * i, 7] for i in range(16)]
    free = generate(model, prompts, greedy(24))
    assert batch_sizes == [16] * 24
    batch_sizes.clear()
    stops, left = (), free.completions  # end tokens that leave a few rows running to the end
    while len(left) > 6:
        stops += (next(t for t in left[0][1:] if 0 < sum(t not in row for row in left) < len(left)),)
        left = [row for row in left if stops[-1] not in row]
    ended = generate(model, prompts, greedy(24, stops))
    assert ended.completions == [row[: first_stop(row, stops)] for row in free.completions]
    assert ended.finished == [any(token in stops for token in row) for row in free.completions]
    assert set(ended.finished) == {True, False}
    assert batch_sizes[0] == 16
    assert batch_sizes[-1] <= 8  # at least half have left


def test_the_stop_token_is_kept_and_nothing_follows_it():
    stops = (4, 9, 17, 30, 31)
    params = SamplingParams(12, stop_token_ids=stops)
    result = generate(random_model(), PROMPTS, params, group_size=40, generator=seeded(0))
    for row, logprobs, finished in zip(result.completions, result.logprobs, result.finished, strict=True):
        assert len(logprobs) == len(row)
        assert not any(token in stops for token in row[:-1])
        assert finished == (row[-1] in stops)
        assert finished or len(row) == 12
    lengths = {len(row) for row in result.completions}
    assert {1, 12} <= lengths  # stops at the very first token, and rows that were cut off


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_sequence_ends_a_completion_where_it_is_complete(length):
    """Cut by hand from the free completions: at the first place where the sequence has been written in full."""
    model, prompts, free = random_model(), PROMPTS * 4, SamplingParams(24)
    rows = generate(model, prompts, free, generator=seeded(0)).completions
    stops = tuple(
        tuple(row[start : start + length]) for row, start in ((rows[0], 0), (rows[1], 9), (rows[2], 24 - length))
    )

    def ended(row: list[int]) -> bool:
        return any(tuple(row[-len(stop) :]) == stop for stop in stops)

    expected = [next((row[:n] for n in range(1, 25) if ended(row[:n])), row) for row in rows]
    assert {length, 9 + length, 24} <= set(map(len, expected))
    result = generate(model, prompts, SamplingParams(24, stop_sequences=stops), generator=seeded(0))
    assert result.completions == expected
    assert result.finished == list(map(ended, expected))
    assert set(result.finished) == {True, False}


def test_an_empty_stop_sequence_is_refused():
    with pytest.raises(ValueError, match="stop_sequences: an empty one"):
        SamplingParams(4, stop_sequences=((1,), ()))


def test_a_stop_token_drawn_at_the_last_step_counts_as_finished():
    model = random_model()
    free = generate(model, PROMPTS[:1], greedy(6))
    row = free.completions[0]
    last = next(i for i in range(5, -1, -1) if row[i] not in row[:i])  # the latest token that is new
    result = generate(model, PROMPTS[:1], greedy(last + 1, (row[last],)))
    assert result.completions == [row[: last + 1]]
    assert result.finished == [True]


def test_when_all_rows_have_ended_no_more_steps_are_taken(batch_sizes):
    model = random_model()
    everything = tuple(range(SHAPE["vocab_size"]))
    result = generate(model, PROMPTS, SamplingParams(40, stop_token_ids=everything), generator=seeded(0))
    assert [len(row) for row in result.completions] == [1] * len(PROMPTS)
    assert all(result.finished)
    assert len(batch_sizes) < 8


def test_one_new_token_needs_the_prefill_alone(batch_sizes):
    model = random_model()
    result = generate(model, PROMPTS, greedy(1))
    for prompt, row in zip(PROMPTS, result.completions, strict=True):
        assert row == [model.logits(model(torch.tensor([prompt])))[0, -1].argmax().item()]
    assert batch_sizes[0] == len(PROMPTS)
    assert len(batch_sizes) == 1 + len(PROMPTS)  # the others are this test's own


def test_groups_come_prompt_major():
    model = random_model()
    single = generate(model, PROMPTS, greedy(5))
    grouped = generate(model, PROMPTS, greedy(5), group_size=3)
    assert grouped.completions == [row for row in single.completions for _ in range(3)]
    assert len(grouped.logprobs) == len(grouped.finished) == 3 * len(PROMPTS)


def test_no_prompts_give_an_empty_rollout():
    assert generate(random_model(), [], greedy(5)) == Rollout([], [], [])


# ----------------------------------------------------------------------------- log-probs


def brute_force(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """Probabilities of one row of logits [V]: temperature, then top-k, then top-p of what is left. A plain loop."""
    scaled = [value / params.temperature for value in logits.double().tolist()]
    peak = max(scaled)
    weights = [math.exp(value - peak) for value in scaled]
    likeliest = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = likeliest[: params.top_k] if params.top_k else likeliest
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= params.top_p:
            break
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3},
        {"top_k": 7},
        {"top_p": 0.6},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_log_probs_are_those_of_the_distribution_drawn_from(options, batch_sizes):
    model = random_model(seed=1)
    params = SamplingParams(14, stop_token_ids=tuple(range(12)), **options)
    result = generate(model, PROMPTS, params, group_size=8, generator=seeded(7))
    assert batch_sizes[-1] < batch_sizes[1]  # rows have left, and the log-probs are right all the same
    for index, (row, logprobs) in enumerate(zip(result.completions, result.logprobs, strict=True)):
        prompt = PROMPTS[index // 8]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + row])))[0, len(prompt) - 1 : -1]  # [T, V]
        expected = [math.log(brute_force(step, params)[token]) for step, token in zip(logits, row, strict=True)]
        assert logprobs == pytest.approx(expected, abs=1e-4)
        if not params.top_k and params.top_p == 1:
            score = (logits / params.temperature).log_softmax(-1)
            assert logprobs == pytest.approx(score.gather(-1, torch.tensor(row)[:, None])[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize("top_k", [0, 1, 5, 60, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_token_distribution_equals_brute_force(temperature, top_k, top_p):
    params = SamplingParams(1, temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 3 * torch.randn(6, 60, generator=seeded(0), dtype=torch.float64)
    expected = torch.tensor([brute_force(row, params) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(token_distribution(logits, params).exp(), expected, atol=1e-9, rtol=0)


def kept(logits: list[float], **options) -> list[float]:
    """Probabilities by token_distribution, for the cases worked by hand."""
    return token_distribution(torch.tensor([logits]), SamplingParams(1, **options)).exp()[0].tolist()


HALVES = [math.log(8), math.log(4), math.log(2), math.log(2)]  # 1/2, 1/4, 1/8, 1/8


def test_top_k_by_hand():
    assert kept(HALVES, top_k=1) == pytest.approx([1, 0, 0, 0])
    assert kept(HALVES, top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept(HALVES, top_k=4) == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8])


def test_top_k_keeps_all_tokens_that_tie_with_the_last_one():
    assert kept([1.0, 3.0, 1.0, 0.0, 1.0], top_k=2)[3] == 0.0
    assert kept([1.0, 1.0, 0.0, 1.0], top_k=2) == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert kept(HALVES, top_k=3) == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8])


def test_top_p_by_hand():
    assert kept(HALVES, top_p=0.4) == pytest.approx([1, 0, 0, 0])
    assert kept(HALVES, top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept(HALVES, top_p=0.9) == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8])


def test_top_p_keeps_the_likeliest_token_however_small_p_is():
    assert kept(HALVES, top_p=1e-9) == pytest.approx([1, 0, 0, 0])
    assert kept([0.0] * 4, top_p=1e-9).count(1.0) == 1


def test_top_p_stops_at_the_token_that_reaches_p_exactly():
    """Equal logits make probabilities of exactly 1/4, so the sums are exact too."""
    even = [0.0] * 4
    assert sorted(kept(even, top_p=0.25)) == [0, 0, 0, 1]
    assert sorted(kept(even, top_p=0.5)) == pytest.approx([0, 0, 1 / 2, 1 / 2])
    assert sorted(kept(even, top_p=0.5001)) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert sorted(kept(even, top_p=1.0)) == [1 / 4] * 4


def test_top_p_is_taken_of_what_top_k_left_at_the_temperature_given():
    # Of 2/3 and 1/3, two thirds reach 0.6; of 1/2 and 1/4 they would not.
    assert kept(HALVES, top_k=2, top_p=0.6) == pytest.approx([1, 0, 0, 0])
    # Temperature 1/2 squares: 64, 16, 4, 4 of 88, and 64/88 = 0.727 reaches 0.7.
    assert kept(HALVES, temperature=0.5, top_p=0.7) == pytest.approx([1, 0, 0, 0])


def test_temperature_zero_puts_all_mass_on_the_first_of_the_best():
    assert kept([0.0, 2.0, 2.0, 1.0], temperature=0.0) == [0, 1, 0, 0]


def test_the_logits_given_are_not_changed():
    logits = torch.randn(2, 9, generator=seeded(0))
    copy = logits.clone()
    token_distribution(logits, SamplingParams(1, temperature=0.5, top_k=3, top_p=0.5))
    token_distribution(logits, greedy(1))
    assert torch.equal(logits, copy)


# ----------------------------------------------------------------------------- frequencies

DRAWS = 20_000
UNLIKELY = 70.0  # with at most 11 degrees of freedom the chance of a larger chi-square is about 1e-10


def chi_square(counts: list[int], probs: list[float]) -> float:
    """Pearson's statistic. Cells that expect fewer than 5 are pooled; a draw of probability 0 is infinitely far off."""
    total, statistic, pooled_count, pooled_expected = sum(counts), 0.0, 0, 0.0
    for count, prob in zip(counts, probs, strict=True):
        expected = total * prob
        if expected == 0 and count:
            return math.inf
        if expected < 5:
            pooled_count, pooled_expected = pooled_count + count, pooled_expected + expected
        else:
            statistic += (count - expected) ** 2 / expected
    return statistic + ((pooled_count - pooled_expected) ** 2 / max(pooled_expected, 5) if pooled_expected else 0)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"temperature": 1.5}, {"top_k": 4}, {"top_p": 0.7}], ids=str
)
def test_tokens_are_drawn_as_often_as_the_model_says(options):
    """First tokens, and second tokens given the first, of 20,000 completions of one prompt."""
    vocab, prompt = 12, [3, 1, 4]
    shape = {"vocab_size": vocab, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = random_model(seed=2, scale=0.2, **shape)
    params = SamplingParams(2, **options)
    result = generate(model, [prompt], params, group_size=DRAWS, generator=seeded(11))

    @torch.no_grad()
    def logits_after(*tokens: int) -> torch.Tensor:
        return model.logits(model(torch.tensor([[*prompt, *tokens]])))[0, -1]

    counts = [[0] * vocab for _ in range(vocab)]  # of second tokens, by first token
    for first, second in result.completions:
        counts[first][second] += 1
    firsts = [sum(row) for row in counts]
    assert sum(firsts) == DRAWS
    assert chi_square(firsts, brute_force(logits_after(), params)) < UNLIKELY
    if options:  # the plain softmax is told apart from what was asked for
        assert chi_square(firsts, brute_force(logits_after(), SamplingParams(2))) > 5 * UNLIKELY
    frequent = [token for token in range(vocab) if firsts[token] >= 500]
    assert len(frequent) >= 3
    for first in frequent:
        assert chi_square(counts[first], brute_force(logits_after(first), params)) < UNLIKELY
    # and the second token does depend on the first
    assert max(chi_square(counts[first], brute_force(logits_after(), params)) for first in frequent) > 5 * UNLIKELY


def test_equal_seeds_give_equal_rollouts_and_other_seeds_do_not():
    model, params = random_model(), SamplingParams(8, stop_token_ids=(4, 5))
    first = generate(model, PROMPTS, params, group_size=3, generator=seeded(1))
    assert generate(model, PROMPTS, params, group_size=3, generator=seeded(1)) == first
    assert generate(model, PROMPTS, params, group_size=3, generator=seeded(2)).completions != first.completions
    assert len({tuple(row) for row in first.completions[:3]}) > 1  # the rows of a group are drawn one by one


def test_only_the_generator_given_is_drawn_from():
    model, state = random_model(), torch.get_rng_state()
    generate(model, PROMPTS, SamplingParams(3), generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_leaves_no_gradient_behind_and_the_model_unchanged():
    model = random_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    generate(model, PROMPTS, SamplingParams(3), generator=seeded(1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_bf16_model_samples_with_fp32_log_probs():
    model = random_model().bfloat16()
    result = generate(model, PROMPTS, SamplingParams(4), group_size=2, generator=seeded(0))
    for index, (row, logprobs) in enumerate(zip(result.completions, result.logprobs, strict=True)):
        prompt = PROMPTS[index // 2]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + row])))[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(row)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=0.15)  # bf16 sums in another order
    assert any(value != torch.tensor(value).bfloat16().item() for row in result.logprobs for value in row)


# ----------------------------------------------------------------------------- rows, chunks, buffers


STOPS = tuple(range(0, 60, 6))  # an end about every sixth token: rows leave all the time


def sampled(model: Transformer, **options):
    """20 completions of unlike lengths, the same at each call."""
    params = SamplingParams(20, stop_token_ids=STOPS)
    return generate(model, PROMPTS, params, group_size=4, generator=seeded(5), **options)


def bytes_a_row(model: Transformer, params: SamplingParams) -> int:
    return Sampler(model, params, 1, 128).cache.bytes


def assert_same_rollout(found, expected) -> None:
    assert found.completions == expected.completions
    assert found.finished == expected.finished
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_sampled_completion_does_not_depend_on_when_its_neighbours_end():
    model = random_model(seed=3)
    params = SamplingParams(20)
    free = generate(model, PROMPTS, params, group_size=8, generator=seeded(5))
    ended = generate(model, PROMPTS, SamplingParams(20, stop_token_ids=STOPS), group_size=8, generator=seeded(5))
    assert ended.completions == [row[: first_stop(row, STOPS)] for row in free.completions]
    assert len({len(row) for row in ended.completions}) > 5


@pytest.mark.parametrize("rows", [1, 5, 11, 19])
def test_chunks_change_nothing_but_their_number(rows):
    model = random_model(seed=3)
    whole = sampled(model)
    total = len(whole.completions)
    parts = sampled(model, memory_limit=rows * bytes_a_row(model, SamplingParams(20)) + 1)
    assert_same_rollout(parts, whole)
    assert (whole.chunks, parts.chunks) == (1, -(-total // rows))


def test_a_limit_that_not_even_one_row_fits_is_named():
    with pytest.raises(ValueError, match=r"cache of one completion takes 0\.\d+ GB \(128 tokens\) and the limit is"):
        sampled(random_model(), memory_limit=1000)


def test_buffers_that_are_used_again_hold_nothing_of_the_last_rollout():
    model, samplers = random_model(seed=3), {}
    params = SamplingParams(20, stop_token_ids=STOPS)
    first = sampled(model, samplers=samplers)
    (kept,) = samplers.values()
    others = [[i + 2, i] * (i + 1) for i in range(len(PROMPTS))]
    options = {"group_size": 4}
    again = generate(model, others, params, **options, generator=seeded(6), samplers=samplers)
    assert next(iter(samplers.values())) is kept
    assert_same_rollout(again, generate(model, others, params, **options, generator=seeded(6)))
    assert_same_rollout(sampled(model, samplers=samplers), first)


def test_larger_buffers_serve_a_smaller_rollout_and_change_nothing():
    model, samplers = random_model(seed=3, max_position_embeddings=400), {}
    params = SamplingParams(20, stop_token_ids=STOPS)
    generate(model, [list(range(60)) * 4], params, group_size=30, samplers=samplers)  # of 384 slots
    (large,) = samplers.values()
    assert sampled(model, samplers=samplers) == sampled(model)
    assert list(samplers.values()) == [large]


@pytest.mark.parametrize("other", ["model", "params", "rows", "slots", "limit"])
def test_buffers_that_do_not_serve_are_given_up(other):
    model, samplers = random_model(seed=3, max_position_embeddings=400), {}
    params, options = SamplingParams(20, stop_token_ids=STOPS), {"group_size": 4, "samplers": samplers}
    generate(model, PROMPTS, params, generator=seeded(5), **options)
    (kept,) = samplers.values()
    changed = {
        "model": {"model": random_model(seed=4)},
        "params": {"params": SamplingParams(20)},
        "rows": {"group_size": 5},
        "slots": {"prompts": [*PROMPTS[1:], [1] * 120]},
        "limit": {"memory_limit": kept.cache.bytes // 2},
    }[other]
    call = {"model": model, "prompts": PROMPTS, "params": params} | options | changed
    found = generate(**call, generator=seeded(5))
    assert_same_rollout(found, generate(**call | {"samplers": None}, generator=seeded(5)))
    assert kept not in samplers.values()
    assert len(samplers) == 1, "two caches must not be held for two sizes"


def test_the_rows_that_fitted_are_remembered_after_an_out_of_memory_error(monkeypatch):
    model, samplers, run, sizes = random_model(seed=3), {}, Sampler.run, []
    exact = sampled(model)

    def room_for_six(self, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 6:
            raise torch.OutOfMemoryError("none left")
        return run(self, prompts, *args)

    monkeypatch.setattr(Sampler, "run", room_for_six)
    assert_same_rollout(sampled(model, samplers=samplers), exact)
    assert sizes == [20, 10, 5, 5, 5, 5]
    sizes.clear()
    assert_same_rollout(sampled(model, samplers=samplers), exact)
    generate(model, PROMPTS * 4, greedy(2), samplers=samplers)  # new buffers, the same memory
    assert sizes == [5] * 8


def test_the_memory_of_buffers_that_are_kept_counts_as_free(monkeypatch):
    """Else every rollout would find less than the one before it, and come in more chunks."""
    model, samplers = random_model(seed=3), {}
    need = 10 * bytes_a_row(model, SamplingParams(20))
    free = {"bytes": need / 0.8 + 1}
    monkeypatch.setattr(rollout, "free_memory", lambda device: free["bytes"])
    first = sampled(model, samplers=samplers)
    (kept,) = samplers.values()
    free["bytes"] -= kept.cache.bytes
    assert sampled(model, samplers=samplers) == first
    assert first.chunks == 2
    free["bytes"] = 0  # others have taken what was left: what is held fits all the same
    assert sampled(model, samplers=samplers) == first
    assert list(samplers.values()) == [kept]


def test_what_a_model_without_probabilities_left_in_the_cache_is_not_read_again():
    """A slot that no token may attend to has weight 0, and 0 * NaN is NaN."""
    model, samplers = random_model(seed=3), {}
    exact = sampled(model)
    weight = model.model["layers"][0].self_attn.v_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.nan)
        assert math.isnan(sampled(model, samplers=samplers).logprobs[0][-1])
        weight.copy_(kept)
    assert_same_rollout(sampled(model, samplers=samplers), exact)


def test_steps_of_the_size_of_a_graph_give_what_steps_of_the_exact_size_give(monkeypatch):
    """What CUDA replays works on more rows and slots than are in use; the rest must do no harm."""
    model = random_model(seed=3)
    exact = sampled(model)
    sizes = []

    def advance(self, rows, slots):
        size = self.bucket(rows, slots)
        sizes.append((rows, size[0]))
        self._step(*size)

    monkeypatch.setattr(Sampler, "_advance", advance)
    assert_same_rollout(sampled(model), exact)
    assert any(rows < recorded for rows, recorded in sizes)


def test_rows_beyond_a_last_chunk_that_is_not_full_stay_inside_the_cache(monkeypatch):
    """A graph advances them too, and their prompts of the chunk before are longer than the slots now in use."""
    model, params = random_model(seed=3, max_position_embeddings=200), SamplingParams(20, stop_token_ids=STOPS)
    prompts = [[i, *range(50), *range(50), *range(29)] for i in range(5)] + [[i] for i in range(4)]
    exact = generate(model, prompts, params, generator=seeded(5))
    monkeypatch.setattr(Sampler, "_advance", lambda self, rows, slots: self._step(*self.bucket(rows, slots)))
    limit = 5 * Sampler(model, params, 1, 256).cache.bytes + 1
    parts = generate(model, prompts, params, generator=seeded(5), memory_limit=limit)
    assert parts.chunks == 2  # of 5 rows and of 4
    assert_same_rollout(parts, exact)


class OneDevice(TorchDispatchMode):
    """Raises where an operation reads or makes a tensor on another device: a copy that no graph can hold."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{function} has a tensor on {tensor.device}"
        return out


@pytest.mark.parametrize("drawing", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"temperature": 0.0}], ids=str)
@torch.no_grad()
def test_all_of_a_step_is_on_the_models_device(drawing):
    """A device without data, where no operation can look at a value either."""
    ends = {"stop_token_ids": (1, 2), "stop_sequences": ((5, 6), (7, 8, 9))}
    model = random_model().to("meta")
    model.frequencies = model.frequencies.to("meta")  # as reading the prompts leaves it
    sampler = Sampler(model, SamplingParams(8, **drawing, **ends), 16, 128)
    with OneDevice("meta"):
        sampler._step(8, 128)


def test_graph_sizes_are_few_and_fit():
    sampler = Sampler(random_model(), SamplingParams(4), 200, 384)
    sizes = {sampler.bucket(rows, 1) for rows in range(1, 201)}
    assert len(sizes) < 25
    for rows in range(1, 201):
        found, slots = sampler.bucket(rows, 129)
        assert rows <= found <= min(200, max(8, rows + rows // 4 + 8))
        assert slots == 256


def test_prompts_of_similar_length_are_read_together():
    lengths = [5, 100, 6, 7, 90, 1000]
    assert length_buckets(lengths, 200) == [[0, 2, 3], [4, 1], [5]]
    assert length_buckets(lengths, 1) == [[0], [2], [3], [4], [1], [5]]


def test_memory_of_unknown_size_holds_all_rows_at_once(monkeypatch):
    model = random_model(seed=3)
    monkeypatch.setattr(rollout, "free_memory", lambda device: math.inf)
    assert sampled(model).chunks == 1


def test_each_prompt_of_a_group_is_read_once(batch_sizes, monkeypatch):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 2 * max(map(len, PROMPTS)))
    generate(random_model(), PROMPTS, greedy(1), group_size=7)
    assert sum(batch_sizes) == len(PROMPTS)
    assert len(batch_sizes) > 1


def test_random_numbers_at_the_ends_of_their_range_draw_no_token_that_was_ruled_out():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).expand(3, -1)
    params = SamplingParams(1, top_k=2)  # leaves the two in the middle
    uniform = torch.tensor([2.0**-24, 0.5, 1.0])
    tokens, logprobs = sample_tokens(logits, uniform, params)
    assert tokens.tolist() == [1, 1, 2]
    assert logprobs.exp().tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 2 + [1 / (1 + math.exp(1))])


@pytest.mark.parametrize("params", [SamplingParams(1), SamplingParams(1, 0.7, 9, 0.8), greedy(1)], ids=str)
def test_tokens_of_a_wide_vocabulary_are_sampled_in_pieces_of_rows(params, monkeypatch):
    logits, uniform = torch.randn(10, 300, generator=seeded(0)), 1 - torch.rand(10, generator=seeded(1))
    whole = sample_tokens(logits, uniform, params)
    for elements in (1, 300, 1000):
        monkeypatch.setattr(rollout, "DRAW_PIECE", elements)
        for found, expected in zip(sample_tokens(logits, uniform, params), whole, strict=True):
            assert torch.equal(found, expected)


def test_a_large_model_takes_the_short_cuts_and_draws_from_the_same_distribution(monkeypatch):
    """Wide enough for products that are computed transposed, and for pieces of the vocabulary."""
    monkeypatch.setattr(rollout, "DRAW_PIECE", 3000)
    wide = {"vocab_size": 1300, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    model = random_model("qwen2", scale=0.05, **wide)
    params = SamplingParams(12, stop_token_ids=tuple(range(100)))
    result = generate(model, PROMPTS, params, group_size=4, generator=seeded(3))
    for index, (row, logprobs) in enumerate(zip(result.completions, result.logprobs, strict=True)):
        prompt = PROMPTS[index // 4]
        hidden = model(torch.tensor([prompt + row]))  # with gradients, so without short cuts
        score = model.logits(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logprobs == pytest.approx(score.gather(-1, torch.tensor(row)[:, None])[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize(("name", "cudnn"), [("cuda", False), ("cpu", True)])
def test_choosing_a_gpu_turns_cudnn_attention_off(name, cudnn, monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # what finds out whether the device is there
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert resolve_device(name) == torch.device(name)
        assert torch.backends.cuda.cudnn_sdp_enabled() is cudnn
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_environment_turns_graphs_off(monkeypatch):
    monkeypatch.delenv("SASR_CUDA_GRAPHS", raising=False)
    assert graphs_wanted(torch.device("cuda"))
    assert not graphs_wanted(torch.device("cpu"))
    monkeypatch.setenv("SASR_CUDA_GRAPHS", "0")
    assert not graphs_wanted(torch.device("cuda"))
    monkeypatch.setenv("SASR_CUDA_GRAPHS", "off")
    with pytest.raises(ValueError, match="SASR_CUDA_GRAPHS 'off': must be 0"):
        sampled(random_model())


@pytest.fixture
def recording(monkeypatch):
    """As if there were a card: steps are to be recorded."""
    monkeypatch.setenv("SASR_CUDA_GRAPHS", "1")  # and back as it was, after a test that turns it off
    wanted = rollout.graphs_wanted
    monkeypatch.setattr(rollout, "graphs_wanted", lambda device: wanted(torch.device("cuda")))


def test_a_recording_that_fails_falls_back_to_plain_steps_with_one_line(recording, monkeypatch, capsys):
    model, samplers = random_model(seed=3), {}
    with monkeypatch.context() as patch:
        patch.setenv("SASR_CUDA_GRAPHS", "0")
        exact = sampled(model)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: torch.zeros(1) @ torch.zeros(2))  # raises RuntimeError
    assert_same_rollout(sampled(model, samplers=samplers), exact)
    assert_same_rollout(sampled(model, samplers=samplers), exact)
    assert_same_rollout(sampled(model), exact)  # another sampler does not try again
    error = capsys.readouterr().err
    assert error.startswith("CUDA graphs are off, which is slower: ")
    assert error.count("\n") == 1


def test_the_line_names_what_broke_a_recording_not_how_it_ended(recording, monkeypatch, capsys):
    @contextlib.contextmanager
    def graph(*_, **__):
        try:
            raise RuntimeError("waits for the device")
        finally:
            raise RuntimeError("due to a previous error")

    model = random_model(seed=3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    sampled(model)
    assert capsys.readouterr().err == "CUDA graphs are off, which is slower: waits for the device\n"


def test_a_recording_that_runs_out_of_memory_halves_the_rows(recording, monkeypatch, capsys):
    model, errors = random_model(seed=3), [RuntimeError("no card"), torch.OutOfMemoryError("none left")]
    with monkeypatch.context() as patch:
        patch.setenv("SASR_CUDA_GRAPHS", "0")
        exact = sampled(model)

    def record():
        raise errors.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", record)
    found = sampled(model)
    assert found.chunks == 2
    assert_same_rollout(found, exact)
    assert capsys.readouterr().err == "CUDA graphs are off, which is slower: no card\n"


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_what_plain_steps_give(dtype, cuda, monkeypatch):
    model = random_model(seed=3).to(cuda, dtype)
    samplers: dict = {}
    replayed = [sampled(model, samplers=samplers) for _ in range(3)]  # recorded in the first, after a plain step
    assert next(iter(samplers.values())).graphs
    assert replayed[1] == replayed[2]

    def plain() -> Rollout:
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "_advance", lambda self, rows, slots: self._step(*self.bucket(rows, slots)))
            return sampled(model)

    before = plain()
    for found in replayed:
        assert found.completions == before.completions
    with torch.no_grad():  # weights that were changed in place are those the graphs read
        model.head.mul_(-1)
    assert sampled(model, samplers=samplers).completions == plain().completions != before.completions


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_the_stream_and_plain_steps(cuda, monkeypatch, capsys):
    model, step = random_model(seed=3).to(cuda), Sampler._step  # fp32: sizes change no token
    stream = torch.cuda.current_stream()

    def waits(self, rows, slots):
        if torch.cuda.is_current_stream_capturing():
            self.active.sum().item()  # a recording may not wait for the device
        step(self, rows, slots)

    monkeypatch.setenv("SASR_CUDA_GRAPHS", "0")
    samplers: dict = {}
    plain = sampled(model, samplers=samplers)
    assert not next(iter(samplers.values())).graphs
    monkeypatch.setenv("SASR_CUDA_GRAPHS", "1")
    monkeypatch.setattr(Sampler, "_step", waits)
    found = sampled(model)
    error = capsys.readouterr().err
    assert error.count("CUDA graphs are off") == 1
    assert "previous error" not in error  # that of the recording's end, which says nothing of the cause
    assert torch.cuda.current_stream() == stream
    assert found.completions == plain.completions


@pytest.mark.gpu
def test_logits_of_a_bf16_model_are_not_rounded_to_bf16(cuda):
    model = random_model("qwen2", hidden_size=512, vocab_size=1000).to(cuda, torch.bfloat16)
    hidden = torch.randn(3, 5, 512, generator=seeded(0)).to(cuda, torch.bfloat16)
    exact = hidden.double() @ model.head.double().t()  # [3, 5, 1000]
    with torch.no_grad():
        found = model.logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-5)
    rounded = model.logits(hidden)  # with gradients, which the product in fp32 does not have
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).abs().max() > 0.01


# ----------------------------------------------------------------------------- errors


def test_an_empty_prompt_is_named_by_its_number():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(random_model(), [[1], [], [2]], greedy(2))


def test_a_prompt_that_does_not_fit_is_named_with_the_numbers():
    model = random_model()
    fits = [[1] * 60]
    assert len(generate(model, fits, greedy(4)).completions[0]) == 4
    with pytest.raises(ValueError, match=r"prompt 1 has 61 tokens; with max_new_tokens=4 .* 64"):
        generate(model, [*fits, [1] * 61], greedy(4))


@pytest.mark.parametrize("group_size", [0, -1])
def test_a_group_of_no_rows_is_an_error(group_size):
    with pytest.raises(ValueError, match=f"group_size.*{group_size}"):
        generate(random_model(), PROMPTS, greedy(2), group_size=group_size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
    ],
)
def test_a_bad_sampling_parameter_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=rf"{name} {value}: must"):
        SamplingParams(**({"max_new_tokens": 1} | {name: value}))


# ----------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["the cat sat on the mat", "the dog sat on the log"], 280)
    tokenizer.save(str(path / "tokenizer.json"))
    random_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=0).save_pretrained(path)
    return path


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "rollout.py", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
        check=False,
    )


def test_the_command_line_prints_the_completions(checkpoint):
    done = command_line(
        *("--model", str(checkpoint), "--prompt", "the cat", "--samples", "2", "--max-new-tokens", "6"),
        *("--temperature", "0", "--device", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    expected = generate(
        Transformer.from_pretrained(checkpoint), [tokenizer.encode("the cat").ids], greedy(6, (0,))
    ).completions[0]
    assert done.stdout.count(tokenizer.decode(expected)) == 2
    assert done.stdout.count(f"--- {len(expected)} tokens, log-prob 0.00, ") == 2


def test_the_command_line_says_in_one_line_that_the_directory_is_missing(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert rollout.main(["--model", str(missing), "--prompt", "x", "--device", "cpu"]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.startswith("rollout.py: ")
    assert str(missing) in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_the_command_line_samples_in_bf16_on_a_gpu_as_runs_do(device, dtype, checkpoint, monkeypatch, capsys):
    def load(path, **options):
        raise ValueError(f"loading with {options}")

    monkeypatch.setattr(rollout, "resolve_device", torch.device)
    monkeypatch.setattr(Transformer, "from_pretrained", load)
    assert rollout.main(["--model", str(checkpoint), "--device", device, "--prompt", "x"]) == 2
    assert f"loading with {{'dtype': {dtype}, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "500"], "context of 64"),
        (["--top-p", "2"], "top_p"),
        (["--samples", "0"], "--samples 0: must be a whole number from 1 to 1000000"),
        (["--seed", str(2**70)], "--seed"),
        (["--temperature", "1e-40"], r"temperature 1e-40: must be 0 .greedy. or lie in \[0.001, inf\)"),
        (["--prompt", "a\udcff"], "--prompt: not valid UTF-8"),
        (["--prompt", ""], "empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_argument_ends_in_one_line_and_exit_code_2(arguments, says, checkpoint, capsys):
    usual = ["--model", str(checkpoint), "--device", "cpu", "--prompt", "the", "--max-new-tokens", "4"]
    assert rollout.main(usual) == 0
    capsys.readouterr()
    assert rollout.main([*usual, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(says, error)


def test_a_missing_or_broken_tokenizer_ends_in_one_line_and_exit_code_2(tmp_path, capsys):
    random_model().save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--prompt", "the"]
    assert rollout.main(arguments) == 2
    (tmp_path / "tokenizer.json").write_text("garbage")
    assert rollout.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("tokenizer.json" in line for line in lines)


def test_the_command_line_draws_by_its_seed(checkpoint, capsys):
    def output(seed: str) -> str:
        arguments = ["--model", str(checkpoint), "--device", "cpu", "--prompt", "the", "--max-new-tokens", "20"]
        assert rollout.main([*arguments, "--seed", seed]) == 0
        return capsys.readouterr().out

    assert output("1") == output("1") != output("2")
