"""Countdown: reach a target from a few numbers with + - * /, using every number exactly once.

The task is the one of TinyZero (Jiayi-Pan/TinyZero) and of "Stream of Search" (Gandhi et al., arXiv 2404.03683).

    prompt         numbers 65 18 37 target 84
    demonstration  65 + 18 = 83, 83 + 37 = 120 no
                   65 + 18 = 83, 83 - 37 = 46 no
                   65 - 18 = 47, 47 + 37 = 84 yes
                   <answer> (65 - 18) + 37 </answer>
    answer         65 18 37 = 84

(Two paths that start with 83 are missing: 83 * 37 is beyond the limit on results, 83 / 37 is no integer.)

Where this departs from its sources, and why:

- The verifier parses the expression itself, in exact fractions. TinyZero calls Python's `eval` and compares floats to
  1e-5, which runs a model's text as code and lets 0.99999... pass. A second answer pair is malformed here, where
  TinyZero grades the last one: a policy must not be paid for guessing many times.
- No partial reward for a well-formed wrong answer (TinyZero pays 0.1): every task here pays outcomes only.
- A stream of search names each node and prints its whole state, over thousands of tokens. Here a line is one complete
  path and a trace is a short *window* of the search: at most MAX_DEAD_ENDS failed paths, then the first that succeeds.
  So the first line of a trace is a guess of where to look; each next line is the mechanical next path; and the search
  stops where the arithmetic says so. A small model with a byte-level tokenizer can learn that.
- Results are positive integers in generated instances (the game's rule); the verifier allows any exact fraction.
"""

from __future__ import annotations

import operator
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction

from .task import Example, Grade, outcome_grade

PUBLISHED = "Countdown problems with answers are published in liumy2010/UFT on GitHub (Liu et al., arXiv 2505.16984)"

MAX_DEAD_ENDS = 3  # failed paths that a demonstration shows before the one that succeeds
SEARCHED = 3  # the search covers the steps that start from this many numbers; steps before those are the true ones
MAX_MISSES = 20_000  # draws in a row without a new instance before `generate` gives up

MAX_LENGTH = 1000  # characters of an expression; these three limits bound the cost of a hostile completion
MAX_DEPTH = 32  # nested parentheses
MAX_DIGITS = 18  # digits of one number
LARGEST = 10**MAX_DIGITS - 1

Term = tuple[int, str]  # a number at hand: its value, and the expression over the given numbers that made it
TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()×÷−]))")  # [0-9], because \d and int() also take fullwidth digits
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
ASCII = {"×": "*", "÷": "/", "−": "-"}


def generate(
    seed: int,
    *,
    numbers: int = 3,
    train_size: int = 4000,
    test_size: int = 512,
    demonstrations: int | None = None,
    low: int = 1,
    high: int = 99,
    max_target: int = 99,
) -> tuple[list[Example], list[Example]]:
    """Draw distinct solvable instances; no two share both the numbers (in any order) and the target.

    numbers: how many are given, 2..6, each uniform in low..high. The target, 1..max_target, is where a random walk of
    legal moves ends, hence reachable. demonstrations: how many training examples, from the first, have one (None: all);
    test examples always do; the problems are the same either way. The test split is drawn first, so that it stays the
    same for every train_size.

    Raises ValueError for an option out of range, or when the ranges hold too few distinct instances.
    """
    for name, value, least, most in (
        ("numbers", numbers, 2, 6),
        ("train_size", train_size, 0, 10**7),
        ("test_size", test_size, 0, 10**7),
        ("demonstrations", train_size if demonstrations is None else demonstrations, 0, train_size),
        ("low", low, 1, LARGEST),
        ("high", high, low, LARGEST),
        ("max_target", max_target, 1, LARGEST),
    ):
        if not is_integer(value, least, most):
            raise ValueError(f"countdown: {name} must be an integer in {least}..{most}, got {value!r}")
    rng = random.Random(seed)
    limit = 10 * max(high, max_target)  # on every result: products beyond it are no help and hard to learn
    wanted = train_size + test_size
    demonstrated = wanted if demonstrations is None else test_size + demonstrations
    seen: set[tuple[tuple[int, ...], int]] = set()
    examples: list[Example] = []
    misses = 0
    while len(examples) < wanted and misses < MAX_MISSES:
        given = [rng.randint(low, high) for _ in range(numbers)]
        terms: list[Term] = [(number, str(number)) for number in given]
        steps: list[str] = []
        while len(terms) > 1:
            if len(terms) == min(numbers, SEARCHED):
                opening, start = list(steps), terms
            step, terms = rng.choice(list(moves(terms, limit)))
            steps.append(step)
        target = terms[0][0]
        key = (tuple(sorted(given)), target)
        if target > max_target or key in seen:
            misses += 1
            continue
        misses = 0
        seen.add(key)
        dead_ends = rng.randint(0, MAX_DEAD_ENDS)  # varies: else a model learns to stop by counting lines
        trace = demonstrate(opening, start, target, limit, dead_ends) if len(examples) < demonstrated else None
        examples.append(pose(given, target, trace))
    if len(examples) < wanted:
        raise ValueError(
            f"countdown: found {len(examples)} distinct instances of {numbers} numbers in {low}..{high} with a target "
            f"up to {max_target}, but train_size + test_size asks for {wanted}; ask for fewer or widen the ranges"
        )
    return examples[test_size:], examples[:test_size]


