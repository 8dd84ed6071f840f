"""Sample completions from a model: many prompts, a group of completions each, with a KV cache.

    python rollout.py --model runs/x/model --prompt "..."      # streams an answer; without --prompt, a conversation

How it goes: every prompt is read once (prefill), its cache is copied to the rows of its group, and then all rows
advance one token a step. Every few steps the rows that have drawn a stop token leave: the last of the others move
into their places, so that a step always works on the first rows of the cache and pays for nothing else.

A step is one function, `Sampler._step`, that changes tensors in place and never waits for the device. That makes it
plain to read and lets CUDA record it once for each size and replay it as a graph: same function, no launch overhead.

What it promises: the stop token stays in the completion (else stopping would never be trained); a log-prob is that of
the token drawn, under the distribution it was drawn from; equal inputs and an equal `torch.Generator` give equal
completions, whoever leaves when, and however few rows the memory lets advance at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Codec
from model import KVCache, Transformer, resolve_checkpoint

STEPS_BETWEEN_CHECKS = 4  # asking "who has ended?" waits for the device, so not at every token
PREFILL_TOKENS = 8192  # tokens, padding included, that are read at once; prompts of like lengths go together

# On a CPU a vocabulary of 152k makes tensors that leave the caches, and that the system must map anew at every token.
# Pieces of these sizes stay: that took a third off such a step.
HEAD_PIECE = 512  # rows of the output matrix
DRAW_PIECE = 2**20  # log-probs

LEAST_TEMPERATURE = 1e-3  # logits divided by less may leave fp32


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
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf")):
            least = f"0 (greedy) or a number from {LEAST_TEMPERATURE} up"
            raise ValueError(f"temperature must be {least}, not {self.temperature}")
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
    waves: int = 1  # more than one: the cache of all rows would not have fitted the memory limit


def token_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The log-probabilities [B, V] that tokens are drawn from: temperature first, then top-k, then top-p.

    Tokens that are ruled out get -inf. Greedy (temperature 0) puts all its mass on the first argmax.
    """
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # [B, 1]
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    if params.temperature != 1:
        logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(params.top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if params.top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)  # [B, V]
        reached_before = probs.cumsum(-1) - probs >= params.top_p  # the likeliest token is always kept
        logits = logits.masked_fill(reached_before.scatter(-1, order, reached_before), -torch.inf)
    return logits.log_softmax(-1)


