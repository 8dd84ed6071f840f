"""Knights and knaves in English: the natural wording of the puzzles, and the formats of their publications.

Wording, records and demonstrations (assume, contradict, go back) are those of K&K, Xie et al. 2024 (arXiv 2410.23123).
Departures:

- Nested operands stand in parentheses, since English leaves "A or B if C" open.
- The verifier is stricter than a search for the right substring: the conclusion must hold each person once and nothing
  else but numbers, bullets and separators, so that naming every possible answer earns nothing.

format="logic-rl" has the tags and the graded reward of Logic-RL, Xie et al. 2025 (arXiv 2502.14768): the reasoning is
inside <think> </think>, the conclusion inside <answer> </answer>. Departures: the prompt has no roles of a chat, and
the conclusion is read as strictly as above. Statements and roles are the tuples of knights_knaves.py.
"""

import random
import re

from .task import Example, Grade, outcome_grade, outside_cut_thought, tagged_answer

HEAD = "Let's think step by step, by considering whether each person is lying and if that leads to contradiction."
FOOT = "This leads to a feasible solution."
MARKER = "CONCLUSION:"
ROLES = ("knave", "knight")  # by the bool that stands for it
LINES = 'one numbered line per person, such as "(1) Zoey is a knight".'
SUFFIXES = {  # by format: what a prompt asks for
    "conclusion": f'\nThink step by step. End with "{MARKER}" and {LINES}\n',
    "logic-rl": "\nReason step by step inside <think> </think>. Then give your conclusion inside <answer> </answer>, "
    f"{LINES}\n",
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


def natural_answer(names: list[str], roles: tuple[bool, ...]) -> str:
    """A line `(1) Zoey is a knight` per person."""
    pairs = enumerate(zip(names, roles, strict=True), start=1)
    return "\n".join(f"({number}) {name} is a {ROLES[knight]}" for number, (name, knight) in pairs)


def natural_statement(statement: tuple, names: list[str], nested: bool = False) -> str:
    """The published phrases, without a capital letter or full stop."""
    operator, *operands = statement
    if operator in ("telling-truth", "lying"):
        return f"{names[operands[0]]} is a {ROLES[operator == 'telling-truth']}"
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
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])}, and {names[-1]}"


def mentioned(statement: tuple) -> list[int]:
    """The people in a statement, in reading order."""
    operator, *operands = statement
    if operator in ("telling-truth", "lying"):
        return operands
    return [person for operand in operands for person in mentioned(operand)]


def natural_trace(statements: tuple, names: list[str], values: tuple[int, ...], consistent: list[int]) -> str:
    """The reasoning of a demonstration: a backtracking search in words.

    A role is refuted only by the claim of someone whose role is already assumed, and only when that claim is
    inconsistent under every completion of the assumptions, so each "cannot be" follows from the lines above it. The
    puzzle must have a solution. `values` and `consistent` are those of `roles_table` and `consistent_tables`.
    """
    claims = [natural_statement(statement, names) for statement in statements]
    steps: list[str] = []

    def search(person: int, roles: dict[int, bool]) -> list[int]:
        """Assume a role of `person`, then of the next. Returns those who have none left, or [] with the solution."""
        name, exhausted = names[person], []
        for knight in (True, False):
            if exhausted:
                done = f"We have exhausted all possibilities for {natural_list([names[i] for i in exhausted])}"
                steps.append(f"{done}, so let us go back and reconsider {name}.")
                exhausted = []
            role, trial = ROLES[knight], {**roles, person: knight}
            possible = -1  # a bit for each assignment that agrees with every assumption
            for other, assumed in trial.items():
                possible &= values[other] if assumed else ~values[other]
            refuting = next((speaker for speaker in trial if not possible & consistent[speaker]), None)
            if refuting is not None:
                whose = "their own" if refuting == person else names[refuting]
                claim = f"{'claim' if trial[refuting] else 'false claim'} of {whose} that {claims[refuting]}"
                steps.append(f"{name} cannot be a {role}, because this would contradict the {claim}.")
                continue
            claim = f"{'claim' if knight else 'false claim'} that {claims[person]}"
            steps.append(f"Assume {name} is a {role}. No contradiction is found in their {claim}.")
            near = [other for known in trial for other in mentioned(statements[known])]  # the next to try
            following = next((other for other in [*near, *range(len(names))] if other not in trial), None)
            exhausted = [] if following is None else search(following, trial)
            if not exhausted:
                return []
        return [*exhausted, person]

    search(0, {})
    return "\n".join([HEAD, *steps, FOOT])


def natural_demonstration(reasoning: str, answer: str, format: str) -> str:
    """The reasoning, then the conclusion where `grade` looks for it."""
    if format == "logic-rl":
        return f"<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>"
    return f"{reasoning}\n{MARKER}\n{answer}"


