"""Does it work on this card? Small checks of what only CUDA runs, from attention to a whole run that is resumed.

    python benchmarks/smoke.py                          # all of them, on a GPU if there is one; a line of JSON each
    python benchmarks/smoke.py gradients chunks --device cpu

A check fills a row with what it measures and raises AssertionError where that is not as it should be. On a CPU the same
logic runs at smaller size, with stand-ins where a comment says so: `tests/test_gpu.py` does that, and on a card, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if sys.path[1] == str(Path(__file__).resolve().parent):  # Python put it there: its rollout.py is not the sampler
    sys.path.pop(1)

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import sasr
from benchmarks.common import chosen_device, emit, failure
from data.batch import Batch, micro_batches
from model import KVCache, ModelConfig, Transformer
from rollout import Rollout, Sampler, SamplingParams, generate

HEADS, KV_HEADS = 14, 2  # those of Qwen2.5-0.5B
VOCABULARY = 300


def small_model(device: torch.device) -> Transformer:
    """Random weights with distributions that are not flat; the heads of Qwen2.5-0.5B, on a CPU narrower ones."""
    head_dim = 64 if device.type == "cuda" else 8
    hidden = HEADS * head_dim
    sizes = (VOCABULARY, hidden, 2 * hidden, 2, HEADS, KV_HEADS, head_dim, 4096)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(*sizes, model_type="qwen2", initializer_range=hidden**-0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.to(device)


def on_cpu(model: Transformer) -> Transformer:
    """The same weights in fp32 on the CPU."""
    reference = Transformer(model.config)
    reference.load_state_dict({name: tensor.float().cpu() for name, tensor in model.state_dict().items()})
    return reference


def random_tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(10, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


# ----------------------------------------------------------------------------- what there is


def versions(device: torch.device, row: dict) -> None:
    """The card, its driver, and the packages that are here or missing."""
    row |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    row["cudnn"], row["cpus"] = torch.backends.cudnn.version(), torch.get_num_threads()
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
    }.items():
        with contextlib.suppress(OSError):
            row[name] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        row |= {"card": card.name, "multiprocessors": card.multi_processor_count, "memory": card.total_memory}
    packages = ("triton", "transformers", "pytest", "xdist", "hypothesis", "liger_kernel", "trl", "datasets")
    row["missing"] = [name for name in packages if importlib.util.find_spec(name) is None]


# ----------------------------------------------------------------------------- attention


def attention(device: torch.device, row: dict) -> None:
    """Which kernel attention takes, what new shapes cost, and gradients at a length 64 above a multiple of 128.

    Without cuDNN's attention, as in a run, and with it, PyTorch's first choice on Hopper, to see whether that is still
    the better way. On a CPU both are the same.
    """
    row["cudnn_as_chosen"] = torch.backends.cuda.cudnn_sdp_enabled() if device.type == "cuda" else False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        row["without_cudnn"] = measure_attention(device)
        torch.backends.cuda.enable_cudnn_sdp(True)
        row["with_cudnn"] = measure_attention(device)
    except RuntimeError as error:
        if "without_cudnn" not in row:
            raise
        row["with_cudnn"] = failure(error)  # of interest, yet nothing that a run does
    finally:
        torch.backends.cuda.enable_cudnn_sdp(row["cudnn_as_chosen"])
    assert not row["cudnn_as_chosen"], "the device was chosen with cuDNN's attention on"
    assert row["without_cudnn"]["gradient_error"] < 0.02, "a gradient of attention is wrong"


def measure_attention(device: torch.device) -> dict:
    found: dict = {"kernel": {}}
    for kind, slots in (("causal", 192), ("decoding", 192), ("shared", 192), ("shared", 197), ("bool mask", 192)):
        q, k, v, options = attention_inputs(kind, slots, device)
        found["kernel"][f"{kind}, S={slots}"] = SDPBackend(torch._fused_sdp_choice(q, k, v, **options)).name
    attend(128, device)  # libraries are initialised
    started = time.perf_counter()
    for slots in range(136, 216, 8):
        attend(slots, device)
    found["ten_new_shapes_seconds"] = time.perf_counter() - started
    q, k, v, options = attention_inputs("shared", 192, device)
    exact = attend_and_differentiate(q.double(), k.double(), v.double(), options["attn_mask"].double())
    gradients = attend(192, device)
    found["not_finite"] = sum(int((~g.isfinite()).sum()) for g in gradients)
    found["gradient_error"] = relative_error(gradients, exact)
    return found


def attention_inputs(kind: str, slots: int, device: torch.device):
    """Queries, keys, values and options, as model.py has them: prompts, decoding, completions that share prompts.

    A `bool mask` is for comparison: decoding on CUDA has a bias instead.
    """
    head_dim, batch = (64, 4) if device.type == "cuda" else (8, 1)
    group = HEADS // KV_HEADS
    generator = torch.Generator(device).manual_seed(slots)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device, generator=generator)
        return drawn.bfloat16().requires_grad_()

    k, v = (random(batch, KV_HEADS, slots, head_dim) for _ in range(2))
    if kind == "causal":
        return random(batch, HEADS, slots, head_dim), k, v, {"is_causal": True, "enable_gqa": True}
    new = slots // 2 if kind == "shared" else 1
    position = torch.arange(slots - new, slots, device=device)
    mask = torch.arange(slots, device=device) <= position[:, None]
    mask = mask.expand(batch, 1, new, slots)
    if kind != "bool mask":
        bias = torch.zeros(batch, 1, new, -(-slots // 8) * 8, dtype=k.dtype, device=device)
        bias[..., :slots].masked_fill_(~mask, -torch.inf)
        mask = bias.repeat(1, 1, group, 1)[..., :slots]
    return random(batch, KV_HEADS, group * new, head_dim), k, v, {"attn_mask": mask}


def attend(slots: int, device: torch.device) -> list[Tensor]:
    q, k, v, options = attention_inputs("shared", slots, device)
    return attend_and_differentiate(q, k, v, options["attn_mask"])


def attend_and_differentiate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Tensor]:
    """The gradients of q, k and v, for one and the same upstream gradient."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    if out.is_cuda:
        torch.cuda.synchronize()
    return list(gradients)


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference, as a share of that of `exact`, over all tensors; NaN where one is not finite."""
    difference = sum(((f.double().cpu() - e.double().cpu()) ** 2).sum() for f, e in zip(found, exact, strict=True))
    return math.sqrt(difference / sum((e.double().cpu() ** 2).sum() for e in exact))


# ----------------------------------------------------------------------------- the sampler


class NoWaiting(TorchDispatchMode):
    """On a CPU: raises RuntimeError for what would wait for the device if there were one."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")  # .item(), x[mask], torch.tensor(...)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_", "_index_put_impl_") else []
        if name in self.WAITING or any(index.dtype == torch.bool for index in indices):
            raise RuntimeError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def decoding(device: torch.device, row: dict) -> None:
    """Steps as graphs record them, of whole buckets of rows and slots: none may wait for the device."""
    row["steps"] = 0

    def advance(self, rows: int, slots: int) -> None:
        first = row["steps"] == 0  # it initialises libraries
        with contextlib.nullcontext() if first else no_waiting(device):
            self._step(*self.bucket(rows, slots))
        row["steps"] += 1

    model = small_model(device).bfloat16()
    with mock.patch.object(Sampler, "_advance", advance):
        for drawing in ({}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}, {"temperature": 0.0}):
            ends = {"stop_token_ids": (1, 2), "stop_sequences": ((5, 6), (7, 8, 9))}
            generate(model, random_tokens(20, 3, 9), SamplingParams(8, **drawing, **ends), group_size=2)
    assert row["steps"] >= 12, "too few steps were taken"


