"""Whether a text states the expected answer. Nothing is right for looking alike: case, signs, powers, order and units count.

The text is the answer, or it says which part of it is (`####`, a box, "the answer is"), or it repeats the question around it.
Numbers are equal by value, lists item by item, formulas by their spelling.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from tutelage.rewards.forms import folded, plain_maths
from tutelage.rewards.numbers import NUMBER, NUMBER_WORDS, Number, final_number, final_part, number_at, spelt_number
from tutelage.rewards.units import UNITS

Near = Callable[[Fraction, Fraction], bool]

MAX_CHARS = 20_000  # of a text, from its end

_WRAPPERS = (("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_WHOLE_BOX = re.compile(r"\\f?boxed\s*\{")
_LEAD = re.compile(
    r"(?:\b(?:the|my|so|our)\s+)?(?:\b(?:final|correct|right)\s+)*\b(?:answer|solution|result|option|choice)\s*(?:is\b\s*:?|:|=)\s*",
    re.IGNORECASE,
)
_OPENING = re.compile(r"(?:(?:so|thus|hence|therefore|well|okay|ok|sure)\b,?\s+)+", re.IGNORECASE)
_INSTEAD = re.compile(
    r"(?:it(?:'s| is)|that(?:'s| is)|the answer is)? ?not ([^,;.]+?)(?:,? but|[,;.] ?(?:it(?:'s| is)|that(?:'s| is))) ",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|none|nobody|nothing|cannot|without|except|but|anything|unlike|than|wrong|incorrect|false|doubt|"
    r"unlikely|longer|if|or|maybe|perhaps|possibly|instead|rather|wait|actually|sorry)\b|n't\b|[?≠]",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")
_WORDS_THAT_SAY_NOTHING = (
    "a an the it its it's is are was were be that that's this these those there they he she we you i his her their in "
    "at on by of to for as and equals makes make made gives give has have had costs cost makes total answer result "
    "solution date number symbol word name value called list i choose chose pick select say think correct right best "
    "option choice weighs weigh measures contains takes take took lasts lasted happened each both all together then "
    "so thus therefore hence , : = . ; $ * `"
)
_FILLING = frozenset(_WORDS_THAT_SAY_NOTHING.split())
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
_OPERATIONS = {"plus", "minus", "times", "multiplied", "divided", "+", "-", "/"}
_OPTION = re.compile(r"(?:option |choice |answer )?[(\[]?([A-Za-z])(?:[)\].:]+|(?=$))(?:\s+(.+))?", re.IGNORECASE | re.DOTALL)
_LISTED = re.compile(r"(?:^|[\s(\[])([A-Za-z])[).\]:]\s+(.+?)(?=\s*[(\[]?[A-Za-z][).\]:]\s|[\n;,]|$)")
_YES_NO = re.compile(r"(yes|no)\b[.!]?(?:,\s*(.*))?", re.IGNORECASE | re.DOTALL)
_SEPARATORS = re.compile(r"\s*(?:,\s*and\s|,|\sand\s|\s)\s*")
_AROUND_OPERATORS = re.compile(r"(?<=[\w)}\]])\s*([-+*/=^<>,;])\s*(?=[-+\w({\[\\])")
_INSIDE_BRACKETS = re.compile(r"(?<=[(\[{])\s+|\s+(?=[)\]}])|(?<=,)\s+")
_ASSIGNED = re.compile(r"(?:[^\W\d_]\w*|[\d\s.,+*/()^-]+)\s*=\s*(.+)", re.DOTALL)
_ABOUT_PERCENT = re.compile(r"percent|per cent|%", re.IGNORECASE)
_BULLET = re.compile(r"\s*(?:[-*•]|\d{1,3}[.)])\s+(.+?)\s*")
_CONCLUDES = re.compile(r"\b(?:is|are|was|were|equals|makes|gives)\s+$|=\s*$", re.IGNORECASE)


def right(expected: str | Sequence[str], given: str, question: str | None = None) -> bool:
    """Whether a text states one of the expected answers, as its only or its final answer.

    Example:
        >>> right("Co", "The symbol is **Co**."), right("Co", "CO"), right(["grey", "gray"], "gray"), right("B", "not B")
        (True, False, True, False)
    """
    each = [expected] if isinstance(expected, str) else expected
    return any(_right(one, given[-MAX_CHARS:], question) for one in each)


def same_text(expected: str, given: str) -> bool:
    """Equal but for typography, space, one final full stop, and quotes or marks of Markdown and LaTeX around the whole."""
    if not expected.strip() or not given.strip():
        return expected.strip() == given.strip()
    return bare(expected) == bare(given)


def bare(text: str) -> str:
    """A text without what may stand around an answer. Example: `bare(' **"Foo"**. ')` is `Foo`."""
    text = " ".join(folded(text).split())
    while True:
        before, text = text, unwrapped(text)
        if len(text) > 1 and text[-1] == "." and text[-2] != "." and not text[-2].isspace():
            text = text[:-1]
        if text == before:
            return text


def unwrapped(text: str) -> str:
    """A text without quotes or marks of Markdown and LaTeX that stand around the whole of it."""
    for start, end in _WRAPPERS:
        inside = text[len(start) : -len(end)]
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end) and start not in inside:
            text = inside.strip()
    return text


def stated(text: str) -> str:
    """The part of a text that is said to be the answer, or the whole text."""
    fenced = _FENCE.fullmatch(text.strip())
    text = unwrapped(fenced[1] if fenced else text.strip())
    bullets = [_BULLET.fullmatch(line) for line in text.split("\n") if line.strip()]
    if len(bullets) > 1 and all(bullets):
        return ", ".join(m[1] for m in bullets if m)
    if "####" in text or _WHOLE_BOX.search(text):
        return final_part(text)
    opening = _OPENING.match(text)
    text = text[opening.end() :] if opening else text
    leads = list(_LEAD.finditer(text))
    if leads and not _NEGATION.search(text[: leads[-1].start()].rsplit("\n", 1)[-1].rsplit(". ", 1)[-1]):
        said, _, more = re.sub(r"(?<=[^.])([.!])(?=\s)", "\\1\0", text[leads[-1].end() :].strip()).partition("\0")
        first, _, rest = said.partition("\n")
        return first if not _NEGATION.search(rest + more) else text
    instead = _INSTEAD.match(text)
    return text[instead.end() :] if instead else text


def _right(expected: str, given: str, question: str | None) -> bool:
    if not expected.strip() or not given.strip():
        return expected.strip() == given.strip()
    if same_text(expected, given):
        return True
    wanted, said = bare(stated(expected)), bare(stated(given))
    if not wanted or not said:
        return False
    exactly = _exactly(wanted, said, question)
    if exactly or (exactly is None and _restated(wanted, said, question)):
        return True
    if said != bare(given) and measure(wanted) is not None:  # "the answer is twice 6, which is 12"
        number, found = final_number(wanted), final_number(given)
        return number is not None and found is not None and measure(said) is None and same_number(number, found, question)
    return False


def _exactly(wanted: str, said: str, question: str | None) -> bool | None:
    """Whether a text that is nothing but an answer is the expected one; None where it is only another text."""
    if wanted == said:
        return True
    if (yes := _YES_NO.fullmatch(wanted)) and not yes[2]:
        return _same_verdict(yes[1], said)
    if len(letter := wanted.strip("()[]")) == 1 and letter.isalpha() and (option := _OPTION.fullmatch(said)):
        return _same_option(letter, option, question)
    if (number := _measure_of(wanted, question)) is not None:
        found = measure(said)
        return None if found is None else _same_measure(number, found, question)
    if (items := _items(wanted)) is not None:
        return True if items == _items(said) else None
    return True if _formula(wanted) == _formula(said) else None


def _measure_of(wanted: str, question: str | None) -> tuple[Number, str] | None:
    """The expected answer as a measure; 3.10 as a version is none, for it is not 3.1."""
    return None if question and re.search(r"\bversion\b", question, re.IGNORECASE) else measure(wanted)


def _same_verdict(yes: str, said: str) -> bool:
    found = _YES_NO.fullmatch(said)
    if found is None or found[1].lower() != yes.lower():
        return False
    reason = found[2] or ""
    return not re.search(r"\b(?:yes|wrong|wait)\b" + ("|\\bnot?\\b|n't" if yes.lower() == "yes" else ""), reason, re.IGNORECASE)


def _same_option(letter: str, option: re.Match[str], question: str | None) -> bool:
    marked = not option[0].isalpha()  # (b) and b) name an option, whatever their case; b alone is a letter
    same = option[1] == letter or (marked and option[1].upper() == letter.upper())
    if not same or not option[2]:
        return same
    choices = {m[1].upper(): bare(m[2]) for m in _LISTED.finditer(question or "")}
    if choices:
        return choices.get(letter.upper()) == bare(option[2])
    return not _NEGATION.search(option[2]) and not _OPTION.search(option[2])


def same_number(expected: Number, given: Number, question: str | None = None, near: Near = operator.eq) -> bool:
    """Equal by value, or `near` it. A percent sign is worth 1/100; where percents are asked for it may be left out, or added."""
    if expected.percent == given.percent:
        return near(expected.value, given.value)
    share = Fraction(1, 100)
    worth = [number.value * (share if number.percent else 1) for number in (expected, given)]
    if near(worth[0], worth[1]):
        return True
    plain = given if expected.percent else expected
    asked = expected.percent or question is None or _ABOUT_PERCENT.search(question) is not None
    surely = question is not None and not expected.percent
    return asked and (surely or abs(plain.value) > 1) and near(expected.value, given.value)


def measure(text: str) -> tuple[Number, str] | None:
    """A text that is one number and perhaps its unit; None for any other text."""
    whole = text = plain_maths(text).strip()
    if "=" in text:
        assigned = _ASSIGNED.fullmatch(text)
        if assigned is None:
            return None
        text = assigned[1].rsplit("=", 1)[-1].strip()
    sign = r"(?:[-+]\s?)?"
    before = re.match(rf"{sign}(US\$|USD|[$€£]|EUR|GBP)\s?", whole)
    text = text.replace("USD ", "").replace("EUR ", "").replace("GBP ", "") if before else text
    for length in (3, 2, 1):  # minus twenty-one legs
        head, tail = text.split()[:length], text.split()[length:]
        if (spelt := spelt_number(" ".join(head))) is not None:
            text = " ".join([str(spelt), *tail])
            break
    found = NUMBER.match(text)
    if found is None or (number := number_at(text, found)) is None:
        return None
    if found["sign"] and re.match(r"[-+]\s\d", text):
        return None  # the rest of a sum
    rest = text[found.end() :].strip()
    if number.percent:
        rest = re.sub(r"^(?:%|per\s?cent)", "", rest).strip()
        return None if rest and not re.fullmatch(r"(?:of|per) [a-z ]{1,30}", rest) else (number, "%")
    rest = re.sub(r"^(?:hundred|thousand|[mbt]r?illion)\b", "", rest, flags=re.IGNORECASE).strip()
    unit = _unit(rest)
    if unit is None:
        return None
    return number, before[1] if before and not unit else unit


def _unit(text: str) -> str | None:
    """The unit that a text is, "" for none; None where it is more than that."""
    text = re.sub(r"^(?:°\s?|degrees? )(?=[CFcf])", "°", text.strip()).rstrip(".")
    text = re.sub(r"°(?:celsius|Celsius)", "°C", re.sub(r"°(?:fahrenheit|Fahrenheit)", "°F", text))
    text = re.sub(r"^(?:square|sq\.?) (\w+)$", r"\1^2", re.sub(r"^(?:cubic|cu\.?) (\w+)$", r"\1^3", text))
    if not text or re.split(r"[\^/ ]", text)[0] in UNITS or text in {"%", "‰"}:
        return text if not _NEGATION.search(text) and not re.search(r"\d[\d\s]|\s\d", text) else None
    plain = re.fullmatch(r"[a-z]+(?:[ -][a-z]+){0,3}", text)
    return (
        text
        if plain and not _NEGATION.search(text) and not re.search(r"\b(?:and|to|more|less|fewer|out|per|a)\b", text)
        else None
    )


def _same_measure(expected: tuple[Number, str], given: tuple[Number, str], question: str | None) -> bool:
    (a, unit), (b, other) = expected, given
    if "%" in (unit, other):
        return {unit, other} <= {"%", ""} and same_number(a, b, question)
    if unit and other:
        size, size_other = _size(unit), _size(other)
        if size and size_other:
            return size[0] == size_other[0] and a.value * size[1] == b.value * size_other[1]
        return a.value == b.value and unit.rstrip("s") == other.rstrip("s")
    if a.value != b.value:
        return False
    if other and question and (known := _size(other)):  # dollars were asked for, cents were given
        asked = {UNITS[w] for w in re.findall(r"[^\W\d_]+", question) if w in UNITS and len(w) > 2}
        return all(one[0] != known[0] or one[1] == known[1] for one in asked)
    money = not unit or unit in {"$", "€", "£"} or UNITS.get(unit, ("",))[0] in {"dollars", "euros", "pounds sterling"}
    named = question is not None and unit != "" and unit.split(" ")[0] in re.findall(r"[^\W\d_]+", question)
    return money or named or bool(other)


def _size(unit: str) -> tuple[str, Fraction] | None:
    """What a unit measures, and how much of it: of plain units, their powers, and their rates."""
    top, _, bottom = unit.replace(" per ", "/").partition("/")
    base, _, power = top.strip().partition("^")
    if base not in UNITS or (power and power not in {"2", "3"}) or (bottom and bottom.strip() not in UNITS):
        return None
    measured, size = UNITS[base]
    n = int(power or 1)
    name, value = measured + (f"^{n}" if n > 1 else ""), size**n
    return (f"{name}/{UNITS[bottom.strip()][0]}", value / UNITS[bottom.strip()][1]) if bottom else (name, value)


def _items(text: str) -> list[str] | Counter[str] | None:
    """The items of a list in their order, or of a set in braces in none; None for a text that is neither."""
    text = plain_maths(text).replace(r"\{", "{").replace(r"\}", "}")
    if text.startswith("{") and text.endswith("}") and not set("{}[]()") & set(text[1:-1]):
        return Counter(item.strip() for item in text[1:-1].split(","))
    if set("()[]{}=\\^") & set(text):
        return None
    items = [unwrapped(item) for item in _SEPARATORS.split(text) if item]
    return items if len(items) > 1 else None


def _formula(text: str) -> str:
    text = plain_maths(text).replace(r"\{", "{").replace(r"\}", "}")
    text = re.sub(r"(?<=\d) (?=π|\\sqrt)", "", text)
    return _AROUND_OPERATORS.sub(r"\1", _INSIDE_BRACKETS.sub("", text))


def _restated(wanted: str, said: str, question: str | None) -> bool:
    """Whether a sentence has the answer once, and around it nothing but words of the question and words that say nothing."""
    if _NEGATION.search(said.replace(wanted, "", 1)) or not re.search(r"\w", wanted):
        return False
    number = _measure_of(wanted, question)
    items = _items(wanted)
    if number is None and not isinstance(items, list):
        wanted, said = _formula(wanted), _formula(said)
    if number and not re.search(r"\d", said):
        said = _NUMBER_WORD.sub(lambda m: str(spelt_number(m[0])), said)
    spelt = r"(?:,\s*(?:and\s)?|\s(?:and\s)?)".join(map(re.escape, items)) if isinstance(items, list) else re.escape(wanted)
    places = NUMBER.finditer(said) if number else re.finditer(rf"(?<!\w){spelt}(?!\w)", said)
    found = [m.span() for m in places]
    known = _FILLING | {_stem(w) for w in _WORD.findall(question or "")}
    if number and len(found) > 1 and _CONCLUDES.search(said[: found[-1][0]]) and "," not in said:
        asked = {m[0].strip() for m in NUMBER.finditer(plain_maths(question or ""))}
        if all(said[start:end].strip() in asked for start, end in found[:-1]):
            found, known = found[-1:], known | _OPERATIONS  # 15 times 4 is 60
    if len(found) != 1:
        return False
    start, end = found[0]
    if number and (end := _end_of_measure(number, said, start, question)) < 0:
        return False
    if end < len(said) and not said[:start].strip() and said[end] == ",":
        return _place_of(said[end:], question)
    around = _WORD.findall(said[:start]) + _WORD.findall(said[end:])
    return all((w.lower() in known or _stem(w) in known) and not _like_an_answer(w, wanted) for w in around)


def _like_an_answer(word: str, wanted: str) -> bool:
    """A word beside the answer that could be another: a letter beside letters, an item beside a list's."""
    if (len(wanted) == 1 and wanted.isalpha()) or _items(wanted) is not None:
        return (word.isalnum() and len(word) == 1 and word not in {"a", "I"}) or word in wanted.replace(",", " ").split()
    return False


