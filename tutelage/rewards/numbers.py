"""The final number of a text, read in time that grows with its length alone. What cannot be read is no number, never another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from tutelage.rewards.forms import plain_maths
from tutelage.rewards.units import MULTIPLIERS, UNITS

MAX_DIGITS = 60  # of one number; longer ones are no answers
MAX_EXPONENT = 60

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d{1,3}(?: \d{3})+(?!\d|/|,\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"(?P<sign>[-+]\s?|(?:minus|negative)\s)?(?:(?:US\$|[$€£])\s?)?"
    rf"(?:(?P<mixed>\d+)?\s?\\frac\{{(?P<top>\s?-?\d+)\s?\}}\{{\s?(?P<bottom>\d+)\s?\}}"
    rf"|(?P<whole>\d+)[ -](?P<over>\d+)/(?P<under>\d+)(?![\d/])"
    rf"|(?P<plain>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d+)|\s?[*x]\s?10\^(?P<scale>[-+]?\d+)|\^(?P<power>-?\d+)"
    rf"|\s?/\s?(?P<divisor>\d+(?:\.\d+)?)(?![\d/]))?)"
)
_SAID = re.compile(r"\banswer\s*(?:is\b|:|=)[\s:]*", re.IGNORECASE)
_CLAUSE = re.compile(r",\s|[.;!?](?:\s|$)|\n")
_SENTENCE = re.compile(r"[.;!?](?:\s|$)|\n")
_TAKEN_BACK = re.compile(r"\b(?:no|wait|actually|sorry|correction|mistake|wrong|rather)\b", re.IGNORECASE)
_BEGINS = re.compile(r"(?:\W|approximately|about|exactly|only|just|simply|[a-z]\s*=)*", re.IGNORECASE)
_REJECTED = re.compile(
    r"(?:\bnot|n't|\bnever|≠|!=|\bneither|\bnor)\s*(?:be |equal to |the |just |only )*[*$(\\]*$", re.IGNORECASE
)
_BOUND = re.compile(
    r"(?:\bthan|\bat (?:least|most)|\bbefore|\bbetween|\bfrom|\bup to|\bunder|\bover|\bbelow|\babove|[<>≤≥±])\s*[*$(\\]*$",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"(?P<operand>[\w)\]}%°π])(?P<space>\s*)[-+*/÷^±](?P<after>\s*)$")
_INSIDE = re.compile(r"(?:\\[a-zA-Z]+|[A-Za-z√][{(]|\}\{|[√π]|\}\s?)$")
_UNIT_POWER = re.compile(r"([A-Za-z°]+)\^$")
_BETWEEN = re.compile(
    r"[^\S\n]*(?:%|[a-z.°]+)?\s*"
    r"(?:[-–—~,/:]|\.\.+|to|or|and|and/or|vs\.?|out of|of|in|times|plus|minus|divided by|over|[-+*/÷^<>])?"
    r"\s*(?:[a-zA-Z]\s*=)?\s*[$*(\\]*", re.IGNORECASE,
)  # fmt: skip
_JOINS = re.compile(
    r"(?:^|\W)(?:\.\.|to|or|and|vs|out of|of|times|plus|minus|divided by|over)(?:\W|$)|(?:^\s*|\W)[-–—~,/:<>+*÷^]",
    re.IGNORECASE,
)
_NEXT_WORD = re.compile(r"[\s-]?([^\W\d_]+)")
_MADE_LESS = {
    "squared", "cubed", "dozen", "half", "halves", "third", "thirds", "quarter", "quarters", "fifths", "tenth", "tenths",
    "hundredths", "thousandths", "times", "plus", "minus", "over", "divided", "multiplied",
}  # fmt: skip
_CALCULATOR = re.compile(r"<<[^<>\n]{0,100}>>")  # GSM8K's own notes, such as <<9*2=18>>
_PERCENT = re.compile(r"\s?(?:%|per\s?cent\b)", re.IGNORECASE)


_BELOW_20 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: n for n, word in enumerate(_BELOW_20.split())} | {word: 10 * n for n, word in enumerate(_TENS.split(), 2)}


@dataclass(slots=True, frozen=True)
class Number:
    """A number as it is written. Example: `50%` is Number(Fraction(50), percent=True)."""

    value: Fraction
    percent: bool = False


def final_part(text: str) -> str:
    """The final answer: what follows the last `####` on its line, or the last box, or else the whole text."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n", 1)[0]
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    return _braced(text, text.index("{", start)) if start >= 0 else text


