r"""Whether two answers in LaTeX are equal up to notation. Imports nothing of ours: copy the file to use it elsewhere.

    >>> last_boxed(r"The sum is $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> equivalent(r"\frac{1}{2}", "x = 0.5"), equivalent(r"2\sqrt{3}", r"\sqrt{12}"), equivalent("(1,2)", "[1,2]")
    (True, True, False)

`equivalent` reads each answer into a form in which equal answers look alike: rational numbers are exact; roots are
primes with fractional exponents, so that \sqrt{12} = 2\sqrt3; letters stay letters. What it cannot read equals only the
same text: a right answer in unusual notation may fail, which harms training less than a wrong one that passes.
Where this departs from its sources, and why:

- hendrycks/math and the harnesses after it (Minerva, lm-evaluation-harness) rewrite strings, so that 2/4 is not 1/2,
  and "1,2" is not "2,1". Here answers are parsed.
- math-verify hands both answers to a computer algebra system. Here constants are judged by value, but a product of sums
  with letters in it is not multiplied out: else the question "factor x^2-1" would be its own answer.
- Order is free in comma lists, sets and unions, and a list equals the set of its elements. Points, intervals and
  matrices keep it. a \pm b is the list of its two values.
- "x =" and units may be absent on one side; where both sides name one, they must agree. Signs for degrees and percent
  are dropped. A base belongs to its number: 52_8 is not 52.
- Inside brackets a comma separates, so (1,000) is a pair; 1{,}000 and 1,\!000 are one number everywhere.
- What people read in two ways is not read at all: 1/2x, 2\frac{3}{2}, \sin(x)^2.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from functools import reduce

MAX_LENGTH = 1000  # characters of an answer that is read; these limits bound the cost of a hostile one
MAX_DEPTH = 30  # nested groups
MAX_BITS = 10_000  # of one integer
MAX_TERMS = 100  # of a product that is multiplied out
MAX_EXPONENT = 8  # to which a sum is multiplied out
MAX_DIVISOR = 10_000  # tried in a number under a root

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([^\s${}\\]+))?|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last balanced \boxed{} or \fbox{} that is not empty, or the token after a bare \boxed.

    Of nested boxes the inner one is the last. One pass, so that a million open boxes cost no more than their length.
    """
    start = end = -1  # of the content
    opened: list[tuple[int, bool]] = []  # for each open brace: where its content begins, and is it that of a box
    for match in BOX.finditer(text):
        token = match[0]
        if token == "{" or match[1]:
            opened.append((match.end(), token != "{"))
        elif token == "}" and opened:
            begin, is_box = opened.pop()
            if is_box and begin > start and text[begin : match.start()].strip():
                start, end = begin, match.start()
        elif match[2]:
            start, end = match.span(2)
    return text[start:end].strip() if start >= 0 else None


def equivalent(a: str, b: str) -> bool:
    """Whether two answers in LaTeX are equal up to notation. What cannot be read equals the same text. Symmetric."""
    if max(len(a), len(b)) > MAX_LENGTH:
        return a.strip() == b.strip() != ""
    a, b = normalise(a), normalise(b)
    if plain(a) == plain(b):
        return plain(a) != ""
    try:
        *first, value = read(a)
        *second, other = read(b)
    except ValueError:
        return False
    labels = zip(first, second, strict=True)  # the names, and the units: one side may leave them out
    return value == other and all(x == y or not x or not y for x, y in labels)


# --- the text: one way to write each thing ---

UNITS = {"m": "meter", "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "g": "gram", "kg": "kilogram"}
UNITS |= {"ft": "foot", "feet": "foot", "in": "inch", "inche": "inch", "s": "second", "h": "hour"}
UNITS |= {"sq": "2", "square": "2", "cubic": "3"}
SCALES = {"dozen", "hundred", "thousand", "million", "billion", "trillion"}  # no units: 5 million is not 5
BARE_UNIT = re.compile(  # not km, kg and ft, which may be products
    r'"[^"]*"|(?<=[\d })])(?:(?:square|sq|cubic) )?'
    r"(?:degree|[cm]m|(?:centi|milli|kilo)?meter|foot|feet|inche?|mile|hour|minute|second|dollar|cent|unit)s?(?![A-Za-z])"
)
UNIT = re.compile(r'(?:"[^"]*"(?: ?\^ ?\{? ?[23] ?\}?)?[ /]*)+$')
WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf))\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z .'/-]+|[mgsh]")  # a single letter in \text{} is one of these units, or a variable

