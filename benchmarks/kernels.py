"""Log-probs of a large vocabulary: this project's kernels beside their peers, on one card, in one run.

    python benchmarks/kernels.py                  # tables, and a line of JSON a row
    python benchmarks/kernels.py --no-peers       # this project alone
    python benchmarks/kernels.py --tune           # all candidate tiles, instead of the peers
    python benchmarks/kernels.py --device cpu     # whether the script works; such figures mean nothing

Every peer maps hidden states [N, D] and a head [V, D] to log-probs of given tokens, in bf16, and, where it can, to
the entropy as well. Times are medians of `triton.testing.do_bench`. `extra memory` is the peak above what was there
before and above the gradients that every method must return. The ceilings, a square matrix product and a copy, are
measured first; a floor is the matrix products that no method can leave out (one forward, three with backward) at that
rate, and `of floor` how much of the time they are. A method that recomputes the logits in backward does four products
and can reach 75%. Peers that cannot be imported are named, with the reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks.common import about, add_device_flag, chosen_device, emit, failure, say
from kernels import grpo, kl, logprob, reference, tiles

# ----------------------------------------------------------------------------- the simpler plan


@triton.jit(do_not_specialize=["V"])
def _fold_rows(logits, targets, statistics, N, V, inverse_temperature, BLOCK: tl.constexpr):
    """One program a row: maximum, sum, entropy's moment and target logit, as in logprob.py, from stored logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    maximum = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    moment = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * V + columns, mask=columns < V, other=-1e30).to(tl.float32) * inverse_temperature
        new_maximum = tl.maximum(maximum, tl.max(z, 0))
        shift = maximum - new_maximum
        e = tl.exp(z - new_maximum)
        moment = tl.exp(shift) * (moment + shift * total) + tl.sum(e * (z - new_maximum), 0)
        total = tl.exp(shift) * total + tl.sum(e, 0)
        maximum = new_maximum
    tl.store(statistics + row, maximum)
    tl.store(statistics + N + row, total)
    tl.store(statistics + 2 * N + row, moment)
    tl.store(statistics + 3 * N + row, tl.load(logits + row * V + target).to(tl.float32) * inverse_temperature)


@triton.jit(do_not_specialize=["V"])
def _gradient_rows(logits, targets, distribution, upstream, N, V, inverse_temperature, BLOCK: tl.constexpr):
    """The gradient of the logits, in their place."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + row * V + columns
    z = tl.load(here, mask=columns < V, other=0.0).to(tl.float32) * inverse_temperature
    g, h = tl.load(upstream + row), tl.load(upstream + N + row)
    logp = (z - tl.load(distribution + row)) - tl.load(distribution + N + row)
    gradient = -tl.exp(logp) * (g + h * (logp + tl.load(distribution + 2 * N + row)))
    gradient += tl.where(columns == tl.load(targets + row), g, 0.0)
    tl.store(here, (gradient * inverse_temperature).to(logits.dtype.element_ty), mask=columns < V)


class CublasChunks(torch.autograd.Function):
    """Logits of some tokens at a time by cuBLAS, in the operands' dtype, folded row by row; again in backward."""

    CHUNK = 1024  # tokens: 0.3 GB of bf16 logits at V = 151936

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        V, parts = len(weight), []
        for h, t in zip(hidden.split(CublasChunks.CHUNK), targets.split(CublasChunks.CHUNK), strict=True):
            logits = h @ weight.T  # [n, V]
            statistics = logits.new_empty(4, 1, len(h), dtype=torch.float32)
            _fold_rows[len(h),](logits, t, statistics, len(h), V, 1 / temperature, BLOCK=4096)
            parts.append(logprob._merge(statistics, t, V))
        logprobs = torch.cat([part[0] for part in parts])
        distribution = torch.cat([part[1] for part in parts], dim=1)  # [3, N]
        ctx.save_for_backward(hidden, weight, targets, distribution)
        ctx.temperature = temperature
        return logprobs, distribution[2].clone()

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, targets, distribution = ctx.saved_tensors
        upstream = torch.stack([d_logprobs, d_entropy]).float()
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), CublasChunks.CHUNK):
            piece = slice(start, start + CublasChunks.CHUNK)
            logits = hidden[piece] @ weight.T
            n, V = logits.shape
            _gradient_rows[n, triton.cdiv(V, 4096)](
                logits, targets[piece], distribution[:, piece].contiguous(), upstream[:, piece].contiguous(),
                n, V, 1 / ctx.temperature, BLOCK=4096,
            )  # fmt: skip
            torch.mm(logits, weight, out=d_hidden[piece])
            logprob._add_product(d_weight, logits.T, hidden[piece], keep=True)
        return d_hidden, d_weight.to(weight.dtype), None, None


# ----------------------------------------------------------------------------- the peers


