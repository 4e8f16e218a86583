"""Final answers of mathematical problems: finding them in a text, and telling whether two are the same.

Numbers are compared exactly, as fractions: integers, decimals, `1,234`, `1/2`, mixed `1 1/2`, powers of ten, percentages,
LaTeX's `\\frac`, `\\boxed`, `\\text`, units and currency. Tuples and lists are compared part by part, all else as text.
What needs algebra (`\\sqrt{8}` and `2\\sqrt{2}`) is the business of the `math_verify` judge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from lockstep.core.extras import require

_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(
    r"(?:final\s+)?\banswer(?:\s+is|\s*[:=])\s*:?\s*(\$[^$\n]+\$|\\\(.+?\\\)|[^\n]+?)(?:\.(?=\s|$)|\n|$)", re.IGNORECASE
)
_MAX_DIGITS = 400
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER = re.compile(rf"([+-]?)\s*({_DECIMAL}\.?)(?:[eE]([+-]?\d{{1,3}}))?")
_RATIO = re.compile(r"([+-]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|[x\u00d7*])\s*10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?")
_ASSIGNMENT = re.compile(r"^[a-zA-Z]\s*=\s*(?=\S)")
_UNIT_PART = r"(?:\\?[%‰]|\\?°[A-Z]?|[^\W\d_]+[²³]?(?:\^?\{?[2-9]\}?)?)"
_UNIT = re.compile(rf"{_UNIT_PART}(?:[ /.\-·*]+{_UNIT_PART})*")


def final_answer(text: str) -> str | None:
    r"""The last answer that a text declares: in `\boxed{}`, else after `####`, else after "answer is"; None if none.

    >>> final_answer(r"so \boxed{\frac{1}{2}}, that is")
    '\\frac{1}{2}'
    >>> final_answer("6 * 7 = 42\n#### 42")
    '42'
    >>> final_answer("Therefore, the answer is 42. Good.")
    '42'
    """
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    for pattern in (_HASHES, _ANSWER_IS):
        if found := pattern.findall(text):
            return found[-1].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number in a text.

    >>> last_number("between 3 and 1,204.5.")
    '1,204.5'
    """
    found = re.findall(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text)
    return found[-1] if found else None


def same_answer(expected: str, got: str) -> bool:
    r"""Whether two final answers are the same.

    >>> [same_answer("0.5", other) for other in (r"$\frac12$", "50%", "1/2 cups", "5", "0.50")]
    [True, True, True, False, True]
    """
    left, right = _cleaned(expected), _cleaned(got)
    parts, others = _parts(left), _parts(right)
    if len(parts) > 1 or len(others) > 1:
        brackets = (left[:1] + left[-1:], right[:1] + right[-1:])
        return (
            len(parts) == len(others)
            and (brackets[0] == brackets[1] or not all(pair in ("()", "[]", "{}") for pair in brackets))
            and all(same_answer(part, other) for part, other in zip(parts, others, strict=True))
        )
    number, other = quantity(left), quantity(right)
    if number is not None and other is not None:
        return number.equals(other)
    return _as_text(left) == _as_text(right)


def verified_by_math_verify(expected: str, got: str) -> bool:
    """Whether the library math-verify, which knows algebra, takes two answers for the same.

    Its own deadlines use signals, and are off: the verifier pool has one.

    Raises:
        MissingExtraError: it is not installed.
    """
    library = require("math_verify", extra="math")
    gold, answer = (
        library.parse(text, parsing_timeout=None, raise_on_error=True) for text in (f"${expected}$", f"${got}$")
    )
    return bool(library.verify(gold, answer, timeout_seconds=None, raise_on_error=True))


