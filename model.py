"""A decoder-only transformer (Llama, Mistral, Qwen2, Qwen3) with a KV cache, adapters, and its checkpoints in and out.

Read it top to bottom: configuration, rotary positions, cache, attention, MLP, the stack, completions, the files.
Parameters carry their Hugging Face names, so a checkpoint loads without a mapping table, and what
`save_pretrained` writes opens in transformers.

Three things differ from the usual implementations:

* `forward` returns hidden states, not logits. A training step needs the log-probs of the target tokens only,
  and `kernels.token_logprobs` gets those without holding a large [N, V] matrix.
* A row's token at position p lives in cache slot p. One rule, `slot <= position`, is then the whole mask of
  decoding: ragged prompts are padded on the right, and the slot of a padding token is overwritten by the first
  real token that needs it before any token may attend to it.
* `forward` takes no attention mask. What a token attends to follows from the cache: nothing but the tokens before
  it (no cache), a row's own past (`KVCache`), or a prompt that several completions share (`SharedPrompts`).

Shape letters: B sequences, T time, S cache slots, D hidden, H query heads, K key-value heads, L layers, V vocabulary,
N completion tokens.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.files import check_link, check_number, one_line, read_json, short_repr

ARCHITECTURES = {kind: f"{kind.capitalize()}ForCausalLM" for kind in ("llama", "mistral", "qwen2", "qwen3")}

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # may have an adapter

# Keys of a Hugging Face config.json that change the computation, with the one value implemented here.
FIXED_KEYS = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
FIXED_KEYS |= dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), False)

# The smallest and the largest number that a config.json may hold: far beyond published models (Llama 3.1 405B: hidden
# 16384, 126 layers; contexts of ten million tokens). Where the limits are whole numbers, the value must be one.
LIMITS = {
    "vocab_size": (1, 10**7),
    "hidden_size": (1, 10**6),
    "intermediate_size": (1, 10**7),
    "num_hidden_layers": (1, 400),
    "num_attention_heads": (1, 10**4),
    "num_key_value_heads": (1, 10**4),
    "head_dim": (1, 10**4),
    "max_position_embeddings": (1, 10**9),
    "rms_norm_eps": (1e-12, 1.0),
    "rope_theta": (2.0, 1e12),
    "initializer_range": (0.0, 10.0),
    # of rope_scaling
    "factor": (1e-3, 1e6),
    "original_max_position_embeddings": (1, 10**9),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "attention_factor": (1e-3, 1e3),
}


MAX_RANK = 4096  # of an adapter

# ----------------------------------------------------------------------------- configuration


@dataclass
class ModelConfig:
    """The part of a Hugging Face config.json that decides the computation. Units: tokens, features, heads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    model_type: str = "qwen3"  # qwen2: bias on q, k and v; qwen3: RMSNorm on q and k; llama, mistral: neither
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.model_type not in [*ARCHITECTURES]:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"config: model_type {short_repr(self.model_type)} is not one of {known}")
        for field in fields(self):
            if field.name in LIMITS:
                check_number(f"config: {field.name}", getattr(self, field.name), *LIMITS[field.name])
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"config: tie_word_embeddings {short_repr(self.tie_word_embeddings)} is not true or false")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            listed = ids if isinstance(ids, list) and name == "eos_token_id" else [] if ids is None else [ids]
            if any(type(i) is not int or not -1 <= i <= LIMITS["vocab_size"][1] for i in listed):
                raise ValueError(f"config: {name} {short_repr(ids)} is not a token id")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"config: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim {self.head_dim} is odd; rotary positions need pairs")
        rope_frequencies(self)  # an unknown kind of scaling is an error now, not at the first step

    @classmethod
    def small(cls, vocab_size: int, hidden_size: int, layers: int, heads: int, context: int, end: int) -> Self:
        """A Qwen3 to train from scratch. The context is a limit, not a table: rotary positions take no memory."""
        key_values, head_dim, context = heads, hidden_size // heads, max(context, 4096)
        sizes = (vocab_size, hidden_size, 3 * hidden_size, layers, heads, key_values, head_dim, context)
        return cls(*sizes, tie_word_embeddings=True, eos_token_id=end)

    @classmethod
    def from_dict(cls, config_json: dict) -> Self:
        """Read the keys of a Hugging Face config.json (transformers 4 or 5).

        Raises ValueError naming the key that is missing or that asks for something not implemented here.
        """
        raw = dict(config_json)
        for key, only in FIXED_KEYS.items():
            if raw.get(key, only) not in (only, None):
                raise ValueError(f"config: {key}={short_repr(raw[key])} is not supported, only {only!r}")
        layers = raw.get("layer_types")
        if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
            raise ValueError(f"config: layer_types={short_repr(layers)} is not supported, only all full_attention")
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(raw.get(key), dict | None):
                raise ValueError(f"config: {key} {short_repr(raw[key])} is not an object")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling")  # transformers 5 / transformers 4
        if rope is not None:
            rope = dict(rope)
            raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta") or cls.rope_theta)
            if rope.pop("partial_rotary_factor", 1.0) not in (1.0, None):
                raise ValueError("config: partial_rotary_factor in rope_parameters is not supported, only 1.0")
            kind = rope.setdefault("rope_type", rope.pop("type", "default"))
            raw["rope_scaling"] = None if kind == "default" else rope
        try:
            if raw.get("head_dim") is None:
                for name in ("hidden_size", "num_attention_heads"):
                    check_number(f"config: {name}", raw[name], *LIMITS[name])
                raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
            if raw.get("num_key_value_heads") is None:
                raw["num_key_value_heads"] = raw["num_attention_heads"]
            raw["model_type"] = raw["model_type"]  # no default: a config that does not say is not guessed
            config = cls(**{f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None})
        except KeyError as missing:
            raise ValueError(f"config: the key {missing} is missing") from None
        except TypeError as error:
            raise ValueError(f"config: {str(error).replace('ModelConfig.__init__() ', '')}") from None
        window, context = raw.get("sliding_window"), config.max_position_embeddings
        if config.model_type == "mistral" and window is not None and (type(window) is not int or window < context):
            raise ValueError(f"config: sliding_window={short_repr(window)} is not supported, only null")
        return config

    def to_dict(self) -> dict:
        """The config.json that transformers reads."""
        return asdict(self) | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "attention_bias": False,
            "sliding_window": None,  # if absent, transformers assumes 4096 for a Mistral
        }