def graphs(device: torch.device, row: dict) -> None:
    """Steps of whole buckets, on CUDA as graphs from the second rollout on, draw what plain steps draw; and how fast.

    On a CPU, in fp32, the plain steps are those of the active rows alone.
    """
    model, prompts = small_model(device), random_tokens(*range(3, 21))
    model = model.bfloat16() if device.type == "cuda" else model
    params, samplers, drawn = SamplingParams(24, stop_token_ids=tuple(range(20))), {}, {}
    for name in ("first", "recorded", "replayed", "plain"):
        whole_buckets = (name == "plain") == (device.type == "cuda")
        generator = torch.Generator(device).manual_seed(0)
        started = time.perf_counter()
        with steps_of_whole_buckets() if whole_buckets else contextlib.nullcontext():
            drawn[name] = generate(model, prompts, params, generator=generator, samplers=samplers).completions
        row[f"{name}_seconds"] = time.perf_counter() - started
    row["graphs"] = sum(len(sampler.graphs or {}) for sampler in samplers.values())
    different = [name for name, completions in drawn.items() if completions != drawn["plain"]]
    assert not different, f"{', '.join(different)}: not what plain steps draw"
    assert row["graphs"] > 0 or device.type == "cpu", "no graph was recorded"


def steps_of_whole_buckets():
    """As on CUDA, but without graphs."""
    return mock.patch.object(Sampler, "_advance", lambda self, rows, slots: self._step(*self.bucket(rows, slots)))


