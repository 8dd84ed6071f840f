"""What a run checks before its first step: whether rewards can be earned, and what a template makes of the data."""

from __future__ import annotations

import json
import re

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing

import rollout
import sasr
from data.tokenizer import Codec
from model import ModelConfig, Transformer
from run.setup import Setup

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS.replace("END", "<|im_end|>")
WORKED = "<think>\n6 * 7 = 42\n</think>\n<answer>42</answer>"


def write_checkpoint(path, *, template="", special=(), plain=(), eos="<|endoftext|>", ends=True, around=""):
    """A random model whose tokenizer has a token a byte, and these added ones; `around`: what it puts around a text."""
    path.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", *special)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    if around:
        named = [(token, tokenizer.token_to_id(token)) for token in around.split() if token != "$A"]
        tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=named)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"chat_template": template} if template else {}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(eos or "<|endoftext|>") if ends else None
    Transformer(ModelConfig.small(size, 32, 1, 2, 512, end)).save_pretrained(path)
    return path


@pytest.fixture
def records(tmp_path):
    def write(*records, task="data"):
        (tmp_path / task).mkdir(exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        for split in ("train", "test"):
            (tmp_path / task / f"{split}.jsonl").write_text(lines)
        return str(tmp_path / task)

    return write


def record(demonstration=WORKED, answer="42", **more):
    return {"prompt": "What is 6 * 7?\n", "answer": answer, "demonstration": demonstration} | more


def setup(model, data, **changes):
    few = {"task": "jsonl", "prompt_format": "chat", "ood_task": "none", "warmup_steps": 1, "steps": 1, "device": "cpu"}
    return Setup(sasr.Config(**(few | {"model": str(model), "data": data} | changes)))


def run(*arguments):
    return sasr.main(["--device", "cpu", "--ood-task", "none", *map(str, arguments)])


# ---- Rewards that can be earned --------------------------------------------------------------------------------------


def test_special_tokens_that_the_model_writes_reach_the_verifier(tmp_path, records):
    """Tokenizers of reasoning models list <think> and <answer> as special, which usual decoding drops."""
    special = ("<think>", "</think>", "<answer>", "</answer>", "<|im_end|>")
    model = write_checkpoint(tmp_path / "model", template=CHATML, special=special)
    made = setup(model, records(record()))
    assert made.notes == []
    (_, completion), codec = made.task.demonstrations[0], made.codec
    assert codec.decode([completion]) == [WORKED]
    assert codec.decode([[codec.stop_token_ids[0]], []]) == ["", ""]
    inner = codec.encode("a<|im_end|>b<|im_start|>c")
    assert codec.decode([inner]) == ["a<|im_end|>b<|im_start|>c"]


def test_what_pads_a_completion_is_no_text_either(tmp_path):
    model = write_checkpoint(tmp_path, special=("<pad>",))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<pad>"}))
    codec = Codec.from_pretrained(model)
    pad, end = (codec.tokenizer.token_to_id(token) for token in ("<pad>", "<|endoftext|>"))
    assert codec.decode([[*codec.encode("ab"), end, pad, pad], codec.encode("<pad>ab")]) == ["ab", "<pad>ab"]


def test_a_run_that_could_earn_no_reward_is_refused_with_the_first_demonstration(tmp_path, records, capsys):
    data = records(record("It is 42."), record("It is 43.", "43"))
    for more in ((), ("--dry-run",)):
        out = tmp_path / "out"
        assert run("--task", "jsonl", "--data", data, "--out", out, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "task jsonl: not one of 2 demonstrations is graded as right, so no reward can be earned" in error
        assert "(answer '42') is 'It is 42.' when read back from its tokens (reward 0, another answer)" in error
        assert not out.exists()


def test_some_demonstrations_that_are_wrong_are_counted_and_one_is_shown(tmp_path, records, capsys):
    wrong = record("x" * 300 + "<answer>no</answer>")
    data = records(*[record()] * 97, wrong, *[record()] * 102, wrong)
    told = Setup(sasr.Config(task="jsonl", data=data, device="cpu")).notes
    assert len(told) == 1
    assert re.match(
        r"[12] of 64 demonstrations of jsonl are graded as wrong; the first \(answer '42'\) ends in '", told[0]
    )
    assert "<answer>no</answer>'" in told[0]
    assert run("--task", "jsonl", "--data", data, "--dry-run") == 0
    assert told[0] in capsys.readouterr().out


def test_demonstrations_from_all_over_the_file_are_tried(records):
    wrong = [record("no", "42")] * 150
    note = Setup(sasr.Config(task="jsonl", data=records(*wrong, *[record()] * 50), device="cpu")).notes[0]
    tried = int(note.partition(" ")[0])
    assert tried == 48  # three quarters of 64


def test_a_reward_of_the_user_is_not_called_to_try_the_demonstrations(tmp_path, records):
    calls = tmp_path / "calls"
    (tmp_path / "mine.py").write_text(
        f"def f(text, example):\n    open({str(calls)!r}, 'a').write('x')\n    return 0\n"
    )
    config = sasr.Config(task="jsonl", data=records(record("wrong")), reward=f"{tmp_path / 'mine.py'}:f", device="cpu")
    assert Setup(config).notes == []
    assert not calls.exists()


def test_an_evaluation_alone_asks_for_no_demonstrations_that_are_right(records):
    config = sasr.Config(task="jsonl", data=records(record("wrong")), warmup_steps=0, steps=0, device="cpu")
    assert Setup(config).notes == []


# ---- Templates and tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flagged", ["special", "plain"])
def test_what_ends_a_turn_in_the_template_ends_a_completion_however_it_is_flagged(flagged, tmp_path, records):
    model = write_checkpoint(tmp_path / "model", template=CHATML, **{flagged: ("<|im_end|>",)})
    made = setup(model, records(record()))
    turn, end = (made.codec.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert made.codec.stop_token_ids == (turn, end)
    assert made.task.demonstrations[0][1][-1] == turn
    assert made.notes == []


@pytest.mark.parametrize("ends", [True, False])
def test_an_end_of_turn_in_plain_text_ends_completions_as_a_sequence(ends, tmp_path, records, capsys):
    model = write_checkpoint(tmp_path / "model", template=TURNS.replace("END", "\n### End"), ends=ends, eos=None)
    made = setup(model, records(record()))
    codec = made.codec
    sequence = tuple(codec.encode("### End"))
    assert codec.stops["stop_sequences"] == (sequence,)
    (_, completion) = made.task.demonstrations[0]
    assert completion == [*codec.encode(WORKED + "\n"), *sequence]
    assert codec.decode([completion]) == [WORKED + "\n"]
    assert made.notes == ["the chat template ends a turn with the text '### End', 7 tokens: completions end there, too"]
    trainer = sasr.Trainer(made.config)
    assert trainer.sampling.stop_sequences == (sequence,)
    few = ("--warmup-steps", 1, "--steps", 1, "--max-new-tokens", 8, "--sft-batch-size", 2, "--prompts-per-step", 1)
    chat = ("--model", model, "--prompt-format", "chat", "--task", "jsonl", "--data", made.config.data)
    assert run(*few, *chat, "--out", tmp_path / "run") == 0
    assert made.notes[0] in capsys.readouterr().err


def test_a_streamed_answer_shows_nothing_of_an_end_in_plain_text(tmp_path, monkeypatch, capsys):
    model = write_checkpoint(tmp_path / "m", template=TURNS.replace("END", "### END"))
    codec = Codec.from_pretrained(model, prompt_format="chat")
    completion = [*codec.encode("42 # ##"), *codec.stop_sequence]

    def generate(*args, on_token, **kwargs):
        for length in range(1, len(completion) + 1):
            on_token([completion[:length]])
        return rollout.Rollout([completion], [[0.0] * len(completion)], [True], 1)

    monkeypatch.setattr(rollout, "generate", generate)
    params = rollout.SamplingParams(40, stop_sequences=(codec.stop_sequence,))
    messages = [{"role": "user", "content": "What is 6 * 7?"}]
    assert rollout.answer(None, codec, messages, params, None, 1) == ["42 # ##"]
    assert capsys.readouterr().out.startswith("42 # ##\n--- ")


def test_raw_prompts_end_in_no_stop_token_and_begin_with_one_bos(tmp_path, records):
    """Some tokenizers put EOS behind every text."""
    model = write_checkpoint(tmp_path / "m", special=("<s>", "</s>"), eos="</s>", around="<s> $A </s>")
    codec = Codec.from_pretrained(model)
    begin, end = (codec.tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    expected = theirs("Hello")["input_ids"]
    assert (expected[0], expected[-1]) == (begin, end)
    assert codec.encode("Hello") == codec.encode("<s>Hello") == expected[:-1]
    assert codec.encode("") == [begin]
    ((prompt, completion),) = codec.encode_demonstrations([("Hello", " you")])
    assert prompt == expected[:-1]
    assert completion == theirs(" you")["input_ids"][1:]


@pytest.mark.parametrize(
    ("before", "after"),
    [(" ", ""), (" ", " "), ("<think>\n\n</think>\n\n", ""), ("", "\n")],
    ids=["a space", "spaces", "an empty thought", "a line break"],
)
def test_the_target_is_what_the_template_writes_up_to_the_end_of_the_turn(before, after, tmp_path, records):
    message = (
        "{% if m.role == 'assistant' %}" + before + "{{ m.content }}" + after + "{% else %}{{ m.content }}{% endif %}"
    )
    template = CHATML.replace("{{ m.content }}", message)
    model = write_checkpoint(tmp_path / "m", template=template, special=("<|im_end|>",))
    made = setup(model, records(record()))
    prompt, completion = made.task.demonstrations[0]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), chat_template=template)
    turns = [{"role": "user", "content": "What is 6 * 7?\n"}, {"role": "assistant", "content": WORKED}]
    ids = theirs.apply_chat_template(turns, tokenize=True)["input_ids"]
    assert prompt + completion == ids[:-1]  # the line break behind the end of the turn is not the assistant's
    assert made.codec.decode([completion]) == [before + WORKED + after]
    assert made.notes == []


CUTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")  # as R1's, of turns that are past
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
SWITCH = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
SWITCHED = CHATML.replace("assistant\n{% endif %}", f"assistant\n{SWITCH}{{% endif %}}")


def test_a_demonstration_that_the_template_would_cut_is_learnt_as_it_is_and_a_line_says_so(tmp_path, records):
    model = write_checkpoint(tmp_path / "m", template=CUTS, special=("<|im_end|>",))
    made = setup(model, records(record(), record()))
    assert made.codec.decode([made.task.demonstrations[0][1]]) == [WORKED]
    assert made.task.demonstrations[0][1][-1] == made.codec.stop_token_ids[0]
    assert len(made.notes) == 1
    assert "the chat template cuts demonstrations" in made.notes[0]


def test_a_thought_that_the_template_itself_closes_is_no_thought_left_open(tmp_path, records):
    """Qwen3.5 writes an empty thought before an answer that brings none."""
    closes = OPENS.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    model = write_checkpoint(tmp_path / "m", template=closes, special=("<|im_end|>",))
    made = setup(model, records(record("<answer>42</answer>")))
    assert made.codec.decode([made.task.demonstrations[0][1]]) == ["<think>\n\n</think>\n\n<answer>42</answer>"]
    assert made.notes == []


def test_a_thought_that_the_prompt_opens_and_demonstrations_close_is_learnt_from_there(tmp_path, records):
    model = write_checkpoint(tmp_path / "m", template=OPENS, special=("<|im_end|>",))
    made = setup(model, records(record()))
    prompt, completion = made.task.demonstrations[0]
    decoded = made.codec.tokenizer.decode(prompt + completion, skip_special_tokens=False)
    assert decoded.endswith(f"<|im_start|>assistant\n{WORKED}<|im_end|>")
    assert made.codec.decode([completion]) == [WORKED]


@pytest.mark.parametrize("flagged", ["special", "plain"])
def test_an_empty_thought_that_the_prompt_brings_stands_before_what_is_read(flagged, tmp_path, records):
    filled = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
    added = {"special": ["<|im_end|>"], "plain": []}
    added[flagged] += ["<think>", "</think>"]
    made = setup(write_checkpoint(tmp_path / "m", template=filled, **added), records(record()))
    assert made.codec.opening == "<think>\n\n</think>\n\n"
    assert made.codec.decode([made.task.demonstrations[0][1]]) == [made.codec.opening + WORKED]


@pytest.mark.parametrize(
    ("template", "fix"),
    [(OPENS, "--prompt-format raw"), (SWITCHED, """--template-args '{"enable_thinking": false}'""")],
)
def test_a_thought_that_no_demonstration_closes_is_told_with_the_flag_that_helps(template, fix, tmp_path, records):
    model = write_checkpoint(tmp_path / "m", template=template, special=("<|im_end|>",))
    (tmp_path / "mine.py").write_text("def f(text, example):\n    return 0\n")
    made = setup(model, records(record("<answer>42</answer>")), reward=f"{tmp_path / 'mine.py'}:f")
    assert f"prompts open a <think> that demonstrations do not close; {fix} opens none" in made.notes


def test_a_thought_left_open_by_demonstrations_that_are_not_learnt_refuses_no_run(tmp_path, records):
    model = write_checkpoint(tmp_path / "m", template=OPENS, special=("<|im_end|>",))
    data = records(record("6 * 7 = 42.\n<answer>42</answer>"))
    assert setup(model, data, warmup_steps=0, controller="grpo").task.worked
    with pytest.raises(ValueError, match="not one of 1 demonstrations is graded as right"):
        setup(model, data, warmup_steps=1, controller="grpo")


def test_template_args_reach_the_template_and_are_kept(tmp_path, records, capsys):
    model = write_checkpoint(tmp_path / "m", template=SWITCHED, special=("<|im_end|>",))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), chat_template=SWITCHED)
    messages = [{"role": "user", "content": "What is 6 * 7?\n"}]
    texts = set()
    for text, values in (("", {}), ('{"enable_thinking": false}', {"enable_thinking": False})):
        codec = Codec.from_pretrained(model, prompt_format="chat", template_args=text)
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **values)
        assert codec.render(messages) == expected
        texts.add(expected)
    assert len(texts) == 2
    chat = (
        "--model",
        model,
        "--prompt-format",
        "chat",
        "--task",
        "jsonl",
        "--data",
        records(record("<answer>42</answer>")),
    )
    few = ("--warmup-steps", 1, "--steps", 0, "--max-new-tokens", 4, "--eval-examples", 1)
    assert run(*chat, *few, "--template-args", '{"enable_thinking": false}', "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["template_args"] == '{"enable_thinking": false}'
    samples = (tmp_path / "run/samples.jsonl").read_text()
    assert "<think>" not in samples


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', '{"messages": []}', '{"add_generation_prompt": false}', "\udc80"])
def test_bad_template_args_are_one_line_that_names_the_flag(text, tmp_path):
    model = write_checkpoint(tmp_path, template=CHATML, special=("<|im_end|>",))
    with pytest.raises(ValueError, match=r"^--template-args ") as error:
        Codec.from_pretrained(model, prompt_format="chat", template_args=text)
    assert "\n" not in str(error.value)


def test_template_args_need_a_template(tmp_path):
    model = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"--template-args .*: needs --prompt-format chat"):
        Codec.from_pretrained(model, template_args='{"x": 1}')
    with pytest.raises(ValueError, match="--template-args need --model"):
        Setup(sasr.Config(template_args='{"x": 1}', device="cpu"))


