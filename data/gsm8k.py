"""GSM8K: grade-school word problems with worked solutions, by Cobbe et al. (arXiv 2110.14168).

    question       Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes ...
    answer         Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.
                   Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.
                   #### 10

The demonstration is that answer without the marks `<<...>>`, which only a model that calls a calculator needs.

Two verdicts are usual: *strict* reads the number right after the last `####`, and is the reward; *flexible* reads the
last number anywhere, and is only reported. Where this departs from the regular expressions in use, and why:

- Numbers are compared as exact decimals, not as text: 18, 18.00, $18 and **18** are one number.
- A second number on the line of the `####` makes it malformed: a policy must not be rewarded for naming several.
- A comma belongs to a number only before a group of three digits, so `3,4` is two numbers and `1,800` is one. A minus
  is a sign only where nothing that could be its left operand touches it, so `5-3` holds 5 and 3.
"""

import re
from collections import deque
from decimal import Decimal

from .task import Example, Grade, required_text

PUBLISHED = "GSM8K is published in openai/grade-school-math on GitHub, and as openai/gsm8k on the Hugging Face hub"

MARKER = "####"
INSTRUCTION = f'Work it out step by step. Then write a last line of "{MARKER} " followed by the answer as a number.'
MAX_DIGITS = 100  # of one number: reading a longer one costs more than linear time

MARK = re.compile(r"<<[^<>]*>>")
OPENING = re.compile(r"[ \t$*(]*")  # what may stand between #### and the number
NUMBER = re.compile(  # [0-9], because \d also takes digits of other scripts
    r"(?:(?<![0-9A-Za-z)])(-)\$?)?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+)"
)


def parse_record(record: dict) -> Example:
    """A published record {"question": ..., "answer": "... #### 10"}. Raises KeyError or ValueError with the reason."""
    question, worked = required_text(record, "question"), required_text(record, "answer")
    if strict_number(worked) is None:
        raise ValueError(f"answer must end in '{MARKER} ' and a number, got {worked[-40:]!r}")
    answer = worked.rpartition(MARKER)[2].strip()
    return Example(f"{question}\n{INSTRUCTION}\n", answer, MARK.sub("", worked))


def grade(completion: str, example: Example) -> Grade:
    """Reward 1 when the number after the last `####` is the answer; `flexible` judges the last number anywhere.

    An answer that holds no number equals no completion. Any text is graded, in linear time, without an error.
    """
    truth, number = leading_number(example.answer), strict_number(completion)
    correct = number is not None and number == truth
    return Grade(float(correct), correct, number is not None, truth is not None and last_number(completion) == truth)


def strict_number(text: str) -> Decimal | None:
    """The number on the line of the last `####`, or None."""
    _, marker, tail = text.rpartition(MARKER)
    return leading_number(tail.partition("\n")[0]) if marker else None


def leading_number(text: str) -> Decimal | None:
    """The number that a text begins with: `$1,800.`, `**18**`, `(-3)`, `18 dollars`. None where it holds another."""
    text = text.replace("−", "-")
    found = NUMBER.match(text, OPENING.match(text).end())
    return None if found is None or re.search("[0-9]", text[found.end() :]) else value(found)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None."""
    last = deque(NUMBER.finditer(text.replace("−", "-")), maxlen=1)
    return value(last[0]) if last else None


def value(found: re.Match[str]) -> Decimal | None:
    """What a match of NUMBER stands for, or None beyond MAX_DIGITS."""
    sign, digits = found[1] or "", found[2].replace(",", "")
    return Decimal(sign + digits) if len(digits) <= MAX_DIGITS else None