@dataclass(frozen=True)
class Quantity:
    """A number with what stands behind it."""

    value: Fraction
    is_percent: bool
    unit: str

    def equals(self, other: Quantity) -> bool:
        """A unit that one of them leaves out is no difference; 50% is 0.5, and is 50 where the sign is left out."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.is_percent == other.is_percent:
            return self.value == other.value
        percent, plain = (self, other) if self.is_percent else (other, self)
        return plain.value in (percent.value, percent.value / 100)


def quantity(text: str) -> Quantity | None:
    r"""The number that a text is; None if it is something else.

    >>> quantity("-1,234.50 dollars").value
    Fraction(-2469, 2)
    >>> quantity("2x + 1") is None
    True
    """
    text = _ASSIGNMENT.sub("", _cleaned(text))
    text = re.sub(r"^([+-]?)\s*[$€£¥]\s*", r"\1", text)
    read = _read_number(text)
    if read is None:
        return None
    value, rest = read
    rest = rest.strip()
    if rest and not _UNIT.fullmatch(rest):
        return None
    is_percent = rest.lstrip("\\").startswith("%") or rest.lower() in ("percent", "per cent")
    unit = "" if is_percent else re.sub(r"[\s.{}\\]", "", rest).lower()
    if len(unit) == 1 and unit in "abcdefijknpqrtuvwxyz":
        return None  # 2x is algebra, 2 m a length
    return Quantity(value, is_percent, unit.removesuffix("s") if len(unit) > 2 else unit)


def _read_number(text: str) -> tuple[Fraction, str] | None:
    """(value, what follows) of a text that begins with a number."""
    if len(text) > _MAX_DIGITS:
        return None
    if match := _RATIO.match(text):
        sign, whole, top, bottom = match.groups()
        if int(bottom) == 0:
            return None
        value = int(whole or 0) + Fraction(int(top), int(bottom))
        return (-value if sign == "-" else value), text[match.end() :]
    match = _NUMBER.match(text)
    if match is None or not any(character.isdigit() for character in match[2]):
        return None
    value = Fraction(match[2].replace(",", "").rstrip(".")) * Fraction(10) ** int(match[3] or 0)
    rest = text[match.end() :]
    if power := _POWER_OF_TEN.match(rest):
        value *= Fraction(10) ** int(power[1])
        rest = rest[power.end() :]
    elif exponent := re.match(r"\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?$", rest):
        if value == 0 and int(exponent[1]) < 0:
            return None
        value, rest = value ** int(exponent[1]), ""
    return (-value if match[1] == "-" else value), rest


def _last_boxed(text: str) -> str | None:
    """What the last closed `\\boxed{...}` or `\\fbox{...}` holds."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[match.end() : place].strip()
    return None


def _cleaned(text: str) -> str:
    """Without what only sets the type: dollars of LaTeX, spaces, `\\left`, `\\text`; `\\frac{a}{b}` as `a/b`."""
    text = text.strip().replace("\u2212", "-").replace("\u2013", "-")  # minus sign, en dash
    text = re.sub(r"^\*+|\*+$", "", text).strip()
    text = re.sub(r"^(?:\\\(|\\\[|\$\$?)\s*(.*?)\s*(?:\\\)|\\\]|\$\$?)\.?$", r"\1", text, flags=re.DOTALL)
    if (boxed := _last_boxed(text)) is not None and text.startswith(("\\boxed", "\\fbox")):
        text = boxed
    text = re.sub(r"\\left\s*|\\right\s*|\\[!,;:]|\\displaystyle", "", text)
    text = text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ",").replace("~", " ").replace("\\ ", " ")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
    text = _WRAPPER.sub(r" \1", text)
    for _ in range(4):
        text, count = _FRAC.subn(lambda m: f" {(m[1] or m[2]).strip()}/{(m[3] or m[4]).strip()} ", text)
        if not count:
            break
    text = re.sub(r"([+-]) +(?=\d+/)", r"\1", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def _parts(text: str) -> list[str]:
    """What commas at the top level separate; one part where they only group digits."""
    inner = text[1:-1] if text[:1] + text[-1:] in ("()", "[]", "{}", "(]", "[)") else text
    if re.fullmatch(r"[+-]?\$?\d{1,3}(,\d{3})+(\.\d+)?\D*", inner) and inner == text:
        return [text]
    parts, depth, start = [], 0, 0
    for place, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            parts.append(inner[start:place].strip())
            start = place + 1
    return [*parts, inner[start:].strip()] if parts else [text]


def _as_text(text: str) -> str:
    return re.sub(r"[\s{}]", "", text).lower()
