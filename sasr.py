"""SASR: Step-wise Adaptive Integration of Supervised Fine-tuning and Reinforcement Learning, from scratch.

    python sasr.py                                          # the default: puzzles, a small model, minutes on a CPU
    python sasr.py --controller grpo --seed 3 --out runs/x  # a baseline in the same loop
    python sasr.py --help                                   # every flag, with unit and default

The method (arXiv 2505.13026). A language model pi_theta is first warmed up with W steps of supervised fine-tuning
(SFT) on demonstrations e of prompts x. The gradient norm of that loss at the end of the warm-up, G_warmup, becomes
the yardstick, and G_last_sft starts there. Then, at every one of T adaptive steps,

    p_t = G_last_sft / (G_last_sft + gamma * G_warmup)                                            (1)
    alpha ~ Uniform(0, 1)
    alpha < p_t :  one SFT step on demonstrations;  G_last_sft <- || grad L_SFT ||_2
    otherwise   :  one GRPO step on the model's own samples

    L_SFT  = - mean over tokens of log pi(e_t | x, e_<t)                                          (2)
    L_GRPO = - mean over tokens of [ min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta k3 ]   (3)
    r = pi(o_t) / pi_old(o_t),   A = (reward - mean of its group) / (std of its group + eps)      (4)

for tokens o_t of a sampled completion; k3 = pi_ref / pi - log(pi_ref / pi) - 1 estimates KL(pi || pi_ref).

Why a gradient norm? L_SFT = H(p_data) + KL(p_data || pi_theta), and the first term does not depend on theta, so
grad L_SFT is the gradient of the divergence from the demonstrations. The norm tends to grow with that divergence: a
model that has drifted is sent back to its demonstrations, one that has not is left to practise. One batch is noisy.

Two observations keep the code small. Every other way to mix SFT and RL differs only in how it decides
(`baselines.py`). And both gradients are weighted sums of grad log pi over completion tokens, so one function serves
both (`update`). The two norms in (1) are comparable because warm-up steps, SFT steps and probes all take them in
`accumulate_gradient`: for one loss and batch size, per token of the batch, over all parameters, before clipping.

Where the paper is silent or we depart from it:
  * Which norm, smoothed or not, and gamma are options (`--warmup-norm`, `--current-norm`, `--gamma`). With
    `--warmup-task`, G_warmup is that of another task, and p_t also tells how far the two tasks differ.
  * G_last_sft goes stale while GRPO steps run. Its age is logged, and `--probe-every` measures it anew.
  * The loss is a mean over the completion tokens of the whole batch (DAPO, arXiv 2503.14476), not of each sequence.
  * The standard deviation in (4) divides by the group's size, so that a group of one has advantage 0, not NaN.
  * A GRPO step whose groups all agree (no reward differs) is skipped, even with a KL term: Adam would move the
    weights all the same, on momentum. `--resample-groups` first draws other prompts, as DAPO does.
  * Completions are sampled and scored at the same temperature, without top-k or top-p, so that both are the same
    distribution, up to the rounding of the sampler's bf16 copy on CUDA (`sampler_gap` in the metrics).

From the loop down: configuration; the loop; who decides; SFT; GRPO; one update for both; optimizer; command line.
"""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from baselines import SCHEDULES, Schedule, may_choose_grpo, may_choose_sft
from data import Grade
from data.batch import Batch, MicroBatch, TokenBudget, default_max_tokens, micro_batches, rng_for, shuffled
from data.tokenized import TokenizedTask
from model import Transformer, completion_hidden
from rollout import MIN_TEMPERATURE, Rollout, SamplingParams, generate
from run.config import RunConfig, option, parse_command_line, resumable
from run.evaluation import evaluate, evaluate_only
from run.lifecycle import Interrupt, Run, exit_code, new_run, resumed_run
from run.memory import dry_run_report
from run.report import Progress, closing_table
from run.setup import Setup, strictly_deterministic

# ============================================================================= configuration


