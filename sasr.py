"""SASR: Step-wise Adaptive Integration of Supervised Fine-tuning and Reinforcement Learning, from scratch.

    python sasr.py                                          # the default: puzzles, a small model, minutes on a CPU
    python sasr.py --controller grpo --seed 3 --out runs/x  # a rival on the same road
    python sasr.py --help                                   # every knob, with unit and default

The method (arXiv 2505.13026). A language model pi_theta is first warmed up with W steps of supervised
fine-tuning (SFT) on demonstrations e of prompts x. The gradient norm of that loss at the end of the warm-up,
G_warmup, becomes the yardstick. Then, at every one of T adaptive steps,

    p_t = G_last_sft / (G_last_sft + gamma * G_warmup)                                            (1)
    alpha ~ Uniform(0, 1)
    alpha < p_t :  one SFT step on demonstrations;  G_last_sft <- || grad L_SFT ||_2
    otherwise   :  one GRPO step on the model's own samples

    L_SFT  = - mean over tokens of log pi(e_t | x, e_<t)                                          (2)
    L_GRPO = - mean over tokens of [ min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta k3 ]   (3)
    r = pi(o_t) / pi_old(o_t),   A = (reward - mean of its group) / (std of its group + eps)      (4)

Why a gradient norm? L_SFT = H(p_data) + KL(p_data || pi_theta), so grad L_SFT is the gradient of the
divergence from the demonstrations. A model that has drifted from its textbook has a large one and is sent
back to it; a model that has not is left to practise.

Two observations make the code small. Every rival (SFT, GRPO, SFT-then-GRPO, alternation, cosine, random) is
the same loop with another function from the step to p_t: see "Controllers". And SFT and GRPO are the same
update, a weighted sum of completion log-probs, so one function takes the optimizer step for both, with one
denominator and one gradient norm; else the two norms in (1) would not be comparable: see "The update".

Where the paper is silent or we depart from it:
  * Which norm, smoothed or not, and gamma are options (`--warmup-norm`, `--current-norm`, `--gamma`). Norms
    are taken before clipping, over all parameters, after all micro-batches.
  * G_last_sft goes stale while GRPO steps run. Its age is logged, and `--probe-every` refreshes it by
    measuring an SFT gradient without stepping.
  * The loss is a mean over the completion tokens of the whole batch (DAPO, arXiv 2503.14476), not of each
    sequence: a long answer does not count less per token.
  * The standard deviation in (4) is that of the group itself (divided by G, not G - 1), so that a group of
    one has advantage 0 and not NaN.
  * A GRPO step whose groups all agree (no reward differs) is skipped: the objective has no gradient, and Adam
    would move the weights all the same, on momentum.
  * Completions are drawn and scored at the same temperature, without top-k or top-p, so that the policy
    which is scored is the policy which was sampled. pi_old is scored by the trainer too, not taken from the
    sampler, which on CUDA works with a bf16 copy.
  * No random state is ever stored. Every draw comes from a generator seeded with (seed, purpose, step), so
    a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shlex
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

import kernels
from data import TASKS, Grade, Task, load_task
from data.isolated import IsolatedVerifier, VerifierFailed
from data.scores import scores_of
from data.task import MOST_REWARD
from data.tokenized import TokenizedTask
from data.tokenizer import Codec
from model import ModelConfig, SharedPrompts, Transformer, read_config, resolve_checkpoint
from rollout import LEAST_TEMPERATURE, Rollout, SamplingParams, free_memory, generate, in_pieces, resolve_device
from run import Checkpoint, Fault, Interrupt, Progress, RunFolder, Stopped, clock, provenance, say

# ============================================================================= controllers
#
# A controller says how likely the next step is an SFT step. SASR looks at gradient norms; all the others are schedules.


class SasrController:
    """Equation (1), with G_warmup and G_last_sft smoothed or not."""

    def __init__(
        self,
        gamma: float = 1.0,
        *,
        warmup_norm: str = "last",  # last | mean (of the last `window`) | ema
        window: int = 20,
        current_norm: str = "last",  # last | ema
        ema: float = 0.9,
    ):
        self.gamma = gamma
        self.warmup_norm = warmup_norm
        self.window = window
        self.current_norm = current_norm
        self.ema = ema
        self.warmup_norms: list[float] = []  # the last ones, for the mean
        self.g_warmup: float | None = None
        self.g_last: float | None = None

    def observe_warmup(self, grad_norm: float) -> None:
        """The SFT gradient norm of a warm-up step. G_last_sft starts there too: p_0 = 1 / (1 + gamma)."""
        self.warmup_norms = [*self.warmup_norms, grad_norm][-self.window :]
        if self.warmup_norm == "mean":
            self.g_warmup = sum(self.warmup_norms) / len(self.warmup_norms)
        else:
            self.g_warmup = self._smoothed(self.g_warmup, grad_norm, self.warmup_norm)
        self.g_last = self.g_warmup

    def observe_sft(self, grad_norm: float) -> None:
        """The SFT gradient norm of an adaptive step, or of a probe."""
        self.g_last = self._smoothed(self.g_last, grad_norm, self.current_norm)

    def _smoothed(self, old: float | None, new: float, how: str) -> float:
        return self.ema * old + (1 - self.ema) * new if how == "ema" and old is not None else new

    def sft_probability(self, step: int = 0) -> float:
        """p_t. The step does not matter: everything is in the two norms. RuntimeError before any was observed."""
        if self.g_warmup is None:
            raise RuntimeError("SasrController: no warm-up norm was observed")
        total = self.g_last + self.gamma * self.g_warmup
        return self.g_last / total if total > 0 else 0.0  # no gradient at all: the textbook has nothing to teach

    def state_dict(self) -> dict:
        return {"g_warmup": self.g_warmup, "g_last": self.g_last, "warmup_norms": self.warmup_norms}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for norms that are none: one NaN, and no p_t would ever be above alpha again."""
        known = [*state["warmup_norms"], *(state[key] for key in ("g_warmup", "g_last") if state[key] is not None)]
        if not all(0 <= norm < math.inf for norm in known):
            raise ValueError(f"gradient norms must be finite and not negative: {known}")
        self.g_warmup, self.g_last, self.warmup_norms = state["g_warmup"], state["g_last"], state["warmup_norms"]


class ScheduleController(SasrController):
    """p_t as a plain function of the adaptive step t = 0, 1, ... The norms are kept for the log and not looked at."""

    def __init__(self, schedule: Callable[[int], float]):
        super().__init__()
        self.schedule = schedule

    def sft_probability(self, step: int = 0) -> float:
        return self.schedule(step)


def make_controller(config: Config) -> SasrController:
    if config.controller == "sasr":
        return SasrController(
            config.gamma,
            warmup_norm=config.warmup_norm,
            window=config.warmup_norm_window,
            current_norm=config.current_norm,
            ema=config.norm_ema,
        )
    switch = config.switch_step or config.steps // 2
    k, m = parse_ratio(config.alternate)
    schedules = {
        "sft": lambda t: 1.0,
        "grpo": lambda t: 0.0,
        "sft-then-grpo": lambda t: 1.0 if t < switch else 0.0,
        "alternate": lambda t: 1.0 if t % (k + m) < k else 0.0,
        "cosine": lambda t: (1 + math.cos(math.pi * t / config.steps)) / 2,
        "random": lambda t: config.sft_fraction,
    }
    return ScheduleController(schedules[config.controller])


def may_choose_sft(config: Config) -> bool:
    """Whether any step of the adaptive stage can be an SFT step."""
    controller = make_controller(config)
    scheduled = isinstance(controller, ScheduleController)
    return any(not scheduled or controller.sft_probability(t) > 0 for t in range(config.steps))


def parse_ratio(text: str) -> tuple[int, int]:
    """'2:1' -> (2, 1)."""
    k, _, m = text.partition(":")
    if not (k.isdecimal() and m.isdecimal() and int(k) + int(m) > 0):
        raise ValueError(f"--alternate {text}: expected SFT:GRPO, two whole numbers such as 2:1")
    return int(k), int(m)


# ============================================================================= advantages


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
    if mode == "centered":
        return centered
    return centered / (rewards.std(dim=1, keepdim=True, correction=0) + eps)


# ============================================================================= the update
#
# SFT and GRPO both weigh the log-probs of completions. They share everything here but the objective.


@dataclass
class Batch:
    """B prompts with a completion each, as token ids, and for GRPO what the objective needs beside them."""

    prompts: list[list[int]]
    completions: list[list[int]]
    temperature: float = 1.0
    advantages: Tensor | None = None  # [B]
    old_logprobs: list[Tensor] | None = None  # B tensors [completion length]; None: on-policy, the ratio is 1
    ref_logprobs: list[Tensor] | None = None  # likewise; None: no reference policy
    denominators: Tensor | None = None  # [B] what each token of a sequence is divided by; None: the batch's tokens
    sampled_logprobs: list[Tensor] | None = None  # what the sampler said it drew from; compared with, not learnt from

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))


@dataclass
class MicroBatch:
    """Some sequences of a batch, padded on the right. A prompt that several of them share is there once.

    The last token of a completion is never read: nothing follows it. Where no two sequences share a prompt, `prompts`
    are the whole sequences and `completions` has no columns, since plainly causal attention is the faster one.
    """

    members: list[int]  # which sequences of the batch, b of them
    prompts: Tensor  # [q, T_prompt] int64
    prompt_lengths: Tensor  # [q]
    owner: Tensor  # [b] the prompt of each sequence
    completions: Tensor  # [b, T - 1] int64
    rows: Tensor  # [N] the sequence of each completion token
    columns: Tensor  # [N] its place in the completion (in the whole sequence: the place of what predicts it)
    targets: Tensor  # [N] the token itself
    padding: int  # tokens of prompts and completions that are none


def tokens_at_once(limit: int, device: torch.device) -> int:
    return limit or (2048 if device.type == "cpu" else 16384)


