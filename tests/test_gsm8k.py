"""GSM8K against a table, hostile text, and the usual extraction written a second time, character by character."""

from __future__ import annotations

import json
import re
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import gsm8k, load_task, numbers
from data.task import Example, Grade

SHARED = Path(__file__).resolve().parents[2] / "shared/data/gsm8k"
DIGITS = "0123456789"
RECORD = {
    "question": "Weng earns $12 an hour. Yesterday, she just did 50 minutes. How much did she earn?",
    "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
    "Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
}


def usual_number(text: str) -> Fraction | None:
    """The last number of a text, found by walking back from its last digit: the commas in it are dropped."""
    end = next((i + 1 for i in reversed(range(len(text))) if text[i] in DIGITS), 0)
    start = end
    while start and text[start - 1] in DIGITS + ".,":
        start -= 1
    before = text[:start].removesuffix("$")
    negative = before.endswith("-") and not (before[-2:-1].isalnum() or before[-2:-1] == ")")
    return Fraction(("-" if negative else "") + text[start:end].replace(",", "")) if end else None


def usual_numbers(completion: str) -> tuple[Fraction | None, Fraction | None]:
    """(strict, flexible): the number of the line that the last #### begins, and the last number of all."""
    marked = completion.split("####")
    return (usual_number(marked[-1].split("\n")[0]) if len(marked) > 1 else None), usual_number(completion)


# ---- The verifier ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("#### 18", "18", "18"),
        ("#### 18.", "18", "18"),
        ("#### $18", "18", "18"),
        ("####18", "18", "18"),
        ("#### **18**", "18", "18"),
        ("#### **$18.**", "18", "18"),
        ("#### 18.00", "18", "18"),
        ("#### 018", "18", "18"),
        ("#### 1,800", "1800", "1800"),
        ("#### $1,234,567.50.", "1234567.5", "1234567.5"),
        ("#### -3", "-3", "-3"),
        ("#### -$3", "-3", "-3"),
        ("#### $-3", "-3", "-3"),
        ("#### −3", "-3", "-3"),
        ("#### .5", "0.5", "0.5"),
        ("#### -.5", "-0.5", "-0.5"),
        ("#### $.50", "0.5", "0.5"),
        ("#### (18)", "18", "18"),
        ("#### 50%", "50", "50"),
        ("#### 18 dollars.", "18", "18"),
        ("#### 18\r\n", "18", "18"),
        ("  ####\t18  ", "18", "18"),
        ("##### 18", "18", "18"),
        ("#### -0", "0", "0"),
        ("so 5 + 13 = 18\n#### 18\nI am sure.", "18", "18"),
        ("#### 17\nNo.\n#### 18", "18", "18"),
        ("#### 18\n20 more words", "18", "20"),
        ("the answer is 18", None, "18"),
        ("18", None, "18"),
        ("#### eighteen", None, None),
        ("#### \n18", None, "18"),
        ("#### = 18", "18", "18"),
        ("#### 20 - 2 = 18", "18", "18"),
        ("#### about 18", "18", "18"),
        ("#### minus 18", None, "18"),
        ("#### 18:30", None, "30"),
        ("#### 18 m^2", "18", "18"),
        ("#### 18%", "18", "18"),
        ("#### 1{,}800", "1800", "1800"),
        ("<think>so\n#### 18", None, None),
        ("#### +18", "18", "18"),
        ("#### x-18", None, "18"),
        ("#### 18 or 20", None, "20"),
        ("#### 18, 20", None, "20"),
        ("#### 18/2", "9", "9"),
        ("#### 10-8", None, "8"),
        ("#### 3,4", None, "4"),
        ("#### 1,8000", None, "8000"),
        ("#### 1234,567", None, "567"),
        ("#### 18.5.2", None, "2"),
        ("#### 1e5", "100000", "100000"),
        ("#### 18 million", "18000000", "18000000"),
        ("#### 18\n####", None, "18"),
        ("## ## 18", None, "18"),
        ("### 18", None, "18"),
        ("#### ١٨", None, None),  # Arabic-Indic 18
        ("#### １８", None, None),  # fullwidth 18
        ("#### ²", None, None),
        ("#### ${}$", None, None),
        ("#### -", None, None),
        ("#### .", None, None),
        ("####", None, None),
        ("", None, None),
        ("it costs 5-3 dollars", None, "3"),
        ("f(2)-3", None, "3"),
        ("from 5 to -3.", None, "-3"),
        ("- 3 apples", None, "3"),
        ("3.", None, "3"),
        ("It is done.18 is it", None, "18"),
        ("$1,000 and ,000", None, "0"),
        ("9" * numbers.MAX_DIGITS, None, "9" * numbers.MAX_DIGITS),
        ("7 and " + "9" * (numbers.MAX_DIGITS + 1), None, None),
        ("#### " + "9" * (numbers.MAX_DIGITS + 1), None, None),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_each_reading_finds(completion, strict, flexible):
    if "<think>" not in completion:
        assert gsm8k.strict_number(completion) == (None if strict is None else Decimal(strict))
        assert numbers.last_number(completion) == (None if flexible is None else Decimal(flexible))
    for answer in {strict, flexible, "41"} - {None}:
        assert gsm8k.grade(completion, Example("", answer)) == Grade(
            float(answer == strict), answer == strict, strict is not None, flexible=answer == flexible
        )


