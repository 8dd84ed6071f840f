"""Countdown: reach a target from a few numbers with + - * /, using every number exactly once.

The task is the one of TinyZero (Jiayi-Pan/TinyZero) and of "Stream of Search" (Gandhi et al., arXiv 2404.03683).

    prompt         numbers 65 18 37 target 84
    demonstration  65 + 18 = 83, 83 + 37 = 120 no
                   65 + 18 = 83, 83 - 37 = 46 no
                   65 - 18 = 47, 47 + 37 = 84 yes
                   <answer> (65 - 18) + 37 </answer>
    answer         65 18 37 = 84

Where this departs from its sources, and why:

- The verifier computes in exact fractions what Python's parser read. TinyZero runs a model's text with `eval` and
  compares floats to 1e-5. As there, the last answer pair counts, whatever was guessed before it.
- No partial reward for a well-formed wrong answer (TinyZero gives 0.1): every task here rewards outcomes only.
- A stream of search takes thousands of tokens. Here a line is one complete path, and a trace is at most MAX_DEAD_ENDS
  failed paths, then the first that succeeds: a small model learns where to look, and which path comes next.
- Results are positive integers in generated instances (the game's rule), up to a limit: so 83 / 37 and 83 * 37 are
  missing above. The verifier allows any exact fraction.
"""

import ast
import operator
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, combinations

from .files import check_number
from .task import Example, Grade, outcome_grade, required_text, tagged_answer

PUBLISHED = "Countdown problems with answers are published in liumy2010/UFT on GitHub (Liu et al., arXiv 2505.16984)"

MAX_DEAD_ENDS = 3  # failed paths in a demonstration before the one that succeeds
SEARCHED = 3  # numbers from which on the search covers all steps; the steps before are the right ones
MAX_MISSES = 20_000  # draws in a row without a new instance before `generate` gives up

MAX_LENGTH = 1000  # characters of an expression; these three limits bound the cost of a hostile completion
MAX_DEPTH = 32  # nested parentheses
MAX_DIGITS = 18  # digits of one number
MAX_NUMBER = 10**MAX_DIGITS - 1