# ----------------------------------------------------------------------------- rotary positions


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular frequencies [head_dim/2] in radians per token, fp32, and the factor on cos and sin.

    RoPE (arXiv 2104.09864), and three ways to stretch it past the trained context: `linear` divides every
    frequency; `llama3` divides the slow ones only; `yarn` (arXiv 2309.00071) blends by wavelength and
    sharpens the attention. Raises ValueError on any other rope_type.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"config: rope_type {short_repr(kind)} is not one of default, linear, llama3, yarn")
    for name in ("factor", *("low_freq_factor", "high_freq_factor") * (kind == "llama3")):
        if scaling.get(name) is None:
            raise ValueError(f"config: rope_scaling of type {kind} needs a {name}")
    for name, value in scaling.items():
        if name in LIMITS and value is not None:
            check_number(f"config: {name}", value, *LIMITS[name])
    factor = scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings  # tokens

    if kind == "linear":
        return frequencies / factor, 1.0

    if kind == "llama3":
        # Turns per trained context: more than `high` is kept, fewer than `low` is divided, between is blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if low >= high:
            raise ValueError(f"config: low_freq_factor {low} is not below high_freq_factor {high}")
        turns = trained * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / factor, 1.0

    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise ValueError("config: yarn with mscale is not supported")

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that makes so many turns over the trained context."""
        return config.head_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = pair_that_turns(scaling.get("beta_fast") or 32)
    last = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    divide = ((pairs / 2 - first) / max(last - first, 1e-3)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return (1 - divide) * frequencies + divide * frequencies / factor, attention_factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim/2]) of x [B, heads, T, head_dim] by their angles [B, 1, T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ----------------------------------------------------------------------------- cache


class KVCache:
    """Preallocated keys and values of every layer, [L, B, K, S, head_dim]; the token at position p is in slot p."""

    def __init__(self, config: ModelConfig, batch: int, slots: int, *, dtype: torch.dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        # Zeros, not empty: a slot that no token may attend to has weight 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]  # [B, 1]
        self.bytes = self.keys.nbytes + self.values.nbytes

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [B, K, T, head_dim] into the slots `positions` [B, T]."""
        self.keys[layer][self.rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][self.rows, :, positions] = values.transpose(1, 2)

    def update(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write, and return all keys and values, both [B, K, S, head_dim]."""
        self.write(layer, positions, keys, values)
        return self.keys[layer], self.values[layer]

    def attention_mask(self, positions: Tensor) -> Tensor:
        """Which slots the tokens at positions [B, T] attend to: bool [B, 1, T, S]."""
        return torch.arange(self.keys.shape[3], device=positions.device) <= positions[:, None, :, None]

    def view(self, batch: int, slots: int) -> Self:
        """The first rows and slots, sharing memory: a step pays for the active rows and the slots in use."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, :batch, :, :slots], self.values[:, :batch, :, :slots]
        view.rows = self.rows[:batch]
        return view

    def copy_rows(self, targets: Tensor, source: Self, rows: Tensor) -> None:
        """Overwrite the rows `targets` [n] by the rows `rows` [n] of another cache or a view, in all of its slots."""
        slots = source.keys.shape[3]
        self.keys[:, targets, :, :slots] = source.keys[:, rows]
        self.values[:, targets, :, :slots] = source.values[:, rows]


class SharedPrompts:
    """Keys and values of Q prompts that B completions attend to: a cache that gradients flow back through.

    A group's completions share a prompt, so a training step may read it once, as the sampler does: first
    `model(prompts, cache=shared)`, then `model(completions, positions, cache=shared)`. Nothing changes in place.
    """

    def __init__(self, lengths: Tensor, prompt_index: Tensor):
        """lengths [Q] of the prompts, padded on the right; prompt_index [B], the prompt of each completion; int64."""
        self.lengths, self.prompt_index = lengths, prompt_index
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, [Q, K, T_prompt, head_dim]

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the prompts' keys and values."""
        self.layers[layer] = keys, values

    def update(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values before those of the completions, both [B, K, T_prompt + T, head_dim]."""
        (prompt_keys, prompt_values), index = self.layers[layer], self.prompt_index
        return torch.cat((prompt_keys[index], keys), 2), torch.cat((prompt_values[index], values), 2)

    def attention_mask(self, positions: Tensor) -> Tensor:
        """The whole prompt and the completion's tokens so far: bool [B, 1, T, T_prompt + T]."""
        (batch, time), device = positions.shape, positions.device
        in_prompt = torch.arange(self.layers[0][0].shape[2], device=device) < self.lengths[self.prompt_index, None]
        so_far = torch.ones(time, time, dtype=torch.bool, device=device).tril()
        return torch.cat((in_prompt[:, None].expand(batch, time, -1), so_far.expand(batch, time, time)), 2)[:, None]


# ----------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    """x W^T + bias, computed as (W x^T)^T where that is faster: for the few rows of a decoding step on a CPU.

    For large W and at most 128 rows MKL computes W x^T a quarter faster than x W^T. The result is then a view.
    An adapter (LoRA, arXiv 2106.09685) adds scale (x A^T) B^T, where A [r, in] and B [out, r] are all that is trained.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A, self.lora_B, self.scale = None, None, 0.0

    def add_adapter(self, rank: int, scale: float) -> None:
        """A is random and B zero, as in `peft`, so that nothing changes yet. Both are fp32."""
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))
        self.scale = scale
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale B A, in the type of A and B."""
        return torch.addmm(self.weight.to(self.lora_B.dtype), self.lora_B, self.lora_A, alpha=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, rows = self.weight, self.bias, x.numel() // x.shape[-1]
        if not (weight.requires_grad or torch.is_autocast_enabled(x.device.type)):  # a frozen one may have fewer bits
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if weight.numel() < 2**18 or torch.is_grad_enabled() or x.device.type != "cpu" or rows > 128:
            out = F.linear(x, weight, bias)
        else:
            columns = x.reshape(rows, -1).T  # [in, rows]
            out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
            out = out.T.view(*x.shape[:-1], -1)
        return out if self.lora_A is None else out + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key-value heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        bias, queries = config.model_type == "qwen2", config.num_attention_heads * config.head_dim
        key_values = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, key_values, bias=bias)
        self.v_proj = Linear(config.hidden_size, key_values, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)
        normed = config.model_type == "qwen3"
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.grouped = config.num_key_value_heads != config.num_attention_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor | None, cache):
        """x [B, T, D] -> [B, T, D], and the tokens' own keys and values, [B, K, T, head_dim].

        Without a mask these are a sequence's first tokens: attention is causal, and no cache is read.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # [B, H, T, head_dim]
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # [B, K, T, head_dim]
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [B, K, T, head_dim]
        q, k = apply_rotary(q, cos, sin).to(v.dtype), apply_rotary(k, cos, sin).to(v.dtype)
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:
            keys, values = cache.update(self.layer, positions, k, v)  # [B, K, S, head_dim]
            # The query heads that share keys become the rows of one attention, so that keys are not copied for each.
            rows = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim).contiguous()  # [B, K, H / K * T, head_dim]
            out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(q.shape)
        return self.o_proj(out.transpose(1, 2).flatten(2)), k, v


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_inputs) -> tuple[Tensor, Tensor, Tensor]:
        out, keys, values = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