UNICODE = {"−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi "}
UNICODE |= {"√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge "}
UNICODE |= {"≠": r"\ne ", "°": "", '"': ""}
COMMANDS = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\lbrace": r"\{", r"\rbrace": r"\}"}
COMMANDS |= {r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne"}
COMMANDS |= {rf"\{name}": "" for name in ("left", "right", "bigl", "bigr", "big", "Big", "displaystyle", "degree")}
COMMANDS |= {r"\quad": " ", r"\qquad": " "}
NOTATION = [  # (pattern, replacement), in this order
    (r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1 "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", ""),
    (r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))", ""),  # a comma inside a number
    (r"(?<!\\)\\\$", '"dollar"'),
    (r"\\?[%$]", ""),
    (r"(?<!\\)\\[!,;:> ]|~", " "),
    (r"\s(?:and|or)\s", ","),
    (r",\s*,", ","),
    (r"\s+", " "),
    (r"^ |[ .,]+$", ""),
]


def normalise(text: str) -> str:
    """One way to write each symbol; spacing gone; units, and words that stood in a text command, in double quotes."""

    def quote(match: re.Match) -> str:
        parts = [part.strip() for part in re.split(r"\b(?:and|or)\b", match[1])]
        return ",".join(f'"{part}"' if WORDS.fullmatch(part) else part for part in parts)

    text = text.translate(str.maketrans(UNICODE))
    for _ in range(3):  # wrappers in wrappers
        text = WRAPPER.sub(quote, text)
    text = re.sub(r"\\[A-Za-z]+", lambda match: COMMANDS.get(match[0], match[0]), text)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    return BARE_UNIT.sub(lambda match: match[0] if match[0].startswith('"') else f'"{match[0]}"', text)


def plain(text: str) -> str:
    """What is compared first: no quotes, no braces around one character, few spaces: 1 1/2 and 3, 100 keep theirs."""
    text = re.sub(r"([_^]) ?\{ ?(\w) ?\}", r"\1\2", text.replace('"', ""))
    return re.sub(r"(?<![\w,]) | (?!\w)", "", text)


# --- the reader: lists, sets, points, intervals, matrices, equations ---

Form = tuple  # nested; two answers are equal where their forms are

TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|.")
OPENING, CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
MATRIX = re.compile(r"\\begin ?\{([pb]?)matrix\}(.*)\\end ?\{\1matrix\}")
WORD = re.compile(r"[A-Za-z][A-Za-z .'-]{2,}|[Nn]o")
NAME = re.compile(  # "x =", "f(x) =", "\theta =", "a_{n} =", "(x,y) =", "x \in"
    r'("[^"]*"|\([A-Za-z](?:, ?[A-Za-z])+\)|(?:[A-Za-z]+|\\[a-z]+)(?:_\w|_\{\w+\})?(?:\([a-z]\))?)'
    r" ?(?:=|\\in(?![a-z]))([^=]*)"
)


def read(text: str) -> tuple[str, str, Form]:
    """(x in "x = 5", unit, value); the first two may be "". Raises ValueError for what has no form here."""
    if not re.search(r"[(\[]|\\\{", text):  # inside brackets a comma separates
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    parts, units = zip(*map(take_unit, split(text, ",")[0]), strict=True)
    elements = [element for part in parts for element in both_signs(part)]
    named = [NAME.fullmatch(element) for element in elements]
    names = {match[1].replace(" ", "") for match in named if match}
    if len(names) == 1:
        elements = [match[2] if match else element for match, element in zip(named, elements, strict=True)]
    name = names.pop() if len(names) == 1 else ""  # of several names each belongs to its value
    return name, " ".join(sorted({*units} - {""})), collection(map(read_element, elements))


def split(text: str, *separators: str) -> tuple[list[str], list[str]]:
    """(the parts between separators outside brackets, those separators). Raises ValueError for unbalanced brackets."""
    parts, found, depth, start = [], [], 0, 0
    for match in TOKEN.finditer(text):
        depth += (match[0] in OPENING) - (match[0] in CLOSING)
        if depth < 0:
            break
        if depth == 0 and match[0] in separators:
            parts.append(text[start : match.start()].strip())
            found.append(match[0])
            start = match.end()
    if depth:
        raise ValueError("brackets do not match")
    return [*parts, text[start:].strip()], found


