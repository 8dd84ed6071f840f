"""Your own records: each verifier against a table, each way a record can be wrong, and its place in the file."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import jsonl, load_task
from data.task import Example, Grade

CORRECT = Grade(1.0, correct=True, well_formed=True)
WRONG = Grade(0.0, correct=False, well_formed=True)
MALFORMED = Grade(0.0, correct=False, well_formed=False)
RECORD = {"prompt": "What is 17 + 25?\n", "answer": "42", "demonstration": "17 + 25 = 42\n<answer>42</answer>"}


def write(folder, *records):
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


# ---- Verifiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "grade"),
    [
        ("Paris", "Paris", CORRECT),
        (" \nParis\n", "Paris", CORRECT),
        ("Paris", " Paris\n", CORRECT),
        ("I think <answer> Paris </answer>, surely.", "Paris", CORRECT),
        ("<answer>\nParis\n</answer>", "Paris", CORRECT),
        ("paris", "Paris", WRONG),
        ("Paris.", "Paris", WRONG),
        ("It is Paris", "Paris", WRONG),
        ("Paris <answer>Rome</answer>", "Paris", WRONG),
        ("18.0", "18", WRONG),
        ("", "Paris", MALFORMED),
        (" \n", "Paris", MALFORMED),
        ("<answer> </answer>", "Paris", MALFORMED),
        ("<answer>Paris", "Paris", MALFORMED),
        ("Paris</answer>", "Paris", MALFORMED),
        ("</answer>Paris<answer>", "Paris", MALFORMED),
        ("<answer>Rome</answer><answer>Paris</answer>", "Paris", CORRECT),
        ("<answer>Paris</answer><answer>Rome</answer>", "Paris", WRONG),
        ("I close with <answer> tags. <answer>Paris</answer>", "Paris", CORRECT),
        ("<think>surely <answer>Paris</answer>", "Paris", MALFORMED),
        ("<think>Rome?</think>\n<answer>Paris</answer>", "Paris", CORRECT),
        ("<answer>Paris</answer> and so <answer>Ro", "Paris", CORRECT),
        ("<answer>Paris</answer></answer>", "Paris", CORRECT),
        ("<answer</answer>", "Paris", MALFORMED),
        ("<ANSWER>Paris</ANSWER>", "<ANSWER>Paris</ANSWER>", CORRECT),
    ],
    ids=ascii,
)
def test_exact(completion, answer, grade):
    assert jsonl.grade(completion, Example("", answer)) == grade


@pytest.mark.parametrize(
    ("completion", "answer", "grade"),
    [
        ("42", "42", CORRECT),
        ("17 + 25 = 42.", "42", CORRECT),
        ("17 + 25 = **$42.00**", "42", CORRECT),
        ("1,800 in all", "$1,800.0", CORRECT),
        ("2 and <answer>about 42</answer> not 3", "42", CORRECT),
        ("-42", "42", WRONG),
        ("42 or 43", "42", WRONG),
        ("42 <answer>43</answer>", "42", WRONG),
        ("forty-two", "42", MALFORMED),
        ("42 <answer>none</answer>", "42", MALFORMED),
        ("<answer>41</answer><answer>42</answer>", "42", CORRECT),
        ("<answer>84/2</answer>", "42", CORRECT),
        ("84/2", "42", CORRECT),
        ("<answer>41 or 42</answer>", "42", MALFORMED),
        ("<answer>2 * 21 = 42</answer>", "42", CORRECT),
        ("<think>it may be 42", "42", MALFORMED),
        ("", "42", MALFORMED),
        ("none", "none", MALFORMED),
    ],
    ids=ascii,
)
def test_numeric(completion, answer, grade):
    assert jsonl.grade(completion, Example("", answer), verifier="numeric") == grade


@pytest.mark.parametrize(
    ("completion", "answer", "grade"),
    [
        ("It is Paris.", r"\bParis\b", CORRECT),
        ("It is PARIS.", r"(?i)paris", CORRECT),
        ("first\nsecond", r"(?m)^second$", CORRECT),
        ("", r"^$", CORRECT),
        ("Parisian", r"\bParis\b", WRONG),
        ("", r"Paris", WRONG),
    ],
    ids=ascii,
)
def test_regex(completion, answer, grade):
    assert jsonl.grade(completion, Example("", answer), verifier="regex") == grade


def test_math_is_the_verifier_of_the_task_math():
    competition_math = pytest.importorskip("data.competition_math")
    for completion in (r"so \boxed{\frac{1}{2}}", r"\boxed{\frac12}", r"\boxed{2}", "1/2", ""):
        example = Example("", r"\frac{1}{2}")
        assert jsonl.grade(completion, example, verifier="math") == competition_math.grade(completion, example)
    assert jsonl.grade(r"so \boxed{\frac{1}{2}}", example, verifier="math").correct


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<answer>1</answer>", "<", "9", "1 ", " ", "-$"])
@pytest.mark.parametrize("verifier", ["exact", "numeric"])
def test_a_huge_completion_is_graded_in_linear_time(piece, verifier):
    text = piece * (200_000 // len(piece))
    started = time.perf_counter()
    for completion in (text, f"<answer>{text}</answer>"):
        assert not jsonl.grade(completion, Example("", "42"), verifier=verifier).correct
    assert time.perf_counter() - started < 2


FRAGMENTS = st.lists(st.sampled_from(["<answer>", "</answer>", "42", " ", "4", "2", ".", "x", "\n"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.text() | FRAGMENTS)
def test_no_text_raises_and_only_the_answer_is_correct(text):
    tags = re.findall("</?answer>", text)
    pairs = re.findall("(?s)<answer>((?:(?!</?answer>).)*)</answer>", text)
    inside, read = pairs[-1] if pairs else text, bool(pairs) or not tags
    assert jsonl.grade(text, Example("", "42")).correct == (read and inside.strip() == "42")
    numbers = re.findall(r"[0-9]*\.?[0-9]+", inside) if read else []
    if set(inside) <= set("42 "):  # what else may stand beside a number has tests of its own
        correct = numbers == ["42"] if pairs else numbers[-1:] == ["42"]  # in tags, one number stands alone
        assert jsonl.grade(text, Example("", "42"), verifier="numeric").correct == correct
    assert jsonl.grade(text, Example("", "42"), verifier="regex").correct == ("42" in text)


# ---- Records ---------------------------------------------------------------------------------------------------------


def test_records_go_to_the_model_as_they_stand(tmp_path):
    bare = {"prompt": " Say yes", "answer": "yes", "demonstration": None, "source": ["ignored"]}
    task = load_task("jsonl", write(tmp_path, RECORD, bare, {"prompt": "2", "answer": "2"}))
    assert task.train == [
        Example("What is 17 + 25?\n", "42", "17 + 25 = 42\n<answer>42</answer>"),
        Example(" Say yes", "yes"),
        Example("2", "2"),
    ]
    assert task.test == []
    assert task.grade(RECORD["demonstration"], task.train[0]) == CORRECT
    assert task.grade("The answer is 42", task.train[0]) == WRONG
    numeric = load_task("jsonl", write(tmp_path, RECORD), verifier="numeric")
    assert numeric.grade("The answer is 42", numeric.train[0]) == CORRECT


def test_options_name_the_fields(tmp_path):
    record = {"question": "2 + 2?", "gold": 4, "cot": "2 + 2 = 4", "prompt": 0, "answer": [], "demonstration": {}}
    fields = {"prompt": "question", "answer": "gold", "demonstration": "cot"}
    assert load_task("jsonl", write(tmp_path, record), **fields).train == [Example("2 + 2?", "4", "2 + 2 = 4")]
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the record lacks the field 'task'"):
        load_task("jsonl", tmp_path, **fields | {"prompt": "task"})


@pytest.mark.parametrize(
    ("literal", "answer"),
    [
        ("42", "42"),
        ("-7", "-7"),
        ("0", "0"),
        ("0.5", "0.5"),
        ("18.0", "18"),
        ("0.00001", "0.00001"),
        ("1e3", "1000"),
        ("-0.0", "0"),
        ("2.50", "2.5"),
        ("1e22", "10000000000000000000000"),
        ("12345678901234567890", "12345678901234567890"),
        ("9" * 400, "9" * 400),
    ],
)
def test_a_number_stands_for_its_digits(literal, answer):
    record = json.loads(f'{{"prompt": "x", "answer": {literal}}}')
    assert jsonl.parse_record(record).answer == answer
    if len(answer) < 100:
        example = jsonl.parse_record(record, verifier="numeric")
        assert jsonl.grade(f"it is {answer}", example, verifier="numeric") == CORRECT


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"prompt": None}, {}, "prompt must be a text that is not empty, got None"),
        ({"prompt": " \n"}, {}, "prompt must be a text that is not empty"),
        ({"prompt": ["a"]}, {}, "prompt must be a text that is not empty, got ['a']"),
        ({"answer": None}, {}, "answer must be a number or a text that is not empty, got None"),
        ({"answer": True}, {}, "answer must be a number or a text that is not empty, got True"),
        ({"answer": ""}, {}, "answer must be a number or a text that is not empty, got ''"),
        ({"answer": ["42"]}, {}, "answer must be a number or a text that is not empty, got ['42']"),
        ({"answer": float("nan")}, {}, "answer must be a number or a text that is not empty, got nan"),
        ({"answer": float("-inf")}, {}, "answer must be a number or a text that is not empty, got -inf"),
        ({"demonstration": ""}, {}, "demonstration must be a text that is not empty, got ''"),
        ({"demonstration": 42}, {}, "demonstration must be a text that is not empty, got 42"),
        ({"answer": "x"}, {"verifier": "numeric"}, "answer must be a number for the verifier 'numeric', got 'x'"),
        ({"answer": "1 or 2"}, {"verifier": "numeric"}, "answer must be a number for the verifier 'numeric'"),
        ({"answer": "(a"}, {"verifier": "regex"}, "answer must be a regular expression, got '(a': missing )"),
        ({"answer": "a{99999999999}"}, {"verifier": "regex"}, "answer must be a regular expression"),
        ({"answer": "(" * 9999}, {"verifier": "regex"}, ""),
        (
            {"answer": "<answer>4</answer>"},
            {},
            "answer is not graded as right itself by the verifier 'exact', got '<ans",
        ),
        (
            {"answer": "\\frac{1}{2"},
            {"verifier": "math"},
            "answer is not graded as right itself by the verifier 'math'",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_record_names_file_line_and_reason(tmp_path, change, options, reason):
    write(tmp_path, RECORD, RECORD | change)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'train.jsonl'}:2: {reason}")) as error:
        load_task("jsonl", tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_a_missing_field_is_named(tmp_path, field):
    with pytest.raises(ValueError, match=rf"train\.jsonl:1: the record lacks the field '{field}'"):
        load_task("jsonl", write(tmp_path, {key: value for key, value in RECORD.items() if key != field}))


def test_an_unknown_verifier_names_the_choices(tmp_path):
    with pytest.raises(
        ValueError, match=r"^task jsonl: verifier must be one of exact, numeric, regex, math, got 'fuzzy'"
    ):
        load_task("jsonl", write(tmp_path, RECORD), verifier="fuzzy")
    with pytest.raises(ValueError, match="verifier must be one of exact, numeric, regex, math, got 1"):
        jsonl.grade("", Example("", "42"), verifier=1)


def test_without_a_folder_the_error_shows_a_record():
    with pytest.raises(ValueError, match=r'jsonl needs --data, a folder with train\.jsonl.*\{"prompt": '):
        load_task("jsonl")
    published = re.search(r"\{.*\}", jsonl.PUBLISHED)[0]
    example = jsonl.parse_record(json.loads(published), verifier="numeric")
    assert jsonl.grade(example.demonstration, example, verifier="numeric") == CORRECT