def draw(logits: Tensor, noise: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row from logits [B, V], and its log-prob: [B] int64, [B] fp32.

    noise [B] is uniform on (0, 1]: the token is the first at which the cumulative probability reaches it. That takes
    one random number a row, where the usual race of exponentials takes V; cumulative sums in fp32 resolve
    probabilities down to 6e-8. A token that is ruled out adds nothing to the sum, so it is never the first.
    """
    at_once = max(1, DRAW_PIECE // logits.shape[1])
    if logits.device.type == "cpu" and len(logits) > at_once:
        parts = [draw(*part, params=params) for part in zip(logits.split(at_once), noise.split(at_once), strict=True)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    logprobs = token_distribution(logits.float(), params)  # [B, V]
    if params.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum_(-1)  # [B, V]
        tokens = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:]).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[1] - 1)  # NaN has no place among the sums; its log-prob tells
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def prefill(model: Transformer, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
    """Read Q prompts, padded on the right; return the logits after each one's last token, [Q, V], and the cache."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    cache = KVCache(model.config, len(prompts), longest, dtype=model.head.dtype, device=model.device)
    hidden = model(input_ids, cache=cache)  # [Q, T, D]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)  # [Q]
    return model.logits(hidden[torch.arange(len(prompts), device=model.device), last]), cache


def of_like_length(lengths: list[int], most_tokens: int) -> list[list[int]]:
    """Indices of sequences, sorted by length and cut into pieces of at most `most_tokens`, padding included."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return in_pieces(order, lambda piece: len(piece) * lengths[piece[-1]], most_tokens)  # the last is the longest


def in_pieces(order: list[int], tokens_read: Callable[[list[int]], int], most_tokens: int) -> list[list[int]]:
    """Consecutive pieces, each as long as it reads at most `most_tokens`, or of a single sequence."""
    pieces: list[list[int]] = []
    for i in order:
        if pieces and tokens_read([*pieces[-1], i]) <= most_tokens:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


class Sampler:
    """Writes `total` completions at once, with tensors that are made once and changed in place.

    Everything is kept by completion, but for the cache: its row r belongs to completion `owner[r]`. The first rows
    are those still being written; a row behind them belongs to a completion that has ended, and does no harm.
    """

    def __init__(self, model: Transformer, params: SamplingParams, total: int, slots: int):
        self.model, self.params, self.slots = model, params, slots
        device = model.device
        self.cache = KVCache(model.config, total, slots, dtype=model.head.dtype, device=device)
        self.owner = torch.arange(total, device=device)  # [total] by row
        self.prompt_lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)  # tokens drawn so far
        self.alive = torch.ones(total, dtype=torch.bool, device=device)
        self.noise = torch.zeros(total, STEPS_BETWEEN_CHECKS, device=device)
        # One column to spare: what a row draws after its end goes there.
        self.tokens = torch.zeros(total, params.max_new_tokens + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(total, params.max_new_tokens + 1, device=device)
        self.logits = model.head.new_empty(total, len(model.head)) if device.type == "cpu" else None
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.graph_memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # one for all graphs

    @torch.no_grad()
    def run(self, prompts: list[list[int]], noise, watch=None) -> tuple[list[list[int]], list[list[float]]]:
        """A completion of each of at most `total` prompts (equal ones are read once), and its log-probs.

        noise(k) gives the k-th [len(prompts), STEPS_BETWEEN_CHECKS] of noise. `watch`, if there is one, is called
        after each step with the completions so far.
        """
        count, longest = len(prompts), max(map(len, prompts))
        self.owner.copy_(torch.arange(len(self.owner)))
        self.prompt_lengths[:count] = torch.tensor([len(prompt) for prompt in prompts], device=self.owner.device)
        self.lengths.zero_()
        self.alive.copy_(torch.arange(len(self.alive)) < count)
        self.noise[:count] = noise(0)
        self._read_prompts(prompts)
        rows = count
        for step in range(1, self.params.max_new_tokens):
            if watch:
                watch(self._written(self.tokens, count))
            if step % STEPS_BETWEEN_CHECKS == 0:
                self.noise[:count] = noise(step // STEPS_BETWEEN_CHECKS)
                rows = self._close_gaps(rows, longest + step)
                if rows == 0:
                    break
            self._advance(rows, longest + step)
        return self._written(self.tokens, count), self._written(self.logprobs, count)

    def _written(self, matrix: Tensor, count: int) -> list[list]:
        """Of each of the first completions, the columns in use."""
        lengths = self.lengths[:count].tolist()
        return [row[:length] for row, length in zip(matrix[:count].tolist(), lengths, strict=True)]

    def _read_prompts(self, prompts: list[list[int]]) -> None:
        """Read each distinct prompt once, copy its cache to its rows, and draw their first tokens."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        for piece in of_like_length(list(map(len, distinct)), PREFILL_TOKENS):
            place = {distinct[q]: i for i, q in enumerate(piece)}
            logits, cache = prefill(self.model, [list(prompt) for prompt in place])
            rows = [row for row, prompt in enumerate(prompts) if tuple(prompt) in place]
            source = torch.tensor([place[tuple(prompts[row])] for row in rows], device=logits.device)
            rows = torch.tensor(rows, device=logits.device)
            self.cache.copy_rows(rows, cache, source)
            self._write(rows, logits[source])

    def _close_gaps(self, rows: int, slots: int) -> int:
        """Let the rows that have ended leave the first `rows`; how many are left. This waits for the device."""
        alive = self.alive[self.owner[:rows]].tolist()
        left = sum(alive)
        gaps = [row for row in range(left) if not alive[row]]
        movers = [row for row in range(left, rows) if alive[row]]
        if gaps:
            gaps, movers = (torch.tensor(x, device=self.owner.device) for x in (gaps, movers))
            self.cache.copy_rows(gaps, self.cache.first(rows, slots), movers)
            self.owner[gaps], self.owner[movers] = self.owner[movers], self.owner[gaps]
        return left

    def _advance(self, rows: int, slots: int) -> None:
        """One step of the first `rows`, which use the first `slots`; on CUDA as a graph."""
        if self.owner.device.type != "cuda":
            self._step(rows, slots)
            return
        size = self.bucket(rows, slots)
        if size not in self.graphs:  # the first step of a size runs as it is: libraries set themselves up
            self.graphs[size] = None
            self._step(*size)
            return
        if self.graphs[size] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_memory):
                self._step(*size)  # recorded, not run
            self.graphs[size] = graph
        self.graphs[size].replay()

    def bucket(self, rows: int, slots: int) -> tuple[int, int]:
        """The size to record a graph for: at most a quarter more rows, and whole blocks of slots."""
        unit = max(8, 2 ** (rows.bit_length() - 3))
        return min(-(-rows // unit) * unit, len(self.owner)), min(-(-slots // 128) * 128, self.slots)

    def _step(self, rows: int, slots: int) -> None:
        """Read the last token of each of the first `rows`, and draw its next."""
        owner = self.owner[:rows]
        drawn = self.lengths[owner]
        last = self.tokens[owner, drawn - 1]
        positions = self.prompt_lengths[owner] + drawn - 1
        hidden = self.model(last[:, None], positions=positions[:, None], cache=self.cache.first(rows, slots))
        self._write(owner, self._logits(hidden[:, 0]))

    def _logits(self, hidden: Tensor) -> Tensor:
        """[B, D] -> [B, V]; on a CPU piece by piece, into memory that is kept."""
        if self.logits is None:
            return self.model.logits(hidden)
        logits = self.logits[: len(hidden)]
        for start in range(0, logits.shape[1], HEAD_PIECE):
            piece = slice(start, start + HEAD_PIECE)
            torch.mm(hidden, self.model.head[piece].t(), out=logits[:, piece])
        return logits

    def _write(self, owner: Tensor, logits: Tensor) -> None:
        """Draw the next token of these completions, from logits [B, V]."""
        alive, length = self.alive[owner], self.lengths[owner]  # [B]
        token, logprob = draw(logits, self.noise[owner, length % STEPS_BETWEEN_CHECKS], self.params)
        column = torch.where(alive, length, self.params.max_new_tokens)
        self.tokens[owner, column] = token
        self.logprobs[owner, column] = logprob
        self.lengths[owner] = length + alive
        stopped = (token[:, None] == self.stops).any(-1)
        self.alive[owner] = alive & ~stopped & (length + 1 < self.params.max_new_tokens)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    group_size: int = 1,
    generator: torch.Generator | None = None,
    memory_limit: int = 0,
    samplers: dict | None = None,
    watch: Callable[[list[list[int]]], None] | None = None,
) -> Rollout:
    """Draw `group_size` completions of each prompt (token ids, of any lengths).

    The cache takes at most `memory_limit` bytes (0: four fifths of what is free): rows that do not fit are written in
    further waves, with the same result; so they are if memory runs out all the same. `samplers` keeps buffers and CUDA
    graphs for the next call of the same size: pass the same dict again. `watch` is called at every token with the
    completions of the wave so far, for a reader who does not want to wait. Raises ValueError naming the prompt that is
    empty, or too long for the model's context, and where not even one row fits the limit.
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
    each = [prompt for prompt in prompts for _ in range(group_size)]
    slots = -(-(max(map(len, prompts)) + params.max_new_tokens) // 128) * 128  # few sizes: buffers fit the next call
    samplers = {} if samplers is None else samplers
    limit = memory_limit or 0.8 * (free_memory(model.device) + sum(s.cache.bytes for s in samplers.values()))
    rows = rows_at_once(model, len(each), slots, limit)
    device = generator.device if generator is not None else "cpu"
    seed = torch.randint(2**62, (), generator=generator, device=device).item()

    def noise(k: int, start: int) -> Tensor:
        """For all rows of all waves, of which these are taken: a row's noise does not depend on its wave."""
        source = torch.Generator(model.device).manual_seed(seed + k)
        uniform = torch.rand(len(each), STEPS_BETWEEN_CHECKS, generator=source, device=model.device)
        return 1 - uniform[start : start + rows]

    completions: list[list[int]] = []
    logprobs: list[list[float]] = []
    waves = 0
    while len(completions) < len(each):
        start = len(completions)
        try:
            if (model, params, rows, slots) not in samplers:
                samplers.clear()  # first, so that two caches are never held at once
                samplers[model, params, rows, slots] = Sampler(model, params, rows, slots)
            sampler = samplers[model, params, rows, slots]
            wave = sampler.run(each[start : start + rows], partial(noise, start=start), watch)
        except torch.OutOfMemoryError:
            sampler = None
            samplers.clear()
            if rows == 1:
                raise
            rows = math.ceil(rows / 2)
            continue
        completions += wave[0]
        logprobs += wave[1]
        waves += 1
    finished = [completion[-1] in params.stop_token_ids for completion in completions]
    return Rollout(completions, logprobs, finished, waves)


def rows_at_once(model: Transformer, rows: int, slots: int, limit: float) -> int:
    """How many rows a wave has, so that a cache of so many slots stays within `limit` bytes and waves are alike."""
    config = model.config
    per_slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.head.element_size()
    if limit < slots * per_slot:
        raise ValueError(
            f"the cache of one completion takes {slots * per_slot / 1e9:.2f} GB ({slots} tokens) and the limit is "
            f"{limit / 1e9:.2f} GB: lower max_new_tokens, or raise the limit"
        )
    waves = math.ceil(rows / (limit // (slots * per_slot)))
    return math.ceil(rows / waves)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated; unlimited where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one. Raises ValueError where the device is not to be had."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("choose cpu or cuda")
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels and graphs go to the current device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


# ----------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Talk to a model: one answer to --prompt, or a conversation if you give none.",
        epilog="A checkpoint with a chat template is spoken to in it, any other gets the text itself to continue.",
    )
    parser.add_argument("--model", required=True, help="checkpoint directory, or the id of a model on the hub")
    parser.add_argument("--prompt", help="text to answer (default: standard input; on a terminal, a conversation)")
    parser.add_argument("--prompt-format", default="auto", choices=("auto", "raw", "chat"), help="(default auto)")
    parser.add_argument("--system", default="", help="system message of a chat (default: the template's own)")
    parser.add_argument("--samples", type=int, default=1, help="answers to draw; one is streamed (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens an answer at most (default 512)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep this much probability (default 1.0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    args = parser.parse_args(argv)
    try:
        if not 1 <= args.samples <= 10**6:
            raise ValueError(f"--samples {args.samples}: must lie between 1 and {10**6}")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed {args.seed}: must lie between 0 and {2**63 - 1}")
        path, device = resolve_checkpoint(args.model), resolve_device(args.device)
        codec = Codec.from_pretrained(path, prompt_format=args.prompt_format, system=args.system)
        model = Transformer.from_pretrained(path, device=device)
        params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p, codec.stop_token_ids)
        generator = torch.Generator(device).manual_seed(args.seed)
        if args.prompt is None and sys.stdin.isatty():
            converse(model, codec, params, generator)
        else:
            message = {"role": "user", "content": read_prompt(args.prompt)}
            answer(model, codec, [message], params, generator, args.samples)
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has gone, which Python would complain of once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"rollout.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def read_prompt(given: str | None) -> str:
    """What --prompt gives, or else all of standard input. Raises ValueError naming which of them is not UTF-8."""
    try:
        text = sys.stdin.read() if given is None else given
        text.encode()
        return text
    except UnicodeError:
        raise ValueError(f"{'standard input' if given is None else '--prompt'}: not valid UTF-8") from None


def converse(model: Transformer, codec: Codec, params: SamplingParams, generator: torch.Generator) -> None:
    """Turn by turn until the input ends; a model without a chat template sees the last line only.

    A conversation that has outgrown the model's context is said to have, and begins again.
    """
    print("type a message; Ctrl-D ends", file=sys.stderr)
    messages = []
    for line in iter(lambda: read_line("> "), None):
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            (said,) = answer(model, codec, messages, params, generator, 1)
        except ValueError as error:
            print(f"rollout.py: {error}; the conversation begins again", file=sys.stderr)
            messages = []
        else:
            messages.append({"role": "assistant", "content": said})


def read_line(sign: str) -> str | None:
    try:
        return input(sign).encode(errors="replace").decode()
    except EOFError:
        return None


def answer(
    model: Transformer, codec: Codec, messages: list[dict], params: SamplingParams, generator, samples: int
) -> list[str]:
    """Print and return answers to a conversation; a single one appears as it is written."""
    shown = codec.opening

    def stream(completions: list[list[int]]) -> None:
        nonlocal shown
        text = codec.decode(completions)[0].rstrip("\ufffd")  # a character's last bytes may still be on their way
        if len(text) > len(shown):  # less, while bytes that began a character spoil those before them
            print(text[len(shown) :], end="", flush=True)
            shown = text

    prompt, context = codec.encode(codec.render(messages)), model.config.max_position_embeddings
    if len(prompt) + params.max_new_tokens > context:
        raise ValueError(
            f"{len(prompt)} tokens of prompt and --max-new-tokens {params.max_new_tokens} exceed the model's context "
            f"of {context}"
        )
    if samples == 1:
        print(shown, end="", flush=True)
    watch = stream if samples == 1 else None
    rollout = generate(model, [prompt], params, group_size=samples, generator=generator, watch=watch)
    texts = codec.decode(rollout.completions)
    for text, tokens, logprobs, ended in zip(
        texts, rollout.completions, rollout.logprobs, rollout.finished, strict=True
    ):
        print(text[len(shown) :] if samples == 1 else text)
        print(f"--- {len(tokens)} tokens, log-prob {sum(logprobs):.2f}, {'ended' if ended else 'cut off'}")
    return texts


if __name__ == "__main__":
    sys.exit(main())
