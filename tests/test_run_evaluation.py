"""What a pretrained checkpoint meets: grading it, training it, the presets, and the plan of its memory.

The references are transformers' own generate and loader on a tiny random Qwen2, extraction written out here, what
autograd really saves, and the size of a real process.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_sasr import ragged_batch, tiny_model, tokens_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data
import run.evaluation
import run.memory
import run.setup
import sasr
from baselines import Group
from data import Example, Grade, Task
from data.batch import Batch, micro_batches
from data.tokenized import TokenizedTask
from data.tokenizer import Codec
from model import ModelConfig, Transformer, completion_hidden
from rollout import Rollout
from run.checkpoint import save_model
from run.config import PRESETS
from run.evaluation import kl_to_reference
from run.memory import activation_bytes, attention_bias_bytes, memory_plan
from run.report import Progress, dropped_report, headline
from run.setup import Setup
from sasr import Config, Trainer

ROOT = Path(__file__).resolve().parents[1]

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")

QWEN2_WORDS = (  # transformers takes this one for every Qwen2, whatever its tokenizer.json says
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

# Flags that train for a moment.
FEW = {
    "ood_task": "none",
    "warmup_steps": 2,
    "steps": 3,
    "sft_batch_size": 2,
    "prompts_per_step": 2,
    "group_size": 3,
    "max_new_tokens": 8,
    "eval_examples": 4,
    "eval_every": 0,
    "device": "cpu",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More of them only wait for each other in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(**values):
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Qwen2 as transformers writes it, in bf16, that likes to say digits, ####, blanks and its end."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["#### 17 + 25 = 42\nWhat is the sum of 3 and 4?"] * 9, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(path)
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=ends,
        )
    )
    with torch.no_grad():
        for token in ("####", "Ġ", "Ċ", *"0123456789", "<|im_end|>"):
            model.lm_head.weight[tokenizer.token_to_id(token)] *= 2.5
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def thinking(checkpoint, tmp_path_factory):
    """The same checkpoint with a template that begins the answer itself."""
    path = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text(THINKING)
    return path


@pytest.fixture(scope="module")
def greedy_answer(checkpoint):
    """What transformers says to a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    @functools.cache
    def answer(prompt, prompt_format, new_tokens):
        ids = tokenizer(prompt, return_tensors="pt")
        if prompt_format == "chat":
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.no_grad():
            out = model.generate(ids["input_ids"], max_new_tokens=new_tokens, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def write_jsonl(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_jsonl(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_main(*arguments):
    assert sasr.main([*map(str, arguments)]) == 0


# ---- The same model on the same file ---------------------------------------------------------------------------------

QUESTIONS = [f"What is {a} + {b}? Bob has {a * b} more." for a, b in itertools.product((3, 17, 25), (4, 9, 30, 41))]


def last_number_of(text):
    found = re.findall(r"[0-9]+", text)
    return int(found[-1]) if found else None


def number_after_marker(text):
    """The one number on the line of the last ####, right behind it."""
    _, marker, after = text.rpartition("####")
    found = re.fullmatch(r"[ $*]*([0-9]+)[^0-9]*", after.split("\n")[0])
    return int(found[1]) if marker and found else None


def exact_records(answers):
    """A third of the records ask for what the model says anyway."""
    answer_texts = [text.strip() or "silence" for text in answers]
    return [
        {"prompt": q, "answer": text if i % 3 == 0 else "Paris"}
        for i, (q, text) in enumerate(zip(QUESTIONS, answer_texts, strict=True))
    ]


def numeric_records(answers):
    numbers = [last_number_of(text) for text in answers]
    return [
        {"prompt": q, "answer": n if i % 3 == 0 and n is not None else 987654}
        for i, (q, n) in enumerate(zip(QUESTIONS, numbers, strict=True))
    ]


TASKS = {
    "jsonl:verifier=exact": (exact_records, lambda text, record: text.strip() == record["answer"]),
    "jsonl:verifier=numeric": (numeric_records, lambda text, record: last_number_of(text) == record["answer"]),
}


def evaluate(tmp_path, *arguments):
    run_main("--eval-only", *arguments, *flags(ood_task="none", device="cpu", out=tmp_path / "out"))
    return json.loads((tmp_path / "out/summary.json").read_text()), read_jsonl(tmp_path / "out/samples.jsonl")


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("prompt_format", ["raw", "chat"])
@pytest.mark.parametrize("task", TASKS)
def test_a_score_is_what_a_script_on_transformers_computes(
    checkpoint, greedy_answer, tmp_path, capsys, task, prompt_format, split
):
    make_records, is_correct = TASKS[task]
    texts = [greedy_answer(question, prompt_format, 16) for question in QUESTIONS]
    records = make_records(texts)
    expected = [is_correct(text, record) for text, record in zip(texts, records, strict=True)]
    assert 2 <= sum(expected) < len(expected), "the case should show both"
    write_jsonl(tmp_path / f"data/{split}.jsonl", records)
    write_jsonl(tmp_path / f"data/{'train' if split == 'test' else 'test'}.jsonl", [{"prompt": "?", "answer": 1}])
    summary, samples = evaluate(
        tmp_path,
        *flags(model=checkpoint, task=task, data=tmp_path / "data", prompt_format=prompt_format, eval_split=split),
        *flags(max_new_tokens=16),
    )
    assert [sample["completion"] for sample in samples] == texts
    assert [sample["correct"] for sample in samples] == expected
    assert [sample["reward"] for sample in samples] == [float(correct) for correct in expected]
    assert [(s["split"], s["index"], s["sample"]) for s in samples] == [(split, i, 0) for i in range(12)]
    assert [sample["prompt"] for sample in samples] == QUESTIONS
    assert summary["accuracy"] == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]
    stdout = capsys.readouterr().out
    assert re.search(rf"^accuracy +{summary['accuracy']:.1%}   {summary['accuracy_low']:.1%} to", stdout, re.M)
    assert f"{task}, 12 {split} examples" in stdout
    assert str(tmp_path / "out") in stdout


def gsm8k_prompt(question):
    from data.gsm8k import INSTRUCTION

    return f"{question}\n{INSTRUCTION}\n"


def test_both_readings_of_gsm8k_are_what_a_script_on_transformers_computes(checkpoint, greedy_answer, tmp_path, capsys):
    questions = [f"{q} Ann has {i}." for i in range(2) for q in QUESTIONS]
    texts = [greedy_answer(gsm8k_prompt(question), "raw", 16) for question in questions]
    numbers = [(number_after_marker(text), last_number_of(text)) for text in texts]
    wanted = [(strict if i % 2 else last) or 5 for i, (strict, last) in enumerate(numbers)]
    wanted = [number if i % 3 else 987654 for i, number in enumerate(wanted)]
    records = [
        {"question": q, "answer": f"So <<1+1=2>>it is.\n#### {n:,}"} for q, n in zip(questions, wanted, strict=True)
    ]
    write_jsonl(tmp_path / "data/test.jsonl", records)
    strict, flexible = ([pair[k] == n for pair, n in zip(numbers, wanted, strict=True)] for k in (0, 1))
    assert 0 < sum(strict) < sum(flexible) < len(records), "the case should show all kinds"
    arguments = flags(model=checkpoint, task="gsm8k", data=tmp_path / "data", max_new_tokens=16)
    summary, samples = evaluate(tmp_path, *arguments)
    assert [sample["completion"] for sample in samples] == texts
    assert [sample["correct"] for sample in samples] == strict
    assert [sample["flexible"] for sample in samples] == flexible
    assert summary["accuracy"] == pytest.approx(sum(strict) / len(strict), abs=1e-12)
    assert summary["accuracy_flexible"] == pytest.approx(sum(flexible) / len(flexible), abs=1e-12)
    assert re.search(rf"^accuracy_flexible +{summary['accuracy_flexible']:.1%}$", capsys.readouterr().out, re.M)


def test_pass_at_k_can_be_computed_again_from_the_samples(checkpoint, tmp_path, capsys):
    write_jsonl(tmp_path / "data/test.jsonl", [{"prompt": q, "answer": i % 10} for i, q in enumerate(QUESTIONS)])
    summary, samples = evaluate(
        tmp_path,
        *flags(model=checkpoint, task="jsonl:verifier=numeric", data=tmp_path / "data", max_new_tokens=6),
        *flags(eval_samples=5, eval_examples=10),
    )
    assert len(samples) == 10 * (1 + 5)
    drawn = collections.defaultdict(list)
    for sample in samples:
        assert sample["correct"] == (last_number_of(sample["completion"]) == int(sample["answer"]))
        if sample["sample"]:  # 0 is the greedy one
            drawn[sample["index"]].append((sample["sample"], sample["correct"]))
    assert [number for number, _ in drawn[0]] == [1, 2, 3, 4, 5]
    stdout = capsys.readouterr().out
    for k in (1, 2, 4):
        chances = []
        for outcomes in drawn.values():
            subsets = list(itertools.combinations([correct for _, correct in outcomes], k))
            chances.append(sum(map(any, subsets)) / len(subsets))
        assert summary[f"pass@{k}"] == pytest.approx(sum(chances) / len(chances), abs=1e-9)
        assert re.search(rf"^pass@{k} +{summary[f'pass@{k}']:.1%}", stdout, re.M)
    assert "pass@8" not in summary
    assert 0 < summary["pass@1"] < summary["pass@4"], "the case should show some of each"
    completions = {s["completion"] for s in samples if s["index"] == 0 and s["sample"]}
    assert len(completions) > 1


def test_the_kl_to_the_reference_is_the_mean_over_the_completion_tokens():
    model, reference, batch = tiny_model(0), tiny_model(1), ragged_batch()
    total = 0.0
    for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
        p, q = (m.logits(m(torch.tensor([prompt + completion])))[0].log_softmax(-1) for m in (model, reference))
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        total += kl[len(prompt) - 1 : -1].sum().item()
    found = kl_to_reference(model, reference, batch, 30)
    assert found == pytest.approx(total / tokens_of(batch))
    assert kl_to_reference(model, model, batch, 2048) == pytest.approx(0, abs=1e-12)


# ---- What does not fit -----------------------------------------------------------------------------------------------


def byte_codec():
    return Codec.trained_on(["no merge is learnt from one short text"], 257)  # a token is a byte


def trainer_on(task, codec, monkeypatch, **changes):
    """A trainer of a small model on a task made here; a token is a byte."""
    monkeypatch.setattr(run.setup, "load_tasks", lambda config: (task, task, []))
    monkeypatch.setattr(run.setup.Codec, "trained_on", lambda texts, size: codec)
    few = {"hidden_size": 16, "layers": 1, "heads": 1, "warmup_steps": 0, "controller": "grpo"}
    return Trainer(Config(**(FEW | few | changes)))


def rewards_of(trainer, completions, chosen):
    groups = [Group(i, trainer.task.train_prompts[i], [], None) for i in chosen]
    sasr.add_samples(trainer, groups, completions, [[0.0] * len(ids) for ids in completions], [True] * len(completions))
    return torch.tensor([group.rewards() for group in groups])


def echo_task():
    """Right is a completion that names the first letter of the prompt; every other prompt is long."""
    letters = "abcdef"
    train = [
        Example(letter * (40 if i % 2 else 10), letter, "d" * (30 if i == 2 else 4)) for i, letter in enumerate(letters)
    ]
    test = [Example("x" * size, "") for size in (10, 40, 10, 41)]

    def verify(text, example):
        if not example.answer:  # of the test split: whatever has a letter; nothing at all is half as good as wrong
            return Grade(1.0 if text else -0.5, correct=bool(text), well_formed=bool(text))
        right = text in (example.answer, example.demonstration)
        return Grade(float(right), correct=right, well_formed=True)

    return Task("echo", train, test, verify)


def test_many_samples_are_drawn_a_few_at_a_time_and_stay_with_their_prompt(monkeypatch):
    monkeypatch.setattr(run.evaluation, "EVAL_ROWS", 3)
    trainer = trainer_on(echo_task(), byte_codec(), monkeypatch, max_prompt_tokens=20, eval_samples=7)
    sizes = []

    def generate(model, prompts, params, group_size=1, **_):
        sizes.append(group_size)
        return Rollout([[70 + len(sizes), *prompt[:1]] for prompt in prompts for _ in range(group_size)], [], [])

    monkeypatch.setattr(run.parallel, "generate", generate)
    run.evaluation.evaluate(trainer)
    assert sizes == [1, 3, 3, 1, 3, 3, 1]  # greedy answers to both prompts that fit, then 7 samples to each
    assert [sum(answer["index"] == i for answer in trainer.answers) for i in range(4)] == [8] * 4


def test_rewards_go_to_the_example_of_their_prompt_although_some_were_dropped(monkeypatch):
    codec = byte_codec()
    trainer = trainer_on(echo_task(), codec, monkeypatch, max_prompt_tokens=20)
    assert [example.answer for example in trainer.task.train] == ["a", "c", "e"]
    for prompt, example in zip(trainer.task.train_prompts, trainer.task.train, strict=True):
        assert codec.decode([prompt]) == [example.prompt]
    completions = [[*codec.encode(letter), *codec.stop_token_ids] for letter in ("c", "a", "e", "c", "e", "a")]
    rewards = rewards_of(trainer, completions, [1, 2])  # of the prompts c and e, three completions each
    assert rewards.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_each_kind_of_loss_is_told(monkeypatch):
    limits = {"max_prompt_tokens": 20, "max_demonstration_tokens": 8, "eval_examples": 3}
    trainer = trainer_on(echo_task(), byte_codec(), monkeypatch, **limits)
    assert dropped_report(trainer) == [
        "dropped 3 prompts of echo that are too long",
        "dropped 4 demonstrations of echo that are too long, or whose prompts are",
        "1 test prompts are too long and count as wrong answers",
    ]
    assert "dropped 3 prompts of echo" in headline(trainer, Path("x"))
    limits["eval_examples"] = 4
    assert (
        "2 test prompts are too long"
        in dropped_report(trainer_on(echo_task(), byte_codec(), monkeypatch, **limits))[-1]
    )
    assert dropped_report(trainer_on(echo_task(), byte_codec(), monkeypatch)) == []


def test_prompts_that_do_not_fit_are_wrong_answers_whatever_the_verifier_says(monkeypatch):
    trainer = trainer_on(echo_task(), byte_codec(), monkeypatch, max_prompt_tokens=20, eval_samples=2)
    monkeypatch.setattr(
        run.parallel,
        "generate",
        lambda model, prompts, params, group_size=1, **_: Rollout([[70]] * len(prompts) * group_size, [], []),
    )
    scores = run.evaluation.evaluate(trainer)
    assert scores["accuracy"] == scores["pass@1"] == scores["pass@2"] == 0.5
    found = [(a["index"], a["sample"], bool(a["completion"]), a["reward"], a["correct"]) for a in trainer.answers]
    fits = {0: True, 1: False, 2: True, 3: False}
    expected = [(i, s, fits[i], 1.0 if fits[i] else 0.0, fits[i]) for i in range(4) for s in (0, 1, 2)]
    assert found == expected


def test_an_evaluation_in_which_no_prompt_fits_is_refused(monkeypatch):
    task = dataclasses.replace(echo_task(), test=[Example("x" * 40, ""), Example("x", "")])
    reason = "all 1 prompts to evaluate are too long (20 allowed beside 8 new)"
    with pytest.raises(ValueError, match=re.escape(reason)):
        trainer_on(task, byte_codec(), monkeypatch, max_prompt_tokens=20, eval_examples=1)
    trainer = trainer_on(task, byte_codec(), monkeypatch, max_prompt_tokens=20)
    assert run.evaluation.evaluate(trainer)["accuracy"] < 1


def test_an_out_of_domain_task_without_examples_is_not_scored(monkeypatch):
    trainer = trainer_on(echo_task(), byte_codec(), monkeypatch)
    trainer.ood_tasks = {"_ood": TokenizedTask(dataclasses.replace(echo_task(), test=[]), trainer.codec)}
    scores = run.evaluation.evaluate(trainer)
    assert "accuracy" in scores
    assert not any(name.endswith("_ood") for name in scores)


# ---- Training it -----------------------------------------------------------------------------------------------------


def demonstrated(count=6):
    return [
        {"prompt": q, "answer": i, "demonstration": f"It is <answer>{i}</answer>"}
        for i, q in enumerate(QUESTIONS[:count])
    ]


@pytest.fixture
def records(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", demonstrated())
    return tmp_path / "data"


def test_a_checkpoint_is_trained_from_the_command_line_and_resumed(checkpoint, records, tmp_path, capsys, monkeypatch):
    lines = []
    original = Progress.say
    monkeypatch.setattr(Progress, "say", lambda self, text: (lines.append(text), original(self, text)))
    (records / "train.jsonl").write_text((records / "train.jsonl").read_text() + '{"prompt": "no answer"}\n')
    reward = tmp_path / "mine.py"
    reward.write_text("def by_length(completion, example):\n    return 10 + len(completion) % 3 / 4\n")
    values = FEW | {
        "model": checkpoint,
        "prompt_format": "chat",
        "task": "jsonl",
        "data": records,
        "out": tmp_path / "x",
    }
    values |= {"reward": f"{reward}:by_length", "controller": "alternate", "alternate": "0:1", "decay_fraction": 0.0}
    assert sasr.main(flags(**values)) == 2
    assert "train.jsonl:7: the record lacks the field 'answer'" in capsys.readouterr().err
    run_main(*flags(**values), "--skip-bad-lines")
    told = "\n".join(lines)
    assert re.search(r"^skipped 1 bad record\(s\), the first: .*train.jsonl:7: ", told, re.M)
    assert f"rewards come from {reward}:by_length, which is run as a program" in told
    assert "6 training prompts, 6 with a demonstration" in told
    metrics = read_jsonl(tmp_path / "x/metrics.jsonl")
    assert [record["kind"] for record in metrics] == ["sft"] * 2 + ["grpo"] * 3
    assert all(10 <= record["reward_mean"] <= 10.5 for record in metrics[2:])
    assert any(record["grad_norm"] > 0 for record in metrics[2:])
    samples = read_jsonl(tmp_path / "x/samples.jsonl")
    assert all(sample["reward"] == 10 + len(sample["completion"]) % 3 / 4 for sample in samples)
    run_main("--resume", tmp_path / "x", "--steps", 4)
    assert [record["step"] for record in read_jsonl(tmp_path / "x/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("save_dtype", "expected"),
    [("same", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_trained_checkpoint_is_saved_in_the_type_that_was_asked_for(
    checkpoint, records, tmp_path, save_dtype, expected
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = Config(**FEW | {"model": str(checkpoint), "task": "jsonl", "data": str(records), "save_dtype": save_dtype})
    trainer = Trainer(dataclasses.replace(config, prompt_format="chat"))
    trainer.step()
    save_model(trainer, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert model.dtype == expected
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == TEMPLATE
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert ids == trainer.codec.encode_prompts([QUESTIONS[0]])[0]
    with torch.no_grad():
        wanted = trainer.model.logits(trainer.model(torch.tensor([ids])))
        got = model.float()(torch.tensor([ids])).logits
    scale = wanted.abs().max().item()
    difference = (got - wanted).abs().max().item() / scale
    coarsest = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
    assert difference < coarsest[expected]
    stored = Transformer.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = stored.logits(stored(torch.tensor([ids])))
    torch.testing.assert_close(got, again, rtol=1e-4, atol=1e-4 * scale)


def test_a_model_from_scratch_is_saved_in_fp32_unless_asked_otherwise(tmp_path):
    small = FEW | {"hidden_size": 16, "layers": 1, "heads": 1, "task": "countdown:train_size=8,test_size=2"}
    for kind, expected in (("same", torch.float32), ("bfloat16", torch.bfloat16)):
        trainer = Trainer(Config(**small, save_dtype=kind))
        save_model(trainer, tmp_path / kind)
        assert {t.dtype for t in load_file(tmp_path / kind / "model.safetensors").values()} == {expected}


def test_what_the_template_opens_belongs_to_the_answer(thinking, records, tmp_path):
    summary, samples = evaluate(
        tmp_path,
        *flags(model=thinking, prompt_format="chat", task="jsonl", data=records, max_new_tokens=4, eval_examples=3),
    )
    assert len(samples) == 3
    for sample in samples:
        assert sample["completion"].startswith("<think>\n")
        assert sample["completion"].count("<think>") == 1
    assert "accuracy" in summary


@pytest.mark.parametrize(("opened", "reward"), [(True, 3.0), (False, -3.0)])
def test_logic_rl_gives_full_marks_to_a_model_whose_thinking_was_opened_for_it(checkpoint, thinking, opened, reward):
    task = "knights-knaves:wording=natural,format=logic-rl,train_size=4,test_size=2"
    model = thinking if opened else checkpoint
    config = FEW | {"model": str(model), "prompt_format": "chat", "task": task, "group_size": 2}
    trainer = Trainer(Config(**config))
    right, other = trainer.task.train[1], trainer.task.train[2]

    def completion(answer):
        text = f"Let us see.\n</think>\n<answer>\n{answer}\n</answer>"
        return [*trainer.codec.encode(text), trainer.codec.stop_token_ids[0]]

    wrong = right.answer.replace("knight", "k").replace("knave", "knight").replace("a k\n", "a knave\n")
    wrong = wrong if not wrong.endswith("a k") else wrong[:-1] + "knave"
    completions = [completion(right.answer), completion(wrong), completion(other.answer), trainer.codec.encode("none")]
    rewards = rewards_of(trainer, completions, [1, 2])
    assert rewards[0, 0] == rewards[1, 0] == reward
    assert rewards[0, 1] == (-0.5 if opened else -3.0)
    assert rewards[1, 1] == -3.0
    # A demonstration is learnt without what already stands in the prompt.
    prompt, learnt = trainer.task.demonstrations[1]
    whole = trainer.codec.tokenizer.decode(prompt + learnt, skip_special_tokens=False)
    assert whole.count("<think>\n") == 1 + right.prompt.count("<think>\n")
    assert trainer.task.source.grade(trainer.codec.decode([learnt])[0], right).reward == 3.0


# ---- Presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration(name):
    values = PRESETS[name]
    assert set(values) <= {spec.name for spec in dataclasses.fields(Config)}
    config = Config(**values)
    for key, value in values.items():
        assert getattr(config, key) == value
    assert config.task.partition(":")[0] in data.TASKS
    assert bool(config.model) == (config.prompt_format == "chat") == bool(config.data)


def configurations(monkeypatch):
    """Collects what main would have trained, without doing so."""
    seen = []

    def train(config):
        seen.append(config)
        raise ValueError("enough")

    monkeypatch.setattr(sasr, "train", train)
    return seen


def test_explicit_flags_override_a_preset(monkeypatch):
    seen = configurations(monkeypatch)
    sasr.main(["--preset", "gsm8k"])
    sasr.main(["--preset", "gsm8k", "--lr", "3e-5", "--no-gradient-checkpointing", "--model", "x"])
    sasr.main(["--lr", "3e-5", "--preset", "gsm8k", "--no-gradient-checkpointing", "--model", "x"])
    plain, first, second = seen
    assert plain == Config(**PRESETS["gsm8k"])
    assert first == second
    assert first == dataclasses.replace(plain, lr=3e-5, gradient_checkpointing=False, model="x")


def test_with_adapters_the_rates_of_a_preset_are_ten_times_as_large(monkeypatch):
    seen = configurations(monkeypatch)
    for more in ([], ["--lora-rank", "32"], ["--lora-rank", "32", "--lr", "3e-5"]):
        sasr.main(["--preset", "gsm8k", *more])
    rates = [[config.warmup_lr, config.sft_lr, config.lr] for config in seen]
    assert rates == [[1e-5, 1e-5, 1e-6], [1e-4, 1e-4, pytest.approx(1e-5)], [1e-4, 1e-4, 3e-5]]


def test_without_a_preset_the_defaults_hold(monkeypatch):
    seen = configurations(monkeypatch)
    sasr.main([])
    sasr.main(["--preset", "kk-tiny"])
    sasr.main(["--preset", "countdown-tiny"])
    assert seen == [Config(), Config(), Config(**PRESETS["countdown-tiny"])]


def test_a_preset_takes_a_step_on_ones_own_folder_and_model(checkpoint, tmp_path, capsys):
    records = [{"question": q, "answer": f"Add.\n#### {i}"} for i, q in enumerate(QUESTIONS)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", records)
    quick = {"steps": 1, "warmup_steps": 1, "max_new_tokens": 6, "eval_examples": 2, "sft_batch_size": 2}
    run_main(
        "--preset", "gsm8k", *flags(data=tmp_path / "data", model=checkpoint, device="cpu", out=tmp_path / "x", **quick)
    )
    assert len(read_jsonl(tmp_path / "x/metrics.jsonl")) == 2
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert (config["prompt_format"], config["kl_coef"], config["steps"]) == ("chat", 0.001, 1)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "source"),
    [("gsm8k", "openai/grade-school-math"), ("math", "hendrycks/math"), ("kk", "huggingface.co|Hugging Face")],
)
def test_a_preset_without_its_records_says_where_they_are_published(tmp_path, monkeypatch, capsys, preset, source):
    monkeypatch.chdir(tmp_path)
    assert sasr.main(["--preset", preset, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"sasr.py: {PRESETS[preset]['data']}: no such folder; it should have train.jsonl")
    assert re.search(source, err)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_takes_no_preset(tmp_path, capsys):
    assert sasr.main(["--resume", str(tmp_path), "--preset", "gsm8k"]) == 2
    err = capsys.readouterr().err
    assert err == "sasr.py: --preset gsm8k: a resumed run keeps its values; name the flags to change\n"


def test_an_unknown_preset_is_named_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as end:
        sasr.main(["--preset", "gsm9k"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "gsm9k" in err
    assert all(name in err for name in PRESETS)


GROUPS = {spec.metadata["group"] for spec in dataclasses.fields(Config)} - {""}  # of flags


def test_help_fits_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        sasr.main(["--help"])
    assert end.value.code == 0
    stdout = capsys.readouterr().out
    assert max(map(len, stdout.splitlines())) <= 80
    for word in ("--preset", "--dry-run", "--eval-only", "--resume", *PRESETS, *GROUPS):
        assert word in stdout


# ---- The plan of its memory ------------------------------------------------------------------------------------------


def shape_only(checkpoint, folder, **changes):
    """A checkpoint directory with tokenizer and configuration, and no weights."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_dry_run_says_what_is_needed_and_touches_nothing(checkpoint, records, tmp_path, monkeypatch, capsys):
    weightless = shape_only(checkpoint, tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    values = FEW | {"model": weightless, "task": "jsonl", "data": records}
    run_main("--dry-run", *flags(**values))
    captured = capsys.readouterr()
    assert captured.err == ""
    plan = memory_plan(Setup(Config(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()})))
    for name, size in plan.items():
        assert re.search(rf"^{name} +{size / 1e9:.2f}$", captured.out, re.M)
    assert re.search(r"^fits into the [0-9.]+ GB that are free now$", captured.out, re.M)
    assert "completions of up to 8; 2048 tokens a micro-batch" in captured.out
    assert not list((tmp_path / "here").iterdir())
    monkeypatch.setattr(run.memory, "free_memory", lambda device: 1000.0)
    run_main("--dry-run", *flags(**values))
    refused = capsys.readouterr().out
    assert "does NOT fit into the 0.0 GB" in refused
    assert "--gradient-checkpointing" in refused
    assert sasr.main(flags(**values, out=tmp_path / "x")) == 2, "training does need the weights"


def test_a_dry_run_reports_bad_input_like_a_run(capsys):
    assert sasr.main(["--dry-run", "--model", "no/such/model"]) == 2
    assert capsys.readouterr().err.startswith("sasr.py: --model no/such/model: no such directory")


QWEN = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
QWEN_REST = {
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
QWEN_PARAMETERS = {"0.5B": 494_032_768, "1.5B": 1_543_714_304}  # as published with their weights


def cuda_plan(model, data, **changes):
    values = {"task": "jsonl", "data": str(data), "model": str(model), "ood_task": "none", "max_new_tokens": 512}
    values |= {"prompts_per_step": 8, "group_size": 8, "kl_coef": 0.001, "device": "cpu"}
    values |= {"gradient_checkpointing": True, "offload_reference": True} | changes
    setup = Setup(Config(**values))
    setup.device = torch.device("cuda")
    return memory_plan(setup)


@pytest.fixture
def long_records(tmp_path):
    records = [{"prompt": "p" * 200, "answer": "d" * 300, "demonstration": "d" * 300}] * 10
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"long/{split}.jsonl", records)
    return tmp_path / "long"


@pytest.mark.parametrize(("size", "card"), [("0.5B", 16e9), ("1.5B", 40e9)])
def test_the_plan_of_published_models_fits_the_cards_that_train_them(checkpoint, long_records, tmp_path, size, card):
    model = shape_only(checkpoint, tmp_path / size, **QWEN[size], **QWEN_REST)
    plan = cuda_plan(model, long_records)
    parameters = QWEN_PARAMETERS[size]
    assert plan["weights"] == plan["gradients"] == 4 * parameters
    assert plan["optimizer"] == 8 * parameters
    assert plan["sampler's copy"] == 2 * parameters
    assert plan["reference"] == 0
    assert 18 * parameters < plan["peak"] < card
    peak = plan.pop("peak")
    assert peak <= sum(plan.values())
    assert cuda_plan(model, long_records, offload_reference=False)["reference"] == 2 * parameters


def test_what_asks_for_more_is_not_planned_with_less(checkpoint, long_records, tmp_path):
    model = shape_only(checkpoint, tmp_path / "model", **QWEN["0.5B"], **QWEN_REST)
    least = cuda_plan(model, long_records)["peak"]
    for changes in (
        {"max_new_tokens": 1024},
        {"gradient_checkpointing": False},
        {"group_size": 16},
        {"prompts_per_step": 16},
        {"offload_reference": False},
        {"tokens_per_microbatch": 32768},
    ):
        assert cuda_plan(model, long_records, **changes)["peak"] > least, changes
    for changes in ({"tokens_per_microbatch": 2048}, {"rollout_memory": 0.1}, {"max_new_tokens": 256}):
        assert cuda_plan(model, long_records, **changes)["peak"] < least, changes
    for changes in ({"kl_coef": 0.0}, {"sft_batch_size": 1}):
        assert cuda_plan(model, long_records, **changes)["peak"] <= least, changes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_cuda_the_plan_has_the_copies_in_bf16_that_autocast_keeps_while_it_reads(checkpointing):
    shape = ModelConfig(99, 64, 160, 5, 4, 2, 24, 512, tie_word_embeddings=True)
    matrices = {n: p.numel() for n, p in Transformer(shape).named_parameters() if p.dim() == 2}
    head = matrices.pop("model.embed_tokens.weight")
    planned = activation_bytes(shape, 1, checkpointing, cuda=True)
    assert planned > 2 * sum(matrices.values()) + (2 + 4) * head  # and the gradient of the head in fp32


def saved_bytes(shape, batch, time, checkpointing):
    """Bytes of the distinct storages that autograd keeps of a forward pass, parameters aside."""
    model = Transformer(shape)
    model.gradient_checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # the tensors too: a storage that is freed would lend its address to another

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(torch.zeros(batch, time, dtype=torch.long))
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("key_values", [1, 4])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_each_layer_saves_what_the_plan_says(kind, key_values, checkpointing):
    def shape(layers):
        return ModelConfig(99, 64, 160, layers, 4, key_values, 24, 512, model_type=kind, tie_word_embeddings=True)

    for batch, time in ((2, 32), (3, 96)):
        measured, planned = (
            (of(5) - of(2)) / 3
            for of in (
                lambda n, size=(batch, time): saved_bytes(shape(n), *size, checkpointing),
                lambda n, tokens=batch * time: activation_bytes(shape(n), tokens, checkpointing, cuda=False),
            )
        )
        assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("prompt", [3, 9])
def test_the_bias_that_all_layers_share_is_as_large_as_planned(prompt, monkeypatch):
    shape, rows, time = ModelConfig(99, 64, 160, 3, 4, 2, 24, 512), 6, 5
    used, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: used.append(k.get("attn_mask")) or original(*a, **k)
    )
    completions = [[1] * (time + 1)] * rows  # the last token is not read
    (micro,) = micro_batches(Batch([[2] * prompt] * rows, completions), 1000, torch.device("cpu"))
    completion_hidden(Transformer(shape), micro)
    storages = {bias.untyped_storage().data_ptr(): bias.untyped_storage().nbytes() for bias in used if bias is not None}
    assert list(storages.values()) == [attention_bias_bytes(shape, rows * time, prompt + time, cuda=False)]
    assert attention_bias_bytes(shape, rows * time, prompt + time, cuda=True) == sum(storages.values()) / 2


def planned_and_measured(**changes):
    """Peak of memory_plan, and how much a process grew that took a step of each kind, in bytes."""
    code = """
import dataclasses, itertools, json, sys
import torch, torch._dynamo  # the optimizer would import it, hundreds of modules, within what is measured
import sasr
from data import Grade
from run.memory import memory_plan
from run.setup import Setup


def resident(field):
    with open("/proc/self/status") as file:  # not ru_maxrss, which a process inherits from the one that started it
        return 1024 * int(next(line.split()[1] for line in file if line.startswith(field)))

config = sasr.Config(**json.loads(sys.argv[1]))
plan = memory_plan(Setup(config))["peak"]
before = resident("VmRSS")
trainer = sasr.Trainer(config)
rewards = itertools.cycle(range(64))  # an untrained model solves nothing


def verify(text, example):
    return Grade(float(next(rewards)), correct=False, well_formed=False)


trainer.task.source = dataclasses.replace(trainer.task.source, verify=verify)
trainer.state.finish_step(trainer.step(), 0.0)
record = {"kind": "grpo"}
sasr.grpo_step(trainer, record, 1)
assert record["grad_norm"] > 0
sasr.sft_step(trainer, record)  # beside the cache that the rollout leaves
print(plan, resident("VmHWM") - before)
"""
    values = {"task": "countdown:train_size=200,test_size=8", "ood_task": "none", "eval_every": 0, "device": "cpu"}
    values |= {"controller": "alternate", "warmup_steps": 1, "steps": 2} | changes
    # What is freed goes back to the system at once: the plan counts what is asked for, not what malloc keeps of it.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-c", code, json.dumps(values)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(map(float, done.stdout.split()))


LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")


@LINUX
@pytest.mark.nightly
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_process_grows_as_planned(checkpointing):
    shape = {"hidden_size": 512, "layers": 8, "heads": 8}
    planned, measured = planned_and_measured(**shape, gradient_checkpointing=checkpointing)
    assert measured == pytest.approx(planned, rel=0.2)


@LINUX
@pytest.mark.nightly
def test_a_small_process_grows_as_planned():
    planned, measured = planned_and_measured(hidden_size=128, layers=8, heads=4, max_new_tokens=4)
    assert measured == pytest.approx(planned, rel=0.2)
