r"""Whether two answers in LaTeX are equal up to notation.

    >>> last_boxed(r"The sum is $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> equivalent(r"\frac{1}{2}", "x = 0.5"), equivalent("x^2-1", "(x-1)(x+1)"), equivalent("(1,2)", "[1,2]")
    (True, True, False)

`equivalent` parses both answers and evaluates them: rational numbers exactly, roots and functions as floats, letters at
fixed points, until three are found where both sides are defined. What cannot be read, or is defined nowhere, equals
only the same text: a right answer in unusual notation may fail, which harms training less than a wrong one that passes.

- hendrycks/math and the harnesses after it (Minerva, lm-evaluation-harness) rewrite strings, so that 2/4 is not 1/2.
- math-verify asks a computer algebra system. As there, an expression equals its factored form, so that "x^2-1" is a
  right answer to "factor x^2-1"; but 0.333 is not 1/3, and the cost is bounded.
- Order is free in comma lists, sets and unions, and a list equals the set of its elements. Points, intervals and
  matrices keep it. a \pm b is the list of its two values. Inside brackets a comma separates: (1,000) is a pair.
- Equations are equal up to a factor. "x = 5", "f(3) = 7" and "2^{10} = 1024" have the value of their last side that has
  one; sides that are numbers must be equal. A label, or a unit, may be absent in one answer; two must agree.
- Percent and degree signs are dropped, but \sin 30^\circ is 1/2. A base belongs to its number: 52_8 is not 52.
- A function takes the factors behind it, up to the next function, sign, relation or closing bracket: \sin 2x is
  \sin(2x). What people read in two ways is not read at all: 1/2x, \sin x/2, 2\frac{3}{2}, \sin(x)^2.
- Letters other than e are real numbers, and so are roots and logarithms.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial, reduce
from operator import add, mul
from random import Random
from zlib import crc32

from .numbers import CHARACTERS, SCALES

MAX_LENGTH = 1000  # characters of an answer that is read; these limits bound the cost of a hostile one
MAX_DEPTH = 30  # nested groups
MAX_BITS = 4_000  # of an exact number
POINTS = 40  # at which letters are tried
TOLERANCE = 1e-9  # relative, of a float; one that is not known this well decides nothing

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([^\s${}\\]+))?|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last balanced \boxed{} or \fbox{} that is not empty, else the token after a bare \boxed.

    Of nested boxes the inner one is the last. One pass, so that a million open boxes cost no more than their length.
    """
    start, end, token = -1, -1, None
    opened: list[tuple[int, bool]] = []  # for each open brace: where its content begins, and is it that of a box
    for match in BOX.finditer(text):
        if match[0] == "{" or match[1]:
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            begin, is_box = opened.pop()
            if is_box and begin > start and text[begin : match.start()].strip():
                start, end = begin, match.start()
        token = match[2] or token
    return text[start:end].strip() if start >= 0 else token


def equivalent(a: str, b: str) -> bool:
    """Whether two answers in LaTeX are equal up to notation. What cannot be read equals the same text. Symmetric."""
    if max(len(a), len(b)) > MAX_LENGTH:
        return a.strip() == b.strip() != ""
    a, b = normalise(a), normalise(b)
    if a.replace('"', "") == b.replace('"', ""):
        return a.strip('"') != ""
    if not (UNIT.search(a) and UNIT.search(b)):
        a, b = UNIT.sub("", a), UNIT.sub("", b)
    try:
        (value, equation), (other_value, other_equation) = read(a), read(b)
    except ValueError:
        return False
    if equation and other_equation:
        return same(equation, other_equation)
    return value is not None and other_value is not None and same(value, other_value)


# --- the text: one way to write each thing ---