def _end_of_measure(number: tuple[Number, str], text: str, start: int, question: str | None) -> int:
    """Where the number that begins at `start` ends, with its unit; -1 where it is not the expected one."""
    found = NUMBER.match(text, start)
    value = number_at(text, found) if found else None
    if found is None or value is None:
        return -1
    sign = re.compile(r"\s?(?:%|per\s?cent\b)").match(text, found.end()) if value.percent else None
    unit = re.compile(r"\s?([^\W\d_]+(?:[\^/]\w+)?|°\s?[CF]?|‰)").match(text, found.end())
    symbol = re.match(r"[-+]?\s?([$€£])", found[0])
    if sign:
        name, end = "%", sign.end()
    elif unit and _size(unit[1]):
        name, end = unit[1], unit.end()
    else:
        name, end = symbol[1] if symbol else "", found.end()
    return end if _same_measure(number, (value, name), question) else -1


def _place_of(rest: str, question: str | None) -> bool:
    """`Paris, France` where France was asked about."""
    place = re.fullmatch(r",\s*([^,]+)", rest)
    return bool(place and len(place[1]) > 2 and question and re.search(rf"(?<!\w){re.escape(place[1])}(?!\w)", question))


def _stem(word: str) -> str:
    word = word.lower()
    return re.sub(r"(?:ed|es|s|e)$", "", word) if len(word) > 3 else word
