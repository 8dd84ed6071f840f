"""MATH: its verifier, its records and the published test subset."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

from data import competition_math, latex, load_task
from data.task import Example, Grade

SHARED = Path(__file__).resolve().parents[2] / "shared/data/math500"
EXAMPLE = Example("", r"\frac{1}{2}")

CORRECT = Grade(1.0, correct=True, well_formed=True)
WRONG = Grade(0.0, correct=False, well_formed=True)
MALFORMED = Grade(0.0, correct=False, well_formed=False)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"The sum is \boxed{\frac12}.", CORRECT),
        (r"\boxed{3} no, \boxed{0.5}", CORRECT),
        (r"\boxed{0.5} no, \boxed{3}", WRONG),
        (r"\boxed{0.5", MALFORMED),
        ("0.5", MALFORMED),
        (r"\boxed{}", MALFORMED),
        (r"\boxed{?}", WRONG),
        (r"<think>It is \boxed{0.5}, or", MALFORMED),
        (r"<think>It is \boxed{3}</think> \boxed{0.5}", CORRECT),
        (r"\boxed{__import__('os').system('true')}", WRONG),
        ("\\boxed{\ud800}", WRONG),
        ("\\boxed{\x00}", WRONG),
        ("\\boxed{\uff11/\uff12}", CORRECT),  # fullwidth digits, as in Chinese text
        ("\\boxed{\u00b2}", WRONG),
    ],
)
def test_grade(completion, expected):
    assert competition_math.grade(completion, EXAMPLE) == expected


# --- published records ---

RECORD = {
    "problem": r"What is $\frac14+\frac14$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": r"Not $\boxed{\frac{2}{8}}$, so the sum is $\boxed{\frac{1}{2}}$.",
}


def write(folder: Path, records: list) -> Path:
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_records_keep_order_and_text(tmp_path):
    later = {"problem": "One?\n", "solution": r"\boxed 1$", "answer": "1", "subject": "Algebra", "level": 5}
    task = load_task("math", write(tmp_path, [RECORD, later, {k: RECORD[k] for k in ("problem", "solution")}]))
    prompt = f"{RECORD['problem']}\n{competition_math.INSTRUCTION}\n"
    first = Example(prompt, r"\frac{1}{2}", RECORD["solution"], "Level 1")
    assert task.test == [
        first,
        Example(f"One?\n{competition_math.INSTRUCTION}\n", "1", r"\boxed 1$", "Level 5"),
        Example(prompt, r"\frac{1}{2}", RECORD["solution"], ""),
    ]
    assert task.train == []
    assert task.grade(RECORD["solution"], first) == CORRECT
    assert task.grade(RECORD["solution"].split(",")[0], first) == WRONG


def test_the_docstring_shows_the_prompt():
    lines = [line.strip() for line in competition_math.__doc__.split("\n")]
    prompt = competition_math.parse_record(RECORD).prompt
    assert f"prompt         {RECORD['problem']}" in lines
    assert prompt.endswith("\n")
    assert competition_math.INSTRUCTION in lines


def test_the_tree_of_files_of_the_first_publication_loads(tmp_path):
    for split, kind, number in (("train", "algebra", 1), ("train", "geometry", 2), ("test", "algebra", 3)):
        folder = tmp_path / split / kind
        folder.mkdir(parents=True)
        (folder / f"{number}.json").write_text(json.dumps(RECORD))
    task = load_task("math", tmp_path)
    assert (len(task.train), len(task.test)) == (2, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"problem": None}, "problem must be a text"),
        ({"problem": "  "}, "problem must be a text"),
        ({"solution": 5}, "solution must be a text"),
        ({"solution": "It is 5."}, "solution must have the answer in a .boxed.*'It is 5.'"),
        ({"solution": r"It is \boxed{}."}, "solution must have the answer"),
        ({"solution": r"It is \boxed{$}."}, r"solution is not graded as right itself; its last box holds '\$'"),
        ({"answer": "2"}, r"answer '2' is not what the solution has in its last box"),
        ({"answer": 2}, "answer must be a text"),
        ({"level": ["1"]}, "level must be a text, an integer or absent"),
        ({"level": True}, "level must be"),
        ({"level": 1.5}, "level must be"),
    ],
)
def test_bad_records_are_named_with_the_reason(tmp_path, change, reason):
    with pytest.raises(ValueError, match=rf"test\.jsonl:2: .*{reason}"):
        load_task("math", write(tmp_path, [RECORD, RECORD | change]))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"So the sum is $40+2=\boxed{42}$.", "42"),
        (r"$\boxed{42}$", "42"),
        ("$42$", "42"),
        ("$$ 42 $$", "42"),
        (r" \(42\)\n".replace("\\n", "\n"), "42"),
        (r"\[42\]", "42"),
        ("42", "42"),
        (r"\$42", r"\$42"),  # money
        ("$1$ or $2$", "$1$ or $2$"),
        ("[4, 2]", "[4, 2]"),
    ],
)
def test_a_gold_is_taken_out_of_its_box_and_dollars(tmp_path, text, answer):
    assert competition_math.bare_answer(text) == answer
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "40 + 2?", "answer": text}))
    task = load_task("jsonl", tmp_path, verifier="math")
    assert task.grade(f"\\boxed{{{answer}}}", task.train[0]) == CORRECT
    assert task.grade(r"\boxed{41}", task.train[0]) == WRONG


def test_a_gold_that_is_not_graded_as_right_is_a_bad_record(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "40 + 2?", "answer": "4}2"}))
    with pytest.raises(ValueError, match=r"train\.jsonl:1: answer is not graded as right itself .*'4}2'"):
        load_task("jsonl", tmp_path, verifier="math")


@pytest.mark.parametrize("field", ["problem", "solution"])
def test_missing_fields_are_named(tmp_path, field):
    lacking = {key: value for key, value in RECORD.items() if key != field}
    with pytest.raises(ValueError, match=rf"test\.jsonl:1: the record lacks the field '{field}'"):
        load_task("math", write(tmp_path, [lacking]))


def test_the_task_has_no_generator():
    with pytest.raises(ValueError, match=r"needs --data, .*hendrycks/math"):
        load_task("math")


# --- verifiers ---


def test_an_unknown_verifier_is_an_error_when_the_task_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="verifier must be one of rules, math-verify, got 'sympy'"):
        load_task("math", write(tmp_path, [RECORD]), verifier="sympy")


def test_a_missing_package_is_an_error_of_one_line_when_the_task_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'math-verify\[antlr4_13_2\]'") as error:
        load_task("math", write(tmp_path, [RECORD]), verifier="math-verify")
    assert "\n" not in str(error.value)


def test_math_verify_is_asked_gold_first(monkeypatch):
    asked = []

    def verify(gold, target):
        asked.append((gold, target))
        return target == [r"\boxed{2/4}"]

    fake = types.SimpleNamespace(parse=lambda text: [text], verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    grade = competition_math.grade
    assert grade(r"\boxed{1} \boxed{2/4}", EXAMPLE, verifier="math-verify") == CORRECT
    assert grade(r"\boxed{3}", EXAMPLE, verifier="math-verify") == WRONG
    assert asked == [([r"\boxed{\frac{1}{2}}"], [target]) for target in (r"\boxed{2/4}", r"\boxed{3}")]
    assert grade(r"\boxed{\frac{1}{2}}", EXAMPLE, verifier="math-verify") == CORRECT  # the same text, so not asked
    assert grade("3", EXAMPLE, verifier="math-verify") == MALFORMED
    assert grade("\\boxed{" + "1" * 5000 + "}", EXAMPLE, verifier="math-verify") == WRONG
    assert len(asked) == 2


# --- the published test subset ---


@pytest.mark.shared_data
def test_the_published_subset_loads_and_its_demonstrations_grade_correct():
    if not SHARED.is_dir():
        pytest.skip(f"no published records at {SHARED}")
    task = load_task("math", SHARED)
    records = [json.loads(line) for line in (SHARED / "test.jsonl").read_text().splitlines()]
    assert len(task.test) == len(records) == 500
    for example, record in zip(task.test, records, strict=True):
        assert example.prompt == f"{record['problem'].rstrip()}\n{competition_math.INSTRUCTION}\n"
        assert example.demonstration == record["solution"]
        assert example.group == record["level"]
        assert example.answer in record["solution"]
        assert task.grade(example.demonstration, example) == CORRECT
        parser = latex.Parser(latex.normalise(example.answer))
        parser.answer()
        assert all(re.fullmatch("[a-z]|word [a-z]+", name) for name in parser.names)  # none is compared as text only
        assert latex.equivalent(example.answer, f"x={example.answer}") or re.search("[=,]", example.answer)
    assert {example.group for example in task.test} == {f"Level {n}" for n in range(1, 6)}


@pytest.mark.shared_data
def test_different_answers_of_the_published_subset_are_equal_only_in_notation():
    if not SHARED.is_dir():
        pytest.skip(f"no published records at {SHARED}")
    groups: dict[str, set[str]] = {}
    for answer in {example.answer for example in load_task("math", SHARED).test}:
        value, equation = latex.Parser(latex.UNIT.sub("", latex.normalise(answer))).answer()
        key = f"{float(latex.value_at(equation if value is None else value, 7)):.9g}"  # equal answers have equal values
        groups.setdefault(key, set()).add(answer)
    alike = {frozenset(answers) for answers in groups.values() if len(answers) > 1}
    assert all(latex.equivalent(a, b) for answers in alike for a in answers for b in answers)
    assert alike == {
        frozenset({"-2,1", "1,-2"}),
        frozenset({r"10,\!080", "10080"}),
        frozenset({"120", r"120^\circ"}),
        frozenset({"15", r"15\mbox{ cm}^2"}),
        frozenset({r"2 \sqrt{5}", r"2\sqrt{5}"}),
        frozenset({"30", r"30^\circ"}),
        frozenset({"36", r"36^\circ", r"\$36"}),
        frozenset({"5", "x=5"}),
        frozenset({"90", r"90^\circ"}),
        frozenset({r"\frac14", r"\frac{1}{4}"}),
    }
