"""Knights and knaves: who always tells the truth, and who always lies? Generated puzzles, or published records.

Each of n people is a knight (every statement true) or a knave (every statement false) and makes one statement about
the group. Exactly one of the 2^n assignments of roles makes all claims consistent; finding it takes a search over
cases, which is what a chain of thought can show and what guessing (1 in 2^n) cannot fake.

The source is K&K, Xie et al. 2024, "On Memorization of Large Language Models in Logical Reasoning" (arXiv 2410.23123).
`parse_record` takes its published records as they are. `generate` keeps the kinds of statement and their shares (an
atom, not, and, or, ->, <=>: equally likely), the natural wording and the assume / contradict / go back demonstrations.
Departures:

- A second, `terse` wording, in which every word is one token and the demonstration is a plain enumeration: a model
  small enough to train from scratch in minutes cannot learn English on the way.
- No empty statements: a tautology, a contradiction, or one that equals "I am a knight" is drawn again, since it would
  leave less to reason about. K&K keeps some of them.
- Natural wording puts nested operands in parentheses, since English leaves "A or B if C" open.
- The verifier is stricter than a search for the right substring: the conclusion must hold each person once and nothing
  else, so that naming every possible answer earns nothing.

With format="logic-rl", natural wording takes the tags and the graded reward of Logic-RL, Xie et al. 2025 (arXiv
2502.14768): the reasoning stands inside <think> </think>, the conclusion inside <answer> </answer>. Departures: the
prompt is worded here, and says nothing of roles in a chat; and the conclusion is read as strictly as above.
"""

from __future__ import annotations

import functools
import itertools
import random

from .task import Example, Grade, outcome_grade

PUBLISHED = "K&K puzzles are published on the Hugging Face hub as K-and-K/knights-and-knaves, and in Unakar/Logic-RL"

# A statement is a nested tuple, as in the published records: ("telling-truth", i), ("lying", i), ("not", s),
# ("and", s, t, ...), ("or", s, t, ...), ("->", s, t), ("<=>", s, t). Person i counts from 0. Roles: True is a knight.
Statement = tuple
Roles = tuple[bool, ...]

KINDS = ("atom", "not", "and", "or", "->", "<=>")
LETTERS = "ABCDEFGH"
MAX_MISSES = 20_000  # attempts in a row without a new puzzle after which the space counts as exhausted

TERSE_OPERATORS = {"and": "and", "or": "or", "->": "implies", "<=>": "iff"}

HEAD = "Let's think step by step, by considering whether each person is lying and if that leads to contradiction."
FOOT = "This leads to a feasible solution."
MARKER = "CONCLUSION:"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SUFFIXES = {  # by format: what a prompt asks for
    "conclusion": (
        f'\nThink step by step. End with "{MARKER}" and one numbered line per person, such as "(1) Zoey is a knight".\n'
    ),
    "logic-rl": (
        "\nReason step by step inside <think> </think>. Then give your conclusion inside <answer> </answer>, "
        'one numbered line per person, such as "(1) Zoey is a knight".\n'
    ),
}
FIRST_NAMES = (
    "Abigail Adam Alice Amelia Anna Benjamin Carlos Charlotte Chloe Daniel David Elena Emma Ethan Evelyn Felix Grace "
    "Hannah Harper Henry Isaac Jack James Julia Kofi Laura Leila Lucas Maria Mason Michael Nadia Noah Oliver Omar "
    "Priya Samuel Sofia Victor Zoey"
)
SAYINGS = (
    '{name} said, "{quote}".',
    '{name} was heard saying, "{quote}".',
    '{name} remarked, "{quote}".',
    '{name} asserted: "{quote}".',
    'In {name}\'s words: "{quote}".',
    'According to {name}, "{quote}".',
    'As {name} put it, "{quote}".',
    '"{quote}," {name} mentioned.',
    '"{quote}," {name} declared.',
    "{name} told you that {claim}.",
    "{name} expressed that {claim}.",
)


# ---- Logic -----------------------------------------------------------------------------------------------------------


def evaluate(statement: Statement, values: tuple[int, ...], ones: int) -> int:
    """Truth of a statement, bitwise: values[i] holds person i's role in each bit, and `ones` has every bit set.

    One bit evaluates one assignment; 2^n bits evaluate all of them at once (see `roles_table`), which is what makes
    proving uniqueness by brute force cheap. Raises ValueError on an unknown operator.
    """
    operator, *operands = statement
    if operator == "telling-truth":
        return values[operands[0]]
    if operator == "lying":
        return ones ^ values[operands[0]]
    truths = [evaluate(operand, values, ones) for operand in operands]
    if operator == "not":
        return ones ^ truths[0]
    if operator == "and":
        return functools.reduce(int.__and__, truths)
    if operator == "or":
        return functools.reduce(int.__or__, truths)
    if operator == "->":
        return (ones ^ truths[0]) | truths[1]
    if operator == "<=>":
        return ones ^ truths[0] ^ truths[1]
    raise ValueError(f"unknown operator {operator!r} in the statement {statement!r}")