def chunks(device: torch.device, row: dict) -> None:
    """A rollout of several chunks, the last one with fewer and shorter rows; log-probs as the CPU's in fp32.

    On a CPU whole buckets advance, as they do on CUDA.
    """
    prompts = random_tokens(5, 11, 40, 150, 7)
    params = SamplingParams(12, stop_token_ids=tuple(range(10)))
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        model = small_model(device).to(dtype)
        four_rows = KVCache(model.config, 4, 256, dtype=dtype, device="meta").bytes
        draw = {"generator": torch.Generator(device).manual_seed(0), "memory_limit": four_rows}
        with steps_of_whole_buckets() if device.type == "cpu" else contextlib.nullcontext():
            rollout = generate(model, prompts, params, group_size=3, **draw)
        assert rollout.chunks == 4, f"{rollout.chunks} chunks instead of four"
        gaps = logprob_gaps(on_cpu(model), [prompt for prompt in prompts for _ in range(3)], rollout)
        row[str(dtype)] = {"mean_gap": gaps.mean().item(), "largest_gap": gaps.max().item(), "tokens": len(gaps)}
        assert gaps.mean() < limit, f"log-probs of the sampler in {dtype} are not those of the model"


@torch.no_grad()
def logprob_gaps(model: Transformer, prompts: list[list[int]], rollout: Rollout) -> Tensor:
    """How far the log-prob of each token drawn is from what the model says of it in one pass: [N] in nats."""
    gaps = []
    for prompt, completion, logprobs in zip(prompts, rollout.completions, rollout.logprobs, strict=True):
        hidden = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
        expected = model.logits(hidden).log_softmax(-1)[range(len(completion)), completion]
        gaps.append((expected - torch.tensor(logprobs)).abs())
    return torch.cat(gaps)


# ----------------------------------------------------------------------------- the update


def shared_batch(read: int, device: torch.device) -> Batch:
    """Two prompts, the longer of 100 tokens, with three completions each, of which `read` tokens are read at most."""
    prompts, completions = random_tokens(100, 61), random_tokens(read + 1, 30, 5, 44, read + 1, 17)
    tokens, generator = sum(map(len, completions)), torch.Generator().manual_seed(0)
    return Batch(
        [prompt for prompt in prompts for _ in range(3)],
        completions,
        advantages=torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, -0.3], device=device),
        ref_logprobs=(torch.randn(tokens, generator=generator) - 5).to(device),
    )


def gradient(model: Transformer, batch: Batch, max_tokens: int, *, bf16: bool) -> list[Tensor]:
    """That of the GRPO loss with its KL term, unclipped. bf16: on a CPU too; on CUDA it always is."""
    config = sasr.Config(kl_coef=0.05, max_grad_norm=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.grpo_objective)], config, max_tokens)
    return [parameter.grad.clone() for parameter in model.parameters()]


def gradients(device: torch.device, row: dict) -> None:
    """A micro-batch that shares prompts, in bf16, beside whole sequences one at a time, in fp32 on the CPU.

    S tokens are attended to: 64 more than a multiple of 128, then no multiple of 8.
    """
    model = small_model(device)
    for slots in (192, 197):
        batch = shared_batch(slots - 100, device)
        (micro,) = micro_batches(batch, 10**6, device)
        assert micro.prompts.shape[1] + micro.completions.shape[1] == slots, "the prompts are not shared"
        exact = gradient(on_cpu(model), shared_batch(slots - 100, torch.device("cpu")), 1, bf16=False)
        for checkpointing in (False, True):
            model.gradient_checkpointing = checkpointing
            found = gradient(model, batch, 10**6, bf16=True)
            each = {
                name: relative_error([f], [e])
                for (name, _), f, e in zip(model.named_parameters(), found, exact, strict=True)
            }
            worst = max(each, key=lambda name: math.inf if math.isnan(each[name]) else each[name])
            measured = {"error": relative_error(found, exact), "worst": worst, "its_error": each[worst]}
            row[f"S={slots}{', checkpointing' * checkpointing}"] = measured
            assert measured["error"] < 0.05, f"S={slots}: the gradient is not that of fp32 on the CPU"
            assert measured["its_error"] < 0.2, f"S={slots}: the gradient of {worst} is not that of fp32 on the CPU"