def find_conclusion(text: str, format: str) -> str | None:
    """What follows the marker, if it is there once; logic-rl: inside the last <answer> pair, behind a <think> pair."""
    text = outside_cut_thought(text)
    if format == "logic-rl":
        before, _, _ = text.rpartition("</answer>")[0].rpartition("<answer>")
        return tagged_answer(text) if tagged_answer(before, "think") is not None else None
    parts = text.replace("**", "").casefold().split(MARKER.casefold())
    return parts[1] if len(parts) == 2 else None


def parse_natural(conclusion: str, names: list[str]) -> tuple[bool, ...] | None:
    """Roles in a conclusion, or None unless it holds each person once, in any order, and nothing else.

    Numbers, bullets, commas, semicolons, line breaks and "and" may stand between.
    """
    plain = " ".join(conclusion.replace("*", "").casefold().split())
    known = [name.casefold() for name in names]
    claim = rf"({'|'.join(map(re.escape, sorted(known, key=len, reverse=True)))}) is a ({'|'.join(ROLES)})\b"
    between = r"(?:[\s,;.•-]|\(?[0-9]++[.)]|and\b)*+"
    claims = re.findall(claim, plain) if re.fullmatch(f"(?:{between}{claim})*+{between}", plain) else []
    if sorted(name for name, _ in claims) != sorted(known):
        return None
    return tuple(dict(claims)[name] == ROLES[True] for name in known)


def natural_example(statements: tuple, roles: tuple, rng: random.Random, format: str, *tables) -> tuple[str, str, str]:
    """(Prompt, answer, demonstration), with names and sayings drawn from `rng`. The tables are for `natural_trace`."""
    names = rng.sample(FIRST_NAMES.split(), len(roles))
    sayings = []
    for name, statement in zip(names, statements, strict=True):
        claim = natural_statement(statement, names)
        sayings.append(rng.choice(SAYINGS).format(name=name, claim=claim, quote=claim[0].upper() + claim[1:]))
    prompt = (
        "A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves "
        f"always lie. You meet {len(names)} inhabitants: {natural_list(names)}. {' '.join(sayings)} "
        f"So who is a knight and who is a knave?{SUFFIXES[format]}"
    )
    answer = natural_answer(names, roles)
    return prompt, answer, natural_demonstration(natural_trace(statements, names, *tables), answer, format)


def check_format(format: str, wording: str) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"format must be {' or '.join(map(repr, SUFFIXES))}, got {format!r}")
    if format == "logic-rl" and wording != "natural":
        raise ValueError("format 'logic-rl' needs wording 'natural', whose conclusion has a line per person")


def parse_record(record: dict, *, format: str = "conclusion") -> Example:
    """One published record. Raises KeyError on a missing field, ValueError on one of the wrong type or value."""
    check_format(format, "natural")
    lists = {"names": str, "solution": bool, "cot_repeat_steps": str}
    for field in ("quiz", "solution_text_format", "cot_head", "cot_foot", *lists):
        value, kind = record[field], lists.get(field)
        good = isinstance(value, list if kind else str)
        if not good or (kind and not all(isinstance(item, kind) for item in value)):
            raise ValueError(f"{field} must be {f'a list of {kind.__name__}' if kind else 'a string'}, got {value!r}")
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
    example = Example(record["quiz"] + SUFFIXES[format], answer, demonstration, group=f"{len(names)} people")
    if not natural_grade(natural_demonstration("", answer, format), example, format).correct:
        raise ValueError(f"the solution is not graded as right itself, since it cannot be read back: {answer!r}")
    return example


def natural_grade(completion: str, example: Example, format: str) -> Grade:
    """Reward 1 when the conclusion gives every person the right role.

    With format="logic-rl" it is that of arXiv 2502.14768: 1 for the format (a pair of think tags before the last pair
    of answer tags), else -1; plus 2 for the right conclusion, -1.5 for a wrong one, -2 for one that is missing or
    unreadable. What the prompt has already opened, such as `<think>`, must stand in front of the completion.
    """
    names = [line.partition(" ")[2].rpartition(" is a ")[0] for line in example.answer.splitlines()]
    conclusion = find_conclusion(completion, format)
    roles = None if conclusion is None else parse_natural(conclusion, names)
    well_formed = roles is not None
    correct = well_formed and roles == parse_natural(example.answer, names)
    if format == "logic-rl":
        format_score = -1.0 if conclusion is None else 1.0
        return Grade(format_score + (2.0 if correct else -1.5 if well_formed else -2.0), correct, well_formed)
    return outcome_grade(correct, well_formed)
