"""Every other way to mix SFT and RL, as a decision in the same loop.

A method says what step t = 0, 1, ... of the adaptive stage holds:

  * a coin: `sft_probability` is p_t, the chance of an SFT step; otherwise the step is a GRPO step;
  * or a mixture: samples are drawn, and `mix` weighs an SFT loss and the loss of GRPO, for the whole batch, or prompt
    by prompt and sample by sample, which it changes in place.

It may also add a hint to a prompt (`hint`) and choose how SFT weighs tokens (`sft_loss`). All else is the same for
every method: batches, optimizer and, but for what a docstring says, losses. What else of loss and group a project's
code sets stands in PUBLISHED, and `--published` asks for it; not so the optimizer, its rates, sizes of batches, updates
a rollout, and the warm-up, which none of them has. Where code and paper differ, the code was followed. Where a method
asks for a demonstration and the prompt has none, it leaves that prompt to GRPO.

To add a schedule, write a function such as `cosine` and name it in SCHEDULES; to add another method, write a class and
name it in METHODS. `--controller` then offers it.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Schedule = Callable[[int], float]  # t -> a number between 0 and 1


@dataclass
class Sample:
    """A completion, what it is worth, and how much of it is learnt."""

    tokens: list[int]
    logprobs: list[float] | None = None  # as the sampler gave them; None: it is none of this rollout's
    finished: bool = True  # False: cut off at max_new_tokens
    grade: Any = None  # the verifier's: reward, correct, well_formed, failed
    entropy: float = math.nan  # nats a token; only for a method that `needs_entropies`
    advantage: float = 0.0
    weight: float = 1.0  # of its loss


@dataclass
class Group:
    """A prompt with its samples."""

    index: int  # which of the training prompts
    prompt: list[int]
    hint: list[int]  # a beginning of the demonstration that stands behind the prompt
    demonstration: list[int] | None
    samples: list[Sample] = field(default_factory=list)
    asked: bool = False  # its demonstration was asked for
    sft: list[tuple[list[int], list[int], float]] = field(default_factory=list)  # prompt, completion, weight

    def rewards(self) -> list[float]:
        return [sample.grade.reward for sample in self.samples]

    def right(self) -> int:
        return sum(sample.grade.correct for sample in self.samples)

    def ask(self) -> bool:
        """Ask for the demonstration: whether there is one. Those that are missing are counted."""
        self.asked = True
        return self.demonstration is not None

    def learn(self, completion: list[int], weight: float = 1.0) -> None:
        """Let SFT raise this completion."""
        self.sft.append((self.prompt, completion, weight))


class Method:
    """GRPO alone; a method overrides what it decides differently."""

    mixes = False  # its steps hold both SFT and GRPO, instead of one or the other
    by_prompt = False  # it decides prompt by prompt
    needs_entropies = False
    needs_demonstrations = True
    sft_loss = ""  # how a mixed step's SFT weighs tokens; "": as `--sft-loss` says

    def __init__(self, config):
        self.config = config
        self.memory: dict[str, list] = {}  # what a resumed run needs of it

    def level(self, t: int) -> float:
        """What depends on the step alone, so that a resumed run must not change it for steps already taken."""
        return 0.0

    def sft_probability(self, t: int) -> float:
        """p_t of a coin."""
        return 0.0

    def hint(self, t: int, demonstration: list[int], rng: np.random.Generator) -> list[int]:
        """What of it stands behind its prompt before the model goes on."""
        return []

    def join(self, groups: list[Group], add_samples: Callable) -> None:
        """What is put into the groups before they are compared; add_samples: `sasr.add_samples`, which grades."""

    def mix(self, t: int, groups: list[Group]) -> tuple[float, float]:
        """Weights of SFT on the next batch of demonstrations, and of GRPO. More may be changed in the groups."""
        return 0.0, 1.0  # a coin sees the groups of its GRPO steps here

    def take_collected(self) -> list[int]:
        """Prompts whose demonstrations the coming SFT step learns from; none: the next batch."""
        return []


# ============================================================================= coins


class Coin(Method):
    """A schedule: p_t as a function of the step. It looks at nothing, which is what makes it a baseline for SASR."""

    def __init__(self, config, schedule: Schedule | None = None):
        super().__init__(config)
        self.level = self.sft_probability = schedule or SCHEDULES[config.controller](config)


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
    return lambda t: cosine_fall(1.0, 0.0, t / config.steps)


def random(config) -> Schedule:
    """A constant, `sft_fraction`: mixing without adapting, the control for SASR."""
    return lambda t: config.sft_fraction


def cosine_fall(first: float, last: float, share: float) -> float:
    """Half a wave from `first`, at share 0, to `last`, at share 1 and after."""
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class Replay(Coin):
    """The p_t of another run, `--replay RUN`: SASR's, `shuffled` without their timing, or in the `same` order."""

    def __init__(self, config):
        file = Path(config.replay) / "metrics.jsonl"
        try:
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            p = [float(record["p_sft"]) for record in records if record["phase"] == "adaptive"]
            if not all(0 <= value <= 1 for value in p) or any(r.get("kind") == "mixed" for r in records):
                raise ValueError  # a mixture tosses no coin
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its adaptive steps have no p_sft from 0 to 1"
            raise ValueError(f"--replay {config.replay}: {file}: {reason}") from None
        if len(p) < config.steps:
            raise ValueError(f"--replay {config.replay}: {len(p)} adaptive steps, fewer than --steps {config.steps}")
        if config.replay_order == "shuffled":
            p = np.random.default_rng(config.seed).permutation(p).tolist()
        super().__init__(config, lambda t: self.memory["p"][t])
        self.memory["p"] = p


