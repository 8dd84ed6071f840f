"""Puzzles are solved again here from the text of their prompts, with a parser and evaluator of this file's own."""

import ast
import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import knights_knaves as kk
from data import load_task
from data.knights_knaves_text import natural_statement
from data.task import Example

PUBLISHED = Path(__file__).resolve().parents[2] / "shared/data/knights_knaves"
SMALL = {"train_size": 60, "test_size": 20}


# ---- An independent solver: text in, roles out -----------------------------------------------------------------------

WORDS = re.compile(r"\(|\)|[A-Za-z]+")


def read_terse(prompt):
    """[(statement as a list of words)] by speaker, checking the layout of the prompt."""
    *lines, question, end = prompt.split("\n")
    assert (question, end) == ("?", "")
    assert [line[:3] for line in lines] == [f"{letter}: " for letter in "ABCDEFGH"[: len(lines)]]
    return [WORDS.findall(line[3:]) for line in lines]


def truth_terse(words, roles):
    """Recursive descent over `B or (not c)`; operators may not mix without parentheses."""

    def operand():
        word = words.pop(0)
        if word == "(":
            value = expression()
            assert words.pop(0) == ")"
            return value
        assert len(word) == 1, word
        return roles["ABCDEFGH".index(word.upper())] == word.isupper()

    def expression():
        if words[0] == "not":
            words.pop(0)
            return not operand()
        value, seen = operand(), set()
        while words and words[0] != ")":
            operator = words.pop(0)
            right = operand()
            seen.add(operator)
            if operator in ("implies", "iff"):
                assert seen == {operator}
                seen.add("only once")
            value = {
                "and": value and right,
                "or": value or right,
                "implies": right or not value,
                "iff": value == right,
            }[operator]
        assert len(seen - {"only once"}) <= 1
        return value

    words = list(words)
    value = expression()
    assert not words
    return value


def read_natural(prompt):
    """(names, [claim text]): a sentence each, with the claim in quotes or after `that`, and the speaker outside it."""
    body, _, suffix = prompt.partition(" So who is a knight and who is a knave?\n")
    assert "CONCLUSION:" in suffix
    assert suffix.endswith("\n")
    people, _, sayings = body.partition("inhabitants: ")[2].partition(". ")
    names, claims = re.split(r", and |, | and ", people), []
    for name, saying in zip(names, sayings.removesuffix(".").split(". "), strict=True):
        frame, claim = re.sub(r"\".*\"|(?<= that ).*", "", saying), re.search(r"\"(.*?),?\"| that (.*)", saying)
        assert re.findall(r"\b[A-Z]\w+", frame.replace("As ", "").replace("In ", "").replace("According ", "")) == [
            name
        ]
        claims.append(claim[2] or re.sub(r"^(If|It) ", lambda word: word[0].lower(), claim[1]))
    return names, claims


def terse_words(claim, names):
    """A claim in words, rewritten into the terse language."""
    for index, name in enumerate(names):
        letter = "ABCDEFGH"[index]
        for phrase, atom in (("a knight", letter), ("a knave", letter.lower())):
            claim = re.sub(rf"\b{name} is {phrase}", atom, claim)
            claim = re.sub(rf"\b{name} is not {phrase}", f"(not {atom})", claim)
    claim = claim.replace("it is not the case that", "not").replace("if and only if", "iff")
    return WORDS.findall(claim.replace("if ", "").replace("then", "implies"))


def assignments(people):
    return list(itertools.product((True, False), repeat=people))


def consistent(claims, roles):
    """For each speaker, whether a knight spoke the truth or a knave lied."""
    return [truth_terse(claim, roles) == knight for claim, knight in zip(claims, roles, strict=True)]


def solutions(claims):
    return [roles for roles in assignments(len(claims)) if all(consistent(claims, roles))]


def half_evaluated(line, roles):
    """The claim of a terse prompt line, each letter replaced by whether it is true: 'A: B or c' -> 't or f'."""
    true_letters = in_letters(roles).split()
    return re.sub(r"\b[A-Ha-h]\b", lambda m: "t" if m[0] in true_letters else "f", line.partition(": ")[2])


def in_letters(roles):
    return " ".join("ABCDEFGH"[i] if knight else "abcdefgh"[i] for i, knight in enumerate(roles))


def in_lines(names, roles):
    return "\n".join(
        f"({i + 1}) {name} is a {'knight' if knight else 'knave'}"
        for i, (name, knight) in enumerate(zip(names, roles, strict=True))
    )


# ---- Generated puzzles -----------------------------------------------------------------------------------------------

