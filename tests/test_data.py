"""`load_task` over every layout and every way a file can be bad, and `load_reward` over every way a spec can be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TASKS, Example, Grade, load_reward, load_task, load_task_spec, task_module

ROOT = Path(__file__).resolve().parents[1]
ADD = {"prompt": "1 + 1", "answer": "2"}
LINE = json.dumps(ADD)
EXAMPLE = Example("1 + 1", "2")
RECORDS = {  # one that each task can read
    "knights-knaves": {
        "quiz": "You meet 2 inhabitants: Zoey, and Ethan.",
        "names": ["Zoey", "Ethan"],
        "solution": [True, False],
        "solution_text_format": "(1) Zoey is a knight\n(2) Ethan is a knave",
        "cot_head": "Let's think.",
        "cot_repeat_steps": ["Assume Zoey is a knight."],
        "cot_foot": "This leads to a feasible solution.",
    },
    "countdown": {"numbers": [44, 19, 35], "target": 98, "answer": "<answer> 44 + (19 + 35) </answer>"},
    "gsm8k": {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "jsonl": {"prompt": "1 + 1?", "answer": 2, "demonstration": "2"},
    "math": {
        "problem": "1 + 1?",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "level": "Level 1",
        "type": "Algebra",
    },
}


def prompts(task):
    return [example.prompt for example in task.train], [example.prompt for example in task.test]


def numbered(*numbers):
    return [ADD | {"prompt": str(number)} for number in numbers]


def test_a_reader_of_files_loads_no_task():
    code = "import sys, data.files; print(sorted(name for name in sys.modules if name.startswith('data.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "data.files" in loaded
    assert not any(f"'data.{module}'" in loaded for module in TASKS.values())
    assert all(task_module(name).__name__ == f"data.{module}" for name, module in TASKS.items())


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def test_lines_a_list_and_a_tree_of_files_hold_the_same(tmp_path):
    one, two, three = numbered(1, 2, 3)
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    (tmp_path / "test.json").write_text(json.dumps([one, two, three], indent=4))
    assert prompts(load_task("jsonl", tmp_path)) == (["1", "2"], ["1", "2", "3"])
    assert prompts(load_task("jsonl", str(tmp_path))) == (["1", "2"], ["1", "2", "3"])

    tree = tmp_path / "tree"
    for name, record in (("train/b/1.json", two), ("train/a/2.json", one), ("test/3.json", three)):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(json.dumps(record, indent=4))
    (tree / "train/README.md").write_text("not a record")
    assert prompts(load_task("jsonl", tree)) == (["1", "2"], ["3"])

    # Lines go before a list, and a list before a tree.
    (tree / "train.json").write_text(json.dumps([three]))
    assert prompts(load_task("jsonl", tree)) == (["3"], ["3"])
    (tree / "train.jsonl").write_text(json.dumps(two))
    assert prompts(load_task("jsonl", tree)) == (["2"], ["3"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_split_may_be_missing(tmp_path, split):
    (tmp_path / f"{split}.jsonl").write_text(LINE)
    task = load_task("jsonl", tmp_path)
    assert getattr(task, split) == [EXAMPLE]
    assert task.train + task.test == [EXAMPLE]
    assert task.skipped == ()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("content", [None, "", "\n \n"], ids=["missing", "empty", "blank"])
def test_without_any_record_the_error_names_the_files_and_where_they_are_published(tmp_path, name, content):
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
        (folder / "train.jsonl").write_text(content)
    reason = "no such folder; it should have" if content is None else "neither"
    with pytest.raises(ValueError, match=rf"data: {reason} train\.jsonl (nor|and) test\.jsonl") as error:
        load_task(name, folder)
    assert task_module(name).PUBLISHED in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raw",
    [
        f"{LINE}\n{LINE}\n".encode(),
        f"{LINE}\n{LINE}".encode(),
        f"\n{LINE}\n\n  \t\n{LINE}\n\n".encode(),
        f"{LINE}\r\n{LINE}\r\n\r\n".encode(),
        f"\ufeff{LINE}\n{LINE}\n".encode(),
        f"  {LINE}  \n\t{LINE}".encode(),
    ],
    ids=["plain", "no-last-newline", "blank-lines", "crlf", "bom", "indented"],
)
def test_line_ends_blank_lines_and_a_mark_do_not_matter(tmp_path, raw):
    (tmp_path / "test.jsonl").write_bytes(raw)
    assert load_task("jsonl", tmp_path).test == [EXAMPLE] * 2


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b\x85c", "é 中 😀", "\x1c\x0b\x0c"], ids=ascii)
def test_only_a_newline_ends_a_line(tmp_path, text):
    (tmp_path / "test.jsonl").write_text(
        json.dumps(ADD | {"prompt": f"x{text}"}, ensure_ascii=text.isascii()), encoding="utf-8"
    )
    assert prompts(load_task("jsonl", tmp_path)) == ([], [f"x{text}"])


def test_json_is_read_as_python_reads_it(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "prompt": "b", "answer": 1, "weight": NaN}')
    assert load_task("jsonl", tmp_path).test == [Example("b", "1")]


@pytest.mark.parametrize("name", RECORDS)
def test_all_fields_of_a_record_are_kept_where_that_is_asked_for(tmp_path, name):
    record = RECORDS[name] | {"tests": ["f(1) == 2", {"hidden": None}], "difficulty": 0.5, "language": "\u00e9"}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    (tmp_path / "test.json").write_text(json.dumps([record]))
    with_records = load_task(name, tmp_path, keep_records=True)
    without = load_task(name, tmp_path)
    assert [example.record for example in with_records.train + with_records.test] == [record] * 2
    assert [example.record for example in without.train + without.test] == [{}] * 2
    assert repr(with_records.train) == repr(without.train)  # a checkpoint knows its examples by this
    assert with_records.train == without.train


def test_a_generated_puzzle_has_no_record_and_a_task_cannot_ask_for_them():
    assert load_task("countdown", train_size=1, test_size=0, keep_records=True).train[0].record == {}
    with pytest.raises(ValueError, match="keep_records is given twice, or has a flag of its own, --reward"):
        load_task_spec("jsonl:keep_records=1", "", 0, keep_records=False)


# ---- Bad records -----------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b"{", "Expecting property name"),
    (b"prompt,answer", "Expecting value"),
    (b"{} {}", "Extra data"),
    (LINE.encode() + b",", "Extra data"),
    (b'{"prompt": "a\tb", "answer": "2"}', "Invalid control character"),
    (b"[]", "expected a JSON object, got list"),
    (b'"text"', "expected a JSON object, got str"),
    (b"null", "expected a JSON object, got NoneType"),
    (b"NaN", "expected a JSON object, got float"),
    (b"{}", "the record lacks the field 'answer'"),
    (b'{"prompt": "a", "answer": NaN}', "answer must be a number or a text that is not empty, got nan"),
    (b'{"prompt": "a", "answer": 1e999}', "answer must be a number or a text that is not empty, got inf"),
    (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    (b'{"prompt": "\xff", "answer": "2"}', "'utf-8' codec can't decode byte 0xff"),
    ('{"prompt": "é", "answer": "2"}'.encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
    (LINE.encode("utf-16-le"), ""),
    (b'{"prompt": "\\ud800", "answer": "2"}', "'utf-8' codec can't encode character '\\ud800'"),
    (b'{"prompt": "a", "answer": "\\udfff"}', "'utf-8' codec can't encode character '\\udfff'"),
    (b"[" * 100_000, "maximum recursion depth exceeded"),
    (b'{"a":' * 100_000, "maximum recursion depth exceeded"),
    (b"\x00", "Expecting value"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES, ids=lambda value: ascii(value[:30]))
def test_a_bad_line_is_named_and_may_be_skipped(tmp_path, bad, reason):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\n".join([LINE.encode(), b"", bad, LINE.encode()]))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}:3: {reason}')}") as error:
        load_task("jsonl", tmp_path)
    assert "\n" not in str(error.value)
    task = load_task("jsonl", tmp_path, skip_bad_lines=True)
    assert (task.train, task.test) == ([EXAMPLE] * 2, [])
    assert task.skipped == (str(error.value),)


def test_every_skipped_record_is_told_in_order_over_both_splits(tmp_path):
    (tmp_path / "train.jsonl").write_text(f"[]\n{LINE}\n{{}}\n")
    (tmp_path / "test.json").write_text(json.dumps([ADD, 3, LINE, ADD]))
    task = load_task("jsonl", tmp_path, skip_bad_lines=True)
    assert (task.train, task.test) == ([EXAMPLE], [EXAMPLE] * 2)
    assert task.skipped == (
        f"{tmp_path}/train.jsonl:1: expected a JSON object, got list",
        f"{tmp_path}/train.jsonl:3: the record lacks the field 'answer'",
        f"{tmp_path}/test.json, record 2: expected a JSON object, got int",
        f"{tmp_path}/test.json, record 3: expected a JSON object, got str",
    )


def test_when_every_record_is_bad_the_error_tells_the_first(tmp_path):
    (tmp_path / "train.jsonl").write_text("[]\n{}\n")
    with pytest.raises(ValueError, match=r"neither train\.jsonl nor .* can be read: .*train\.jsonl:1: expected a JSON"):
        load_task("jsonl", tmp_path, skip_bad_lines=True)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{}", "expected a list of records, got dict"),
        (LINE.encode() + b"\n" + LINE.encode(), "Extra data"),
        (b"[", "Expecting value"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b'["\xff"]', "'utf-8' codec can't decode"),
        (b"", "Expecting value"),
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_a_list_that_cannot_be_read_is_an_error_even_with_skipping(tmp_path, raw, reason):
    (tmp_path / "train.jsonl").write_text(LINE)
    (tmp_path / "test.json").write_bytes(raw)
    for skip in (False, True):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/test.json: {reason}')}"):
            load_task("jsonl", tmp_path, skip_bad_lines=skip)


@pytest.mark.parametrize("raw", [b"{", b"[]", b"", b"\xff", b"[" * 100_000], ids=lambda raw: ascii(raw[:9]))
def test_a_bad_file_of_a_tree_is_named_and_may_be_skipped(tmp_path, raw):
    (tmp_path / "train/algebra").mkdir(parents=True)
    (tmp_path / "train/algebra/1.json").write_text("\ufeff" + LINE, encoding="utf-8")
    (tmp_path / "train/algebra/2.json").write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/train/algebra/2.json: ") as error:
        load_task("jsonl", tmp_path)
    task = load_task("jsonl", tmp_path, skip_bad_lines=True)
    assert (task.train, task.skipped) == ([EXAMPLE], (str(error.value),))


# ---- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "options", "reason"),
    [
        ("sudoku", False, {}, "unknown task 'sudoku'; known: knights-knaves, countdown"),
        ("countdown", False, {"number": 3}, "task countdown has no option 'number'; known: numbers, train_size"),
        ("countdown", True, {"numbers": 3}, "task countdown with a data folder has no option 'numbers'; known: none"),
        ("gsm8k", True, {"verifier": "exact"}, "task gsm8k with a data folder has no option 'verifier'"),
        (
            "jsonl",
            True,
            {"verify": "exact"},
            "task jsonl with a data folder has no option 'verify'; known: prompt, answer, demonstration, verifier",
        ),
        ("jsonl", False, {"verifier": "exact"}, "task jsonl needs --data"),
        ("knights-knaves", True, {"format": "xml"}, "train.jsonl:1: format must be 'conclusion' or 'logic-rl'"),
        ("knights-knaves", True, {"wording": "natural"}, "no option 'wording'; known: format"),
    ],
)
def test_a_bad_option_is_one_clear_line(tmp_path, name, folder, options, reason):
    (tmp_path / "train.jsonl").write_text(json.dumps(RECORDS.get(name, ADD)))
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        load_task(name, tmp_path if folder else None, **options)
    assert "\n" not in str(error.value)
    assert not re.search(r"\b(\w+), (.*, )?\1\b", str(error.value).partition("known: ")[2])  # no option named twice


def test_an_option_reaches_each_function_that_has_it(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(RECORDS["knights-knaves"]))
    task = load_task("knights-knaves", tmp_path, format="logic-rl")
    assert "<think>" in task.test[0].prompt
    assert task.grade(task.test[0].demonstration, task.test[0]).reward == 3.0


# ---- Any JSON as a record --------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["#### 2", "\\boxed{", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_record_of_any_json_loads_or_is_named(name, data):
    """A good record with some fields replaced by anything, or anything at all, on the second line of a file."""
    good = RECORDS[name]
    change = st.dictionaries(st.sampled_from(sorted(good)), VALUES, max_size=2)
    lacking = st.sets(st.sampled_from(sorted(good)), max_size=1)
    changed = st.builds(lambda new, gone: {k: v for k, v in {**good, **new}.items() if k not in gone}, change, lacking)
    record = data.draw(changed | VALUES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        file.write_text(f"{json.dumps(good)}\n{json.dumps(record)}\n", encoding="utf-8")
        task = load_task(name, folder, skip_bad_lines=True)
        for reason in task.skipped:
            assert reason.startswith(f"{file}:2: ")
            assert "\n" not in reason
            with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
                load_task(name, folder)
        assert len(task.train) == 2 - len(task.skipped)
        for example in task.train:
            for text in (example.prompt, example.answer, example.demonstration or ""):
                text.encode()
            task.grade(example.demonstration or "", example)


# ---- A reward of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory that is not on sys.path; what is imported from there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write_module(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))


def test_a_function_of_a_file_and_of_a_module(here):
    source = """
        def length(completion, example):
            return len(completion) / len(example.prompt)
    """
    write_module(here / "rewards/own.py", source)
    write_module(here / "own_rewards.py", source)
    path = list(sys.path)
    for spec in ("rewards/own.py:length", f"{here}/rewards/own.py:length", "own_rewards:length", "rewards.own:length"):
        verify = load_reward(spec)
        assert verify("", EXAMPLE) == Grade(0.0, correct=False, well_formed=True)
        assert verify("1 + 1", EXAMPLE) == Grade(1.0, correct=True, well_formed=True)
        assert verify("1 + 1 = 2!", EXAMPLE) == Grade(2.0, correct=True, well_formed=True)
    assert sys.path[: len(path)] == path
    assert load_reward("math:dist")([1.0], [1.0]).reward == 0.0


def test_a_function_may_import_its_neighbours_when_it_is_called(here):
    write_module(here / "lib/helper_imported_late.py", "HALF = 0.5")
    source = """
        def reward(completion, example):
            from helper_imported_late import HALF
            return HALF
    """
    write_module(here / "lib/own.py", source)
    assert load_reward("lib/own.py:reward")("", EXAMPLE).reward == 0.5


def test_a_file_may_import_its_neighbours_define_dataclasses_and_be_named_like_any_module(here):
    write_module(here / "lib/helper_of_rewards.py", "HALF = 0.5")
    write_module(
        here / "lib/json.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass, field
        import helper_of_rewards

        @dataclass
        class Scale:
            by: float = field(default=helper_of_rewards.HALF)

        def reward(completion, example):
            return Scale().by
        """,
    )
    assert load_reward("lib/json.py:reward")("", EXAMPLE) == Grade(0.5, correct=False, well_formed=True)
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("result", "grade"),
    [
        ("1", Grade(1.0, True, True)),
        ("-2.5", Grade(-2.5, False, True)),
        ("True", Grade(1.0, True, True)),
        ("False", Grade(0.0, False, True)),
        ("__import__('decimal').Decimal('0.25')", Grade(0.25, False, True)),
        ("__import__('fractions').Fraction(3, 2)", Grade(1.5, True, True)),
        ("__import__('numpy').float32(0.5)", Grade(0.5, False, True)),
        ("__import__('numpy').bool_(True)", Grade(1.0, True, True)),
        ("__import__('torch').tensor(0.5)", Grade(0.5, False, True)),
        ("Grade(0.5, correct=True, well_formed=False)", Grade(0.5, True, False)),
        ("Grade(-3, False, True, flexible=True)", Grade(-3, False, True, True)),
    ],
)
def test_a_number_or_a_grade_is_a_reward(here, result, grade):
    write_module(here / "own.py", f"from data import Grade\ndef reward(completion, example): return {result}\n")
    found = load_reward("own.py:reward")("", EXAMPLE)
    assert found == grade
    assert result.startswith("Grade") or type(found.reward) is float


