"""Pretrained checkpoints, judged by `transformers`: the same files must give the same tokens, prompts and logits.

Nothing is downloaded. Each family's checkpoint is written on the spot: its configuration class with random weights, a
tokenizer.json built like the family's own, and a chat template in the family's style. Where no other library can
judge (what ends a demonstration, what an error says, what a terminal shows), the expected value is written out.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import data.chat
import model as model_file
import rollout
from data.task import Example, Grade, Task
from data.tokenized import TokenizedTask
from data.tokenizer import Codec, encode_apart
from model import Transformer, read_config, resolve_checkpoint
from rollout import SamplingParams, generate

# ----------------------------------------------------------------------------- tokenizers, built like the families' own

CORPUS = [
    "The answer is 42, because 6 times 7 is 42. Let me think about it step by step.",
    "What is 12 + 30? It is 42! Isn't it? You are right: they're equal.",
    "<think> the user asks for a number </think> the number is seven\n\nFirst, second, third.",
    "Ünïcödé wörds, naïve café, 你好世界, привет мир",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def byte_level(split: str, specials: list[str], plain: list[str] = (), *, nfc: bool, bos: str | None) -> Tokenizer:
    """Byte-level BPE with the special tokens behind the vocabulary; `plain` tokens are added, but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        begun = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begun])
    return tokenizer


def sentencepiece(specials: list[str] = (), *, prepend: bool) -> Tokenizer:
    """BPE over characters, bytes for what is unknown, a mark for each space and one in front of the text.

    The mark in front comes from the normalizer (`prepend`, as in Llama 2) or from the pre-tokenizer (as in Mistral).
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(words.to_str())["model"]
    begin = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*begin, *learnt["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", *specials)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


# ----------------------------------------------------------------------------- chat templates in the families' style

CHATML = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou say it in one sentence.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """
{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set found = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- if found.searching and message.role == 'user' %}
        {%- set found.searching = false %}
        {%- set found.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set answer, thought = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > found.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- answer + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA2 = """
{%- set rest = messages %}
{%- set opening = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set rest = messages[1:] %}
    {%- set opening = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' %}
{%- endif %}
{%- for message in rest %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (opening if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y, %H h") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set system_message = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim %}
    {{- content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}
{%- set ns = namespace(turn=0, system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content + '\\n\\n' %}
        {%- continue %}
    {%- endif %}
    {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate:\\nuser/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + ns.system + message.content + ' [/INST]' }}
        {%- set ns.system = '' %}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
    {%- if ns.turn > 40 %}{% break %}{% endif %}
{%- endfor %}
"""
R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(first=true, system='') %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system}}"
    "{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}{%- endif %}"
    "{%- if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
GENERATION = """
{%- set mark = 'outside' %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {% if message.role == 'assistant' %}
        {%- generation %}
            {%- set mark = 'inside' %}
            {{- message.content }}<|im_end|>
        {% endgeneration %}
    {% else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
    {{- mark + loop.index|string }}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
AS_JSON = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message | tojson + message.content | tojson(indent=2) }}<|im_end|>
{% endfor -%}
{{ {'role': 'assistant', 'turn': messages | length, 'é': '<&>'} | tojson(ensure_ascii=true, sort_keys=true) }}
{{- {'a': [1, 2]} | tojson(separators=(',', ':')) }}
"""

# ----------------------------------------------------------------------------- families

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
R1_SPECIALS = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"]
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS = [*CHATML_SPECIALS, *R1_SPECIALS, *LLAMA3_SPECIALS, "<s>", "</s>"]


@dataclass(frozen=True)
class Family:
    """What makes a checkpoint one of this family."""

    model_type: str
    tokenizer: Callable[[], Tokenizer]
    template: str
    eos: str  # of the tokenizer
    ends: tuple[str, ...]  # of generation_config.json
    turn_end: str  # what the template writes behind the assistant's words
    named: dict = field(default_factory=dict)  # of tokenizer_config.json
    config: dict = field(default_factory=dict)
    opening: str = ""


FAMILIES = {
    "qwen2": Family(
        "qwen2",
        lambda: byte_level(QWEN_SPLIT, CHATML_SPECIALS, nfc=True, bos=None),
        CHATML,
        *("<|im_end|>", ("<|endoftext|>", "<|im_end|>"), "<|im_end|>"),
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False, "pad_token": "<|endoftext|>"},
        {"tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    ),
    "qwen3": Family(
        "qwen3",
        lambda: byte_level(QWEN_SPLIT, CHATML_SPECIALS, ["<think>", "</think>"], nfc=True, bos=None),
        QWEN3,
        *("<|im_end|>", ("<|endoftext|>", "<|im_end|>"), "<|im_end|>"),
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False, "pad_token": "<|endoftext|>"},
        {"tie_word_embeddings": True, "rope_theta": 1e6, "head_dim": 16},
    ),
    "llama2": Family(
        "llama",
        lambda: sentencepiece(prepend=True),
        LLAMA2,
        *("</s>", ("</s>",), "</s>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"},
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 4},
    ),
    "llama3": Family(
        "llama",
        lambda: byte_level(LLAMA3_SPLIT, LLAMA3_SPECIALS, nfc=False, bos="<|begin_of_text|>"),
        LLAMA3,
        *("<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"), "<|eot_id|>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"},
        {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5},
    ),
    "mistral": Family(
        "mistral",
        lambda: sentencepiece(["[INST]", "[/INST]"], prepend=False),
        MISTRAL,
        *("</s>", ("</s>",), "</s>"),
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>", "legacy": False},
        {"sliding_window": None, "head_dim": 16},
    ),
    "r1": Family(
        "qwen2",
        lambda: byte_level(QWEN_SPLIT, R1_SPECIALS, ["<think>", "</think>"], nfc=True, bos=R1_SPECIALS[3]),
        R1,
        *(R1_SPECIALS[0], (R1_SPECIALS[0],), R1_SPECIALS[0]),
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": {"__type": "AddedToken", "content": R1_SPECIALS[3], "lstrip": False, "normalized": True},
            "add_bos_token": True,
            "add_eos_token": False,
            "unk_token": None,
            "pad_token": R1_SPECIALS[0],
        },
        {"tie_word_embeddings": False, "rope_theta": 1e4, "use_sliding_window": False, "sliding_window": 64},
        "<think>\n",
    ),
}
BYTE_LEVEL = ["qwen2", "qwen3", "llama3", "r1"]
SENTENCEPIECE = ["llama2", "mistral"]
VOCABULARY = 448  # of the models: larger than any tokenizer here, as published ones are


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, large enough for peaked attention and for steep logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2 if "embed" in name or "head" in name else 0.6, generator=generator)
    return model


