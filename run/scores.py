"""The scores of an evaluation: accuracy, pass@k, and how certain they are."""

import math

import numpy as np

from data.task import Example, Grade


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that of k answers, drawn without replacement from `samples` of which `correct` are right, one is right.

    The unbiased estimate of Chen et al. (arXiv 2107.03374): 1 - C(samples - correct, k) / C(samples, k).
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def bootstrap_interval(values: list[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean over problems, which are drawn again with replacement.

    Where all values are 0, or all 1, that would have no width: then it is the binomial interval of Clopper and Pearson
    (1934), of that many failures or successes in as many trials.
    """
    if set(values) in ({0.0}, {1.0}):
        rate = 0.025 ** (1 / len(values))  # of success, at which so many in a row have a chance of 2.5%
        return (rate, 1.0) if values[0] else (0.0, 1 - rate)
    rng = np.random.default_rng([seed, len(values)])
    values = np.asarray(values, dtype=np.float64)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def scores_of(examples: list[Example], greedy: list[Grade], sampled: list[list[Grade]], seed: int = 0) -> dict:
    """Shares from 0 to 1 over examples, of their greedy grades and of any number of sampled ones each.

    `accuracy`, with `accuracy_low` and `accuracy_high`; `accuracy_flexible`, where the task has a looser reading;
    `accuracy/GROUP`, where examples are of more than one level or size; `pass@k` for k = 1, 2, 4, ... and all
    samples, with its interval. Of no examples there are no scores.
    """
    if not examples:
        return {}
    correct = [float(grade.correct) for grade in greedy]
    scores = with_interval("accuracy", correct, seed)
    if any(grade.flexible is not None for grade in greedy):
        scores["accuracy_flexible"] = mean([float(bool(grade.flexible)) for grade in greedy])
    groups: dict[str, list[float]] = {}
    for example, value in zip(examples, correct, strict=True):
        groups.setdefault(example.group, []).append(value)
    if len(groups) > 1:
        scores |= {f"accuracy/{group or 'other'}": mean(values) for group, values in sorted(groups.items())}
    samples = len(sampled[0]) if sampled else 0
    for k in sorted({2**i for i in range(samples.bit_length())} | {samples} - {0}):
        chances = [pass_at_k(samples, sum(grade.correct for grade in grades), k) for grades in sampled]
        scores |= with_interval(f"pass@{k}", chances, seed)
    return scores


def with_interval(name: str, values: list[float], seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed)
    return {name: mean(values), f"{name}_low": low, f"{name}_high": high}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
