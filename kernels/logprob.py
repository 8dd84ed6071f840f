"""log pi(target) and the entropy of pi from hidden states, fused: no [N, V] tensor in either direction.

The plain way writes N x V logits to memory and reads them back three or four times: 5 GB a pass for 16,384 tokens
of a 152k vocabulary in bf16. Here they live in registers, one tile at a time (`tiles.py`).

Forward. The grid is (blocks of tokens) x (splits of the vocabulary). A program walks over the tiles of its split
and keeps four numbers a token, as in online softmax (arXiv 1805.02867): the largest logit m; sum e^(z-m);
sum e^(z-m) (z-m), for the entropy; and the target's logit, where the split holds it. Every split writes its own
four, and a few lines of PyTorch merge them: no locks, no atomics, so equal inputs give equal bits. How the
vocabulary is split does not depend on N either: a token gets the same bits whatever else is in its batch.

Backward. With g = d loss / d logprob, h = d loss / d entropy, H the entropy and logits z,

    d loss / d z_j = g (1[j = target] - p_j) - h p_j (log p_j + H).

Logits are recomputed, not stored. For one slice of the vocabulary after another, a kernel writes this gradient as a
slab [N, slice] in the operands' dtype, and two cuBLAS products use it up: d weight[slice] = slab^T hidden, written
once, and d hidden += slab weight[slice], summed in fp32 (rounding each slice's part to bf16 first would bias it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiles import Launch, logits_tile, operand_dtype

SPLITS = 64  # at most; even a few blocks of tokens then keep a GPU's ~130 processors busy
SLAB = 2**26  # elements of d logits at once: 128 MiB in 16 bits
NEVER = tl.constexpr(-1e30)  # a logit of probability 0. Finite, so that 0 * NEVER is 0 and NEVER - NEVER is not NaN


@triton.jit(do_not_specialize=["N", "V", "split_width"])
def _forward(
    hidden, weight, targets, statistics, N, V, D, split_width, inverse_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_N)
    target = tl.load(targets + rows, mask=rows < N, other=-1)  # [BLOCK_N]
    maximum = tl.full((BLOCK_N,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum e^(z - maximum)
    moment = tl.zeros((BLOCK_N,), tl.float32)  # sum e^(z - maximum) (z - maximum)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)
    for column in range(split * split_width, min((split + 1) * split_width, V), BLOCK_V):
        columns = column + tl.arange(0, BLOCK_V)
        z = logits_tile(hidden, weight, row, column, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA, PRECISION)
        z = tl.where(columns[None, :] < V, z * inverse_temperature, NEVER)  # [BLOCK_N, BLOCK_V]
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        new_maximum = tl.maximum(maximum, tl.max(z, 1))
        shift = maximum - new_maximum  # what was summed so far was relative to the old maximum
        z -= new_maximum[:, None]
        e = tl.exp(z)
        moment = tl.exp(shift) * (moment + shift * total) + tl.sum(e * z, 1)
        total = tl.exp(shift) * total + tl.sum(e, 1)
        maximum = new_maximum
    plane = tl.num_programs(1).to(tl.int64) * N  # statistics [4, splits, N]
    here = statistics + split.to(tl.int64) * N + rows
    tl.store(here, maximum, mask=rows < N)
    tl.store(here + plane, total, mask=rows < N)
    tl.store(here + 2 * plane, moment, mask=rows < N)
    tl.store(here + 3 * plane, target_logit, mask=rows < N)


@triton.jit(do_not_specialize=["N", "V", "start"])
def _backward(
    hidden, weight, targets, distribution, upstream, slab, N, V, D, start, slab_width, inverse_temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, offset = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_V
    rows, offsets = row + tl.arange(0, BLOCK_N), offset + tl.arange(0, BLOCK_V)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-1)
    maximum = tl.load(distribution + rows, mask=inside, other=0.0)  # distribution [3, N]
    log_total = tl.load(distribution + N + rows, mask=inside, other=0.0)
    entropy = tl.load(distribution + 2 * N + rows, mask=inside, other=0.0)
    g = tl.load(upstream + rows, mask=inside, other=0.0) * inverse_temperature  # upstream [2, N]
    h = tl.load(upstream + N + rows, mask=inside, other=0.0) * inverse_temperature
    z = logits_tile(hidden, weight, row, start + offset, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA, PRECISION)
    # Two steps, not z - (maximum + log_total): that sum would round away digits of log_total where logits are large.
    logp = (z * inverse_temperature - maximum[:, None]) - log_total[:, None]
    gradient = -tl.exp(logp) * (g[:, None] + h[:, None] * (logp + entropy[:, None]))
    gradient += tl.where((start + offsets)[None, :] == target[:, None], g[:, None], 0.0)
    here = slab + rows[:, None].to(tl.int64) * slab_width + offsets[None, :]
    tl.store(here, gradient.to(slab.dtype.element_ty), mask=inside[:, None])  # the slab is as wide as its tiles


def sum_splits(parts: Tensor) -> Tensor:
    """[splits, N] -> [N], in pairs, overwriting them. `Tensor.sum` picks an order by N: other batch, other bits."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts[: len(parts) - half] += parts[half:]
        parts = parts[:half]
    return parts[0]


