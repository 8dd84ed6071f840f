"""The three functions of the hot path, in plain PyTorch. This file is their definition.

Everything runs over N flat completion tokens: prompts and padding are dropped before the vocabulary is
touched. On CPU a 152k vocabulary would make the [N, V] logits the largest tensor of the program by far, so
the two functions that need logits take a slice of the tokens at a time and recompute its logits in backward.

Shapes: N completion tokens, D hidden, V vocabulary. Any float dtype; statistics are in fp32 (fp64 in fp64).
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # of a slice: 128 MiB in fp32; a matrix product of fewer rows is a third slower on a CPU


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[n, D] and [V, D] -> [n, V], in fp32 or more."""
    logits = hidden @ weight.T  # [n, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits / temperature, dim=-1)


def _slice_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the n tokens of one slice."""
    logprobs = _log_softmax(hidden, weight, temperature)  # [n, V]
    # 0 * -inf is NaN: a token of probability 0 adds nothing to the entropy
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi = softmax(hidden @ weight.T / temperature), in nats, both [N].

    hidden [N, D], weight [V, D], targets [N] int64. Both results are differentiable in hidden and weight.
    """
    tokens = max(1, MAX_LOGITS // len(weight))  # of a slice
    if len(targets) <= tokens:
        return _slice_logprobs(hidden, weight, targets, temperature)
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is random
    parts = [
        checkpoint(_slice_logprobs, some_hidden, weight, some_targets, temperature, **options)
        for some_hidden, some_targets in zip(hidden.split(tokens), targets.split(tokens), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective of GRPO (arXiv 2402.03300, equation 3) and its statistics.

        ratio = pi / pi_old                        = exp(logprobs - old_logprobs)
        k3    = pi_ref / pi - log(pi_ref/pi) - 1   an estimate of KL(pi || pi_ref) that is never negative
        loss  = -sum over tokens [ min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) - kl_coef k3 ] / denominator

    All tensors are [N] (or of any one shape); `mask` is 1 where a token counts. Without a reference (None) the KL is 0.

    What the sum is divided by makes the variants of the literature. A number divides all tokens alike, a tensor (of
    the tokens' shape, or one that broadcasts to it) each token by its own. With B sequences in the *whole* batch:
        the batch's tokens        every token counts the same (DAPO, arXiv 2503.14476); the default, of these tokens
        B * the sequence's tokens a mean over each sequence, then over sequences (GRPO, arXiv 2402.03300)
        B * a constant length     no normalisation by length at all (Dr. GRPO, arXiv 2503.20783)
    Where this is one micro-batch of several, pass that of the whole batch.

    The statistics are detached, and sums over tokens, so that micro-batches add up: `kl`, `clip_low_fraction`,
    `clip_high_fraction`, `ratio_mean`; only `ratio_max` is a maximum. A token counts as clipped when it gets no
    gradient: its ratio has left the interval on the side that the advantage pushes to.
    """
    keep = mask > 0
    # A masked token may hold anything. It is set to 0 before the arithmetic: a where() after it would fix the loss
    # but not the gradient, since backward multiplies that where()'s 0 by the inf of exp().
    logprobs, old_logprobs, advantages = (torch.where(keep, t, 0.0) for t in (logprobs, old_logprobs, advantages))
    mask = torch.where(keep, mask, 0).to(logprobs.dtype)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    k3 = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        log_ratio = torch.where(keep, ref_logprobs, 0.0) - logprobs
        k3 = torch.exp(log_ratio) - log_ratio - 1
    if denominator is None:
        denominator = mask.sum().clamp(min=1)  # a batch with no token has loss 0, not 0/0
    elif isinstance(denominator, Tensor):
        denominator = torch.where(keep, denominator, 1.0)  # that of a sequence without tokens may be 0
    loss = -(mask * (gain - kl_coef * k3) / denominator).sum()
    with torch.no_grad():
        stats = {
            "kl": (mask * k3).sum(),
            "clip_low_fraction": (mask * ((ratio < 1 - clip_low) & (advantages < 0))).sum(),
            "clip_high_fraction": (mask * ((ratio > 1 + clip_high) & (advantages > 0))).sum(),
            "ratio_mean": (mask * ratio).sum(),
            "ratio_max": torch.where(keep, ratio, 0.0).flatten().max() if keep.numel() else mask.sum(),
        }
    return loss, stats


@torch.no_grad()
def exact_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, in nats, [N]; no gradient, and exact: nothing is sampled.

    hidden [N, D], weight [V, D], ref_hidden [N, D'], ref_weight [V, D'].
    """
    tokens = max(1, MAX_LOGITS // len(weight))  # of a slice
    parts = []
    for some_hidden, some_ref_hidden in zip(hidden.split(tokens), ref_hidden.split(tokens), strict=True):
        policy = _log_softmax(some_hidden, weight, 1.0)  # [n, V]
        reference = _log_softmax(some_ref_hidden, ref_weight, 1.0)  # [n, V]
        probs = policy.exp()  # [n, V]
        parts.append(torch.where(probs > 0, probs * (policy - reference), 0.0).sum(-1))  # 0 log 0 is 0
    return torch.cat(parts)
