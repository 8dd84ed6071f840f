"""GSM8K: grade-school word problems with worked solutions, by Cobbe et al. (arXiv 2110.14168).

    question       Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes ...
    answer         Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.
                   Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.
                   #### 10

The demonstration is that answer without the marks `<<...>>`, which only a model that calls a calculator needs.

Two verdicts are usual: *strict* reads the number right after the last `####`, and is the reward; *flexible* reads the
last number anywhere, and is only reported. Where this departs from the regular expressions in use, and why:

- Numbers are compared by value (`numbers.py`), not as text: 18, 18.00, $18 and **18** are one number.
- A second number on the line of the `####` makes it malformed: a policy must not be rewarded for naming several.
"""

import re
from fractions import Fraction

from .numbers import last_number, read_number
from .task import Example, Grade, outside_cut_thought, required_text

PUBLISHED = "GSM8K is published in openai/grade-school-math on GitHub, and as openai/gsm8k on the Hugging Face hub"

MARKER = "####"
INSTRUCTION = f'Work it out step by step. Then write a last line of "{MARKER} " followed by the answer as a number.'
MARK = re.compile(r"<<[^<>]*>>")


def parse_record(record: dict) -> Example:
    """A published record {"question": ..., "answer": "... #### 10"}. Raises KeyError or ValueError with the reason."""
    question, worked = required_text(record, "question"), required_text(record, "answer")
    answer, demonstration = worked.rpartition(MARKER)[2].strip(), MARK.sub("", worked)
    example = Example(f"{question}\n{INSTRUCTION}\n", answer, demonstration)
    if not grade(demonstration, example).correct:  # the answer is graded against itself
        raise ValueError(f"answer must end in '{MARKER} ' and a number, got {worked[-40:]!r}")
    return example


def grade(completion: str, example: Example) -> Grade:
    """Reward 1 when the number after the last `####` is the answer; `flexible` judges the last number anywhere.

    An answer that holds no number equals no completion. Any text is graded, in linear time, without an error.
    """
    completion = outside_cut_thought(completion)
    truth, number = read_number(example.answer), strict_number(completion)
    correct = number is not None and number == truth
    return Grade(float(correct), correct, number is not None, truth is not None and last_number(completion) == truth)


def strict_number(text: str) -> Fraction | None:
    """The number on the line of the last `####`, or None."""
    _, marker, tail = text.rpartition(MARKER)
    return read_number(tail.partition("\n")[0]) if marker else None
