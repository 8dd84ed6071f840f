"""New tokens per second of this project's sampler beside transformers' `generate`: same weights, prompts and lengths.

    python benchmarks/rollout.py                        # on a GPU if there is one; tables, and a line of JSON a row
    python benchmarks/rollout.py --device cpu --shapes small
    python benchmarks/rollout.py --curve                # cost of a token over batch and length instead of peers
    python benchmarks/rollout.py --no-peers --profile   # this project alone, and which operations take its time

Weights are random, so lengths would be too. Hence a share of the vocabulary counts as stop tokens, which gives every
engine completions of the same geometric distribution (`mean` tokens, cut at `max_new`); or there are no stop tokens,
and all have `max_new` tokens. Each measurement is a process of its own, since peak memory of a process only grows: on a
CPU its resident set, on CUDA what PyTorch allocated. `generate` is called as its users call it, with
num_return_sequences. Times are medians after one call that is not counted; on a CPU it is one call only, where a call
takes a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose rollout.py is not the sampler

import torch

from benchmarks.common import (
    about,
    add_device_flag,
    answer,
    chosen_device,
    emit,
    in_child,
    peak_of_process,
    profiled,
    say,
)
from model import ModelConfig, Transformer
from rollout import SamplingParams, generate

PROFILED_TOKENS = 48  # new tokens of the profiled call: enough for the largest sizes of a step to be replayed as graphs

SHAPES = {
    "tiny": {  # only to try a script out
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "model_type": "qwen2",
    },
    "small": {  # the default of sasr.py
        "vocab_size": 300,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "0.5b": {  # Qwen2.5-0.5B
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "model_type": "qwen2",
    },
    "1.5b": {  # Qwen2.5-1.5B
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "model_type": "qwen2",
    },
}

# prompts, completions a prompt, shortest and longest prompt, mean new tokens (0: no stop tokens), maximum of new tokens
CASES = {
    "cpu": {
        "small": [(8, 8, 20, 40, 64, 256), (16, 32, 20, 40, 64, 256)],
        "0.5b": [(8, 8, 80, 100, 0, 64)],
        "tiny": [(2, 2, 20, 40, 4, 8)],
    },
    "cuda": {
        "small": [(8, 8, 20, 40, 64, 256), (16, 32, 20, 40, 64, 256)],
        "0.5b": [(8, 8, 60, 120, 128, 512), (16, 32, 60, 120, 128, 512), (8, 8, 100, 100, 0, 256)],
        "1.5b": [(8, 8, 100, 100, 0, 256)],
    },
}
ENGINES = ("this project", "generate", "generate, static cache")


def make(shape: str, case: tuple, device: torch.device):
    """Model, prompts and stop tokens: the same for every engine."""
    torch.manual_seed(0)
    config = ModelConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.device(device):
        model = Transformer(config).requires_grad_(False)
    if device.type == "cuda":
        model = model.bfloat16()
    count, _, shortest, longest, mean, _ = case
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    stops = tuple(range(round(config.vocab_size / mean))) if mean else ()
    prompts = [torch.randint(len(stops), config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return model, prompts, stops


def of_this_project(model, prompts, stops, group: int, max_new: int, device):
    params = SamplingParams(max_new, stop_token_ids=stops)
    samplers: dict = {}  # kept from one call to the next, as a run keeps them

    def call(seed: int) -> list[int]:
        draw = {"generator": torch.Generator(device).manual_seed(seed), "samplers": samplers}
        return [len(c) for c in generate(model, prompts, params, group_size=group, **draw).completions]

    return call


def of_transformers(model, prompts, stops, group: int, max_new: int, device, cache: str | None):
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[model.config.model_type]
    with torch.device("meta"):
        theirs = model_class(config_class(**model.config.to_dict()))
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)  # the same tensors, not copies
    theirs.tie_weights()
    with torch.device(device):  # its buffers are in no state_dict
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.generation_config.pad_token_id = 0
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    options = {"eos_token_id": list(stops)} if stops else {"eos_token_id": None}
    if cache:
        options["cache_implementation"] = cache

    def call(seed: int) -> list[int]:
        torch.manual_seed(seed)
        out = theirs.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=group,
            max_new_tokens=max_new,
            **options,
        )[:, longest:]
        is_stop = torch.isin(out, torch.tensor(stops, device=device, dtype=torch.long))
        ended = is_stop.any(1)
        first = is_stop.long().argmax(1) + 1
        return torch.where(ended, first, out.shape[1]).tolist()

    return call


def measure(engine: str, shape: str, case: tuple, device: str, repeats: int, profile: bool) -> dict:
    """Runs in a process of its own."""
    device = chosen_device(device)
    model, prompts, stops = make(shape, case, device)
    group, max_new = case[1], case[5]
    if engine == "this project":
        call = of_this_project(model, prompts, stops, group, max_new, device)
    else:
        call = of_transformers(
            model, prompts, stops, group, max_new, device, "static" if engine.endswith("static cache") else None
        )
    if repeats > 1 or device.type == "cuda":
        call(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates, seconds, lengths = [], [], []
    for seed in range(1, repeats + 1):
        started = time.perf_counter()
        lengths = call(seed)
        seconds.append(time.perf_counter() - started)
        rates.append(sum(lengths) / seconds[-1])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_of_process()
    result = {
        "tokens_per_second": statistics.median(rates),
        "seconds": statistics.median(seconds),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "peak_bytes": peak,
    }
    if profile:
        few = min(PROFILED_TOKENS, max_new)
        call = of_this_project(model, prompts, stops, group, few, device)
        call(0)
        result["profile"] = profiled(lambda: call(1), device) | {"tokens": few}
    if device.type == "cuda" and not stops:
        result["bandwidth"] = _bytes_read(model, prompts, group, max_new) / statistics.median(seconds)
    return result


def _bytes_read(model, prompts, group: int, max_new: int) -> float:
    """Weights and cache that `max_new` decoding steps must read, when no row ends early."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    c = model.config
    per_slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.head.element_size()
    slots = sum(len(prompt) + max_new / 2 for prompt in prompts) * group  # on average over the steps
    return max_new * (weights + per_slot * slots)


