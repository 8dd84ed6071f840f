"""KL(policy || reference) over the whole vocabulary, from both hidden states and heads: forward only, no [N, V] tensor.

The k3 estimate inside the GRPO loss sees one token a position and is noisy; this is the divergence itself.
The layout is that of `logprob.py`: blocks of tokens times splits of the vocabulary, statistics in registers, no
atomics. A program makes two tiles of logits at once, z of the policy and y of the reference, and keeps for each token

    m = max z,  s = sum e^(z-m),      n = max y,  r = sum e^(y-n),      t = sum e^(z-m) ((z-m) - (y-n)),

from which KL = sum p (log p - log q) = t / s - log s + log r. Keeping z and y relative to their maxima costs a little
arithmetic when a maximum moves, and saves the digits that two large, nearly equal log-sum-exps would cancel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logprob import NEVER, SPLITS, sum_splits
from .tiles import Launch, logits_tile, operand_dtype


@triton.jit(do_not_specialize=["N", "V", "split_width"])
def _kl(
    hidden, weight, ref_hidden, ref_weight, statistics, N, V, D, D_REF, split_width,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    m = tl.full((BLOCK_N,), NEVER, tl.float32)
    n = tl.full((BLOCK_N,), NEVER, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    r = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    for column in range(split * split_width, min((split + 1) * split_width, V), BLOCK_V):
        valid = (column + tl.arange(0, BLOCK_V))[None, :] < V
        z = logits_tile(hidden, weight, row, column, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D, TMA, PRECISION)
        y = logits_tile(ref_hidden, ref_weight, row, column, N, V, D_REF, BLOCK_N, BLOCK_V, BLOCK_D, TMA, PRECISION)
        z = tl.where(valid, z, NEVER)
        y = tl.where(valid, y, NEVER)
        new_m = tl.maximum(m, tl.max(z, 1))
        new_n = tl.maximum(n, tl.max(y, 1))
        z -= new_m[:, None]
        y -= new_n[:, None]
        e = tl.exp(z)
        t = tl.exp(m - new_m) * (t + s * ((m - new_m) - (n - new_n))) + tl.sum(e * (z - y), 1)
        s = tl.exp(m - new_m) * s + tl.sum(e, 1)
        r = tl.exp(n - new_n) * r + tl.sum(tl.exp(y), 1)
        m, n = new_m, new_n
    rows = row + tl.arange(0, BLOCK_N)
    plane = tl.num_programs(1).to(tl.int64) * N  # statistics [5, splits, N]
    here = statistics + split.to(tl.int64) * N + rows
    tl.store(here, m, mask=rows < N)
    tl.store(here + plane, n, mask=rows < N)
    tl.store(here + 2 * plane, s, mask=rows < N)
    tl.store(here + 3 * plane, r, mask=rows < N)
    tl.store(here + 4 * plane, t, mask=rows < N)


def _merge(statistics: Tensor) -> Tensor:
    """[5, splits, N] -> [N]: the loop's own step, once more, over splits."""
    m, n, s, r, t = statistics
    m, n = m - m.amax(0), n - n.amax(0)  # how far each split's maxima lie below those of all
    s_all, r_all = sum_splits(m.exp() * s), sum_splits(n.exp() * r)
    t_all = sum_splits(m.exp() * (t + s * (m - n)))
    return t_all / s_all - s_all.log() + r_all.log()


@torch.no_grad()
def exact_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(policy || reference) in nats, [N] fp32; no gradient.

    hidden [N, D], weight [V, D], ref_hidden [N, D'], ref_weight [V, D'], all in bf16, fp16 or fp32. ValueError where
    shapes or dtypes do not fit together.
    """
    dtype = operand_dtype(hidden, weight)
    if operand_dtype(ref_hidden, ref_weight, "ref_hidden and ref_weight") != dtype:
        raise ValueError(f"the policy is in {dtype} and the reference in {ref_hidden.dtype}: expected the same")
    if len(hidden) != len(ref_hidden) or len(weight) != len(ref_weight):
        raise ValueError(
            f"the policy has {len(hidden)} tokens and {len(weight)} words, "
            f"the reference {len(ref_hidden)} and {len(ref_weight)}: expected the same"
        )
    hidden, weight, ref_hidden, ref_weight = (x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight))
    (N, D), V = hidden.shape, len(weight)
    if N == 0:
        return hidden.new_empty(0, dtype=torch.float32)
    launch = Launch(hidden, accumulators=2)
    split_width = launch.split_width(V, SPLITS)
    splits = triton.cdiv(V, split_width)
    statistics = hidden.new_empty(5, splits, N, dtype=torch.float32)
    _kl[triton.cdiv(N, launch.tile.tokens), splits](
        launch.rows(hidden), launch.columns(weight), launch.rows(ref_hidden), launch.columns(ref_weight), statistics,
        N, V, D, ref_hidden.shape[1], split_width, **launch.options,
    )  # fmt: skip
    return _merge(statistics)
