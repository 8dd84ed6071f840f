r"""Whether two answers in LaTeX are equal up to notation.

    >>> last_boxed(r"The sum is $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> equivalent(r"\frac{1}{2}", "x = 0.5"), equivalent("x^2-1", "(x-1)(x+1)"), equivalent("(1,2)", "[1,2]")
    (True, True, False)

`equivalent` parses both answers and evaluates them: rational numbers exactly, roots and functions as floats, letters at
fixed points, until three are found where both sides are defined. What cannot be read, or is defined nowhere, equals
only the same text: a right answer in unusual notation may fail, which harms training less than a wrong one that passes.

- hendrycks/math and the harnesses after it (Minerva, lm-evaluation-harness) rewrite strings, so that 2/4 is not 1/2.
- math-verify asks a computer algebra system. As there, an expression equals its factored form; but 0.333 is not 1/3.
- Order is free in comma lists, sets and unions, and a list equals the set of its elements; points, intervals and
  matrices keep it. a \pm b is the list of its two values. Inside brackets a comma separates: (1,000) is a pair.
- Equations are equal up to a factor. "x = 5", "f(3) = 7" and "2^{10} = 1024" have the value of their last side; sides
  that are numbers must be equal. A label, or a unit, may be absent in one answer; two must be the same.
- Percent and degree signs are dropped, but \sin 30^\circ is 1/2. A base belongs to its number: 52_8 is not 52.
- A function takes the factors behind it: \sin 2x is \sin(2x). What people read in two ways is not read at all: 1/2x,
  \sin x/2, 2\frac{3}{2}, \sin(x)^2. Letters other than e are real numbers, and so are roots and logarithms.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import partial, reduce
from operator import add, mul, sub, truediv
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
    opened: list[int] = []  # for each open brace: where the content of its box begins, or -1
    for match in BOX.finditer(text):
        if match[0] == "{" or match[1]:
            opened.append(match.end() if match[1] else -1)
        elif match[0] == "}" and opened:
            begin = opened.pop()
            if begin > start and text[begin : match.start()].strip():
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
        (value, equation), (other_value, other_equation) = Parser(a).answer(), Parser(b).answer()
    except ValueError:
        return False
    if equation and other_equation:
        return same(equation, other_equation)
    return value is not None and other_value is not None and same(value, other_value)


SYMBOLS = r"""× \times ÷ \div · \cdot ⋅ \cdot π \pi √ \sqrt ∞ \infty ∪ \cup ∈ \in ± \pm ≤ \le ≥ \ge <= \le >= \ge ≠ \ne
\neq \ne \leq \le \leqslant \le \geq \ge \geqslant \ge \lt < \gt > ∅ \emptyset \varnothing \emptyset \dfrac \frac
\tfrac \frac \cfrac \frac \lbrace \{ \rbrace \} \mp \pm \degree °"""
SYNONYMS = dict(re.findall(r"(\S+)\s+(\S+)", SYMBOLS))
TEXT = r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf))(?![A-Za-z])"
WORDS = re.compile(r"(?<![^,]) *([A-Za-z][A-Za-z .'/-]*[A-Za-z]|[mgsh]) *(?![^,])")  # a letter is a unit or a variable
BARE_UNIT = (  # outside a text command; of other words only a plural, since abc is a product
    r"(?:(?:square|sq|cubic) )?(?:[ckm]m|kg|ft|feet|degree|dollar|cent|unit|percent|people|(?<= )[a-z]{3,}(?=s))s?"
)
UNITS = {"m": "meter", "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "g": "gram", "kg": "kilogram"}
UNITS |= {"ft": "foot", "feet": "foot", "in": "inch", "inches": "inch", "s": "second", "h": "hour"}
POWERS = {"square": 2, "sq": 2, "cubic": 3}
NOTATION = [  # (pattern, replacement), in this order
    (r"(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])", ","),
    (rf"(?<![\\A-Za-z])({'|'.join(SCALES)})s?(?![A-Za-z])", lambda match: f"*{SCALES[match[1]]}"),
    (rf"{TEXT}\s*\{{([^{{}}]*)\}}", lambda match: WORDS.sub(r'"\1"', match[1])),
    (rf"{TEXT}|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
    (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", "°"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)) ?[({]? ?([\d.]+) ?° ?[)}]?", r"\1(\2\\pi/180)"),
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # a comma inside a number
    (r"(?<!\\)\\\$([\d.,]*\d)", r'\1"dollar"'),
    (r"(?<!\\)\\(?:[!,;:> ()\[\]]|q?quad(?![A-Za-z]))|\\?[%$]|[~°]", " "),
    (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
    (r"\s+", " "),
    (r",[ ,]*,", ","),
    (r"[ .,]+$|(?<![\w,]) | (?!\w)|(?<=[A-Za-z]) (?=\d)", ""),  # 1 1/2, x y and 3, 100 keep theirs
    (r"([_^])\{(\w)\}(?!\d)", r"\1\2"),
    (r"\\\{\\\}", r"\\emptyset"),
    (rf"(?<=[\d}})]) ?({BARE_UNIT})(?![A-Za-z])", r'"\1"'),
    (r"(?<![^,=<>])((?=[^,=<>]*[A-Za-z]{3}|[Nn]o ?(?:,|$))[A-Za-z .'-]++)(?![^,=<>])", r'"\1"'),
    (r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)(?!.*(?:[)\]]|\\\}))", lambda match: match[0].replace(",", "")),
]
UNIT = re.compile(  # behind a value and not before another, as in 5 feet 6 inches; some words change the value
    r'(?<=[\w)}])(?:/?"(?!factorial|squared|cubed|hal|third|triple|not|lakh|crore|(?:four|fif|six|seven|eigh|nin|\w+d|ten)?ths?")'
    r'[^"]+"(?:\^\{?[23]\}?)?)+(?!["\w(]|\\(?!cdot))'
)


def normalise(text: str) -> str:
    """One way to write each symbol; few spaces; units, and words that stood in a text command, in double quotes."""
    text = text.replace('"', "").translate(CHARACTERS)
    text = re.sub(r"\\[A-Za-z]+|[<>]=|[^\0-\x7f]", lambda match: SYNONYMS.get(match[0], match[0]) + " ", text)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    return text


# A number; the name of a letter, or of what is as opaque (a word, a number in a base, a side that cannot be read); or
# (function, *trees), of which add, mul and together take any number.
Tree = Fraction | float | str | tuple

together = partial(mul)  # a product that is told from others: it stands for a set, a point, ...
SET = "\\{\\}"


def collection(name: str, trees: list[Tree]) -> Tree:
    """Several as one number, the product of (letter - element), with a letter for each place where the order counts."""
    if name == SET:
        if any(letters(tree).count("\\pm") > 1 for tree in trees):
            raise ValueError("several \\pm: their signs may or may not go together")
        trees = [signed(tree, sign) for tree in trees for sign in (1, -1)[: 1 + letters(tree).count("\\pm")]]
    if len(trees) == 1:
        return trees[0]
    places = [name if name in (SET, "union") else f"{name} {k}" for k in range(len(trees))]
    return (together, *((sub, place, tree) for place, tree in zip(places, trees, strict=True)))


def signed(tree: Tree, sign: int) -> Tree:
    r"""A tree with this sign for its \pm."""
    if isinstance(tree, tuple):
        return (tree[0], *(signed(part, sign) for part in tree[1:]))
    return Fraction(sign) if tree == "\\pm" else tree


def letters(tree: Tree) -> list[str]:
    if isinstance(tree, tuple):
        return [name for part in tree[1:] for name in letters(part)]
    return [tree] if isinstance(tree, str) else []


GREEK = "alpha beta gamma delta epsilon varepsilon theta lambda mu nu xi rho sigma tau phi varphi psi omega"
LETTERS = {f"\\{name}" for name in (*GREEK.split(), "pi", "infty", "ell", "emptyset", "Delta", "Omega")}
FUNCTIONS = {"\\sin": math.sin, "\\cos": math.cos, "\\tan": math.tan, "\\cot": lambda x: 1 / math.tan(x)}
FUNCTIONS |= {"\\arcsin": math.asin, "\\arccos": math.acos, "\\arctan": math.atan, "\\log": math.log, "\\ln": math.log}
FUNCTIONS |= {"\\sec": lambda x: 1 / math.cos(x), "\\csc": lambda x: 1 / math.sin(x)}
FUNCTION = rf"(?=(?:{'|'.join(map(re.escape, FUNCTIONS))})(?![A-Za-z]))"
CLOSING = {"(": r"\)", "[": r"\]", "{": r"\}", "\\{": r"\\\}"}
SUBSCRIPT = r'_(?:\w|\{"?\w+"?\})'
TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in)(?![A-Za-z])")
OPERATOR = re.compile(r"[*/]|\\(?:cdot|times|div)(?![A-Za-z])")
FACTOR = re.compile(  # what follows a factor without a sign: a number only as in (x+1)2 and x2^n
    rf"(?!{OPERATOR.pattern}|{RELATION.pattern}|\\(?:cup|pm|end)(?![A-Za-z]))"
    r'(?=["A-Za-z({\[]|\\[A-Za-z{]|(?<=[)\]])\d|(?<=[A-Za-z}])\d+\^)'
)
SIDE_END = rf"(?= ?(?:{RELATION.pattern}|,|$))"
NAME = re.compile(  # "Area", (x,y), \cos\theta, x, a_{n}, f(x), f^{-1}(3), P(A), but not x(x+1)
    r'"[^"]*"|\([A-Za-z](?:, ?[A-Za-z])+\)|\\(?:sin|cos|tan|log|ln)[^+\-=]+'
    rf"|(?![a-ei-z]\([^)]{{2}})(?:[A-Za-z]+|\\[a-z]+)'*(?:{SUBSCRIPT}|\^\{{-1\}})?(?:\(.*\))?"
)


class Parser:
    r"""Recursive descent. Each method moves past what it reads, and raises ValueError for what it does not.

    answer   = element ("," element)*
    element  = side (relation side)*
    side     = union                                      else a name, as in \gcd(14, 21) = 7
    union    = sum ("\cup" sum)*
    sum      = ["+"] product (["+"] product)*             without the + before a sign
    product  = factor (("*" | "/" | nothing) factor)*     nothing: before what FACTOR says, and not after a division
    factor   = ["-" | "\pm"] atom ["!"] ["^" (integer | argument)]     integer: TeX takes a digit, but 2^10 means ten
    argument = digit | atom                               as TeX takes it: \frac12, \sqrt3
    atom     = number | letter | "word" | "(" union ("," union)* ")" | matrix | \frac argument argument | function ...
    """

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0
        self.names: set[Tree] = set()  # the sides that can be labels

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

    def several(self, read: Callable, separator: str | re.Pattern) -> tuple[list, list[str]]:
        """(what `read` reads, once or more often; the separators between)."""
        items, separators = [read()], []
        while found := self.take(separator):
            separators.append(found[0])
            items.append(read())
        return items, separators

    def answer(self) -> tuple[Tree | None, Tree | None]:
        """(value, equation), or the lists of them; None where there is none."""
        elements, _ = self.several(self.element, ",")
        self.expect("$")
        labels = {label for label, _ in elements} - {""}
        if len(labels) > 1 or not labels <= self.names:  # each value belongs to its label
            return None, collection(SET, [("=", (sub, label, value)) for label, value in elements])
        value = collection(SET, [value for _, value in elements])
        return value, ("=", (sub, *labels, value)) if labels else None  # x = 1, 2

    def element(self) -> tuple[Tree, Tree]:
        """(label or "", value) of a value, an inequality, or 2^{10} = 1024; (left, right) of an equation."""
        sides, relations = self.several(self.side, RELATION)
        if {*relations} - {"=", "\\in"}:
            if relations[0] in (">", "\\ge"):  # from the smaller to the larger
                sides, relations = sides[::-1], [TURNED.get(relation, relation) for relation in relations[::-1]]
            return "", collection(" ".join(relations), sides)
        if sides[0] not in self.names:  # 7 = f(3)
            sides.reverse()
        label = sides.pop(0) if relations and sides[0] in self.names else ""
        numbers = [side for side in sides if not letters(side)]
        if not all(same(numbers[0], number) for number in numbers[1:]):
            raise ValueError("two sides have different values")
        if label == "" and len(sides) == 2 and not same(*sides):
            return sides[0], sides[1]
        return label, (numbers or sides)[-1]

    def side(self) -> Tree:
        """A value, or the name that it has; what cannot be read is a name, too."""
        start = self.at
        try:
            tree = self.union()
            self.expect(SIDE_END)
            is_name = letters(tree) and NAME.fullmatch(self.text[start : self.at].strip())
        except ValueError:
            self.at, self.depth = start, 0
            tree = is_name = self.expect(rf"(?:[^()=<>,]|\([^()]*\))+?{SIDE_END}")[0].strip()
        if is_name:
            self.names.add(tree)
        return tree

    def union(self) -> Tree:
        return collection("union", self.several(self.sum, r"\\cup(?![A-Za-z])")[0])

    def sum(self) -> Tree:
        self.take(r"\+")
        terms, _ = self.several(self.product, r"\+|(?=-|\\pm(?![A-Za-z]))")
        return (add, *terms) if len(terms) > 1 else terms[0]

    def product(self) -> Tree:
        factors = [self.factor()]
        while (operator := self.take(OPERATOR)) or self.take(FACTOR):
            factors.append(self.factor())
            if operator and operator[0] in ("/", "\\div"):
                factors[-1] = (truediv, Fraction(1), factors[-1])
                self.expect(rf"(?!{FACTOR.pattern})")  # 1/2x is (1/2)x to some and 1/(2x) to others
        if len(factors) == 1:
            return factors[0]
        if any(isinstance(factor, tuple) and factor[0] is together for factor in factors):
            raise ValueError("no products of sets and points")
        return (mul, *factors)

    def factor(self) -> Tree:
        sign = self.take(r"-|\\pm(?![A-Za-z])")
        tree = self.atom()
        if self.take("!(?!!)"):
            tree = (math.gamma, (add, tree, Fraction(1)))
        if self.take(r"\^"):
            digits = self.take(r"-?\d+")
            tree = (power, tree, Fraction(digits[0]) if digits else self.argument())
        return (mul, Fraction(-1) if sign[0] == "-" else "\\pm", tree) if sign else tree

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
            text = quoted[1].strip() if quoted[1].isupper() else quoted[1].strip().lower()  # East is east, ABC not abc
            words = [UNITS.get(word, word.removesuffix("s")) for word in re.findall("[A-Za-z]+", text)]  # one spelling
            degree = POWERS.get(words[0], 1) if words else 1
            tree = "word " + "".join(words[degree > 1 :])
            tree = (power, tree, Fraction(degree)) if degree > 1 else tree
        elif opening := self.take(r"[({\[]|\\\{"):
            parts, _ = self.several(self.union, ",")
            closing = r"[)\]]" if len(parts) > 1 and opening[0] in "([" else CLOSING[opening[0]]
            tree = collection(opening[0] + self.expect(closing)[0], parts)
        elif environment := self.take(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr ]*\})?"):
            parts, separators = self.several(self.union, r"&|\\\\(?!\\end)")
            self.expect(rf"(?:\\\\)?\\end\{{{environment[1]}\}}")
            tree = collection(f"matrix {separators}", parts)
        else:
            tree = self.command(self.expect(r"[A-Za-z]|\\[A-Za-z]+")[0])
        self.depth -= 1
        return tree

    def number(self) -> Tree:
        """A literal, a mixed number, or digits in a base, which are not converted: 52_8 asks for just these digits."""
        if mixed := self.take(r"(\d+)(?:\\frac(\d|\{\d+\})(\d|\{\d+\})| (\d+)/(\d+))"):
            whole, numerator, denominator = (int(group.strip("{}")) for group in mixed.groups() if group)
            if not 0 < numerator < denominator:
                raise ValueError("neither a mixed number nor clearly a product")
            return whole + Fraction(numerator, denominator)
        if repeating := self.take(r"(\d*\.(\d*))\\(?:overline|bar)(\d|\{\d+\})"):
            again = repeating[3].strip("{}")
            nines = (10 ** len(again) - 1) * 10 ** len(repeating[2])
            return Fraction(f"0{repeating[1]}0") + Fraction(int(again), nines)
        literal = self.expect(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE]-?\d{1,3}(?!\d))?")[0]
        if base := self.take(SUBSCRIPT):
            return literal.lstrip("0") + base[0]
        return Fraction(literal)

    def command(self, name: str) -> Tree:
        if name == "\\frac":
            return (truediv, self.argument(), self.argument())
        if name == "\\sqrt":
            index = self.take(r"\[([2-9])\]")
            return (power, self.argument(), Fraction(1, int(index[1]) if index else 2))
        if name in FUNCTIONS:
            return self.function(name)
        if len(name) > 1 and name not in LETTERS:
            raise ValueError(f"unknown command {name}")
        name += self.expect(rf"(?:{SUBSCRIPT})?'*")[0].replace('"', "")
        return name if self.take("(?==)") else {"e": math.e, "\\pi": math.pi}.get(name, name)  # a label: e = 1/2

    def function(self, name: str) -> Tree:
        """A function of the factors behind it. In brackets the argument is whole, and nothing may stick to them."""
        exponent = self.take(r"\^(\d)")  # \sin^2 x
        base = [self.argument() if self.take("_") else Fraction(10)] if name == "\\log" else []
        bracketed = self.take(r"(?=[({\[])")
        factors = [self.atom() if bracketed else self.factor()]
        while not bracketed and self.take(FACTOR) and not self.take(FUNCTION):
            factors.append(self.factor())
        self.expect(rf"{FUNCTION}|(?![\^!])(?!{FACTOR.pattern})" if bracketed else r"(?!/|\\div)")
        tree = (FUNCTIONS[name], (mul, Fraction(1), *factors), *base)
        return (power, tree, Fraction(exponent[1])) if exponent else tree


def same(one: Tree, other: Tree) -> bool:
    """Whether two trees are equal at the first three points where both are defined."""
    equal = 0
    for point in range(POINTS):
        with suppress(ArithmeticError, ValueError):  # not defined here
            a, b = value_at(one, point), value_at(other, point)
            if a != b and (isinstance(a + b, Fraction) or not math.isclose(a, b, rel_tol=TOLERANCE)):
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
    if len(values) == 1:
        return rounded(function(*values), noise)
    return reduce(lambda a, b: rounded(function(a, b), noise), values)


def rounded(value: Fraction | float, noise: Random) -> Fraction | float:
    if isinstance(value, Fraction) and (value.numerator * value.denominator).bit_length() <= MAX_BITS:
        return value
    if value and not 1e-100 < abs(value) < 1e100:
        raise OverflowError("too large or too small for a float")
    return float(value) * (1 + 1e-15 * noise.uniform(-1, 1))


def power(base: Fraction | float, exponent: Fraction | float) -> Fraction | float:
    """Raises ArithmeticError or ValueError for 1/0, 0^0, an even root of a negative number, and what is too large."""
    if base == exponent == 0:
        raise ZeroDivisionError("0^0")
    rational = isinstance(exponent, Fraction)
    if rational and exponent.denominator == 1 and isinstance(base, Fraction):
        if (base.numerator * base.denominator).bit_length() * abs(exponent) <= MAX_BITS:
            return base ** int(exponent)
    elif base < 0 and not (rational and exponent.denominator % 2):
        raise ValueError("no real root")
    result = math.pow(abs(base), exponent)
    if base and not result:
        raise OverflowError("too small for a float")
    return -result if base < 0 and exponent.numerator % 2 else result