UNITS = {"m": "meter", "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "g": "gram", "kg": "kilogram"}
UNITS |= {"ft": "foot", "feet": "foot", "in": "inch", "inches": "inch", "s": "second", "h": "hour"}
BARE_UNIT = re.compile(  # of other words only a plural, since abc is a product
    r'"[^"]*"|(?<=[\d})]) ?((?:(?:square|sq|cubic) )?'
    r"(?:degree|[ckm]m|kg|ft|(?:centi|milli|kilo)?meter|foot|feet|inche?|mile|hour|minute|second|dollar|cent|unit"
    r"|percent|people|(?<= )[a-z]{3,}(?=s))s?)(?![A-Za-z])"
)
SCALE = re.compile(rf'(?<=[\d}})"])"? ?({"|".join(SCALES)})s?(?![A-Za-z])"?')
UNIT = re.compile(  # behind a value and not before another, as in 5 feet 6 inches; some words change the value
    r'(?<=[\w)}])(?:/?"(?!factorial|squared|cubed|hal|third|fourth)[^"]+"(?:\^\{?[23]\}?)?)+(?!["\w(]|\\(?!cdot))'
)
NO_UNIT = re.compile(r'(?<=[\w)}])"(?:\w+ )?(?:units?|percent|degrees?)"(?:\^[23])?(?!["\w(\\])')
WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf))\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z .'/-]+|[mgsh]")  # a single letter in \text{} is one of these units, or a variable

SYMBOLS = r"""× \times ÷ \div · \cdot ⋅ \cdot π \pi √ \sqrt ∞ \infty ∪ \cup ∈ \in ± \pm ≤ \le ≥ \ge ≠ \ne ∅ \emptyset
\varnothing \emptyset \dfrac \frac \tfrac \frac \cfrac \frac \leq \le \leqslant \le \geq \ge \geqslant \ge \neq \ne
\lt < \gt > \lbrace \{ \rbrace \} \mp \pm \degree °"""
SYNONYMS = dict(re.findall(r"(\S+)\s+(\S+)", SYMBOLS))
NOTATION = [  # (pattern, replacement), in this order
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", "°"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)) ?[({]? ?([\d.]+) ?° ?[)}]?", r"\1(\2\\pi/180)"),
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # a comma inside a number
    (r"(?<!\\)\\\$([\d.,]*\d)", r'\1"dollar"'),
    (r"(?<!\\)\\(?:[!,;:> ()\[\]]|q?quad(?![A-Za-z]))|\\?[%$]|[~°]", " "),
    (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
    (r"\s(?:and|or)\s", ","),
    (r",\s*,", ","),
    (r"\s+", " "),
    (r"^ |[ .,]+$", ""),
    (r"(?<![\w,]) | (?!\w)", ""),  # 1 1/2 and 3, 100 keep theirs
    (r"([_^])\{(\w)\}(?!\d)", r"\1\2"),
    (r"\\\{\\\}", r"\\emptyset"),
    (r"(?<=[A-Za-z]) (?=\d)", ""),
]


def normalise(text: str) -> str:
    """One way to write each symbol; few spaces; units, and words that stood in a text command, in double quotes."""

    def quote(match: re.Match) -> str:
        parts = [part.strip() for part in re.split(r"\b(?:and|or)\b", match[1])]
        return ",".join(f'"{part}"' if WORDS.fullmatch(part) else part for part in parts)

    text = text.replace('"', "").translate(CHARACTERS)
    text = re.sub(r"\\[A-Za-z]+|[^\0-\x7f]", lambda match: SYNONYMS.get(match[0], match[0]) + " ", text)
    for _ in range(3):  # wrappers in wrappers
        text = WRAPPER.sub(quote, text)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    text = SCALE.sub(lambda match: rf"\cdot {SCALES[match[1]]}", re.sub(r'(?<=[\d"])"(\w+) ', r'"\1""', text))
    text = BARE_UNIT.sub(lambda match: f'"{match[1]}"' if match[1] else match[0], text)
    return NO_UNIT.sub("", text)


# --- the reader: lists, relations, labels ---

# A number; the name of a letter, or of what is as opaque (a word, a number in another base); or (function, *trees), of
# which add, mul and together take any number.
Tree = Fraction | float | str | tuple

PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
NAME = re.compile(  # "Area", (x,y), \cos\theta, x, a_{n}, f(x), f^{-1}(3), P(A\cup B), \gcd(10,15), but not x(x+1)
    r'"[^"]*"|\([A-Za-z](?:, ?[A-Za-z])+\)|\\(?:sin|cos|tan|log|ln)[^+\-=]+'
    r"|(?:[A-Za-z]+|\\[a-z]+)'*(?:_\w|_\{\w+\})?(?:\([a-z]\))?"
    r"|(?:[f-hA-Z]|\\?[A-Za-z]{3,})(?:'+|_\w|_\{\w+\}|\^\{-1\})?\(.*?\)"
)
LABEL = re.compile(rf"(?:{NAME.pattern})(?:=|\\in(?![a-z]))")