def micro_batches(batch: Batch, most_tokens: int, device: torch.device) -> list[MicroBatch]:
    """Cut a batch into pieces that read at most `most_tokens` (padding included; 0: by device).

    Completions of like length together make little padding; those of one prompt together share it. Which of the two
    matters more depends on the lengths, so both cuts are made and the one that reads fewer tokens is taken.
    """
    numbers: dict[tuple[int, ...], int] = {}
    group = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in batch.prompts]
    prompt_lengths = list(map(len, batch.prompts))
    read_lengths = [max(len(completion) - 1, 0) for completion in batch.completions]

    def tokens_read(members: list[int]) -> int:
        of_prompts = len({group[i] for i in members}) * max(prompt_lengths[i] for i in members)
        return of_prompts + len(members) * max(read_lengths[i] for i in members)

    by_completion = sorted(range(len(group)), key=lambda i: (read_lengths[i], group[i]))
    by_prompt = sorted(range(len(group)), key=lambda i: (prompt_lengths[i], group[i], read_lengths[i]))
    most_tokens = tokens_at_once(most_tokens, device)
    cuts = [in_pieces(order, tokens_read, most_tokens) for order in (by_completion, by_prompt)]
    best = min(cuts, key=lambda pieces: sum(map(tokens_read, pieces)))
    return [_collate(batch, members, device) for members in best]


