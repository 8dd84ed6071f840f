"""What every task is made of: examples, a grade, and the JSON files that hold published records.

A task is two lists of examples and a verifier. The verifier is the only reward: it reads the text of a
completion, never the model, so that the same function scores training, evaluation and a port.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One problem. Without a demonstration it can serve GRPO, but not SFT."""

    prompt: str
    answer: str  # what the verifier compares with, in the task's own notation
    demonstration: str | None = None  # chain of thought that ends in the answer
    group: str = ""  # level or size, by which an evaluation is broken down


@dataclass(frozen=True)
class Grade:
    """`reward` trains; `correct` is the accuracy that is reported; `well_formed` says whether the answer parsed."""

    reward: float
    correct: bool
    well_formed: bool
    flexible: bool | None = None  # correct for a reader who looks harder for the answer, where the task has one


@dataclass(frozen=True)
class Task:
    name: str
    train: list[Example]
    test: list[Example]
    verify: Callable[[str, Example], Grade]
    skipped: tuple[str, ...] = ()  # why each bad record was left out, where the person asked for that

    def grade(self, completion: str, example: Example) -> Grade:
        """Score the text of a completion (without its prompt). Never raises on bad text: that is a wrong answer."""
        return self.verify(completion, example)


def outcome_grade(correct: bool, well_formed: bool, format_reward: float = 0.0) -> Grade:
    """Reward 1 for a correct answer, `format_reward` for a wrong one that at least parsed, 0 for the rest."""
    return Grade(1.0 if correct else format_reward if well_formed else 0.0, correct, well_formed)


def read_split(folder: Path, split: str, parse: Callable[[dict], Example], skipped: list[str] | None) -> list[Example]:
    """Parse the records of FOLDER/SPLIT.jsonl (an object a line), SPLIT.json (a list of them), or all SPLIT/**/*.json
    (one each), in that order.

    None of these gives no examples. A bad record raises ValueError with file, place and reason; with a list `skipped`
    its reason goes there instead.
    """
    examples = []
    for place, record in records_of(folder, split):
        try:
            if isinstance(record, str):  # a line of JSON, not yet read
                record = json.loads(record)
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, got {type(record).__name__}")
            examples.append(parse(record))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            lacking = f"the record lacks the field {error}"
            reason = f"{place}: {lacking if isinstance(error, KeyError) else error}"
            if skipped is None:
                raise ValueError(reason) from None
            skipped.append(reason)
    return examples


def records_of(folder: Path, split: str) -> Iterator[tuple[str, object]]:
    """(Where it stands, a line or an object) for each record of a split."""
    lines, whole = folder / f"{split}.jsonl", folder / f"{split}.json"
    if lines.is_file():
        for number, line in enumerate(read_text(lines).split("\n"), start=1):
            if line.strip():
                yield f"{lines}:{number}", line
    elif whole.is_file():
        try:
            records = json.loads(read_text(whole))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{whole}: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{whole}: expected a list of records, got {type(records).__name__}")
        for number, record in enumerate(records, start=1):
            yield f"{whole}, record {number}", record
    else:  # MATH is published as a tree of files with a record each
        for file in sorted((folder / split).rglob("*.json")):
            yield str(file), read_text(file)


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None


def required_text(record: dict, field: str) -> str:
    """A field that must hold text which is not blank."""
    value = record[field]
    if not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{field} must be a text that is not empty, got {value!r}")
    return value
