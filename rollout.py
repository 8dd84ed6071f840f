"""Sample completions from a model: many prompts, a group of completions each, with a KV cache.

    python rollout.py --model runs/x/model --prompt "..." --samples 4

How it goes: every prompt is prefilled once, its cache is copied to the rows of its group, and then all
rows advance one token a step. Rows that have drawn a stop token leave the batch once they are half of it,
so the last long completions are not paid for by all the short ones.

What it promises: the stop token stays in the completion (else stopping would never be trained); a log-prob
is that of the token drawn, under the distribution it was drawn from; equal inputs and an equal
`torch.Generator` give equal completions.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import KVCache, Transformer

STEPS_BETWEEN_CHECKS = 4  # asking "who has ended?" waits for the device, so not at every token


@dataclass(frozen=True)
class SamplingParams:
    max_new_tokens: int  # tokens, the stop token included
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0 (greedy) up, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")


@dataclass(frozen=True)
class Rollout:
    """len(prompts) * group_size completions, prompt-major: row q * group_size + g."""

    completions: list[list[int]]  # the stop token is kept
    logprobs: list[list[float]]  # nats
    finished: list[bool]  # False: cut off at max_new_tokens


def token_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The log-probabilities [B, V] that tokens are drawn from: temperature first, then top-k, then top-p.

    Tokens that are ruled out get -inf. Greedy (temperature 0) puts all its mass on the first argmax.
    """
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # [B, 1]
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(params.top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if params.top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)  # [B, V]
        reached_before = probs.cumsum(-1) - probs >= params.top_p  # the likeliest token is always kept
        logits = logits.masked_fill(reached_before.scatter(-1, order, reached_before), -torch.inf)
    return logits.log_softmax(-1)


def draw(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One token a row from logits [B, V], and its log-prob: [B] int64, [B] fp32."""
    logprobs = token_distribution(logits.float(), params)  # [B, V]
    if params.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        tokens = torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


@torch.no_grad()
def prefill(model: Transformer, prompts: list[list[int]]) -> tuple[Tensor, KVCache, Tensor]:
    """Read Q prompts, padded on the right; return last logits [Q, V], the cache, and lengths [Q]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)  # [Q]
    longest = max(len(prompt) for prompt in prompts)
    rows = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    input_ids = torch.tensor(rows, device=model.device)  # [Q, T]
    cache = KVCache(model.config, len(prompts), longest, dtype=model.head.dtype, device=model.device)
    hidden = model(input_ids, cache=cache)  # [Q, T, D]
    last = hidden[torch.arange(len(prompts), device=model.device), lengths - 1]  # [Q, D]
    return model.logits(last), cache, lengths


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    group_size: int = 1,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Draw `group_size` completions of each prompt (token ids, of any lengths).

    Raises ValueError naming the prompt that is empty, or too long for the model's context.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    if not prompts:
        return Rollout([], [], [])
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: there is no token to continue from")
        if len(prompt) + params.max_new_tokens > model.config.max_position_embeddings:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={params.max_new_tokens} that "
                f"exceeds the model's context of {model.config.max_position_embeddings}"
            )
    device = model.device
    logits, cache, lengths = prefill(model, prompts)
    fan_out = torch.arange(len(prompts), device=device).repeat_interleave(group_size)  # [Q*G]
    cache = cache.select(fan_out, cache.length + params.max_new_tokens)
    logits, positions = logits[fan_out], lengths[fan_out]  # [B, V], [B]

    total = len(fan_out)
    tokens = torch.zeros(total, params.max_new_tokens, dtype=torch.long, device=device)  # [Q*G, new]
    logprobs = torch.zeros(total, params.max_new_tokens, device=device)  # [Q*G, new]
    ended_at = torch.full((total,), params.max_new_tokens, device=device)  # [Q*G] tokens kept
    finished = torch.zeros(total, dtype=torch.bool, device=device)  # [Q*G]
    stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
    rows = torch.arange(total, device=device)  # [B]: which completion each row of the batch is writing

    for step in range(params.max_new_tokens):
        drawn, drawn_logprobs = draw(logits, params, generator)  # [B], [B]
        tokens[rows, step], logprobs[rows, step] = drawn, drawn_logprobs
        ends = torch.isin(drawn, stops) & ~finished[rows]  # [B]
        ended_at[rows] = torch.where(ends, step + 1, ended_at[rows])
        finished[rows] |= ends
        if step + 1 == params.max_new_tokens:
            break
        if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
            alive = (~finished[rows]).nonzero().squeeze(-1)  # [B']
            if len(alive) == 0:
                break
            if len(alive) <= len(rows) // 2:
                cache = cache.select(alive, cache.keys.shape[3])
                rows, drawn, positions = rows[alive], drawn[alive], positions[alive]
        hidden = model(drawn[:, None], positions=positions[:, None], cache=cache)  # [B, 1, D]
        logits = model.logits(hidden[:, 0])  # [B, V]
        positions = positions + 1

    kept = ended_at.tolist()
    return Rollout(
        completions=[row[:n] for row, n in zip(tokens.tolist(), kept, strict=True)],
        logprobs=[row[:n] for row, n in zip(logprobs.tolist(), kept, strict=True)],
        finished=finished.tolist(),
    )


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one. Raises ValueError where the device is not to be had."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("choose cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


def load_pretrained(path: str | Path, device="cpu") -> tuple[Transformer, Tokenizer, tuple[int, ...]]:
    """A checkpoint directory's model, its tokenizer, and the tokens that end a completion.

    Raises ValueError naming the file that is absent or wrong.
    """
    model = Transformer.from_pretrained(path, device=device)
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; the model's tokenizer belongs beside its weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error})") from None
    tokenizer.no_padding()  # lengths and limits are ours to keep
    tokenizer.no_truncation()
    stops = model.config.eos_token_id
    if stops is None:
        raise ValueError(f"{Path(path) / 'config.json'}: eos_token_id is missing; completions need an end")
    return model, tokenizer, tuple(stops) if isinstance(stops, list) else (stops,)


# ----------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sample completions from a checkpoint directory.")
    parser.add_argument("--model", required=True, help="directory with config.json, safetensors and tokenizer.json")
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--samples", type=int, default=1, help="completions to draw (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens a completion at most (default 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep this much probability (default 1.0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
        model, tokenizer, stops = load_pretrained(args.model, device)
        params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p, stops)
        prompt = tokenizer.encode(args.prompt if args.prompt is not None else sys.stdin.read()).ids
        generator = torch.Generator(device).manual_seed(args.seed)
        rollout = generate(model, [prompt], params, group_size=args.samples, generator=generator)
    except ValueError as error:
        print(f"rollout.py: {error}", file=sys.stderr)
        return 2
    for completion, logprobs, finished in zip(rollout.completions, rollout.logprobs, rollout.finished, strict=True):
        print(tokenizer.decode(completion, skip_special_tokens=True))
        print(f"--- {len(completion)} tokens, log-prob {sum(logprobs):.2f}, {'ended' if finished else 'cut off'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