class Relift(Method):
    """ReLIFT (arXiv 2506.07527; TheRoadQaQ/ReLIFT): an SFT step on what the model cannot solve yet, once it is a batch.

    Prompts of which no sample was right are collected, the newest first. In the project the SFT step is of the same
    iteration, with an Adam (`--separate-moments`), an entropy bonus and a clip of its own (1.0, GRPO's is 0.7); here it
    is the next step.
    """

    by_prompt = True

    def __init__(self, config):
        super().__init__(config)
        self.size = config.buffer or config.sft_batch_size
        self.memory["collected"] = []

    def sft_probability(self, t):
        return float(len(self.memory["collected"]) >= self.size)

    def mix(self, t, groups):
        self.memory["collected"][:0] = [group.index for group in groups if not group.right() and group.ask()]
        return 0.0, 1.0

    def take_collected(self):
        collected = self.memory["collected"]
        self.memory["collected"] = collected[self.size :]
        return collected[: self.size]


# ============================================================================= mixtures


class Parallel(Method):
    """Both in every step, half and half."""

    mixes = True

    def mix(self, t, groups):
        return 0.5, 0.5


class ChordMu(Method):
    """CHORD-mu (arXiv 2508.11408; Trinity-RFT, chord_policy_loss.py): mu SFT + (1 - mu) GRPO, mu falling on a cosine.

    From 0.9 to 0.05, as in its mathematics example; that its 200 steps are 0.4 of `--steps` is our choice.
    """

    mixes = True
    FIRST, LAST, SHARE = 0.9, 0.05, 0.4

    def level(self, t):
        return cosine_fall(self.FIRST, self.LAST, t / max(self.SHARE * self.config.steps, 1))

    def mix(self, t, groups):
        mu = self.level(t)
        return mu, 1 - mu


class ChordPhi(ChordMu):
    """CHORD-phi: mu stays, and a token of probability p is weighed by p (1 - p): what is certain either way is left."""

    sft_loss = "phi"

    def level(self, t):
        return self.config.mu


class ChordReward(ChordMu):
    """CHORD's section B.1 (not in its code): mu = tau - mean reward, while that is positive."""

    def level(self, t):
        return 0.0

    def mix(self, t, groups):
        mean = sum(sum(group.rewards()) for group in groups) / sum(len(group.samples) for group in groups)
        mu = min(max(self.config.tau - mean, 0.0), 1.0)
        return mu, 1 - mu


class Rft(Method):
    """SFT on the model's own right samples of this step (rejection sampling): the control for "any signal will do"."""

    mixes = by_prompt = True
    needs_demonstrations = False

    def mix(self, t, groups):
        for group in groups:
            for sample in group.samples:
                if sample.grade.correct:
                    group.learn(sample.tokens)
        return 0.0, 0.0


class Hpt(Method):
    """HPT (arXiv 2509.04419; Unify-Post-Training): a prompt with at most `gate` right samples gets SFT instead of GRPO.

    SFT, a mean over the tokens of those demonstrations, is added with a weight of 1 (0.3 for its 1.5B model). The
    project takes it in each micro-batch, and GRPO there as a sum over samples, so GRPO weighs more beside it. Left out:
    a second gate, equal to the first in its scripts; `soft`; that an update with a gradient norm above 80 is skipped.
    """

    mixes = by_prompt = True

    def mix(self, t, groups):
        for group in groups:
            if group.right() <= self.config.gate and group.ask():
                group.learn(group.demonstration)
                for sample in group.samples:
                    sample.weight = 0.0
        return 0.0, 1.0


def joined_objective(batch, micro, logprobs, entropy, denominators, config):
    """LUFFY's loss of a demonstration in a group, like `sasr.grpo_objective`, with p / (p + 0.1) as the ratio."""
    p = logprobs.exp()  # [N]
    return -(batch.advantages[micro.batch_index] * p / (p + 0.1) / denominators).sum(), {}


class Luffy(Method):
    """LUFFY (arXiv 2504.14945; ElliottYan/LUFFY): the demonstration is one of the G samples, rewarded as verified.

    A ratio would need the demonstrator's probabilities: see `joined_objective`. Here KL and entropy bonus are of the
    samples alone, G are sampled, and the demonstration takes the place of the last; in the project G - 1 are.
    """

    mixes = by_prompt = True

    def join(self, groups, add_samples):
        shown = [group for group in groups if group.demonstration]
        for group in shown:
            group.samples.pop()
        add_samples(shown, [group.demonstration for group in shown], [None] * len(shown), [True] * len(shown))

    def mix(self, t, groups):
        for group in groups:
            group.ask()
        return 0.0, 1.0