# ----------------------------------------------------------------------------- the stack


class Transformer(nn.Module):
    """The whole model. Weights are drawn from N(0, initializer_range); biases start at 0, norms at 1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer: `model.bfloat16()` must not round the angles of long contexts.
        self.frequencies, self.rope_factor = rope_frequencies(config)
        self.stored_dtype = torch.float32  # of the files that the weights came from
        self.gradient_checkpointing = False  # recompute each layer in backward: less memory, a third more time
        self.adapter: dict | None = None  # its part of an adapter_config.json, see `add_adapters`
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]: the embedding itself where the two are tied; frozen, as wide as its product."""
        weight = self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight
        return widened(weight) if self.adapter and not torch.is_autocast_enabled(weight.device.type) else weight

    @property
    def device(self) -> torch.device:
        return self.model["norm"].weight.device

    def logits(self, hidden: Tensor) -> Tensor:
        if hidden.is_cuda and self.head.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            # In fp32, as the product sums them; F.linear rounds to bf16. PyTorch has no backward of this.
            out = torch.mm(hidden.flatten(0, -2), self.head.t(), out_dtype=torch.float32)
            return out.view(*hidden.shape[:-1], -1)
        return F.linear(hidden, self.head)  # [..., V]

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, cache: KVCache | SharedPrompts | None = None
    ) -> Tensor:
        """Final hidden states [B, T, D] of input_ids [B, T], int64.

        Without positions [B, T] they are 0..T-1, and attention is causal over these tokens, whose keys and values a
        cache keeps. With positions and a cache, the tokens continue what is in the cache: each attends to that and to
        those of these tokens that stand before it.
        """
        mask, x = None, self.model["embed_tokens"](input_ids)  # [B, T, D]
        x = widened(x) if self.adapter else x
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)  # [B, T]
        elif cache is not None:
            mask = cache.attention_mask(positions)  # bool [B, 1, T, S]
            if input_ids.shape[1] > 1 or mask.is_cuda:
                mask = self._attention_bias(mask, x.dtype)  # [B, 1, H / K * T, S]
        cos, sin = self._angles(positions)  # [B, 1, T, head_dim]
        for index, layer in enumerate(self.model["layers"]):
            inputs = (x, cos, sin, positions, mask, None if mask is None else cache)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Nothing in a layer is random, so no random state needs to be kept.
                x, keys, values = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, keys, values = layer(*inputs)
            if cache is not None and mask is None:
                # Not in the layer: checkpointing keeps what a layer was given for as long as the keys' graph lives, and
                # a cache keeps the keys. Of that circle gc sees nothing, so only a finished backward would free it.
                cache.write(index, positions, keys, values)
        return self.model["norm"](x)  # [B, T, D]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles at positions [B, T], both [B, 1, T, head_dim].

        In fp32 also for a bf16 model, as under autocast: a sampler's copy turns by the angles that it is scored with.
        """
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, :, None].float() * self.frequencies  # [B, 1, T, head_dim/2], fp32
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.rope_factor, angles.sin() * self.rope_factor

    def _attention_bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask [B, 1, T, S] as 0 or -inf, with a row for each of the H / K query heads that share keys.

        Made once here: else attention makes it in every layer, and keeps each for backward. The memory-efficient one of
        CUDA would also copy a bias in every layer whose rows do not begin at a multiple of 8 elements.
        """
        device, slots = mask.device.type, mask.shape[3]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        bias = torch.zeros(*mask.shape[:3], -(-slots // 8) * 8, dtype=dtype, device=mask.device)
        bias[..., :slots].masked_fill_(~mask, -torch.inf)
        return bias.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)[..., :slots]

    # ------------------------------------------------------------------------- adapters

    def add_adapters(self, rank: int, alpha: float, targets: str) -> None:
        """Freeze the weights, and give the projections `targets`, with blanks between, an adapter in each layer."""
        self.requires_grad_(False)
        self.adapter = {"r": rank, "lora_alpha": alpha, "target_modules": targets.split()}
        for name, layer in self.named_modules():
            if name.rpartition(".")[2] in targets.split():
                layer.add_adapter(rank, alpha / rank)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What training changes, by name: the adapters' A and B, or without adapters every parameter."""
        return ((name, p) for name, p in self.named_parameters() if self.adapter is None or ".lora_" in name)

    def merged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the same model without adapters, by name and one at a time, in its order of parameters."""
        for name, weight in self.named_parameters():
            layer = self.get_submodule(name.rpartition(".")[0])
            if ".lora_" not in name:
                adapted = name.endswith("_proj.weight") and layer.lora_A is not None
                yield name, layer.merged_weight() if adapted else weight

    def save_adapter(self, path: str | Path, base: str = "", weights: dict[str, Tensor] | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as `peft` reads them; base names its model.
        `weights` by name take the place of this model's, where it holds but a part of each."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none"}
        content = json.dumps(about | {"lora_dropout": 0.0, "inference_mode": True} | self.adapter, indent=2)
        (path / "adapter_config.json").write_text(content + "\n", encoding="utf-8")
        named = weights.items() if weights else self.trained_parameters()
        tensors = {f"base_model.model.{name}.weight": p.detach().contiguous() for name, p in named}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})

    @torch.no_grad()
    def load_adapter(self, path: str | Path) -> None:
        """Take A and B from a directory of `peft`. Raises ValueError naming the tensor that does not fit this model."""
        tensors, own, file = read_adapter(path)[1], dict(self.trained_parameters()), Path(path) / ADAPTER_FILE
        for name in sorted(tensors.keys() ^ own.keys()):
            raise ValueError(f"{file}: {'missing' if name in own else 'surplus'} tensor for {name[:200]}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                found, wanted = list(tensor.shape), list(own[name].shape)
                raise ValueError(f"{file}: tensor for {name} has shape {found}, but the model asks for {wanted}")
            own[name].copy_(tensor)

    # ------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype | None = torch.float32, device="cpu") -> Self:
        """Load a directory with config.json and safetensors, one file or sharded, of floats of 16 to 64 bits.

        dtype: of all weights; None: as in the files. Raises ValueError naming the file and the tensor that is missing,
        surplus or of the wrong shape.
        """
        config = read_config(path)
        with torch.device("meta"):  # shapes only: the weights come from the files
            model = cls(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = {}
        for name, file, tensor in read_tensors(Path(path)):
            if name.endswith("rotary_emb.inv_freq"):  # old exports store what rope_frequencies computes
                continue
            if name == "lm_head.weight" and config.tie_word_embeddings:  # some tied exports store it twice
                name = "model.embed_tokens.weight"
            if name not in expected:
                raise ValueError(f"{file}: surplus tensor {name[:200]!r}, which no {config.model_type} model has")
            if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{file}: tensor {name} is {tensor.dtype}; quantized weights are not supported")
            if tensor.shape != expected[name]:
                found, wanted = list(tensor.shape), list(expected[name])
                raise ValueError(f"{file}: tensor {name} has shape {found}, but config.json asks for {wanted}")
            if name == "model.embed_tokens.weight":  # some exports keep their norms in another type
                stored = tensor.dtype
            tensor = tensor.to(device, dtype or tensor.dtype)
            if name in state and not torch.equal(state[name], tensor):  # a tied model's two, in either order
                raise ValueError(f"{file}: a second {name} that differs (lm_head.weight of a tied model counts as one)")
            state[name] = tensor
        missing = [name for name in expected if name not in state]
        if missing:
            raise ValueError(f"{path}: {len(missing)} missing tensor(s), the first is {missing[0]}")
        model.load_state_dict(state, assign=True)
        model.stored_dtype = stored
        return model.requires_grad_()

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None, weights=None) -> None:
        """Write config.json and model.safetensors, adapters merged, in the weights' own type or in another one.
        `weights` by name take the place of this model's, where it holds but a part of each."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.head.dtype
        config = self.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        named = weights.items() if weights else self.merged_parameters()
        tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in named}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def widened(x: Tensor) -> Tensor:
    """In fp32, if it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------- completions, in training


def completion_hidden(model: Transformer, micro) -> Tensor:
    """The hidden states that predict the completion tokens, [N, D]; no logits are made of prompts and padding.

    `micro` is a data.batch.MicroBatch. A prompt that several of its sequences share is read once.
    """
    if len(micro.prompts) == len(micro.prompt_index):
        return model(micro.prompts)[micro.sequence_index, micro.position]
    shared = SharedPrompts(micro.prompt_lengths, micro.prompt_index)
    prompt_hidden = model(micro.prompts, cache=shared)  # [q, T_prompt, D]
    start = micro.prompt_lengths[micro.prompt_index]  # [b] the position of each first completion token
    hidden = prompt_hidden[micro.prompt_index, start - 1][:, None]  # [b, 1, D] predicts that token
    if micro.completions.shape[1]:
        positions = start[:, None] + torch.arange(micro.completions.shape[1], device=start.device)  # [b, T - 1]
        hidden = torch.cat((hidden, model(micro.completions, positions, shared)), dim=1)  # [b, T, D]
    return hidden[micro.sequence_index, micro.position]


# ----------------------------------------------------------------------------- the files of a checkpoint


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """The directory of a checkpoint: `name` itself, or the snapshot of a model on the Hugging Face hub.

    The hub's files (without the weights, if `weights` is False) are downloaded once and then found in its cache, with
    or without a network. Raises ValueError where there is neither such a directory nor such a model to be found.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"--model {name}: no such directory, and not the id of a model on the hub (OWNER/NAME)")
    try:
        patterns = ["*.json", "*.jinja", "tokenizer.model", *["*.safetensors"] * weights]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # what a network may raise depends on the version of two libraries
        reason = f"no such directory, and the hub's model is unavailable ({one_line(error)})"
        raise ValueError(f"--model {name}: {reason}") from None