def parse_record(record: dict) -> Example:
    """A published record {"numbers": [44, 19, 35], "target": 98, "answer": "..."}.

    `answer`, where a record has it, is the demonstration, verbatim. Raises KeyError or ValueError with the reason.
    """
    given, target, demonstration = record["numbers"], record["target"], record.get("answer")
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"numbers must be a list of at least two integers, got {given!r}")
    if not all(is_integer(number, 0, LARGEST) for number in given):
        raise ValueError(f"numbers must be integers in 0..{LARGEST}, got {given!r}")
    if not is_integer(target, -LARGEST, LARGEST):
        raise ValueError(f"target must be an integer of at most {MAX_DIGITS} digits, got {target!r}")
    if demonstration is not None and not (isinstance(demonstration, str) and demonstration.strip()):
        raise ValueError(f"answer must be a text that is not empty, or absent, got {demonstration!r}")
    return pose(given, target, demonstration)


def is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def pose(given: Sequence[int], target: int, demonstration: str | None) -> Example:
    """The one place that words a problem, so that generated and published ones look alike to a model."""
    listed = " ".join(map(str, given))
    prompt, answer = f"numbers {listed} target {target}\n", f"{listed} = {target}"
    return Example(prompt, answer, demonstration, group=f"{len(given)} numbers")


# --- the search: what a demonstration shows ---


def moves(terms: Sequence[Term], limit: int) -> Iterator[tuple[str, list[Term]]]:
    """Each legal move in the fixed order, as (its line of arithmetic, the numbers then at hand, its result first).

    Pairs go by position, operators + - * /, the larger number on the left. Results are integers in 1..limit. For
    numbers up to `limit` there is always a move: a - b, or a / b = 1 where the two are equal.
    """
    for i in range(len(terms)):
        for j in range(i + 1, len(terms)):
            big, small = (terms[i], terms[j]) if terms[i][0] >= terms[j][0] else (terms[j], terms[i])
            a, b = big[0], small[0]
            rest = [term for k, term in enumerate(terms) if k != i and k != j]
            quotient, remainder = divmod(a, b)
            for symbol, result in (("+", a + b), ("-", a - b), ("*", a * b), ("/", 0 if remainder else quotient)):
                if 1 <= result <= limit:
                    expression = f"{bracket(big[1])} {symbol} {bracket(small[1])}"
                    yield f"{a} {symbol} {b} = {result}", [(result, expression), *rest]


def bracket(expression: str) -> str:
    return expression if expression.isdigit() else f"({expression})"


def paths(steps: list[str], terms: Sequence[Term], limit: int) -> Iterator[tuple[list[str], Term]]:
    """Depth first, each complete path from `terms` down to one number: (all its steps, that number)."""
    if len(terms) == 1:
        yield steps, terms[0]
        return
    for step, remaining in moves(terms, limit):
        yield from paths([*steps, step], remaining, limit)


