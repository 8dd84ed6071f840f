"""Numbers as people write them, against values worked out by hand."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.numbers import MAX_DIGITS, last_number, read_number


@pytest.mark.parametrize(
    ("text", "alone", "last"),
    [
        ("1/2", "1/2", "1/2"),
        ("1 1/2", "3/2", "3/2"),
        (r"1\frac12", "3/2", "3/2"),
        (r"\frac{3}{4}", "3/4", "3/4"),
        (r"$-\dfrac{3}{4}$", "-3/4", "-3/4"),
        ("18 / 2", "9", "9"),
        ("2 3/2", None, None),  # no mixed number
        ("1/0", None, None),
        ("3e5", "300000", "300000"),
        ("1e-5", "1/100000", "1/100000"),
        ("3 x 10^5", "300000", "300000"),
        (r"3 \times 10^{5}", "300000", "300000"),
        ("1.5·10^-1", "3/20", "3/20"),
        ("10^5", "100000", "100000"),
        ("3eggs", "3", "3"),
        ("70{,}000", "70000", "70000"),
        (r"1,\!000", "1000", "1000"),
        (r"12\,500", "12500", "12500"),
        *((f"{dash}3", "-3", "-3") for dash in "-−–—‐‑－"),
        ("- 3", None, "3"),  # a sign stands at its number
        ("minus 3", None, "3"),
        ("5-3", None, "3"),
        ("5 million", "5000000", "5000000"),
        ("2.5 Million dollars", "2500000", "2500000"),
        ("2 dozen eggs", "24", "24"),
        ("3 hundred thousand", "300000", "300000"),
        ("5 millionaires", "5", "5"),
        ("28%", "28", "28"),
        (r"28\%", "28", "28"),
        ("28 percent", "28", "28"),
        ("12 m^2", "12", "12"),
        ("12 cm²", "12", "12"),
        (r"12 \text{ m}^{2}", "12", "12"),
        ("12x^2", None, "2"),
        ("5 + 7 = 12", "12", "12"),
        ("x = 12 apples", "12", "12"),
        ("12 = 5 + 7", None, "7"),
        ("about 12", "12", "12"),
        ("10:45", None, "45"),
        ("10:45 am", None, "45"),
        ("3, 4", None, "4"),
        ("3 or 4", None, "4"),
        ("4, 5, 6 or 7", None, "7"),
        ("5 and a half", None, "5"),
        ("half of 5", None, "5"),
        ("5 factorial", None, "5"),
        (r"\frac{-3}{4}", "-3/4", "-3/4"),
        ("about 3 x 10^5 people", "300000", "300000"),  # the blank behind an exponent stays
        ("1\u2009000", "1000", "1000"),
        (r"-\$3", "-3", "-3"),
        (r"\textbf{42}", "42", "42"),
        ("12 m/s^2", "12", "12"),
        ("**5** million", "5000000", "5000000"),
        ("$5$ million", "5000000", "5000000"),
        (r"5\text{ million}", "5000000", "5000000"),
        ("5~million", "5000000", "5000000"),
        ("5-million", None, "5"),
        ("1" + " million" * 4, None, str(10**18)),  # at most three scales: a value stays small
        *((text, None, "5") for text in ("5k", "$5M", "5x", "5th", r"5\pi", "5π", "5²", "5 squared", "twice 5", "5½")),
        *((text, None, "5") for text in ("x >= 5", "x <= 5", "x != 5")),  # no working that ends in = 5
        *((text, None, "5") for text in ("sqrt(5)", "f(5)", r"5\sqrt{x}", "the root of 5", "triple 5")),
        *((text, None, "5") for text in ("5 hundredths", "5 millionths", "5 fifths", "5 tenths", "5 crore")),
        *((text, "5", "5") for text in ("**Answer:** 5", r"\text{Total: }5", "[5]", "{5}", '"5"', "x ≈ 5", "It’s 5")),
        *(
            (text, "5", "5")
            for text in ("\ufeff5", "\u200b5 apples", "5 apple(s)", "5 roots", r"5^\circ", r"5^{\circ}", "Total (5)")
        ),
        (r"2 \frac13", "7/3", "7/3"),
        (r"$\boxed{42}$", "42", "42"),
        (r"\(42\)", "42", "42"),
        ("€1.5", "3/2", "3/2"),
        ("1" * MAX_DIGITS, "1" * MAX_DIGITS, "1" * MAX_DIGITS),
        ("1" * (MAX_DIGITS + 1), None, None),
        ("1e101", None, None),
        ("", None, None),
        ("none", None, None),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_the_one_number_of_a_text_and_the_last_one(text, alone, last):
    assert read_number(text) == (None if alone is None else Fraction(alone))
    assert last_number(text) == (None if last is None else Fraction(last))


def test_the_last_number_is_read_as_whole_as_it_is_written():
    assert last_number("first 3, then 5 million.") == 5_000_000
    assert last_number("It is 20 m by 12 m, so 240 m^2 of them.") == 240
    assert last_number("1 of 2 is 1/2 and not 3/4") == Fraction(3, 4)
    assert last_number("it went from 5 to -3") == -3


@given(st.fractions(max_denominator=10**6).filter(lambda value: abs(value) < 10**9))
def test_every_fraction_is_read_back(value):
    sign, top, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    for text in (f"{sign}{top}/{under}", rf"{sign}\frac{{{top}}}{{{under}}}", f"so x = ${sign}{top}/{under}$."):
        assert read_number(text) == value
        assert last_number(f"7 and {text}") == value


PIECES = ["9", "9,", ",999", "-", "$", " ", "1 ", "1/", "1 1/", "1e", "10^", "x10^", r"\frac{1", r"\frac1", "m^", "{,}"]
PIECES += ["million ", "1 million ", "=", "−", "a", "'", "*", r"\boxed{", "9.9", "1 m^2 ", "f(", "~[", '"', "!="]


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear_in_the_text(piece):
    text = piece * (200_000 // len(piece))
    started = time.perf_counter()
    for whole in (text, "1" + text, text + "1", "= " + text + "x"):
        read_number(whole)
        last_number(whole)
    assert time.perf_counter() - started < 2


@settings(max_examples=300)
@given(st.text(alphabet="0123456789.,-/ =e^x\\frac{}$%m−", max_size=30) | st.text())
def test_no_text_raises(text):
    alone, last = read_number(text), last_number(text)
    assert alone is None or last is not None or "=" in text