@pytest.mark.parametrize("answer", ["18", "18.0", "18.", "$18", "**18**", "18 dollars"])
def test_the_answer_is_read_like_a_completion(answer):
    assert gsm8k.grade("#### 18.00", Example("", answer)) == Grade(1.0, True, True, True)
    assert gsm8k.grade("#### 18.01", Example("", answer)) == Grade(0.0, False, True, False)


def test_numbers_are_compared_exactly():
    assert not gsm8k.grade("#### 0.30000000000000004", Example("", "0.3")).correct
    assert not gsm8k.grade("#### 10000000000000000000000000000001", Example("", "1" + "0" * 31)).correct


@pytest.mark.parametrize("completion", ["", "####", "#### none", "#### 1 2", "eighteen"])
@pytest.mark.parametrize("answer", ["", "none", "1 2", "9" * 101])
def test_two_unparsed_answers_are_not_equal(completion, answer):
    grade = gsm8k.grade(completion, Example("", answer))
    assert (grade.reward, grade.correct, grade.well_formed, grade.flexible) == (0.0, False, False, False)


@pytest.mark.parametrize(
    "piece",
    [
        "9",
        "9,",
        "9.",
        "999,",
        ",999",
        "-",
        "$",
        "*",
        "(",
        " ",
        "#",
        "#### ",
        "#### 1",
        "$-",
        "-$",
        ".",
        "<<",
        "1 ",
        "\n",
        "−",
    ],
)
def test_a_huge_completion_is_graded_in_linear_time(piece):
    text = piece * (200_000 // len(piece))
    started = time.perf_counter()
    for completion in (text, "#### " + text, "#### 1" + text + "x", text + "#### 18"):
        gsm8k.grade(completion, Example("", "18"))
    gsm8k.parse_record({"question": text + "?", "answer": text + "\n#### 18"})
    assert time.perf_counter() - started < 2


FRAGMENTS = st.lists(
    st.sampled_from(["####", " ", "\n", "-", "$", "**", "(", ")", ".", ",", "%", "1", "18", "800", "x", "−", "١"]),
    max_size=9,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), FRAGMENTS, FRAGMENTS.map("#### {}".format)))
def test_no_text_raises_and_the_verdicts_agree_with_each_other(text):
    grade = gsm8k.grade(text, Example("", "18"))
    assert grade.reward == float(grade.correct)
    assert grade.well_formed or not grade.correct
    if grade.well_formed:
        line = text.rpartition("####")[2].partition("\n")[0]
        assert gsm8k.strict_number(text) == numbers.last_number(line)  # the only number of its line is the last one
        assert re.search("[0-9]", line)
    if not re.search("[0-9]", text):
        assert (grade.well_formed, grade.flexible) == (False, False)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_every_way_to_write_a_number_is_read_back(number):
    for written in (f"{number}", f"{number:,}", f"{number:,.5f}", f"${number}", f"**{number:,}**."):
        assert gsm8k.strict_number(f"#### {written}") == number
        assert numbers.last_number(f"1 and {written}") == number