SHAPES = [{"people": people} for people in range(2, 9)] + [
    {"people": 3, "depth": 3},
    {"people": 4, "depth": 2, "width": 3},
    {"people": 3, "depth": 4, "width": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_terse_puzzles_have_one_solution_and_a_true_trace(shape):
    train, test = kk.generate(5, **SMALL, **shape)
    assert (len(train), len(test)) == (60, 20)
    for example in train + test:
        claims = read_terse(example.prompt)
        (roles,) = solutions(claims)
        assert example.answer == in_letters(roles)
        *lines, conclusion = example.demonstration.split("\n")
        assert conclusion == f"so {example.answer}"
        tried = assignments(shape["people"])
        assert len(lines) == tried.index(roles) + 1
        for line, candidate in zip(lines, tried, strict=False):
            verdicts = consistent(claims, candidate)
            kept = verdicts[: verdicts.index(False) + 1] if False in verdicts else verdicts
            checks = [
                f"{half_evaluated(line, candidate)} {'yes' if verdict else 'no'}"
                for line, verdict in zip(example.prompt.split("\n"), kept, strict=False)
            ]
            assert line == " ".join([in_letters(candidate), *checks])
        assert kk.grade(example.demonstration, example).correct


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_natural_puzzles_have_one_solution_and_a_valid_narration(shape):
    train, test = kk.generate(6, wording="natural", **SMALL, **shape)
    for example in train + test:
        names, claims = read_natural(example.prompt)
        assert len(names) == shape["people"]
        (roles,) = solutions([terse_words(claim, names) for claim in claims])
        assert example.answer == in_lines(names, roles)
        check_narration(example.demonstration, names, claims, roles)
        grade = kk.grade(example.demonstration, example)
        assert (grade.reward, grade.correct, grade.well_formed) == (1.0, True, True)


def check_narration(text, names, claims, solution):
    """Replay each sentence: contradictions are real, none is overlooked where it says so, and going back is due."""
    head, *steps, foot, marker, answer = text.split("\n", text.count("\n") - len(names) + 1)
    assert head.startswith("Let's think step by step")
    assert (foot, marker, answer) == ("This leads to a feasible solution.", "CONCLUSION:", in_lines(names, solution))
    words = [terse_words(claim, names) for claim in claims]
    table = {roles: consistent(words, roles) for roles in assignments(len(names))}
    assumed, refuted = {}, set()  # refuted: (assumptions, person, role) proved impossible

    def can_be_consistent(assumptions, speaker):
        return any(
            table[roles][speaker]
            for roles in table
            if all(roles[person] == role for person, role in assumptions.items())
        )

    for step in steps:
        if found := re.fullmatch(
            r"Assume (\w+) is a (\w+)\. No contradiction .* their (false )?claim that (.*)\.", step
        ):
            person, knight = names.index(found[1]), found[2] == "knight"
            assert person not in assumed
            assert (found[3] is None) == knight
            assert found[4] == claims[person]
            assumed[person] = knight
            assert all(can_be_consistent(assumed, speaker) for speaker in assumed)
        elif found := re.fullmatch(
            r"(\w+) cannot be a (\w+), because this would contradict the (false )?claim of (their own|\w+) that (.*)\.",
            step,
        ):
            person, knight = names.index(found[1]), found[2] == "knight"
            trial = {**assumed, person: knight}
            assert person not in assumed
            speaker = person if found[4] == "their own" else names.index(found[4])
            assert speaker in trial
            assert (found[3] is None) == trial[speaker]
            assert found[5] == claims[speaker]
            assert not can_be_consistent(trial, speaker)
            refuted.add((frozenset(assumed.items()), person, knight))
        else:
            found = re.fullmatch(
                r"We have exhausted all possibilities for (.*), so let us go back and reconsider (\w+)\.", step
            )
            for name in re.split(r", and |, | and ", found[1]):
                person = names.index(name)
                assumed.pop(person, None)
                assert {
                    role for seen, who, role in refuted if seen == frozenset(assumed.items()) and who == person
                } == {
                    True,
                    False,
                }
                last, knight = list(assumed.items())[-1]
                refuted.add((frozenset(list(assumed.items())[:-1]), last, knight))
            assert names[last] == found[2]
            assert assumed.pop(last)  # only the first of the two roles leaves another to try
    assert tuple(assumed[person] for person in range(len(names))) == solution


@pytest.mark.parametrize("wording", ["terse", "natural"])
def test_default_size_is_fast_distinct_disjoint_and_varied(wording):
    started = time.perf_counter()
    train, test = kk.generate(0, wording=wording)
    assert time.perf_counter() - started < 5  # half a second on one core
    assert (len(train), len(test)) == (4000, 512)
    assert len({example.prompt for example in train + test}) == 4512
    if wording == "terse":
        kinds = Counter(
            next((op for op in ("not", "and", "or", "implies", "iff") if op in words), "atom")
            for example in train
            for words in read_terse(example.prompt)
        )
        assert len(kinds) == 6
        assert all(0.1 < count / kinds.total() < 0.25 for count in kinds.values()), kinds
        first = Counter(example.answer for example in train)
        assert len(first) == 8
        assert max(first.values()) < 4000 * 0.25, first


@pytest.mark.parametrize("people", [2, 3])
def test_no_claim_is_constant_or_about_nothing_but_its_speaker_being_honest(people):
    for example in kk.generate(1, people=people, **SMALL)[0]:
        for speaker, claim in enumerate(read_terse(example.prompt)):
            truths = [truth_terse(claim, roles) for roles in assignments(people)]
            honest = [truth == roles[speaker] for truth, roles in zip(truths, assignments(people), strict=True)]
            assert len(set(truths)) == len(set(honest)) == 2, example.prompt


def test_the_same_seed_gives_the_same_examples_and_another_seed_others():
    assert kk.generate(3, **SMALL) == kk.generate(3, **SMALL)
    assert kk.generate(3, wording="natural", **SMALL) == kk.generate(3, wording="natural", **SMALL)
    prompts = {seed: {example.prompt for example in kk.generate(seed, **SMALL)[0]} for seed in (3, 4)}
    assert not prompts[3] & prompts[4]
    # Pinned, so that published numbers stay tied to the puzzles that they were measured on.
    assert kk.generate(0, train_size=0, test_size=1)[1][0].prompt == "A: b iff c\nB: c\nC: C iff B\n?\n"


def test_the_test_split_does_not_depend_on_the_train_size_or_the_demonstrations():
    (_, few), (train, many) = kk.generate(0, **SMALL), kk.generate(0, train_size=90, test_size=20, demonstrations=10)
    assert few == many
    assert [example.demonstration is not None for example in train] == [True] * 10 + [False] * 80
    assert all(example.demonstration is None for example in kk.generate(0, **SMALL, demonstrations=0)[0])


@pytest.mark.parametrize("wording", ["terse", "natural"])
def test_swapped_demonstrations_are_those_of_other_puzzles(wording):
    own, mixed = (
        kk.generate(0, train_size=60, test_size=20, demonstrations=30, wording=wording, swapped=swapped)
        for swapped in (0, 6)
    )
    assert own[1] == mixed[1]
    assert own[0][6:] == mixed[0][6:]
    assert [e.demonstration for e in mixed[0][:6]] == [own[0][i].demonstration for i in (1, 2, 3, 4, 5, 0)]
    assert [(e.prompt, e.answer) for e in mixed[0]] == [(e.prompt, e.answer) for e in own[0]]


def test_both_wordings_tell_the_same_puzzles():
    for terse, natural in zip(kk.generate(2, **SMALL)[0], kk.generate(2, wording="natural", **SMALL)[0], strict=True):
        names, claims = read_natural(natural.prompt)
        for words, claim in zip(read_terse(terse.prompt), claims, strict=True):
            for roles in assignments(3):
                assert truth_terse(words, roles) == truth_terse(terse_words(claim, names), roles)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"people": 1}, "people 1: must be a whole number from 2 to 8"),
        ({"people": 9}, "people 9: must be"),
        ({"people": "3"}, "people '3': must be"),
        ({"people": True}, "people True: must be"),
        ({"people": 3.0}, "people 3.0: must be"),
        ({"train_size": -1}, "train_size -1: must be"),
        ({"test_size": 1.5}, "test_size 1.5: must be"),
        ({"depth": 1}, "depth 1: must be a whole number from 2"),
        ({"width": 1}, "width 1: must be a whole number from 2"),
        ({"people": 2, "width": 3}, "width 3: needs as many people or more, got people=2"),
        ({"demonstrations": 4001}, "demonstrations 4001: must be a whole number from 0 to 4000"),
        ({"demonstrations": 9, "swapped": 10}, "swapped 10: must be a whole number from 0 to 9"),
        ({"swapped": 1}, "swapped 1: a demonstration needs another"),
        ({"wording": "Terse"}, "wording must be 'terse' or 'natural', got 'Terse'"),
        (
            {"people": 2},
            r"found only \d{3} distinct puzzles with people=2.*asks for 4512; lower train_size or test_size",
        ),
    ],
    ids=str,
)
def test_bad_options_are_one_clear_line(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        kk.generate(0, **options)
    assert "\n" not in str(error.value)


def test_bare_atoms_never_have_one_solution():
    """Why depth starts at 2: turning every role around keeps such claims consistent."""
    atoms = [(kind, person) for kind in ("telling-truth", "lying") for person in range(3)]
    assert all(len(kk.solve(statements)) != 1 for statements in itertools.product(atoms, repeat=3))


# ---- Logic by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "true_for"),
    [
        (("telling-truth", 0), "TT TF"),
        (("lying", 1), "TF FF"),
        (("not", ("lying", 1)), "TT FT"),
        (("and", ("telling-truth", 0), ("lying", 1)), "TF"),
        (("or", ("telling-truth", 0), ("lying", 1)), "TT TF FF"),
        (("->", ("telling-truth", 0), ("telling-truth", 1)), "TT FT FF"),
        (("<=>", ("telling-truth", 0), ("telling-truth", 1)), "TT FF"),
        (("and", ("telling-truth", 0), ("telling-truth", 1), ("not", ("lying", 0))), "TT"),
        (("or", ("lying", 0), ("lying", 1), ("lying", 0)), "TF FT FF"),
    ],
    ids=str,
)
def test_holds(statement, true_for):
    for roles in assignments(2):
        assert kk.holds(statement, roles) is ("".join("FT"[knight] for knight in roles) in true_for.split())