class Srft(Luffy):
    """SRFT (arXiv 2506.19767; as Unify-Post-Training has it): LUFFY, and entropy H decides what else counts how much.

    SFT on the demonstration, times 0.5 e^-H; right samples count 0.1 e^H, wrong ones -1, instead of an advantage. H is
    the mean over a completion's tokens, of the policy that sampled; in the project of each update, and log p a ratio.
    """

    needs_entropies = True

    def mix(self, t, groups):
        for group in groups:
            if group.ask():
                *own, demonstration = group.samples
                group.learn(demonstration.tokens, 0.5 * math.exp(-demonstration.entropy))
                for sample in own:
                    sample.advantage = 0.1 * math.exp(sample.entropy) if sample.grade.correct else -1.0
        return 0.0, 1.0


class Uft(Method):
    """UFT (arXiv 2505.16984; liumy2010/UFT): a beginning of the demonstration stands behind the prompt as a hint.

    Binomial(5, p) pieces are given, p falling on a cosine over 300 of 500 steps; no hints after that. Hints are learnt,
    too, with a weight of 0.001. The verifier reads hint and completion. In the project a piece is one or more lines of
    a solution without its answer; here it is a sixth of the tokens, and the last sixth, with the answer, is not given.
    """

    mixes = by_prompt = True
    FIRST, LAST, SHARE, PIECES, HINT_WEIGHT = 0.95, 0.05, 0.6, 5, 0.001

    def level(self, t):
        share = (t + 1) / max(self.SHARE * self.config.steps, 1)
        return cosine_fall(self.FIRST, self.LAST, share) if share <= 1 else 0.0

    def hint(self, t, demonstration, rng):
        given = rng.binomial(self.PIECES, self.level(t))
        return demonstration[: len(demonstration) * given // (self.PIECES + 1)]

    def mix(self, t, groups):
        for group in groups:
            if self.level(t) > 0 and group.ask() and group.hint:
                group.learn(group.hint, self.HINT_WEIGHT)
        return 0.0, 1.0


# ============================================================================= by name

SCHEDULES: dict[str, Callable[..., Schedule]] = {"sft": sft, "grpo": grpo, "sft-then-grpo": sft_then_grpo}
SCHEDULES |= {"alternate": alternate, "cosine": cosine, "random": random}
METHODS: dict[str, type[Method]] = {"replay": Replay, "relift": Relift, "parallel": Parallel, "chord-mu": ChordMu}
METHODS |= {"chord-phi": ChordPhi, "chord-reward": ChordReward, "rft": Rft, "hpt": Hpt, "luffy": Luffy, "srft": Srft}
METHODS |= {"uft": Uft}
# What each project's code sets beside the decision, or in it as a constant. ReLIFT and Unify-Post-Training (hpt, srft)
# grew out of LUFFY: no std, a constant divisor, no clip. HPT's gate is 2 for Llama.
SHARED = {"temperature": 1.0, "kl_coef": 0.0, "entropy_coef": 0.001, "group_size": 8, "max_grad_norm": 1.0}
LUFFY = {"advantage": "centered", "loss_aggregation": "dr_grpo", "clip_low": 1.0, "clip_high": 1e6} | SHARED
USUAL = {"advantage": "zscore", "loss_aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.2} | SHARED
CHORD = USUAL | {"entropy_coef": 0.0}
PUBLISHED = {"chord-mu": CHORD, "chord-phi": CHORD | {"mu": 0.1}, "chord-reward": CHORD | {"tau": 0.5}}
PUBLISHED |= {"luffy": LUFFY, "srft": LUFFY, "hpt": LUFFY | {"gate": 0}}
PUBLISHED |= {"relift": LUFFY | {"separate_moments": True}}
PUBLISHED |= {"uft": USUAL | {"kl_coef": 0.001, "group_size": 4}}


def make_method(config) -> Method:
    """The method of `--controller`; for SASR itself, one that leaves everything to its coin."""
    return (Coin if config.controller in SCHEDULES else METHODS.get(config.controller, Method))(config)


def may_choose_sft(config) -> bool:
    """Whether any step of the adaptive stage can learn from demonstrations."""
    return METHODS.get(config.controller, Method).needs_demonstrations and any(p > 0 for p in possible_p(config))


def may_choose_grpo(config) -> bool:
    """Whether any step of the adaptive stage can sample."""
    return any(p < 1 for p in possible_p(config))


def possible_p(config) -> Iterator[float]:
    """p_t of each adaptive step of a schedule; where something else decides, 1/2 for all that may come."""
    schedule = SCHEDULES[config.controller](config) if config.controller in SCHEDULES else lambda t: 0.5
    return map(schedule, range(config.steps))