def take_unit(element: str) -> tuple[str, str]:
    """(the element without its unit, the name of the unit or ""). With nothing before it, a unit is a word."""
    rest = element.replace('"dollar"', "").strip()
    found = UNIT.search(rest)
    if not found or not rest[: found.start()].strip():
        return rest or element, "dollar" if rest != element else ""
    words = [word.removesuffix("s") or word for word in re.findall(r"[a-z]+|[23]", found[0].lower())]
    names = sorted(UNITS.get(word, word) for word in words)  # "cm"^2 and "square centimeters" are one
    if SCALES & {*names}:
        raise ValueError("numbers in words are not read")
    return rest[: found.start()].strip(), "" if "unit" in names else " ".join(names)


def both_signs(element: str) -> list[str]:
    r"""The two elements that one with \pm stands for."""
    found = PLUS_MINUS.findall(element)
    if not found or element.startswith("\\{"):  # the elements of a set have their own turn
        return [element]
    if len(found) > 1:
        raise ValueError("several \\pm: their signs may or may not go together")
    return [PLUS_MINUS.sub(sign, element) for sign in "+-"]


def collection(forms: Iterable[Form]) -> Form:
    first, *others = forms
    return ("list", *sorted([first, *others], key=repr)) if others else first


def read_element(text: str, depth: int = 0) -> Form:
    """The form of one relation, union, matrix, set, point, interval, word or value."""
    if depth > MAX_DEPTH:
        raise ValueError(f"brackets nest deeper than {MAX_DEPTH}")

    def each(parts: list[str]) -> list[Form]:
        return [read_element(part, depth + 1) for part in parts]

    text = text.strip()
    sides, relations = split(text, "=", "<", ">", "\\le", "\\ge", "\\ne", "\\in")
    if relations:
        return relate(each(sides), relations)
    parts, _ = split(text, "\\cup")
    if len(parts) > 1:
        return ("union", *sorted(each(parts), key=repr))
    if matrix := MATRIX.fullmatch(text):
        rows = split(matrix[2].strip().removesuffix("\\\\"), "\\\\")[0]
        return ("matrix", *(tuple(each(split(row, "&")[0])) for row in rows))
    if text.startswith("\\{") and text.endswith("\\}"):
        return collection(each([sign for part in split(text[2:-2], ",")[0] for sign in both_signs(part)]))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        with suppress(ValueError):  # the two are no pair, as in (1)(2)
            parts, commas = split(text[1:-1], ",")
            if commas:
                return (text[0], *each(parts), text[-1])
    if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1]
    if WORD.fullmatch(text):  # "East" is "east", but ABC is not abc
        return ("word", re.sub(r"[^A-Za-z]", "", re.sub(r"\b[A-Z]", lambda match: match[0].lower(), text)))
    expression = Expression(text)
    value = expression.sum()
    expression.expect("$")
    return ("value", freeze(value))


def relate(sides: list[Form], relations: list[str]) -> Form:
    """An equation by all its terms on one side, up to a factor; a chain of < and <= from the smaller to the larger."""
    if relations == ["="] and sides[0][0] == sides[1][0] == "value":
        difference = add(dict(sides[0][1]), dict(sides[1][1]), -1)
        if is_constant(difference):
            raise ValueError("an equation without a letter is true or false, and no answer")
        return ("=", *single(difference))
    if set(relations) <= {">", "\\ge"}:
        relations, sides = [{">": "<", "\\ge": "\\le"}[relation] for relation in relations[::-1]], sides[::-1]
    if set(relations) <= {"<", "\\le"} or relations in (["="], ["\\in"], ["\\ne"]):
        return (*relations, *sides)
    raise ValueError(f"no reading for the relations {' '.join(relations)}")


# --- values: sums of products of primes, letters and what is not taken apart ---

# An atom is a prime (or a large number without small divisors) under a root, a letter, a function with its argument,
# ("^", base, exponent), or a whole sum, frozen. A product holds (atom, exponent), sorted.
Atom = int | str | tuple
Product = tuple[tuple[Atom, Fraction], ...]
Sum = dict[Product, Fraction]  # the coefficient of each product; none is 0, so {} is zero