def test_solve_finds_all_solutions_and_none():
    assert kk.solve((("telling-truth", 1), ("telling-truth", 0))) == [(True, True), (False, False)]
    assert kk.solve((("lying", 0), ("lying", 0))) == []
    with pytest.raises(ValueError, match="no assignment"):
        kk.terse_trace((("lying", 0), ("lying", 0)), 2)
    with pytest.raises(ValueError, match="unknown operator 'xor'"):
        kk.holds(("xor", ("lying", 0), ("lying", 1)), (True, True))


def test_terse_wording_by_hand():
    statements = (
        ("not", ("telling-truth", 1)),
        ("<=>", ("telling-truth", 2), ("telling-truth", 0)),
        ("or", ("lying", 0), ("not", ("and", ("telling-truth", 0), ("lying", 1)))),
    )
    assert kk.terse_prompt(statements) == "A: not B\nB: C iff A\nC: a or (not (A and b))\n?\n"
    assert kk.terse_trace(statements, 3) == (
        "A B C not t no\nA B c not t no\nA b C not f yes t iff t no\n"
        "A b c not f yes f iff t yes f or (not (t and t)) yes\n"
        "so A b c"
    )


# ---- The verifier ----------------------------------------------------------------------------------------------------

TERSE = Example("A: B or c\nB: not A\nC: a implies B\n?\n", "A b C")
ALL_TERSE = [in_letters(roles) for roles in assignments(3)]
GOOD, WRONG, MALFORMED = (True, True), (False, True), (False, False)


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("so A b C", GOOD),
        ("A B C yes no\nA b C yes yes yes\nso A b C", GOOD),
        ("  \nso A b C \n\n", GOOD),
        ("A b C\r\nso A b C\r\n", GOOD),
        ("so A B C", WRONG),
        ("so a b c\n", WRONG),
        ("", MALFORMED),
        ("\n\n", MALFORMED),
        ("so", MALFORMED),
        ("so ", MALFORMED),
        ("A b C", MALFORMED),
        ("so A b", MALFORMED),
        ("so A b C D", MALFORMED),
        ("so A b C d", MALFORMED),
        ("so b A C", MALFORMED),
        ("so A b C C", MALFORMED),
        ("so A b B C", MALFORMED),
        ("so A a b C", MALFORMED),
        ("so A  b C", MALFORMED),
        ("so AbC", MALFORMED),
        ("so A, b, C", MALFORMED),
        ("so A b C.", MALFORMED),
        ("So A b C", MALFORMED),
        ("therefore so A b C", MALFORMED),
        ("so A b C\nA b C yes yes yes", MALFORMED),
        ("so A b C\nso A b C", MALFORMED),
        ("so A B C\nso A b C", MALFORMED),
        ("so\nso A b C", MALFORMED),
        ("so A B C\rso A b C", MALFORMED),
        ("so A B C\u2028so A b C", MALFORMED),
        ("so A B C so A b C", MALFORMED),
        ("so \u0391 b C", MALFORMED),  # a Greek capital alpha
        ("\n".join(f"so {answer}" for answer in ALL_TERSE), MALFORMED),
        ("so " + " ".join(ALL_TERSE), MALFORMED),
    ],
    ids=ascii,
)
def test_terse_verifier(completion, outcome):
    grade = kk.grade(completion, TERSE)
    assert (grade.correct, grade.well_formed) == outcome
    assert grade.reward == float(grade.correct)


