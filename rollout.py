"""Sample completions from a model: many prompts, a group of completions each, with a KV cache.

    python rollout.py --model runs/x/model --prompt "..."      # streams an answer; without --prompt, a conversation

Each prompt is read once (prefill), its cache is copied to the rows of its group, and then all rows advance by one
token a step. Every few steps the rows that have drawn a stop token leave: the last of the active rows move into their
places, so that a step always works on the first rows of the cache and pays for nothing else.

A step is one function, `Sampler._step`, that changes tensors in place and never waits for the device. So CUDA can
record it once for each size and replay it as a graph: the same function without the cost of launching its kernels.

Guarantees: the stop token stays in the completion (else stopping would never be trained); a log-prob is that of the
token drawn, under the distribution it was drawn from; equal inputs and an equal `torch.Generator` give equal
completions; on a CPU, also whichever rows leave when, and however few rows fit into memory at once.

Shape letters: Q distinct prompts, B rows or completions, T time, D hidden, V vocabulary.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.batch import pack_by_tokens
from data.files import check_number, one_line, short_repr
from data.tokenizer import Codec
from model import KVCache, Transformer, resolve_checkpoint

STEPS_BETWEEN_CHECKS = 4  # asking which rows have ended waits for the device, so not at every token
PREFILL_TOKENS = 8192  # tokens, padding included, that are read at once; prompts of similar lengths go together

# On a CPU a vocabulary of 152k makes tensors that do not fit its caches, and whose memory must be mapped anew at every
# token. Pieces of these sizes avoid both: that took a third off such a step.
HEAD_PIECE = 512  # rows of the output matrix
DRAW_PIECE = 2**20  # log-probs

MIN_TEMPERATURE = 1e-3  # logits divided by less may overflow fp32


@dataclass(frozen=True)
class SamplingParams:
    max_new_tokens: int  # tokens, the stop token included
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # of tokens, which end a completion as a stop token does

    def __post_init__(self):
        check_number("max_new_tokens", self.max_new_tokens, 1, math.inf)
        check_number("top_k", self.top_k, 0, math.inf)
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or lie in [{MIN_TEMPERATURE}, inf)")
        if not all(self.stop_sequences):
            raise ValueError("stop_sequences: an empty one would end every completion")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must lie in (0, 1]")


@dataclass(frozen=True)
class Rollout:
    """len(prompts) * group_size completions, prompt-major: row q * group_size + g."""

    completions: list[list[int]]  # the stop token is kept
    logprobs: list[list[float]]  # nats
    finished: list[bool]  # False: cut off at max_new_tokens
    chunks: int = 1  # of rows, one after the other: more than 1 where the cache of all rows does not fit the memory


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


def sample_tokens(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row from logits [B, V], and its log-prob: [B] int64, [B] fp32.

    uniform [B] are random numbers from (0, 1]: the token is the first at which the cumulative probability reaches that
    number. This takes one random number a row, where `torch.multinomial` takes V. Cumulative sums in fp32 resolve
    probabilities down to 6e-8. A token that is ruled out adds nothing to the sum, so it is never the first.
    """
    at_once = max(1, DRAW_PIECE // logits.shape[1])
    if logits.device.type == "cpu" and len(logits) > at_once:
        pieces = zip(logits.split(at_once), uniform.split(at_once), strict=True)
        parts = [sample_tokens(*piece, params) for piece in pieces]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    logprobs = token_distribution(logits.float(), params)  # [B, V]
    if params.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum_(-1)  # [B, V]
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:]).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[1] - 1)  # of NaN logits searchsorted makes V; the log-prob is NaN too
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def prefill(model: Transformer, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
    """Read Q prompts, padded on the right; return the logits after each one's last token, [Q, V], and the cache."""
    device = model.head.device
    input_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)  # [Q, T]
    cache = KVCache(model.config, *input_ids.shape, dtype=model.head.dtype, device=device)
    hidden = model(input_ids, cache=cache)  # [Q, T, D]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)  # [Q]
    return model.logits(hidden[torch.arange(len(prompts), device=device), last]), cache