@pytest.mark.parametrize(
    "result",
    [
        "None",
        "'1'",
        "b'1'",
        "[1]",
        "(1.0, {})",
        "{}",
        "1j",
        "float('nan')",
        "float('inf')",
        "10**400",
        "1e300",
        "-2e9",
        "__import__('torch').zeros(2)",
        "__import__('numpy').zeros((2, 2))",
        "reward",
        "Grade(float('nan'), True, True)",
        "Grade('1', True, True)",
        "Grade",
    ],
)
def test_anything_else_is_an_error(here, result):
    write_module(here / "own.py", f"from data import Grade\ndef reward(completion, example): return {result}\n")
    reason = "reward 'own.py:reward': expected a Grade or a finite number of at most 1e+09, got "
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        load_reward("own.py:reward")("two\nlines " + "x" * 1000, EXAMPLE)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_what_the_function_raises_is_not_hidden(here):
    write_module(here / "own.py", "def reward(completion, example): return 1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_reward("own.py:reward")("", EXAMPLE)


@pytest.mark.parametrize(
    ("spec", "source", "reason"),
    [
        ("", "", "expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION"),
        ("own.py", "", "expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION"),
        ("own:", "", "expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION"),
        (":reward", "", "expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION"),
        ("lib/none.py:reward", "", "no such file 'lib/none.py'"),
        ("none:reward", "", "no such module 'none' here in /"),
        ("none.own:reward", "", "no such module 'none.own'"),
        ("own.none:reward", "", "no such module 'own.none'"),
        ("own:reward", "", "own has no function 'reward'"),
        ("own.py:reward", "def rewards(): 0", "own.py has no function 'reward'"),
        ("own.py:reward", "reward = 3", "'reward' must be a function, got 3"),
        ("own.py:reward", "def reward(:", "importing it raised SyntaxError: invalid syntax (own.py, line 1)"),
        ("own.py:reward", "1 / 0", "importing it raised ZeroDivisionError: division by zero"),
        ("own:reward", "1 / 0", "importing it raised ZeroDivisionError: division by zero"),
        ("own.py:reward", "import own_none", "importing it raised ModuleNotFoundError: No module named 'own_none'"),
        ("own:reward", "import own_none", "importing it raised ModuleNotFoundError: No module named 'own_none'"),
        ("own.py:reward", "import own.py", "importing it raised ModuleNotFoundError: No module named 'own.py'"),
        ("own.py:reward", "raise ValueError('two\\nlines')", "importing it raised ValueError: two lines"),
        ("own.py:reward", "import sys; sys.exit(2)", "importing it raised SystemExit: 2"),
        ("own.py:reward", "import sys; sys.path.pop(0); 1 / 0", "importing it raised ZeroDivisionError"),
        (".own:reward", "", "importing it raised TypeError"),
    ],
)
def test_a_bad_spec_is_one_line_that_names_it(here, spec, source, reason):
    write_module(here / "own.py", source)
    path = list(sys.path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'reward {spec!r}: {reason}')}") as error:
        load_reward(spec)
    assert "\n" not in str(error.value)
    assert sys.path == path