NATURAL = Example("quiz", "(1) Michael is a knight\n(2) Zoey is a knave\n(3) Ethan is a knight")
LINES = NATURAL.answer.split("\n")
ALL_NATURAL = [in_lines(["Michael", "Zoey", "Ethan"], roles) for roles in assignments(3)]


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        (f"CONCLUSION:\n{NATURAL.answer}", GOOD),
        (f"Assume Zoey is a knight.\nCONCLUSION:\n{NATURAL.answer}\n", GOOD),
        (f"**Conclusion:**\n\n  {LINES[0]}. \n**{LINES[1].upper()}**\n{LINES[2]}.", GOOD),
        ("CONCLUSION: (1) **Michael** is a knight\n(2)  Zoey is a  knave\n(3) Ethan is a **knight**.", GOOD),
        ("CONCLUSION:\n(1) Zoey is a knave\n(2) Ethan is a knight\n(3) Michael is a knight", GOOD),
        (f"CONCLUSION:\n{LINES[0]}\n(3) Zoey is a knave\n(2) Ethan is a knight", GOOD),
        (f"CONCLUSION:\n{LINES[0]}\nZoey is a knave\n{LINES[2]}", GOOD),
        ("CONCLUSION:\n" + " ".join(LINES), GOOD),
        ("CONCLUSION:\nMichael is a knight, Zoey is a knave, and Ethan is a knight.", GOOD),
        ("CONCLUSION:\nEthan is a knight; Zoey is a knave; Michael is a knight", GOOD),
        ("CONCLUSION:\n1. Michael is a knight\n2. Zoey is a knave\n3) Ethan is a knight", GOOD),
        ("CONCLUSION:\n- Michael is a knight\n* Zoey is a knave\n• **Ethan** is a knight", GOOD),
        (f"CONCLUSION:\n{ALL_NATURAL[0]}", WRONG),
        ("CONCLUSION: Michael is a knight, Zoey is a knight, Ethan is a knight", WRONG),
        (f"CONCLUSION:\n{ALL_NATURAL[-1]}", WRONG),
        ("", MALFORMED),
        ("CONCLUSION:", MALFORMED),
        (NATURAL.answer, MALFORMED),
        (f"CONCLUSION\n{NATURAL.answer}", MALFORMED),
        (f"CONCLUSION:\n{LINES[0]}\n{LINES[1]}", MALFORMED),
        (f"CONCLUSION:\n{NATURAL.answer}\n(4) Henry is a knight", MALFORMED),
        (f"CONCLUSION:\n{NATURAL.answer}\n(4) Zoey is a knight", MALFORMED),
        (f"CONCLUSION:\n{NATURAL.answer}\nNo wait, Zoey is a knight.", MALFORMED),
        (f"CONCLUSION:\nSo:\n{NATURAL.answer}", MALFORMED),
        (f"CONCLUSION:\n{NATURAL.answer}\nCONCLUSION:\n{NATURAL.answer}", MALFORMED),
        (f"CONCLUSION:\n{ALL_NATURAL[0]}\nCONCLUSION:\n{NATURAL.answer}", MALFORMED),
        (f"CONCLUSION:\n{NATURAL.answer}\nConclusion: the above is wrong", MALFORMED),
        (f"CONCLUSION:\n{LINES[0]}\n(2) Zoey is a knight\n(3) Zoey is a knave", MALFORMED),
        (f"CONCLUSION:\n{LINES[0]}\n(2) Zoey is a knight or a knave\n{LINES[2]}", MALFORMED),
        (f"CONCLUSION:\n{LINES[0]}\n(2) Zoey is not a knight\n{LINES[2]}", MALFORMED),
        (f"CONCLUSION:\n{LINES[0]}\n(2) Zoe is a knave\n{LINES[2]}", MALFORMED),
        (f"<think>CONCLUSION:\n{NATURAL.answer}", MALFORMED),
        ("CONCLUSION:\nMichaela is a knight, Zoey is a knave, Ethan is a knight", MALFORMED),
        ("CONCLUSION:\nMichael is a knighthood, Zoey is a knave, Ethan is a knight", MALFORMED),
        ("CONCLUSION:\nMichael is a knight or Zoey is a knave, Ethan is a knight", MALFORMED),
        ("CONCLUSION:\n" + "\n".join(ALL_NATURAL), MALFORMED),
        ("\n".join(f"CONCLUSION:\n{answer}" for answer in ALL_NATURAL), MALFORMED),
        ("so A b C", MALFORMED),
    ],
    ids=ascii,
)
def test_natural_verifier(completion, outcome):
    grade = kk.grade(completion, NATURAL)
    assert (grade.correct, grade.well_formed) == outcome
    assert grade.reward == float(grade.correct)