def _collate(batch: Batch, members: list[int], device: torch.device) -> MicroBatch:
    def tensor(values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    def padded(sequences) -> Tensor:
        longest = max(map(len, sequences))
        return tensor([*sequence, *[0] * (longest - len(sequence))] for sequence in sequences)

    prompts = list(dict.fromkeys(tuple(batch.prompts[i]) for i in members))
    completions = [batch.completions[i] for i in members]
    read = [completion[:-1] for completion in completions]
    if len(prompts) < len(members):
        owner = [prompts.index(tuple(batch.prompts[i])) for i in members]
        first = [0] * len(members)  # the column of each completion's first token
    else:
        owner = list(range(len(members)))
        first = [len(prompt) - 1 for prompt in prompts]
        prompts = [(*prompt, *rest) for prompt, rest in zip(prompts, read, strict=True)]
        read = [[]] * len(members)
    micro = MicroBatch(
        members,
        prompts=padded(prompts),
        prompt_lengths=tensor(map(len, prompts)),
        owner=tensor(owner),
        completions=padded(read),
        rows=tensor(row for row, completion in enumerate(completions) for _ in completion),
        columns=tensor(start + t for start, c in zip(first, completions, strict=True) for t in range(len(c))),
        targets=tensor(itertools.chain(*completions)),
        padding=0,
    )
    micro.padding = micro.prompts.numel() + micro.completions.numel() - sum(map(len, [*prompts, *read]))
    return micro


def completion_hidden(model: Transformer, micro: MicroBatch) -> Tensor:
    """The hidden states that predict the completion tokens, [N, D]; prompts and padding never meet the vocabulary."""
    if len(micro.prompts) == len(micro.members):
        return model(micro.prompts)[micro.rows, micro.columns]
    shared = SharedPrompts(micro.prompt_lengths, micro.owner)
    of_prompts = model(micro.prompts, cache=shared)  # [q, T_prompt, D]
    start = micro.prompt_lengths[micro.owner]  # [b]
    hidden = of_prompts[micro.owner, start - 1][:, None]  # [b, 1, D] predicts the first token
    if micro.completions.shape[1]:
        positions = start[:, None] + torch.arange(micro.completions.shape[1], device=start.device)  # [b, T - 1]
        hidden = torch.cat((hidden, model(micro.completions, positions, shared)), dim=1)  # [b, T, D]
    return hidden[micro.rows, micro.columns]


def completion_logprobs(model: Transformer, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each completion token, both [N]; the temperature divides the logits, as in sampling."""
    with autocast(model.device):
        return kernels.token_logprobs(completion_hidden(model, micro), model.head, micro.targets, temperature)


@torch.no_grad()
def score(model: Transformer, batch: Batch, config: Config) -> list[Tensor]:
    """Log-probs of every completion under a frozen policy: B tensors [completion length]."""
    scores: list[Tensor] = [torch.empty(0)] * len(batch.prompts)
    for micro in micro_batches(batch, config.tokens_per_microbatch, model.device):
        logprobs, _ = completion_logprobs(model, micro, batch.temperature)
        for i, part in zip(
            micro.members, logprobs.split([len(batch.completions[i]) for i in micro.members]), strict=True
        ):
            scores[i] = part
    return scores


@torch.no_grad()
def divergence(model: Transformer, reference: Transformer, batch: Batch, config: Config) -> float:
    """KL(model || reference) in nats, exact over the vocabulary, mean over the completion tokens of a batch."""
    total = 0.0
    for micro in micro_batches(batch, config.tokens_per_microbatch, model.device):
        with autocast(model.device):
            hidden, ref_hidden = completion_hidden(model, micro), completion_hidden(reference, micro)
            total += kernels.exact_kl(hidden, model.head, ref_hidden, reference.head).sum().item()
    return total / max(batch.tokens, 1)


def loss_denominators(completions: list[list[int]], aggregation: str, max_new_tokens: int) -> Tensor:
    """What a token's part of the GRPO loss is divided by, for each of the B completions of a whole rollout: [B].

    `token-mean`: every token counts the same. `grpo`: the mean of each completion, then of those, so that a token
    of a long one counts less. `dr_grpo`: a constant, so that a batch of short completions has a small loss.
    """
    lengths = torch.tensor([max(len(completion), 1) for completion in completions])
    if aggregation == "grpo":
        return lengths * len(lengths)
    return torch.full_like(lengths, lengths.sum() if aggregation == "token-mean" else len(lengths) * max_new_tokens)


# An objective maps the log-probs [N] of a micro-batch, and what each is divided by, to its part of the loss, and to
# statistics: sums over its tokens, or maxima where the name says so.


def sft_objective(batch: Batch, micro: MicroBatch, logprobs: Tensor, denominators: Tensor, config: Config):
    """Equation (2); with `dft`, each token is weighed by its own probability (arXiv 2508.05629, equation 9)."""
    weights = logprobs.detach().exp() if config.sft_loss == "dft" else torch.ones_like(logprobs)
    return -(weights * logprobs / denominators).sum(), {}


def grpo_objective(batch: Batch, micro: MicroBatch, logprobs: Tensor, denominators: Tensor, config: Config):
    """Equation (3). On-policy, pi_old is pi itself: the ratio is 1 and its gradient is that of the log-prob."""

    def of_members(parts: list[Tensor]) -> Tensor:
        return torch.cat([parts[i] for i in micro.members])  # [N]

    loss, stats = kernels.grpo_loss(
        logprobs,
        of_members(batch.old_logprobs) if batch.old_logprobs else logprobs.detach(),
        of_members(batch.ref_logprobs) if batch.ref_logprobs else None,
        batch.advantages[micro.members].to(logprobs.device)[micro.rows],
        torch.ones_like(logprobs),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
        denominator=denominators,
    )
    if batch.sampled_logprobs:
        sampled = of_members(batch.sampled_logprobs).to(logprobs.device)
        stats["sampler_gap"] = (logprobs.detach() - sampled).abs().sum()
    return loss, stats


def accumulate_gradient(model: Transformer, batch: Batch, objective, config: Config) -> dict:
    """Gradient of the whole batch, piece by piece, into `.grad`. Returns its loss, L2 norm, and means over tokens.

    The denominators are those of the whole batch, so neither loss nor gradient depends on how it is cut. The norm
    is that of all parameters, before clipping; `.grad` is clipped on return.
    """
    model.zero_grad(set_to_none=True)
    denominators = batch.denominators
    if denominators is None:
        denominators = torch.full((len(batch.completions),), max(batch.tokens, 1))
    totals: dict[str, Tensor] = {"loss": torch.zeros((), device=model.device)}
    read = padding = 0  # tokens; padding is part of what is read
    for micro in micro_batches(batch, config.tokens_per_microbatch, model.device):
        if len(micro.targets) == 0:
            continue
        logprobs, entropy = completion_logprobs(model, micro, batch.temperature)
        divisors = denominators[micro.members].to(model.device)[micro.rows]  # [N]
        loss, stats = objective(batch, micro, logprobs, divisors, config)
        loss.backward()
        read += micro.prompts.numel() + micro.completions.numel()
        padding += micro.padding
        totals["loss"] = totals["loss"] + loss.detach()
        for key, value in (stats | {"entropy": entropy.detach().sum()}).items():
            if key.endswith("_max"):
                totals[key] = torch.maximum(totals.get(key, value), value)
            else:
                totals[key] = totals.get(key, 0.0) + value / batch.tokens
    totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    values = torch.stack([value.double() for value in totals.values()]).tolist()  # the one wait for the device
    return dict(zip(totals, values, strict=True)) | {"padding_fraction": padding / max(read, 1)}


def make_optimizer(model: Transformer, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay pulls on matrices, not on norms and biases."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1, 2, ..., warm-up and adaptive counted through. Each stage starts by rising from 0.

    Only the final fall of a wsd run knows how long the run is, so a run that was stopped before it can be resumed
    with another --steps and --decay-fraction: that is a decay branch (arXiv 2404.06395).
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


def autocast(device: torch.device):
    """bf16 arithmetic on CUDA, where the weights stay fp32; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


# ============================================================================= configuration


MOST = 10**7  # of any number but the seed: nothing that a run could use, and no loop over it takes long


def option(default, help: str, choices: tuple[str, ...] = (), low: float | None = None):
    """A field of Config: its default, what it means (with unit), and which values are allowed."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass
class Config:
    """Everything a run depends on. One flag a field: `group_size` is `--group-size`."""

    # --- what to learn
    task: str = option("knights-knaves", "NAME[:key=value,...], e.g. countdown or knights-knaves:people=4,depth=3")
    data: str = option("", "folder with train.jsonl and test.jsonl (or .json) to read the task from ('': generate it)")
    skip_bad_lines: bool = option(False, "leave out records of --data that cannot be read, and say how many")
    verifier: str = option("", "how answers are compared, e.g. math-verify, numeric, regex ('': the task's own way)")
    reward: str = option(
        "",
        "your own reward, MODULE:FUNCTION or FILE.py:FUNCTION; that file is run, and a number from 1 on counts as "
        "correct ('': the verifier)",
    )
    reward_seconds: float = option(10.0, "a verifier of your own, math-verify or regex may take so long", low=0.001)
    reward_on_error: str = option("0", "reward where such a verifier raises, hangs or returns no number; or stop")
    ood_task: str = option(
        "auto",
        "out-of-domain test, NAME[:key=value,...] with its own verifier, or none; auto: a harder sibling of a plain "
        "--task",
    )
    warmup_task: str = option("", "warm up on this task instead, as NAME[:key=value,...] ('': the task itself)")
    # --- the model
    model: str = option("", "checkpoint directory or hub id to start from ('': build a small model from scratch)")
    prompt_format: str = option("raw", "raw text, or chat: a user's message in --model's template", ("raw", "chat"))
    system: str = option("", "chat: the system message ('': what the template says by itself)")
    save_dtype: str = option(
        "same",
        "type of the weights in OUT/model; same: that of --model's files",
        ("same", "float32", "bfloat16", "float16"),
    )
    hidden_size: int = option(128, "from scratch: features", low=1)
    layers: int = option(4, "from scratch: decoder layers", low=1)
    heads: int = option(4, "from scratch: attention heads", low=1)
    vocab_size: int = option(1024, "from scratch: most tokens that the tokenizer may learn", low=257)
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")
    compile: bool = option(False, "torch.compile the model for training: minutes at the first steps, faster ones after")
    # --- how long
    warmup_steps: int = option(250, "SFT steps before the adaptive stage", low=0)
    steps: int = option(500, "steps of the adaptive stage, counted from its beginning also on --resume", low=0)
    # --- who decides between SFT and GRPO
    controller: str = option(
        "sasr",
        "function from the step to p_t",
        ("sasr", "sft", "grpo", "sft-then-grpo", "alternate", "cosine", "random"),
    )
    gamma: float = option(1.0, "sasr: weight of the warm-up norm in equation (1); larger means more GRPO", low=0)
    warmup_norm: str = option(
        "last", "sasr: G_warmup is the norm of the last warm-up step, a mean, or an EMA", ("last", "mean", "ema")
    )
    warmup_norm_window: int = option(20, "sasr: steps that --warmup-norm mean averages over", low=1)
    current_norm: str = option("last", "sasr: G_last_sft is the last SFT norm, or an EMA of them", ("last", "ema"))
    norm_ema: float = option(0.9, "sasr: decay of both EMAs, per SFT step", low=0)
    probe_every: int = option(0, "refresh a norm of this age (steps) by an SFT gradient without a step; 0: off", low=0)
    switch_step: int = option(0, "sft-then-grpo: adaptive step at which GRPO begins; 0: half-way", low=0)
    alternate: str = option("1:1", "alternate: SFT steps : GRPO steps")
    sft_fraction: float = option(0.5, "random: the constant p_t", low=0)
    # --- lengths
    max_new_tokens: int = option(0, "tokens a completion; 0: a quarter more than the longest demonstration", low=0)
    max_prompt_tokens: int = option(
        0, "longer prompts are dropped; 0: what --max-new-tokens leaves of the context", low=0
    )
    max_demonstration_tokens: int = option(0, "longer demonstrations are dropped; 0: what the context leaves", low=0)
    # --- SFT
    sft_batch_size: int = option(32, "demonstrations an SFT step", low=1)
    sft_loss: str = option(
        "nll", "token weight: nll is 1, dft is the token's own probability (arXiv 2508.05629)", ("nll", "dft")
    )
    # --- GRPO
    prompts_per_step: int = option(8, "prompts a GRPO step", low=1)
    group_size: int = option(8, "completions a prompt", low=1)
    temperature: float = option(1.0, "of the samples; the loss scores the same distribution", low=0)
    advantage: str = option(
        "zscore", "equation (4), without its division, or +1/-1 around the median", ("zscore", "centered", "median")
    )
    advantage_eps: float = option(1e-4, "eps of equation (4)", low=0)
    loss_aggregation: str = option(
        "token-mean",
        "each token counts the same, or grpo: each completion does, or dr_grpo: a constant divisor",
        ("token-mean", "grpo", "dr_grpo"),
    )
    clip_low: float = option(0.2, "ratio may fall by this much", low=0)
    clip_high: float = option(0.2, "ratio may rise by this much", low=0)
    kl_coef: float = option(0.0, "beta of equation (3); 0 keeps no reference policy", low=0)
    reference: str = option(
        "warmup", "reference policy: the model at the end of warm-up, or the initial one", ("warmup", "initial")
    )
    inner_updates: int = option(1, "optimizer steps a rollout", low=1)
    # --- the optimizer (AdamW)
    warmup_lr: float = option(1e-3, "peak learning rate of the warm-up stage", low=0)
    lr: float = option(5e-4, "peak learning rate of the adaptive stage", low=0)
    lr_schedule: str = option(
        "wsd",
        "cosine falls to 0 in each stage; wsd falls linearly at the end of the run",
        ("constant", "cosine", "wsd"),
    )
    lr_warmup_steps: int = option(20, "steps over which the rate rises from 0 when a stage begins", low=0)
    decay_fraction: float = option(0.5, "wsd: share of --steps over which the rate falls; 0: it never does", low=0)
    weight_decay: float = option(0.1, "AdamW's, on matrices", low=0)
    beta1: float = option(0.9, "AdamW's decay of the mean", low=0)
    beta2: float = option(0.98, "AdamW's decay of the square", low=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this L2 norm; 0: never", low=0)
    max_bad_steps: int = option(5, "stop after so many steps in a row whose loss or gradient is not finite", low=1)
    tokens_per_microbatch: int = option(
        0, "tokens, padding included, that go through the model at once; 0: 2048 on a CPU, 16384 on CUDA", low=0
    )
    rollout_memory: float = option(
        0.0, "GB that the cache of a rollout may take, the rest waits for another wave; 0: 80% of what is free", low=0
    )
    offload_reference: bool = option(False, "keep the reference policy in CPU memory while it is not needed")
    # --- evaluation and files
    eval_every: int = option(125, "steps between evaluations; 0: only before, between and after the stages", low=0)
    eval_examples: int = option(512, "examples an evaluation, decoded greedily", low=1)
    eval_split: str = option("test", "which examples those are", ("test", "train"))
    eval_samples: int = option(0, "also draw so many answers to each, for pass@1, 2, 4, ...", low=0)
    eval_temperature: float = option(1.0, "of those samples", low=0)
    save_every: int = option(100, "steps between checkpoints; 0: only at the end", low=0)
    out: str = option("", "folder of the run ('': runs/CONTROLLER-TASK-SEED, numbered if taken)")
    seed: int = option(0, "of everything: puzzles, weights, order, alpha, samples", low=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    deterministic: bool = option(False, "on CUDA: the same bits for the same seed, slower (a CPU always gives them)")

    def __post_init__(self):
        """Raise ValueError naming the flag, the value and the mend."""
        for spec in dataclasses.fields(self):
            value, flag = getattr(self, spec.name), flag_name(spec.name)
            choices, low = spec.metadata["choices"], spec.metadata["low"]
            allowed = {"int": int, "float": (int, float), "str": str, "bool": bool}[spec.type]
            if not isinstance(value, allowed) or (isinstance(value, bool) and spec.type != "bool"):
                raise ValueError(f"{flag} {value!r}: must be of type {spec.type}")
            if choices and value not in choices:
                raise ValueError(f"{flag} {value}: choose from {', '.join(choices)}")
            if low is not None and not low <= value < math.inf:
                raise ValueError(f"{flag} {value}: must be {low} or more")
            if low is not None and value > MOST and spec.name != "seed":
                raise ValueError(f"{flag} {value}: must be at most {MOST}")
        for name, most in (
            ("sft_fraction", 1.0),
            ("decay_fraction", 1.0),
            ("norm_ema", 1.0),
            ("beta1", 0.999999),
            ("beta2", 0.999999),
            ("seed", 2**63 - 1),
        ):
            if getattr(self, name) > most:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must lie between 0 and {most}")
        if self.temperature == 0:
            raise ValueError("--temperature 0: greedy samples of a group are all alike and teach nothing")
        for name in ("temperature", "eval_temperature"):
            if 0 < getattr(self, name) < LEAST_TEMPERATURE:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least {LEAST_TEMPERATURE}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"--hidden-size {self.hidden_size}: must be a multiple of twice --heads {self.heads}")
        parse_ratio(self.alternate)
        if self.reward_on_error != "stop":
            try:
                allowed = abs(float(self.reward_on_error)) <= MOST_REWARD
            except ValueError:
                allowed = False
            if not allowed:
                raise ValueError(
                    f"--reward-on-error {self.reward_on_error}: must be a number of at most {MOST_REWARD:g}, or stop"
                )

    def hash(self) -> str:
        """Equal for equal values, wherever the run is kept."""
        values = dataclasses.asdict(self) | {"out": ""}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, values: dict, source: Path) -> Config:
        """The configuration in a run's config.json; ValueError naming the file and what is wrong in it."""
        unknown = set(values) - {spec.name for spec in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{source}: unknown setting {min(unknown)!r}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


# ============================================================================= what a run is made of


def load_task_spec(spec: str, path: str, seed: int, **more) -> Task:
    """'countdown:numbers=4,test_size=100' -> the task. Raises ValueError naming what is wrong in the spec."""
    name, _, rest = spec.partition(":")
    flags = {"name": "--task", "path": "--data", "seed": "--seed"} | {key: flag_name(key) for key in more}
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"task {spec!r}: expected NAME:key=value,..., found {part!r}")
        if key in flags or key in options:
            raise ValueError(f"task {spec!r}: {key} is given twice, or has a flag of its own, {flags.get(key, '')}")
        options[key] = value
    return load_task(name, path or None, seed=seed, **options, **more)


def generated_task(flag: str, spec: str, seed: int) -> Task:
    """A second task beside --task, which has no data of its own. Raises ValueError naming the flag."""
    able = [name for name, module in TASKS.items() if hasattr(module, "generate")]
    if spec.partition(":")[0] not in able:
        raise ValueError(f"{flag} {spec}: only generated tasks can serve here: {', '.join(able)}")
    return load_task_spec(spec, "", seed)


# Out of the domain but within its vocabulary: claims of three operands instead of two, four numbers instead of three.
SIBLINGS = {"knights-knaves": "knights-knaves:width=3,train_size=1", "countdown": "countdown:numbers=4,train_size=1"}


def load_tasks(config: Config) -> tuple[Task, Task, Task | None]:
    """The task, the task to warm up on (often the same), and the out-of-domain one (or None)."""
    verifier = {"verifier": config.verifier} if config.verifier else {}
    task = load_task_spec(config.task, config.data, config.seed, skip_bad_lines=config.skip_bad_lines, **verifier)
    options = task.verify.keywords
    if config.reward or options.get("verifier") in ("math-verify", "regex"):  # not ours, or of no bounded time
        isolated = IsolatedVerifier(
            task.name, options, config.reward, seconds=config.reward_seconds, on_error=config.reward_on_error
        )
        task = dataclasses.replace(task, verify=isolated)
    warmup = generated_task("--warmup-task", config.warmup_task, config.seed) if config.warmup_task else task
    ood = config.ood_task
    if ood == "auto":  # the sibling fits the task's own defaults only, and its own verifier
        ood = "none" if config.data or config.reward else SIBLINGS.get(config.task, "none")
    return task, warmup, None if ood == "none" else generated_task("--ood-task", ood, config.seed)


def small_shape(config: Config, codec: Codec, context: int) -> ModelConfig:
    """The shape of a model from scratch: a small Qwen3."""
    return ModelConfig(
        vocab_size=codec.tokenizer.get_vocab_size(),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=max(context, 4096),  # a limit, not a table: rotary positions take no memory
        tie_word_embeddings=True,
        eos_token_id=codec.stop_token_ids[0],
    )


class Setting:
    """All that a run is made of but its weights: the device, the tasks as token ids, and the shape of the model."""

    def __init__(self, config: Config):
        self.config, self.device = config, resolve_device(config.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
            torch.use_deterministic_algorithms(True, warn_only=True)  # some sums over rows exist in one form only
        task, warmup_task, ood_task = load_tasks(config)
        self.checkpoint: Path | None = None
        context = math.inf
        if config.model:
            self.checkpoint = resolve_checkpoint(config.model, weights=False)
            self.shape = read_config(self.checkpoint)
            context = self.shape.max_position_embeddings
            self.codec = Codec.from_pretrained(
                self.checkpoint, prompt_format=config.prompt_format, system=config.system
            )
        elif config.prompt_format == "chat" or config.system:
            raise ValueError(
                "--prompt-format chat and --system need --model: a model from scratch has no chat template"
            )
        else:
            examples = task.train + warmup_task.train
            texts = (text for e in examples for text in (e.prompt, e.demonstration or e.answer))
            self.codec = Codec.trained_on(texts, config.vocab_size)

        def tokenize(task: Task, split: str) -> TokenizedTask:
            return TokenizedTask(
                task,
                self.codec,
                context=context,
                max_new_tokens=config.max_new_tokens,
                max_prompt_tokens=config.max_prompt_tokens,
                max_demonstration_tokens=config.max_demonstration_tokens,
                eval_split=split,
            )

        self.task = tokenize(task, config.eval_split)
        self.warmup_task = self.task if warmup_task is task else tokenize(warmup_task, "test")
        self.ood_task = tokenize(ood_task, "test") if ood_task else None
        self._check_examples()
        if not config.model:
            longest = max(t.context for t in (self.task, self.warmup_task, self.ood_task) if t)
            self.shape = small_shape(config, self.codec, longest)

    def _check_examples(self) -> None:
        config = self.config
        if total_steps(config):
            self.task.check_prompts()
        if config.warmup_steps:
            self.warmup_task.check_demonstrations()
        if may_choose_sft(config):
            self.task.check_demonstrations()
        for task in filter(None, (self.task, self.ood_task)):
            task.check_evaluated(config.eval_examples)

    def make_model(self) -> Transformer:
        """With the weights of --model, or random ones, which are the same for the same seed."""
        if self.checkpoint:
            return Transformer.from_pretrained(resolve_checkpoint(self.config.model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return Transformer(self.shape)


# Randomness without state: a draw is a function of the seed, its purpose, and a count.
PURPOSES = {"demonstrations": 1, "prompts": 2, "alpha": 3, "samples": 4, "probe": 5, "evaluation": 6}


def random_source(seed: int, purpose: str, count: int) -> np.random.Generator:
    return np.random.default_rng([seed, PURPOSES[purpose], count])


def shuffled(population: int, start: int, count: int, seed: int, purpose: str) -> list[int]:
    """Indices start ... start+count of an endless row of epochs, each its own permutation of the population."""
    epochs = range(start // population, (start + count - 1) // population + 1)
    order = np.concatenate([random_source(seed, purpose, epoch).permutation(population) for epoch in epochs])
    offset = start - epochs[0] * population
    return order[offset : offset + count].tolist()


# ============================================================================= training


@dataclass
class State:
    """Where a run is. With weights, optimizer, controller and reference policy, this is all that a resume needs."""

    step: int = 0  # steps done, warm-up and adaptive counted through
    sft_steps: int = 0  # of the adaptive stage
    grpo_steps: int = 0
    norm_step: int = 0  # when the controller last saw an SFT gradient norm
    bad_steps: int = 0  # dropped: loss, gradient or sampler were not finite, or no reward could be had
    bad_in_a_row: int = 0
    reward_failures: int = 0  # completions whose verifier failed, evaluations included
    seconds: dict = field(default_factory=lambda: {"warmup": 0.0, "sft": 0.0, "grpo": 0.0, "eval": 0.0})
    accuracy: dict = field(default_factory=dict)  # accuracy_before, _warmup, _final, and each with _ood
    scores: dict = field(default_factory=dict)  # of the last evaluation
    reward: float | None = None  # mean of the last rollout
    unlogged: dict | None = None  # the last step's line of the metrics, while its evaluation has not come to its end

    def __post_init__(self):
        """Raise ValueError for what cannot be: a state may come from a file."""
        counts = [getattr(self, spec.name) for spec in dataclasses.fields(self) if spec.type == "int"]
        numbers = [*self.seconds.values(), *self.accuracy.values(), *self.scores.values(), self.reward or 0.0]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts of steps must be whole numbers from 0 on, not {counts}")
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(f"seconds, accuracies and scores must be numbers, not {numbers}")
        if set(self.seconds) != {"warmup", "sft", "grpo", "eval"} or not isinstance(self.unlogged, dict | None):
            raise ValueError(f"seconds or the last line are amiss: {list(self.seconds)}, {self.unlogged!r}")


EVAL_ROWS = 256  # answers that an evaluation draws at once

# What a GRPO step measures while it updates; null where it did not.
UPDATE_STATISTICS = (
    *("kl", "entropy", "clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_mean", "ratio_max"),
    *("sampler_gap", "padding_fraction"),
)


class Trainer:
    """Model, data and state of one run, and the two kinds of step."""

    def __init__(self, config: Config):
        self.config, self.state, self.progress, self.interrupt = config, State(), Progress(), Interrupt()
        self.setting = Setting(config)
        self.device, self.codec = self.setting.device, self.setting.codec
        self.task, self.warmup_task = self.setting.task, self.setting.warmup_task
        self.ood_task = self.setting.ood_task
        self.model = self.setting.make_model().to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        # What samples are drawn from: the model itself, or on CUDA a bf16 copy of it.
        self.sampler = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).bfloat16()
        if config.compile:
            torch._dynamo.config.recompile_limit = 64  # SFT, GRPO, scores: prompts and completions each, and more
            if self.sampler is self.model:
                self.sampler = copy.copy(self.model)  # the same weights; for sampling, compiled code is the slower one
            self.model.compile(dynamic=True)
        self.samplers: dict = {}  # buffers and CUDA graphs of the last rollout, for the next
        self.waves = 1
        self.reference: Transformer | None = None
        self.optimizer = make_optimizer(self.model, config)
        self.controller = make_controller(config)
        self.last_batch: Batch | None = None  # for an inspection, if its gradient turns out bad
        self.answers: list[dict] = []  # of the last evaluation, as they go into OUT/samples.jsonl

    # --- SFT

    def _demonstrations(self, source: TokenizedTask, start: int, purpose: str) -> Batch:
        size = self.config.sft_batch_size
        chosen = shuffled(len(source.demonstrations), start * size, size, self.config.seed, purpose)
        prompts, completions = zip(*(source.demonstrations[i] for i in chosen), strict=True)
        return Batch(list(prompts), list(completions))

    def sft_step(self) -> dict:
        """One step on the next demonstrations."""
        warmed_up = min(self.state.step, self.config.warmup_steps)
        source = self.warmup_task if self.state.step < self.config.warmup_steps else self.task
        batch = self._demonstrations(source, warmed_up + self.state.sft_steps, "demonstrations")
        stats = self._gradient(batch, sft_objective)
        self._step_optimizer(stats["grad_norm"])
        kept = {key: stats[key] for key in ("loss", "grad_norm", "padding_fraction")}
        return kept | {"tokens": batch.tokens}

    def probe(self) -> float:
        """The SFT gradient norm here and now, on demonstrations of its own, without a step."""
        batch = self._demonstrations(self.task, self.state.step, "probe")
        return self._gradient(batch, sft_objective)["grad_norm"]

    # --- GRPO

    def grpo_step(self) -> dict:
        """Sample a group for each prompt, reward it, and follow the advantages."""
        config = self.config
        start = self.state.grpo_steps * config.prompts_per_step
        chosen = shuffled(len(self.task.train_prompts), start, config.prompts_per_step, config.seed, "prompts")
        prompts = [self.task.train_prompts[i] for i in chosen]
        rollout = self._sample(prompts)
        self.last_batch = Batch([p for p in prompts for _ in range(config.group_size)], rollout.completions)
        rewards, failures = self._rewards(rollout.completions, chosen)  # [Q, G]
        advantages = group_advantages(rewards, config.advantage, config.advantage_eps).flatten()  # [Q*G]
        tokens = sum(map(len, rollout.completions))
        record = {
            "loss": 0.0,
            "grad_norm": 0.0,
            "tokens": tokens,
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(dim=1, correction=0).mean().item(),
            "zero_variance_fraction": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
            "completion_length": tokens / len(rollout.completions),
            "truncated_fraction": 1 - sum(rollout.finished) / len(rollout.finished),
            "reward_failures": failures,
        } | dict.fromkeys(UPDATE_STATISTICS)
        self.state.reward = record["reward_mean"]
        self.state.reward_failures += failures
        if not math.isfinite(sum(map(sum, rollout.logprobs))):  # the model itself gave no probabilities
            return record | {"grad_norm": math.nan, "bad": "the sampler's probabilities are not finite"}
        if failures == len(rollout.completions):
            return record | {"grad_norm": math.nan, "bad": "the verifier failed for every completion"}
        if not advantages.any():  # no group has a signal: a step would be Adam's momentum and nothing else
            return record
        # Without a KL term a completion of advantage 0 has no gradient. It is left out of the update (and of the means
        # of entropy and the like), but counts in the denominators all the same.
        kept = [i for i, a in enumerate(advantages.tolist()) if a != 0 or self.reference is not None]
        denominators = loss_denominators(rollout.completions, config.loss_aggregation, self.task.max_new_tokens)
        batch = Batch(
            [prompts[i // config.group_size] for i in kept],
            [rollout.completions[i] for i in kept],
            config.temperature,
            advantages[kept],
            denominators=denominators[kept],
            sampled_logprobs=[torch.tensor(rollout.logprobs[i]) for i in kept],
        )
        if config.inner_updates > 1:
            batch.old_logprobs = self._fitting(score, self.model, batch)
        if self.reference is not None:
            with self._reference_at_hand() as reference:
                batch.ref_logprobs = self._fitting(score, reference, batch)
        updates = []
        for _ in range(config.inner_updates):
            updates.append(self._gradient(batch, grpo_objective))
            self._step_optimizer(updates[-1]["grad_norm"])
        means = {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
        means["clip_fraction"] = means["clip_low_fraction"] + means["clip_high_fraction"]
        means["ratio_max"] = max(update["ratio_max"] for update in updates)
        means["sampler_gap"] = updates[0]["sampler_gap"]  # later ones have moved on
        if self.reference is None:
            means["kl"] = None
        return record | means

    def _sample(self, prompts: list[list[int]]) -> Rollout:
        self._refresh_sampler()
        stops = self.codec.stop_token_ids
        params = SamplingParams(self.task.max_new_tokens, self.config.temperature, stop_token_ids=stops)
        seed = int(random_source(self.config.seed, "samples", self.state.step).integers(2**63))
        generator = torch.Generator(self.device).manual_seed(seed)
        rollout = generate(
            self.sampler,
            prompts,
            params,
            group_size=self.config.group_size,
            generator=generator,
            memory_limit=int(1e9 * self.config.rollout_memory),
            samplers=self.samplers,
        )
        if rollout.waves > self.waves:
            rows = len(rollout.completions)
            self.progress.say(f"the cache of {rows} completions does not fit: {rollout.waves} waves a rollout")
        self.waves = max(self.waves, rollout.waves)
        return rollout

    def _rewards(self, completions: list[list[int]], chosen: list[int]) -> tuple[Tensor, int]:
        """[Q, G], in the order of the rollout, and for how many of them the verifier failed."""
        examples = [self.task.train[i] for i in chosen for _ in range(self.config.group_size)]
        texts = self.codec.decode(completions)
        grades = [self.task.source.grade(text, example) for text, example in zip(texts, examples, strict=True)]
        rewards = torch.tensor([grade.reward for grade in grades]).view(len(chosen), self.config.group_size)
        return rewards, sum(grade.failed for grade in grades)

    # --- what both share

    def _gradient(self, batch: Batch, objective) -> dict:
        self.last_batch = batch
        stats = self._fitting(accumulate_gradient, self.model, batch, objective)
        return stats if math.isfinite(stats["loss"]) else stats | {"grad_norm": math.nan}  # one number tells a bad step

    def _fitting(self, function, *arguments):
        """Call function(*arguments, config); while it runs out of memory, again with half the tokens at once."""
        while True:
            try:
                return function(*arguments, self.config)
            except torch.OutOfMemoryError:
                tokens = tokens_at_once(self.config.tokens_per_microbatch, self.device) // 2
                if tokens < 16:  # by now each sequence has long been alone
                    raise
            self.config = dataclasses.replace(self.config, tokens_per_microbatch=tokens)
            self.progress.say(f"out of memory: --tokens-per-microbatch is {tokens} from here on")

    def _step_optimizer(self, grad_norm: float) -> None:
        """One AdamW step, unless the gradient is not finite: then the weights stay as they are."""
        if math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.state.step + 1)
            self.optimizer.step()

    @torch.no_grad()
    def _refresh_sampler(self) -> None:
        self.model.zero_grad(set_to_none=True)  # the last gradients have done their work; their memory is wanted
        if self.device.type == "cuda":  # elsewhere the weights are shared
            for copied, trained in zip(self.sampler.parameters(), self.model.parameters(), strict=True):
                copied.copy_(trained)

    def evaluate(self) -> dict[str, float]:
        """Scores (`data.scores.scores_of`) in domain and, with `_ood` behind their names, out of it.

        With a reference policy also `kl`, how far the model has moved from it: the mean over the tokens of the greedy
        answers, whole vocabulary, in nats. Without any example to evaluate there are no scores. Raises Stopped as soon
        as a signal comes: an evaluation changes nothing, so that it can be done again.
        """
        self._refresh_sampler()
        self.answers = []
        if not self.task.evaluated:
            return {}
        with self.interrupt.at_once():
            scores, greedy = self._examine(self.task, self.config.eval_split)
            if self.ood_task is not None:
                of_ood, _ = self._examine(self.ood_task, "ood")
                scores |= {f"{key}_ood": value for key, value in of_ood.items()}
            if self.reference is not None:
                asked = [i for i, answer in enumerate(greedy) if answer]  # a prompt that does not fit has none
                batch = Batch([self.task.eval_prompts[i] for i in asked], [greedy[i] for i in asked])
                with self._reference_at_hand() as reference:
                    scores["kl"] = self._fitting(divergence, self.model, reference, batch)
        self.state.reward_failures += sum(answer["failed"] for answer in self.answers)
        return scores

    def _examine(self, tokenized: TokenizedTask, split: str) -> tuple[dict[str, float], list[list[int]]]:
        """Scores on the first examples, and the greedy answers as token ids."""
        config, stops = self.config, self.codec.stop_token_ids
        examples = tokenized.evaluated[: config.eval_examples]
        greedy = SamplingParams(tokenized.max_new_tokens, temperature=0, stop_token_ids=stops)
        answers = self._answers(tokenized, greedy, 1)  # [examples][1 + eval_samples]
        if config.eval_samples:
            drawn = SamplingParams(tokenized.max_new_tokens, config.eval_temperature, stop_token_ids=stops)
            sampled = self._answers(tokenized, drawn, config.eval_samples)
            answers = [first + more for first, more in zip(answers, sampled, strict=True)]
        grades = []
        for index, (example, completions) in enumerate(zip(examples, answers, strict=True)):
            texts = self.codec.decode(completions)
            asked = tokenized.eval_prompts[index] is not None
            wrong = Grade(0.0, correct=False, well_formed=False)
            grades.append([tokenized.source.grade(text, example) if asked else wrong for text in texts])
            for sample, (text, grade) in enumerate(zip(texts, grades[-1], strict=True)):
                where = {"split": split, "index": index, "sample": sample}
                said = {"prompt": example.prompt, "answer": example.answer, "completion": text}
                self.answers.append(where | said | dataclasses.asdict(grade))
        scores = scores_of(examples, [of[0] for of in grades], [of[1:] for of in grades], config.seed)
        return scores, [completions[0] for completions in answers]

    def _answers(self, tokenized: TokenizedTask, params: SamplingParams, samples: int) -> list[list[list[int]]]:
        """[examples][samples] completions as token ids; empty ones where the prompt does not fit."""
        prompts = tokenized.eval_prompts[: self.config.eval_examples]
        fitting = [prompt for prompt in prompts if prompt is not None]
        seed = int(random_source(self.config.seed, "evaluation", self.state.step).integers(2**63))
        generator = torch.Generator(self.device).manual_seed(seed)
        options = {"memory_limit": int(1e9 * self.config.rollout_memory), "samplers": {}, "generator": generator}
        at_once = max(1, EVAL_ROWS // samples)  # prompts
        groups: list[list[list[int]]] = []
        for start in range(0, len(fitting), at_once):
            part = fitting[start : start + at_once]
            drawn: list[list[list[int]]] = [[] for _ in part]
            while len(drawn[0]) < samples:
                size = min(EVAL_ROWS, samples - len(drawn[0]))
                completions = generate(self.sampler, part, params, group_size=size, **options).completions
                for i, group in enumerate(drawn):
                    group += completions[i * size : (i + 1) * size]
            groups += drawn
            self.progress.show(f"evaluating {tokenized.source.name}: {len(groups)}/{len(fitting)}")
        answered = iter(groups)
        return [next(answered) if prompt is not None else [[]] * samples for prompt in prompts]

    # --- one step of either stage, and what happens between them

    def step(self) -> dict:
        """A step of the stage that the run is in. Raises Fault after `--max-bad-steps` in a row without effect."""
        config, state = self.config, self.state
        record = self.warmup_step() if state.step < config.warmup_steps else self.adaptive_step()
        reason = record.pop("bad", "loss or gradient not finite")
        if math.isfinite(record["grad_norm"]):
            state.bad_in_a_row = 0
            return record
        state.bad_steps += 1
        state.bad_in_a_row += 1
        if state.bad_in_a_row >= config.max_bad_steps:
            raise Fault(f"step {state.step + 1}: {reason} (bad steps in a row: {state.bad_in_a_row})")
        self.progress.say(f"step {state.step + 1} is dropped: {reason} (bad steps so far: {state.bad_steps})")
        return record

    def warmup_step(self) -> dict:
        record = self.sft_step()
        self._observe(self.controller.observe_warmup, record["grad_norm"], self.state.step + 1)
        return {"phase": "warmup", "kind": "sft"} | record

    def adaptive_step(self) -> dict:
        """The heart of the method: look at the norm, draw, then learn from the textbook or from practice."""
        state, controller = self.state, self.controller
        if controller.g_warmup is None and self.config.controller == "sasr":
            raise Fault(f"step {state.step + 1}: no SFT gradient before it was finite, so p_t has no yardstick")
        stale = self.config.probe_every and state.step - state.norm_step >= self.config.probe_every
        if stale and self.task.demonstrations:
            self._observe(controller.observe_sft, self.probe(), state.step)
        decision = {
            "p_sft": controller.sft_probability(state.step - self.config.warmup_steps),
            "alpha": random_source(self.config.seed, "alpha", state.step).random(),
            "sft_norm": controller.g_last,
            "sft_norm_age": state.step - state.norm_step,
        }
        if decision["alpha"] < decision["p_sft"]:
            kind, record = "sft", self.sft_step()
            self._observe(controller.observe_sft, record["grad_norm"], state.step + 1)
            state.sft_steps += 1
        else:
            kind, record = "grpo", self.grpo_step()
            state.grpo_steps += 1
        return {"phase": "adaptive", "kind": kind} | record | decision

    def _observe(self, observe: Callable[[float], None], grad_norm: float, step: int) -> None:
        """Tell the controller, unless the norm is not finite: one NaN would stay in every later p_t."""
        if math.isfinite(grad_norm):
            observe(grad_norm)
            self.state.norm_step = step

    def between_steps(self) -> dict[str, float]:
        """What is due after `state.step` steps: an evaluation, the yardstick, the reference policy."""
        config, state = self.config, self.state
        scores = {}
        if state.step in evaluation_steps(config):
            started = time.perf_counter()
            scores = self.evaluate()
            state.seconds["eval"] += time.perf_counter() - started
            state.scores = scores
        for name, at in (("before", 0), ("warmup", config.warmup_steps), ("final", total_steps(config))):
            if state.step == at:
                found = {key: scores[key] for key in ("accuracy", "accuracy_ood") if key in scores}
                state.accuracy |= {key.replace("accuracy", f"accuracy_{name}"): value for key, value in found.items()}
        unmeasured = self.controller.g_warmup is None  # there was no warm-up, or every step of it was dropped
        if state.step == config.warmup_steps and unmeasured and may_choose_sft(config):
            self._observe(self.controller.observe_warmup, self.probe(), state.step)
        if config.kl_coef and state.step == (config.warmup_steps if config.reference == "warmup" else 0):
            self.reference = self._frozen_copy()
        return scores

    def _frozen_copy(self) -> Transformer:
        """A reference policy: never trained, so on CUDA bf16 is enough."""
        frozen = copy.deepcopy(self.model).requires_grad_(False)
        if self.device.type == "cuda":
            frozen = frozen.bfloat16()
        return frozen.to("cpu") if self.config.offload_reference else frozen

    @contextlib.contextmanager
    def _reference_at_hand(self):
        """The reference policy on the device, for as long as it is needed there."""
        yield self.reference.to(self.device)
        if self.config.offload_reference:
            self.reference.to("cpu")

    # --- in and out of files

    def save_model(self, path: Path) -> None:
        """Weights and tokenizer in Hugging Face layout."""
        kind = self.config.save_dtype
        self.model.save_pretrained(path, dtype=self.model.stored_dtype if kind == "same" else getattr(torch, kind))
        self.codec.save(path)

    def inspection(self) -> dict:
        """The last batch that a gradient was taken of, as JSON."""
        batch = self.last_batch
        return {
            "step": self.state.step + 1,
            "prompts": self.codec.tokenizer.decode_batch(batch.prompts, skip_special_tokens=False),
            "completions": self.codec.tokenizer.decode_batch(batch.completions, skip_special_tokens=False),
            "prompt_ids": batch.prompts,
            "completion_ids": batch.completions,
            "advantages": None if batch.advantages is None else batch.advantages.tolist(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights, Adam's moments and the reference policy, each under its own prefix."""
        named = {f"model.{name}": p for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():  # step, exp_avg, exp_avg_sq
                named[f"optimizer.{key}.{name}"] = value
        if self.reference is not None:
            named |= {f"reference.{name}": p for name, p in self.reference.named_parameters()}
        return named

    def saved_state(self) -> dict:
        state = dataclasses.asdict(self.state)
        return {
            "state": state,
            "controller": self.controller.state_dict(),
            "fingerprint": self.fingerprint(),
            "config": dataclasses.asdict(self.setting.config),
            "config_hash": self.setting.config.hash(),
        }

    def fingerprint(self) -> int:
        """Changes when the tokenizer or any example does."""
        examples = [(t.source.train, t.source.test) for t in (self.task, self.warmup_task)]
        return zlib.crc32((self.codec.tokenizer.to_str() + repr(examples)).encode())

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint. Raises ValueError if it was made with other examples or another tokenizer."""
        saved, tensors = checkpoint.state, checkpoint.tensors()
        if saved["fingerprint"] != self.fingerprint():
            raise ValueError("it was made with other examples or another tokenizer than these")
        if any(name.startswith("reference.") for name in tensors):
            self.reference = self._frozen_copy()

        def tensor(name: str, like: Tensor) -> Tensor:  # copy_ would repeat a smaller one, and AdamW read beyond it
            found = tensors[name]
            if found.shape != like.shape:
                raise ValueError(f"{name} has the shape {list(found.shape)}, not {list(like.shape)}")
            return found.to(like)

        moments = any(name.startswith("optimizer.") for name in tensors)  # not before the first step
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensor(f"model.{name}", parameter))
            if self.reference is not None:
                own = self.reference.get_parameter(name)
                own.copy_(tensor(f"reference.{name}", own))
            if moments:
                like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                self.optimizer.state[parameter] = {
                    key: tensor(f"optimizer.{key}.{name}", shape).to(parameter.device) for key, shape in like.items()
                }
        self.controller.load_state_dict(saved["controller"])
        self.state = State(**saved["state"])


def total_steps(config: Config) -> int:
    return config.warmup_steps + config.steps


def evaluation_steps(config: Config) -> set[int]:
    """Before and after each stage, and every `eval_every` steps."""
    every = range(0, total_steps(config) + 1, config.eval_every) if config.eval_every else ()
    return {0, config.warmup_steps, total_steps(config), *every}


def train(config: Config) -> dict:
    """Run both stages in a new folder, and return the summary that is also written to OUT/summary.json.

    The first SIGINT, SIGTERM or SIGHUP ends the step, saves, and raises `run.Stopped`.
    """
    folder = RunFolder(config.out or default_out(config, config.controller))
    folder.check_unused()  # before anything takes time
    trainer = Trainer(config)
    with folder.locked():
        folder.create(dataclasses.asdict(config) | {"out": str(folder.path)})
        return learn(trainer, folder, None)


def resume(out: str, said: dict | None = None) -> dict:
    """Go on with a run from its last checkpoint, or from its beginning if it has none; otherwise like `train`.

    `said` holds the fields of its configuration that are to change; with another `out`, the run goes on there, as a
    branch. Whatever can be refused is refused before anything is written. Raises ValueError naming flag or file.
    """
    folder = RunFolder(out)
    written = Config.from_json(folder.read_json("config.json"), folder.path / "config.json")
    written.out = str(folder.path)  # it may have been moved
    with folder.locked():
        checkpoint = folder.find_checkpoint()
        config = resumed_config(written, checkpoint, said or {})
        branch = RunFolder(config.out)
        branches = branch.path.resolve() != folder.path.resolve()
        if branches:
            branch.check_unused()
        trainer = Trainer(config)
        if checkpoint:
            with fitting(checkpoint):
                trainer.restore(checkpoint)
        if not branches:
            folder.write_json("config.json", dataclasses.asdict(config))
            return learn(trainer, folder, checkpoint)
        checkpoint = folder.branch_to(branch, checkpoint)
    with branch.locked():
        branch.write_json("config.json", dataclasses.asdict(config))
        return learn(trainer, branch, checkpoint)


@contextlib.contextmanager
def fitting(checkpoint: Checkpoint):
    """Whatever does not fit in a checkpoint, of another version or of a stranger, is a ValueError that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:500]
        raise ValueError(f"{checkpoint.folder} does not fit this run: {reason}") from None


def learn(trainer: Trainer, folder: RunFolder, checkpoint: Checkpoint | None) -> dict:
    """The loop: from where the trainer is to the end of the run. Returns the summary."""
    config, state, progress, interrupt = trainer.config, trainer.state, trainer.progress, trainer.interrupt
    folder.rewind(checkpoint)
    (folder.path / "summary.json").unlink(missing_ok=True)  # of a run that was finished, and is no longer
    with interrupt, progress:
        progress.say(headline(trainer, folder.path))
        try:
            if not checkpoint and trainer.between_steps():
                folder.write_jsonl("samples.jsonl", trainer.answers)
            if finished(config, state):
                folder.replace_folder("model", trainer.save_model)
            while not finished(config, state):
                record = finish_step(trainer, folder)
                last = finished(config, state)
                progress.show(progress_line(config, state, record), last=last)
                if last or interrupt.signal or (config.save_every and state.step % config.save_every == 0):
                    save(trainer, folder)
                if interrupt.signal and not last:
                    raise Stopped(interrupt.signal)
        except Stopped:
            again = f"python sasr.py --resume {shlex.quote(str(folder.path))}"
            progress.say(f"stopped after step {state.step}; go on with: {again}")
            raise
        summary = summarise(trainer, folder)
        folder.write_json("summary.json", summary)
    return summary


def finished(config: Config, state: State) -> bool:
    return state.step == total_steps(config) and state.unlogged is None


def finish_step(trainer: Trainer, folder: RunFolder) -> dict:
    """One step, what is due after it, and its line in the metrics.

    If an evaluation is interrupted, or fails, its step is saved all the same, and on resuming only the evaluation is
    done again.
    """
    state = trainer.state
    if state.unlogged is None:
        state.unlogged = timed_step(trainer, folder)
    try:
        scores = trainer.between_steps()
    except (Stopped, RuntimeError):
        save(trainer, folder)
        raise
    record = {"step": state.step} | state.unlogged | {f"eval/{key}": value for key, value in scores.items()}
    folder.log(record)
    state.unlogged = None
    if scores:
        folder.write_jsonl("samples.jsonl", trainer.answers)
    return record


def timed_step(trainer: Trainer, folder: RunFolder) -> dict:
    """A step's line of the metrics, but for what an evaluation adds. Raises Fault, its batch written to the folder."""
    config, state, started = trainer.config, trainer.state, time.perf_counter()
    try:
        record = trainer.step()
    except Fault as fault:
        folder.write_json("bad_batch.json", trainer.inspection())
        raise Fault(f"{fault}; its batch is in {folder.path / 'bad_batch.json'}") from None
    record |= {"lr": learning_rate(config, state.step + 1), "seconds": time.perf_counter() - started}
    state.seconds["warmup" if record["phase"] == "warmup" else record["kind"]] += record["seconds"]
    state.step += 1
    return record


def save(trainer: Trainer, folder: RunFolder) -> None:
    """The model first: a run whose last checkpoint says that it has finished has its last model, too."""
    folder.replace_folder("model", trainer.save_model)
    folder.save_checkpoint(trainer.tensors(), trainer.saved_state())


def summarise(trainer: Trainer, folder: RunFolder) -> dict:
    config, state = trainer.config, trainer.state
    return state.accuracy | {
        "controller": config.controller,
        "task": config.task,
        "seed": config.seed,
        "config_hash": trainer.setting.config.hash(),
        "warmup_steps": config.warmup_steps,
        "sft_steps": state.sft_steps,
        "grpo_steps": state.grpo_steps,
        "bad_steps": state.bad_steps,
        "reward_failures": state.reward_failures,
        "g_warmup": trainer.controller.g_warmup,
        "scores": state.scores,
        "seconds": sum(state.seconds.values()),
        **{f"seconds_{kind}": value for kind, value in state.seconds.items()},
        "out": str(folder.path),
        **provenance(trainer.device),
    }


def default_out(config: Config, kind: str) -> str:
    """runs/KIND-TASK-SEED, with a number behind it if that is taken."""
    base = f"runs/{kind}-{config.task.partition(':')[0]}-{config.seed}"
    names = itertools.chain([base], (f"{base}-{n}" for n in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


# ============================================================================= what a run needs in memory


def memory_plan(setting: Setting) -> dict[str, float]:
    """Bytes on the device by what they are for, and the `peak`: before a weight is loaded, from shapes alone.

    What stays is weights, optimizer, copies and the cache of rollouts. On top of that comes either an update
    (gradients and the activations of its largest micro-batch) or an evaluation (its own cache).
    """
    config, shape, task, cuda = setting.config, setting.shape, setting.task, setting.device.type == "cuda"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(shape).parameters())
    copy_bytes = 2 if cuda else 4  # bf16 where it is used for arithmetic
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * copy_bytes  # of a cache
    completion = task.longest_prompt + task.max_new_tokens  # tokens
    rows = config.prompts_per_step * config.group_size
    samples, examples = max(config.eval_samples, 1), min(config.eval_examples, max(len(task.evaluated), 1))
    eval_rows = min(samples, EVAL_ROWS) * min(max(1, EVAL_ROWS // samples), examples)
    cache, eval_cache = (n * -(-completion // 128) * 128 * per_token for n in (rows, eval_rows))
    if config.rollout_memory:
        cache, eval_cache = (min(size, 1e9 * config.rollout_memory) for size in (cache, eval_cache))
    draws = 4 * 4 * shape.vocab_size  # logits, log-probs, probabilities and their sums, of a row

    sft_tokens = config.sft_batch_size * (task.longest_prompt + task.longest_demonstration)
    grpo_tokens = config.prompts_per_step * task.longest_prompt + rows * task.max_new_tokens
    tokens = min(tokens_at_once(config.tokens_per_microbatch, setting.device), max(sft_tokens, grpo_tokens))
    plan = {
        "weights": 4 * parameters,
        "optimizer": 8 * parameters,
        "sampler's copy": 2 * parameters if cuda else 0,
        "reference": copy_bytes * parameters if config.kl_coef and not (cuda and config.offload_reference) else 0,
        "rollout cache": cache + rows * draws,
    }
    stays = sum(plan.values())
    plan["gradients"] = 4 * parameters
    plan["activations"] = activation_bytes(shape, max(tokens, completion), config.gradient_checkpointing, cuda)
    plan["evaluation"] = eval_cache + eval_rows * draws
    return plan | {"peak": stays + max(plan["gradients"] + plan["activations"], plan["evaluation"])}


def activation_bytes(shape: ModelConfig, tokens: int, checkpointing: bool, cuda: bool) -> float:
    """What backward needs of a micro-batch: what each layer saved, and the largest temporaries beside it.

    On CUDA the products are in bf16 and their inputs are kept in it, weights included; the residual stream is fp32.
    """
    small, hidden, mlp = 2 if cuda else 4, shape.hidden_size, shape.intermediate_size
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    norm = (4 + small) * hidden if cuda else 3 * 4 * hidden  # its input and output; a CPU keeps the step between them
    attention = small * (2 * queries + 2 * keys)  # q, k, v and what comes of them
    if shape.model_type == "qwen3":
        attention += 4 * (queries + keys) * (1 if cuda else 2)
    layer = 2 * norm + attention + small * 4 * mlp  # bytes a token; the MLP keeps gate, SiLU, up and product
    backward = small * 3 * mlp + 4 * 2 * hidden  # gradients on their way through a layer
    bf16_weights = 2 * (2 * hidden * (queries + keys) + 3 * hidden * mlp) if cuda else 0
    if checkpointing:
        saved = tokens * (4 * hidden * shape.num_hidden_layers + layer) + bf16_weights
    else:
        saved = shape.num_hidden_layers * (tokens * layer + bf16_weights)
    head = 4 * shape.vocab_size * hidden  # the gradient of the output matrix, before it is added to the embedding's
    logits = min(tokens * shape.vocab_size, 2**26) * small + 4 * 3 * tokens * hidden
    return saved + max(tokens * backward, head + logits)


def dry_run_report(setting: Setting) -> str:
    """The plan as a table, beside what the device has."""
    config, plan = setting.config, memory_plan(setting)
    total = free_memory(setting.device)
    lines = [*left_out(setting), f"{'memory on ' + str(setting.device):24}{'GB':>8}"]
    lines += [f"{name:24}{size / 1e9:8.2f}" for name, size in plan.items()]
    verdict = "fits" if plan["peak"] < total else "does NOT fit"
    lines.append(f"{verdict} into the {total / 1e9:.1f} GB that are free now")
    if plan["peak"] >= total:
        lines.append(
            "less: --gradient-checkpointing, --offload-reference, --tokens-per-microbatch, --max-new-tokens, "
            "--rollout-memory, --prompts-per-step, --eval-samples"
        )
    lines.append(
        f"prompts of up to {setting.task.longest_prompt} tokens, completions of up to {setting.task.max_new_tokens}; "
        f"{tokens_at_once(config.tokens_per_microbatch, setting.device)} tokens a micro-batch"
    )
    return "\n".join(lines)


# ============================================================================= what the person sees


def headline(trainer: Trainer, out: Path) -> str:
    """What is about to happen, before anything takes time."""
    config, task = trainer.config, trainer.task
    parameters = sum(p.numel() for p in trainer.model.parameters())
    origin = config.model or "from scratch"
    first = "first, an evaluation" if task.evaluated else "from the first step on"
    return "\n".join([*left_out(trainer.setting), ""]) + (
        f"{config.controller} on {task.source.name}: {len(task.train_prompts)} training prompts, "
        f"{len(task.demonstrations)} with a demonstration\n"
        f"{parameters / 1e6:.2f} M parameters {origin}, on {trainer.device}; {config.warmup_steps} warm-up steps, "
        f"then {config.steps} adaptive ones\n"
        f"writing to {out}; " + (f"resuming after step {trainer.state.step}" if trainer.state.step else first)
    )


def left_out(setting: Setting) -> list[str]:
    """A line for each kind of example that the person brought and that will not be learnt from or graded."""
    config, task = setting.config, setting.task
    lines = []
    if task.source.skipped:
        lines.append(f"skipped {len(task.source.skipped)} bad record(s), the first: {task.source.skipped[0]}")
    for tokenized in {id(t): t for t in (task, setting.warmup_task)}.values():
        for kind, count in tokenized.dropped.items():
            if count:
                why = "that are too long" + (", or whose prompts are" if kind == "demonstrations" else "")
                lines.append(f"dropped {count} {kind} of {tokenized.source.name} {why}")
    too_long = sum(prompt is None for prompt in task.eval_prompts[: config.eval_examples])
    if too_long:
        lines.append(f"{too_long} {config.eval_split} prompts are too long and count as wrong answers")
    if not task.evaluated:
        lines.append(f"there are no {config.eval_split} examples, so nothing is evaluated; --eval-split has the other")
    if config.reward:
        lines.append(f"rewards come from {config.reward}, which is run as a program")
    return lines


def seconds_left(config: Config, state: State) -> float:
    """From the mean cost of each kind of step so far; before the first GRPO step its cost is guessed from sizes."""
    adaptive = state.sft_steps + state.grpo_steps
    warmed_up = state.step - adaptive
    sft_cost = (state.seconds["warmup"] + state.seconds["sft"]) / max(warmed_up + state.sft_steps, 1)
    guess = 2 * sft_cost * config.prompts_per_step * config.group_size / config.sft_batch_size
    grpo_cost = state.seconds["grpo"] / state.grpo_steps if state.grpo_steps else guess
    prior = {"sft": 1.0, "grpo": 0.0}.get(config.controller, 0.5)  # worth ten steps of evidence
    sft_share = (state.sft_steps + 10 * prior) / (adaptive + 10)
    adaptive_cost = sft_share * sft_cost + (1 - sft_share) * grpo_cost
    evaluations = evaluation_steps(config)
    evaluated = sum(step <= state.step for step in evaluations)  # at least the one before the first step
    eval_cost = state.seconds["eval"] / evaluated
    steps = (config.warmup_steps - warmed_up) * sft_cost + (config.steps - adaptive) * adaptive_cost
    return steps + (len(evaluations) - evaluated) * eval_cost


def progress_line(config: Config, state: State, record: dict) -> str:
    """One line of a terminal; reward and accuracy stay on show until there are newer ones."""
    parts = [f"{state.step}/{total_steps(config)} {record['kind']:4}"]
    parts += [f"p_sft {record['p_sft']:.2f}"] if "p_sft" in record else ["warm-up"]
    parts += [f"loss {record['loss']:.3f}"]
    parts += [f"reward {state.reward:.2f}"] if state.reward is not None else []
    parts += [f"accuracy {state.scores['accuracy']:.1%}"] if state.scores else []
    return " ".join([*parts, f"left {clock(seconds_left(config, state))}"])


def closing_table(summary: dict) -> str:
    """Accuracies and costs of a finished run."""

    def percent(key: str) -> str:
        return f"{summary[key]:10.1%}" if key in summary else f"{'-':>10}"

    lines = [f"{'accuracy':24}{'before':>10}{'warm-up':>10}{'final':>10}"]
    for label, suffix in (("in domain", ""), ("out of domain", "_ood")):
        lines.append(f"{label:24}" + "".join(percent(f"accuracy_{at}{suffix}") for at in ("before", "warmup", "final")))
    lines.append("")
    lines.append(f"{'':24}{'warm-up':>10}{'SFT':>10}{'GRPO':>10}{'eval':>10}{'all':>10}")
    steps = [summary["warmup_steps"], summary["sft_steps"], summary["grpo_steps"]]
    lines.append(f"{'steps':24}" + "".join(f"{n:10}" for n in steps) + f"{'':10}{sum(steps):10}")
    seconds = [summary[f"seconds_{kind}"] for kind in ("warmup", "sft", "grpo", "eval")]
    lines.append(f"{'seconds':24}" + "".join(f"{s:10.1f}" for s in [*seconds, summary["seconds"]]))
    if summary["bad_steps"] or summary["reward_failures"]:
        dropped, failed = summary["bad_steps"], summary["reward_failures"]
        lines += ["", f"steps dropped: {dropped}; completions for which the verifier failed: {failed}"]
    return "\n".join([*lines, "", *score_table(summary["scores"], "final evaluation"), f"written to {summary['out']}"])


def score_table(scores: dict[str, float], title: str) -> list[str]:
    """A line a score, its interval behind it."""
    lines = [f"{title:40}{'share':>8}   95% interval"] if scores else []
    for name, value in scores.items():
        base, ood = (name.removesuffix("_ood"), "_ood") if name.endswith("_ood") else (name, "")
        if base.endswith(("_low", "_high")):
            continue
        low, high = scores.get(f"{base}_low{ood}"), scores.get(f"{base}_high{ood}")
        interval = "" if low is None else f"   {low:.1%} to {high:.1%}"
        said = f"{round(value, 3) + 0.0:8.3f} nats a token" if name == "kl" else f"{value:8.1%}{interval}"  # no -0.000
        lines.append(f"{name:40}{said}")
    return [*lines, ""] if lines else []


# ============================================================================= command line

GROUPS = {  # the first field of each group of flags in --help
    "task": "what to learn",
    "model": "the model",
    "warmup_steps": "how long",
    "controller": "who decides between SFT and GRPO",
    "max_new_tokens": "lengths",
    "sft_batch_size": "SFT",
    "prompts_per_step": "GRPO",
    "warmup_lr": "the optimizer (AdamW)",
    "eval_every": "evaluation and files",
}

# What a resumed run may change without making the steps already taken untrue.
RESUMABLE = (
    *("steps", "decay_fraction", "lr_schedule", "save_every", "save_dtype", "out", "device", "deterministic"),
    *("eval_every", "eval_examples", "eval_samples", "eval_temperature", "max_bad_steps"),
    *("tokens_per_microbatch", "gradient_checkpointing", "rollout_memory", "offload_reference", "compile"),
    *("data", "reward_seconds", "reward_on_error"),  # data may be moved: a checkpoint knows its examples
)


# Values from a public recipe say which; the others are ours, chosen to fit one GPU, and not tuned.
PRETRAINED = {
    "prompt_format": "chat",
    "gradient_checkpointing": True,
    "ood_task": "none",
    "warmup_steps": 100,
    "steps": 500,
    "sft_batch_size": 32,
    "warmup_lr": 1e-5,
    "lr": 1e-6,  # verl, examples/grpo_trainer on GSM8K and MATH; so are the next four
    "kl_coef": 0.001,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "max_grad_norm": 1.0,
    "beta2": 0.999,  # PyTorch's own, which most recipes keep
    "weight_decay": 0.01,
    "eval_every": 100,
    "eval_examples": 10_000,  # all
}
PRESETS = {
    "kk-tiny": {},  # the default: all values are those of Config, found on the generated puzzles themselves
    "countdown-tiny": {"task": "countdown"},
    "gsm8k": PRETRAINED
    | {
        "task": "gsm8k",
        "data": "records/gsm8k",
        "model": "Qwen/Qwen2.5-0.5B",
        "max_prompt_tokens": 512,  # verl
        "max_new_tokens": 512,  # verl
    },
    "math": PRETRAINED
    | {
        "task": "math",
        "data": "records/math",
        "model": "Qwen/Qwen2.5-1.5B",
        "max_prompt_tokens": 1024,  # verl
        "max_new_tokens": 1024,  # verl
    },
    "kk": PRETRAINED
    | {
        "task": "knights-knaves:format=logic-rl",
        "data": "records/knights_knaves",
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "lr": 4e-7,  # Logic-RL (arXiv 2502.14768); so are the next two, and the reward
        "temperature": 0.7,
        "group_size": 8,
        "max_new_tokens": 2048,  # Logic-RL allows 4096; the published demonstrations need a tenth
    },
}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Only what the person said: fields of Config that were not named are absent."""
    parser = argparse.ArgumentParser(
        prog="sasr.py",
        usage="python sasr.py [--preset NAME | --resume RUN] [--FLAG VALUE ...]",
        description="Warm a language model up with SFT, then let its gradient norm decide between SFT and GRPO.",
        epilog="With no flag at all it trains a small model on generated puzzles, on a GPU or a CPU, in minutes.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with this run's folder; with --out, as a branch of it")
    parser.add_argument("--eval-only", action="store_true", help="grade --model on the task, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would need in memory, and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), help="a set of values for the other flags, which still override it"
    )
    group = parser
    for spec in dataclasses.fields(Config):
        if spec.name in GROUPS:
            group = parser.add_argument_group(GROUPS[spec.name])
        shown = f"{spec.metadata['help']} (default {spec.default!r})".replace("%", "%%")
        if spec.type == "bool":
            group.add_argument(flag_name(spec.name), action=argparse.BooleanOptionalAction, help=shown)
        else:
            kind = {"int": int, "float": float, "str": str}[spec.type]
            choices = spec.metadata["choices"]
            metavar = None if choices else spec.type.upper()
            group.add_argument(flag_name(spec.name), type=kind, choices=choices or None, metavar=metavar, help=shown)
    return parser.parse_args(argv)


def resumed_config(written: Config, checkpoint: Checkpoint | None, said: dict) -> Config:
    """The configuration of a run that goes on: what its folder says, and what the person says now.

    The steps already taken were taken with the configuration in the checkpoint; ValueError names a flag that would
    contradict them.
    """
    new = dataclasses.replace(written, **said)
    old, done, logged = written, 0, True
    if checkpoint:
        with fitting(checkpoint):
            old, state = Config(**checkpoint.state["config"]), State(**checkpoint.state["state"])
        done, logged = state.step, state.unlogged is None
    changed = {}
    for spec in dataclasses.fields(Config):
        before, now = getattr(old, spec.name), getattr(new, spec.name)
        if before != now and spec.name not in RESUMABLE:
            where = "" if spec.name in said else f"{Path(written.out) / 'config.json'}: "
            raise ValueError(f"{where}{flag_name(spec.name)} {now}: a resumed run keeps its {before!r}")
        if before != now and spec.name != "out":
            changed[spec.name] = f"{flag_name(spec.name)} {now}"
    if done > total_steps(new):
        raise ValueError(f"--steps {new.steps}: the run has already taken {done - new.warmup_steps}")
    if any(learning_rate(old, step) != learning_rate(new, step) for step in range(1, done + 1)):
        raise ValueError(
            f"--steps, --decay-fraction or --lr-schedule would change the learning rate of the {done} steps already "
            "taken; a decay must begin after them, and --steps counts the whole adaptive stage"
        )
    decided = max(done - new.warmup_steps, 0)
    controllers = make_controller(old), make_controller(new)
    if isinstance(controllers[0], ScheduleController):
        before, after = ([c.sft_probability(t) for t in range(decided)] for c in controllers)
        if before != after:
            raise ValueError(f"--steps {new.steps}: would change the {new.controller} schedule of steps already taken")
    idle = [text for name, text in changed.items() if name not in ("save_dtype", "device")]
    if idle and done == total_steps(new) and logged:
        raise ValueError(
            f"{', '.join(idle)}: the run has finished, so nothing would come of it; more --steps let it go on, and "
            f"--eval-only --model {Path(written.out) / 'model'} grades it anew"
        )
    if changed:
        say(f"resuming with {', '.join(changed.values())}")
    return new


def evaluate_only(config: Config) -> None:
    """Grade --model: show a table, then write the answers to OUT/samples.jsonl and the scores to OUT/summary.json."""
    if not config.model:
        raise ValueError("--eval-only needs --model, a checkpoint directory")
    config = dataclasses.replace(config, warmup_steps=0, steps=0)
    folder = RunFolder(config.out or default_out(config, "eval"))
    folder.check_unused()
    trainer = Trainer(config)
    if not trainer.task.evaluated:
        raise ValueError(f"task {config.task}: there are no {config.eval_split} examples to evaluate")
    for line in left_out(trainer.setting):
        trainer.progress.say(line)
    with folder.locked():
        folder.check_unused()
        with trainer.progress:
            scores = trainer.evaluate()
        title = f"{config.task}, {len(trainer.task.evaluated[: config.eval_examples])} {config.eval_split} examples"
        print("\n".join(score_table(scores, title)), flush=True)
        folder.write_jsonl("samples.jsonl", trainer.answers)
        about = {"reward_failures": trainer.state.reward_failures, "config": dataclasses.asdict(config)}
        folder.write_json("summary.json", scores | about | provenance(trainer.device))
    print(f"written to {folder.path}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done; 2: bad input; 1: a fault; 129, 130 or 143: interrupted and saved. Each of them is one line."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: its number would go to the next file that is opened
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (as long as the process lives)
    said = vars(parse_flags(argv))
    debug = said.pop("debug", False)
    try:
        run_command(said)
        sys.stdout.flush()
        return 0
    except Stopped as stopped:
        return 128 + stopped.signal
    except KeyboardInterrupt:
        say("\nsasr.py: interrupted")
        return 130
    except BrokenPipeError:  # who read our output has gone, which Python would complain of once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        bad_input = isinstance(error, BAD_INPUT)
        ours = bad_input or isinstance(error, (Fault, VerifierFailed, OSError))
        text = " ".join(str(error).split())[:1000] if ours else f"{type(error).__name__}: {error}"
        say(f"sasr.py: {text}{'' if ours or debug else ' (--debug shows where)'}")
        return 2 if bad_input else 1


BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def run_command(said: dict) -> None:
    """Do what the flags ask for, and print what came of it."""
    resumes, eval_only, dry_run = said.pop("resume", None), said.pop("eval_only", False), said.pop("dry_run", False)
    modes = {"--resume": resumes is not None, "--eval-only": eval_only, "--dry-run": dry_run}
    if sum(modes.values()) > 1:
        raise ValueError(f"{' and '.join(mode for mode, asked in modes.items() if asked)}: choose one")
    if resumes is not None:
        if "preset" in said:
            raise ValueError(f"--preset {said['preset']}: a resumed run keeps its values; name the flags to change")
        if not resumes:
            raise ValueError("--resume '': name the folder of a run")
        print(closing_table(resume(resumes, said)))
        return
    config = Config(**PRESETS[said.pop("preset", "kk-tiny")] | said)
    if dry_run:
        print(dry_run_report(Setting(config)))
    elif eval_only:
        evaluate_only(config)
    else:
        print(closing_table(train(config)))


if __name__ == "__main__":
    sys.exit(main())