def holds(statement: Statement, roles: Roles) -> bool:
    """Whether the statement is true when person i is a knight exactly where roles[i]."""
    return bool(evaluate(statement, tuple(map(int, roles)), 1))


def assignments(people: int) -> list[Roles]:
    """All 2^people assignments in counting order: from all knights, the last person flipping fastest."""
    return list(itertools.product((True, False), repeat=people))


@functools.cache
def roles_table(people: int) -> tuple[tuple[int, ...], int]:
    """(values, ones) for `evaluate` over all assignments: bit k of values[i] is person i's role in the k-th."""
    every = assignments(people)
    values = tuple(sum(1 << k for k, roles in enumerate(every) if roles[person]) for person in range(people))
    return values, (1 << len(every)) - 1


def consistent_tables(statements: tuple[Statement, ...]) -> list[int]:
    """Per speaker, the assignments (a bit each) under which a knight spoke the truth or a knave lied."""
    values, ones = roles_table(len(statements))
    return [ones ^ values[i] ^ evaluate(statement, values, ones) for i, statement in enumerate(statements)]


def solve(statements: tuple[Statement, ...], people: int) -> list[Roles]:
    """Every assignment that makes all claims consistent, by brute force. Statement i is spoken by person i."""
    if len(statements) != people:
        raise ValueError(f"{people} people make {people} statements, got {len(statements)}")
    solutions = functools.reduce(int.__and__, consistent_tables(statements))
    return [roles for k, roles in enumerate(assignments(people)) if solutions >> k & 1]


# ---- Puzzles ---------------------------------------------------------------------------------------------------------


def draw_statement(rng: random.Random, people: int, depth: int, width: int) -> Statement:
    """A statement nested at most `depth` deep. No part of it repeats an operand or is constant."""
    kind = rng.choice(KINDS) if depth > 1 else "atom"
    if kind == "atom":
        return rng.choice(("telling-truth", "lying")), rng.randrange(people)
    count = 1 if kind == "not" else rng.randint(2, width) if kind in ("and", "or") else 2
    values, ones = roles_table(people)
    while True:
        operands = [draw_statement(rng, people, depth - 1, width) for _ in range(count)]
        statement = (kind, *operands)
        if len(set(operands)) == count and evaluate(statement, values, ones) not in (0, ones):
            return statement


def draw_claim(rng: random.Random, speaker: int, people: int, depth: int, width: int) -> Statement:
    """A statement that tells something: "I am a knight" in any guise says nothing, and nobody can say the opposite."""
    values, ones = roles_table(people)
    while True:
        statement = draw_statement(rng, people, depth, width)
        if evaluate(statement, values, ones) not in (values[speaker], ones ^ values[speaker]):
            return statement


def operands_at_most(statement: Statement) -> int:
    """The largest number of operands of any operator in the statement; 0 for an atom."""
    operands = [operand for operand in statement[1:] if isinstance(operand, tuple)]
    return max([len(operands), *map(operands_at_most, operands)])


def draw_puzzles(rng: random.Random, count: int, people: int, depth: int, width: int) -> list[tuple[Statement, ...]]:
    """`count` distinct puzzles with exactly one solution each. Raises ValueError when the space runs out of them.

    Beyond the common width of 2, a puzzle holds at least one claim of the full width, so that none of them could have
    been drawn with a smaller one: widths are domains apart.
    """
    puzzles: dict[tuple[Statement, ...], None] = {}  # a dict for its order: the draw must not depend on hashes
    misses = 0
    while len(puzzles) < count:
        statements = tuple(draw_claim(rng, speaker, people, depth, width) for speaker in range(people))
        wide_enough = width == 2 or max(map(operands_at_most, statements)) == width
        if wide_enough and statements not in puzzles and len(solve(statements, people)) == 1:
            puzzles[statements] = None
            misses = 0
        elif (misses := misses + 1) == MAX_MISSES:
            raise ValueError(
                f"found only {len(puzzles)} distinct puzzles with people={people}, depth={depth}, width={width}, and "
                f"train_size + test_size asks for {count}; lower train_size or test_size, or raise people or depth"
            )
    return list(puzzles)