# ---- Published records -----------------------------------------------------------------------------------------------


def test_a_record_becomes_prompt_answer_and_demonstration():
    example = gsm8k.parse_record(RECORD)
    question, instruction, end = example.prompt.rsplit("\n", 2)
    assert (question, end) == (RECORD["question"], "")
    assert "step by step" in instruction
    assert "#### " in instruction
    assert example.answer == "10"
    assert example.demonstration == (
        "Weng earns 12/60 = $0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $10.\n#### 10"
    )
    assert gsm8k.grade(example.demonstration, example) == Grade(1.0, True, True, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "question must be a text that is not empty, got None"),
        ({"question": " "}, "question must be a text"),
        ({"answer": 10}, "answer must be a text that is not empty, got 10"),
        ({"answer": "It is 10."}, "answer must end in '#### ' and a number, got 'It is 10.'"),
        ({"answer": "#### ten"}, "answer must end in '#### ' and a number, got '#### ten'"),
        ({"answer": "#### 10 or 11"}, "answer must end in"),
        ({"answer": "#### " + "9" * 101}, "answer must end in"),
    ],
    ids=str,
)
def test_a_bad_record_names_file_line_and_reason(tmp_path, change, reason):
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(RECORD)}\n{json.dumps(RECORD | change)}\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'train.jsonl'}:2: {reason}")):
        load_task("gsm8k", tmp_path)


def test_without_a_folder_the_error_says_where_the_records_are_published():
    with pytest.raises(ValueError, match=r"gsm8k needs --data.*openai/grade-school-math.*openai/gsm8k"):
        load_task("gsm8k")


@pytest.mark.shared_data
def test_published_records_load_and_their_demonstrations_are_correct():
    if not SHARED.is_dir():
        pytest.skip(f"no published records at {SHARED}")
    task = load_task("gsm8k", SHARED)
    assert (len(task.train), len(task.test)) == (7473, 1319)
    for split, examples in (("train", task.train), ("test", task.test)):
        records = [json.loads(line) for line in (SHARED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for record, example in zip(records, examples, strict=True):
            assert example.prompt.startswith(record["question"] + "\n")
            assert record["answer"].endswith(f"#### {example.answer}")
            assert task.grade(example.demonstration, example) == Grade(1.0, True, True, True)
            assert "<<" not in example.demonstration


@pytest.mark.shared_data
def test_the_usual_extraction_agrees_on_published_demonstrations_and_perturbed_ones():
    if not SHARED.is_dir():
        pytest.skip(f"no published records at {SHARED}")
    task = load_task("gsm8k", SHARED)
    for example in (task.train + task.test)[::4]:
        body, _, answer = example.demonstration.rpartition("\n#### ")
        for completion in (
            example.demonstration,
            example.demonstration + " dollars.",
            f"{body}\n#### ${answer}.00",
            f"{body}\n#### **{answer}**",
            f"{body}\n#### -{answer.removeprefix('-')}",
            f"{body}\n#### {answer}.7",
            f"{body}\n####{answer}.\n",
            f"{body}\n#### none",
            body,
            body.rpartition("\n")[0],
            f"{body}\nThe answer is {answer}.",
            f"#### 1\n{example.demonstration}\nThat is all.",
            example.demonstration.replace(",", ""),
        ):
            completion = re.sub("/| (?:dozen|hundred|thousand|[bm]illion)|x 10", " : ", completion)  # it knows none
            strict, flexible = usual_numbers(completion)
            assert (gsm8k.strict_number(completion), numbers.last_number(completion)) == (strict, flexible), completion
