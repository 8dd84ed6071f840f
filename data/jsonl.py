"""Your own records: each has a prompt, an answer and maybe a demonstration, under names that options can change.

    {"prompt": "What is 17 + 25?\\n", "answer": 42, "demonstration": "17 + 25 = 42\\n<answer>42</answer>"}

The prompt and the demonstration go to the model as they stand. `verifier` says how a completion is compared with the
answer. Except for `regex` and `math`, it is compared in one of two places: inside the one pair <answer> ... </answer>
where the completion holds such a tag, else in all of it.

    exact      the text there is the answer, blanks around both aside
    numeric    the last number there equals the answer as an exact decimal: 18, 18.00 and $18 are one number
    regex      the answer is a regular expression, and it matches somewhere in the completion
    math       the last \\boxed{...} of the completion is the answer, as in the task "math"
"""

from __future__ import annotations

import re
from decimal import Decimal

from .gsm8k import last_number, leading_number
from .task import Example, Grade, outcome_grade, required_text

PUBLISHED = (
    'your own records, an object a line, such as {"prompt": "What is 17 + 25?", "answer": "42", "demonstration": '
    '"17 + 25 = 42"}; the demonstration may be missing, and the options prompt, answer and demonstration name other '
    "fields"
)
VERIFIERS = ("exact", "numeric", "regex", "math")


def parse_record(
    record: dict,
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    demonstration: str = "demonstration",
    verifier: str = "exact",
) -> Example:
    """One record; the options are the names of its fields, and the verifier that its answer has to suit.

    The answer is a text or a number, which stands for its digits (0.00001, not 1e-05); true and false are refused, as
    nobody can know how a model should spell them. A demonstration may be absent or null. Raises KeyError or ValueError
    with the reason.
    """
    right = record[answer]
    if isinstance(right, (int, float)) and not isinstance(right, bool) and Decimal(right).is_finite():
        right = format(Decimal(str(right)), "f")
    elif not (isinstance(right, str) and right.strip()):
        raise ValueError(f"{answer} must be a number or a text that is not empty, got {right!r}")
    if verifier == "numeric" and leading_number(right) is None:
        raise ValueError(f"{answer} must be a number for the verifier 'numeric', got {right!r}")
    if verifier == "regex":
        try:
            re.compile(right)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{answer} must be a regular expression, got {right!r}: {error}") from None
    worked = None if record.get(demonstration) is None else required_text(record, demonstration)
    return Example(required_text(record, prompt), right, worked)


def grade(completion: str, example: Example, *, verifier: str = "exact") -> Grade:
    """Reward 1 when the completion holds the answer where the verifier looks for it (see the top of this file).

    Well formed: there is something to compare. No text raises. Time is linear in its length, except that a regular
    expression takes what it takes.
    """
    check_verifier(verifier)
    if verifier == "math":
        from . import competition_math  # here, since no other verifier needs its reader of formulas

        return competition_math.grade(completion, example)
    if verifier == "regex":
        return outcome_grade(re.search(example.answer, completion) is not None, well_formed=True)
    said = answer_text(completion)
    if verifier == "numeric":
        number = None if said is None else last_number(said)
        return outcome_grade(number is not None and number == leading_number(example.answer), number is not None)
    return outcome_grade(said == example.answer.strip(), bool(said))


def answer_text(completion: str) -> str | None:
    """What stands inside the one pair of answer tags, or all of a text without any; None where the tags are amiss."""
    opened, closed = completion.count("<answer>"), completion.count("</answer>")
    if opened == closed == 0:
        return completion.strip()
    start, end = completion.find("<answer>") + len("<answer>"), completion.find("</answer>")
    return completion[start:end].strip() if opened == closed == 1 and start <= end else None


def check_verifier(verifier: str) -> None:
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