# ---- Terse wording ---------------------------------------------------------------------------------------------------


def terse_roles(roles: Roles) -> str:
    """`A b C`: a capital letter is a knight, a small one a knave."""
    return " ".join(letter if knight else letter.lower() for letter, knight in zip(LETTERS, roles, strict=False))


def terse_statement(statement: Statement, roles: Roles | None = None, nested: bool = False) -> str:
    """Infix, with bare atoms and every nested operator in parentheses, so that no precedence must be learned.

    Given roles, each atom is replaced by its truth under them, `t` or `f`: the statement half evaluated.
    """
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
    their truth, and whether that is consistent with the speaker's role, up to the first `no`. (Without the half-step
    of writing the atoms' truth a small model needs several times as many demonstrations.) The last line is the
    conclusion, `so A b C`. Raises ValueError when no assignment is consistent.
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


def parse_terse(text: str, people: int) -> Roles | None:
    """Roles in the conclusion, or None unless the last line, and no other, is `so` plus each person once, in order."""
    lines = [line.strip() for line in text.strip().splitlines()]
    conclusions = [line for line in lines if line.split()[:1] == ["so"]]
    if len(conclusions) != 1 or conclusions[0] != lines[-1]:
        return None
    words = conclusions[0].split(" ")[1:]
    return tuple(map(str.isupper, words)) if [word.upper() for word in words] == list(LETTERS[:people]) else None


# ---- Natural wording -------------------------------------------------------------------------------------------------


def role_name(knight: bool) -> str:
    return "knight" if knight else "knave"


def natural_answer(names: list[str], roles: Roles) -> str:
    """A line `(1) Zoey is a knight` per person."""
    pairs = enumerate(zip(names, roles, strict=True), start=1)
    return "\n".join(f"({number}) {name} is a {role_name(knight)}" for number, (name, knight) in pairs)


def natural_statement(statement: Statement, names: list[str], nested: bool = False) -> str:
    """The published phrases, without a capital letter or full stop."""
    operator, *operands = statement
    if operator in ("telling-truth", "lying"):
        return f"{names[operands[0]]} is a {role_name(operator == 'telling-truth')}"
    if operator == "not" and operands[0][0] in ("telling-truth", "lying"):
        return natural_statement(operands[0], names).replace(" is a ", " is not a ")
    parts = [natural_statement(operand, names, nested=True) for operand in operands]
    if operator == "not":
        text = f"it is not the case that {parts[0]}"
    elif operator == "->":
        text = f"if {parts[0]} then {parts[1]}"
    else:
        text = f" {'if and only if' if operator == '<=>' else operator} ".join(parts)
    return f"({text})" if nested else text


def natural_list(names: list[str]) -> str:
    """`Zoey`, `Zoey and Ethan`, `Zoey, Ethan, and Noah`."""
    if len(names) < 3:
        return " and ".join(names)
    return ", ".join(names[:-1]) + f", and {names[-1]}"


def natural_prompt(statements: tuple[Statement, ...], names: list[str], rng: random.Random, format: str) -> str:
    """The quiz as published, each claim in a saying drawn from `rng`, and the format that the verifier reads."""
    sayings = []
    for name, statement in zip(names, statements, strict=True):
        claim = natural_statement(statement, names)
        sayings.append(rng.choice(SAYINGS).format(name=name, claim=claim, quote=claim[0].upper() + claim[1:]))
    return (
        "A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves "
        f"always lie. You meet {len(names)} inhabitants: {natural_list(names)}. {' '.join(sayings)} "
        f"So who is a knight and who is a knave?{SUFFIXES[format]}"
    )


def mentioned(statement: Statement) -> list[int]:
    """The people that a statement speaks of, in reading order."""
    operator, *operands = statement
    if operator in ("telling-truth", "lying"):
        return operands
    return [person for operand in operands for person in mentioned(operand)]


