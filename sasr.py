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

Two observations keep the code small. Every other way to mix SFT and RL is a decision, at most with another weight or
shape of a loss (`baselines.py`). And both gradients are weighted sums of grad log pi over completion tokens, so one
function serves both (`update`). The two norms in (1) are comparable because warm-up steps, SFT steps and probes all
take them in `accumulate_gradient`: of one loss and batch size, per token of the batch, over all that trains, unclipped.

Where the paper is silent or we depart from it:
  * Which norm, smoothed or not, and gamma are options (`--warmup-norm`, `--current-norm`, `--gamma`), and so is what
    stands for the divergence (`--signal`): the norm, the SFT loss or, measured at GRPO steps, the KL since the warm-up.
  * G_last_sft goes stale while GRPO steps run. Its age is logged, and `--probe-every` measures it anew.
  * With adapters the norm is that of A and B. Along a run it kept to half or so of that of all weights, a factor that
    cancels in (1), although B, and with it the gradient of A, begins at zero (`benchmarks/adapter_norms.py`).
  * The loss is a mean over the completion tokens of the whole batch (DAPO, arXiv 2503.14476), not of each sequence.
  * The standard deviation in (4) divides by the group's size, so that a group of one has advantage 0, not NaN.
  * A GRPO step whose groups all agree (no reward differs) is skipped, even with a KL term: Adam would move the
    weights all the same, on momentum. `--resample-groups` first draws other prompts, as DAPO does.
  * Completions are sampled and scored at the same temperature, without top-k or top-p, so that both are the same
    distribution, up to the rounding of the sampler's bf16 copy on CUDA (`sampler_gap` in the metrics).