def tagged(think, answer):
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (tagged("\nAssume Zoey is a knight.\n", f"\n{NATURAL.answer}\n"), 3.0),
        (tagged("", NATURAL.answer), 3.0),
        ("Well, " + tagged("", NATURAL.answer) + " That is all.", 3.0),  # text around the tags is free, as in the paper
        (tagged("CONCLUSION:\nCONCLUSION:", f"**{LINES[0].upper()}**\n\n{LINES[1]}.\n {LINES[2]}"), 3.0),
        (tagged("", ALL_NATURAL[0]), -0.5),
        (tagged(NATURAL.answer, ALL_NATURAL[-1]), -0.5),
        (tagged("", ""), -1.0),
        (tagged("", f"{LINES[0]}\n{LINES[1]}"), -1.0),
        (tagged("", f"{NATURAL.answer}\n(4) Zoey is a knight"), -1.0),
        (tagged("", f"CONCLUSION:\n{NATURAL.answer}"), -1.0),
        (tagged(NATURAL.answer, "see above"), -1.0),
        ("", -3.0),
        (NATURAL.answer, -3.0),
        (f"CONCLUSION:\n{NATURAL.answer}", -3.0),
        (f"<answer>{NATURAL.answer}</answer>", -3.0),
        (f"</think><answer>{NATURAL.answer}</answer>", -3.0),
        (f"<think><answer>{NATURAL.answer}</answer></think>", -3.0),
        (f"<answer>{NATURAL.answer}</answer><think></think>", -3.0),
        (f"</think><think><answer>{NATURAL.answer}</answer>", -3.0),
        (f"<think></think></answer>{NATURAL.answer}<answer>", -3.0),
        (f"<think></think><answer>{NATURAL.answer}", -3.0),
        (f"<Think></Think><Answer>{NATURAL.answer}</Answer>", -3.0),
        (tagged("", NATURAL.answer) * 2, 3.0),  # the last complete pair counts
        (tagged("I end with <answer> tags", NATURAL.answer), 3.0),
        (tagged("<think>", NATURAL.answer), 3.0),
        (tagged("", ALL_NATURAL[0]) + f"<answer>{NATURAL.answer}</answer>", 3.0),
        (tagged("", NATURAL.answer) + f"<answer>{ALL_NATURAL[0]}</answer>", -0.5),
        (tagged("", f"{NATURAL.answer}</answer>"), 3.0),
        (tagged("", NATURAL.answer) + f"<think>wait <answer>{ALL_NATURAL[0]}</answer>", 3.0),  # cut off
        ("<think><answer></answer></think><answer><think></answer>", -3.0),  # so is what comes behind the last <think>
        (tagged("", NATURAL.answer.replace("\n", ", ")), 3.0),
        (tagged("", "Michael is a knight; Zoey is a knave; Ethan is a knight"), 3.0),
        (tagged("", "1. Ethan is a knight\n2. Michael is a knight\n3. Zoey is a knave"), 3.0),
        (tagged("", "- Michael is a knight\n- Zoey is a knave\n- Ethan is a knight"), 3.0),
        (tagged("", "Michael is a knight, Zoey is a knave, Zoey is a knave"), -1.0),
        (tagged("", "Michael is a knight, Zoey is a knave, Zoey is a knave, Ethan is a knight"), -1.0),
    ],
    ids=ascii,
)
def test_logic_rl_verifier(completion, reward):
    grade = kk.grade(completion, NATURAL, format="logic-rl")
    assert grade.reward == reward
    assert (grade.correct, grade.well_formed) == (reward == 3.0, reward in (3.0, -0.5))


