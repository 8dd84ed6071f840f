"""The GRPO loss, its gradient and its statistics in one pass over the log-probs.

In PyTorch the formula is some twenty small kernels with as many [N] tensors between them, and backward as many again.
Here each program reads its block of tokens once, writes d loss / d logprob at once, since the derivative is known by
then, and leaves one partial sum of each statistic. The partial sums are added by PyTorch: no atomics, equal bits.

With ratio r = pi / pi_old, advantage A, quotient q = pi_ref / pi and k3 = q - log q - 1, a token contributes

    -( min(r A, clip(r) A) - beta k3 ) / denominator,   and its derivative in log pi is
    -( r A [unclipped]     - beta (1 - q) ) / denominator,   since dr/dlog pi = r and dk3/dlog pi = 1 - q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
COLUMNS = ("loss", "kl", "clip_low_fraction", "clip_high_fraction", "ratio_mean", "ratio_max")  # of `partial`


@triton.jit(do_not_specialize=["N", "denominator_stride"])
def _grpo(
    logprobs, old_logprobs, ref_logprobs, advantages, mask, denominators, denominator_stride, gradient, partial, N,
    clip_low, clip_high, kl_coef, REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(mask + token, mask=token < N, other=0.0).to(tl.float32)
    counts = weight > 0
    # A token that does not count is never read: it may hold anything.
    logprob = tl.load(logprobs + token, mask=counts, other=0.0).to(tl.float32)
    old = tl.load(old_logprobs + token, mask=counts, other=0.0).to(tl.float32)
    advantage = tl.load(advantages + token, mask=counts, other=0.0).to(tl.float32)
    denominator = tl.load(denominators + token * denominator_stride, mask=counts, other=1.0).to(tl.float32)

    ratio = tl.exp(logprob - old)
    too_low = (ratio < 1 - clip_low) & (advantage < 0)  # here the minimum is the clipped, constant side
    too_high = (ratio > 1 + clip_high) & (advantage > 0)
    clipped_ratio = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
    gain = tl.minimum(ratio * advantage, clipped_ratio * advantage)
    slope = tl.where(too_low | too_high, 0.0, ratio * advantage)
    k3 = tl.zeros((BLOCK,), tl.float32)
    if REFERENCE:
        log_quotient = tl.load(ref_logprobs + token, mask=counts, other=0.0).to(tl.float32) - logprob
        quotient = tl.exp(log_quotient)
        k3 = quotient - log_quotient - 1
        slope -= kl_coef * (1 - quotient)
    tl.store(gradient + token, -weight * slope / denominator, mask=token < N)

    here = partial + tl.program_id(0) * 6
    tl.store(here, tl.sum(-weight * (gain - kl_coef * k3) / denominator))
    tl.store(here + 1, tl.sum(weight * k3))
    tl.store(here + 2, tl.sum(tl.where(too_low, weight, 0.0)))
    tl.store(here + 3, tl.sum(tl.where(too_high, weight, 0.0)))
    tl.store(here + 4, tl.sum(weight * ratio))
    tl.store(here + 5, tl.max(tl.where(counts, ratio, 0.0)))


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old_logprobs, ref_logprobs, advantages, mask, denominator, clip_low, clip_high, kl_coef):
        N = logprobs.numel()
        flat = [
            t if t is None else t.expand_as(logprobs).contiguous()  # [B, 1] for an advantage a sequence, say
            for t in (logprobs, old_logprobs, ref_logprobs, advantages, mask)
        ]
        gradient = torch.empty_like(flat[0], dtype=torch.float32)
        partial = gradient.new_empty(triton.cdiv(N, BLOCK), len(COLUMNS))
        _grpo[len(partial),](
            *flat, denominator, int(denominator.numel() > 1), gradient, partial, N,
            clip_low, clip_high, kl_coef, REFERENCE=ref_logprobs is not None, BLOCK=BLOCK,
        )  # fmt: skip
        ctx.save_for_backward(gradient)
        ctx.dtype = logprobs.dtype
        largest = partial[:, 5].amax() if N else partial.new_zeros(())
        statistics = torch.cat([partial[:, :5].sum(0), largest[None]])
        loss = statistics[0].clone()
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return (d_loss * gradient).to(ctx.dtype), *[None] * 8


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
    """As `reference.grpo_loss`, which says what everything means; sums in fp32, gradient in logprobs alone."""
    mask = mask.float()
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    elif not isinstance(denominator, Tensor):
        denominator = mask.new_full((), denominator)  # filled on the GPU: nothing waits
    denominator = denominator.to(logprobs.device)
    if denominator.numel() > 1:
        denominator = denominator.expand_as(logprobs).contiguous()
    knobs = (float(clip_low), float(clip_high), float(kl_coef))  # Triton compiles again for the integers 0 and 1
    loss, statistics = _GrpoLoss.apply(logprobs, old_logprobs, ref_logprobs, advantages, mask, denominator, *knobs)
    return loss, dict(zip(COLUMNS[1:], statistics[1:].unbind(), strict=True))