def number(value: Fraction | int) -> Sum:
    return {(): Fraction(value)} if value else {}


def is_constant(value: Sum) -> bool:
    return all(isinstance(atom, int) for product in value for atom, _ in product)


def freeze(value: Sum) -> tuple:
    return tuple(sorted(value.items(), key=repr))


def term(powers: dict[Atom, Fraction], coefficient: Fraction = Fraction(1)) -> Sum:
    """coefficient * product of atom ** exponent, whole powers of primes being part of the coefficient."""
    kept = {}
    for atom, exponent in powers.items():
        if isinstance(atom, int):
            whole = math.floor(exponent)
            if atom.bit_length() * abs(whole) > MAX_BITS:
                raise ValueError(f"a number of more than {MAX_BITS} bits")
            coefficient *= Fraction(atom) ** whole
            exponent -= whole
        if exponent:
            kept[atom] = exponent
    if max(coefficient.numerator.bit_length(), coefficient.denominator.bit_length()) > MAX_BITS:
        raise ValueError(f"a number of more than {MAX_BITS} bits")
    return {tuple(sorted(kept.items(), key=repr)): coefficient}


def single(value: Sum, opaque: bool = False) -> Sum:
    """A sum as one term: its leading coefficient (only the size of it, if opaque) times an atom."""
    if len(value) <= 1 and not opaque:
        return value
    leading = value[min(value, key=repr)]
    leading = abs(leading) if opaque else leading
    return {((freeze({product: x / leading for product, x in value.items()}), Fraction(1)),): leading}


def add(a: Sum, b: Sum, sign: int = 1) -> Sum:
    total = dict(a)
    for product, x in b.items():
        total[product] = total.get(product, 0) + sign * x
    return {product: x for product, x in total.items() if x}


def multiply(a: Sum, b: Sum) -> Sum:
    """Constants are multiplied out, and a constant term into a sum. Other sums stay whole, as atoms."""
    small = len(a) * len(b) <= MAX_TERMS and is_constant(a) and is_constant(b)
    if not (small or (len(a) <= 1 and is_constant(a)) or (len(b) <= 1 and is_constant(b))):
        a, b = single(a), single(b)
    total: Sum = {}
    for left, x in a.items():
        for right, y in b.items():
            powers = dict(left)
            for atom, exponent in right:
                powers[atom] = powers.get(atom, Fraction(0)) + exponent
            ((product, coefficient),) = term(powers, x * y).items()
            total[product] = total.get(product, 0) + coefficient
    return {product: x for product, x in total.items() if x}


def power(base: Sum, exponent: Fraction) -> Sum:
    """Raises ValueError for a division by zero, 0^0, and a number that would be too large."""
    if exponent == 1 or (not base and exponent > 0):
        return base
    if not base:
        raise ValueError("zero to a power that is not positive")
    integral = exponent.denominator == 1
    if integral and len(base) > 1 and is_constant(base) and 0 < exponent <= MAX_EXPONENT:
        return reduce(multiply, [base] * int(exponent))
    # Only a positive number may leave a root: sqrt(x^2) is not x, and sqrt(-2) sqrt(-3) is not sqrt(6).
    positive = len(base) == 1 and is_constant(base) and min(base.values()) > 0
    ((product, coefficient),) = single(base, opaque=not (integral or positive)).items()
    powers = {atom: old * exponent for atom, old in product}
    for integer, sign in ((abs(coefficient.numerator), 1), (coefficient.denominator, -1)):
        for factor in factors(integer):
            powers[factor] = powers.get(factor, Fraction(0)) + sign * exponent
    return term(powers, Fraction(-1 if coefficient < 0 and exponent % 2 else 1))


def factors(integer: int) -> Iterator[int]:
    """Prime factors with repetition; what is left beyond MAX_DIVISOR comes last, whole."""
    divisor = 2
    while divisor <= MAX_DIVISOR and divisor * divisor <= integer:
        while integer % divisor == 0:
            yield divisor
            integer //= divisor
        divisor += 1
    if integer > 1:
        yield integer