def test_the_caller_puts_in_front_what_the_prompt_had_opened():
    completion = f"Zoey lies.</think><answer>{NATURAL.answer}</answer>"
    assert kk.grade(completion, NATURAL, format="logic-rl").reward == -3.0
    assert kk.grade("<think>" + completion, NATURAL, format="logic-rl").reward == 3.0


def test_logic_rl_changes_the_format_and_nothing_else():
    plain = load_task("knights-knaves", wording="natural", **SMALL)
    task = load_task("knights-knaves", wording="natural", format="logic-rl", **SMALL)
    for one, other in zip(plain.train + plain.test, task.train + task.test, strict=True):
        assert one.answer == other.answer
        assert one.prompt.rsplit("\n", 2)[0] == other.prompt.rsplit("\n", 2)[0]
        assert all(tag in other.prompt for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        reasoning = one.demonstration.removesuffix(f"\nCONCLUSION:\n{one.answer}")
        assert other.demonstration == tagged(f"\n{reasoning}\n", f"\n{other.answer}\n")
        assert task.grade(other.demonstration, other).reward == 3.0
        assert task.grade(one.demonstration, other).reward == -3.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "xml", "wording": "natural"}, "format must be 'conclusion' or 'logic-rl', got 'xml'"),
        ({"format": 3}, "format must be 'conclusion' or 'logic-rl', got 3"),
        ({"format": "logic-rl"}, "format 'logic-rl' needs wording 'natural'"),
    ],
    ids=str,
)
def test_a_bad_format_is_one_clear_line(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        load_task("knights-knaves", **options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=reason):
        kk.grade("", TERSE, format=options["format"])


@pytest.mark.parametrize(
    "piece",
    ["so ", "so A b C\n", "CONCLUSION:", "*", "(1) Michael is a ", " ", "\n", "((((", "conclusion", "<think>", "<"],
)
@pytest.mark.parametrize("example", [TERSE, NATURAL], ids=["terse", "natural"])
def test_a_huge_completion_is_graded_in_linear_time(piece, example):
    text = piece * (2_000_000 // len(piece))
    started = time.perf_counter()
    assert not kk.grade(text, example).correct
    assert not kk.grade("CONCLUSION:\n(1) " + text, example).correct
    assert not kk.grade(tagged(text, text), NATURAL, format="logic-rl").correct
    assert time.perf_counter() - started < 5


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "so ",
            "so A b C",
            "A",
            "b",
            "C",
            " ",
            "\n",
            "yes",
            "CONCLUSION:",
            NATURAL.answer,
            *LINES,
            *("<think>", "</think>", "<answer>", "</answer>"),
            "**",
            ".",
            "\x00",
        ]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), FRAGMENTS, st.builds(tagged, st.text() | FRAGMENTS, FRAGMENTS)))