def copy_bandwidth() -> float:
    import triton

    source = torch.empty(2**31, device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * triton.testing.do_bench(lambda: target.copy_(source), return_mode="median"))


def compare(common: dict, shape: str, device: str, repeats: int, engines: tuple, profile: bool) -> bool:
    """A table for each case of a shape; whether this project was measured in all of them."""
    ceiling, measured = None, True
    if device == "cuda":
        ceiling = copy_bandwidth()
        torch.cuda.empty_cache()  # leaves the memory to the processes that measure
    for case in CASES[device].get(shape, []):
        count, group, shortest, longest, mean, max_new = case
        spread = f"about {mean} new tokens, {max_new} at most" if mean else f"{max_new} new tokens each"
        say(f"\n{shape}: {count} prompts of {shortest} to {longest} tokens, {group} completions each, {spread}")
        say(f"{'':26}{'tokens/s':>10}{'ratio':>8}{'seconds':>10}{'tokens':>9}{'peak GB':>9}")
        ours = None
        for engine in engines:
            calls = repeats if device == "cuda" or count * group <= 64 else 1
            row = in_child(__file__, engine, shape, case, device, calls, profile and engine == ENGINES[0])
            emit(common | {"shape": shape, "case": list(case), "engine": engine} | row)
            if "error" in row:
                say(f"{engine:26}not measured: {row['error']}")
                measured &= engine != ENGINES[0]
                continue
            ours = ours or row
            ratio = ours["tokens_per_second"] / row["tokens_per_second"]
            text = f"{engine:26}{row['tokens_per_second']:10.0f}{ratio:7.2f}x{row['seconds']:10.2f}{row['tokens']:9}"
            text += f"{row['peak_bytes'] / 1e9:9.2f}"
            if "bandwidth" in row:
                text += f"   {row['bandwidth'] / ceiling:.0%} of copy bandwidth"
            say(text)
    return measured


def curve(common: dict, shape: str, device: str, repeats: int) -> bool:
    """Microseconds a new token costs this project, over batch and over length; whether all of it was measured."""
    measured = True
    say(f"\n{shape}: microseconds a token; prompts of 30 tokens, groups of 8, no stop tokens")
    lengths = (64, 128, 256, 512) if shape == "small" or device == "cuda" else (16, 32, 64)
    say(f"{'rows':>6}" + "".join(f"{f'{max_new} new':>12}" for max_new in lengths))
    for count in (2, 8, 32):
        line = f"{8 * count:6}"
        for max_new in lengths:
            row = in_child(__file__, ENGINES[0], shape, (count, 8, 30, 30, 0, max_new), device, repeats, False)
            if "error" not in row:
                row = {"us_per_token": 1e6 / row["tokens_per_second"]}
            emit(common | {"shape": shape, "rows": 8 * count, "new_tokens": max_new} | row)
            line += f"{row['us_per_token']:12.1f}" if "us_per_token" in row else f"{'failed':>12}"
            measured &= "error" not in row
        say(line)
    return measured


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_flag(parser)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="default: all that fit the device")
    parser.add_argument("--repeats", type=int, help="calls that are timed (default 5 for small, else 1; 3 on CUDA)")
    parser.add_argument("--curve", action="store_true", help="cost over batch and length instead of peers")
    parser.add_argument("--no-peers", action="store_true", help="this project alone")
    parser.add_argument("--profile", action="store_true", help="also which operations take this project's time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return answer(measure, arguments.child)
    device = chosen_device(arguments.device)
    measured, common = True, about("rollout", device)
    for shape in arguments.shapes or [name for name in CASES[device.type] if name != "tiny"]:
        repeats = arguments.repeats or (5 if shape == "small" else 3 if device.type == "cuda" else 1)
        if arguments.curve:
            measured &= curve(common, shape, device.type, repeats)
        else:
            engines = ENGINES[:1] if arguments.no_peers else ENGINES
            measured &= compare(common, shape, device.type, repeats, engines, arguments.profile)
    return int(not measured)


if __name__ == "__main__":
    sys.exit(main())