def _merge(statistics: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """[4, splits, N] -> log-probs [N], and what backward needs: maximum, log of the sum, entropy, as [3, N]."""
    maxima, totals, moments, target_logits = statistics
    maximum = maxima.amax(0)  # [N]
    shift = maxima - maximum
    total = sum_splits(shift.exp() * totals)
    moment = sum_splits(shift.exp() * (moments + shift * totals))
    entropy = total.log() - moment / total
    logprobs = (sum_splits(target_logits) - maximum) - total.log()
    in_vocabulary = (targets >= 0) & (targets < vocabulary)
    return torch.where(in_vocabulary, logprobs, torch.nan), torch.stack([maximum, total.log(), entropy])


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
    """out = a @ b, or out += a @ b; cuBLAS can sum 16-bit factors into an fp32 `out` without rounding in between."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(keep), out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(keep), out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(keep), out=out)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype):
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight, targets = hidden.to(dtype), weight.to(dtype), targets.contiguous()
        (N, D), V = hidden.shape, len(weight)
        launch = Launch(hidden)
        split_width = launch.split_width(V, SPLITS)
        splits = triton.cdiv(V, split_width)
        statistics = hidden.new_empty(4, splits, N, dtype=torch.float32)
        _forward[triton.cdiv(N, launch.tile.tokens), splits](
            launch.rows(hidden), launch.columns(weight), targets, statistics,
            N, V, D, split_width, 1 / temperature, **launch.options,
        )  # fmt: skip
        logprobs, distribution = _merge(statistics, targets, V)
        ctx.save_for_backward(hidden, weight, targets, distribution)
        ctx.temperature = temperature
        return logprobs, distribution[2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs: Tensor, d_entropy: Tensor):
        hidden, weight, targets, distribution = ctx.saved_tensors
        (N, D), V = hidden.shape, len(weight)
        launch = Launch(hidden)
        rows, columns = launch.rows(hidden), launch.columns(weight)
        upstream = torch.stack([d_logprobs, d_entropy]).float()  # [2, N]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        # Straight into the weight's own dtype: a master weight in fp32 gets an fp32 gradient.
        d_weight = torch.empty_like(weight, dtype=ctx.dtypes[1]) if wants_weight else None
        tiles = min(max(SLAB // N // launch.tile.vocabulary, 1), triton.cdiv(V, launch.tile.vocabulary))
        slab = hidden.new_empty(N, tiles * launch.tile.vocabulary)
        for start in range(0, V, slab.shape[1]):
            _backward[triton.cdiv(N, launch.tile.tokens), tiles](
                rows, columns, targets, distribution, upstream, slab,
                N, V, D, start, slab.shape[1], 1 / ctx.temperature, **launch.options,
            )  # fmt: skip
            piece = slice(start, min(start + slab.shape[1], V))
            d_logits = slab[:, : piece.stop - start]  # [N, slice]
            if wants_hidden:
                _add_product(d_hidden, d_logits, weight[piece], keep=True)
            if wants_weight:
                _add_product(d_weight[piece], d_logits.T, hidden, keep=False)
        return d_hidden.to(ctx.dtypes[0]) if wants_hidden else None, d_weight, None, None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi = softmax(hidden @ weight.T / temperature), in nats, both [N] fp32.

    hidden [N, D] and weight [V, D] in bf16, fp16 or fp32, targets [N] int64; under autocast both are taken in its
    dtype. Differentiable once, in hidden and weight. A target outside the vocabulary gives NaN. ValueError where
    shapes or dtypes do not fit together. Non-contiguous inputs are copied.
    """
    dtype = operand_dtype(hidden, weight)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)}: expected one for each of {len(hidden)} tokens")
    if len(hidden) == 0:
        nothing = hidden.float().sum(1) + weight[:0].float().sum()  # [0], with a graph: gradients are 0, not None
        return nothing, nothing
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, dtype)
