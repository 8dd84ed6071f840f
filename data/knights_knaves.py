"""Knights and knaves: who always tells the truth, and who always lies? Generated puzzles, or published records.

Each of n people is a knight (every statement true) or a knave (every statement false) and makes one statement about
the group. Exactly one of the 2^n assignments of roles makes all claims consistent. Finding it takes a search.

    prompt         A: B and c
                   B: b iff a
                   C: not B
                   ?
    demonstration  A B C t and f no
                   A B c t and t yes f iff f yes not t yes
                   so A B c
    answer         A B c

The source is K&K, Xie et al. 2024, "On Memorization of Large Language Models in Logical Reasoning" (arXiv 2410.23123).
`generate` keeps the kinds of statement and their shares (an atom, not, and, or, ->, <=>: equally likely). Its English
and its published records are in knights_knaves_text.py. Departures:

- The default is a `terse` wording, in which every word is one token and the demonstration is a plain enumeration: a
  model small enough to train from scratch in minutes cannot learn English on the way.
- No empty statements, of which K&K keeps some: a tautology, a contradiction, or "I am a knight" is drawn again.
"""

import functools
import itertools
import random
from dataclasses import replace

from .files import check_number
from .knights_knaves_text import check_format, natural_example, natural_grade, parse_record  # noqa: F401
from .task import Example, Grade, outcome_grade

PUBLISHED = "K&K puzzles are published on the Hugging Face hub as K-and-K/knights-and-knaves, and in Unakar/Logic-RL"

# A statement is a nested tuple, as in the published records: ("telling-truth", i), ("lying", i), ("not", s),
# ("and", s, t, ...), ("or", s, t, ...), ("->", s, t), ("<=>", s, t). Person i counts from 0. Roles: True is a knight.
Statement = tuple
Roles = tuple[bool, ...]

KINDS = ("atom", "not", "and", "or", "->", "<=>")
TERSE_OPERATORS = {"and": "and", "or": "or", "->": "implies", "<=>": "iff"}
APPLY = {"and": int.__and__, "or": int.__or__, "->": lambda a, b: ~a | b, "<=>": lambda a, b: ~(a ^ b)}  # bitwise
LETTERS = "ABCDEFGH"
MAX_MISSES = 20_000  # attempts in a row without a new puzzle before `generate` gives up


def evaluate(statement: Statement, values: tuple[int, ...]) -> int:
    """Truth of a statement, bitwise: bit k of values[i] is person i's role in the k-th assignment.

    So all 2^n assignments are evaluated at once, and uniqueness is cheap to prove by brute force. A bit beyond them
    stands for all knaves, so that "always" is -1 and "never" is 0. Raises ValueError on an unknown operator.
    """
    operator, *operands = statement
    if operator in ("telling-truth", "lying"):
        return values[operands[0]] if operator == "telling-truth" else ~values[operands[0]]
    truths = [evaluate(operand, values) for operand in operands]
    if operator == "not":
        return ~truths[0]
    if operator not in APPLY:
        raise ValueError(f"unknown operator {operator!r} in the statement {statement!r}")
    return functools.reduce(APPLY[operator], truths)


def holds(statement: Statement, roles: Roles) -> bool:
    """Whether the statement is true when person i is a knight exactly where roles[i]."""
    return bool(evaluate(statement, tuple(map(int, roles))) & 1)


def assignments(people: int) -> list[Roles]:
    """All 2^people assignments in counting order: from all knights, the last person flipping fastest."""
    return list(itertools.product((True, False), repeat=people))


@functools.cache
def roles_table(people: int) -> tuple[int, ...]:
    """The values for `evaluate` over all assignments."""
    by_person = zip(*assignments(people), strict=True)
    return tuple(sum(1 << k for k, knight in enumerate(knights) if knight) for knights in by_person)


def consistent_tables(statements: tuple[Statement, ...]) -> list[int]:
    """Per speaker, the assignments (a bit each) under which a knight spoke the truth or a knave lied."""
    values = roles_table(len(statements))
    return [~values[i] ^ evaluate(statement, values) for i, statement in enumerate(statements)]


def solve(statements: tuple[Statement, ...]) -> list[Roles]:
    """Every assignment that makes all claims consistent, by brute force. Statement i is spoken by person i."""
    solutions = functools.reduce(int.__and__, consistent_tables(statements))
    return [roles for k, roles in enumerate(assignments(len(statements))) if solutions >> k & 1]


