"""Foreign files cost one clear line: a ValueError that names the file or key, and the value, in little time and memory.

Memory is what Python allocates (`tracemalloc`); time is the process's own, so that what else runs does not count.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import data.tokenizer
import model as model_file
from data.files import check_number
from data.tokenizer import ChatTemplate, Codec
from model import ModelConfig, Transformer, read_config

VALID = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
NORM = "model.norm.weight"
END = "<end>"
CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}<end>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint that is as it should be."""
    path = tmp_path_factory.mktemp("made")
    Transformer(ModelConfig.from_dict(VALID)).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "?": 1}, unk_token="?"))
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path / "tokenizer.json"))
    write(path / "tokenizer_config.json", {"eos_token": END, "chat_template": CHAT})
    write(path / "generation_config.json", {"eos_token_id": [0]})
    Transformer.from_pretrained(path)  # what torch imports the first time is not the time of a foreign file
    return path


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """One to be damaged."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def write(file: Path, content) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def refused(call, *says: str, seconds: float = 2.0, megabytes: int = 50) -> str:
    """The one line that this call ends with: each of `says` is in it."""
    if megabytes:
        tracemalloc.start()
    before = time.process_time()
    try:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (what it says is looked at below)
            call()
        assert time.process_time() - before < seconds
        assert tracemalloc.get_traced_memory()[1] < megabytes * 10**6 or not megabytes
    finally:
        tracemalloc.stop()
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert len(line) < 1000
    for part in says:
        assert part in line
    return line


def load(path: Path) -> Codec:
    return Codec.from_pretrained(path, prompt_format="chat")


def test_what_is_damaged_below_is_whole_before(made):
    assert Transformer.from_pretrained(made).config == ModelConfig.from_dict(VALID)
    assert load(made).render([{"role": "user", "content": "?"}]) == "user: ?<end>>"


# ----------------------------------------------------------------------------- config.json

NUMBERS = [name for name in model_file.LIMITS if name in VALID]
WHOLE = [name for name in NUMBERS if isinstance(VALID[name], int)]
NO_NUMBER = [-1, 10**13, 10**30, float("nan"), float("inf"), -float("inf"), True, "8", [8], {}, "x" * 10**5]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_beyond_reason_is_refused_by_key_and_value(key):
    for value in NO_NUMBER:
        refused(lambda value=value: ModelConfig.from_dict(VALID | {key: value}), f"config: {key} {repr(value)[:8]}")


@pytest.mark.parametrize("key", WHOLE)
def test_whole_numbers_are_neither_zero_nor_floats(key):
    for value in (0, 8.0, 1e3, 0.5):
        refused(lambda value=value: ModelConfig.from_dict(VALID | {key: value}), f"config: {key} {value}")


def test_a_billion_layers_are_refused_before_any_is_made(copied):
    write(copied / "config.json", VALID | {"num_hidden_layers": 10**9})
    refused(lambda: Transformer.from_pretrained(copied), str(copied / "config.json"), "num_hidden_layers 1000000000")


def test_heads_that_do_not_divide():
    absent = {key: value for key, value in VALID.items() if key not in ("head_dim", "num_key_value_heads")}
    refused(lambda: ModelConfig.from_dict(absent | {"num_attention_heads": 0}), "num_attention_heads 0")
    refused(lambda: ModelConfig.from_dict(absent | {"num_attention_heads": "2"}), "num_attention_heads '2'")
    refused(lambda: ModelConfig.from_dict(absent | {"num_attention_heads": 16}), "head_dim 0")
    refused(lambda: ModelConfig.from_dict(VALID | {"num_key_value_heads": 4}), "num_key_value_heads 4")
    refused(lambda: ModelConfig.from_dict(VALID | {"head_dim": 5}), "head_dim 5")


def test_numbers_just_outside_and_just_inside_their_limits():
    for key in NUMBERS:
        low, high = model_file.LIMITS[key]
        check_number(key, low, low, high)
        check_number(key, high, low, high)
        for value in (low - 1, high + 1 if isinstance(high, int) else high * 1.01):
            refused(lambda key=key, value=value: ModelConfig.from_dict(VALID | {key: value}), f"config: {key} ")


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        *(([], "rope_scaling"), ("linear", "rope_scaling"), (3, "rope_scaling"), (True, "rope_scaling")),
        ({"rope_type": ["linear"], "factor": 2.0}, "rope_type ['linear']"),
        ({"rope_type": {}, "factor": 2.0}, "rope_type {}"),
        *(({"rope_type": "linear", "factor": value}, f"factor {value!r}") for value in (0, -1.0, "2", True, [2], 1e99)),
        *(({"rope_type": "yarn", "factor": value}, f"factor {value}") for value in (float("nan"), float("inf"))),
        ({"rope_type": "linear", "factor": None}, "needs a factor"),
        *((LLAMA3 | {key: 0}, f"{key} 0") for key in LLAMA3 if key != "rope_type"),
        *((LLAMA3 | {key: "4"}, f"{key} '4'") for key in LLAMA3 if key != "rope_type"),
        (LLAMA3 | {"low_freq_factor": None}, "needs a low_freq_factor"),
        ({key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, "needs a low_freq_factor"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor 1.0"),
        (LLAMA3 | {"original_max_position_embeddings": 32.5}, "original_max_position_embeddings 32.5"),
        (YARN | {"beta_fast": float("nan")}, "beta_fast nan"),
        (YARN | {"beta_slow": -1}, "beta_slow -1"),
        (YARN | {"attention_factor": "x"}, "attention_factor 'x'"),
        (YARN | {"rope_theta": float("nan")}, "rope_theta nan"),
    ],
    ids=repr,
)
def test_a_stretching_that_cannot_be_is_refused_by_key_and_value(rope, says):
    refused(lambda: ModelConfig.from_dict(VALID | {"rope_scaling": rope}), "config: ", says)
    if rope:
        refused(lambda: ModelConfig.from_dict(VALID | {"rope_parameters": rope}), "config: ", says.split("_scaling")[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", value) for value in ("0", 1.0, True, [True], [0, "1"], [[0]], {}, -2, 10**30)),
        *(("bos_token_id", value) for value in ("0", 1.0, False, [0])),
        *(("pad_token_id", value) for value in ("0", [])),
        *(("layer_types", value) for value in ("full_attention", 3, {}, [["full_attention"]], [None], True)),
        *(("tie_word_embeddings", value) for value in (1, 0, "true", [])),
        *(("model_type", value) for value in (["llama"], {}, 7, "x" * 10**6)),
        *(("hidden_act", value) for value in (["silu"], 1, "x" * 10**6)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_of_another_type_is_refused_by_key_and_value(key, value):
    refused(lambda: ModelConfig.from_dict(VALID | {key: value}), f"config: {key}", repr(value)[:10])


def test_a_window_of_another_type_is_refused():
    for window in ("4096", [1], 63, True):
        changed = VALID | {"model_type": "mistral", "sliding_window": window}
        refused(lambda changed=changed: ModelConfig.from_dict(changed), f"sliding_window={window!r}")
    ModelConfig.from_dict(VALID | {"model_type": "mistral", "sliding_window": 64})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b"[" * 10**5, b'{"a":' * 10**5, b'{"vocab_size": ' + b"9" * 5000],
    ids=["empty", "cut off", "no text", "list", "null", "text", "deep list", "deep object", "digits"],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(name, content, copied):
    (copied / name).write_bytes(content)
    refused(lambda: load(copied), str(copied / name))
    if name == "config.json":
        refused(lambda: Transformer.from_pretrained(copied), str(copied / name))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"]
)
def test_a_file_of_enormous_size_is_not_read(name, copied):
    with (copied / name).open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    refused(lambda: load(copied), str(copied / name), str(2**40))
    if name == "config.json":
        refused(lambda: Transformer.from_pretrained(copied), str(copied / name), str(2**40))


@pytest.mark.parametrize(
    "shape",
    [
        # Llama 3.1 405B, Qwen2.5-7B-1M, and wider than any
        (128256, 16384, 53248, 126, 128, 8, 128, 131072),
        (152064, 3584, 18944, 28, 28, 4, 128, 1010000),
        (10**7, 10**6, 10**7, 4, 10**4, 10**4, 100, 10**9),
    ],
)
def test_a_large_shape_beside_small_weights_ends_in_a_comparison_of_shapes(shape, copied):
    keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    keys += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
    write(copied / "config.json", VALID | dict(zip(keys, shape, strict=True)) | {"rope_scaling": LLAMA3})
    refused(
        lambda: Transformer.from_pretrained(copied),
        "has shape",
        f"asks for [{shape[0]}, {shape[1]}]",
        seconds=20,
        megabytes=0,
    )


# ----------------------------------------------------------------------------- safetensors


def stored(path: Path, header: dict | bytes, content: bytes = b"", length: int | None = None) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + content)


def entry(dtype="F32", shape=(8,), begin=0, end=32) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "content", "length"),
    [
        ({}, b"", 2**63),
        ({}, b"", 2**40),
        ({}, b"", 99_000_000),
        ({NORM: entry()}, b"", None),
        ({NORM: entry()}, bytes(31), None),
        ({NORM: entry(), "x\ny": entry()}, bytes(32), None),
        ({NORM: entry(begin=2**62, end=2**62 + 32)}, bytes(32), None),
        ({NORM: entry(shape=(2**62, 2**62))}, bytes(32), None),
        ({NORM: entry(shape=(-8,))}, bytes(32), None),
        ({NORM: entry("F6_E2M3", shape=(16,), end=12)}, bytes(12), None),
        ({NORM: entry("P\nQ")}, bytes(32), None),
        (b"[" * 10**5, b"", None),
    ],
)
def test_weights_that_cannot_be_read_are_named(header, content, length, copied):
    stored(copied, header, content, length)
    refused(lambda: Transformer.from_pretrained(copied), str(copied / "model.safetensors"), "not a readable")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("I8", 8), ("U8", 8), ("I64", 64), ("BOOL", 8), ("C64", 64), ("F8_E4M3", 8), ("F8_E8M0", 8), ("F4", 8)],
)
def test_weights_that_are_no_plain_floats_are_refused_by_name(dtype, size, copied):
    stored(copied, {NORM: entry(dtype, shape=(16,) if dtype == "F4" else (8,), end=size)}, bytes(size))
    line = refused(lambda: Transformer.from_pretrained(copied), str(copied / "model.safetensors"), NORM)
    assert re.search("torch.(u?int|bool|complex|float[48])", line)


@pytest.mark.parametrize("shape", [(0,), (2**62, 0), (), (1, 8), (7,)])
def test_weights_of_another_shape_are_refused_by_name(shape, copied):
    size = 4 * int(torch.tensor(shape, dtype=torch.float64).prod())
    stored(copied, {NORM: entry(shape=shape, end=size)}, bytes(size))
    refused(lambda: Transformer.from_pretrained(copied), NORM, f"has shape {list(shape)}, but", "asks for [8]")


def test_a_foreign_name_does_not_make_the_line_long(copied):
    stored(copied, {"x\n" * 10**5: entry()}, bytes(32))
    refused(lambda: Transformer.from_pretrained(copied), str(copied / "model.safetensors"), "surplus tensor 'x\\nx")


def shards(path: Path, **files: dict) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for name, chosen in files.items():
        save_file(
            {key: chosen(key, tensors[key]) for key in tensors if chosen(key, tensors[key]) is not None}, path / name
        )
        weight_map |= {key: name for key in tensors if chosen(key, tensors[key]) is not None}
    write(path / "model.safetensors.index.json", {"weight_map": weight_map})


def test_a_shard_without_the_tensor_that_is_listed_for_it(copied):
    shards(copied, a=lambda key, t: t if key != NORM else None)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    write(copied / "model.safetensors.index.json", {"weight_map": index["weight_map"] | {NORM: "a"}})
    refused(lambda: Transformer.from_pretrained(copied), str(copied), "missing", NORM)


def test_two_shards_with_different_copies_of_a_tensor(copied):
    shards(copied, a=lambda key, t: t, b=lambda key, t: t + 1 if key == NORM else None)
    refused(lambda: Transformer.from_pretrained(copied), str(copied / "b"), f"second {NORM}")


NO_SHARD = ["../x", "/etc/hostname", "a/b", "..", ".", "", "gone", "x" * 10**4, "a\nb", "a\0b", "\ud800", "~", "C:\\x"]
NO_SHARD += [7, None, True, ["a"], {"a": 1}, 1.5]


@pytest.mark.parametrize("name", NO_SHARD, ids=lambda name: ascii(name)[:20])
def test_an_index_that_names_no_file_of_its_directory(name, copied):
    path = copied / "inner"
    path.mkdir()
    (copied / "model.safetensors").rename(path / "model.safetensors")
    shards(path, whole=lambda key, t: t)
    (copied / "x").write_bytes((path / "whole").read_bytes())  # a good one, where ../x would find it
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert NORM in [key for key, _, _ in model_file.read_tensors(path)]
    write(path / "model.safetensors.index.json", {"weight_map": index["weight_map"] | {NORM: name}})
    refused(lambda: [*model_file.read_tensors(path)], str(path / "model.safetensors.index.json"), repr(name)[:9])


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 10**5])
def test_an_invalid_index(content, copied):
    (copied / "model.safetensors").unlink()
    write(copied / "model.safetensors.index.json", content)
    refused(lambda: Transformer.from_pretrained(copied), str(copied / "model.safetensors.index.json"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt", "pytorch_model-00001.bin"])
def test_pickles_are_not_opened(name, copied):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(copied / "sprung"),)

    (copied / "model.safetensors").unlink()
    torch.save({NORM: Trap()}, copied / name)
    line = refused(lambda: Transformer.from_pretrained(copied), str(copied), name, "run code", "save_pretrained")
    assert "neither" not in line
    assert not (copied / "sprung").exists()


# ----------------------------------------------------------------------------- links


LINKED = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json"]
LINKED += ["model.safetensors", "chat_template.jinja"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_directory_is_refused(name, copied, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    good = copied / name
    outside.write_bytes(good.read_bytes() if good.is_file() else b"{}")
    good.unlink(missing_ok=True)
    good.symlink_to(outside)

    def both():
        Transformer.from_pretrained(copied)
        load(copied)

    refused(both, str(good), "link", str(outside))
    good.unlink()
    (copied / "here").write_bytes(outside.read_bytes())
    good.symlink_to("here")
    both()  # a link that stays inside is allowed


def test_a_link_that_leads_nowhere_or_in_circles_is_a_file_that_is_absent(copied):
    for target in ("nowhere", "config.json"):
        (copied / "config.json").unlink()
        (copied / "config.json").symlink_to(target)
        refused(lambda: Transformer.from_pretrained(copied), str(copied / "config.json"), "no such file")


def in_the_hubs_cache(cache: Path, checkpoint: Path) -> Path:
    model = cache / "models--owner--name"
    snapshot = model / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(checkpoint.iterdir()):
        (model / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hub_is_made_of_links_into_its_blobs(made, tmp_path):
    snapshot = in_the_hubs_cache(tmp_path, made)
    assert (snapshot / "config.json").is_symlink()
    assert Transformer.from_pretrained(snapshot).config == ModelConfig.from_dict(VALID)
    assert load(snapshot).stop_token_ids == (0,)
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (other / name).write_bytes((made / name).read_bytes())
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(other / name)
        refused(lambda: Transformer.from_pretrained(snapshot) and load(snapshot), str(snapshot / name), str(other))
        (snapshot / name).unlink()
        (snapshot / name).write_bytes((made / name).read_bytes())


def test_a_folder_that_is_only_called_snapshots_is_no_cache(made, tmp_path):
    snapshot = in_the_hubs_cache(tmp_path, made)
    (tmp_path / "models--owner--name").rename(tmp_path / "mine")
    snapshot = tmp_path / "mine" / "snapshots" / snapshot.name
    refused(lambda: Transformer.from_pretrained(snapshot), str(snapshot / "config.json"), "link")
    refused(lambda: load(snapshot), str(snapshot / "tokenizer.json"), "link")


# ----------------------------------------------------------------------------- tokenizer.json


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 1000, b"[" * 10**6, b'{"model":' * 10**5, b'{"model": {"type": "B\\nPE"}}', b'{"added_tokens": 3}'],
    ids=["empty", "zeros", "deep list", "deep object", "two lines", "no model"],
)
def test_a_tokenizer_file_that_is_none_is_named(content, copied):
    (copied / "tokenizer.json").write_bytes(content)
    refused(lambda: load(copied), str(copied / "tokenizer.json"), "not a tokenizer")


def test_tokens_of_another_type_are_named_and_cut_short(copied):
    deep = json.loads("[" * 300 + "]" * 300)
    for value in (7, ["<end>"], {"content": 7}, {"content": "x" * 10**6, "y": deep}, deep, [0] * 10**5):
        if isinstance(value, dict) and isinstance(value["content"], str):
            continue  # a text, however long
        write(copied / "tokenizer_config.json", {"eos_token": value})
        refused(lambda: load(copied), str(copied / "tokenizer_config.json"), "eos_token")
    write(copied / "tokenizer_config.json", {"eos_token": "\ud800"})
    refused(lambda: load(copied), str(copied / "tokenizer_config.json"), "surrogates not allowed")
    write(copied / "tokenizer_config.json", {})
    for value in ([deep], [0, "x" * 10**6], deep):
        write(copied / "generation_config.json", {"eos_token_id": value})
        refused(lambda: Codec.from_pretrained(copied), str(copied / "generation_config.json"), "eos_token_id")


# ----------------------------------------------------------------------------- chat templates

HERE = Path("tokenizer_config.json")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 6 times 7?"}]


def render(source: str, messages: list[dict] = MESSAGES) -> str:
    return ChatTemplate(source, {"eos_token": END}, HERE).render([messages], add_generation_prompt=True)[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ ['']|map(attribute='__class__.__mro__')|list }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__.os }}",
        "{{ lipsum.__globals__.os.popen('id') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ namespace(__class__=1).__class__.__mro__ }}",
        "{{ dict(__init__=1).__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment.x }}",
        "{{ self.__init__.__globals__ }}",
        "{% for m in messages %}{{ loop._iterator.gi_frame.f_back }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}",
        "{{ f._func.__globals__ }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.__class__.__base__ }}",
        "{{ (messages|tojson).__class__.__base__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{% from 'x' import y %}",
    ],
)
def test_a_template_has_no_way_out(source):
    line = refused(lambda: render(source), f"{HERE}: the chat template")
    assert "unsafe" in line or "undefined" in line or "no loader" in line or "no attribute" in line


# ----------------------------------------------------------------------------- anything at all

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [10**9, 10**30, -1, 0, 1, 2, 4, 8, 0.5, 1e300, "8", "llama", "yarn", "full_attention", "\ud800", "\n"]
    ),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
soon = settings(
    max_examples=100, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def changes(valid: dict, *more: str):
    """Some values of a valid object replaced by anything, and some keys taken away."""
    keys = st.sampled_from([*valid, *more])
    replaced = st.dictionaries(keys, ANYTHING, max_size=3)
    return st.tuples(replaced, st.lists(keys, max_size=2)).map(
        lambda both: {key: value for key, value in (valid | both[0]).items() if key not in both[1]}
    )


def works_or_names(call, *names: str) -> None:
    try:
        call()
    except ValueError as error:
        line = str(error)
        assert len(line.splitlines()) == 1
        assert len(line) < 1000
        assert any(name in line for name in names)


KEYS = ["rope_scaling", "rope_parameters", "layer_types", "sliding_window", "hidden_act", "pad_token_id", "mlp_bias"]


@soon
@given(changes(VALID, *KEYS))
def test_any_config_works_or_is_refused_in_one_line(content):
    names = [*VALID, *KEYS, *model_file.LIMITS, *model_file.FIXED_KEYS]
    works_or_names(lambda: ModelConfig.from_dict(content), *(f"config: {name}" for name in names), *names)


@soon
@given(st.sampled_from([LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}]).flatmap(lambda rope: changes(rope)))
@example(YARN | {"factor": 1e6, "beta_fast": 1e6})
@example(LLAMA3 | {"high_freq_factor": 1.0000001})
def test_any_stretching_has_finite_frequencies_or_is_refused(rope):
    def frequencies():
        found, factor = model_file.rope_frequencies(ModelConfig.from_dict(VALID | {"rope_scaling": rope}))
        assert found.isfinite().all()
        assert 0 < factor < 1e4

    works_or_names(frequencies, *model_file.LIMITS, "rope_")


@soon
@given(ANYTHING)
@example({})
@example("\ud800")
def test_any_config_file_works_or_is_named(made, tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "config.json"
    write(file, json.dumps(content))
    works_or_names(lambda: read_config(file.parent), str(file))


@soon
@given(changes({"weight_map": {NORM: "model.safetensors"}}), ANYTHING)
def test_any_index_works_or_is_named(made, tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp()
    for index in (content, {"weight_map": {NORM: name, "x": "y"}}):
        write(path / "model.safetensors.index.json", json.dumps(index))
        works_or_names(lambda: [*model_file.read_tensors(path)], str(path))


@settings(parent=soon, max_examples=40)
@given(
    changes({"eos_token": END, "chat_template": CHAT}, "bos_token", "added_tokens_decoder"),
    changes({"eos_token_id": [0]}, "temperature"),
    ANYTHING,
)
def test_any_settings_of_a_tokenizer_work_or_are_named(made, tmp_path_factory, named, generation, whole):
    path = tmp_path_factory.getbasetemp() / "settings"
    path.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_bytes((made / name).read_bytes())
    for file in ("tokenizer_config.json", "generation_config.json"):
        for content in (whole, {"tokenizer_config.json": named, "generation_config.json": generation}[file]):
            write(path / "tokenizer_config.json", named)
            write(path / "generation_config.json", generation)
            write(path / file, json.dumps(content))
            for kind in ("raw", "chat"):
                works_or_names(lambda kind=kind: Codec.from_pretrained(path, prompt_format=kind), str(path))


# ---- Tokenizers that do not load, or set lengths --------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["AAAA", "/////////////////////w=="])
def test_a_tokenizer_at_which_the_library_panics_is_one_line(tmp_path, rules):
    good = json.loads(data.tokenizer.train_tokenizer(["hello world"], 300).to_str())
    normalizer = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": rules}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(good | normalizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer that works \(Precompiled") as error:
        data.tokenizer.read_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    assert data.tokenizer.read_tokenizer(tmp_path / "tokenizer.json").encode("hello").ids


def test_a_tokenizer_whose_file_pads_or_truncates_works_and_does_neither(tmp_path, monkeypatch):
    tokenizer = data.tokenizer.train_tokenizer(["hello world"], 300)
    ids = tokenizer.encode("hello hello hello").ids
    tokenizer.enable_padding(length=2048, pad_id=77_777)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    assert data.tokenizer.read_tokenizer(Path("tokenizer.json")).encode("hello hello hello").ids == ids