def natural_trace(statements: tuple[Statement, ...], names: list[str]) -> str:
    """The reasoning of a demonstration: a backtracking search that says what it does.

    A role is refuted only by the claim of someone whose role is already assumed, and only when that claim is
    inconsistent under every completion of the assumptions, so each "cannot be" follows from what stands above it.
    After an assumption the search turns to those whom the speakers so far mention: their claims are the nearest to
    being decided. The puzzle must have a solution.
    """
    people = range(len(names))
    values, ones = roles_table(len(names))
    consistent = consistent_tables(statements)
    claims = [natural_statement(statement, names) for statement in statements]
    steps, roles, path, untried = [], {}, [0], {0: [True, False]}
    while len(roles) < len(names):
        person = path[-1]
        if not untried[person]:
            exhausted = []
            while not untried[path[-1]]:
                exhausted.append(path.pop())
                roles.pop(exhausted[-1], None)
            roles.pop(path[-1])
            gone, back = natural_list([names[other] for other in exhausted]), names[path[-1]]
            steps.append(f"We have exhausted all possibilities for {gone}, so let us go back and reconsider {back}.")
            continue
        knight = untried[person].pop(0)
        trial = {**roles, person: knight}
        possible = ones  # the assignments that agree with every assumption
        for other, assumed in trial.items():
            possible &= values[other] if assumed else ones ^ values[other]
        refuting = next((speaker for speaker in trial if not possible & consistent[speaker]), None)
        name, role = names[person], role_name(knight)
        if refuting is None:
            claim = f"{'claim' if knight else 'false claim'} that {claims[person]}"
            steps.append(f"Assume {name} is a {role}. No contradiction is found in their {claim}.")
            roles = trial
            near = [other for known in roles for other in mentioned(statements[known])]
            following = next((other for other in [*near, *people] if other not in roles), person)
            if following != person:
                path.append(following)
                untried[following] = [True, False]
        else:
            whose = "their own" if refuting == person else names[refuting]
            claim = f"{'claim' if trial[refuting] else 'false claim'} of {whose} that {claims[refuting]}"
            steps.append(f"{name} cannot be a {role}, because this would contradict the {claim}.")
    return "\n".join([HEAD, *steps, FOOT])


def natural_demonstration(reasoning: str, answer: str, format: str) -> str:
    """The reasoning, then the conclusion where `grade` looks for it."""
    if format == "logic-rl":
        return f"<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>"
    return f"{reasoning}\n{MARKER}\n{answer}"


def marked_conclusion(text: str) -> str | None:
    """What follows the marker of a text, or None unless it holds exactly one."""
    parts = text.replace("**", "").casefold().split(MARKER.casefold())
    return parts[1] if len(parts) == 2 else None


def tagged_conclusion(text: str) -> str | None:
    """What stands in the answer tags of a text, or None unless it holds each of the four tags once, in order."""
    places = [text.find(tag) for tag in TAGS]
    if places != sorted(places) or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return text.partition("<answer>")[2].partition("</answer>")[0]


def parse_natural(conclusion: str, names: list[str]) -> Roles | None:
    """Roles in a conclusion, or None unless it holds each person once, numbered, and nothing else.

    Case, bold and a final full stop do not matter, nor does the order of the people.
    """
    plain = conclusion.replace("**", "").casefold()
    lines = [" ".join(line.split()) for line in plain.splitlines() if line.strip()]
    if len(lines) != len(names):
        return None
    claims = {
        f"{name} is a {role_name(knight)}".casefold(): (name, knight) for name in names for knight in (True, False)
    }
    roles = {}
    for number, line in enumerate(lines, start=1):
        claim = line.removeprefix(f"({number})").strip().removesuffix(".")
        if not line.startswith(f"({number})") or claim not in claims:
            return None
        name, knight = claims[claim]
        roles[name] = knight
    return tuple(roles[name] for name in names) if len(roles) == len(names) else None


# ---- The task --------------------------------------------------------------------------------------------------------


def check_integer(option: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{option} must be an integer from {low} to {high}, got {value!r}")


def check_format(format: str, wording: str) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"format must be {' or '.join(map(repr, SUFFIXES))}, got {format!r}")
    if format == "logic-rl" and wording != "natural":
        raise ValueError("format 'logic-rl' needs wording 'natural', whose conclusion has a line per person")