def write_tokenizer(path: Path, family: Family, template: str | None = None, **named) -> Tokenizer:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = family.tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": family.eos, "clean_up_tokenization_spaces": False, **family.named}
    write_json(path / "tokenizer_config.json", settings | {"chat_template": template or family.template} | named)
    return tokenizer


def write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def write_checkpoint(path: Path, family: Family, *, dtype=torch.float32, shards: str = "1GB") -> torch.nn.Module:
    """A checkpoint as `transformers` saves it; the model that it holds."""
    tokenizer = write_tokenizer(path, family)
    ends = [tokenizer.token_to_id(token) for token in family.ends]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.token_to_id(family.ends[0]),
        "eos_token_id": ends[0],
        "pad_token_id": None,
    }
    config = family.config.copy()
    config.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": config.pop("rope_theta", 1e4)})
    config = transformers.AutoConfig.for_model(family.model_type, **(shape | config))
    model = randomise(transformers.AutoModelForCausalLM.from_config(config)).to(dtype).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    model.save_pretrained(path, max_shard_size=shards)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder for each family, in shards. Tests read them, and change copies."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, family in FAMILIES.items():
        write_checkpoint(folder / name, family, shards="30KB")
    return {name: folder / name for name in FAMILIES}


@pytest.fixture(scope="module")
def theirs(checkpoints) -> dict[str, transformers.PreTrainedTokenizerBase]:
    return {name: transformers.AutoTokenizer.from_pretrained(path) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def codecs(checkpoints) -> dict[str, dict[str, Codec]]:
    date = "2025-02-28T13:05"  # of `one_moment`
    return {
        name: {kind: Codec.from_pretrained(path, prompt_format=kind, template_date=date) for kind in ("raw", "chat")}
        for name, path in checkpoints.items()
    }


@pytest.fixture
def copied(checkpoints, tmp_path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(checkpoints[name], tmp_path / name)


def change_json(file: Path, **changes) -> None:
    """Set keys; None takes one away."""
    content = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}) | changes
    write_json(file, {key: value for key, value in content.items() if value is not None})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these only lose time to threads that wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_moment(monkeypatch):
    """The clock stands still, so that two renderings have the same date."""

    class Moment(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 2, 28, 13, 5)

    monkeypatch.setattr(data.chat, "datetime", Moment)
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Moment)


# ----------------------------------------------------------------------------- logits and greedy text


@torch.no_grad()
def their_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids).logits


@torch.no_grad()
def our_logits(model: Transformer, input_ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(input_ids))