def test_no_text_raises_and_only_the_exact_answer_is_correct(text):
    """The oracle is a second definition: strip what is tolerated, and compare with the one text that is right."""
    terse, natural = kk.grade(text, TERSE), kk.grade(text, NATURAL)
    lines = [line.strip() for line in text.strip().splitlines()]
    right = lines[-1:] == ["so A b C"] and not any(line == "so" or line.startswith("so ") for line in lines[:-1])
    assert terse.correct == right
    finished = re.sub(r"(?s)<think>((?!</think>).)*\Z", "", text)  # without a thought that was cut off
    plain = finished.replace("**", "").lower()
    if natural.correct:
        assert plain.count("conclusion:") == 1
        tail = re.sub(r"\(?[0-9]+[.)]|[\s.*•,;-]|\band\b", " ", plain.partition("conclusion:")[2])
        assert " ".join(tail.split()) in {
            re.sub(r"\(\d\) ", "", " ".join(order)).lower() for order in itertools.permutations(LINES)
        }
    if finished.endswith("CONCLUSION:\n" + NATURAL.answer) and plain.count("conclusion:") == 1:
        assert natural.correct
    pairs = list(re.finditer(r"(?s)<answer>((?:(?!</?answer>).)*)</answer>", finished))
    well_tagged = pairs and re.search(r"(?s)<think>.*</think>", finished[: pairs[-1].start()])
    conclusion = kk.grade(f"CONCLUSION:\n{pairs[-1][1]}", NATURAL) if well_tagged else None
    reward = -3.0 if conclusion is None else 3.0 if conclusion.correct else -0.5 if conclusion.well_formed else -1.0
    if not (well_tagged and ("conclusion:" in plain or "<think>" in pairs[-1][1])):
        assert kk.grade(text, NATURAL, format="logic-rl").reward == reward


@pytest.mark.parametrize("answer", ["(1) nonsense", "(", "A B B", "knight"])
@pytest.mark.parametrize("completion", ["", "(1) nonsense", "so A B B", "CONCLUSION:\n(1) nonsense"])
def test_an_answer_that_does_not_parse_equals_no_completion(answer, completion):
    assert not kk.grade(completion, Example("", answer)).correct


@given(st.sampled_from(assignments(3)), st.sampled_from(assignments(3)))
def test_exactly_the_right_roles_are_correct(answered, true):
    assert kk.grade(f"so {in_letters(answered)}", Example("", in_letters(true))).correct == (answered == true)
    names = ["Michael", "Zoey", "Ethan"]
    completion = f"CONCLUSION:\n{in_lines(names, answered)}"
    assert kk.grade(completion, Example("", in_lines(names, true))).correct == (answered == true)


