"""Countdown, checked by other means than its own: a brute-force solver, Python's `ast`, and regular expressions."""

from __future__ import annotations

import ast
import itertools
import json
import operator
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import countdown, load_task
from data.task import Example, Grade

SHARED = Path(__file__).resolve().parents[2] / "shared/data/countdown"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LINE = re.compile(r"(\d+ [-+*/] \d+ = \d+(?:, \d+ [-+*/] \d+ = \d+)*) (yes|no)")
EXAMPLE = Example("numbers 44 19 35 target 98\n", "44 19 35 = 98")

CORRECT = Grade(1.0, correct=True, well_formed=True)
WRONG = Grade(0.0, correct=False, well_formed=True)
MALFORMED = Grade(0.0, correct=False, well_formed=False)


def ast_value(source: str) -> tuple[Fraction | None, list[int]]:
    """What `countdown.evaluate` promises, by Python's own parser: (value or None, numbers from left to right)."""
    numbers = []

    def walk(node: ast.expr) -> Fraction | None:
        if isinstance(node, ast.Constant):
            assert type(node.value) is int
            numbers.append(node.value)
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = walk(node.left), walk(node.right)
        if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
            return None
        return OPERATORS[type(node.op)](left, right)

    return walk(ast.parse(source.strip(), mode="eval").body), numbers


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value that uses all the numbers once, by splitting them into two parts in every way."""
    if len(numbers) == 1:
        return set(numbers)
    values = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = tuple(numbers[i] for i in chosen)
            right = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            for a, b in itertools.product(reachable(left), reachable(right)):
                values |= {a + b, a - b, a * b}
                if b:
                    values.add(a / b)
    return values


def problem(example: Example) -> tuple[list[int], int]:
    match = re.fullmatch(r"numbers ((?:\d+ )+)target (\d+)\n", example.prompt)
    numbers, target = [int(n) for n in match[1].split()], int(match[2])
    assert example.answer == f"{' '.join(map(str, numbers))} = {target}"
    return numbers, target


def check_trace(example: Example) -> int:
    """Assert that a demonstration is a true search trace; return how many dead ends it shows."""
    numbers, target = problem(example)
    *lines, last = example.demonstration.split("\n")
    tried = []
    for line in lines:
        steps, verdict = LINE.fullmatch(line).groups()
        at_hand = sorted(numbers)
        for a, symbol, b, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", steps):
            assert ARITHMETIC[symbol](Fraction(a), Fraction(b)) == int(result)
            at_hand.remove(int(a))  # ValueError if the path uses what it does not have
            at_hand.remove(int(b))
            at_hand.append(int(result))
        assert len(at_hand) == 1
        assert verdict == ("yes" if at_hand == [target] else "no")
        tried.append((steps, verdict))
    assert [verdict for _, verdict in tried] == ["no"] * (len(tried) - 1) + ["yes"]
    value, used = ast_value(re.fullmatch(r"<answer> (.+) </answer>", last)[1])
    assert value == target
    assert sorted(used) == sorted(numbers)
    assert countdown.grade(example.demonstration, example) == CORRECT
    return len(tried) - 1


# --- generated problems ---


@pytest.mark.parametrize(("numbers", "count"), [(2, 300), (3, 300), (4, 60), (5, 100), (6, 100)])
def test_every_instance_is_solvable_and_its_trace_is_true(numbers, count):
    train, test = countdown.generate(5, numbers=numbers, train_size=count, test_size=20)
    assert (len(train), len(test)) == (count, 20)
    for example in train + test:
        given_numbers, target = problem(example)
        assert len(given_numbers) == numbers
        assert all(1 <= n <= 99 for n in given_numbers)
        assert 1 <= target <= 99
        if numbers <= 4:  # beyond that the brute force takes seconds an instance, and the trace is a proof anyway
            assert target in reachable(tuple(map(Fraction, given_numbers)))
    assert {check_trace(example) for example in train} == set(range(countdown.MAX_DEAD_ENDS + 1))


def test_the_default_size_is_fast_distinct_and_disjoint():
    start = time.perf_counter()
    train, test = countdown.generate(0)
    assert time.perf_counter() - start < 3
    assert (len(train), len(test)) == (4000, 512)
    keys = {(tuple(sorted(numbers)), target) for numbers, target in map(problem, train + test)}
    assert len(keys) == 4512
    for example in train + test:
        check_trace(example)


def test_the_seed_decides_everything():
    assert countdown.generate(3, train_size=50, test_size=9) == countdown.generate(3, train_size=50, test_size=9)
    assert countdown.generate(3, train_size=50, test_size=9) != countdown.generate(4, train_size=50, test_size=9)


def test_the_test_split_does_not_depend_on_the_size_of_the_training_split():
    small, large = (countdown.generate(3, train_size=size, test_size=9) for size in (20, 50))
    assert small == (large[0][:20], large[1])


def test_only_the_first_training_examples_carry_a_demonstration():
    train, test = countdown.generate(1, train_size=30, test_size=5, demonstrations=7)
    everywhere, same_test = countdown.generate(1, train_size=30, test_size=5)
    assert [e.demonstration is not None for e in train] == [True] * 7 + [False] * 23
    assert train[:7] == everywhere[:7]
    assert test == same_test
    assert [(e.prompt, e.answer) for e in train] == [(e.prompt, e.answer) for e in everywhere]
    assert all(e.demonstration is None for e in countdown.generate(1, train_size=5, test_size=0, demonstrations=0)[0])


def test_ranges_are_kept():
    train, _ = countdown.generate(0, numbers=4, train_size=200, test_size=0, low=5, high=12, max_target=30)
    for numbers, target in map(problem, train):
        assert all(5 <= n <= 12 for n in numbers)
        assert target <= 30


def test_the_search_is_in_a_fixed_order_and_the_docstring_shows_it():
    start = [(n, str(n)) for n in (65, 18, 37)]
    trace = countdown.demonstrate([], start, 84, 990, 3)
    in_docs = re.search(r"demonstration  (.+?)\n    answer", countdown.__doc__, re.DOTALL)[1]
    assert trace == "\n".join(line.strip() for line in in_docs.split("\n"))
    # a bound on the dead ends keeps those nearest to the success
    assert countdown.demonstrate([], start, 84, 990, 1) == "\n".join(trace.split("\n")[1:])
    assert countdown.demonstrate([], start, 84, 990, 0) == "\n".join(trace.split("\n")[2:])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"numbers": 1}, "countdown: numbers 1: must be a whole number from 2 to 6"),
        ({"numbers": 7}, "numbers 7: must be"),
        ({"numbers": True}, "numbers True: must be"),
        ({"numbers": 3.0}, "numbers 3.0: must be"),
        ({"train_size": -1}, "train_size -1: must be"),
        ({"test_size": "9"}, "test_size '9': must be"),
        ({"demonstrations": -1}, "demonstrations -1: must be"),
        ({"train_size": 5, "demonstrations": 6}, "demonstrations 6: must be a whole number from 0 to 5"),
        ({"low": 0}, "low 0: must be"),
        ({"low": 50, "high": 49}, "high 49: must be a whole number from 50"),
        ({"max_target": 0}, "max_target 0: must be"),
        # by hand: 1 2, 1 3, 2 3 and 3 3 reach three targets each, 1 1 and 2 2 two each
        ({"numbers": 2, "high": 3}, r"found 16 distinct instances of 2 numbers in 1..3 .* asks for 4512"),
        ({"low": 99, "max_target": 1, "numbers": 4}, r"found 1 distinct"),
    ],
)
def test_bad_options_are_errors_of_one_line(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        countdown.generate(0, **options)
    assert "\n" not in str(error.value)


# --- the verifier ---


def answer(expression: str) -> str:
    return f"some thoughts\n<answer> {expression} </answer>"


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        (answer("(44 + 19) + 35"), CORRECT),
        (answer("44+19+35"), CORRECT),
        (answer("((35)) + (19 + 44)"), CORRECT),
        (answer("35 +\n 19 + 44"), CORRECT),
        (answer("44 + 19 + 35 = 98"), CORRECT),
        ("<answer>44 + 19 + 35=98</answer> and some text after it", CORRECT),
        ("44 + 54 = 98 </think>\n<answer> 44 + (19 + 35) </answer>", CORRECT),
        # as people write: other signs, marks around the expression, tags that are only mentioned
        (answer("`44 + 19 + 35`"), CORRECT),
        (answer("$44 + 19 + 35 = 98$"), CORRECT),
        (answer("\\(44 + 19\\) + 35"), CORRECT),
        (answer("\\left(44 + 19\\right) + 35 = 98."), CORRECT),
        (answer("44 \u2013 19 \\cdot 35 \\div 35 + 73"), WRONG),
        (answer("44 \u00b7 19 \\times 35"), WRONG),
        (answer(r"\[44 + 19 + 35\]"), CORRECT),
        (answer("44 + 19 + 35."), CORRECT),
        (answer("4`4 + 19 + 35"), MALFORMED),
        ("I close with <answer> tags. " + answer("44 + 19 + 35"), CORRECT),
        (answer("44 + 19 + 35") * 2, CORRECT),
        (answer("1") + answer("44 + 19 + 35"), CORRECT),
        (answer("44 + 19 + 35") + answer("1"), WRONG),
        (answer("44 + 19 + 35") + " or <answer> 1", CORRECT),
        ("<answer><answer> 44 + 19 + 35 </answer></answer>", CORRECT),
        ("<answer> <answer> 44 + 19 + 35 </answer>", CORRECT),
        ("<answer> 44 + 19 + 35 </answer></answer>", CORRECT),
        ("</answer><answer> 44 + 19 + 35 </answer>", CORRECT),
        ("<answer> 44 + <answer> 19 </answer> + 35 </answer>", WRONG),
        ("<think> I try " + answer("44 + 19 + 35"), MALFORMED),  # it was cut off while it thought
        ("<think> no </think>" + answer("44 + 19 + 35"), CORRECT),
        # wrong: it parses, and is not a solution
        (answer("44 + 19 - 35"), WRONG),
        (answer("44 + 19 + 35 = 97"), WRONG),
        (answer("44 + 19 + 35 = -98"), WRONG),
        (answer("44 + 54"), WRONG),
        (answer("98"), WRONG),
        (answer("44 + 44 + 19 + 35 - 44"), WRONG),
        (answer("44 + 19 + 35 + 0"), WRONG),
        (answer("(44 + 19) + 35 * 35 / 35"), WRONG),
        (answer("44 / (19 - 19) + 35"), WRONG),
        (answer("44 / 0"), WRONG),
        (answer("0 * (1 / 0) + 98"), WRONG),
        # malformed: not one answer that parses
        ("", MALFORMED),
        ("44 + 19 + 35", MALFORMED),
        (answer(""), MALFORMED),
        (answer("44 + 19 +"), MALFORMED),
        (answer("(44 + 19 + 35"), MALFORMED),
        (answer("44 + 19 + 35)"), MALFORMED),
        (answer("()"), MALFORMED),
        (answer("(44)(19) 35"), MALFORMED),
        (answer("44 19 35"), MALFORMED),
        (answer("-44 + 19 + 35"), MALFORMED),
        (answer("44 - -19 + 35"), MALFORMED),
        (answer("+44 + 19 + 35"), MALFORMED),
        (answer("1e3"), MALFORMED),
        (answer("44.0 + 19 + 35"), MALFORMED),
        (answer("4_4 + 19 + 35"), MALFORMED),
        (answer("0x2c + 19 + 35"), MALFORMED),
        (answer("44 ** 19 + 35"), MALFORMED),
        (answer("44 // 19 + 35"), MALFORMED),
        (answer("44 ^ 19 + 35"), MALFORMED),
        (answer("44 % 19 + 35"), MALFORMED),
        (answer("44 + 19 + 35 # comment"), MALFORMED),
        (answer("__import__('os').system('true')"), MALFORMED),
        (answer("44 + 19 + 35 if True else 0"), MALFORMED),
        (answer("\uff14\uff14 + 19 + 35"), MALFORMED),  # fullwidth 44
        (answer("\u0664\u0664 + 19 + 35"), MALFORMED),  # Arabic-Indic 44
        (answer("4\u00b2 + 19 + 35"), MALFORMED),  # isdigit() is true of a superscript 2
        (answer("44 + 19 + 35 ="), MALFORMED),
        (answer("44 + 19 + 35 = 98 = 98"), MALFORMED),
        (answer("44 + 19 + 35 = 63 + 35"), MALFORMED),
        (answer("44 + 19 + 35 = \uff19\uff18"), MALFORMED),
        (answer("98 = 44 + 19 + 35"), MALFORMED),
        (answer("44 + 19 + 35 = " + "9" * 10_000), MALFORMED),
        ("</answer> 44 + 19 + 35 <answer>", MALFORMED),
        ("<answer> 44 + 19 + 35", MALFORMED),
        ("44 + 19 + 35 </answer>", MALFORMED),
        ("<ANSWER> 44 + 19 + 35 </ANSWER>", MALFORMED),
        ("<answer> 44 + 19 + 35 \ud800 </answer>", MALFORMED),
        (answer("44\x00 + 19 + 35"), MALFORMED),
    ],
)
def test_grade(completion, grade):
    assert countdown.grade(completion, EXAMPLE) == grade


def test_grade_accepts_typographic_operators_and_exact_fractions():
    assert countdown.grade(answer("8 ÷ (3 \u2212 8 ÷ 3)"), Example("", "3 8 3 8 = 24")) == CORRECT
    assert countdown.grade(answer("6 × (3 + 1)"), Example("", "1 3 6 = 24")) == CORRECT
    assert countdown.grade(answer("1 / 3 * 3 + 0"), Example("", "0 1 3 3 = 1")) == CORRECT
    # in floats 10**17 / (10**17 - 1) is 1.0; exactly it is not 1
    big = 10**17
    assert countdown.grade(answer(f"{big} / {big - 1}"), Example("", f"{big} {big - 1} = 1")) == WRONG


def test_numbers_given_twice_are_used_twice():
    example = Example("", "7 7 2 = 16")
    assert countdown.grade(answer("7 + 7 + 2"), example) == CORRECT
    assert countdown.grade(answer("7 * 2 + 2"), example) == WRONG
    assert countdown.grade(answer("7 * 2 + 7 - 7 + 2"), example) == WRONG


def test_hostile_text_costs_little_and_never_raises():
    start = time.perf_counter()
    for body in (
        "(" * 100_000,
        "(" * 100_000 + "1" + ")" * 100_000,
        "(" * 400 + "1" + ")" * 400,
        "9" * 1_000_000,
        "1" * 5000 + " + 1",
        "1+" * 100_000 + "1",
        "*".join(["9" * 18] * 52),
        "/".join(["9" * 18, "7" * 18] * 26),
        " " * 1_000_000,
        "=" * 100_000,
        "1 / 0 +" * 100 + "1",
    ):
        assert not countdown.grade(answer(body), EXAMPLE).correct
    assert not countdown.grade("<answer>" * 100_000, EXAMPLE).correct
    assert not countdown.grade("<answer> 1 </answer>" * 100_000, EXAMPLE).correct
    assert time.perf_counter() - start < 1


def test_limits_are_what_they_say():
    deep, digits = countdown.MAX_DEPTH, countdown.MAX_DIGITS
    assert countdown.evaluate("(" * deep + "1" + ")" * deep) == (1, [1])
    assert countdown.evaluate("9" * digits) == (10**digits - 1, [10**digits - 1])
    full = "1" + "+1" * ((countdown.MAX_LENGTH - 1) // 2)
    assert countdown.evaluate(full)[0] == full.count("1")
    for bad in ("(" * (deep + 1) + "1" + ")" * (deep + 1), "9" * (digits + 1), full + "+1"):
        with pytest.raises(ValueError, match=r"deeper than|digits, more than|characters, more than"):
            countdown.evaluate(bad)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "'' is not an expression"),
        ("1 + * 2", "'1 + * 2' is not an expression"),
        ("(1 + 2", "'(1 + 2' is not an expression"),
        ("1 2", "'1 2' is not an expression"),
        ("1 / 0 )", "'1 / 0 )' is not an expression"),
        ("1 + -2", "'1 + -2' has more than whole numbers joined by + - * /"),
        ("(1)(2)", "'(1)(2)' has more than whole numbers"),
        ("1 + x", "no number, operator or parenthesis at character 5"),
    ],
)
def test_evaluate_says_what_is_wrong(expression, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        countdown.evaluate(expression)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " - ", " * ", " / "]), inner).map("".join)
        | inner.map("({})".format)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_evaluate_agrees_with_python_on_any_expression(expression):
    source = re.sub(r"\b0+(?=\d)", "", expression)
    assert countdown.evaluate(source) == ast_value(source)


texts = st.text() | st.text("0123456789+-*/()=. ×÷\u2212\uff14e_") | expressions
tagged = st.lists(texts | st.sampled_from(["<answer>", "</answer>", "<answer> 44 + (19 + 35) ", "= 98"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(tagged | texts.map(answer))
def test_grade_never_raises_and_is_consistent(completion):
    grade = countdown.grade(completion, EXAMPLE)
    assert grade.reward == float(grade.correct)
    assert grade.well_formed or not grade.correct
    if grade.correct:  # then Python agrees
        written = re.findall(r"(?s)<answer>((?:(?!</?answer>).)*)</answer>", completion)[-1].replace("$", "")
        expression = re.fullmatch(r"(?s)([^=]*)(= *0*98\.?\s*)?", written.translate(str.maketrans("×÷\u2212", "*/-")))[
            1
        ]
        value, used = ast_value(re.sub(r"\b0+(?=\d)", "", expression))
        assert (value, sorted(used)) == (98, [19, 35, 44])


# --- published records ---

RECORD = {
    "numbers": [44, 19, 35],
    "target": 98,
    "answer": "19 + 35 = 54\n44 + 54 = 98\nTherefore, the final equation is 44 + (19 + 35) </think>\n"
    "<answer> 44 + (19 + 35) </answer>",
}


def write(folder: Path, train: list, test: list) -> Path:
    for split, records in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_records_may_say_nums(tmp_path):
    record = {"nums": [44, 19, 35], "target": 98}
    assert load_task("countdown", write(tmp_path, [record], [])).train[0].answer == "44 19 35 = 98"
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the record lacks the field 'numbers'"):
        load_task("countdown", write(tmp_path, [{"target": 98}], []))


def test_read_keeps_order_and_text(tmp_path):
    bare = {"numbers": [7, 8, 75, 7], "target": 19}
    task = load_task("countdown", write(tmp_path, [RECORD, bare, RECORD], [bare]))
    first = Example("numbers 44 19 35 target 98\n", "44 19 35 = 98", RECORD["answer"], "3 numbers")
    second = Example("numbers 7 8 75 7 target 19\n", "7 8 75 7 = 19", None, "4 numbers")
    assert task.train == [first, second, first]
    assert task.test == [second]
    assert task.grade(RECORD["answer"], first) == CORRECT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"numbers": None}, "numbers must be a list"),
        ({"numbers": "44 19"}, "numbers must be a list"),
        ({"numbers": [98]}, "at least two"),
        ({"numbers": [44, True, 35]}, "numbers: one of True: must be a whole number"),
        ({"numbers": [44, 19.0, 35]}, "numbers: one of 19.0: must be a whole number"),
        ({"numbers": [44, "19", 35]}, "numbers: one of '19': must be a whole number"),
        ({"numbers": [44, -19, 35]}, "numbers: one of -19: must be a whole number from 0"),
        ({"numbers": [44, 10**18, 35]}, f"numbers: one of {10**18}: must be a whole number from 0"),
        ({"target": True}, "target True: must be a whole number"),
        ({"target": "98"}, "target '98': must be a whole number"),
        ({"target": 98.0}, "target 98.0: must be a whole number"),
        ({"answer": 98}, "answer must be a text"),
        ({"answer": " "}, "answer must be a text"),
    ],
)
def test_read_names_the_bad_line_and_the_reason(tmp_path, change, reason):
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: .*{reason}"):
        load_task("countdown", write(tmp_path, [RECORD, RECORD | change], [RECORD]))


@pytest.mark.parametrize("field", ["numbers", "target"])
def test_read_names_a_missing_field(tmp_path, field):
    lacking = {key: value for key, value in RECORD.items() if key != field}
    with pytest.raises(ValueError, match=rf"test\.jsonl:1: the record lacks the field '{field}'"):
        load_task("countdown", write(tmp_path, [RECORD], [lacking]))


@pytest.mark.shared_data
def test_published_records_load_and_their_demonstrations_grade_correct():
    if not SHARED.is_dir():
        pytest.skip(f"no published records at {SHARED}")
    task = load_task("countdown", SHARED)
    for split, examples in (("train", task.train), ("test", task.test)):
        records = [json.loads(line) for line in (SHARED / f"{split}.jsonl").read_text().splitlines()]
        assert [problem(e) for e in examples] == [(r["numbers"], r["target"]) for r in records]
        assert [e.demonstration for e in examples] == [r["answer"] for r in records]
        assert all(countdown.grade(e.demonstration, e) == CORRECT for e in examples)
