"""The other ways to mix SFT and RL: their p_t by hand, and one that a user adds."""

import pytest

from baselines import SCHEDULES, may_choose_grpo, may_choose_sft
from sasr import Config, make_controller


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"controller": "sft"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"controller": "grpo"}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"controller": "sft-then-grpo"}, [1, 1, 1, 1, 0, 0, 0, 0]),
        ({"controller": "sft-then-grpo", "switch_step": 2}, [1, 1, 0, 0, 0, 0, 0, 0]),
        ({"controller": "alternate"}, [1, 0, 1, 0, 1, 0, 1, 0]),
        ({"controller": "alternate", "alternate": "2:1"}, [1, 1, 0, 1, 1, 0, 1, 1]),
        ({"controller": "alternate", "alternate": "0:1"}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"controller": "random", "sft_fraction": 0.3}, [0.3] * 8),
        ({"controller": "cosine"}, [1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
    ],
    ids=str,
)
def test_every_baseline_is_a_schedule(flags, expected):
    controller = make_controller(Config(steps=8, **flags))
    controller.observe_warmup(3.0)
    controller.observe_sft(1.0)
    assert [controller.sft_probability(t) for t in range(8)] == pytest.approx(expected, abs=1e-4)
    schedule = SCHEDULES[flags["controller"]](Config(steps=8, **flags))
    assert [schedule(t) for t in range(8)] == pytest.approx(expected, abs=1e-4)
    assert may_choose_sft(Config(steps=8, **flags)) == (max(expected) > 0)
    assert may_choose_grpo(Config(steps=8, **flags)) == (min(expected) < 1)
    assert not may_choose_sft(Config(steps=0, **flags))
    assert not may_choose_grpo(Config(steps=0, **flags))


@pytest.mark.parametrize("may_choose", [may_choose_sft, may_choose_grpo])
def test_sasr_may_choose_either_at_any_step(may_choose):
    assert may_choose(Config(steps=1))
    assert not may_choose(Config(steps=0))