# ---- Which verifier --------------------------------------------------------------------------------------------------


def test_the_verifier_of_math_is_math_verify_where_it_is_installed(monkeypatch):
    assert sasr.Config(task="math").verifier == "math-verify"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert sasr.Config(task="math").verifier == "rules"
    for changes in ({"verifier": ""}, {"task": "math:verifier=rules"}, {"task": "gsm8k"}, {"reward": "x.py:f"}):
        assert sasr.Config(**({"task": "math"} | changes)).verifier == ""
    assert sasr.Config(task="math", verifier="math-verify").verifier == "math-verify"


def test_the_verifier_in_use_is_told_kept_and_resumed(tmp_path, monkeypatch, capsys):
    solved = {"problem": "What is 6 * 7?", "solution": "It is $\\boxed{42}$.", "level": "Level 1", "type": "Algebra"}
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"data/{split}.jsonl").write_text(json.dumps(solved) + "\n")
    few = ("--warmup-steps", 1, "--steps", 2, "--max-new-tokens", 4, "--hidden-size", 16, "--layers", 1, "--heads", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("--task", "math", "--data", tmp_path / "data", *few, "--out", tmp_path / "run") == 0
    monkeypatch.undo()
    assert "graded by rules" in capsys.readouterr().err
    for name in ("config.json", "summary.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["verifier"] == "rules"
    assert sasr.main(["--resume", str(tmp_path / "run"), "--verifier", "auto"]) == 2
    assert "--verifier math-verify: a resumed run keeps its 'rules'" in capsys.readouterr().err
