"""Final answers: found where people put them, equal when they mean the same, different when they do not."""

from __future__ import annotations

import string
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.envs.lm.math_answer import final_answer, last_number, quantity, same_answer, verified_by_math_verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6*7=<<6*7=42>>42\n#### 42", "42"),
        ("#### 1,234 \nmore", "1,234"),
        (r"\boxed{1} no, \boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{1} then \boxed{2 unfinished", "1"),
        (r"#### 3 but \boxed{4}", "4"),
        ("The answer is 5. The final answer is: 6.5 apples.", "6.5 apples"),
        ("Final Answer: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("answer = -3", "-3"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


SAME = [
    ("42", "42.0"), ("42", "42."), ("42", " $42$ "), ("1234", "1,234"), ("1234567.5", "1,234,567.50"), ("-7", "\u22127"),
    ("1/2", r"\frac{1}{2}"), ("1/2", r"\dfrac12"), ("-1/2", r"-\frac{1}{2}"), ("1.5", r"1\frac{1}{2}"), ("1.5", "1 1/2"),
    ("50%", "0.5"), ("50%", "50"), ("50%", r"50\%"), ("50", "50 percent"), ("42", "$42"), ("42", "42 dollars"),
    ("5 cm", "5"), ("5 cm", r"5\text{ cm}"), ("5 apples", "5 apple"), ("90", r"90^\circ"), ("3 m/s", "3"),
    ("1000", r"1 \times 10^3"), ("0.001", "1e-3"), ("1024", "2^{10}"), ("x = 5", "5"), ("(1, 2)", "(1,2)"),
    ("(1/2, 3)", r"\left(\frac{1}{2}, 3.0\right)"), ("1, 2, 3", "1,2, 3"), ("[0, 1)", "[0,1)"), ("Blue", "blue."),
    (r"\boxed{7}", "7"), ("**12**", "12"), ("5 cm^2", "5 cm^2"), (r"\text{(A)}", "(A)"), (".5", "0.5"),
]  # fmt: skip
DIFFERENT = [
    ("42", "43"), ("42", "-42"), ("1/2", "0.33"), ("1/3", "0.333"), ("50%", "0.005"), ("5%", "50"), ("0.5%", "50%"),
    ("5 cm", "5 m"), ("2", "2x"), ("(1, 2)", "(2, 1)"), ("(1, 2)", "[1, 2]"), ("1, 2", "1"), ("12", "1, 2"),
    ("1,234", "1.234"), ("42", ""), ("42", "forty-two"), ("1/2", "1/0"), ("3", "3 or 4"), ("10", "10^2"), ("7", "7 5"),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "got"), SAME)
def test_same(expected: str, got: str) -> None:
    assert same_answer(expected, got)
    assert same_answer(got, expected)


@pytest.mark.parametrize(("expected", "got"), DIFFERENT)
def test_different(expected: str, got: str) -> None:
    assert not same_answer(expected, got)
    assert not same_answer(got, expected)


@settings(max_examples=40, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_in_any_form_compare_exactly(left: Fraction, right: Fraction) -> None:
    latex = rf"\frac{{{abs(left.numerator)}}}{{{left.denominator}}}"
    assert same_answer(str(left), ("-" if left < 0 else "") + latex)
    assert same_answer(str(left), str(right)) == (left == right)


@settings(max_examples=40, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_integers_with_commas(number: int) -> None:
    read = quantity(f"{number:,}")
    assert read is not None
    assert read.value == number
    assert last_number(f"it is {number:,}.") == f"{number:,}"


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=string.printable + "\u2212½°\\{}", max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    final_answer(text)
    assert same_answer(text, text)


def test_hostile_numbers_take_no_time() -> None:
    assert not same_answer("1", "9" * 100_000)
    assert not same_answer("1", "10^999^999")
    assert quantity("0^{-1}") is None


def test_math_verify_knows_algebra() -> None:
    pytest.importorskip("math_verify")
    assert verified_by_math_verify(r"2\sqrt{2}", r"\sqrt{8}")
    assert not verified_by_math_verify(r"2\sqrt{2}", r"\sqrt{9}")
    assert not same_answer(r"2\sqrt{2}", r"\sqrt{8}")