def demonstrate(opening: list[str], start: Sequence[Term], target: int, limit: int, dead_ends: int) -> str:
    """Search depth first from `start` and show its end: up to `dead_ends` failed paths, then the first that succeeds.

    A line is a whole path, `opening` included, with its verdict, so that each line can be checked on its own. With
    SEARCHED or fewer numbers the search is complete. With more, it starts from a state that is known to lead to the
    target, since a complete one takes millions of paths. The target must be reachable from `start`.
    """
    failed: deque[str] = deque(maxlen=dead_ends)
    for steps, (value, expression) in paths(opening, start, limit):
        line = ", ".join(steps)
        if value == target:
            return "\n".join([*failed, f"{line} yes", f"<answer> {expression} </answer>"])
        failed.append(f"{line} no")
    raise AssertionError(f"no path from {start} to {target}")


# --- the verifier ---


def grade(completion: str, example: Example) -> Grade:
    """Judge the expression in the one <answer> ... </answer> pair of a completion; text around it is free.

    Well formed: exactly one pair, holding an expression that parses, maybe followed by "= integer". Correct: also each
    given number is used exactly once, the value is the target, and so is the integer after "=" if there is one.
    Any text is graded, in time linear in its length; none raises.
    """
    listed, _, target = example.answer.partition(" = ")
    head, opened, tail = completion.partition("<answer>")
    body, closed, after = tail.partition("</answer>")
    if not (opened and closed) or any(tag in part for tag in ("<answer>", "</answer>") for part in (head, body, after)):
        return outcome_grade(correct=False, well_formed=False)
    expression, equals, claim = body.partition("=")
    claim = claim.strip()
    if equals and not re.fullmatch(rf"-?[0-9]{{1,{MAX_DIGITS}}}", claim):
        return outcome_grade(correct=False, well_formed=False)
    try:
        value, used = evaluate(expression)
    except ValueError:
        return outcome_grade(correct=False, well_formed=False)
    allowed = sorted(used) == sorted(map(int, listed.split()))
    correct = allowed and value == int(target) and (not equals or int(claim) == int(target))
    return outcome_grade(correct, well_formed=True)


def evaluate(expression: str) -> tuple[Fraction | None, list[int]]:
    """Parse an expression: (its exact value or None where it divides by zero, its numbers from left to right).

        sum     = product (("+" | "-") product)*
        product = atom (("*" | "/") atom)*
        atom    = integer | "(" sum ")"

    No sign, decimal point or exponent: the game has none. Raises ValueError with the reason for anything else.
    """
    tokens = tokenize(expression)
    numbers: list[int] = []
    position = 0

    def chain(operators: str, depth: int) -> Fraction | None:
        """A run of operands joined from left to right: of products for "+-", of atoms for "*/"."""
        nonlocal position
        total = chain("*/", depth) if operators == "+-" else atom(depth)
        while tokens[position] and tokens[position] in operators:
            operation = tokens[position]
            position += 1
            value = chain("*/", depth) if operators == "+-" else atom(depth)
            if total is None or value is None or (operation == "/" and value == 0):
                total = None  # still read on: the rest may be a syntax error
            else:
                total = APPLY[operation](total, value)
        return total

    def atom(depth: int) -> Fraction | None:
        nonlocal position
        token = tokens[position]
        position += 1
        if token.isdigit():
            numbers.append(int(token))
            return Fraction(numbers[-1])
        if token != "(":
            raise ValueError(f"expected a number or '(' as token {position}, got {token or 'the end'!r}")
        if depth == MAX_DEPTH:
            raise ValueError(f"parentheses nest deeper than {MAX_DEPTH}")
        value = chain("+-", depth + 1)
        if tokens[position] != ")":
            raise ValueError(f"expected ')' as token {position + 1}, got {tokens[position] or 'the end'!r}")
        position += 1
        return value

    value = chain("+-", 0)
    if tokens[position]:
        raise ValueError(f"expected an operator or the end as token {position + 1}, got {tokens[position]!r}")
    return value, numbers


def tokenize(expression: str) -> list[str]:
    """Split into integers, operators (in ASCII) and parentheses; an empty token marks the end."""
    expression = expression.strip()
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters, more than {MAX_LENGTH}")
    tokens, position = [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"no number, operator or parenthesis at character {position + 1}")
        digits, symbol = match.groups()
        if digits and len(digits) > MAX_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits, more than {MAX_DIGITS}")
        tokens.append(digits or ASCII.get(symbol, symbol))
        position = match.end()
    return [*tokens, ""]