def last_number(text: str) -> Fraction | None:
    """The value of `final_number`. Units and percent signs do not count.

    Example:
        >>> last_number("First 3, so the answer is $1,234.50 in all, after 2 days")
        Fraction(2469, 2)
    """
    found = final_number(text)
    return found.value if found else None


def final_number(text: str) -> Number | None:
    r"""The number that a text ends with, exactly: 1,234.50; 3/4; 1 1/2; \frac{3}{4}; 1e3; 2^{10}. None where it ends with an
    expression, a range or an alternative, or where the number is part of a formula that is not read here."""
    part = final_part(text)
    if part is not text:
        return _last(_after_equals(plain_maths(part)))
    text = plain_maths(_CALCULATOR.sub("", text))
    if not (said := list(_SAID.finditer(text))):
        return _last(text)
    start = said[-1].end()
    stop = _SENTENCE.search(text, start)
    if stop and _TAKEN_BACK.search(text, stop.start()):
        return _last(text)
    sentence = text[start : stop.start() if stop else len(text)]
    clause = _CLAUSE.split(sentence, maxsplit=1)[0]
    if "=" in clause:
        return _last(_after_equals(clause))
    first = NUMBER.search(sentence)
    if first and (begin := _BEGINS.match(sentence)) and first.start() <= begin.end():
        return _last(clause) if NUMBER.search(clause, first.end()) is None else _first(sentence, first)
    return _last(sentence)


def spelt_number(text: str) -> int | None:
    """A text that is a whole number below 100 in English words. Example: `spelt_number("Minus twenty-one.")` is -21."""
    if len(text) > 60:
        return None
    words = text.strip(" \n.*`\"'").lower().replace("-", " ").split()
    sign = -1 if words[:1] in (["minus"], ["negative"]) else 1
    values = [NUMBER_WORDS.get(word, -1) for word in (words[1:] if sign < 0 else words)]
    if len(values) == 2 and values[0] >= 20 and 0 < values[1] < 10:
        return sign * sum(values)
    return sign * values[0] if len(values) == 1 and values[0] >= 0 else None


def _after_equals(text: str) -> str:
    return text.rsplit("=", 1)[1] if re.search(r"[^=!<>]=[^=]", text) else text


def _first(text: str, found: re.Match[str]) -> Number | None:
    """The number at the start of a sentence that goes on with others, unless these belong to it."""
    following = NUMBER.search(text, found.end())
    if following and (
        _joined(text, found, following) or _OPERATOR.search(text[: following.start() + len(following["sign"] or "")])
    ):
        return None
    return number_at(text, found)


def _last(text: str) -> Number | None:
    tokens = list(NUMBER.finditer(text))
    while tokens:
        found = tokens.pop()
        if _part_of_a_name(text, found) or _rejected(text, found):
            continue
        if tokens and _joined(text, tokens[-1], found):
            return None
        return number_at(text, found)
    return None


def _digits_at(found: re.Match[str]) -> int:
    return found.end("sign") if found["sign"] else found.start()


def _part_of_a_name(text: str, found: re.Match[str]) -> bool:
    """`H2O`, `x2`, `GPT-4`; and the power of a unit: `5 cm^2`."""
    start = found.start()
    before = text[max(0, start - 24) : start]
    if unit := _UNIT_POWER.search(before):
        return unit[1] in UNITS
    glued = before[-1:].isalpha() or before[-1:] == "_"
    latex = re.search(r"\\[a-zA-Z]+$", before)
    single = re.search(r"(?:^|[\W_])[A-Za-z]$", before) and found["sign"]  # x-1 is no name
    return bool(glued and not latex and not single)


def _rejected(text: str, found: re.Match[str]) -> bool:
    return bool(_REJECTED.search(text[max(0, found.start() - 40) : found.start()]))


