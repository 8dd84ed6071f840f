r"""MATH: competition problems whose answer is a piece of LaTeX.

The task is the one of Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset"
(arXiv 2103.03874); its 500-problem test subset comes from Lightman et al. (arXiv 2305.20050).

    prompt         What is $\frac14+\frac14$?
                   Work through the problem step by step and give the final answer within \boxed{}.
    demonstration  ... so the sum is $\boxed{\frac{1}{2}}$.
    answer         \frac{1}{2}

The last balanced box counts, as in the sources, but an empty \boxed{} (the prompt has one) is no answer. Equality is
judged by latex.py, or by the package math-verify, which hands both answers to a computer algebra system.
"""

import re
from collections.abc import Callable

from .latex import MAX_LENGTH, equivalent, last_boxed
from .task import Example, Grade, outcome_grade, outside_cut_thought, required_text

PUBLISHED = "MATH is published as hendrycks/math on GitHub, 500 problems as HuggingFaceH4/MATH-500 on Hugging Face"
INSTRUCTION = "Work through the problem step by step and give the final answer within \\boxed{}."
VERIFIERS = ("rules", "math-verify")


def parse_record(record: dict) -> Example:
    r"""A published record {"problem", "solution", "level": "Level 3", "type"}, or one of MATH-500, where `level` is 3.

    The solution is the demonstration, and its last box holds the answer, to which a field `answer` must be equivalent.
    It must be graded as right itself. Raises KeyError, ValueError or TypeError with a reason that names the field.
    """
    problem, solution, level = required_text(record, "problem"), required_text(record, "solution"), record.get("level")
    answer = last_boxed(solution)
    if answer is None:
        raise ValueError(f"solution must have the answer in a \\boxed{{}}, but ends in {solution[-60:]!r}")
    if "answer" in record and not equivalent(bare_answer(required_text(record, "answer")), answer):
        raise ValueError(f"answer {record['answer']!r} is not what the solution has in its last box, {answer!r}")
    if isinstance(level, bool) or not isinstance(level, str | int | None):
        raise TypeError(f"level must be a text, an integer or absent, got {level!r}")
    group = f"Level {level}" if isinstance(level, int) else level or ""
    example = Example(f"{problem.rstrip()}\n{INSTRUCTION}\n", answer, solution, group)
    if not grade(solution, example).correct:
        raise ValueError(f"solution is not graded as right itself; its last box holds {answer!r}")
    return example


def bare_answer(text: str) -> str:
    r"""What the last box of a text holds, else what stands between the $ $, \( \) or \[ \] around it, else the text."""
    enclosed = re.fullmatch(r"\s*(?:\$+([^$]+)\$+|\\\((.+)\\\)|\\\[(.+)\\\])\s*", text, re.DOTALL)
    return last_boxed(text) or (enclosed[enclosed.lastindex] if enclosed else text).strip()


def grade(completion: str, example: Example, *, verifier: str = "rules") -> Grade:
    """Compare the last box of a completion with the bare answer. Well formed: there is a box with something in it.

    verifier: "rules" is `equivalent`; "math-verify" asks the package of that name, which may take seconds an answer
    and works in the main thread only. Raises ValueError for another one and for a missing package.
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
    same = equivalent if verifier == "rules" else math_verify()
    answer = last_boxed(outside_cut_thought(completion))
    correct = answer is not None and same(bare_answer(example.answer), answer)
    return outcome_grade(correct, well_formed=answer is not None)


def math_verify() -> Callable[[str, str], bool]:
    """The comparison of math-verify, as a function of (gold, answer): it is not symmetric."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ValueError("verifier math-verify is not installed: pip install 'math-verify[antlr4_13_2]'") from None

    def same(gold: str, answer: str) -> bool:
        if len(answer) > MAX_LENGTH or gold.strip() == answer.strip():
            return gold.strip() == answer.strip()
        return bool(verify(*(parse(f"\\boxed{{{text}}}") for text in (gold, answer))))

    return same