def read(text: str) -> tuple[Tree | None, Tree | None]:
    """(value, equation) of an answer, or the lists of them; None where an element has none. Raises ValueError."""
    if not re.search(r"[(\[]|\\\{", text):  # inside brackets a comma separates
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda match: match[0].replace(",", ""), text)
    parts, _ = split(text, ",")
    label = LABEL.match(parts[0])
    whole = parts[0][label.end() if label else 0 :]
    if len(parts) == 1 and whole.startswith("\\{") and whole.endswith("\\}") and PLUS_MINUS.search(whole):
        parts, _ = split(whole[2:-2], ",")
    if any(len(PLUS_MINUS.findall(part)) > 1 for part in parts):
        raise ValueError("several \\pm: their signs may or may not go together")
    if label:  # x = 1, 2
        parts = [part if LABEL.match(part) else label[0] + part for part in parts]
    signs = [PLUS_MINUS.sub(sign, part) for part in parts for sign in "+-"[: 1 + len(PLUS_MINUS.findall(part))]]
    values, equations = zip(*map(read_element, signs), strict=True)
    if len({label[0] for part in parts if (label := LABEL.match(part))}) > 1:
        values = (None,)  # each belongs to its label
    return tuple(None if None in trees else collection("\\{\\}", trees) for trees in (values, equations))


def split(text: str, *separators: str) -> tuple[list[str], list[str]]:
    """(the parts between separators outside brackets, those separators). Raises ValueError for unbalanced brackets."""
    parts, found, depth = [""], [], 0
    for token in re.findall(r"\\(?:[A-Za-z]+|.)|.", text):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth == 0 and token in separators:
            parts.append("")
            found.append(token)
        else:
            parts[-1] += token
        if depth < 0:
            break
    if depth:
        raise ValueError("brackets do not match")
    return [part.strip() for part in parts], found


def read_element(text: str) -> tuple[Tree | None, Tree | None]:
    """(value or None, equation or None) of a value, an inequality, an equation, or 2^{10} = 1024."""
    sides, relations = split(text, "=", "<", ">", "\\le", "\\ge", "\\ne", "\\in")
    if {*relations} <= {">", "\\ge"}:  # from the smaller to the larger
        relations, sides = [{">": "<", "\\ge": "\\le"}[relation] for relation in relations[::-1]], sides[::-1]
    if {*relations} <= {"<", "\\le"} or relations == ["\\ne"]:
        trees = [Parser(side).whole() for side in sides]
        return collection(" ".join(relations), trees), None
    if not {*relations} <= {"=", "\\in"}:
        raise ValueError(f"no reading for the relations {' '.join(relations)}")
    trees: list[Tree | None] = [None] * len(sides)
    for k, side in enumerate(sides):
        with suppress(ValueError):
            trees[k] = Parser(side).whole()
    names = [NAME.fullmatch(side) and (letters(tree) or side == "e") for side, tree in zip(sides, trees, strict=True)]
    named = next((k for k in (0, len(sides) - 1) if trees[k] is None or names[k]), None)
    values = [tree for k, tree in enumerate(trees) if tree is not None and k != named]
    numbers = [tree for tree in values if not letters(tree)]
    if not values or not all(same(numbers[0], number) for number in numbers):
        raise ValueError("no side has a value, or two have different ones")
    value = (numbers or values)[-1]
    if named is None and (len(sides) > 2 or same(*trees)):
        return value, None
    left, right = trees if named is None else (trees[named] if letters(trees[named]) else sides[named], value)
    return None if named is None else value, ("=", (add, left, (mul, Fraction(-1), right)))


# --- the parser of one side ---