# ---- Published records -----------------------------------------------------------------------------------------------


def record(**changes):
    base = {
        "quiz": 'You meet 2 inhabitants: Zoey, and Ethan. Zoey said, "Ethan is a knave". Ethan noted, "..."',
        "names": ["Zoey", "Ethan"],
        "solution": [True, False],
        "solution_text_format": "(1) Zoey is a knight\n(2) Ethan is a knave",
        "cot_head": "Let's think.",
        "cot_repeat_steps": ["Assume Zoey is a knight.", "Ethan cannot be a knight."],
        "cot_foot": "This leads to a feasible solution.",
        "statements": "__import__('os').abort()",  # must not be evaluated
        "index": 7,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def write(folder, train, test):
    for split, records in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder


def test_read_keeps_published_records_as_they_are(tmp_path):
    other = record(solution=[False, False], solution_text_format="(1) Zoey is a knave\n(2) Ethan is a knave")
    task = load_task("knights-knaves", write(tmp_path, [record(), other], [record()]))
    train, test = task.train, task.test
    assert [example.answer for example in train] == [record()["solution_text_format"], other["solution_text_format"]]
    assert test == train[:1]
    assert train[0].prompt.startswith(record()["quiz"] + "\n")
    generated = kk.generate(0, wording="natural", train_size=1, test_size=0)[0][0].prompt
    assert train[0].prompt.removeprefix(record()["quiz"]) == generated.partition("who is a knave?")[2]
    assert train[0].demonstration == (
        "Let's think.\nAssume Zoey is a knight.\nEthan cannot be a knight.\nThis leads to a feasible solution.\n"
        "CONCLUSION:\n(1) Zoey is a knight\n(2) Ethan is a knave"
    )
    assert kk.grade(train[0].demonstration, train[0]).correct
    assert not kk.grade(train[1].demonstration, train[0]).correct


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quiz": ...}, "lacks the field 'quiz'"),
        ({"solution_text_format": ...}, "lacks the field 'solution_text_format'"),
        ({"cot_repeat_steps": ...}, "lacks the field 'cot_repeat_steps'"),
        ({"quiz": 3}, "quiz must be a string, got 3"),
        ({"cot_head": None}, "cot_head must be a string, got None"),
        ({"names": "Zoey"}, "names must be a list of str, got 'Zoey'"),
        ({"names": ["Zoey", 2]}, "names must be a list of str"),
        ({"names": ["Zoey"]}, "of one length, at least 1, got 1 and 2"),
        ({"names": [], "solution": []}, "at least 1, got 0 and 0"),
        ({"names": ["Zoey", "zoey"]}, "names must differ"),
        ({"solution": [1, 0]}, r"solution must be a list of bool, got \[1, 0\]"),
        ({"solution": "TF"}, "solution must be a list of bool"),
        ({"solution": [True, True]}, "disagrees with names and solution"),
        ({"cot_repeat_steps": [None]}, "cot_repeat_steps must be a list of str"),
    ],
    ids=str,
)
def test_a_bad_record_names_file_line_and_reason(tmp_path, changes, reason):
    write(tmp_path, [record(), record(**changes)], [record()])
    with pytest.raises(ValueError, match=reason) as error:
        load_task("knights-knaves", tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:2: ")


@pytest.mark.shared_data
@pytest.mark.parametrize("people", [3, 5])
def test_published_records_load_and_their_demonstrations_are_correct(people):
    folder = PUBLISHED / f"people{people}"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; it holds the published records and is not part of the repository")
    task = load_task("knights-knaves", folder)
    train, test = task.train, task.test
    assert (len(train), len(test)) == (900, 100)
    assert all(kk.grade(example.demonstration, example).correct for example in train + test)
    retold = load_task("knights-knaves", folder, format="logic-rl")
    rewards = {retold.grade(example.demonstration, example).reward for example in retold.train + retold.test}
    assert rewards == {3.0}
    # Statements as published are statements here: same tuples, same truth, same words.
    for line, example in zip((folder / "test.jsonl").read_text().splitlines(), test, strict=True):
        published = json.loads(line)
        statements = ast.literal_eval(published["statements"])
        assert kk.solve(statements) == [tuple(published["solution"])]
        for statement in statements:
            claim = natural_statement(statement, published["names"])
            assert claim in published["quiz"] or claim[0].upper() + claim[1:] in published["quiz"]
        (roles,) = kk.solve(statements)
        assert example.answer == in_lines(published["names"], roles)
