"""What every task is made of: examples, a grade, and the JSON lines that hold published records.

A task is two lists of examples and a verifier. The verifier is the only reward: it reads the text of a
completion, never the model, so that the same function scores training, evaluation and a port.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One problem. Without a demonstration it can serve GRPO, but not SFT."""

    prompt: str
    answer: str  # what the verifier compares with, in the task's own notation
    demonstration: str | None = None  # chain of thought that ends in the answer


@dataclass(frozen=True)
class Grade:
    """`reward` trains; `correct` is the accuracy that is reported; `well_formed` says whether the answer parsed."""

    reward: float
    correct: bool
    well_formed: bool


@dataclass(frozen=True)
class Task:
    name: str
    train: list[Example]
    test: list[Example]
    verify: Callable[[str, Example], Grade]

    def grade(self, completion: str, example: Example) -> Grade:
        """Score the text of a completion (without its prompt). Never raises on bad text: that is a wrong answer."""
        return self.verify(completion, example)


def outcome_grade(correct: bool, well_formed: bool, format_reward: float = 0.0) -> Grade:
    """Reward 1 for a correct answer, `format_reward` for a wrong one that at least parsed, 0 for the rest."""
    return Grade(1.0 if correct else format_reward if well_formed else 0.0, correct, well_formed)


def read_split(folder: str | Path, split: str, parse: Callable[[dict], Example]) -> list[Example]:
    """Parse FOLDER/SPLIT.jsonl, a JSON object a line, in file order.

    Raises ValueError that names file, line and reason: a bad line is an error, never a silent skip.
    """
    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a data folder holds train.jsonl and test.jsonl")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, got {type(record).__name__}")
            examples.append(parse(record))
        except KeyError as error:
            raise ValueError(f"{path}:{number}: the record lacks the field {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: the file holds no records")
    return examples