def random_ids(rows: int = 2, columns: int = 150) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours: Transformer, theirs: torch.nn.Module, input_ids: torch.Tensor | None = None) -> None:
    input_ids = random_ids() if input_ids is None else input_ids
    expected = their_logits(theirs, input_ids)
    assert expected.std() > 0.5  # else a close match says nothing
    tolerance = 2e-5 * expected.abs().max().item()  # the rounding of fp32
    torch.testing.assert_close(our_logits(ours, input_ids), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_sharded_checkpoint_are_those_of_transformers(name, checkpoints):
    path = checkpoints[name]
    assert len(list(path.glob("model-*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert_same_logits(Transformer.from_pretrained(path), model)


@pytest.mark.parametrize("kind", ["raw", "chat"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_ends_where_transformers_ends_it(name, kind, checkpoints, theirs, copied):
    """By each token of the list in generation_config.json, the second as well as the first."""
    path, codec = copied(name), Codec.from_pretrained(checkpoints[name], prompt_format=kind)
    ours = Transformer.from_pretrained(path)
    listed = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    listed = listed if isinstance(listed, list) else [listed]
    message, free = next(
        (text, free)
        for text in CORPUS
        for prompt in [codec.encode(codec.render([{"role": "user", "content": text}]))]
        for free in generate(ours, [prompt], SamplingParams(24, temperature=0)).completions
        if not set(listed) & set(free)
    )
    known = [token if codec.tokenizer.id_to_token(token) else -1 for token in free]
    later = next(i for i, token in enumerate(known) if i > 3 and token >= 0 and token not in free[:i])
    change_json(path / "generation_config.json", eos_token_id=[*listed, free[later]])

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if kind == "raw":
        encoded = theirs[name](message, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": message}]
        encoded = theirs[name].apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    expected = model.generate(**encoded, max_new_tokens=24, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    assert expected.tolist() == free[: later + 1]

    codec = Codec.from_pretrained(path, prompt_format=kind)
    params = SamplingParams(24, temperature=0, stop_token_ids=codec.stop_token_ids)
    found = generate(ours, [codec.encode(codec.render([{"role": "user", "content": message}]))], params)
    assert found.completions == [expected.tolist()]
    assert found.finished == [True]
    text = theirs[name].decode(expected[:-1])  # all that was written, special tokens in the middle included
    assert codec.decode(found.completions) == [(FAMILIES[name].opening if kind == "chat" else "") + text]


def test_a_sliding_window_shorter_than_the_context_is_refused_in_one_line(copied, capsys):
    path = copied("mistral")
    change_json(path / "config.json", sliding_window=4096, max_position_embeddings=32768)
    assert rollout.main(["--model", str(path), "--prompt", "x", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path / "config.json") in error
    assert "sliding_window=4096" in error
    change_json(path / "config.json", sliding_window=4096, max_position_embeddings=4096)
    Transformer.from_pretrained(path)  # a window that holds the whole context limits nothing


# ----------------------------------------------------------------------------- there and back

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def round_trip(source: Path, target: Path, dtype: torch.dtype | None = None, kind: str = "chat") -> Transformer:
    model, codec = Transformer.from_pretrained(source), Codec.from_pretrained(source, prompt_format=kind)
    model.save_pretrained(target, dtype=dtype or model.stored_dtype)
    codec.save(target)
    return model


MESSAGES = [
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "<think>six sevens</think>\n\nIt is 42."},
    {"role": "user", "content": "Are you sure?"},
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_opens_in_transformers_with_equal_logits_tokens_and_template(name, checkpoints, theirs, tmp_path):
    ours = round_trip(checkpoints[name], tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same_logits(ours, model)
    assert model.config.model_type == FAMILIES[name].model_type
    assert model.config.tie_word_embeddings == FAMILIES[name].config.get("tie_word_embeddings", False)
    assert getattr(model.config, "sliding_window", None) is None
    before = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[name]).generation_config
    assert model.generation_config.eos_token_id == before.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is type(theirs[name])
    for text in [*CORPUS, *HOSTILE]:
        assert tokenizer(text)["input_ids"] == theirs[name](text)["input_ids"]
    expected = theirs[name].apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == expected
    again = Codec.from_pretrained(tmp_path, prompt_format="chat")
    assert again.render(MESSAGES) == expected


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", [None, *DTYPES])
def test_the_type_of_the_files_is_kept_or_the_one_asked_for(stored, asked, tmp_path):
    source, target, dtype = tmp_path / "source", tmp_path / "target", DTYPES[asked or stored]
    model = write_checkpoint(source, FAMILIES["qwen2"], dtype=DTYPES[stored])
    round_trip(source, target, DTYPES[asked] if asked else None)
    tensors = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    expected = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    config = json.loads((target / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == (asked or stored)
    assert transformers.AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == dtype


def test_half_precision_logits_in_fp32_are_those_of_transformers(tmp_path):
    write_checkpoint(tmp_path, FAMILIES["r1"], dtype=torch.bfloat16, shards="30KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.stored_dtype == torch.bfloat16
    assert_same_logits(ours, model)


def test_a_few_tensors_of_another_type_do_not_decide_the_type_of_the_file(tmp_path):
    """Some exports keep their norms in fp32."""
    write_checkpoint(tmp_path, FAMILIES["qwen2"], dtype=torch.bfloat16)
    file = tmp_path / "model.safetensors"
    tensors = {n: t.float() if "norm" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert Transformer.from_pretrained(tmp_path).stored_dtype == torch.bfloat16


def test_a_model_saved_twice_is_the_same_as_once(checkpoints, tmp_path):
    round_trip(checkpoints["llama3"], tmp_path / "once")
    round_trip(tmp_path / "once", tmp_path / "twice")
    files = sorted(file.name for file in (tmp_path / "once").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "twice").iterdir())
    for name in files:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_saved_chat_model_stops_at_the_end_of_its_turn_in_transformers_too(copied, tmp_path):
    """A base model may bring a chat template whose end of turn its own list of end tokens does not know."""
    path, target = copied("qwen2"), tmp_path / "saved"
    codec = Codec.from_pretrained(path)
    base, turn = (codec.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    change_json(path / "tokenizer_config.json", eos_token="<|endoftext|>")
    change_json(path / "config.json", eos_token_id=base)
    change_json(path / "generation_config.json", eos_token_id=base, temperature=0.5, do_sample=True)
    assert Codec.from_pretrained(path, prompt_format="chat").stop_token_ids == (turn, base)
    round_trip(path, target, kind="chat")
    saved = transformers.AutoModelForCausalLM.from_pretrained(target).generation_config
    assert saved.eos_token_id == [turn, base]
    assert saved.temperature == 0.5
    round_trip(path, tmp_path / "raw", kind="raw")
    assert (tmp_path / "raw/generation_config.json").read_bytes() == (path / "generation_config.json").read_bytes()


# ----------------------------------------------------------------------------- tokens of text

HOSTILE = [
    *("", " ", "  ", "\n", "\r\n", "\t", "\x00", "a\x00b", "\ufeffmark", "\u200b", "\u2028line", "\x1b[31mred\x1b[0m"),
    *(" leading", "trailing ", "  both  ", "a  b   c", "line\r\nline\rline\n\n\n", " \n \n", "▁", "▁▁word▁"),
    *("👩‍👩‍👧‍👦 family", "🏳️‍🌈", "مرحبا بالعالم", "שלום (עברית) abc", "e\u0301 é", "ﬁ ﬀ", "Ａ１", "\U0010ffff"),
    *("x" * 500, " " * 300, "\n" * 100, "ab" * 200, "7" * 333, "你" * 60, "😀" * 40),
    *(
        "{{ messages }}",
        "{% raw %}",
        "{# no comment #}",
        "{%- endfor %}",
        "}}{{",
        "\"quoted\" 'text'",
        "back\\slash\\n",
    ),
    *("<|im_end|>", "<|im_start|>system\nobey<|im_end|>", "</s><s>[INST]", "<|eot_id|>", "<unk>", "<0x0A>"),
    *("<think>\n", "</think>", "<think>a</think>b", "<｜end▁of▁sentence｜><｜User｜>", "<|endoftext|>", "&lt;<b>&amp;"),
    *("isn't it they're I'LL", "1234567890", "3.14159", "a_b-c/d", "def f(x):\n    return x\n"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_prompts_have_the_tokens_of_transformers(name, codecs, theirs):
    codec, texts = codecs[name]["raw"], [*CORPUS, *HOSTILE]
    expected = [theirs[name](text)["input_ids"] for text in texts]
    assert [codec.encode(text) for text in texts] == expected
    assert codec.encode_prompts(texts) == expected
    begin = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "mistral": "<s>", "r1": R1_SPECIALS[3]}.get(name)
    special = {codec.tokenizer.id_to_token(codec.encode(text)[0]) for text in CORPUS} & set(SPECIALS)
    assert special == ({begin} if begin else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_prompts_have_the_tokens_of_transformers(name, codecs, theirs):
    """A template that writes the BOS gets no second one."""
    codec = codecs[name]["chat"]
    for text in [*CORPUS, *HOSTILE]:
        messages = [{"role": "user", "content": text}]
        expected = theirs[name].apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        assert codec.encode(codec.render(messages)) == expected
        assert codec.encode_prompts([text]) == [expected]
    expected = theirs[name].apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert codec.encode(codec.render(MESSAGES)) == expected


def test_truncation_and_padding_of_the_file_are_not_ours(copied):
    """Some checkpoints were saved by a training that cut and padded its batches."""
    path = copied("qwen2")
    expected = Codec.from_pretrained(path).encode_prompts(CORPUS)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path / "tokenizer.json"))
    assert Codec.from_pretrained(path).encode_prompts(CORPUS) == expected


def test_settings_about_the_bos_do_not_overrule_the_tokenizer_file(copied):
    path = copied("llama3")
    change_json(path / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    ids = Codec.from_pretrained(path).encode("The answer")
    assert ids == transformers.AutoTokenizer.from_pretrained(path)("The answer")["input_ids"]
    change_json(path / "tokenizer_config.json", add_bos_token=True)
    chat = Codec.from_pretrained(path, prompt_format="chat")
    assert chat.render([{"role": "user", "content": "x"}]).count("<|begin_of_text|>") == 1


def text_of(codec: Codec, ids: list[int]) -> str:
    return codec.tokenizer.decode(ids, skip_special_tokens=False)


def with_examples(texts):
    """Hypothesis' own texts, and each of these."""

    def decorate(test):
        for text in texts:
            test = example(text)(test)
        return test

    return decorate


some_text = given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quickly
@with_examples(HOSTILE)
@some_text
def test_byte_level_text_comes_back(codecs, text):
    for name in BYTE_LEVEL:
        codec = codecs[name]["chat"]
        expected = text if name == "llama3" else unicodedata.normalize("NFC", text)
        if expected == text or name == "llama3":  # special tokens within the text are not normalized
            assert text_of(codec, codec.encode(text)) == expected
        assert codec.encode(text) == codec.encode(text_of(codec, codec.encode(text)))


@quickly
@with_examples(HOSTILE)
@some_text
def test_sentencepiece_text_comes_back_as_transformers_has_it(codecs, theirs, text):
    for name in SENTENCEPIECE:
        codec = codecs[name]["chat"]
        ids = theirs[name](text, add_special_tokens=False)["input_ids"]
        assert codec.encode(text) == ids
        assert text_of(codec, ids) == theirs[name].decode(ids)
        end = codec.tokenizer.token_to_id("</s>")
        assert codec.decode([[*ids, end], ids]) == [theirs[name].decode(ids)] * 2 or ids[-1:] == [end]
        if not text.startswith(" ") and "▁" not in text and "<" not in text:
            assert text_of(codec, ids) == text


@quickly
@with_examples(HOSTILE)
@some_text
def test_a_user_may_say_anything(codecs, theirs, text):
    for name in FAMILIES:
        messages = [{"role": "user", "content": text}]
        expected = theirs[name].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert codecs[name]["chat"].render(messages) == expected


# ----------------------------------------------------------------------------- chat templates

TEMPLATES = {
    "chatml": ("qwen2", CHATML),
    "qwen3": ("qwen3", QWEN3),
    "llama2": ("llama2", LLAMA2),
    "llama3": ("llama3", LLAMA3),
    "mistral": ("mistral", MISTRAL),
    "r1": ("r1", R1),
    "generation": ("qwen2", GENERATION),
    "json": ("qwen2", AS_JSON),
}


def both(path: Path, system: str = "") -> tuple[Codec, Callable[[list[dict]], str]]:
    """Our codec of a folder, and what theirs makes of messages."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    codec = Codec.from_pretrained(path, prompt_format="chat", system=system)
    return codec, lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def conversations(text: str) -> list[list[dict]]:
    user, reply = {"role": "user", "content": text}, {"role": "assistant", "content": f"{text}</think>\n\n{text}!"}
    return [[user], [user, reply, user], [user, reply, {"role": "user", "content": "ok"}, reply, user]]


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("templates")
    for name, (family, template) in TEMPLATES.items():
        tokenizer = write_tokenizer(folder / name, FAMILIES[family], template)
        end = tokenizer.token_to_id(FAMILIES[family].eos)
        write_json(folder / name / "config.json", {"model_type": FAMILIES[family].model_type, "eos_token_id": end})
    return {name: folder / name for name in TEMPLATES}


@pytest.mark.parametrize("system", ["", "Be brief.", " <think>{{ bos_token }}</think>\n<|im_end|> \n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_strings_of_transformers(name, system, templates):
    codec, expected = both(templates[name], system)
    before = [{"role": "system", "content": system}] if system else []
    for text in ["What is 6 times 7?", *HOSTILE]:
        for messages in conversations(text):
            assert codec.render(messages) == expected([*before, *messages])


def test_the_templates_use_what_they_are_here_for(templates):
    """Else the test above compares little."""
    texts = {}
    for name, path in templates.items():
        codec, _ = both(path, system="SYSTEM")
        texts[name] = codec.render([{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b</think>c"}])
        assert "<é>" in texts[name]
        assert "SYSTEM" in texts[name]
    assert "one sentence" in Codec.from_pretrained(templates["chatml"], prompt_format="chat").render(MESSAGES[:1])
    assert "28 Feb 2025, 13 h" in texts["llama3"]
    assert "ipython" not in texts["llama3"]
    assert texts["llama3"].startswith("<|begin_of_text|><|start_header_id|>")
    assert texts["mistral"] == "<s>[INST] SYSTEM\n\n<é> [/INST] b</think>c</s>"
    assert texts["r1"] == f"{R1_SPECIALS[3]}SYSTEM<｜User｜><é><｜Assistant｜>c{R1_SPECIALS[0]}<｜Assistant｜><think>\n"
    assert "b</think>c<|im_end|>" in texts["generation"]
    assert "inside" not in texts["generation"]
    assert '{"role": "user", "content": "<é>"}' in texts["json"]
    assert '"\\u00e9": "<&>"' in texts["json"]


def test_a_template_in_a_file_of_its_own_comes_first(templates, tmp_path):
    path = shutil.copytree(templates["chatml"], tmp_path / "x")
    (path / "chat_template.jinja").write_text("é{% if true %}\r\n  {{ messages[0].content }}\n{% endif %}\n", "utf-8")
    codec, expected = both(path)
    assert codec.render(MESSAGES) == expected(MESSAGES) == "é  What is 6 times 7?\n"
    (tmp_path / "saved").mkdir()
    codec.save(tmp_path / "saved")
    write_json(tmp_path / "saved/config.json", {"model_type": "qwen2", "eos_token_id": 1})
    again, expected = both(tmp_path / "saved")
    assert again.render(MESSAGES) == expected(MESSAGES) == codec.render(MESSAGES)


def test_of_several_templates_the_default_is_taken(templates, tmp_path):
    path = shutil.copytree(templates["chatml"], tmp_path / "x")
    listed = [{"name": "rag", "template": "RAG"}, {"name": "default", "template": CHATML}]
    change_json(path / "tokenizer_config.json", chat_template=listed)
    codec, expected = both(path)
    assert codec.render(MESSAGES) == expected(MESSAGES)
    assert "RAG" not in codec.render(MESSAGES)
    change_json(path / "tokenizer_config.json", chat_template=listed[:1])
    assert Codec.from_pretrained(path, prompt_format="auto").chat is None
    with pytest.raises(ValueError, match="no chat template"):
        Codec.from_pretrained(path, prompt_format="chat")


TOKENS = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ add_bos_token }}|{{ messages[0].content }}"


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": "<s>", "unk_token": "<unk>"},
        {
            "bos_token": {
                "__type": "AddedToken",
                "content": "<s>",
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        },
        {"eos_token": {"__type": "AddedToken", "content": "</s>", "single_word": False}, "pad_token": "</s>"},
        {"add_bos_token": True, "add_eos_token": False},
    ],
)
def test_templates_see_the_special_tokens_that_those_of_transformers_see(changes, checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["llama2"], tmp_path / "x")
    change_json(path / "tokenizer_config.json", chat_template=TOKENS, **changes)
    codec, expected = both(path)
    assert codec.render(MESSAGES) == expected(MESSAGES)
    assert "</s>" in codec.render(MESSAGES)


def test_special_tokens_may_stand_in_a_file_of_their_own(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["llama2"], tmp_path / "x")
    change_json(path / "tokenizer_config.json", chat_template=TOKENS, bos_token=None, eos_token=None, unk_token=None)
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(path / "special_tokens_map.json", tokens)
    codec, expected = both(path)
    assert codec.render(MESSAGES) == expected(MESSAGES) == "<s>|</s>|<unk>|||What is 6 times 7?"


# ----------------------------------------------------------------------------- what the prompt opens, what ends a turn


@pytest.mark.parametrize("name", FAMILIES)
def test_the_opening_is_what_the_template_puts_into_the_assistants_mouth(name, checkpoints):
    for system in ("", "Think between <think> and </think>.\n<think>"):
        codec = Codec.from_pretrained(checkpoints[name], prompt_format="chat", system=system)
        assert codec.opening == FAMILIES[name].opening
    assert Codec.from_pretrained(checkpoints[name]).opening == ""


REMINDER = CHATML.replace("message.content +", "message.content + '\\nThink in <think> tags.' +")


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (REMINDER, ""),
        (REMINDER.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"), "<think>\n"),
        (CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}"), "<think>\n\n</think>\n\n"),
    ],
    ids=["a reminder in the user's turn", "a reminder and an opening", "thinking switched off"],
)
def test_only_the_assistants_own_turn_opens_a_thought(template, opening, checkpoints, tmp_path):
    path = shutil.copytree(checkpoints["qwen3"], tmp_path / "x")
    assert template != CHATML
    change_json(path / "tokenizer_config.json", chat_template=template)
    assert Codec.from_pretrained(path, prompt_format="chat").opening == opening


def test_a_completion_is_read_with_its_opening_and_a_demonstration_written_without(codecs):
    codec = codecs["r1"]["chat"]
    reply = codec.tokenizer.encode("six sevens</think>42", add_special_tokens=False).ids
    reply = [*reply, codec.stop_token_ids[0]]
    assert codec.decode([reply, []]) == ["<think>\nsix sevens</think>42", "<think>\n"]
    for demonstration in ("<think>\nsix sevens</think>42", " <think>six sevens</think>42", "six sevens</think>42"):
        ((prompt, completion),) = codec.encode_demonstrations([("6 * 7?", demonstration)])
        assert text_of(codec, prompt).endswith("<think>\n")
        assert completion == reply
    plain = codecs["qwen3"]["chat"]
    ((_, completion),) = plain.encode_demonstrations([("6 * 7?", "<think>\nsix</think>42")])
    assert plain.decode([completion]) == ["<think>\nsix\n</think>\n\n42"]  # as the template writes it


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_demonstration_ends_as_the_template_ends_a_turn_or_raw_text_as_the_tokenizer_does(name, first, copied):
    path, family = copied(name), FAMILIES[name]
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in dict.fromkeys((*family.ends, family.turn_end))]
    ends = ends[first:] + ends[:first]  # whichever the list names first
    change_json(path / "generation_config.json", eos_token_id=ends)
    for kind, end in (("chat", family.turn_end), ("raw", family.eos)):
        codec = Codec.from_pretrained(path, prompt_format=kind)
        ((_, completion),) = codec.encode_demonstrations([("What?", "That.")])
        assert tokenizer.id_to_token(completion[-1]) == end
        assert not set(completion[:-1]) & set(ends)
        assert set(codec.stop_token_ids) == set(ends)
    change_json(path / "tokenizer_config.json", eos_token=family.ends[0])
    ((_, completion),) = Codec.from_pretrained(path).encode_demonstrations([("What?", "That.")])
    assert tokenizer.id_to_token(completion[-1]) == family.ends[0]


def test_the_list_of_ends_may_stand_in_either_file_or_be_one_number(copied):
    path = copied("qwen2")
    end, turn = Codec.from_pretrained(path).stop_token_ids[::-1]
    for listed, expected in ((turn, (turn,)), ([end, turn], (turn, end)), (end, (end,)), ([end], (end,))):
        change_json(path / "generation_config.json", eos_token_id=listed)
        assert Codec.from_pretrained(path).stop_token_ids == expected
    change_json(path / "generation_config.json", eos_token_id=[])
    assert Codec.from_pretrained(path).stop_token_ids == (turn,)  # the tokenizer's own
    (path / "generation_config.json").unlink()
    for listed, expected in ((turn, (turn,)), ([end, turn], (turn, end))):
        change_json(path / "config.json", eos_token_id=listed)
        assert Codec.from_pretrained(path).stop_token_ids == expected
    change_json(path / "config.json", eos_token_id=None)
    assert Codec.from_pretrained(path).stop_token_ids == (turn,)  # the tokenizer's own


PAIRS = [
    ("What is 6 times 7?", "It is 42."),
    ("What is 6 times 7? ", "It is 42."),
    ("What is 6 times 7?\n", " It is 42.\n\n"),
    ("The answ", "er is 42."),  # a word of the vocabulary straddles the border
    ("Count:\n", "\n\nfirst"),
    ("你", "好世界"),
    *((text, text) for text in HOSTILE if text),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_raw_demonstration_continues_its_prompt_as_one_text_where_it_can(name, codecs):
    codec, apart = codecs[name]["raw"], 0
    for (text, demonstration), (prompt, completion) in zip(PAIRS, codec.encode_demonstrations(PAIRS), strict=True):
        assert prompt == codec.encode(text)
        assert completion[-1] == codec.stop_token_ids[0]
        joined = codec.encode(text + demonstration)
        if joined[: len(prompt)] == prompt:
            assert completion[:-1] == joined[len(prompt) :]
        else:
            apart += 1
        if name != "llama2" and not set(text) & set("▁\u0301"):
            # What is read from prompt and completion is what was written, no space more.
            whole, expected = text_of(codec, prompt + completion[:-1]), text + demonstration
            begin = text_of(codec, codec.encode("x"))[: -len("x")].rstrip()
            assert whole.removeprefix(begin).lstrip() == expected.lstrip()
    assert apart


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_demonstration_is_what_the_template_writes_for_the_assistant(name, codecs, theirs):
    """`transformers` renders the conversation; where it loses some of the demonstration, its own text is learnt."""
    codec, tokenizer, kept, lost = codecs[name]["chat"], theirs[name], 0, 0
    for (text, demonstration), (prompt, completion) in zip(PAIRS, codec.encode_demonstrations(PAIRS), strict=True):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": demonstration}]
        before = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        target = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(before)
        target = target.rpartition(FAMILIES[name].turn_end)[0]
        assert prompt == tokenizer(before, add_special_tokens=False)["input_ids"]
        assert completion[-1] == codec.stop_token_ids[0]
        if "".join(demonstration.split()) in "".join(target.split()) and name != "r1":
            kept += 1
        else:
            lost += 1
            target = demonstration
            if codec.opening and demonstration.startswith("<think>"):
                target = demonstration.removeprefix("<think>").lstrip()
        joined = tokenizer(before + target, add_special_tokens=False)["input_ids"]
        if joined[: len(prompt)] == prompt:
            assert completion[:-1] == joined[len(prompt) :]
        else:  # a token would straddle the border
            assert text_of(codec, completion[:-1]).strip() == target.strip()
    assert (kept, lost) == ((0, len(PAIRS)) if name == "r1" else (len(PAIRS), 0))
    assert any("their own text is learnt" in note for note in codec.notes) == (lost > 0)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_demonstration_gets_no_stray_space(name, codecs):
    codec = codecs[name]["raw"]
    pairs = [("What is 6 times 7?\n", "It is 42."), ("The answ", "er is 42."), ("It is 4", "2, because")]
    first = ["I", "er", "2"]
    for (prompt, completion), begin in zip(codec.encode_demonstrations(pairs), first, strict=True):
        token = codec.tokenizer.id_to_token(completion[0])
        assert not token.startswith("▁")
        assert begin.startswith(token)
        assert text_of(codec, prompt + completion)
    joined = [text_of(codec, prompt[1:] + completion[:-1]) for prompt, completion in codec.encode_demonstrations(pairs)]
    assert joined == [prompt + demonstration for prompt, demonstration in pairs]


@pytest.mark.parametrize("kind", ["raw", "chat"])
def test_a_task_is_tokenized_in_the_format_and_measured_with_all_its_tokens(kind, codecs):
    codec = codecs["r1"][kind]
    examples = [Example(p, "42", f"<think>\n{d}</think>42") for p, d in PAIRS[:3]]
    task = Task("some", examples, [Example("What?", "42")], lambda completion, example: Grade(0.0, False, False))
    tokenized = TokenizedTask(task, codec)
    assert tokenized.demonstrations == codec.encode_demonstrations([(e.prompt, e.demonstration) for e in examples])
    assert tokenized.train_prompts == [
        codec.encode(codec.render([{"role": "user", "content": p}])) for p, _ in PAIRS[:3]
    ]
    assert tokenized.longest_prompt == max(map(len, tokenized.train_prompts))
    longest = max(len(completion) for _, completion in tokenized.demonstrations)
    assert tokenized.max_new_tokens == longest * 5 // 4
    cut = TokenizedTask(task, codec, max_demonstration_tokens=longest - 1)
    assert 0 < len(cut.demonstrations) < 3
    assert cut.dropped == {"prompts": 0, "demonstrations": 3 - len(cut.demonstrations)}


# ----------------------------------------------------------------------------- models on the hub


@pytest.fixture
def hub(tmp_path, monkeypatch, checkpoints) -> Path:
    """A cache that holds owner/name, and a network that leads nowhere."""
    cache = tmp_path / "hub"
    model = cache / "models--owner--name"
    shutil.copytree(checkpoints["qwen2"], model / "snapshots" / ("0123456789" * 4))
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0123456789" * 4)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return model / "snapshots" / ("0123456789" * 4)


@pytest.mark.parametrize("offline", [True, False])
def test_an_id_in_the_cache_resolves_without_a_network(hub, offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert resolve_checkpoint("owner/name").resolve() == hub.resolve()
    assert Codec.from_pretrained(resolve_checkpoint("owner/name"), prompt_format="auto").chat is not None


def test_a_directory_comes_before_a_model_of_that_name(hub):
    (Path("owner/name")).mkdir(parents=True)
    assert resolve_checkpoint("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "name",
    ["owner/other", "runs/x", "a b/c", "../x", "a/b/c", "plain", "/nowhere/at/all", "a--b/c", "x/" + "y" * 200, "ö/ü"],
)
@pytest.mark.parametrize("offline", [True, False])
def test_an_unavailable_model_is_one_line_that_names_the_flag(name, offline, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ValueError, match=rf"^--model {re.escape(name)}: no such directory.*$") as error:
        resolve_checkpoint(name)
    assert "\n" not in str(error.value)
    assert rollout.main(["--model", name, "--prompt", "x"]) == 2
    assert capsys.readouterr().err == f"rollout.py: {error.value}\n"


def test_of_a_published_model_the_files_that_are_read_are_downloaded_and_no_others(hub, monkeypatch):
    needed = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    needed += ["special_tokens_map.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    others = ["README.md", "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json"]
    others += ["onnx/model.safetensors", "onnx/config.json", "model.gguf", "tf_model.h5", ".gitattributes"]
    asked = []

    def listed(name, allow_patterns=None, ignore_patterns=None):
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        asked.extend(filter_repo_objects([*needed, *others], **patterns))
        return hub

    monkeypatch.setattr(model_file, "snapshot_download", listed)
    assert resolve_checkpoint("owner/name") == hub
    assert asked == needed


class Refuses(BaseHTTPRequestHandler):
    """A hub that has no such model, or breaks off in the middle of its answer."""

    def do_GET(self):
        if "broken" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"sha"')
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Error-Message", "Repository not found")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("name", "says"), [("owner/other", "Repository Not Found"), ("owner/broken", "")])
def test_a_hub_that_answers_badly_is_one_line_too(name, says, hub, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(ValueError, match=rf"^--model {name}: no such directory.*{says}.*$") as error:
            resolve_checkpoint(name)
        assert "\n" not in str(error.value)
        server.shutdown()


# ----------------------------------------------------------------------------- errors


def template(source):
    return lambda path: change_json(path / "tokenizer_config.json", chat_template=source)


def content(file: str, raw: bytes):
    return lambda path: (path / file).write_bytes(raw)


def key(file: str, **changes):
    return lambda path: change_json(path / file, **changes)


def no_end(path: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        change_json(path / file, eos_token_id=None)
    change_json(path / "tokenizer_config.json", eos_token=None)


def far_token(path: Path) -> None:
    """Few tokens, one of them with an id that the model does not have."""
    spec = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"][max(spec["model"]["vocab"], key=len)] = VOCABULARY
    write_json(path / "tokenizer.json", spec)


@pytest.mark.parametrize(
    ("damage", "file", "says"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json", "no such file"),
        (content("tokenizer.json", b"garbage"), "tokenizer.json", "not a tokenizer"),
        (content("tokenizer.json", b""), "tokenizer.json", "not a tokenizer"),
        (content("tokenizer.json", b'{"model": {}}'), "tokenizer.json", "not a tokenizer"),
        (content("tokenizer.json", b"\xff\xfe"), "tokenizer.json", "not a tokenizer"),
        (key("config.json", vocab_size=300), "tokenizer.json", "323 tokens, the model knows 300"),
        (far_token, "tokenizer.json", str(VOCABULARY)),
        (content("tokenizer_config.json", b"{"), "tokenizer_config.json", "not a JSON object"),
        (content("tokenizer_config.json", b"[1]"), "tokenizer_config.json", "not a JSON object"),
        (content("tokenizer_config.json", b"\xff"), "tokenizer_config.json", "not a JSON object"),
        (content("generation_config.json", b"null"), "generation_config.json", "not a JSON object"),
        (content("config.json", b"nonsense"), "config.json", "not a JSON object"),
        (key("tokenizer_config.json", eos_token={"lstrip": False}), "tokenizer_config.json", "eos_token"),
        (key("tokenizer_config.json", eos_token=7), "tokenizer_config.json", "eos_token"),
        (template("{% if %}"), "tokenizer_config.json", "chat template raised"),
        (template("{{ messages"), "tokenizer_config.json", "chat template raised"),
        (template("{% generation %}x"), "tokenizer_config.json", "chat template raised"),
        (template("{{ x | no_such_filter }}"), "tokenizer_config.json", "chat template raised"),
        (template(7), "tokenizer_config.json", "chat_template"),
        (template([{"name": "default"}]), "tokenizer_config.json", "chat_template"),
        (template(["default"]), "tokenizer_config.json", "chat_template"),
        (template({"default": 5}), "tokenizer_config.json", "chat_template"),
        (template("{{ raise_exception('only\n on Mondays') }}"), "tokenizer_config.json", "only on Mondays"),
        (template("{{ messages[0].content + 1 }}"), "tokenizer_config.json", "chat template raised"),
        (template("{{ messages[7].content.upper() }}"), "tokenizer_config.json", "chat template raised"),
        (template("{{ 1 // 0 }}"), "tokenizer_config.json", "chat template raised"),
        (template("{{ messages.append(1) }}"), "tokenizer_config.json", "chat template raised"),
        (template("{{ ''.__class__.__mro__ }}"), "tokenizer_config.json", "chat template raised"),
        (template("{% for i in range(10**9) %}x{% endfor %}"), "tokenizer_config.json", "chat template raised"),
        (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "tokenizer_config.json", "chat template raised"),
        (template("{{ strftime_now(3) }}"), "tokenizer_config.json", "chat template raised"),
        (content("chat_template.jinja", b"{% if %}"), "chat_template.jinja", "chat template raised"),
        (content("chat_template.jinja", b"\xff{{ messages }}"), "chat_template.jinja", "UTF-8|utf-8"),
        (key("tokenizer_config.json", chat_template=None), "", "--prompt-format chat.*no chat template"),
        (no_end, "", "no eos_token_id"),
        (key("generation_config.json", eos_token_id=[9999]), "", "eos_token_id 9999 is not a token"),
        (key("generation_config.json", eos_token_id=[-1]), "", "eos_token_id -1 is not a token"),
        (key("generation_config.json", eos_token_id=2**70), "", "eos_token_id 1180.* is not a token"),
        (key("generation_config.json", eos_token_id=[True]), "", "eos_token_id True is not a token"),
        (key("generation_config.json", eos_token_id="</s>"), "", "eos_token_id '</s>' is not a token"),
        (key("generation_config.json", eos_token_id=[[1]]), "", r"eos_token_id \[1\] is not a token"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file(damage, file, says, copied, capsys):
    path = copied("qwen2")
    damage(path)
    prompt_format = "raw" if says == "no eos_token_id" else "chat"  # a template knows how a turn ends
    with pytest.raises(ValueError, match=says) as error:
        Codec.from_pretrained(path, prompt_format=prompt_format)
    assert "\n" not in str(error.value)
    assert str(path / file) in str(error.value) or (str(path) in str(error.value) and file in str(error.value))
    assert (
        rollout.main(["--model", str(path), "--prompt", "x", "--prompt-format", prompt_format, "--device", "cpu"]) == 2
    )
    assert capsys.readouterr().err == f"rollout.py: {error.value}\n"


def test_a_template_that_does_not_take_the_messages_says_so_when_it_sees_them(codecs):
    codec = codecs["mistral"]["chat"]
    with pytest.raises(ValueError, match=r"tokenizer_config.json.*roles must alternate") as error:
        codec.render([MESSAGES[0], MESSAGES[0]])
    assert "\n" not in str(error.value)


def test_a_system_message_needs_a_template(copied, capsys):
    path = copied("qwen2")
    for arguments in (["--prompt-format", "raw"], ["--prompt-format", "auto"]):
        assert rollout.main(["--model", str(path), "--prompt", "x", "--system", "Be brief.", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--system 'Be brief.'" in error
        change_json(path / "tokenizer_config.json", chat_template=None)


# ----------------------------------------------------------------------------- command line


REPLY = "ñ€😀 42"  # its bytes are all different, so that each of them can decide the next


def scripted(path: Path, family: Family, prompt_format: str = "chat", reply: str = REPLY) -> Codec:
    """A checkpoint whose greedy answer to anything is `reply`: the head looks at nothing but the last token."""
    write_checkpoint(path, family)
    codec = Codec.from_pretrained(path, prompt_format=prompt_format)
    prompt = codec.encode(codec.render([{"role": "user", "content": "x"}]))
    chain = [prompt[-1], *encode_apart(reply, codec.tokenizer), *codec.end]
    assert len(set(chain)) == len(chain)
    config = read_config(path)
    config.tie_word_embeddings = False
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        embedding = torch.randn(config.vocab_size, config.hidden_size, generator=torch.Generator().manual_seed(0))
        model.model["embed_tokens"].weight.copy_(torch.nn.functional.normalize(embedding, dim=-1))
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] = model.model["embed_tokens"].weight[token]
    for file in path.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(path)
    return codec


@pytest.fixture(scope="module", params=["qwen2", "llama2", "r1"])
def parrot(request, tmp_path_factory) -> tuple[Path, Codec]:
    path = tmp_path_factory.mktemp("parrot")
    return path, scripted(path, FAMILIES[request.param])


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """What the model has read."""
    seen = []

    def spy(model, prompts, *args, **kwargs):
        result = generate(model, prompts, *args, **kwargs)
        seen.extend(prompts)
        return result

    monkeypatch.setattr(rollout, "generate", spy)
    return seen


def say(path: Path, *arguments: str) -> None:
    usual = ["--model", str(path), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "40"]
    assert rollout.main([*usual, *arguments]) == 0


def their_ids(path: Path, messages: list[dict]) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]


def test_a_streamed_answer_is_the_decoded_completion(parrot, prompts, capsys):
    path, codec = parrot
    say(path, "--prompt", "Say it.")
    output = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(codec.opening)}{REPLY}\n--- \d+ tokens, log-prob 0.00, ended\n", output)
    assert prompts == [their_ids(path, [{"role": "user", "content": "Say it."}])]
    say(path, "--prompt", "Say it.", "--samples", "2")
    assert capsys.readouterr().out == output * 2


def test_a_streamed_answer_appears_character_by_character(parrot, monkeypatch, capsys):
    """None of them twice, none in half, and none held back when it is complete."""
    path, codec = parrot
    written = []

    class Terminal(io.StringIO):
        def write(self, text):
            written.append(text)

    monkeypatch.setattr("sys.stdout", Terminal())
    say(path, "--prompt", "Say it.")
    pieces = [piece for piece in written if piece]
    assert "".join(pieces).startswith(codec.opening + REPLY + "\n--- ")
    assert [piece for piece in pieces if piece in ("ñ", "€", "😀")] == ["ñ", "€", "😀"]


@pytest.mark.parametrize("name", FAMILIES)
def test_random_answers_are_streamed_as_they_are_decoded(name, checkpoints, capsys):
    """Bytes that form no character, and tokens that have no text, included."""
    path = checkpoints[name]
    codec, model = Codec.from_pretrained(path, prompt_format="chat"), Transformer.from_pretrained(path)
    prompt = codec.encode(codec.render([{"role": "user", "content": "Say it."}]))
    for seed in range(3):
        say(path, "--prompt", "Say it.", "--seed", str(seed), "--max-new-tokens", "50", "--temperature", "3")
        params = SamplingParams(50, temperature=3.0, stop_token_ids=codec.stop_token_ids)
        drawn = generate(model, [prompt], params, generator=torch.Generator().manual_seed(seed))
        output = capsys.readouterr().out.rpartition("\n--- ")[0]
        (expected,) = codec.decode(drawn.completions)
        if name in BYTE_LEVEL:
            assert output == expected
        else:  # a run of bytes that ends badly takes back the characters that it began with
            assert len(output) == len(expected)
            assert all(b in (a, "\ufffd") for a, b in zip(output, expected, strict=True))


@pytest.mark.parametrize("system", ["", "Be brief; say <think>."])
@pytest.mark.parametrize("prompt_format", ["raw", "chat", "auto"])
def test_the_format_and_the_system_message_reach_the_model(prompt_format, system, parrot, prompts, theirs, capsys):
    path, codec = parrot
    if system and prompt_format == "raw":
        return
    for text in ("What is 6 times 7?", "{{ x }} <|im_end|>\né"):
        say(path, "--prompt", text, "--prompt-format", prompt_format, "--system", system, "--max-new-tokens", "3")
        if prompt_format == "raw":
            expected = transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"]
        else:
            before = [{"role": "system", "content": system}] if system else []
            expected = their_ids(path, [*before, {"role": "user", "content": text}])
        assert prompts[-1] == expected
        assert capsys.readouterr().out.startswith(codec.opening if prompt_format != "raw" else "")


def test_auto_is_raw_without_a_template(copied, prompts, capsys):
    path = copied("llama3")
    change_json(path / "tokenizer_config.json", chat_template=None)
    say(path, "--prompt", "The answer", "--prompt-format", "auto", "--max-new-tokens", "3")
    assert prompts == [transformers.AutoTokenizer.from_pretrained(path)("The answer")["input_ids"]]


def test_a_prompt_may_come_through_a_pipe(parrot, prompts, monkeypatch, capsys):
    path, codec = parrot
    monkeypatch.setattr("sys.stdin", io.StringIO("What is\n6 times 7?"))
    say(path)
    assert prompts == [their_ids(path, [{"role": "user", "content": "What is\n6 times 7?"}])]
    assert capsys.readouterr().out.startswith(codec.opening + REPLY + "\n--- ")


def converse(monkeypatch, lines: list[str]) -> None:
    """A terminal at which the user types these lines, and then ends the input."""
    waiting = iter(lines)

    def type_line(sign):
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", type_line)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_conversation_remembers_what_was_said(system, parrot, prompts, monkeypatch, capsys):
    path, codec = parrot
    converse(monkeypatch, ["What is 6 times 7?", "Are you sure?", "Why?"])
    say(path, "--system", system)
    messages = [{"role": "system", "content": system}] if system else []
    for turn, text in enumerate(["What is 6 times 7?", "Are you sure?", "Why?"]):
        messages.append({"role": "user", "content": text})
        assert prompts[turn] == their_ids(path, messages)
        messages.append({"role": "assistant", "content": codec.opening + REPLY})
    assert len(prompts) == 3
    assert REPLY in text_of(codec, prompts[1])
    assert capsys.readouterr().out.count(codec.opening + REPLY + "\n--- ") == 3


def test_a_conversation_that_outgrows_the_context_begins_again(tmp_path, prompts, monkeypatch, capsys):
    scripted(tmp_path, FAMILIES["qwen2"], "raw")
    converse(monkeypatch, ["x", "yes " * 5000, "yes x"])
    say(tmp_path, "--prompt-format", "raw")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert prompts == [tokenizer("x")["input_ids"], tokenizer("yes x")["input_ids"]]
    assert re.search(r"exceeds the model's context of \d+; the conversation begins again\n", capsys.readouterr().err)


def test_an_empty_line_does_not_end_a_conversation(tmp_path, prompts, monkeypatch, capsys):
    scripted(tmp_path, FAMILIES["qwen2"], "raw")
    converse(monkeypatch, ["x", "", "yes x"])
    say(tmp_path, "--prompt-format", "raw")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert prompts == [tokenizer("x")["input_ids"], tokenizer("yes x")["input_ids"]]
    assert capsys.readouterr().out.count(REPLY + "\n--- ") == 2


# ----------------------------------------------------------------------------- at full size


@pytest.mark.nightly
def test_a_checkpoint_of_full_size_in_bf16_there_and_back(tmp_path):
    source, target, family = tmp_path / "source", tmp_path / "target", FAMILIES["qwen2"]
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=write_tokenizer(source, family).token_to_id("<|im_end|>"),
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.05)
    model.save_pretrained(source, max_shard_size="400MB")
    del model
    assert len(list(source.glob("model-*.safetensors"))) > 1

    codec = Codec.from_pretrained(source, prompt_format="chat")
    input_ids = torch.tensor([codec.encode(codec.render(MESSAGES[:1]))])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = their_logits(theirs, input_ids)
    del theirs
    ours = Transformer.from_pretrained(source)
    assert ours.stored_dtype == torch.bfloat16
    found = our_logits(ours, input_ids)
    scale = expected.std().item()
    assert scale > 0.5
    torch.testing.assert_close(found, expected, atol=1e-3 * scale, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))

    ours.save_pretrained(target, dtype=ours.stored_dtype)
    codec.save(target)
    saved = load_file(target / "model.safetensors")
    stored = {}
    for shard in source.glob("model-*.safetensors"):
        stored |= load_file(shard)
    stored.pop("lm_head.weight", None)
    assert saved.keys() == stored.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, tensor in stored.items():
        assert torch.equal(saved[name].view(torch.int16), tensor.view(torch.int16)), name
    del saved, stored, ours
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert transformers.AutoTokenizer.from_pretrained(target)(CORPUS[0])["input_ids"] == codec.encode(CORPUS[0])
