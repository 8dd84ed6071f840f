"""Scores against brute force and by hand, and a task as token ids: what is dropped, what is counted, what stays."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Example, Grade, Task
from data.tokenized import TokenizedTask
from data.tokenizer import Codec
from run.scores import bootstrap_interval, pass_at_k, scores_of

RIGHT, WRONG = Grade(1.0, correct=True, well_formed=True), Grade(0.0, correct=False, well_formed=True)


# ---- pass@k ----------------------------------------------------------------------------------------------------------

CASES = [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.parametrize(("samples", "correct", "k"), CASES)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 60), st.data())
def test_pass_at_k_grows_with_k_and_with_the_right_answers(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    chance = pass_at_k(samples, correct, k)
    assert 0 <= chance <= 1
    assert pass_at_k(samples, correct, 1) == pytest.approx(correct / samples)
    assert chance <= pass_at_k(samples, correct, min(k + 1, samples)) + 1e-12
    assert chance <= pass_at_k(samples, min(correct + 1, samples), k) + 1e-12


# ---- Scores ----------------------------------------------------------------------------------------------------------


def examples_of(*groups):
    return [Example(f"question {i}", "42", group=group) for i, group in enumerate(groups)]


def without_intervals(scores):
    return {name: value for name, value in scores.items() if not name.endswith(("_low", "_high"))}


def test_scores_by_hand():
    examples = examples_of("easy", "hard", "easy", "hard", "")
    flexible = Grade(0.0, correct=False, well_formed=False, flexible=True)
    both = Grade(1.0, correct=True, well_formed=True, flexible=True)
    neither = Grade(0.0, correct=False, well_formed=True, flexible=False)
    scores = scores_of(examples, [both, flexible, neither, both, flexible], [[] for _ in examples])
    assert without_intervals(scores) == {
        "accuracy": pytest.approx(2 / 5),
        "accuracy_flexible": pytest.approx(4 / 5),
        "accuracy/other": 0.0,
        "accuracy/easy": 0.5,
        "accuracy/hard": 0.5,
    }


def test_one_group_is_no_breakdown_and_no_flexible_reading_is_not_reported():
    for group in ("", "3 people"):
        scores = scores_of(examples_of(group, group), [RIGHT, WRONG], [[], []])
        assert set(scores) == {"accuracy", "accuracy_low", "accuracy_high"}
        assert scores["accuracy"] == 0.5


def test_no_examples_have_no_scores():
    assert scores_of([], [], []) == {}


def test_pass_at_powers_of_two_up_to_the_number_of_samples():
    sampled = [[RIGHT, WRONG, WRONG, WRONG, WRONG], [WRONG] * 5, [RIGHT, RIGHT, WRONG, WRONG, WRONG]]
    scores = without_intervals(scores_of(examples_of("", "", ""), [WRONG] * 3, sampled))
    # Of the C(5, 2) = 10 pairs, 4 hold the one right answer, 7 one of the two; of the C(5, 4) = 5 fours, 4 and 5.
    assert scores == {
        "accuracy": 0.0,
        "pass@1": pytest.approx((1 / 5 + 2 / 5) / 3),
        "pass@2": pytest.approx((4 / 10 + 7 / 10) / 3),
        "pass@4": pytest.approx((4 / 5 + 1) / 3),
        "pass@5": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (7, [1, 2, 4, 7]), (8, [1, 2, 4, 8])]
)
def test_k_is_each_power_of_two_and_the_number_of_samples(samples, ks):
    scores = without_intervals(scores_of(examples_of("", ""), [RIGHT, WRONG], [[RIGHT] * samples] * 2))
    assert set(scores) == {"accuracy", *(f"pass@{k}" for k in ks)}
    assert scores[f"pass@{samples}"] == 1.0


@pytest.mark.parametrize("outcomes", [[True], [False], [True, False, False], [False, True] * 20, [True] * 39 + [False]])
def test_an_interval_holds_its_mean_and_is_the_same_for_the_same_seed(outcomes):
    grades = [RIGHT if outcome else WRONG for outcome in outcomes]
    examples = examples_of(*[""] * len(grades))
    scores, again = (scores_of(examples, grades, [[grade, WRONG] for grade in grades], seed=3) for _ in range(2))
    for name in ("accuracy", "pass@1", "pass@2"):
        assert 0 <= scores[f"{name}_low"] <= scores[name] <= scores[f"{name}_high"] <= 1
    assert scores["accuracy_low"] < scores["accuracy_high"]
    assert scores == again


def test_another_seed_draws_other_problems():
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_answers_that_are_all_wrong_or_all_right_leave_a_doubt():
    # Clopper and Pearson's table for 0 of 10 and 0 of 20: 0 to 30.85% and 0 to 16.84%.
    assert bootstrap_interval([0.0] * 10) == (0.0, pytest.approx(0.3085, abs=5e-5))
    assert bootstrap_interval([0.0] * 20) == (0.0, pytest.approx(0.1684, abs=5e-5))
    assert bootstrap_interval([1.0] * 20) == (pytest.approx(1 - 0.1684, abs=5e-5), 1.0)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_the_interval_of_many_problems_is_the_normal_one():
    values = (np.random.default_rng(3).random(1000) ** 2).tolist()
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(statistics.mean(values) - half, abs=0.1 * half)
    assert high == pytest.approx(statistics.mean(values) + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    truth, covered = 0.4, 0
    for _ in range(300):
        low, high = bootstrap_interval((rng.random(100) < truth).astype(float).tolist(), draws=400)
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.98


# ---- A task as token ids ---------------------------------------------------------------------------------------------

CODEC = Codec.trained_on(["no merge is learnt from one short text"], 257)  # a token is a byte


def byte_task(*sizes, test=(10,)):
    """Training examples of (prompt bytes, demonstration bytes or None); test prompts of so many bytes."""

    def example(name, prompt, demonstration):
        worked = None if demonstration is None else "d" * demonstration
        return Example(name * prompt, f"{name}{prompt}", worked)

    train = [example("abcdefgh"[i], *size) for i, size in enumerate(sizes)]
    return Task("bytes", train, [example("t", prompt, None) for prompt in test], lambda text, example: WRONG)


def test_nothing_is_dropped_without_limits():
    task = TokenizedTask(byte_task((10, 5), (20, None), (30, 39)), CODEC)
    assert [len(prompt) for prompt in task.train_prompts] == [10, 20, 30]
    assert [len(completion) for _, completion in task.demonstrations] == [6, 40]  # the end token too
    assert task.dropped == {"prompts": 0, "demonstrations": 0}
    assert (task.longest_prompt, task.longest_demonstration) == (30, 40)
    assert task.max_new_tokens == 50  # a quarter more than the longest demonstration
    assert task.context == 80


def test_prompts_that_are_too_long_are_dropped_with_their_demonstrations():
    source = byte_task((10, 5), (31, 5), (30, 5), (32, None), test=(10, 31, 30))
    task = TokenizedTask(source, CODEC, max_prompt_tokens=30)
    assert [len(prompt) for prompt in task.train_prompts] == [10, 30]
    assert task.train == [source.train[0], source.train[2]]
    assert [len(prompt) for prompt, _ in task.demonstrations] == [10, 30]
    assert task.dropped == {"prompts": 2, "demonstrations": 1}
    assert [prompt and len(prompt) for prompt in task.eval_prompts] == [10, None, 30]
    assert task.evaluated == source.test, "an evaluation grades all"
    assert task.longest_prompt == 30


def test_a_demonstration_that_is_too_long_leaves_its_prompt_for_practice():
    source = byte_task((10, 4), (20, 100), (30, 5))
    task = TokenizedTask(source, CODEC, max_demonstration_tokens=6)
    assert task.train == source.train
    assert [len(prompt) for prompt in task.train_prompts] == [10, 20, 30]
    assert [(len(prompt), len(completion)) for prompt, completion in task.demonstrations] == [(10, 5), (30, 6)]
    assert task.dropped == {"prompts": 0, "demonstrations": 1}
    assert task.max_new_tokens == 7, "what is dropped does not decide how long a completion gets"


def test_the_context_has_to_hold_prompt_and_completion():
    source = byte_task((40, 19), (44, 19), (50, 9), (45, 14), test=(44, 45))
    task = TokenizedTask(source, CODEC, context=64, max_new_tokens=20)
    assert [len(prompt) for prompt in task.train_prompts] == [40, 44]
    assert [(len(prompt), len(completion)) for prompt, completion in task.demonstrations] == [(40, 20), (44, 20)]
    assert task.dropped == {"prompts": 2, "demonstrations": 2}
    assert [prompt and len(prompt) for prompt in task.eval_prompts] == [44, None]
    assert task.context <= 64
    longer = TokenizedTask(byte_task((40, 19), (44, 20)), CODEC, context=64, max_new_tokens=10)
    assert longer.dropped == {"prompts": 0, "demonstrations": 1}, "45 + 20 tokens do not fit, 40 + 20 do"


@pytest.mark.parametrize(
    ("sizes", "limits", "expected"),
    [
        ([(10, 7)], {}, 10),
        ([(10, 7)], {"max_new_tokens": 3}, 3),
        ([(10, None)], {}, 512),
        ([(10, 7), (10, 99)], {"max_demonstration_tokens": 20}, 10),
        ([(10, 7), (10, 99)], {"context": 50}, 10),
    ],
)
def test_how_long_a_completion_may_get(sizes, limits, expected):
    assert TokenizedTask(byte_task(*sizes), CODEC, **limits).max_new_tokens == expected


def test_demonstrations_of_the_other_split_count_for_the_length_too():
    task = Task("bytes", [], [Example("q", "a", "d" * 15)], lambda text, example: WRONG)
    assert TokenizedTask(task, CODEC).max_new_tokens == 20
    assert TokenizedTask(task, CODEC, max_demonstration_tokens=15).max_new_tokens == 512, "but not beyond a limit"


def test_the_training_examples_can_be_the_ones_that_are_evaluated():
    source = byte_task((10, 5), (31, 5), test=(7,))
    task = TokenizedTask(source, CODEC, max_prompt_tokens=30, eval_split="train")
    assert task.evaluated == source.train
    assert [prompt and len(prompt) for prompt in task.eval_prompts] == [10, None]
    assert [len(prompt) for prompt in TokenizedTask(source, CODEC).eval_prompts] == [7]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"max_prompt_tokens": 9},
            "task bytes: all 2 training prompts are too long (the shortest has 10 tokens, 9 allowed beside 512 new); "
            "raise --max-prompt-tokens or lower --max-new-tokens",
        ),
        (
            {"context": 30, "max_new_tokens": 25},
            "task bytes: all 2 training prompts are too long (the shortest has 10 tokens, 5 allowed beside 25 new, in "
            "a context of 30); "
            "raise --max-prompt-tokens or lower --max-new-tokens",
        ),
        (
            {"context": 30, "max_new_tokens": 40},
            "task bytes: all 2 training prompts are too long (the shortest has 10 tokens, 0 allowed beside 40 new, in "
            "a context of 30); "
            "raise --max-prompt-tokens or lower --max-new-tokens",
        ),
        (
            {"max_demonstration_tokens": 39},
            "task bytes: all 2 demonstrations or their prompts are too long (the shortest has 40 tokens, after a "
            "prompt of 10); raise --max-demonstration-tokens or --max-prompt-tokens",
        ),
    ],
    ids=str,
)
def test_where_all_is_too_long_the_fix_is_named(limits, message):
    task = TokenizedTask(byte_task((10, 39), (20, 39)), CODEC, **limits)
    check = task.check_demonstrations if task.train else task.check_prompts
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        check()
    assert str(error.value) == message


def test_a_demonstration_may_be_lost_with_its_prompt():
    with pytest.raises(ValueError, match=r"or their prompts are too long .* 5 tokens, after a prompt of 50"):
        TokenizedTask(byte_task((50, 4), (10, None)), CODEC, max_prompt_tokens=20).check_demonstrations()


def test_a_task_without_training_examples_or_demonstrations_has_nothing_to_drop():
    for source in (byte_task(), byte_task((10, None))):
        task = TokenizedTask(source, CODEC, max_prompt_tokens=10, max_demonstration_tokens=1)
        assert task.dropped == {"prompts": 0, "demonstrations": 0}