From the loop down: configuration; the loop; who decides; SFT; GRPO; mixed steps (SASR has none); one update; optimizer.
What `parallel` does is for several processes (`run/parallel.py`); to one it means nothing.
"""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from baselines import METHODS, SCHEDULES, Group, Sample, joined_objective, make_method, may_choose_sft
from data.batch import Batch, MicroBatch, TokenBudget, default_max_tokens, rng_for, shuffled
from data.tokenized import TokenizedTask
from model import Transformer, completion_hidden
from rollout import MIN_TEMPERATURE, Rollout, SamplingParams
from run import parallel
from run.config import BaselineConfig, adaptive, option, parse_command_line, resumable
from run.evaluation import evaluate, evaluate_only, kl_of_samples
from run.lifecycle import Interrupt, Run, exit_code, new_run, resumed_run
from run.memory import dry_run_report
from run.report import Progress, closing_table, measure_mixing, measure_rollout, rollout_fault
from run.setup import Setup, strictly_deterministic

# ============================================================================= configuration


@dataclass
class Config(BaselineConfig):
    """SASR's fields; those of other methods and of any run are inherited. A field is a flag, `group` begins a group."""

    warmup_steps: int = option(100, "SFT steps before the adaptive stage", group="how long")
    steps: int = resumable(500, "steps of the adaptive stage, counted from its beginning also on --resume")

    controller: str = adaptive("sasr", "how to mix them", choices=["sasr", *SCHEDULES, *METHODS], group="SFT or GRPO")
    gamma: float = adaptive(1.0, "sasr: weight of the warm-up norm in equation (1); larger means more GRPO")
    warmup_norm: str = adaptive("last", "sasr: G_warmup: last norm, mean of a window, EMA", choices="last mean ema")
    warmup_norm_window: int = adaptive(20, "sasr: steps that --warmup-norm mean averages over", low=1)
    current_norm: str = adaptive("last", "sasr: G_last_sft: last SFT norm, or an EMA", choices="last ema")
    norm_ema: float = adaptive(0.9, "sasr: decay of both EMAs, per norm", high=1)
    probe_every: int = adaptive(0, "steps after which G_last_sft is measured anew, without an update; 0: never")
    signal: str = adaptive("norm", "sasr: what (1) compares: SFT norms, SFT losses, or KL", choices="norm loss kl")
    kl_target: float = adaptive(0.05, "sasr, --signal kl: stands for G_warmup; KL in nats a token")
    separate_moments: bool = adaptive(False, "GRPO steps have Adam moments of their own, which begin at zero")

    sft_batch_size: int = option(32, "demonstrations per SFT step", low=1, group="SFT")
    sft_loss: str = option("nll", "weight of a token: 1; dft: its probability p; phi: p (1 - p)", choices="nll dft phi")

    prompts_per_step: int = adaptive(16, "prompts per GRPO step", low=1, group="GRPO")
    group_size: int = adaptive(8, "completions per prompt", low=1)
    demonstrated_share: float = adaptive(-1.0, "share of prompts with demonstrations; -1: as they come", low=-1, high=1)
    resample_groups: int = adaptive(0, "times to draw other prompts for groups whose rewards agree (DAPO: 2503.14476)")
    temperature: float = adaptive(1.0, "of the samples; the loss scores the same distribution", low=MIN_TEMPERATURE)
    advantage: str = adaptive("zscore", "(4); centered: undivided; median: +1 or -1", choices="zscore centered median")
    advantage_eps: float = adaptive(1e-4, "eps of equation (4)")
    loss_aggregation: str = adaptive(
        "token-mean", "mean over tokens; over completions; constant divisor", choices="token-mean grpo dr_grpo"
    )
    clip_low: float = adaptive(0.2, "the ratio is clipped below 1 minus this")
    clip_high: float = adaptive(0.2, "the ratio is clipped above 1 plus this")
    kl_coef: float = adaptive(0.0, "beta of equation (3); 0 keeps no reference policy")
    entropy_coef: float = adaptive(0.0, "reward for the entropy of each token, in the loss")
    reference: str = adaptive("warmup", "reference policy: end of warm-up, or start", choices="warmup initial")
    inner_updates: int = adaptive(1, "optimizer steps per rollout", low=1)

    warmup_lr: float = option(1e-3, "peak learning rate of the warm-up stage", group="the optimizer (AdamW)")
    lr: float = adaptive(5e-5, "peak rate of GRPO and mixed steps")
    sft_lr: float = adaptive(1e-3, "peak rate of SFT steps after the warm-up; 0: the same as --lr")
    lr_schedule: str = resumable("wsd", "cosine falls in each stage; wsd at the end", choices="constant cosine wsd")
    lr_warmup_steps: int = option(20, "steps over which the rate rises from 0 when a stage begins")
    decay_fraction: float = resumable(0.3, "wsd: share of --steps over which the rate falls; 0: it never does", high=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices")
    beta1: float = option(0.9, "AdamW's decay of the mean", high=0.999999)
    beta2: float = option(0.98, "AdamW's decay of the square", high=0.999999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this L2 norm; 0: never")


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
                record["lr"] = learning_rate(config, state.step + 1, record["kind"])
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
    mixed_steps: int = 0
    warmup_sft: list = field(default_factory=list)  # grad_norm and loss of each warm-up step, for branches
    norm_step: int = 0  # steps done when G_last was last measured: a gradient norm, a loss, or the KL of --signal
    bad_steps: int = 0  # dropped: see BadStep
    bad_in_a_row: int = 0
    reward_failures: int = 0  # completions whose verifier failed, evaluations included
    grpo_skipped: int = 0  # GRPO or mixed steps that learnt nothing, as no group had a signal; they count there, too
    extra_rollouts: int = 0  # beyond one a step: see --resample-groups
    seconds: dict = field(default_factory=lambda: dict.fromkeys(("warmup", "sft", "grpo", "mixed", "eval"), 0.0))
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
        self.mixed_steps += record["kind"] == "mixed"
        self.seconds[record["kind"] if adaptive else "warmup"] += seconds
        self.pending = record | {"seconds": seconds}


class BadStep(Exception):
    """A step is given up: loss, gradient or sampler not finite, or no reward. Inner updates before that stay."""

    def __init__(self, reason: str, record: dict, batch: Batch, *, fatal: bool = False):
        super().__init__(reason)
        self.reason, self.record, self.batch, self.fatal = reason, record, batch, fatal


class Part(NamedTuple):
    """A term of a step's loss. Most steps have one; in mixed ones that of SFT comes first, and is named."""

    batch: Batch
    objective: Callable
    weight: float = 1.0
    name: str = ""


class Trainer(Setup):
    """What the steps work on. Setup brings config, device, codec (the tokenizer), task, warmup_task and ood_tasks."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.state, self.progress, self.interrupt = State(), Progress(), Interrupt()
        model = self.make_model()
        self.model = parallel.shard(model, self.device) if config.shard else model.to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        # What samples are drawn from: the model itself, or a copy, on CUDA in bf16, into which adapters are merged.
        self.sampler = copy.copy(self.model) if config.compile else self.model  # sampling is slower when compiled
        self.sampler_is_copy = self.device.type == "cuda" or config.lora_rank > 0 or config.shard
        if self.sampler_is_copy:
            with torch.device("meta"):  # without weights until `fresh_sampler`
                self.sampler = Transformer(self.shape).to(torch.bfloat16 if self.device.type == "cuda" else None)
        if config.compile:
            torch._dynamo.config.recompile_limit = 64  # SFT, GRPO and log-probs differ in what they pass and keep
            self.model.compile(dynamic=True)
        self.sampling = SamplingParams(self.task.max_new_tokens, config.temperature, **self.codec.stops)
        self.samplers: dict = {}  # buffers and CUDA graphs, kept from one rollout to the next
        self.chunks = 1  # the largest number of chunks that a rollout has needed so far
        self.reference: Transformer | None = None
        self.warmed_up: Transformer | None = None  # the policy at the end of the warm-up: --signal kl, --eval-kl
        self.optimizer = make_optimizer(self.model, config)
        self.grpo_optimizer = make_optimizer(self.model, config) if config.separate_moments else self.optimizer
        norms = {"warmup_norm": config.warmup_norm, "window": config.warmup_norm_window, "ema": config.norm_ema}
        self.controller = SasrController(config.gamma, **norms, current_norm=config.current_norm)
        self.method = make_method(config)  # what decides in its place; with --controller sasr, an idle one
        self.budget = TokenBudget(default_max_tokens(config.tokens_per_microbatch, self.device), self.progress.say)
        self.answers: list[dict] = []  # of the last evaluation, as they go into OUT/samples.jsonl

    def step(self) -> dict:
        """One step of either stage: its line of the metrics. Raises BadStep, which carries the line so far."""
        if self.state.step >= self.config.warmup_steps:
            return adaptive_step(self)
        record = {"phase": "warmup", "kind": "sft"}
        sft_step(self, record)
        return record

    def observe(self, measured: dict, steps: int) -> None:
        """Tell the controller of an SFT gradient taken after so many steps; the warm-up's are kept, for branches."""
        if self.state.step < self.config.warmup_steps or self.controller.g_warmup is None:
            self.state.warmup_sft.append({key: measured[key] for key in ("grad_norm", "loss")})
            self.controller.observe_warmup(measured[self.config.signal_key])
        elif not self.config.compares_kl:
            self.controller.observe_sft(measured[self.config.signal_key])
        else:
            return
        self.state.norm_step = steps

    def keep_policies(self) -> None:
        """Freeze a copy of the model where this is the moment that the reference policy, or a KL, refers to."""
        config, step = self.config, self.state.step
        if config.kl_coef and step == (config.warmup_steps if config.reference == "warmup" else 0):
            self.reference = self.frozen_copy()
        if config.keeps_warmed_up and step == config.warmup_steps:
            self.warmed_up = self.frozen_copy()
        if config.compares_kl and step == config.warmup_steps:
            self.controller.g_warmup, self.controller.g_last = config.kl_target, 0.0  # p_0 = 0: the KL to itself is 0

    def frozen_copy(self) -> Transformer:
        """The model of this moment; of adapters' base there is only one. Never trained, so on CUDA bf16 is enough."""
        if self.config.shard:
            frozen = parallel.shard(self.make_model(), self.device).requires_grad_(False)
            frozen.load_state_dict(self.model.state_dict())
            return frozen
        base = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        frozen = copy.deepcopy(self.model, base).requires_grad_(False)
        frozen = frozen.bfloat16() if self.device.type == "cuda" else frozen
        return frozen.to("cpu") if self.config.offload_reference and not base else frozen

    @contextlib.contextmanager
    def on_device(self, frozen: Transformer):
        """A frozen copy on the device, for as long as it is needed there."""
        yield frozen.to(self.device)
        if self.config.offload_reference and not frozen.adapter:
            frozen.to("cpu")

    @contextlib.contextmanager
    def fresh_sampler(self):
        """The sampler, as the model is now. Gradients make room for its cache; a copy on a CPU is freed again."""
        self.model.zero_grad(set_to_none=True)
        if self.sampler_is_copy:
            if self.sampler.head.is_meta:
                self.sampler.to_empty(device=self.device)
            with torch.no_grad():  # in place, as CUDA graphs read these addresses
                for copied, (_, merged) in zip(self.sampler.parameters(), self.model.merged_parameters(), strict=True):
                    copied.copy_(parallel.whole(merged))
        yield self.sampler
        if self.sampler_is_copy and self.device.type == "cpu":
            self.sampler.to("meta")


def after_step(trainer: Trainer) -> dict[str, float]:
    """What is due after `state.step` steps: an evaluation, the yardstick, the reference policy. Returns scores."""
    config, state, scores = trainer.config, trainer.state, {}
    if state.step in config.evaluation_steps:
        started = time.perf_counter()
        scores = evaluate(trainer)
        state.seconds["eval"] += time.perf_counter() - started
        state.scores = scores
    for name, at in (("before", 0), ("warmup", config.warmup_steps), ("final", config.total_steps)):
        if state.step == at:
            found = {ood: scores[f"accuracy{ood}"] for ood in ("", *trainer.ood_tasks) if f"accuracy{ood}" in scores}
            state.accuracy |= {f"accuracy_{name}{ood}": accuracy for ood, accuracy in found.items()}
    if state.step == config.warmup_steps and trainer.controller.g_warmup is None and may_choose_sft(config):
        probe(trainer)  # there was no warm-up, or every step of it was dropped
    trainer.keep_policies()
    return scores


# ============================================================================= who decides


def adaptive_step(trainer: Trainer) -> dict:
    """The heart of the method: look at the norm, draw alpha, then learn from demonstrations or from practice."""
    config, state, controller, record = trainer.config, trainer.state, trainer.controller, {"phase": "adaptive"}
    sasr, t = config.controller == "sasr", state.step - config.warmup_steps
    if controller.g_warmup is None and sasr:
        reason = "no SFT gradient has been finite so far, so p_t has no yardstick"
        raise BadStep(reason, record, Batch.of(trainer.task.demonstrations[: config.sft_batch_size]), fatal=True)
    if config.probe_every and state.step - state.norm_step >= config.probe_every and trainer.task.demonstrations:
        probe(trainer)
    record["p_sft"] = controller.sft_probability() if sasr else trainer.method.sft_probability(t)
    record["alpha"] = rng_for(config.seed, "alpha", state.step).random()
    record |= {"sft_norm": controller.g_last, "sft_norm_age": state.step - state.norm_step}
    if record["alpha"] < record["p_sft"]:
        record["kind"] = "sft"
        sft_step(trainer, record)
    else:
        record["kind"] = "mixed" if trainer.method.mixes else "grpo"
        grpo_step(trainer, record, t)
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

    def sft_probability(self) -> float:
        """p_t. RuntimeError before a warm-up norm."""
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


# ============================================================================= SFT


def sft_step(trainer: Trainer, record: dict) -> None:
    """One step on the next demonstrations. What it measures goes into `record`, its gradient norm to the controller."""
    batch = Batch.of(next_demonstrations(trainer))
    record["tokens"] = sum(map(len, batch.completions))
    update(trainer, [Part(batch, sft_objective)], record)
    trainer.observe(record, trainer.state.step + 1)


def probe(trainer: Trainer) -> None:
    """The SFT gradient norm here and now, on demonstrations of its own, without an update; told to the controller."""
    part = Part(Batch.of(demonstrations(trainer, trainer.task, trainer.state.step, "probe")), sft_objective)
    stats = trainer.budget.retry_on_oom(accumulate_gradient, trainer.model, [part], trainer.config)
    if math.isfinite(stats["loss"] + stats["grad_norm"]):  # one NaN would stay in every later p_t
        trainer.observe(stats, trainer.state.step)


def next_demonstrations(trainer: Trainer) -> list[tuple[list[int], list[int]]]:
    """A batch: what the method has collected; else the next of the warm-up's, or, in one order, of all later steps'."""
    config, state, task = trainer.config, trainer.state, trainer.task
    if collected := trainer.method.take_collected():
        return [(task.train_prompts[i], task.demonstration_of[i]) for i in collected]
    task = trainer.warmup_task if state.step < config.warmup_steps else task
    batches_so_far = min(state.step, config.warmup_steps) + state.sft_steps + state.mixed_steps
    return demonstrations(trainer, task, batches_so_far, "demonstrations")


def demonstrations(trainer: Trainer, task: TokenizedTask, number: int, purpose: str) -> list:
    """Batch number 0, 1, ... of the demonstrations of a task, in an order of its own for each purpose."""
    size = trainer.config.sft_batch_size
    chosen = shuffled(len(task.demonstrations), number * size, size, trainer.config.seed, purpose)
    return [task.demonstrations[i] for i in chosen]


def sft_objective(batch: Batch, micro: MicroBatch, logprobs: Tensor, entropy, denominators: Tensor, config, kind=""):
    """Equation (2). `dft` and `phi` weigh a token by its probability (arXiv 2508.05629, equation 9; 2508.11408)."""
    p = logprobs.detach().exp()
    weights = {"nll": torch.ones_like(p), "dft": p, "phi": p * (1 - p)}[kind or config.sft_loss]
    return -(weights * logprobs / denominators).sum(), {}


# ============================================================================= GRPO


def grpo_step(trainer: Trainer, record: dict, t: int) -> None:
    """Sample G completions for each of Q prompts, reward them, follow the advantages. Measures go into `record`.

    t: adaptive steps done. `trainer.method` may change what is learnt of the samples, and add demonstrations
    (`baselines.py`); for SASR it does nothing.
    """
    config, method = trainer.config, trainer.method
    # 1. Sample and reward.
    groups = draw_groups(trainer, record, t)
    if config.compares_kl:
        trainer.controller.observe_sft(kl_of_samples(trainer, groups))
        trainer.state.norm_step = trainer.state.step
    # 2. Compare with the group.
    method.join(groups, partial(add_samples, trainer))
    if method.needs_entropies:
        measure_entropies(trainer, groups)
    rewards = torch.tensor([group.rewards() for group in groups])  # [Q, G]
    advantages = group_advantages(rewards, config.advantage, config.advantage_eps)  # [Q, G]
    for group, of_group in zip(groups, advantages.tolist(), strict=True):
        for s, advantage in zip(group.samples, of_group, strict=True):
            s.advantage = advantage
    sft_weight, grpo_weight = method.mix(t, groups)  # for SASR 0 and 1
    # 3. What the loss compares with.
    parts = grpo_parts(trainer, groups, grpo_weight)
    if method.mixes or method.by_prompt:
        sft_parts = sft_part(trainer, groups, sft_weight)
        record |= measure_mixing(groups, sft_weight, sft_parts)
        parts = sft_parts + parts
    if not parts:  # no group has a signal: the step is skipped, as said at the top
        trainer.state.grpo_skipped += 1
        return
    # 4. One or more updates.
    updates = [update(trainer, parts, record) for _ in range(config.inner_updates)]
    record |= {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}
    record |= {key: max(u[key] for u in updates) for key in updates[0] if key.endswith("_max")}
    record |= {key: updates[0][key] for key in updates[0] if key == "sampler_gap"}  # later ones have moved on


def draw_groups(trainer: Trainer, record: dict, t: int) -> list[Group]:
    """The batch: Q prompts with G samples each.

    With --resample-groups N, only groups whose rewards differ (DAPO's dynamic sampling, arXiv 2503.14476): up to N
    times, Q further prompts are drawn, until Q or more do. What is left out counts in the measures, not in the loss.
    """
    config, state, groups = trainer.config, trainer.state, []
    for attempt in range(1 + config.resample_groups):
        state.extra_rollouts += attempt > 0
        drawn = next_groups(trainer, state.grpo_steps + state.mixed_steps + state.extra_rollouts, t)
        rollout = sample(trainer, [group.prompt + group.hint for group in drawn], attempt)
        add_samples(trainer, drawn, rollout.completions, rollout.logprobs, rollout.finished)
        groups += drawn
        rewards = torch.tensor([group.rewards() for group in groups])  # [groups drawn, G]
        record |= measure_rollout(groups, rewards)
        state.reward = record["reward_mean"]
        if fault := rollout_fault(groups):  # of the sampler or the verifier
            batch = Batch.of((group.prompt + group.hint, s.tokens) for group in groups for s in group.samples)
            raise BadStep(fault, record | {"grad_norm": math.nan}, batch)
        kept = group_advantages(rewards, config.advantage).any(dim=1).nonzero().flatten().tolist()
        if len(kept) >= config.prompts_per_step:
            break
    record |= {"prompts_drawn": len(groups), "signal_groups": len(kept)}
    return [groups[q] for q in kept[: config.prompts_per_step]] if config.resample_groups and kept else groups


def next_groups(trainer: Trainer, number: int, t: int) -> list[Group]:
    """Batch number 0, 1, ... of the training prompts, in an order of its own, still without samples."""
    task, rng, groups = trainer.task, rng_for(trainer.config.seed, "hints", trainer.state.step), []
    for i in trainer.draw_prompts(number):
        prompt, demonstration = task.train_prompts[i], task.demonstration_of[i]
        room = trainer.shape.max_position_embeddings - task.max_new_tokens - len(prompt)
        hint = trainer.method.hint(t, demonstration[:-1], rng)[:room] if demonstration else []
        groups.append(Group(i, prompt, hint, demonstration))
    return groups


def sample(trainer: Trainer, prompts: list[list[int]], attempt: int = 0) -> Rollout:
    """A group of completions for each prompt, from the policy as it is now; others at each attempt of a step."""
    config = trainer.config
    seeds = rng_for(config.seed, "samples", trainer.state.step).integers(2**63, size=attempt + 1)  # one an attempt
    generator = torch.Generator(trainer.device).manual_seed(int(seeds[-1]))
    options = {"memory_limit": int(1e9 * config.rollout_memory), "samplers": trainer.samplers, "generator": generator}
    with trainer.fresh_sampler() as sampler:
        rollout = parallel.generate(sampler, prompts, trainer.sampling, group_size=config.group_size, **options)
    if rollout.chunks > trainer.chunks:
        trainer.chunks, rows = rollout.chunks, len(rollout.completions)
        trainer.progress.say(f"the cache of {rows} completions does not fit: {trainer.chunks} chunks a rollout")
    return rollout


def add_samples(trainer: Trainer, groups: list[Group], completions: list, logprobs: list, finished: list) -> None:
    """Put completions, one or more for each group in order, into their groups, as the verifier grades them."""
    task, each = trainer.task, len(completions) // max(len(groups), 1)
    owners = [group for group in groups for _ in range(each)]
    texts = trainer.codec.decode([group.hint + tokens for group, tokens in zip(owners, completions, strict=True)])
    answers = [(text, task.train[group.index]) for group, text in zip(owners, texts, strict=True)]
    grades = parallel.in_shares(lambda some: [task.source.grade(*answer) for answer in some], answers)
    for group, *of_sampler, grade in zip(owners, completions, logprobs, finished, grades, strict=True):
        trainer.state.reward_failures += grade.failed
        group.samples.append(Sample(*of_sampler, grade))


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


def grpo_parts(trainer: Trainer, groups: list[Group], weight: float) -> list[Part]:
    """The samples as a part of the loss, with what it compares them with; nothing where no group has a signal.

    Without a KL or an entropy term a completion of advantage 0 has no gradient: it is left out of the update (and of
    the means of entropy and the like), but counts in the denominators all the same; so does one of weight 0.
    """
    config, rows = trainer.config, [(group.prompt + group.hint, s) for group in groups for s in group.samples]
    divisors = loss_denominators([s.tokens for _, s in rows], config.loss_aggregation, trainer.task.max_new_tokens)
    every = trainer.reference is not None or config.entropy_coef > 0  # those of advantage 0, too
    rows = [(prompt, s, d) for (prompt, s), d in zip(rows, divisors.tolist(), strict=True) if every or s.advantage]
    rows = [row for row in rows if weight * row[1].weight > 0]
    if not any(s.advantage for _, s, _ in rows):
        return []
    own = [row for row in rows if row[1].logprobs is not None]
    joined = [row for row in rows if row[1].logprobs is None]
    parts = [as_part(trainer, joined, joined_objective, weight)] if joined else []
    if own:
        batch = (part := as_part(trainer, own, grpo_objective, weight)).batch
        batch.sampled_logprobs = torch.tensor([p for _, s, _ in own for p in s.logprobs], device=trainer.device)  # [N]
        if config.inner_updates > 1:
            batch.old_logprobs, _ = trainer.budget.retry_on_oom(compute_logprobs, trainer.model, batch)
        if trainer.reference is not None:
            with trainer.on_device(trainer.reference) as reference:
                batch.ref_logprobs, _ = trainer.budget.retry_on_oom(compute_logprobs, reference, batch)
        parts.append(part)
    return parts


def as_part(trainer: Trainer, rows: list, objective: Callable, weight: float, name: str = "") -> Part:
    """rows, one or more: a prompt, its sample, and what the loss of each token is divided by."""
    prompts, samples, divisors = zip(*rows, strict=True)
    denominators = torch.tensor(divisors) / torch.tensor([s.weight for s in samples])  # [B]
    advantages = torch.tensor([s.advantage for s in samples], device=trainer.device)  # [B]
    temperature = 1.0 if name == "sft" else trainer.config.temperature
    batch = Batch(list(prompts), [s.tokens for s in samples], temperature, denominators, advantages)
    return Part(batch, objective, weight, name)


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
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (entropy / denominators).sum()
    stats["clip_fraction"] = stats["clip_low_fraction"] + stats["clip_high_fraction"]
    stats["entropy"] = entropy.detach().sum()
    if batch.sampled_logprobs is not None:
        stats["sampler_gap"] = (logprobs.detach() - batch.sampled_logprobs[here]).abs().sum()
    return loss, stats


# ============================================================================= mixed steps


def measure_entropies(trainer: Trainer, groups: list[Group]) -> None:
    """The mean entropy of each completion's tokens goes into its sample."""
    rows = [(group.prompt, s) for group in groups for s in group.samples]
    batch = Batch.of(((prompt, s.tokens) for prompt, s in rows), trainer.config.temperature)
    _, entropy = trainer.budget.retry_on_oom(compute_logprobs, trainer.model, batch)  # [N]
    for (_, s), of_sample in zip(rows, entropy.split([len(s.tokens) for _, s in rows]), strict=True):
        s.entropy = of_sample.mean().item()


def sft_part(trainer: Trainer, groups: list[Group], weight: float) -> list[Part]:
    """The SFT part of a mixed step, if it has one: the next demonstrations, with a weight, and those in the groups."""
    rows = [row for group in groups for row in group.sft]
    rows += [(*pair, weight) for pair in next_demonstrations(trainer)] if weight > 0 else []
    scale, tokens = max((w for *_, w in rows), default=1.0), sum(len(completion) for _, completion, _ in rows)
    rows = [(prompt, Sample(completion, weight=w / scale), tokens) for prompt, completion, w in rows]
    objective = partial(sft_objective, kind=trainer.method.sft_loss)
    return [as_part(trainer, rows, objective, scale, "sft")] if rows else []


# ============================================================================= one update for all

# SFT and GRPO both weigh the log-probs of completions. They share everything here but the objective, which maps the
# log-probs and entropies [N] of a micro-batch, and what each is divided by, to its part of the loss and to statistics:
# sums over its tokens, or maxima where the name says so.


def update(trainer: Trainer, parts: list[Part], record: dict) -> dict:
    """One AdamW step. Returns what `accumulate_gradient` measured, also put into `record`.

    Raises BadStep where loss or gradient is not finite; then the weights stay as they are.
    """
    stats = trainer.budget.retry_on_oom(accumulate_gradient, trainer.model, parts, trainer.config)
    record |= stats
    if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
        record["grad_norm"] = math.nan
        raise BadStep("loss or gradient not finite", record, parts[-1].batch)
    optimizer = trainer.grpo_optimizer if record["kind"] == "grpo" else trainer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(trainer.config, trainer.state.step + 1, record["kind"])
    optimizer.step()
    return stats


@strictly_deterministic()
def accumulate_gradient(model: Transformer, parts: list[Part], config: Config, max_tokens: int) -> dict:
    """Gradient of a sum of losses, piece by piece, into `.grad`. Returns loss, L2 norm, and means over tokens.

    The denominators are those of a whole batch, so neither loss nor gradient depends on how it is cut. The norm
    is that of all parameters before clipping, which is what clip_grad_norm_ returns; `.grad` is clipped.
    """
    model.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {"loss": torch.zeros((), device=model.device)}
    trained = read = padding = 0  # tokens: of completions; all that is read; what of that is padding
    for part in parts:
        batch, device, tokens = part.batch, model.device, sum(map(len, part.batch.completions))
        whole = torch.full((len(batch.completions),), tokens) if batch.denominators is None else batch.denominators
        denominators = whole.to(device) / part.weight  # [B]
        trained += tokens
        with parallel.together(model):
            for micro in parallel.micro_batches(batch, max_tokens, model):
                logprobs, entropy = completion_logprobs(model, micro, batch.temperature)  # [N]
                loss, stats = part.objective(batch, micro, logprobs, entropy, denominators[micro.batch_index], config)
                loss.backward()
                read += micro.prompts.numel() + micro.completions.numel()
                padding += micro.padding
                totals["loss"] = totals["loss"] + loss.detach()
                for key, value in stats.items():
                    if key.endswith("_max"):
                        totals[key] = torch.maximum(totals.get(key, value), value)
                    else:
                        totals[key] = totals.get(key, 0.0) + value / tokens
        if part.name:  # what this part is like alone, without its weight; it is the first, so all is its own
            norm = parallel.clip_gradients(model, math.inf, more=True)
            totals |= {f"loss_{part.name}": totals["loss"] / part.weight, f"grad_norm_{part.name}": norm / part.weight}
    totals["grad_norm"] = parallel.clip_gradients(model, config.max_grad_norm or math.inf)
    values = torch.stack([value.double() for value in totals.values()]).tolist()  # the one wait for the device
    counts = {"padding_fraction": padding, "tokens_read": read}
    measured = parallel.combine(dict(zip(totals, values, strict=True)) | counts)
    measured["padding_fraction"] /= max(measured["tokens_read"], 1)
    return measured | {"tokens_trained": trained}


def completion_logprobs(model: Transformer, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each completion token, both [N]; the temperature divides the logits, as in sampling.

    On CUDA the arithmetic is bf16, while the weights stay fp32.
    """
    with torch.autocast("cuda", torch.bfloat16, enabled=micro.prompts.is_cuda):
        return kernels.token_logprobs(completion_hidden(model, micro), model.head, micro.targets, temperature)


@torch.no_grad()
def compute_logprobs(model: Transformer, batch: Batch, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, both [N], of the completion tokens of a batch, without gradient."""
    logprobs, entropy = found = torch.zeros(2, sum(map(len, batch.completions)), device=model.device)  # [N]
    with parallel.together(model):
        for micro in parallel.micro_batches(batch, max_tokens, model):
            here = micro.token_index
            logprobs[here], entropy[here] = completion_logprobs(model, micro, batch.temperature)
    parallel.add_up([found])
    return logprobs, entropy


# ============================================================================= optimizer and learning rate


def make_optimizer(model: Transformer, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay pulls on matrices, not on norms, biases and adapters."""
    trained = [p for _, p in model.trained_parameters()]
    matrices = [p for p in trained if p.dim() >= 2 and not model.adapter]
    others = [p for p in trained if p.dim() < 2 or model.adapter]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: Config, step: int, kind: str = "grpo") -> float:
    """The rate of step 1, 2, ..., warm-up and adaptive counted through. Each stage starts by rising from 0.

    In wsd only the final fall depends on --steps, so a run that has not come to it can be resumed with another
    --steps and --decay-fraction: that is a decay branch (arXiv 2404.06395).
    """
    in_warmup = step <= config.warmup_steps
    adaptive_lr = (config.sft_lr if kind == "sft" else 0.0) or config.lr
    peak, length = (config.warmup_lr, config.warmup_steps) if in_warmup else (adaptive_lr, config.steps)
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