def generate(
    seed: int,
    *,
    people: int = 3,
    train_size: int = 4000,
    test_size: int = 512,
    wording: str = "terse",
    format: str = "conclusion",
    demonstrations: int | None = None,
    depth: int = 2,
    width: int = 2,
) -> tuple[list[Example], list[Example]]:
    """Puzzles drawn from `seed` and `people`: (train, test), all distinct, each with exactly one solution.

    wording: `terse` or `natural`; it changes the text, not the puzzles. format: of natural wording, `conclusion` (a
    marker before it) or `logic-rl` (tags around it, see `grade`). demonstrations: how many training examples,
    from the first, have one (None: all); test examples always do. depth: nesting of a statement, 2 is one operator
    over atoms as published. width: most operands of `and` and `or`; beyond 2, every puzzle has a claim that wide. The
    test split is drawn first, so that it stays the same for every train_size.

    Raises ValueError on a bad option, or when there are not enough distinct puzzles.
    """
    check_integer("people", people, 2, len(LETTERS))
    check_integer("train_size", train_size, 0, 10**7)
    check_integer("test_size", test_size, 0, 10**7)
    # Not 1: with bare atoms, turning every role around keeps all claims consistent, so no solution is the only one.
    check_integer("depth", depth, 2, 4)
    check_integer("width", width, 2, 4)
    if demonstrations is not None:
        check_integer("demonstrations", demonstrations, 0, train_size)
    if wording not in ("terse", "natural"):
        raise ValueError(f"wording must be 'terse' or 'natural', got {wording!r}")
    check_format(format, wording)

    rng = random.Random(f"knights-knaves seed {seed} people {people}")  # a string is hashed by value, in all versions
    puzzles = draw_puzzles(rng, test_size + train_size, people, depth, width)
    with_demonstration = len(puzzles) if demonstrations is None else test_size + demonstrations
    examples = []
    for index, statements in enumerate(puzzles):
        (roles,) = solve(statements, people)
        if wording == "terse":
            prompt, answer, trace = terse_prompt(statements), terse_roles(roles), terse_trace(statements, people)
        else:
            names = rng.sample(FIRST_NAMES.split(), people)
            prompt, answer = natural_prompt(statements, names, rng, format), natural_answer(names, roles)
            trace = natural_demonstration(natural_trace(statements, names), answer, format)
        shown = trace if index < with_demonstration else None
        examples.append(Example(prompt, answer, shown, group=f"{people} people"))
    return examples[test_size:], examples[:test_size]


def is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def parse_record(record: dict, *, format: str = "conclusion") -> Example:
    """One published record. Raises KeyError on a missing field, ValueError on one of the wrong type or value."""
    check_format(format, "natural")
    lists = {"names": str, "solution": bool, "cot_repeat_steps": str}
    for field in ("quiz", "solution_text_format", "cot_head", "cot_foot", *lists):
        value, kind = record[field], lists.get(field)
        if not (isinstance(value, str) if kind is None else is_list_of(value, kind)):
            wanted = "a string" if kind is None else f"a list of {kind.__name__}"
            raise ValueError(f"{field} must be {wanted}, got {value!r}")
    names, roles, stated = record["names"], record["solution"], record["solution_text_format"]
    if not names or len(names) != len(roles):
        raise ValueError(f"names and solution must be of one length, at least 1, got {len(names)} and {len(roles)}")
    if len({name.casefold() for name in names}) != len(names):
        raise ValueError(f"names must differ, got {names!r}")
    answer = natural_answer(names, roles)
    if stated != answer:
        raise ValueError(f"solution_text_format disagrees with names and solution: {stated!r} is not {answer!r}")
    reasoning = "\n".join([record["cot_head"], *record["cot_repeat_steps"], record["cot_foot"]])
    demonstration = natural_demonstration(reasoning, answer, format)
    return Example(record["quiz"] + SUFFIXES[format], answer, demonstration, group=f"{len(names)} people")


def grade(completion: str, example: Example, *, format: str = "conclusion") -> Grade:
    """Reward 1 when the conclusion gives every person the right role; the wording is the one of `example.answer`.

    With format="logic-rl" the reward is graded as in arXiv 2502.14768: 1 for the format (each of the four tags once, in
    order), else -1; plus 2 for the right conclusion, -1.5 for a wrong one, -2 for one that is missing or unreadable or
    in a wrong format. What a prompt has already opened, such as `<think>`, belongs in front of the completion: the
    caller puts it there. Time is linear in the length of the text, and no text raises.
    """
    wording = "natural" if example.answer.startswith("(") else "terse"
    check_format(format, wording)
    if wording == "terse":
        people = len(example.answer.split())
        concluded, truth = (parse_terse(text, people) for text in (completion, f"so {example.answer}"))
    else:
        names = [line.partition(" ")[2].rpartition(" is a ")[0] for line in example.answer.splitlines()]
        conclusion = (tagged_conclusion if format == "logic-rl" else marked_conclusion)(completion)
        concluded = None if conclusion is None else parse_natural(conclusion, names)
        truth = parse_natural(example.answer, names)
    well_formed = concluded is not None
    correct = well_formed and concluded == truth
    if format == "logic-rl":
        format_score = -1.0 if conclusion is None else 1.0
        return Grade(format_score + (2.0 if correct else -1.5 if well_formed else -2.0), correct, well_formed)
    return outcome_grade(correct, well_formed)