GREEK = "alpha beta gamma delta epsilon varepsilon theta lambda mu nu xi rho sigma tau phi varphi psi omega"
LETTERS = {f"\\{name}" for name in (*GREEK.split(), "pi", "infty", "ell", "emptyset", "Delta", "Omega")}
CLOSING = {"(": r"\)", "[": r"\]", "{": r"\}", "\\{": r"\\\}"}
CONSTANTS = {"e": math.e, "\\pi": math.pi}
FUNCTIONS = {f"\\{name}": getattr(math, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp", "log")}
FUNCTIONS |= {f"\\arc{name}": getattr(math, f"a{name}") for name in ("sin", "cos", "tan")} | {"\\ln": math.log}
FUNCTIONS |= {"\\cot": lambda x: 1 / math.tan(x), "\\sec": lambda x: 1 / math.cos(x)}
FUNCTIONS |= {"\\csc": lambda x: 1 / math.sin(x)}
FUNCTION = re.compile(rf"(?:{'|'.join(map(re.escape, FUNCTIONS))})(?![A-Za-z])")
NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE]-?\d{1,3}(?!\d))?")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)(?:\{(\d+)\}|(\d))")
MIXED = re.compile(r"(\d+)(?:\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))| (\d+)/(\d+))")
SUBSCRIPT = re.compile(r'_(?:\{"?(\w+)"?\}|(\w))')
OPERATOR = re.compile(r"[*/]|\\(?:cdot|times|div)(?![A-Za-z])")
FACTOR = re.compile(  # what follows a factor without a sign: a number only as in (x+1)2 and x2^n
    rf'(?!{OPERATOR.pattern}|\\cup|\\end)(?=["A-Za-z({{\[]|\\[A-Za-z]|(?<=[)\]])\d|(?<=[A-Za-z}}])\d+\^)'
)


