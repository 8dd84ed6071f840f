"""Two published ways to mix SFT and RL as functions of rewards and the step: `chord-mu` and `hpt`, without a trainer.

A method of `baselines.py` reads a few fields of its configuration, so any object that has them will do.
"""

from types import SimpleNamespace

from baselines import ChordMu, Group, Hpt, Sample


def chord_mu(step: int, steps: int) -> tuple[float, float]:
    """Weights of the SFT loss and of the GRPO loss at step 0, 1, ... of `steps` (arXiv 2508.11408)."""
    return ChordMu(SimpleNamespace(steps=steps)).mix(step, [])


def hpt(rewards: list[list[float]], demonstrated: list[bool], gate: int = 0) -> tuple[list[bool], list[list[float]]]:
    """Who learns what in this step (arXiv 2509.04419), for Q prompts with the rewards of their G samples.

    demonstrated: whether a prompt has a demonstration. Returns, for each prompt, whether SFT learns it, and the weight
    in the GRPO loss of each of its samples. A sample is right from a reward of 1 on.
    """
    groups = []
    for index, (of_group, has) in enumerate(zip(rewards, demonstrated, strict=True)):
        grades = [SimpleNamespace(reward=reward, correct=reward >= 1) for reward in of_group]
        samples = [Sample(tokens=[], grade=grade) for grade in grades]
        groups.append(Group(index, prompt=[], hint=[], demonstration=[] if has else None, samples=samples))
    Hpt(SimpleNamespace(gate=gate)).mix(0, groups)  # changes the groups in place
    return [bool(group.sft) for group in groups], [[s.weight for s in group.samples] for group in groups]
