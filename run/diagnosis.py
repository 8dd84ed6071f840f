"""What looks wrong in a run that has ended, each with its number and a flag to try: the end of its closing table.

Means are over the last quarter of the steps with samples: what was bad at first and got well needs no advice. The
thresholds are far from what the default runs on both generated tasks end with.
"""

import math

from baselines import METHODS, Method

MAX_LINES = 6
MIN_GRPO_STEPS = 10  # of the last quarter, so that a mean is over some hundred completions
MIN_STEPS = 20  # adaptive steps; of fewer, all may well be of one kind
MAX_FAILED = 0.01  # of the completions; a verifier that works fails for none
MAX_TRUNCATED = 0.25  # of the completions; one that was cut off hardly ever earns a reward
MAX_UNPARSED = 0.5  # of the completions; beyond, rewards are mostly about the form of an answer
MAX_WITHOUT_SIGNAL = 0.9  # of the groups; beyond, less than one of the 8 in a default batch teaches anything
MAX_KL = 0.5  # nats a token; with a KL term it usually stays below 0.1
MIN_ENTROPY = 0.5  # nats a completion; below, most of a group of 8 are one and the same text
MAX_AGE = 50  # steps, a tenth of a default run, for which p_t then hung on a single batch


def diagnose(records: list[dict], summary: dict) -> list[str]:
    """At most MAX_LINES lines, the worst first. records: those of OUT/metrics.jsonl; summary: OUT/summary.json."""
    grpo = [record for record in records if record.get("kind") in ("grpo", "mixed")]
    late = grpo[-max(len(grpo) // 4, MIN_GRPO_STEPS) :]
    completions = mean(late, "tokens") / max(mean(late, "completion_length"), 1)  # of a step
    failed, kl = mean(late, "reward_failures") / max(completions, 1), mean(late, "kl")
    truncated, unparsed = mean(late, "truncated_fraction"), mean(late, "unparsed_fraction")
    agreeing = mean(late, "zero_variance_fraction")
    right, wrong = mean(late, "all_right_fraction"), mean(late, "all_wrong_fraction")
    shares = f"{right:.0%} are all right, {wrong:.0%} all wrong"
    advice = "a harder --task" if right > wrong else "more --warmup-steps"
    if not METHODS.get(summary["controller"], Method).by_prompt:  # the others refuse the flag
        advice += ", or a larger --resample-groups"
    entropy = mean(late, "entropy") * mean(late, "completion_length")
    warmed_up, final = summary.get("accuracy_warmup", 0.0), summary.get("accuracy_final", 0.0)
    fell = summary["scores"].get("accuracy_high", 1.0) < warmed_up  # more than chance
    sasr, sft_steps, grpo_steps = summary["controller"] == "sasr", summary["sft_steps"], summary["grpo_steps"]
    enough = sasr and sft_steps + grpo_steps >= MIN_STEPS
    age = max(numbers(records, "sft_norm_age"), default=0)
    what = {"norm": "an SFT gradient norm", "loss": "an SFT loss", "kl": "a KL"}[summary.get("signal", "norm")]
    fix = "a larger --kl-target" if what == "a KL" else f"--probe-every {MAX_AGE // 2}"
    findings = [
        (fell, f"accuracy fell in the adaptive stage from {warmed_up:.1%} to {final:.1%}: a lower --lr"),
        (failed > MAX_FAILED, f"the verifier failed for {failed:.1%} of completions: --reward-on-error stop shows one"),
        (truncated > MAX_TRUNCATED, f"{truncated:.0%} of completions are cut off: a larger --max-new-tokens"),
        (unparsed > MAX_UNPARSED, f"{unparsed:.0%} of completions hold no readable answer: more --warmup-steps"),
        (agreeing > MAX_WITHOUT_SIGNAL, f"{agreeing:.0%} of groups have no signal ({shares}): {advice}"),
        (enough and not grpo_steps, f"none of {sft_steps} adaptive steps was a GRPO step: a larger --gamma"),
        (enough and not sft_steps, f"none of {grpo_steps} adaptive steps was an SFT step: a smaller --gamma"),
        (kl > MAX_KL, f"the KL to the reference policy is {kl:.2f} nats a token: a larger --kl-coef, or a lower --lr"),
        (entropy < MIN_ENTROPY, f"samples repeat, with {entropy:.2f} nats of entropy each: a higher --temperature"),
        (sasr and age > MAX_AGE, f"p_t rested on {what} up to {age} steps old: {fix}"),
    ]
    return [line for found, line in findings if found][:MAX_LINES]


def numbers(records: list[dict], key: str) -> list[float]:
    """The values of those that have one; null stands for what was not measured, or was not finite."""
    values = (record.get(key) for record in records)
    return [value for value in values if isinstance(value, (int, float)) and abs(value) < 1e18]


def mean(records: list[dict], key: str) -> float:
    """NaN where there is nothing to average, which is neither above nor below a threshold."""
    values = numbers(records, key)
    return sum(values) / len(values) if values else math.nan