def length_buckets(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, sorted by length and cut into pieces of at most `max_tokens`, padding included."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return pack_by_tokens(order, lambda piece: len(piece) * lengths[piece[-1]], max_tokens)  # the last is the longest


class Sampler:
    """Writes `total` completions at once, with tensors that are allocated once and changed in place.

    All of them are indexed by completion, except for the cache, whose row r belongs to completion
    `completion_index[r]`. The first rows are active; a row behind them belongs to a completion that has ended.
    """

    def __init__(self, model: Transformer, params: SamplingParams, total: int, slots: int):
        self.model, self.params, self.slots = model, params, slots
        self.most_rows = math.inf  # of a chunk: fewer after an out-of-memory error
        device = model.head.device
        self.cache = KVCache(model.config, total, slots, dtype=model.head.dtype, device=device)
        self.completion_index = torch.arange(total, device=device)  # of each cache row
        self.prompt_lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)  # tokens drawn so far
        self.active = torch.ones(total, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(total, STEPS_BETWEEN_CHECKS, device=device)  # random numbers of the next steps
        # A column to spare takes the tokens that a row draws after its end.
        self.tokens = torch.zeros(total, params.max_new_tokens + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(total, params.max_new_tokens + 1, device=device)
        self.logits = model.head.new_empty(total, len(model.head)) if device.type == "cpu" else None
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
        self.stop_sequences = [torch.tensor(stop, device=device) for stop in params.stop_sequences]
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] | None = {} if graphs_wanted(device) else None
        self.graph_memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # one for all graphs

    def serves(self, model: Transformer, params: SamplingParams, rows: int, slots: int, limit: float) -> bool:
        """Whether a chunk of this size can be written here, in a cache of at most `limit` bytes."""
        same = self.model is model and self.params == params
        return same and rows <= len(self.active) and slots <= self.slots and self.cache.bytes <= limit

    @torch.no_grad()
    def run(self, prompts: list[list[int]], uniform, on_token=None) -> tuple[list[list[int]], list[list[float]]]:
        """A completion of each of at most `total` prompts (equal ones are read once), and its log-probs.

        uniform(k) gives the random numbers of steps k * STEPS_BETWEEN_CHECKS and after, [len(prompts),
        STEPS_BETWEEN_CHECKS]. on_token, if there is one, is called after each step with the completions so far.
        """
        count, longest = len(prompts), max(map(len, prompts))
        self.completion_index.copy_(torch.arange(len(self.active)))
        self.prompt_lengths.fill_(1)  # rows beyond `count` may advance too, and must stay inside the cache
        self.prompt_lengths[:count] = torch.tensor([len(prompt) for prompt in prompts], device=self.active.device)
        self.lengths.zero_()
        self.active.copy_(torch.arange(len(self.active)) < count)
        self.uniform[:count] = uniform(0)
        self._read_prompts(prompts)
        rows = count
        for step in range(1, self.params.max_new_tokens):
            if on_token:
                on_token(self._written(self.tokens, count))
            if step % STEPS_BETWEEN_CHECKS == 0:
                self.uniform[:count] = uniform(step // STEPS_BETWEEN_CHECKS)
                rows = self._close_gaps(rows, longest + step)
                if rows == 0:
                    break
            self._advance(rows, longest + step)
        return self._written(self.tokens, count), self._written(self.logprobs, count)

    def _written(self, matrix: Tensor, count: int) -> list[list]:
        """The columns in use of the first `count` rows of tokens or log-probs."""
        lengths = self.lengths[:count].tolist()
        return [row[:length] for row, length in zip(matrix[:count].tolist(), lengths, strict=True)]

    def _read_prompts(self, prompts: list[list[int]]) -> None:
        """Read each distinct prompt once, copy its cache to its rows, and draw their first tokens."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        for piece in length_buckets(list(map(len, distinct)), PREFILL_TOKENS):
            place = {distinct[q]: i for i, q in enumerate(piece)}
            logits, cache = prefill(self.model, list(place))
            rows = [row for row, prompt in enumerate(prompts) if tuple(prompt) in place]
            source = torch.tensor([place[tuple(prompts[row])] for row in rows], device=logits.device)
            rows = torch.tensor(rows, device=logits.device)
            self.cache.copy_rows(rows, cache, source)
            self._append_tokens(rows, logits[source])

    def _close_gaps(self, rows: int, slots: int) -> int:
        """Move active rows into the places of ended ones; the number of active rows. Waits for the device."""
        active = self.active[self.completion_index[:rows]].tolist()
        count = sum(active)
        gaps = [row for row in range(count) if not active[row]]
        movers = [row for row in range(count, rows) if active[row]]
        if gaps:
            gaps, movers = (torch.tensor(x, device=self.active.device) for x in (gaps, movers))
            self.cache.copy_rows(gaps, self.cache.view(rows, slots), movers)
            index = self.completion_index
            index[gaps], index[movers] = index[movers], index[gaps]
        return count

    def _advance(self, rows: int, slots: int) -> None:
        """One step of the first `rows`, which use the first `slots`; on CUDA as a graph."""
        if self.graphs is None:
            return self._step(rows, slots)
        size = self.bucket(rows, slots)
        if size in self.graphs:
            return self.graphs[size].replay()
        self._step(*size)  # the first step of a size is not recorded: it initialises libraries
        try:
            graph = torch.cuda.CUDAGraph()
            # A recording that fails leaves its own stream the current one: the outer `with` puts ours back.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.graph_memory):
                self._step(*size)  # recorded, not run
            self.graphs[size] = graph
        except torch.OutOfMemoryError:
            raise  # for fewer rows
        except RuntimeError as error:  # its context is the cause, where the end of a broken recording failed as well
            print(f"CUDA graphs are off, which is slower: {one_line(error.__context__ or error)}", file=sys.stderr)
            self.graphs = None
            os.environ["SASR_CUDA_GRAPHS"] = "0"  # for the samplers to come: one line is enough

    def bucket(self, rows: int, slots: int) -> tuple[int, int]:
        """The size to record a graph for: at most a quarter more rows, and whole blocks of slots."""
        unit = max(8, 2 ** (rows.bit_length() - 3))
        return min(-(-rows // unit) * unit, len(self.active)), min(-(-slots // 128) * 128, self.slots)

    def _step(self, rows: int, slots: int) -> None:
        """Read the last token of each of the first `rows`, and draw its next."""
        index = self.completion_index[:rows]
        written = self.lengths[index]
        last = self.tokens[index, written - 1]
        positions = self.prompt_lengths[index] + written - 1
        hidden = self.model(last[:, None], positions=positions[:, None], cache=self.cache.view(rows, slots))[:, 0]
        if self.logits is None:
            logits = self.model.logits(hidden)  # [B, V]
        else:  # on a CPU piece by piece, into memory that is used again
            logits = self.logits[:rows]
            for start in range(0, logits.shape[1], HEAD_PIECE):
                piece = slice(start, start + HEAD_PIECE)
                torch.mm(hidden, self.model.head[piece].t(), out=logits[:, piece])
        self._append_tokens(index, logits)

    def _append_tokens(self, index: Tensor, logits: Tensor) -> None:
        """Draw the next token of the completions `index` [B], from logits [B, V]."""
        active, length = self.active[index], self.lengths[index]  # [B]
        token, logprob = sample_tokens(logits, self.uniform[index, length % STEPS_BETWEEN_CHECKS], self.params)
        column = torch.where(active, length, self.params.max_new_tokens)
        self.tokens[index, column] = token
        self.logprobs[index, column] = logprob
        self.lengths[index] = length + active
        stopped = (token[:, None] == self.stops).any(-1)
        for stop in self.stop_sequences:
            places = (length[:, None] + torch.arange(1 - len(stop), 1, device=stop.device)).clamp(min=0)  # of the last
            written = (self.tokens[index[:, None], places] == stop).all(-1)
            stopped = stopped | (written & (length + 1 >= len(stop)))
        self.active[index] = active & ~stopped & (length + 1 < self.params.max_new_tokens)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    group_size: int = 1,
    only: range | None = None,
    generator: torch.Generator | None = None,
    memory_limit: int = 0,
    samplers: dict | None = None,
    on_token: Callable[[list[list[int]]], None] | None = None,
) -> Rollout:
    """Draw `group_size` completions of each prompt (token ids, of any lengths), or `only` of some, as among all.

    The cache takes at most `memory_limit` bytes (0: four fifths of what is free). Rows that do not fit are written in
    further chunks, also after an out-of-memory error. `samplers` keeps buffers, CUDA graphs and the number of rows that
    fitted for the next call: pass the same dict again. `on_token` is called after every token with the completions of
    the chunk so far. Raises ValueError naming a prompt that is empty or too long for the context, or a limit too small.
    """
    check_number("group_size", group_size, 1, math.inf)
    if not prompts:
        return Rollout([], [], [])
    context = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: there is no token to continue from")
        if len(prompt) + params.max_new_tokens > context:
            excess = f"with max_new_tokens={params.max_new_tokens} that exceeds the model's context of {context}"
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; {excess}")
    device = model.head.device
    row_prompts = [prompt for prompt in prompts for _ in range(group_size)]
    total = len(row_prompts)
    first, last = (0, total) if only is None else (only.start * group_size, only.stop * group_size)
    slots = -(-(max(map(len, prompts)) + params.max_new_tokens) // 128) * 128  # few sizes: buffers fit the next call
    samplers = {} if samplers is None else samplers
    held = sum(sampler.cache.bytes for sampler in samplers.values())
    limit = memory_limit or max(held, 0.8 * (free_memory(device) + held))
    most_rows = min((sampler.most_rows for sampler in samplers.values()), default=math.inf)
    row_bytes = KVCache(model.config, 1, slots, dtype=model.head.dtype, device="meta").bytes
    if limit < row_bytes:
        needed = f"the cache of one completion takes {row_bytes / 1e9:.2f} GB ({slots} tokens)"
        raise ValueError(f"{needed} and the limit is {limit / 1e9:.2f} GB: lower max_new_tokens, or raise the limit")
    fit = int(min(limit / row_bytes, most_rows, max(last - first, 1)))
    rows = math.ceil((last - first) / max(math.ceil((last - first) / fit), 1))  # so that chunks are equally large
    seed = torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu").item()

    def uniform(k: int) -> Tensor:
        """Drawn for the rows of all chunks, and cut to this one: what a row gets does not depend on the chunks."""
        source = torch.Generator(device).manual_seed(seed + k)
        drawn = torch.rand(total, STEPS_BETWEEN_CHECKS, generator=source, device=device)  # in [0, 1)
        return 1 - drawn[start:end]

    completions, logprobs, chunks = [], [], 0
    while (start := first + len(completions)) < last:
        end, size = min(start + rows, last), (model, params, rows, slots)
        # Its key: a name for the sampler itself would hold its memory after an error.
        key = next((key for key, sampler in samplers.items() if sampler.serves(*size, limit)), size)
        try:
            if key not in samplers:
                samplers.clear()  # first, so that two caches are never held at once
                samplers[key] = Sampler(*size)
                samplers[key].most_rows = most_rows
            chunk = samplers[key].run(row_prompts[start:end], uniform, on_token)
        except torch.OutOfMemoryError:
            samplers.clear()
            if rows == 1:
                raise
            most_rows = rows = math.ceil(rows / 2)
            continue
        if not math.isfinite(sum(map(sum, chunk[1]))):
            samplers.clear()  # its cache holds NaN, and a slot that is masked counts as 0 * NaN
        completions += chunk[0]
        logprobs += chunk[1]
        chunks += 1
    ends = [(stop,) for stop in params.stop_token_ids] + list(params.stop_sequences)
    finished = [any(tuple(completion[-len(end) :]) == end for end in ends) for completion in completions]
    return Rollout(completions, logprobs, finished, chunks)


def graphs_wanted(device: torch.device) -> bool:
    """CUDA graphs, unless SASR_CUDA_GRAPHS=0 turns them off. Raises ValueError on a value that is not 0 or 1."""
    choice = os.environ.get("SASR_CUDA_GRAPHS", "1")
    if choice not in ("0", "1"):
        raise ValueError(f"SASR_CUDA_GRAPHS {short_repr(choice)}: must be 0 (plain steps) or 1")
    return device.type == "cuda" and choice == "1"


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated; infinite where that is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one. Raises ValueError where the device is unavailable."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("choose cpu or cuda")
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels and graphs go to the current device
        if device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients on Hopper (pytorch #196678), slow new shapes
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not available here ({one_line(error)})") from None
    return device


# ----------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Talk to a model: one answer to --prompt, or a conversation if you give none.",
        epilog="A checkpoint with a chat template gets messages in its format, any other the text itself to continue.",
    )
    parser.add_argument("--model", required=True, help="checkpoint directory, or the id of a model on the hub")
    parser.add_argument("--prompt", help="text to answer (default: standard input; on a terminal, a conversation)")
    parser.add_argument("--prompt-format", default="auto", choices=("auto", "raw", "chat"), help="(default auto)")
    parser.add_argument("--system", default="", help="system message of a chat (default: the template's own)")
    parser.add_argument("--template-args", default="", help="JSON object of further variables of the chat template")
    parser.add_argument("--samples", type=int, default=1, help="answers to draw; one is streamed (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens an answer at most (default 512)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep this much probability (default 1.0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    args = parser.parse_args(argv)
    try:
        check_number("--samples", args.samples, 1, 10**6)
        check_number("--seed", args.seed, 0, 2**63 - 1)
        path, device = resolve_checkpoint(args.model), resolve_device(args.device)
        prompts = {name: getattr(args, name) for name in ("prompt_format", "system", "template_args")}
        codec = Codec.from_pretrained(path, **prompts)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as runs sample
        model = Transformer.from_pretrained(path, dtype=dtype, device=device)
        drawing = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        params = SamplingParams(args.max_new_tokens, **drawing, **codec.stops)
        generator = torch.Generator(device).manual_seed(args.seed)
        if args.prompt is None and sys.stdin.isatty():
            converse(model, codec, params, generator)
        else:
            message = {"role": "user", "content": read_prompt(args.prompt)}
            answer(model, codec, [message], params, generator, args.samples)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output is gone; Python would report that once more at exit
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
    """Turn by turn; starts anew where the context is full. Without a chat template the model gets the last line."""
    print("type a message; Ctrl-D ends", file=sys.stderr)
    messages = []
    while True:
        try:
            line = input("> ").encode(errors="replace").decode()
        except EOFError:
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            (reply,) = answer(model, codec, messages, params, generator, 1)
            messages.append({"role": "assistant", "content": reply})
        except ValueError as error:
            print(f"rollout.py: {error}; the conversation begins again", file=sys.stderr)
            messages = []


def answer(
    model: Transformer, codec: Codec, messages: list[dict], params: SamplingParams, generator, samples: int
) -> list[str]:
    """Print and return answers to a conversation; a single one appears token by token."""
    printed = ""
    kept_back = max(map(len, params.stop_sequences), default=0)  # tokens that may turn out to end the answer

    def stream(completions: list[list[int]]) -> None:
        nonlocal printed
        written = [completion[: max(len(completion) - kept_back, 0)] for completion in completions]
        text = codec.decode(written)[0].rstrip("\ufffd")  # a character's last bytes may still be missing
        if len(text) > len(printed):  # it can be shorter while the last character is incomplete
            print(text[len(printed) :], end="", flush=True)
            printed = text

    prompt, on_token = codec.encode(codec.render(messages)), stream if samples == 1 else None
    rollout = generate(model, [prompt], params, group_size=samples, generator=generator, on_token=on_token)
    texts = codec.decode(rollout.completions)
    drawn = zip(texts, rollout.completions, rollout.logprobs, rollout.finished, strict=True)
    for text, tokens, logprobs, finished in drawn:
        print(text[len(printed) :])
        print(f"--- {len(tokens)} tokens, log-prob {sum(logprobs):.2f}, {'ended' if finished else 'cut off'}")
    return texts


if __name__ == "__main__":
    sys.exit(main())