def _joined(text: str, before: re.Match[str], found: re.Match[str]) -> bool:
    """Whether two numbers are a range, a row, an alternative or an expression: 8 or 10, 7 to 8, (1, 2), 10,5, 3 4."""
    between = text[before.end() : found.start()]
    if len(between) > 24 or not _BETWEEN.fullmatch(between):
        return False
    if not between.strip(" $*(\\"):
        return "\n" not in between
    return bool(_JOINS.search(between)) and not re.fullmatch(r":\s+.*|\s*=\s*.*", between)


def number_at(text: str, found: re.Match[str]) -> Number | None:
    """The number that `NUMBER` found, with what stands around it; None where it is part of more."""
    start, end = found.start(), found.end()
    before, after = text[max(0, start - 40) : start], text[end : end + 40]
    signed = text[max(0, start - 40) : _digits_at(found)]
    if (operator := _OPERATOR.search(signed)) and _is_operation(signed, operator):
        return None
    if _BOUND.search(before) or _INSIDE.search(before) or before[-1:] in {"^", "_"} or re.search(r"\d[.:,]$", before):
        return None
    if re.match(
        r"[.,:]\d|[\^_(]|\s?[√π]|\s?\\(?:sqrt|frac|pi)|/\w|\s?[*÷]\s?[\w(\\]|\s[-+]\s[\w(\\]", after
    ) and not _PERCENT.match(after):
        return None
    value = _value(found)
    if value is None:
        return None
    if _PERCENT.match(after):
        return Number(value, percent=True)
    word = _NEXT_WORD.match(after)
    if word is None:
        return Number(value)
    if word[1].lower() in MULTIPLIERS:
        return Number(value * MULTIPLIERS[word[1].lower()])
    glued = after[:1].isalpha()
    decade = glued and word[1] == "s" and (re.fullmatch(r"[12]\d{3}", found[0]) or re.search(r"\bthe\s?$", before, re.IGNORECASE))
    if word[1].lower() in _MADE_LESS or decade or (glued and word[1] not in UNITS and len(word[1]) < 3):
        return None
    return Number(value)


def _is_operation(signed: str, operator: re.Match[str]) -> bool:
    """`5-3`, `x - 1`, `)*2`: no sign. `is -3` and `total: -3` have one, and so has `cost -$5`."""
    word = re.search(r"[^\W\d_]+$", signed[: operator.end("operand")])
    if word is None or len(word[0]) == 1 or not operator["space"]:
        return True
    return bool(operator["after"])  # `eggs - 18`: a dash or a minus


def _value(found: re.Match[str]) -> Fraction | None:
    part = {name: re.sub(r"[, ]", "", text) for name, text in found.groupdict().items() if text is not None and name != "sign"}
    powers = [abs(int(part[name])) for name in ("exponent", "scale", "power") if name in part and len(part[name]) < 9]
    if any(len(text) > MAX_DIGITS for text in part.values()) or any(p > MAX_EXPONENT for p in powers):
        return None
    if len(powers) != sum(name in part for name in ("exponent", "scale", "power")):
        return None
    divided = False
    try:
        if "top" in part:
            value = int(part.get("mixed", 0)) + Fraction(int(part["top"]), int(part["bottom"]))
            divided = "mixed" not in part and int(part["bottom"]) > 1
        elif "whole" in part:
            value = int(part["whole"]) + Fraction(int(part["over"]), int(part["under"]))
        else:
            ten = Fraction(10) ** (int(part.get("exponent", 0)) + int(part.get("scale", 0)))
            value = Fraction(part["plain"]) ** int(part.get("power", 1)) * ten / Fraction(part.get("divisor", "1"))
            divided = "divisor" in part
    except ZeroDivisionError:
        return None
    if divided and (value.denominator == 1 or " / " in found[0]):
        return None  # 36/2 is a sum yet to be done, not 18
    return -value if found["sign"] and not found["sign"].startswith("+") else value


def _braced(text: str, start: int) -> str:
    """What is inside the brace at `start`; to the end where it is never closed."""
    level = 0
    for i in range(start, len(text)):
        level += (text[i] == "{") - (text[i] == "}")
        if level == 0:
            return text[start + 1 : i]
    return text[start + 1 :]
