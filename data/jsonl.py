"""Your own records: each has a prompt, an answer and maybe a demonstration, under names that options can change.

    {"prompt": "What is 17 + 25?\\n", "answer": 42, "demonstration": "17 + 25 = 42\\n<answer>42</answer>"}

The prompt and the demonstration go to the model as they are. `verifier` is how a completion is compared with the
answer; "there" is inside the last pair <answer> ... </answer>, or in all of a completion that has no such tag.

    exact      the text there is the answer, blanks around both aside
    numeric    the number in the tags, or the last one where there are none, is the answer: 18.00 is 36/2 (`numbers.py`)
    regex      the answer is a regular expression, and it matches somewhere in the completion
    math       the last \\boxed{...} of the completion is the answer, as in the task "math"
"""

import re
from decimal import Decimal

from .numbers import last_number, read_number
from .task import Example, Grade, outcome_grade, outside_cut_thought, required_text, tagged_answer

PUBLISHED = 'your own records, an object a line, like {"prompt": "What is 17 + 25?", "answer": "42", "demonstration": '
PUBLISHED += '"17 + 25 = 42"}; the demonstration may be missing, and options of these names rename the fields'
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

    The answer is a text or a number, which stands for its shortest digits (42 for 42.0; 0.00001, not 1e-05), but not
    true or false, which have no one spelling. A demonstration may be absent or null. An answer that is not graded as
    right itself is an error. Raises KeyError or ValueError with the reason.
    """
    right = record[answer]
    if isinstance(right, (int, float)) and not isinstance(right, bool) and Decimal(right).is_finite():
        right = format(Decimal(str(right or 0)), "f")  # or 0, since -0 is 0
        right = right.rstrip("0").rstrip(".") if "." in right else right
    elif not (isinstance(right, str) and right.strip()):
        raise ValueError(f"{answer} must be a number or a text that is not empty, got {right!r}")
    if verifier == "numeric" and read_number(right) is None:
        raise ValueError(f"{answer} must be a number for the verifier 'numeric', got {right!r}")
    if verifier == "regex":
        try:
            re.compile(right)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{answer} must be a regular expression, got {right!r}: {error}") from None
    worked = None if record.get(demonstration) is None else required_text(record, demonstration)
    example = Example(required_text(record, prompt), right, worked)
    stated = f"\\boxed{{{right}}}" if verifier == "math" else f"<answer>{right}</answer>"
    if verifier != "regex" and not grade(stated, example, verifier=verifier).correct:
        raise ValueError(f"{answer} is not graded as right itself by the verifier {verifier!r}, got {right!r}")
    return example


def grade(completion: str, example: Example, *, verifier: str = "exact") -> Grade:
    """Reward 1 when the completion holds the answer where the verifier looks for it (see the top of this file).

    Well formed: there is something to compare. Any text is graded, in linear time except for a regular expression.
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
    if verifier == "math":
        from . import competition_math  # here, since no other verifier needs its reader of formulas

        return competition_math.grade(completion, example)
    if verifier == "regex":
        return outcome_grade(re.search(example.answer, completion) is not None, well_formed=True)
    tagged = re.search("</?answer>", completion)
    found = (tagged_answer(completion) or "") if tagged else outside_cut_thought(completion)
    if verifier == "exact":
        return outcome_grade(found.strip() == example.answer.strip(), bool(found.strip()))
    number = read_number(found) if tagged else last_number(found)
    return outcome_grade(number is not None and number == read_number(example.answer), number is not None)
