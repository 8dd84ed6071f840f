"""GRPO in a bare loop on a `transformers` model: `sasr.group_advantages` and `kernels.grpo_loss`.

For equal advantages the loss is that of TRL's `GRPOTrainer` with use_bias_correction_kl=False. TRL's own advantages are
smaller by a factor of sqrt((G - 1) / G): the standard deviation of a group of G divides by G - 1 there, by G here.
"""

import torch
from torch import Tensor

import kernels
from sasr import group_advantages


def token_logprobs(model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The log-prob of each token but the first, [B, T - 1]; model: a `transformers` causal LM."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def grpo_step(model, optimizer, batch, rewards: Tensor, *, reference=None, kl_coef=0.0, updates=1) -> list[float]:
    """Learn from Q prompts with G completions each, sampled at temperature 1; returns the loss before each update.

    batch: input_ids, attention_mask and completion_mask, all [Q * G, T], prompt-major, padded on either side. rewards
    [Q, G]. reference: the frozen model of the KL term.
    """
    *inputs, completion_mask = batch
    with torch.no_grad():  # the policy that sampled, and the one to stay near
        old = token_logprobs(model, *inputs)
        ref = None if reference is None else token_logprobs(reference, *inputs)
    advantages = group_advantages(rewards).view(-1, 1).expand_as(old)  # a completion's tokens share its advantage
    losses = []
    for _ in range(updates):
        given = (token_logprobs(model, *inputs), old, ref, advantages, completion_mask[:, 1:])
        loss, _ = kernels.grpo_loss(*given, clip_low=0.2, clip_high=0.2, kl_coef=kl_coef)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