class Parser:
    r"""Recursive descent. Each method moves past what it reads, and raises ValueError for what it does not.

    union    = sum ("\cup" sum)*
    sum      = ["+" | "-"] product (("+" | "-") product)*
    product  = factor (("*" | "/" | nothing) factor)*     nothing: before what FACTOR says, and not after a division
    factor   = atom ["!"] ["^" (integer | argument)]      integer: TeX takes one digit, but 2^10 means ten
    argument = digit | atom                               as TeX takes it: \frac12, \sqrt3
    atom     = number | letter | "word" | "(" union ("," union)* ")" | matrix | \frac argument argument | function ...
    """

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def take(self, pattern: str | re.Pattern) -> re.Match | None:
        """Move past what comes next, if it is that; a space before it does not count."""
        match = re.compile(pattern).match(self.text, self.at + (self.text[self.at : self.at + 1] == " "))
        self.at = match.end() if match else self.at
        return match

    def expect(self, pattern: str | re.Pattern) -> re.Match:
        match = self.take(pattern)
        if match is None:
            raise ValueError(f"cannot read character {self.at + 1} of {self.text!r}")
        return match

    def whole(self) -> Tree:
        if re.fullmatch("(?=.*[A-Za-z]{3})[A-Za-z .'-]+|[Nn]o", self.text):
            return word(self.text)
        tree = self.union()
        self.expect("$")
        return tree

    def union(self) -> Tree:
        parts = [self.sum()]
        while self.take(r"\\cup(?![A-Za-z])"):
            parts.append(self.sum())
        return collection("union", parts)

    def sum(self) -> Tree:
        sign, terms = self.take("[+-]"), []
        while sign or not terms:
            product = self.product()
            terms.append(node(mul, Fraction(-1), product) if sign and sign[0] == "-" else product)
            sign = self.take("[+-]")
        return node(add, *terms)

    def product(self) -> Tree:
        factors = [self.factor()]
        while True:
            if operator := self.take(OPERATOR):
                if self.take("-"):
                    factors.append(Fraction(-1))
                factors.append(self.factor())
                if operator[0] in ("/", "\\div"):
                    factors[-1] = node(power, factors[-1], Fraction(-1))
                    self.expect(rf"(?!{FACTOR.pattern})")  # 1/2x is (1/2)x to some and 1/(2x) to others
            elif self.take(FACTOR):
                factors.append(self.factor())
            else:
                return node(mul, *factors)

    def factor(self) -> Tree:
        base = self.atom()
        if self.take("!(?!!)"):
            base = node(factorial, base)
        if not self.take(r"\^"):
            return base
        digits = self.take(r"-?\d+")
        return node(power, base, Fraction(digits[0]) if digits else self.argument())

    def argument(self) -> Tree:
        digit = self.take(r"\d")
        return Fraction(digit[0]) if digit else self.atom()

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"groups nest deeper than {MAX_DEPTH}")
        if self.take(r"(?=[\d.])"):
            tree = self.number()
        elif quoted := self.take('"([^"]+)"'):
            tree = word(quoted[1])
        elif opening := self.take(r"[({\[]|\\\{"):
            parts = [self.union()]
            while self.take(","):
                parts.append(self.union())
            closing = r"[)\]]" if len(parts) > 1 and opening[0] in "([" else CLOSING[opening[0]]
            name = opening[0] + self.expect(closing)[0]
            tree = collection(name, parts)
        elif environment := self.take(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr ]*\})?"):
            parts, shape = [self.union()], "matrix"
            while separator := self.take(r"&|\\\\(?!\\end)"):
                parts.append(self.union())
                shape += separator[0]
            self.expect(rf"(?:\\\\)?\\end\{{{environment[1]}\}}")
            tree = collection(shape, parts)
        else:
            tree = self.command(self.expect(r"[A-Za-z]|\\[A-Za-z]+")[0])
        self.depth -= 1
        return tree

    def number(self) -> Tree:
        """A literal, a mixed number, or digits in a base, which are not converted: 52_8 asks for just these digits."""
        if mixed := self.take(MIXED):
            whole, numerator, denominator = (int(group) for group in mixed.groups() if group)
            if not 0 < numerator < denominator:
                raise ValueError("neither a mixed number nor clearly a product")
            return whole + Fraction(numerator, denominator)
        if repeating := self.take(REPEATING):
            once, again = repeating[1] + repeating[2], repeating[3] or repeating[4]
            nines = (10 ** len(again) - 1) * 10 ** len(repeating[2])
            return Fraction(int(once + again) - int(once or 0), nines)
        literal = self.expect(NUMBER)[0]
        if base := self.take(SUBSCRIPT):
            return f"{literal.lstrip('0')} in base {base[1] or base[2]}"
        return Fraction(literal)

    def command(self, name: str) -> Tree:
        if name == "\\frac":
            return node(mul, self.argument(), node(power, self.argument(), Fraction(-1)))
        if name == "\\sqrt":
            index = self.take(r"\[([2-9])\]")
            return node(power, self.argument(), Fraction(1, int(index[1]) if index else 2))
        if FUNCTION.fullmatch(name):
            return self.function(name)
        if len(name) > 1 and name not in LETTERS:
            raise ValueError(f"unknown command {name}")
        subscript = self.take(SUBSCRIPT)
        name += (f"_{subscript[1] or subscript[2]}" if subscript else "") + (self.take("'*") or "")[0]
        return CONSTANTS.get(name, name)

    def function(self, name: str) -> Tree:
        """A function of the factors behind it. In brackets the argument is whole, and nothing may stick to them."""
        exponent = self.take(r"\^(?:(\d)|\{(\d+)\})")  # \sin^2 x
        base = [self.argument() if self.take("_") else Fraction(10)] if name == "\\log" else []
        if self.take(r"(?=[({\[])"):
            factors = [self.atom()]
            self.expect(rf"(?={FUNCTION.pattern})|(?![\^!])(?!{FACTOR.pattern})")  # \sin(x)^2
        else:
            factors = [self.factor()]
            while self.take(FACTOR) and not self.take(rf"(?={FUNCTION.pattern})"):
                factors.append(self.factor())
            self.expect(r"(?!/|\\div)")  # \sin x/2
        tree = node(FUNCTIONS[name], node(mul, *factors), *base)
        return node(power, tree, Fraction(exponent[1] or exponent[2])) if exponent else tree


def word(text: str) -> Tree:
    """An opaque name: "East" is "east", but ABC is not abc; units are in the singular and in full."""
    first, _, rest = text.strip().partition(" ")
    if first in ("square", "sq", "cubic"):
        return node(power, word(rest), Fraction(3 if first == "cubic" else 2))
    text = re.sub(r"\b[A-Z]", lambda match: match[0].lower(), text.strip())
    return "word " + UNITS.get(text, re.sub(r"[^A-Za-z]", "", text).removesuffix("s"))


