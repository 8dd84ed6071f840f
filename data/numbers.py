r"""The one reader of numbers: exact values of what people and models write. Imports nothing of ours.

    >>> read_number("$1,800.50"), read_number("3 x 10^5"), read_number("5 million"), read_number("28%")
    (Fraction(3601, 2), Fraction(300000, 1), Fraction(5000000, 1), Fraction(28, 1))
    >>> read_number("5 + 7 = 12 m^2"), read_number("3 or 4"), last_number("from 3 to 4, or 1/2")
    (Fraction(12, 1), None, Fraction(1, 2))

- Any dash is a minus sign, where nothing that could be its left operand touches it: 5-3 holds 5 and 3.
- A comma belongs to a number only before a group of three digits: 3,4 is two numbers, and 1,800 is one. LaTeX also sets
  groups apart by {,} and \, and \!.
- A scale counts: 5 million is not 5. A percent sign or word does not: 28% is 28. The exponent of a unit is no number.
"""

import re
from collections import deque
from fractions import Fraction

MAX_DIGITS = 100  # of one number: reading a longer one costs more than linear time

SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNIT = (
    r"(?:[cmk]?m|ft|in|yd|mi|s|units?|feet|foot|inch(?:es)?|yards?|miles?|seconds?|(?:centi|milli|kilo)?met(?:er|re)s?)"
)
CHARACTERS = str.maketrans("‐‑‒–—―−﹣－\u00a0\u2007\u2009\u202f", "---------    ", "\u200b\u2060\ufeff")
# Between groups of three digits; read before other blanks are folded, since a thin space separates and " " does not.
SEPARATOR = r"(?<=[0-9])(?:\{,\}|,?\\!|\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"
NOTATION = [  # (pattern, replacement), in this order. Digits are [0-9], because \d also takes those of other scripts.
    (rf"(?<=[0-9])[*$~\\ ]{{0,4}}(?:(?:text|mathrm)\{{ ?)?((?:{'|'.join(SCALES)})s?\b)", r" \1"),
    (r"\\[dtc]?frac ?(?:\{ ?(-?[0-9.]{1,50}) ?\}|([0-9])) ?(?:\{ ?([0-9.]{1,50}) ?\}|([0-9]))", r" \1\2/\3\4"),
    (r"- (?=[0-9.]{1,50}/)", "-"),  # where the sign stood before such a fraction
    (r"(?<=[0-9]) ?(?:\\times|\\cdot|[x*×·⋅]) ?10 ?\^ ?\{? ?(-?[0-9]{1,3})(?: ?\})?", r"e\1"),
    (r"(?<![0-9A-Za-z.,])10 ?\^ ?\{? ?(-?[0-9]{1,3})(?: ?\})?", r"1e\1"),
    (rf"(?<=[0-9 {{/]){UNIT}( ?\}})? ?\^ ?\{{? ?-?[0-9](?: ?\}})?", r"\1"),
]
# ++ never goes back, so that time stays linear in the text.
LITERAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9A-Za-z])\.[0-9]++)"
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)])(-)\\?[$€£¥₹]?)?"
    r"(?:([0-9]++) {1,2}(?=[0-9]++ ?/))?"  # the whole part of 1 1/2
    rf"({LITERAL})(?:[eE]([+-]?[0-9]{{1,3}})(?![0-9A-Za-z]))?"
    rf"(?: ?/ ?({LITERAL}))?"
    rf"((?: ?(?:{'|'.join(SCALES)})s?\b){{0,3}})",  # no more, so that the value stays small
    re.IGNORECASE,
)
# What may stand before a number: words, marks, and the commands around it.
OPENING = re.compile(
    r"""(?:[A-Za-z'’",:\s$€£¥₹*_`(\[{}+~≈]|\\(?:[(\[$]|approx\b|(?:boxed|text(?:bf)?|math(?:bf|rm)) ?\{))*"""
)
NOT_ALONE = re.compile(  # beside a number, it would change it: 5 and 6, 2\pi, 18th, 5k, 5x, half of 5, f(5)
    r"[0-9½⅓⅔¼¾π√]|[A-Za-z]\( |\\pi\b|(?<![A-Za-z])(?:\^(?! ?\{? ?\\circ)|[²³¹⁰⁴-⁹])|"
    r"(?<= )(?:k|[xyn]|st|nd|rd|th|mil|bn|(?-i:[MB]))\b|\b(?:half|halves|thirds?|quarters?|twice|double|triple|"
    r"(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|sqrt|root of|factorial|minus|negative|lakhs?|crores?|"
    rf"(?:{'|'.join(SCALES)}|quadrillion)(?:th)?s?)\b",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """One way to write signs, groups of digits, fractions and powers of ten."""
    text = re.sub(SEPARATOR, "", text).translate(CHARACTERS)
    for pattern, replacement in NOTATION:
        text = re.sub(pattern, replacement, text)
    return text


def read_number(text: str) -> Fraction | None:
    """The one number of a text: `$1,800.`, `**18**`, `(-3)`, `about 18 dollars`, or behind the last = of a working.

    None for anything else: several numbers, a time of day, a sum that is not worked out, half of 18.
    """
    text = re.split("(?<![<>!/])=", normalise(text))[-1]
    found = NUMBER.match(text, OPENING.match(text).end())
    if found is None or NOT_ALONE.search(text[: found.start()] + " " + text[found.end() :]):
        return None
    return value(found)


def last_number(text: str) -> Fraction | None:
    """The last number of a text, or None."""
    last = deque(NUMBER.finditer(normalise(text)), maxlen=1)
    return value(last[0]) if last else None


def value(found: re.Match[str]) -> Fraction | None:
    """What a match of NUMBER stands for; None beyond MAX_DIGITS, by 0, and for 2 3/2, which is no mixed number."""
    sign, whole, *parts, scales = found.groups()
    over, exponent, under = (part and part.replace(",", "") for part in parts)
    if max(len(over), len(under or ""), len(whole or ""), abs(int(exponent or 0))) > MAX_DIGITS:
        return None
    number, divisor = Fraction(over) * Fraction(10) ** int(exponent or 0), Fraction(under or 1)
    if divisor == 0 or (whole and number >= divisor):
        return None
    number = int(whole or 0) + number / divisor
    for scale in scales.lower().split():
        number *= SCALES[scale.removesuffix("s")]
    return -number if sign else number