OURS = "this project"


def naive(hidden, weight, targets, temperature):
    logprobs = ((hidden @ weight.T).float() / temperature).log_softmax(-1)  # [N, V]
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def peers() -> dict[str, object]:
    """Name -> function (hidden, weight, targets, temperature) -> log-probs, or (log-probs, entropy), or a mean loss.

    A string instead of a function says why the peer is missing.
    """
    found: dict[str, object] = {
        "cuBLAS chunks": CublasChunks.apply,
        "naive PyTorch": naive,
        "torch.compile": torch.compile(naive),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda h, w, t, temperature: F.linear_cross_entropy(h, w, t)
    else:
        found["F.linear_cross_entropy"] = f"not in torch {torch.__version__}"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger cross-entropy"] = lambda h, w, t, temperature: liger(w, h, t)
    except Exception as error:
        found["Liger cross-entropy"] = f"{type(error).__name__}: {error}"
    try:
        from trl.kernels import ChunkedLogProbFunction

        def trl(h, w, t, temperature):
            return ChunkedLogProbFunction.apply(h, w, None, t, temperature, 8192, None, 1.0, ("entropy",))[:2]

        found["TRL chunked"] = trl
    except Exception as error:
        found["TRL chunked"] = f"{type(error).__name__}: {error}"
    return found


# ----------------------------------------------------------------------------- measuring


def median_ms(function, device: torch.device) -> float:
    if device.type == "cuda":
        return triton.testing.do_bench(function, warmup=100, rep=400, return_mode="median")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def peak_bytes(function, device: torch.device) -> int:
    """The most memory that a call takes above what is allocated before it, in bytes; 0 on a CPU: unknown."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(function, hidden, weight, targets, upstream) -> dict[str, float]:
    """ms and extra bytes of a peer, forward alone and with backward."""
    device = hidden.device

    @torch.no_grad()
    def forward():
        return function(hidden, weight, targets, 1.0)

    def both():
        outputs = function(hidden, weight, targets, 1.0)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        gradients = [u.to(o.dtype) if o.dim() else torch.ones_like(o) for o, u in zip(outputs, upstream, strict=False)]
        return torch.autograd.grad(outputs, (hidden, weight), gradients)

    both()  # compile everything before memory is counted
    first = forward()
    first = first if isinstance(first, torch.Tensor) else first[0]
    returned = sum(t.numel() * t.element_size() for t in (hidden, weight)) if device.type == "cuda" else 0
    return {
        "forward_ms": median_ms(forward, device),
        "both_ms": median_ms(both, device),
        "forward_extra_bytes": peak_bytes(forward, device),
        "both_extra_bytes": peak_bytes(both, device) - returned,
        "mean_logprob": first.float().mean().item() if first.dim() else -first.item(),
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """What this card does on a square bf16 product of random numbers, in FLOP/s, and on a copy, in bytes/s moved."""
    side, count = (8192, 2**31) if device.type == "cuda" else (256, 2**20)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * side**3 / (1e-3 * median_ms(lambda: a @ b, device))
    source = torch.empty(count, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return {"matmul": product, "copy": 2 * count / (1e-3 * median_ms(lambda: target.copy_(source), device))}


def inputs(n: int, v: int, d: int, device: torch.device):
    """bf16 operands with logits of standard deviation 2, targets, and upstream gradients of both results."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "generator": generator}
    hidden = torch.randn(n, d, **options).bfloat16()
    weight = (2 / d**0.5 * torch.randn(v, d, **options)).bfloat16()
    if device.type == "cpu":  # Triton's interpreter multiplies the bit patterns of bf16
        hidden, weight = hidden.float(), weight.float()
    targets = torch.randint(v, (n,), **options)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.randn(2, n, **options) / n


def compare(common: dict, n: int, v: int, d: int, rate: float, device: torch.device, engines: dict) -> bool:
    """A table for one size; whether this project was measured. rate: of a square matrix product, FLOP/s."""
    say(f"\nlog-prob and entropy, N = {n}, V = {v}, D = {d}")
    floor = 1e3 * 2 * n * v * d / rate  # ms a product
    say(f"floor: forward {floor:.1f} ms, forward + backward {3 * floor:.1f} ms\n")
    say(f"{'':24}{'forward':>19}{'forward + backward':>24}{'extra memory, GB':>22}")
    say(f"{'':24}{'ms':>9}{'of floor':>10}{'ms':>14}{'of floor':>10}{'forward':>12}{'both':>10}")
    given, rows = inputs(n, v, d, device), {}
    for name, function in engines.items():
        try:
            if isinstance(function, str):
                raise ImportError(function)
            row = measure(function, *given)
        except Exception as error:
            row = failure(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows[name] = row
        emit(common | {"features": d, "engine": name, "floor_ms": floor} | row)
        if "error" in row:
            say(f"{name:24}not measured: {row['error']}")
            continue
        shares = floor / row["forward_ms"], 3 * floor / row["both_ms"]
        say(
            f"{name:24}{row['forward_ms']:9.2f}{shares[0]:10.0%}{row['both_ms']:14.2f}{shares[1]:10.0%}"
            f"{row['forward_extra_bytes'] / 1e9:12.2f}{row['both_extra_bytes'] / 1e9:10.2f}"
        )
        ours = rows[OURS].get("mean_logprob", row["mean_logprob"])
        if abs(row["mean_logprob"] - ours) > 0.01:
            say(f"{name:24}gives another result: mean log-prob {row['mean_logprob']:.4f}")
    return "error" not in rows[OURS]


def small_kernels(common: dict, n: int, v: int, d: int, device: torch.device) -> None:
    """The GRPO loss with its gradient, and the exact KL: this project's kernels and the plain definitions, in ms."""
    given = [torch.randn(n, device=device) for _ in range(4)]
    given[0].requires_grad_()
    mask = torch.ones(n, device=device)
    reference.MAX_LOGITS = 2**28  # its default suits the cache of a CPU
    options = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.05}

    def loss(module):
        return lambda: torch.autograd.grad(module.grpo_loss(*given, mask, **options)[0], given[0])

    operands = [t.detach() for seed in range(2) for t in inputs(n, v, d, device)[:2]]
    operands[2] = operands[2] + 0.1
    rows = {
        "grpo_loss": loss(grpo),
        "grpo_loss, PyTorch": loss(reference),
        "exact_kl": lambda: kl.exact_kl(*operands),
        "exact_kl, PyTorch": lambda: reference.exact_kl(*operands),
    }
    say(f"\nN = {n}, V = {v}, D = {d}; the loss with its gradient, the KL forward")
    for name, function in rows.items():
        ms = median_ms(function, device)
        emit(common | {"features": d, "engine": name, "ms": ms})
        say(f"{name:24}{ms:9.3f} ms")


def tune(common: dict, n: int, v: int, d: int, device: torch.device) -> None:
    """Times every tile that `tiles.candidates` may name, and some sizes of slab."""
    given = inputs(n, v, d, device)
    known, slab = tiles.candidates, logprob.SLAB
    say(f"\nN = {n}, V = {v}, D = {d}\n{'tile':24}{'slab':>8}{'forward':>11}{'both':>11}")
    for tile in known(tiles.architecture(device), given[0].dtype):
        for elements in (slab // 2, slab, 2 * slab):
            tiles.candidates, logprob.SLAB = lambda *_, tile=tile, **__: [tile], elements
            times = measure(logprob.token_logprobs, *given)
            emit(common | {"features": d, "tile": list(tile), "slab": elements} | times)
            shape = "x".join(map(str, tile))
            say(f"{shape:24}{elements // 2**20:6} Mi{times['forward_ms']:8.2f} ms{times['both_ms']:8.2f} ms")
    tiles.candidates, logprob.SLAB = known, slab


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="N (default 16384; 64 on a CPU)")
    parser.add_argument("--vocabulary", type=int, help="V (default 151936, Qwen's; 1000 on a CPU)")
    parser.add_argument(
        "--features", type=int, nargs="+", help="D (default 896 1536, Qwen2.5 0.5B and 1.5B; 64 on a CPU)"
    )
    parser.add_argument("--tune", action="store_true", help="compare tiles instead of peers")
    parser.add_argument("--no-peers", action="store_true", help="this project alone")
    add_device_flag(parser)
    arguments = parser.parse_args(argv)
    device = chosen_device(arguments.device)
    on_card = device.type == "cuda"
    if not on_card and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("kernels.py: there is no CUDA device here; --device cpu only tries the script out")
    n = arguments.tokens or (16384 if on_card else 64)
    v = arguments.vocabulary or (151936 if on_card else 1000)
    features = arguments.features or ([896, 1536] if on_card else [64])
    common = about("kernels", device) | {"triton": triton.__version__, "tokens": n, "vocabulary": v}
    if arguments.tune:
        for d in features:
            tune(common, n, v, d, device)
        return 0
    rates = ceilings(device)
    emit(common | {"ceilings": rates})
    say(f"bf16 matrix product {rates['matmul'] / 1e12:.0f} TFLOP/s, copy {rates['copy'] / 1e12:.2f} TB/s")
    engines = {OURS: logprob.token_logprobs} | ({} if arguments.no_peers else peers())
    measured = [compare(common, n, v, d, rates["matmul"], device, engines) for d in features]
    small_kernels(common, n, v, features[0], device)
    return int(not all(measured))


if __name__ == "__main__":
    sys.exit(main())