def draw_statement(rng: random.Random, people: int, depth: int, width: int) -> Statement:
    """A statement nested at most `depth` deep. No part of it repeats an operand or is constant."""
    kind = rng.choice(KINDS) if depth > 1 else "atom"
    if kind == "atom":
        return rng.choice(("telling-truth", "lying")), rng.randrange(people)
    count = 1 if kind == "not" else rng.randint(2, width) if kind in ("and", "or") else 2
    while True:
        operands = [draw_statement(rng, people, depth - 1, width) for _ in range(count)]
        statement = (kind, *operands)
        if len(set(operands)) == count and evaluate(statement, roles_table(people)) not in (0, -1):
            return statement


def draw_claim(rng: random.Random, speaker: int, people: int, depth: int, width: int) -> Statement:
    """A statement other than "I am a knight", which every speaker can claim, and its opposite, which none can."""
    values = roles_table(people)
    while True:
        statement = draw_statement(rng, people, depth, width)
        if evaluate(statement, values) not in (values[speaker], ~values[speaker]):
            return statement


def operands_at_most(statement: Statement) -> int:
    """The largest number of operands of any operator in the statement; 0 for an atom."""
    operands = [operand for operand in statement[1:] if isinstance(operand, tuple)]
    return max([len(operands), *map(operands_at_most, operands)])


def draw_puzzles(rng: random.Random, count: int, people: int, depth: int, width: int) -> list[tuple[Statement, ...]]:
    """`count` distinct puzzles with exactly one solution each. Raises ValueError when the space runs out of them.

    Beyond the common width of 2, each has a claim of the full width, so that none could be drawn with a smaller one.
    """
    puzzles: dict[tuple[Statement, ...], None] = {}  # a dict for its order: the draw must not depend on hashes
    misses = 0
    while len(puzzles) < count:
        statements = tuple(draw_claim(rng, speaker, people, depth, width) for speaker in range(people))
        wide_enough = width == 2 or max(map(operands_at_most, statements)) == width
        if wide_enough and statements not in puzzles and len(solve(statements)) == 1:
            puzzles[statements] = None
            misses = 0
        elif (misses := misses + 1) == MAX_MISSES:
            raise ValueError(
                f"found only {len(puzzles)} distinct puzzles with people={people}, depth={depth}, width={width}, and "
                f"train_size + test_size asks for {count}; lower train_size or test_size, or raise people or depth"
            )
    return list(puzzles)


def terse_roles(roles: Roles) -> str:
    """`A b C`: an upper-case letter is a knight, a lower-case one a knave."""
    return " ".join(letter if knight else letter.lower() for letter, knight in zip(LETTERS, roles, strict=False))


def terse_statement(statement: Statement, roles: Roles | None = None, nested: bool = False) -> str:
    """Infix, with each nested operator in parentheses. Given roles, an atom is replaced by its truth, `t` or `f`."""
    operator, *operands = statement
    if operator in ("telling-truth", "lying"):
        if roles is not None:
            return "t" if holds(statement, roles) else "f"
        letter = LETTERS[operands[0]]
        return letter if operator == "telling-truth" else letter.lower()
    parts = [terse_statement(operand, roles, nested=True) for operand in operands]
    text = f"not {parts[0]}" if operator == "not" else f" {TERSE_OPERATORS[operator]} ".join(parts)
    return f"({text})" if nested else text


def terse_prompt(statements: tuple[Statement, ...]) -> str:
    """A line `A: B or c` per speaker, then the question mark on its own line."""
    lines = [f"{LETTERS[i]}: {terse_statement(statement)}" for i, statement in enumerate(statements)]
    return "\n".join([*lines, "?"]) + "\n"


def terse_trace(statements: tuple[Statement, ...], people: int) -> str:
    """The demonstration: try assignments in counting order, check claims until one fails, stop at the solution.

    A line is `A b C f or t yes not t no`: the roles tried, then speaker by speaker the claim with its atoms replaced by
    their truth (without which a small model needs several times as many demonstrations), and whether that is consistent
    with the speaker's role. The last line is the conclusion, `so A b C`. Raises ValueError where there is no solution.
    """
    lines = []
    for roles in assignments(people):
        line = [terse_roles(roles)]
        for knight, statement in zip(roles, statements, strict=True):
            consistent = holds(statement, roles) == knight
            line += [terse_statement(statement, roles), "yes" if consistent else "no"]
            if not consistent:
                break
        lines.append(" ".join(line))
        if consistent:
            return "\n".join([*lines, f"so {terse_roles(roles)}"])
    raise ValueError(f"no assignment of roles makes these statements consistent: {statements!r}")