together = partial(mul)  # a product that is told from others: it stands for a set, a point, ...


def node(function: Callable, *trees: Tree) -> Tree:
    if len(trees) == 1 and function in (add, mul):
        return trees[0]
    if any(isinstance(tree, tuple) and tree[0] is together for tree in trees):
        raise ValueError("no arithmetic with sets and points")
    return (function, *trees)


def collection(name: str, trees: Sequence[Tree]) -> Tree:
    """Several as one number, the product of (letter - element), with a letter for each place where the order counts."""
    if len(trees) == 1:
        return trees[0]
    places = [name if name in ("\\{\\}", "union") else f"{name} {k}" for k in range(len(trees))]
    return (together, *((add, place, (mul, Fraction(-1), tree)) for place, tree in zip(places, trees, strict=True)))


def letters(tree: Tree) -> set[str]:
    if isinstance(tree, tuple):
        return set().union(*map(letters, tree[1:]))
    return {tree} if isinstance(tree, str) else set()


# --- values ---


def same(one: Tree, other: Tree) -> bool:
    """Whether two trees are equal at the first three points where both are defined."""
    equal = 0
    for point in range(POINTS):
        with suppress(ArithmeticError, ValueError):  # not defined here
            a, b = value_at(one, point), value_at(other, point)
            exact = isinstance(a, Fraction) and isinstance(b, Fraction)
            if a != b and (exact or abs(a - b) > TOLERANCE * max(abs(a), abs(b))):
                return False
            equal += 1
        if equal == 3:
            return True
    return False


def value_at(tree: Tree, point: int) -> Fraction | float:
    """Raises ArithmeticError or ValueError where a tree is not defined, or its value is lost to rounding."""
    value = evaluate(tree, point, Random(1))
    if isinstance(value, Fraction) or abs(value - evaluate(tree, point, Random(2))) <= TOLERANCE * abs(value):
        return value
    if abs(value) > TOLERANCE:
        raise ArithmeticError("a difference of nearly equal numbers")
    return Fraction(0)


def evaluate(tree: Tree, point: int, noise: Random) -> Fraction | float:
    """Each float gets an error of the size of its rounding, so that two evaluations tell how well a value is known."""
    if isinstance(tree, str):  # an odd denominator, as a whole number has: (-1)^{n+1} is -(-1)^n
        size = Fraction(8200 + crc32(f"{tree!a} {point}".encode()) % 8000, 8191)
        size *= (1, Fraction(1, 5), 15)[point // 8 % 3]  # three letters get all combinations of signs for each size
        return size if point >> crc32(ascii(tree).encode()) % 3 & 1 else -size
    if not isinstance(tree, tuple):
        return tree
    function, *trees = tree
    if function == "=":  # equal up to a factor: so is the ratio at two points
        return rounded(evaluate(trees[0], point, noise) / evaluate(trees[0], point + 1, noise), noise)
    values = [evaluate(part, point, noise) for part in trees]
    if function not in (add, mul, together):
        return rounded(function(*values), noise)
    return reduce(lambda a, b: rounded(function(a, b), noise), values)


def rounded(value: Fraction | float, noise: Random) -> Fraction | float:
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS:
        return value
    if value and not 1e-100 < abs(value) < 1e100:
        raise OverflowError("too large or too small for a float")
    return float(value) * (1 + 1e-15 * noise.uniform(-1, 1))


def power(base: Fraction | float, exponent: Fraction | float) -> Fraction | float:
    """Raises ArithmeticError or ValueError for 1/0, 0^0, an even root of a negative number, and what is too large."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if base == exponent == 0:
            raise ZeroDivisionError("0^0")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) in (0, 1) or bits * abs(exponent) <= MAX_BITS:
            return base ** int(exponent)
    odd = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1
    if base < 0 and not odd:
        raise ValueError("no real root")
    result = math.pow(abs(base), exponent)
    if base and not result:
        raise OverflowError("too small for a float")
    return -result if base < 0 and exponent.numerator % 2 else result


def factorial(value: Fraction | float) -> Fraction | float:
    exact = isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 500
    return Fraction(math.factorial(int(value))) if exact else math.gamma(value + 1)