Term = tuple[int, str]  # a number that is left: its value, and the expression that made it, in parentheses
APPLY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ASCII = str.maketrans("×·⋅÷−–`$", "***/--  ")  # a blank, since 3`8 is not 38
COMMANDS = {r"\times": "*", r"\cdot": "*", r"\div": "/"}
COMMANDS |= dict.fromkeys([r"\left", r"\right", r"\(", r"\)", r"\[", r"\]"], " ")


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
    test examples always do. The test split is drawn first, so that it is the same for every train_size. Raises
    ValueError for an option out of range, or when the ranges hold too few distinct instances.
    """
    demonstrations = train_size if demonstrations is None else demonstrations
    check_number("countdown: numbers", numbers, 2, 6)
    check_number("countdown: train_size", train_size, 0, 10**7)
    check_number("countdown: test_size", test_size, 0, 10**7)
    check_number("countdown: demonstrations", demonstrations, 0, train_size)
    check_number("countdown: low", low, 1, MAX_NUMBER)
    check_number("countdown: high", high, low, MAX_NUMBER)
    check_number("countdown: max_target", max_target, 1, MAX_NUMBER)
    rng = random.Random(seed)
    limit = 10 * max(high, max_target)  # on every result: products beyond it are no help and hard to learn
    wanted = train_size + test_size
    found: dict[tuple[tuple[int, ...], int], Example] = {}  # by what must differ
    misses = 0
    while len(found) < wanted and misses < MAX_MISSES:
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
        misses += 1
        if target <= max_target and key not in found:
            misses = 0
            dead_ends = rng.randint(0, MAX_DEAD_ENDS)  # varies: else a model learns to stop by counting lines
            with_trace = len(found) < test_size + demonstrations
            trace = demonstrate(opening, start, target, limit, dead_ends) if with_trace else None
            found[key] = pose(given, target, trace)
    if len(found) < wanted:
        raise ValueError(
            f"countdown: found {len(found)} distinct instances of {numbers} numbers in {low}..{high} with a target "
            f"up to {max_target}, but train_size + test_size asks for {wanted}; ask for fewer or widen the ranges"
        )
    examples = list(found.values())
    return examples[test_size:], examples[:test_size]


def parse_record(record: dict) -> Example:
    """A published record {"numbers": [44, 19, 35], "target": 98, "answer": "..."}, or with `nums` for `numbers`.

    `answer`, where a record has it, is the demonstration, verbatim. Raises KeyError or ValueError with the reason.
    """
    given, target = record["nums" if "nums" in record else "numbers"], record["target"]
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"numbers must be a list of at least two integers, got {given!r}")
    for number in given:
        check_number("numbers: one of", number, 0, MAX_NUMBER)
    check_number("target", target, -MAX_NUMBER, MAX_NUMBER)
    return pose(given, target, None if record.get("answer") is None else required_text(record, "answer"))


def pose(given: Sequence[int], target: int, demonstration: str | None) -> Example:
    """The one place that words a problem, so that generated and published ones look alike to a model."""
    listed = " ".join(map(str, given))
    prompt, answer = f"numbers {listed} target {target}\n", f"{listed} = {target}"
    return Example(prompt, answer, demonstration, group=f"{len(given)} numbers")


def moves(terms: Sequence[Term], limit: int) -> Iterator[tuple[str, list[Term]]]:
    """Each legal move in the fixed order, as (its line of arithmetic, the numbers that are left, its result first).

    Pairs go by position, operators + - * /, the larger number on the left. Results are integers in 1..limit. There is
    always a move between numbers up to `limit`: a - b, or a / b = 1.
    """
    for i, j in combinations(range(len(terms)), 2):
        (a, big), (b, small) = sorted((terms[i], terms[j]), key=lambda term: term[0], reverse=True)
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        quotient, remainder = divmod(a, b)
        for symbol, result in (("+", a + b), ("-", a - b), ("*", a * b), ("/", 0 if remainder else quotient)):
            if 1 <= result <= limit:
                yield f"{a} {symbol} {b} = {result}", [(result, f"({big} {symbol} {small})"), *rest]


def paths(steps: list[str], terms: Sequence[Term], limit: int) -> Iterator[tuple[list[str], Term]]:
    """Depth first, each complete path from `terms` down to one number: (all its steps, that number)."""
    if len(terms) == 1:
        yield steps, terms[0]
        return
    for step, remaining in moves(terms, limit):
        yield from paths([*steps, step], remaining, limit)


def demonstrate(opening: list[str], start: Sequence[Term], target: int, limit: int, dead_ends: int) -> str:
    """The end of a depth-first search from `start`: up to `dead_ends` failed paths, then the first that succeeds.

    A line is a whole path, `opening` included, with its verdict. With SEARCHED or fewer numbers the search is complete;
    with more, which would take millions of paths, it starts from a state that is known to lead to the target.
    """
    failed: deque[str] = deque(maxlen=dead_ends)
    for steps, (value, expression) in paths(opening, start, limit):
        line = ", ".join(steps)
        if value == target:
            return "\n".join([*failed, f"{line} yes", f"<answer> {expression[1:-1]} </answer>"])
        failed.append(f"{line} no")
    raise AssertionError(f"no path from {start} to {target}")


def grade(completion: str, example: Example) -> Grade:
    """Judge the expression in the last <answer> ... </answer> pair of a completion; text around it is free.

    Well formed: a pair that holds an expression that parses, maybe followed by "= integer". Correct: also each given
    number is used exactly once, the value is the target, and so is the integer after "=" if there is one.
    Any text is graded, in time linear in its length, without an error.
    """
    listed, _, target = example.answer.partition(" = ")
    written = (tagged_answer(completion) or "").translate(ASCII)
    for command, symbol in COMMANDS.items():
        written = written.replace(command, symbol)
    expression, equals, claim = map(str.strip, written.strip().removesuffix(".").partition("="))
    try:
        value, used = evaluate(expression)
        if equals and not re.fullmatch(rf"-?[0-9]{{1,{MAX_DIGITS}}}", claim):
            raise ValueError("what follows = is not an integer")
    except ValueError:
        return outcome_grade(correct=False, well_formed=False)
    allowed = sorted(used) == sorted(map(int, listed.split()))
    correct = allowed and value == int(target) and (not equals or int(claim) == int(target))
    return outcome_grade(correct, well_formed=True)


def evaluate(expression: str) -> tuple[Fraction | None, list[int]]:
    """Parse an expression: (its exact value or None where it divides by zero, its numbers from left to right).

    It may hold whole numbers, + - * /, parentheses and blanks, but no sign, decimal point or exponent. Python's parser
    reads it, and none of it runs. Raises ValueError with the reason for anything else.
    """
    text = re.sub(r"\s", " ", expression.strip())
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(text)} characters, more than {MAX_LENGTH}")
    if foreign := re.search(r"[^0-9 +*/()-]", text):  # [0-9], because \d and int() also take fullwidth digits
        raise ValueError(f"no number, operator or parenthesis at character {foreign.start() + 1}")
    if max(accumulate((char == "(") - (char == ")") for char in text), default=0) > MAX_DEPTH:
        raise ValueError(f"parentheses nest deeper than {MAX_DEPTH}")
    digits = re.findall("[0-9]+", text)
    if (longest := max(map(len, digits), default=0)) > MAX_DIGITS:
        raise ValueError(f"a number has {longest} digits, more than {MAX_DIGITS}")
    try:
        nodes = list(ast.walk(ast.parse(re.sub(r"\b0+(?=[0-9])", "", text), mode="eval").body))
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not an expression: {error.msg}") from None
    if not all(isinstance(node, (ast.BinOp, ast.Constant, *APPLY)) for node in nodes):
        raise ValueError(f"{text!r} has more than whole numbers joined by + - * /")
    numbers = list(map(int, digits))
    values: dict[ast.AST, Fraction] = {}
    try:
        for node in reversed(nodes):  # operands before what joins them
            if isinstance(node, ast.Constant):
                values[node] = Fraction(node.value)
            elif isinstance(node, ast.BinOp):
                values[node] = APPLY[type(node.op)](values[node.left], values[node.right])
    except ZeroDivisionError:
        return None, numbers
    return values[nodes[0]], numbers
