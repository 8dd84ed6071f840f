"""The diagnosis at the end of a run: each finding by its number, its flag, and its place among the others."""

import re

import pytest

import sasr
from run.config import make_parser
from run.diagnosis import MAX_LINES, diagnose

# What the default run ends with, about.
GRPO = {"kind": "grpo", "tokens": 3200, "completion_length": 50.0, "reward_failures": 0, "truncated_fraction": 0.01}
GRPO |= {"unparsed_fraction": 0.2, "zero_variance_fraction": 0.5, "all_right_fraction": 0.4, "all_wrong_fraction": 0.1}
GRPO |= {"kl": None, "entropy": 0.05, "sft_norm_age": 3}
SUMMARY = {"controller": "sasr", "sft_steps": 20, "grpo_steps": 20, "scores": {"accuracy_high": 0.9}}
SUMMARY |= {"accuracy_warmup": 0.45, "accuracy_final": 0.88}

FINDINGS = [  # the worst first
    (
        {},
        {"accuracy_final": 0.25, "scores": {"accuracy_high": 0.29}},
        "accuracy fell in the adaptive stage from 45.0% to 25.0%: a lower --lr",
    ),
    (
        {"reward_failures": 16},
        {},
        "the verifier failed for 25.0% of completions: --reward-on-error stop shows one",
    ),
    ({"truncated_fraction": 0.6}, {}, "60% of completions are cut off: a larger --max-new-tokens"),
    ({"unparsed_fraction": 0.8}, {}, "80% of completions hold no readable answer: more --warmup-steps"),
    (
        {"zero_variance_fraction": 1.0, "all_right_fraction": 0.125, "all_wrong_fraction": 0.875},
        {},
        "100% of groups have no signal (12% are all right, 88% all wrong): more --warmup-steps, or a larger "
        "--resample-groups",
    ),
    (
        {},
        {"sft_steps": 40, "grpo_steps": 0},
        "none of 40 adaptive steps was a GRPO step: a larger --gamma",
    ),
    ({}, {"sft_steps": 0, "grpo_steps": 40}, "none of 40 adaptive steps was an SFT step: a smaller --gamma"),
    ({"kl": 2.5}, {}, "the KL to the reference policy is 2.50 nats a token: a larger --kl-coef, or a lower --lr"),
    ({"entropy": 0.002}, {}, "samples repeat, with 0.10 nats of entropy each: a higher --temperature"),
    ({"sft_norm_age": 70}, {}, "p_t rested on an SFT gradient norm up to 70 steps old: --probe-every 25"),
]


def found(record, summary, steps=20):
    return diagnose([GRPO | record] * steps, SUMMARY | summary)


def test_a_run_that_is_well_gets_no_advice():
    assert found({}, {}) == []


@pytest.mark.parametrize(("record", "summary", "line"), FINDINGS, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_what_looks_wrong_is_one_line_with_its_number_and_a_flag_that_exists(record, summary, line):
    assert found(record, summary) == [line]
    assert len(line) <= 118
    known = {flag for action in make_parser(sasr.Config)._actions for flag in action.option_strings}
    flags = re.findall(r"--[a-z-]+", line)
    assert flags
    assert set(flags) <= known


def test_the_worst_six_come_first():
    everything, summary = {}, {}
    for record, more, _ in FINDINGS:
        everything |= record
        summary |= more if "sft_steps" not in more else {}
    assert found(everything, summary) == [line for _, more, line in FINDINGS if "sft_steps" not in more][:MAX_LINES]


def test_what_is_too_easy_needs_no_warm_up():
    agreeing = {"zero_variance_fraction": 0.95, "all_right_fraction": 0.9, "all_wrong_fraction": 0.05}
    (line,) = found(agreeing, {})
    assert line.endswith("(90% are all right, 5% all wrong): a harder --task, or a larger --resample-groups")


def test_what_got_well_is_forgotten():
    bad = GRPO | {"zero_variance_fraction": 1.0, "truncated_fraction": 1.0}
    assert diagnose([bad] * 75 + [GRPO] * 25, SUMMARY) == []
    assert len(diagnose([GRPO] * 75 + [bad] * 25, SUMMARY)) == 2
    assert len(diagnose([GRPO] * 10 + [bad] * 10, SUMMARY)) == 2  # ten steps at least


def test_only_sasr_is_told_of_its_norm_and_its_decisions():
    for controller in ("sft", "grpo", "random"):
        for steps in ({"sft_steps": 40, "grpo_steps": 0}, {"sft_steps": 0, "grpo_steps": 40}):
            assert found({"sft_norm_age": 400}, steps | {"controller": controller}) == []
    assert found({}, {"sft_steps": 0, "grpo_steps": 5}, steps=5) == []  # too few to tell


@pytest.mark.parametrize("value", [None, "high", [1], float("nan"), 10**400], ids=lambda value: str(value)[:8])
def test_what_was_not_measured_says_nothing(value):
    assert found(dict.fromkeys(GRPO.keys() - {"kind"}, value), {}) == []


def test_a_run_without_evaluation_warm_up_or_adaptive_steps_is_well():
    bare = {"controller": "sasr", "sft_steps": 0, "grpo_steps": 0, "scores": {}}
    assert diagnose([], bare) == []
    assert diagnose([{"kind": "sft", "phase": "warmup", "grad_norm": 1.0}], bare) == []


def test_a_method_that_decides_prompt_by_prompt_is_not_told_of_a_flag_that_it_refuses():
    (line,) = found({"zero_variance_fraction": 1.0}, {"controller": "hpt"})
    assert line.endswith("more --warmup-steps") or line.endswith("a harder --task")