@dataclass
class Config(RunConfig):
    """The method's fields; those of any run are inherited. A field is a flag; `group` begins a group of --help."""

    warmup_steps: int = option(250, "SFT steps before the adaptive stage", group="how long")
    steps: int = resumable(500, "steps of the adaptive stage, counted from its beginning also on --resume")

    controller: str = option("sasr", "how p_t is chosen", choices=("sasr", *SCHEDULES), group="SFT or GRPO")
    gamma: float = option(1.0, "sasr: weight of the warm-up norm in equation (1); larger means more GRPO")
    warmup_norm: str = option(
        "last", "sasr: G_warmup: last norm, mean of the last, EMA", choices=("last", "mean", "ema")
    )
    warmup_norm_window: int = option(20, "sasr: steps that --warmup-norm mean averages over", low=1)
    current_norm: str = option("last", "sasr: G_last_sft: last SFT norm, or an EMA", choices=("last", "ema"))
    norm_ema: float = option(0.9, "sasr: decay of both EMAs, per norm", high=1)
    probe_every: int = option(0, "measure G_last_sft anew, without an update, once it is this many steps old; 0: off")
    switch_step: int = option(0, "sft-then-grpo: adaptive step at which GRPO begins; 0: half-way")
    alternate: str = option("1:1", "alternate: SFT steps : GRPO steps")
    sft_fraction: float = option(0.5, "random: the constant p_t", high=1)

    sft_batch_size: int = option(32, "demonstrations per SFT step", low=1, group="SFT")
    sft_loss: str = option("nll", "token weight: 1; dft: its probability (2508.05629)", choices=("nll", "dft"))

    prompts_per_step: int = option(8, "prompts per GRPO step", low=1, group="GRPO")
    group_size: int = option(8, "completions per prompt", low=1)
    resample_groups: int = option(0, "times to draw other prompts for groups without a signal (DAPO: 2503.14476)")
    temperature: float = option(1.0, "of the samples; the loss scores the same distribution", low=MIN_TEMPERATURE)
    advantage: str = option(
        "zscore", "equation (4); centered: undivided; median: +1 or -1", choices=("zscore", "centered", "median")
    )
    advantage_eps: float = option(1e-4, "eps of equation (4)")
    loss_aggregation: str = option(
        "token-mean", "mean over tokens; over completions; constant divisor", choices=("token-mean", "grpo", "dr_grpo")
    )
    clip_low: float = option(0.2, "the ratio is clipped below 1 minus this")
    clip_high: float = option(0.2, "the ratio is clipped above 1 plus this")
    kl_coef: float = option(0.0, "beta of equation (3); 0 keeps no reference policy")
    reference: str = option("warmup", "reference policy: end of warm-up, or start", choices=("warmup", "initial"))
    inner_updates: int = option(1, "optimizer steps per rollout", low=1)

    warmup_lr: float = option(1e-3, "peak learning rate of the warm-up stage", group="the optimizer (AdamW)")
    lr: float = option(5e-4, "peak learning rate of the adaptive stage")
    lr_schedule: str = resumable(
        "wsd", "cosine falls in each stage; wsd at the end of the run", choices=("constant", "cosine", "wsd")
    )
    lr_warmup_steps: int = option(20, "steps over which the rate rises from 0 when a stage begins")
    decay_fraction: float = resumable(0.5, "wsd: share of --steps over which the rate falls; 0: it never does", high=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices")
    beta1: float = option(0.9, "AdamW's decay of the mean", high=0.999999)
    beta2: float = option(0.98, "AdamW's decay of the square", high=0.999999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this L2 norm; 0: never")

    def __post_init__(self):
        super().__post_init__()
        sft_steps, _, grpo_steps = self.alternate.partition(":")
        if not (sft_steps.isdecimal() and grpo_steps.isdecimal() and int(sft_steps) + int(grpo_steps) > 0):
            raise ValueError(f"--alternate {self.alternate}: expected SFT:GRPO, two whole numbers such as 2:1")
        if self.group_size == 1 and may_choose_grpo(self):
            raise ValueError("--group-size 1: a sample alone in its group has advantage 0, so GRPO needs 2 or more")


# ============================================================================= the loop


def train(config: Config) -> dict:
    """Run both stages in a new folder, and return the summary that is also written to OUT/summary.json."""
    return loop(new_run(config))


def resume(out: str, overrides: dict | None = None) -> dict:
    """Go on with the run in a folder, with some fields of its configuration changed (`run.lifecycle.resumed_run`)."""
    with resumed_run(out, overrides or {}, Config, State, learning_rate) as run:
        return loop(run)


def loop(run: Run) -> dict:
    """The steps that are left. The first signal ends the step, saves, and raises `run.lifecycle.Stopped`."""
    trainer, config = Trainer(run.config), run.config
    with run.begin(trainer):
        state = trainer.state
        if state.step == 0:
            run.log(after_step(trainer))
        while state.step < config.total_steps or state.pending:
            if not state.pending:  # else this step is done, and resumed where its evaluation was interrupted
                started = time.perf_counter()
                try:
                    record = trainer.step()
                    state.bad_in_a_row = 0
                except BadStep as bad:
                    record = run.drop(bad)
                record["lr"] = learning_rate(config, state.step + 1)
                state.finish_step(record, time.perf_counter() - started)
            with run.save_on_interrupt():
                scores = after_step(trainer)
            run.log(scores)  # into OUT/metrics.jsonl; the step is no longer pending
            run.save_if_due()  # after a signal, save and stop
        return run.finish()


@dataclass
class State:
    """Where a run is. With weights, optimizer, controller and reference policy, this is all that a resume needs."""

    step: int = 0  # steps done, warm-up and adaptive counted through
    sft_steps: int = 0  # of the adaptive stage
    grpo_steps: int = 0
    norm_step: int = 0  # steps done when the controller last got an SFT gradient norm
    bad_steps: int = 0  # dropped: see BadStep
    bad_in_a_row: int = 0
    reward_failures: int = 0  # completions whose verifier failed, evaluations included
    grpo_skipped: int = 0  # GRPO steps that learnt nothing, as no group had a signal; they count in grpo_steps too
    extra_rollouts: int = 0  # beyond one a GRPO step: see --resample-groups
    seconds: dict = field(default_factory=lambda: {"warmup": 0.0, "sft": 0.0, "grpo": 0.0, "eval": 0.0})
    accuracy: dict = field(default_factory=dict)  # accuracy_before, _warmup, _final, and each with _ood
    scores: dict = field(default_factory=dict)  # of the last evaluation
    reward: float | None = None  # mean of the last rollout
    pending: dict | None = None  # the record of a step that is not logged yet, as its evaluation is still to come

    def finish_step(self, record: dict, seconds: float) -> None:
        """Count a step, and keep its record until what is due after it is done."""
        adaptive = record["phase"] == "adaptive"
        self.step += 1
        self.sft_steps += adaptive and record["kind"] == "sft"
        self.grpo_steps += adaptive and record["kind"] == "grpo"
        self.grpo_skipped += record.get("signal_groups") == 0
        self.seconds[record["kind"] if adaptive else "warmup"] += seconds
        self.pending = record | {"seconds": seconds}


class BadStep(Exception):
    """A step is given up: loss, gradient or sampler not finite, or no reward. Inner updates before that stay."""

    def __init__(self, reason: str, record: dict, batch: Batch, *, fatal: bool = False):
        super().__init__(reason)
        self.reason, self.record, self.batch, self.fatal = reason, record, batch, fatal


class Trainer(Setup):
    """What the steps work on. Setup brings config, device, codec (the tokenizer), task, warmup_task and ood_task."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.state, self.progress, self.interrupt = State(), Progress(), Interrupt()
        self.model = self.make_model().to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        # What samples are drawn from: the model itself, or on CUDA a bf16 copy of it.
        self.sampler = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).bfloat16()
        if config.compile:
            torch._dynamo.config.recompile_limit = 64  # SFT, GRPO and log-probs differ in what they pass and keep
            if self.sampler is self.model:
                self.sampler = copy.copy(self.model)  # the same weights; sampling is slower when compiled
            self.model.compile(dynamic=True)
        self.sampling = SamplingParams(self.task.max_new_tokens, config.temperature, **self.codec.stops)
        self.samplers: dict = {}  # buffers and CUDA graphs, kept from one rollout to the next
        self.chunks = 1  # the largest number of chunks that a rollout has needed so far
        self.reference: Transformer | None = None
        self.optimizer = make_optimizer(self.model, config)
        self.controller = make_controller(config)
        self.budget = TokenBudget(default_max_tokens(config.tokens_per_microbatch, self.device), self.progress.say)
        self.answers: list[dict] = []  # of the last evaluation, as they go into OUT/samples.jsonl

    def step(self) -> dict:
        """One step of either stage: its line of the metrics. Raises BadStep, which carries the line so far."""
        if self.state.step >= self.config.warmup_steps:
            return adaptive_step(self)
        record = {"phase": "warmup", "kind": "sft"}
        sft_step(self, record, self.controller.observe_warmup)
        return record

    def freeze_reference(self) -> None:
        """Make the model of this moment the reference policy. It is never trained, so on CUDA bf16 is enough."""
        frozen = copy.deepcopy(self.model).requires_grad_(False)
        frozen = frozen.bfloat16() if self.device.type == "cuda" else frozen
        self.reference = frozen.to("cpu") if self.config.offload_reference else frozen

    @contextlib.contextmanager
    def reference_on_device(self):
        """The reference policy on the device, for as long as it is needed there."""
        yield self.reference.to(self.device)
        if self.config.offload_reference:
            self.reference.to("cpu")


def after_step(trainer: Trainer) -> dict[str, float]:
    """What is due after `state.step` steps: an evaluation, the yardstick, the reference policy. Returns scores."""
    config, state, scores = trainer.config, trainer.state, {}
    if state.step in config.evaluation_steps:
        started = time.perf_counter()
        refresh_sampler(trainer)
        scores = evaluate(trainer)
        state.seconds["eval"] += time.perf_counter() - started
        state.scores = scores
    for name, at in (("before", 0), ("warmup", config.warmup_steps), ("final", config.total_steps)):
        if state.step == at:
            found = {ood: scores[f"accuracy{ood}"] for ood in ("", "_ood") if f"accuracy{ood}" in scores}
            state.accuracy |= {f"accuracy_{name}{ood}": accuracy for ood, accuracy in found.items()}
    if state.step == config.warmup_steps and trainer.controller.g_warmup is None and may_choose_sft(config):
        probe(trainer, trainer.controller.observe_warmup)  # there was no warm-up, or every step of it was dropped
    if config.kl_coef and state.step == (config.warmup_steps if config.reference == "warmup" else 0):
        trainer.freeze_reference()
    return scores


# ============================================================================= who decides


def adaptive_step(trainer: Trainer) -> dict:
    """The heart of the method: look at the norm, draw alpha, then learn from demonstrations or from practice."""
    config, state, controller, record = trainer.config, trainer.state, trainer.controller, {"phase": "adaptive"}
    if controller.g_warmup is None and config.controller == "sasr":
        reason = "no SFT gradient before it was finite, so p_t has no yardstick"
        raise BadStep(reason, record, demonstrations(trainer, trainer.task, state.step, "probe"), fatal=True)
    if config.probe_every and state.step - state.norm_step >= config.probe_every and trainer.task.demonstrations:
        probe(trainer, controller.observe_sft)
    record["p_sft"] = controller.sft_probability(state.step - config.warmup_steps)
    record["alpha"] = rng_for(config.seed, "alpha", state.step).random()
    record |= {"sft_norm": controller.g_last, "sft_norm_age": state.step - state.norm_step}
    if record["alpha"] < record["p_sft"]:
        record["kind"] = "sft"
        sft_step(trainer, record, controller.observe_sft)
    else:
        record["kind"] = "grpo"
        grpo_step(trainer, record)
    return record


class SasrController:
    """Equation (1), with G_warmup and G_last_sft smoothed or not. Self-contained: copy it into another trainer."""

    def __init__(
        self, gamma: float = 1.0, *, warmup_norm="last", window: int = 20, current_norm="last", ema: float = 0.9
    ):
        """warmup_norm: last, mean (of the last `window` norms) or ema. current_norm: last or ema."""
        self.gamma, self.window, self.ema = gamma, window, ema
        self.warmup_norm, self.current_norm = warmup_norm, current_norm
        self.warmup_norms: list[float] = []  # the last ones, for the mean
        self.g_warmup: float | None = None
        self.g_last: float | None = None

    def sft_probability(self, step: int = 0) -> float:
        """p_t. The step does not matter: everything is in the two norms. RuntimeError before a warm-up norm."""
        if self.g_warmup is None:
            raise RuntimeError("SasrController: no warm-up norm was observed")
        total = self.g_last + self.gamma * self.g_warmup
        return self.g_last / total if total > 0 else 0.0  # no gradient at all: nothing left to learn by SFT

    def observe_sft(self, grad_norm: float) -> None:
        """The SFT gradient norm of an adaptive step, or of a probe."""
        smooth = self.current_norm == "ema" and self.g_last is not None
        self.g_last = self.ema * self.g_last + (1 - self.ema) * grad_norm if smooth else grad_norm

    def observe_warmup(self, grad_norm: float) -> None:
        """The SFT gradient norm of a warm-up step. G_last_sft starts there too: p_0 = 1 / (1 + gamma)."""
        self.warmup_norms = [*self.warmup_norms, grad_norm][-self.window :]
        if self.warmup_norm == "mean":
            self.g_warmup = sum(self.warmup_norms) / len(self.warmup_norms)
        elif self.warmup_norm == "ema" and self.g_warmup is not None:
            self.g_warmup = self.ema * self.g_warmup + (1 - self.ema) * grad_norm
        else:
            self.g_warmup = grad_norm
        self.g_last = self.g_warmup

    def state_dict(self) -> dict:
        return {"g_warmup": self.g_warmup, "g_last": self.g_last, "warmup_norms": self.warmup_norms}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for invalid norms: one NaN, and no p_t would ever be above alpha again."""
        known = [*state["warmup_norms"], *(state[key] for key in ("g_warmup", "g_last") if state[key] is not None)]
        if not all(0 <= norm < math.inf for norm in known):
            raise ValueError(f"gradient norms must be finite and not negative: {known}")
        self.g_warmup, self.g_last, self.warmup_norms = state["g_warmup"], state["g_last"], state["warmup_norms"]


class ScheduleController(SasrController):
    """p_t as a function of the adaptive step (`baselines.py`). The norms are kept for the log and not looked at."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def sft_probability(self, step: int = 0) -> float:
        return self.schedule(step)


def make_controller(config: Config) -> SasrController:
    if config.controller in SCHEDULES:
        return ScheduleController(SCHEDULES[config.controller](config))
    options = {"warmup_norm": config.warmup_norm, "window": config.warmup_norm_window}
    return SasrController(config.gamma, **options, current_norm=config.current_norm, ema=config.norm_ema)


# ============================================================================= SFT


def sft_step(trainer: Trainer, record: dict, observe: Callable[[float], None]) -> None:
    """One step on the next demonstrations. What it measures goes into `record`, its gradient norm to `observe`."""
    config, state = trainer.config, trainer.state
    task = trainer.warmup_task if state.step < config.warmup_steps else trainer.task
    batches_so_far = min(state.step, config.warmup_steps) + state.sft_steps  # of the warm-up, then of adaptive steps
    batch = demonstrations(trainer, task, batches_so_far, "demonstrations")
    record["tokens"] = sum(map(len, batch.completions))
    update(trainer, batch, sft_objective, record)
    observe(record["grad_norm"])
    state.norm_step = state.step + 1


def probe(trainer: Trainer, observe: Callable[[float], None]) -> float:
    """The SFT gradient norm here and now, on demonstrations of its own, without an update; told to `observe`."""
    batch = demonstrations(trainer, trainer.task, trainer.state.step, "probe")
    stats = trainer.budget.retry_on_oom(accumulate_gradient, trainer.model, batch, sft_objective, trainer.config)
    if math.isfinite(stats["loss"] + stats["grad_norm"]):  # one NaN would stay in every later p_t
        observe(stats["grad_norm"])
        trainer.state.norm_step = trainer.state.step
    return stats["grad_norm"]


def demonstrations(trainer: Trainer, task: TokenizedTask, number: int, purpose: str) -> Batch:
    """Batch number 0, 1, ... of the demonstrations of a task, in an order of its own for each purpose."""
    size = trainer.config.sft_batch_size
    chosen = shuffled(len(task.demonstrations), number * size, size, trainer.config.seed, purpose)
    prompts, completions = zip(*(task.demonstrations[i] for i in chosen), strict=True)
    return Batch(list(prompts), list(completions))


def sft_objective(batch: Batch, micro: MicroBatch, logprobs: Tensor, entropy: Tensor, denominators: Tensor, config):
    """Equation (2); with `dft`, each token is weighed by its own probability (arXiv 2508.05629, equation 9)."""
    weights = logprobs.detach().exp() if config.sft_loss == "dft" else torch.ones_like(logprobs)
    return -(weights * logprobs / denominators).sum(), {}


# ============================================================================= GRPO


def grpo_step(trainer: Trainer, record: dict) -> None:
    """Sample G completions for each of Q prompts, reward them, follow the advantages. Measures go into `record`."""
    config, task = trainer.config, trainer.task
    # 1. Sample and reward.
    samples, rewards = draw_groups(trainer, record)  # [Q*G], [Q, G]
    if not record["signal_groups"]:  # the step is skipped, as said at the top
        return
    # 2. Compare with the group.
    advantages = group_advantages(rewards, config.advantage, config.advantage_eps).flatten()  # [Q*G]
    # 3. What the loss compares with. Without a KL term a completion of advantage 0 has no gradient: it is left out of
    # the update (and of the means of entropy and the like), but counts in the denominators all the same.
    kept = [i for i, a in enumerate(advantages.tolist()) if a != 0 or trainer.reference is not None]
    batch = Batch(
        [task.train_prompts[samples[i].prompt] for i in kept],
        [samples[i].tokens for i in kept],
        config.temperature,
        loss_denominators([s.tokens for s in samples], config.loss_aggregation, task.max_new_tokens)[kept],
        advantages[kept].to(trainer.device),
        sampled_logprobs=torch.tensor([p for i in kept for p in samples[i].logprobs], device=trainer.device),  # [N]
    )
    if config.inner_updates > 1:
        batch.old_logprobs = trainer.budget.retry_on_oom(compute_logprobs, trainer.model, batch)
    if trainer.reference is not None:
        with trainer.reference_on_device() as reference:
            batch.ref_logprobs = trainer.budget.retry_on_oom(compute_logprobs, reference, batch)
    # 4. One or more updates.
    updates = [update(trainer, batch, grpo_objective, record) for _ in range(config.inner_updates)]
    record |= {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}
    record["ratio_max"] = max(u["ratio_max"] for u in updates)
    record["sampler_gap"] = updates[0]["sampler_gap"]  # later ones have moved on


class Sample(NamedTuple):
    """A completion that the policy wrote, and what it is worth."""

    prompt: int  # which of the training prompts
    tokens: list[int]
    logprobs: list[float]  # as the sampler gave them
    finished: bool  # False: cut off at max_new_tokens
    grade: Grade


def draw_groups(trainer: Trainer, record: dict) -> tuple[list[Sample], Tensor]:
    """The batch: G samples of each of Q prompts, prompt-major, and their rewards [Q, G].

    With --resample-groups N, only groups with a signal (DAPO's dynamic sampling, arXiv 2503.14476): up to N times, Q
    further prompts are drawn, until Q or more have one. What is left out counts in the measures, but not in the loss.
    """
    config, task, state, samples = trainer.config, trainer.task, trainer.state, []
    for attempt in range(1 + config.resample_groups):
        state.extra_rollouts += attempt > 0
        start = (state.grpo_steps + state.extra_rollouts) * config.prompts_per_step
        chosen = shuffled(len(task.train_prompts), start, config.prompts_per_step, config.seed, "prompts")
        samples += grade_rollout(trainer, chosen, sample(trainer, [task.train_prompts[i] for i in chosen], attempt))
        rewards = compute_rewards(trainer, samples, record)  # [groups drawn, G]
        kept = group_advantages(rewards, config.advantage).any(dim=1).nonzero().flatten().tolist()
        if len(kept) >= config.prompts_per_step:
            break
    record |= {"prompts_drawn": len(rewards), "signal_groups": len(kept)}
    kept = kept[: config.prompts_per_step] if config.resample_groups else list(range(len(rewards)))
    return [samples[q * config.group_size + g] for q in kept for g in range(config.group_size)], rewards[kept]


def sample(trainer: Trainer, prompts: list[list[int]], attempt: int = 0) -> Rollout:
    """A group of completions for each prompt, from the policy as it is now; others at each attempt of a step."""
    config = trainer.config
    refresh_sampler(trainer)
    seeds = rng_for(config.seed, "samples", trainer.state.step).integers(2**63, size=attempt + 1)  # one an attempt
    generator = torch.Generator(trainer.device).manual_seed(int(seeds[-1]))
    memory = {"memory_limit": int(1e9 * config.rollout_memory), "samplers": trainer.samplers}
    draw = {"group_size": config.group_size, "generator": generator}
    rollout = generate(trainer.sampler, prompts, trainer.sampling, **draw, **memory)
    if rollout.chunks > trainer.chunks:
        trainer.chunks, rows = rollout.chunks, len(rollout.completions)
        trainer.progress.say(f"the cache of {rows} completions does not fit: {trainer.chunks} chunks a rollout")
    return rollout


@torch.no_grad()
def refresh_sampler(trainer: Trainer) -> None:
    """Make room for the cache by freeing the gradients; on CUDA, copy the weights into the sampler's bf16 model."""
    trainer.model.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":  # elsewhere the weights are shared
        for copied, trained in zip(trainer.sampler.parameters(), trainer.model.parameters(), strict=True):
            copied.copy_(trained)


def grade_rollout(trainer: Trainer, chosen: list[int], rollout: Rollout) -> list[Sample]:
    """What the verifier says of a group for each of the chosen prompts."""
    prompts = [i for i in chosen for _ in range(trainer.config.group_size)]
    texts = trainer.codec.decode(rollout.completions)
    grades = [trainer.task.source.grade(text, trainer.task.train[i]) for text, i in zip(texts, prompts, strict=True)]
    trainer.state.reward_failures += sum(grade.failed for grade in grades)
    return list(map(Sample, prompts, rollout.completions, rollout.logprobs, rollout.finished, grades))


def compute_rewards(trainer: Trainer, samples: list[Sample], record: dict) -> Tensor:
    """[Q, G] in the order of the samples. Raises BadStep where sampler or verifier failed altogether."""
    grades, count = [s.grade for s in samples], len(samples)
    rewards = torch.tensor([grade.reward for grade in grades]).view(-1, trainer.config.group_size)  # [Q, G]
    correct = torch.tensor([grade.correct for grade in grades]).view_as(rewards)  # [Q, G]
    tokens, failures = sum(len(s.tokens) for s in samples), sum(grade.failed for grade in grades)
    record |= {"loss": 0.0, "grad_norm": 0.0, "tokens": tokens, "reward_failures": failures}
    record |= {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(dim=1, correction=0).mean().item()}
    record["zero_variance_fraction"] = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
    record["all_right_fraction"] = correct.all(dim=1).float().mean().item()  # of the groups
    record["all_wrong_fraction"] = (~correct.any(dim=1)).float().mean().item()
    record["completion_length"] = tokens / count
    record["truncated_fraction"] = 1 - sum(s.finished for s in samples) / count
    record["unparsed_fraction"] = 1 - sum(grade.well_formed for grade in grades) / count
    ratios = ("ratio_mean", "ratio_max", "clip_fraction", "clip_low_fraction", "clip_high_fraction")
    record |= dict.fromkeys((*ratios, "kl", "entropy", "sampler_gap", "padding_fraction"))  # null without an update
    trainer.state.reward = record["reward_mean"]
    finite = math.isfinite(sum(sum(s.logprobs) for s in samples))  # if not, the model itself gave no probabilities
    if not finite or failures == count:
        record["grad_norm"] = math.nan
        reason = "the verifier failed for every completion" if finite else "the sampler's probabilities are not finite"
        prompts = [trainer.task.train_prompts[s.prompt] for s in samples]
        raise BadStep(reason, record, Batch(prompts, [s.tokens for s in samples]))
    return rewards


def group_advantages(rewards: Tensor, mode: str = "zscore", eps: float = 1e-4) -> Tensor:
    """How much better each completion did than its group. rewards [Q, G] -> advantages [Q, G].

    `zscore` is equation (4) (arXiv 2402.03300); `centered` leaves the division out (Dr. GRPO, arXiv 2503.20783);
    `median` splits the group into G+ above its median (+1) and G- below it (-1); a reward at the median gets 0.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if mode == "median":
        return torch.sign(rewards - rewards.quantile(0.5, dim=1, keepdim=True))
    if mode not in ("zscore", "centered"):
        raise ValueError(f"advantage {mode!r}: choose from zscore, centered, median")
    agree = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centered = torch.where(agree, 0.0, rewards - rewards.mean(dim=1, keepdim=True))  # exactly 0, not a rounding error
    return centered if mode == "centered" else centered / (rewards.std(dim=1, keepdim=True, correction=0) + eps)


def loss_denominators(completions: Sequence[list[int]], aggregation: str, max_new_tokens: int) -> Tensor:
    """What a token's part of the loss is divided by, for each of the B completions of a whole batch: [B].

    `token-mean`: every token counts the same. `grpo`: the mean of each completion, then of those, so that a token
    of a long one counts less. `dr_grpo`: a constant, so that a batch of short completions has a small loss.
    """
    lengths = torch.tensor([len(completion) for completion in completions])  # 1 or more: a completion is never empty
    if aggregation == "grpo":
        return lengths * len(lengths)
    return torch.full_like(lengths, lengths.sum() if aggregation == "token-mean" else len(lengths) * max_new_tokens)


def grpo_objective(batch: Batch, micro: MicroBatch, logprobs: Tensor, entropy: Tensor, denominators: Tensor, config):
    """Equation (3). On-policy, pi_old is pi itself: the ratio is 1 and its gradient is that of the log-prob."""
    here, mask = micro.token_index, torch.ones_like(logprobs)  # all tokens count
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[here]  # [N]
    ref = None if batch.ref_logprobs is None else batch.ref_logprobs[here]  # [N]
    advantages = batch.advantages[micro.batch_index]  # [N]
    knobs = {"clip_low": config.clip_low, "clip_high": config.clip_high, "kl_coef": config.kl_coef}
    loss, stats = kernels.grpo_loss(logprobs, old, ref, advantages, mask, **knobs, denominator=denominators)
    if ref is None:
        del stats["kl"]  # there was none to measure
    stats["clip_fraction"] = stats["clip_low_fraction"] + stats["clip_high_fraction"]
    stats["entropy"] = entropy.detach().sum()
    if batch.sampled_logprobs is not None:
        stats["sampler_gap"] = (logprobs.detach() - batch.sampled_logprobs[here]).abs().sum()
    return loss, stats


# ============================================================================= one update for both

# SFT and GRPO both weigh the log-probs of completions. They share everything here but the objective, which maps the
# log-probs and entropies [N] of a micro-batch, and what each is divided by, to its part of the loss and to statistics:
# sums over its tokens, or maxima where the name says so.


def update(trainer: Trainer, batch: Batch, objective: Callable, record: dict) -> dict:
    """One AdamW step. Returns what `accumulate_gradient` measured, also put into `record`.

    Raises BadStep where loss or gradient is not finite; then the weights stay as they are.
    """
    stats = trainer.budget.retry_on_oom(accumulate_gradient, trainer.model, batch, objective, trainer.config)
    record |= stats
    if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
        record["grad_norm"] = math.nan
        raise BadStep("loss or gradient not finite", record, batch)
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(trainer.config, trainer.state.step + 1)
    trainer.optimizer.step()
    return stats


@strictly_deterministic()
def accumulate_gradient(model: Transformer, batch: Batch, objective: Callable, config: Config, max_tokens: int) -> dict:
    """Gradient of the whole batch, piece by piece, into `.grad`. Returns its loss, L2 norm, and means over tokens.

    The denominators are those of the whole batch, so neither loss nor gradient depends on how it is cut. The norm
    is that of all parameters before clipping, which is what clip_grad_norm_ returns; `.grad` is clipped.
    """
    model.zero_grad(set_to_none=True)
    device, tokens = model.head.device, sum(map(len, batch.completions))
    denominators = torch.full((len(batch.completions),), tokens) if batch.denominators is None else batch.denominators
    denominators = denominators.to(device)  # [B]
    totals: dict[str, Tensor] = {"loss": torch.zeros((), device=device)}
    tokens_read = padding = 0  # padding is part of what is read
    for micro in micro_batches(batch, max_tokens, device):
        logprobs, entropy = completion_logprobs(model, micro, batch.temperature)  # [N]
        loss, stats = objective(batch, micro, logprobs, entropy, denominators[micro.batch_index], config)
        loss.backward()
        tokens_read += micro.prompts.numel() + micro.completions.numel()
        padding += micro.padding
        totals["loss"] = totals["loss"] + loss.detach()
        for key, value in stats.items():
            if key.endswith("_max"):
                totals[key] = torch.maximum(totals.get(key, value), value)
            else:
                totals[key] = totals.get(key, 0.0) + value / tokens
    totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    values = torch.stack([value.double() for value in totals.values()]).tolist()  # the one wait for the device
    return dict(zip(totals, values, strict=True)) | {"padding_fraction": padding / max(tokens_read, 1)}


def completion_logprobs(model: Transformer, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each completion token, both [N]; the temperature divides the logits, as in sampling.

    On CUDA the arithmetic is bf16, while the weights stay fp32.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=micro.prompts.is_cuda):
        return kernels.token_logprobs(completion_hidden(model, micro), model.head, micro.targets, temperature)


@torch.no_grad()
def compute_logprobs(model: Transformer, batch: Batch, max_tokens: int) -> Tensor:
    """Log-probs [N] of the completion tokens of a batch, without gradient."""
    logprobs = torch.zeros(sum(map(len, batch.completions)), device=model.head.device)  # [N]
    for micro in micro_batches(batch, max_tokens, logprobs.device):
        logprobs[micro.token_index] = completion_logprobs(model, micro, batch.temperature)[0]
    return logprobs


# ============================================================================= optimizer and learning rate


def make_optimizer(model: Transformer, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay pulls on matrices, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1, 2, ..., warm-up and adaptive counted through. Each stage starts by rising from 0.

    In wsd only the final fall depends on --steps, so a run that has not come to it can be resumed with another
    --steps and --decay-fraction: that is a decay branch (arXiv 2404.06395).
    """
    in_warmup = step <= config.warmup_steps
    peak, length = (config.warmup_lr, config.warmup_steps) if in_warmup else (config.lr, config.steps)
    t = step if in_warmup else step - config.warmup_steps  # 1 ... length
    rate = peak * min(1.0, t / max(config.lr_warmup_steps, 1))
    if config.lr_schedule == "cosine":
        rate *= (1 + math.cos(math.pi * (t - 1) / length)) / 2
    if config.lr_schedule == "wsd" and not in_warmup and config.decay_fraction:
        rate *= min(1.0, (length - t + 1) / (config.decay_fraction * length))
    return rate


# ============================================================================= the command line


@exit_code
def main(argv: list[str] | None = None) -> None:
    """What the flags ask for; the exit code and the one line of an error are made in `run/lifecycle.py`."""
    mode, values = parse_command_line(Config, argv)
    if mode == "resume":
        print(closing_table(resume(values.pop("resume"), values)))
    elif mode == "dry_run":
        print(dry_run_report(Setup(Config(**values))))
    elif mode == "eval_only":
        evaluate_only(Config(**values), Trainer)
    else:
        print(closing_table(train(Config(**values))))


if __name__ == "__main__":
    sys.exit(main())