GREEK = "alpha beta gamma delta epsilon varepsilon theta lambda mu nu xi rho sigma tau phi varphi psi omega"
SYMBOLS = {f"\\{name}" for name in (*GREEK.split(), "pi", "infty", "ell", "emptyset", "Delta", "Omega")}
FUNCTIONS = {"\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc", "\\arcsin", "\\arccos", "\\arctan", "\\log", "\\ln"}
NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
MIXED = re.compile(r"(\d+)(?: ?\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))| (\d+) ?/ ?(\d+))")
SUBSCRIPT = re.compile(r'_ ?(?:\{ ?"?(\w+)"? ?\}|(\w))')


class Expression:
    r"""Recursive descent over one expression.

    sum      = ["+" | "-"] product (("+" | "-") product)*
    product  = factor (("*" | "/" | nothing) factor)*     nothing: not before a number, nor after a division
    factor   = atom ["^" (integer | argument)]            integer: TeX takes one digit, but 2^10 means ten
    argument = digit | atom                               as TeX takes it: \frac12, \sqrt3
    atom     = number | letter | "(" sum ")" | \frac argument argument | \sqrt argument | function atom
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

    def sum(self) -> Sum:
        sign = self.take("[+-]")
        total = add({}, self.product(), -1 if sign and sign[0] == "-" else 1)
        while sign := self.take("[+-]"):
            total = add(total, self.product(), -1 if sign[0] == "-" else 1)
        return total

    def product(self) -> Sum:
        value, divided = self.factor(), False
        while True:
            if operator := self.take(r"[*/]|\\(?:cdot|times|div)(?![A-Za-z])"):
                divided = operator[0] in ("/", "\\div")
                sign = -1 if self.take("-") else 1
                factor = multiply(number(sign), self.factor())
                value = multiply(value, power(factor, Fraction(-1)) if divided else factor)
            elif self.take(r"(?=[A-Za-z({\[]|\\[A-Za-z])"):
                if divided:
                    raise ValueError("1/2x is (1/2)x to some and 1/(2x) to others")
                value = multiply(value, self.factor())
            else:
                return value

    def factor(self) -> Sum:
        base = self.atom()
        if not self.take(r"\^"):
            return base
        digits = self.take(r"-?\d+")
        exponent = number(int(digits[0])) if digits else self.argument()
        if set(exponent) <= {()}:  # a rational number
            return power(base, exponent.get((), Fraction(0)))
        return term({("^", freeze(base), freeze(exponent)): Fraction(1)})

    def argument(self) -> Sum:
        digit = self.take(r"\d")
        return number(int(digit[0])) if digit else self.atom()

    def atom(self) -> Sum:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"groups nest deeper than {MAX_DEPTH}")
        if self.take(r"(?=[\d.])"):
            value = self.number()
        elif opening := self.take(r"[({\[]"):
            value = self.sum()
            self.expect({"(": r"\)", "{": r"\}", "[": r"\]"}[opening[0]])
        else:
            value = self.command(self.expect(r"[A-Za-z]|\\[A-Za-z]+")[0])
        self.depth -= 1
        return value

    def number(self) -> Sum:
        """A literal, a mixed number, or digits in a base, which are not converted: 52_8 asks for just these digits."""
        if mixed := self.take(MIXED):
            whole, numerator, denominator = (int(group) for group in mixed.groups() if group)
            if not 0 < numerator < denominator:
                raise ValueError("neither a mixed number nor clearly a product")
            return number(whole + Fraction(numerator, denominator))
        literal = self.expect(NUMBER)[0]
        if base := self.take(SUBSCRIPT):
            return term({("base", literal.lstrip("0"), base[1] or base[2]): Fraction(1)})
        return number(Fraction(literal))

    def command(self, name: str) -> Sum:
        if name == "\\frac":
            return multiply(self.argument(), power(self.argument(), Fraction(-1)))
        if name == "\\sqrt":
            index = self.take(r"\[ ?([2-9]) ?\]")
            return power(self.argument(), Fraction(1, int(index[1]) if index else 2))
        if len(name) > 1 and name not in SYMBOLS | FUNCTIONS:
            raise ValueError(f"unknown command {name}")
        subscript = self.take(SUBSCRIPT)
        atom: Atom = name + (f"_{subscript[1] or subscript[2]}" if subscript else "") + (self.take("'*") or "")[0]
        if name in FUNCTIONS:
            atom = (atom, freeze(self.argument()))
            self.expect(r"(?!\^)")  # is \sin(x)^2 the sine or the argument squared?
        return term({atom: Fraction(1)})
