"""Every other way to mix SFT and RL, as a decision in the same loop.

A schedule is a function of the configuration that returns p_t, the chance that step t = 0, 1, ... of the adaptive stage
is an SFT step, as a function of t. It looks at no gradient norm, which is what makes it a baseline for SASR. To add
one, write such a function and name it in SCHEDULES: `--controller` then offers it.
"""

import math
from collections.abc import Callable, Iterator

Schedule = Callable[[int], float]  # t -> p_t


def sft(config) -> Schedule:
    """SFT at every adaptive step."""
    return lambda t: 1.0


def grpo(config) -> Schedule:
    """GRPO at every adaptive step."""
    return lambda t: 0.0


def sft_then_grpo(config) -> Schedule:
    """The usual recipe in two stages: SFT until `switch_step` (0: half-way), then GRPO."""
    switch = config.switch_step or config.steps // 2
    return lambda t: 1.0 if t < switch else 0.0


def alternate(config) -> Schedule:
    """`alternate` 2:1 is SFT, SFT, GRPO, SFT, SFT, GRPO, ..."""
    sft_steps, grpo_steps = map(int, config.alternate.split(":"))
    return lambda t: 1.0 if t % (sft_steps + grpo_steps) < sft_steps else 0.0


def cosine(config) -> Schedule:
    """From SFT to GRPO along half a wave."""
    return lambda t: (1 + math.cos(math.pi * t / config.steps)) / 2


def random(config) -> Schedule:
    """A constant, `sft_fraction`: mixing without adapting, the control for SASR."""
    return lambda t: config.sft_fraction


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "sft": sft,
    "grpo": grpo,
    "sft-then-grpo": sft_then_grpo,
    "alternate": alternate,
    "cosine": cosine,
    "random": random,
}


def may_choose_sft(config) -> bool:
    """Whether any step of the adaptive stage can be an SFT step."""
    return any(p > 0 for p in possible_p(config))


def may_choose_grpo(config) -> bool:
    """Whether any step of the adaptive stage can be a GRPO step."""
    return any(p < 1 for p in possible_p(config))


def possible_p(config) -> Iterator[float]:
    """p_t of each adaptive step of a schedule; where the norms decide, 1/2 for all that may come."""
    schedule = SCHEDULES[config.controller](config) if config.controller in SCHEDULES else lambda t: 0.5
    return map(schedule, range(config.steps))