# ----------------------------------------------------------------------------- runs


def small_run(device: torch.device, folder: str) -> dict:
    """Flags of a run of SFT and GRPO steps in turn. Any text earns a reward of its own, so that no step is skipped."""
    reward = Path(folder) / "reward.py"
    reward.write_text("import zlib\n\n\ndef reward(text, example):\n    return zlib.crc32(text.encode()) % 997 / 997\n")
    flags = {"task": "countdown:train_size=64,test_size=8", "reward": f"{reward}:reward", "ood_task": "none"}
    flags |= {"controller": "alternate", "warmup_steps": 1, "steps": 2, "lr_schedule": "constant", "eval_every": 0}
    flags |= {"kl_coef": 0.05, "gradient_checkpointing": True, "offload_reference": True, "device": str(device)}
    if device.type == "cpu":
        flags |= {"hidden_size": 32, "layers": 2, "heads": 2, "max_new_tokens": 8, "eval_examples": 2}
        flags |= {"sft_batch_size": 4, "prompts_per_step": 3, "group_size": 4}
    return flags


def deterministic(device: torch.device, row: dict) -> None:
    """With --deterministic: the gradient of a batch twice, and steps from equal weights twice, bit for bit."""
    trained = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = sasr.Config(**small_run(device, folder), deterministic=True)
            for _ in range(2):
                trainer = sasr.Trainer(config)
                sasr.after_step(trainer)
                for _ in range(config.total_steps):
                    trainer.state.finish_step(trainer.step(), 0.0)
                    sasr.after_step(trainer)
                trained.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        model, batch = small_model(device), shared_batch(92, device)
        once, again = (gradient(model, batch, 10**6, bf16=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    row["equal_gradients"] = all(map(torch.equal, once, again))
    row["equal_steps"] = all(map(torch.equal, *trained))
    assert row["equal_gradients"], "two gradients of one batch differ"
    assert row["equal_steps"], "two equal runs differ"


def run(device: torch.device, row: dict) -> None:
    """`python sasr.py` end to end, with checkpointing, an offloaded reference policy and KL; then --resume."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = ["--out", str(out)]
        for name, value in small_run(device, folder).items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
        row["exit_codes"] = [sasr.main(arguments), sasr.main(["--resume", str(out), "--steps", "4"])]
        assert row["exit_codes"] == [0, 0], "a run or its resuming failed"
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        row["summary"] = json.loads((out / "summary.json").read_text())
        row["loads"] = len(list(Transformer.from_pretrained(out / "model").parameters()))
    for key in ("kind", "seconds", "loss", "grad_norm", "sampler_gap", "kl"):
        row[key] = [record.get(key) for record in records]
    practised = [record for record in records if record["kind"] == "grpo"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5], "not every step is in metrics.jsonl"
    assert len(practised) == 2, "there were not two GRPO steps"
    assert all(0 < record["grad_norm"] < math.inf for record in records), "a gradient is zero or not finite"
    limit = 0.1 if device.type == "cuda" else 1e-4  # nats a token
    assert all(record["sampler_gap"] < limit for record in practised), "sampler and trainer disagree"
    assert all(-1e-3 < record["kl"] < 1 for record in practised), "the KL to the reference policy is out of range"


# ----------------------------------------------------------------------------- the command line

CHECKS: dict[str, Callable[[torch.device, dict], None]] = {
    check.__name__: check for check in (versions, attention, decoding, graphs, chunks, gradients, deterministic, run)
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", default=list(CHECKS), help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default auto)")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.checks if name not in CHECKS]
    if unknown:
        parser.error(f"unknown check {unknown[0]}: choose from {', '.join(CHECKS)}")
    device, failed = chosen_device(arguments.device), False
    for name in arguments.checks:
        row: dict = {"check": name, "device": str(device)}
        started = time.perf_counter()
        try:
            CHECKS[name](device, row)
            row["result"] = "ok"
        except Exception as error:
            row |= {"result": "failed"} | failure(error)
            failed = True
        row["check_seconds"] = round(time.perf_counter() - started, 2)
        emit(row)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