def generate(
    seed: int,
    *,
    people: int = 3,
    train_size: int = 4000,
    test_size: int = 512,
    wording: str = "terse",
    format: str = "conclusion",
    demonstrations: int | None = None,
    swapped: int = 0,
    depth: int = 2,
    width: int = 2,
) -> tuple[list[Example], list[Example]]:
    """Puzzles drawn from `seed` and `people`: (train, test), all distinct, each with exactly one solution.

    wording: `terse` or `natural`; it changes the text, not the puzzles. format: of natural wording, `conclusion` (a
    marker before it) or `logic-rl` (tags around it). demonstrations: how many training examples, from the first, have
    one (None: all); test examples always do. swapped: how many of those, from the first, change places in a ring, so
    that each is the demonstration of another puzzle. depth: nesting of a statement, 2 is one operator over atoms as
    published. width: operands of `and` and `or`, at most; beyond 2, every puzzle has such a claim. The test split is
    drawn first, so that it is the same for every train_size. Raises ValueError for a bad option, or too few puzzles.
    """
    demonstrations = train_size if demonstrations is None else demonstrations
    check_number("people", people, 2, len(LETTERS))
    check_number("train_size", train_size, 0, 10**7)
    check_number("test_size", test_size, 0, 10**7)
    # Not 1: with bare atoms, turning every role around keeps all claims consistent, so no solution is the only one.
    check_number("depth", depth, 2, 4)
    check_number("width", width, 2, 4)
    if width > people:  # a claim of more operands would name someone twice, for ever
        raise ValueError(f"width {width}: needs as many people or more, got people={people}")
    check_number("demonstrations", demonstrations, 0, train_size)
    check_number("swapped", swapped, 0, demonstrations)
    if swapped == 1:
        raise ValueError("swapped 1: a demonstration needs another to change places with")
    if wording not in ("terse", "natural"):
        raise ValueError(f"wording must be 'terse' or 'natural', got {wording!r}")
    check_format(format, wording)

    rng = random.Random(f"knights-knaves seed {seed} people {people}")  # a string is hashed by value, in all versions
    puzzles = draw_puzzles(rng, test_size + train_size, people, depth, width)
    examples = []
    for index, statements in enumerate(puzzles):
        (roles,) = solve(statements)
        if wording == "terse":
            prompt, answer, trace = terse_prompt(statements), terse_roles(roles), terse_trace(statements, people)
        else:
            tables = roles_table(people), consistent_tables(statements)
            prompt, answer, trace = natural_example(statements, roles, rng, format, *tables)
        demonstration = trace if index < test_size + demonstrations else None
        examples.append(Example(prompt, answer, demonstration, group=f"{people} people"))
    test, train = examples[:test_size], examples[test_size:]
    for i in range(swapped):
        train[i] = replace(train[i], demonstration=examples[test_size + (i + 1) % swapped].demonstration)
    return train, test


def grade(completion: str, example: Example, *, format: str = "conclusion") -> Grade:
    """Reward 1 when the conclusion gives every person the right role; the wording is the one of `example.answer`.

    A terse conclusion is well formed where the last line, and no other, is `so` plus each person once, in order.
    format="logic-rl" has a graded reward (see `natural_grade`). Any text is graded, in linear time, without an error.
    """
    wording = "natural" if example.answer.startswith("(") else "terse"
    check_format(format, wording)
    if wording == "natural":
        return natural_grade(completion, example, format)
    lines = [line.strip() for line in completion.strip().splitlines()]
    conclusions = [line for line in lines if line.split()[:1] == ["so"]]
    last, everyone = lines[-1] if lines else "", " ".join(LETTERS[: len(example.answer.split())])
    well_formed = conclusions == [last] and last.upper() == f"SO {everyone}"
    return outcome_grade(well_formed and last == f"so {example.answer}", well_formed)