def read_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint directory. Raises ValueError naming the file that is absent or wrong."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a checkpoint directory holds config.json and safetensors")
    content = read_json(file)
    try:
        return ModelConfig.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_tensors(path: Path):
    """Yield (name, file, tensor) of a checkpoint directory: model.safetensors, or the shards of its index.

    Raises ValueError naming the file that is absent, leads out of the directory or cannot be read.
    """
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: weight_map {short_repr(weight_map)} is not an object of file names")
        names = {name if isinstance(name, str) else short_repr(name) for name in weight_map.values()}
    elif pickles := [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(kind))]:
        raise ValueError(
            f"{path}: only pickles are there ({short_repr(pickles[0])}), and reading one can run code; if you trust "
            f"it, convert it: transformers' AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    else:
        raise ValueError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")
    for name in sorted(names):
        file = path / name
        if not re.fullmatch(r"[\w-][\w.-]*", name) or not os.path.isfile(file):  # Path.is_file may raise
            raise ValueError(f"{index}: names the shard {name[:100]!r}, which is not a file of this directory")
        yield from read_safetensors(file)


def read_safetensors(file: Path):
    """Yield (name, file, tensor). Raises ValueError naming the file where it leads elsewhere or cannot be read."""
    check_link(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                yield key, file, tensors.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({one_line(error)})") from None


# ----------------------------------------------------------------------------- the files of an adapter

ADAPTER_FILE = "adapter_model.safetensors"
# Keys of an adapter_config.json that may have a value. What another one asks for is beyond plain LoRA.
IDLE_KEYS = "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha"
IDLE_KEYS += " target_modules lora_dropout init_lora_weights megatron_core qalora_group_size layers_pattern"


def read_adapter(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The flags that describe a directory of `peft`, and A and B by the names that they have here.

    Which projections it adapts is told by the tensors: target_modules may be a pattern, too. Raises ValueError naming
    the file, and the key or tensor that is missing, no part of a plain LoRA, or of another rank.
    """
    config_file, file = Path(path) / "adapter_config.json", Path(path) / ADAPTER_FILE
    for needed in (config_file, file):
        if not needed.is_file():
            raise ValueError(f"--adapter {path}: no directory of peft, as {needed.name} is not there")
    raw = read_json(config_file)
    refused = [key for key in raw if key not in IDLE_KEYS.split() and raw[key] not in (None, False, "none", [], {})]
    refused += ["peft_type"] * (raw.get("peft_type") != "LORA")
    if raw.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):  # others change the base, too
        refused.append("init_lora_weights")
    for key in refused:
        raise ValueError(f"{config_file}: {key[:100]} {short_repr(raw.get(key))} is not supported, only plain LoRA")
    check_number(f"{config_file}: r", raw.get("r"), 1, MAX_RANK)
    check_number(f"{config_file}: lora_alpha", raw.get("lora_alpha"), 1e-6, 1e6)
    tensors, targets = {}, set()
    for name, _, tensor in read_safetensors(file):
        found = re.fullmatch(rf"base_model\.model\.(.*\.({'|'.join(PROJECTIONS)})\.lora_([AB]))\.weight", name)
        if not found or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{file}: surplus tensor {name[:200]!r}, which is no A or B of a projection")
        if tensor.shape[0 if found[3] == "A" else 1] != raw["r"]:
            raise ValueError(f"{file}: tensor {name[:200]} has shape {list(tensor.shape)}, but r is {raw['r']}")
        tensors[found[1]] = tensor
        targets.add(found[2])
    if not tensors:
        raise ValueError(f"{file}: there are no tensors in it")
    targets = " ".join(projection for projection in PROJECTIONS if projection in targets)
    return {"lora_rank": raw["r"], "lora_alpha": float(raw["lora_alpha"]), "lora_targets": targets}, tensors
