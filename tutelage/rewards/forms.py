"""One form for what only looks different: typography, LaTeX. Case, signs, powers and order stay as they are."""

from __future__ import annotations

import re
import unicodedata

_POWERS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ"
_POWER = re.compile(f"[{_POWERS}]+")
_FRACTIONS = "".join(c for c in map(chr, range(0xBC, 0x2190)) if unicodedata.decomposition(c).startswith("<fraction>"))
_FRACTION = re.compile(f"[{_FRACTIONS}]")
_TYPOGRAPHY = str.maketrans({"−": "-", "‐": "-", "‑": "-", "⁄": "/", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"})

_SPACE = r"(?:\\[,;:! ]|~|\\thinspace(?![a-z]))"
_GROUPED = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:(?:\{{,\}}|{_SPACE})\d{{3}})+(?!\d)")
_NOT_DIGITS = re.compile(r"\D+")
_WORDS = re.compile(r"\\(?:text|textrm|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_FRAC = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_EXPONENT = re.compile(r"\^\{\s*([-+]?\w+)\s*\}")
_ROOT = re.compile(r"\\sqrt\s*(\w)(?!\w)|√\s*(\w+)|√\(([^()]*)\)|(?<![\\a-zA-Z])sqrt\(([^()]*)\)")
_LATEX = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"), (re.compile(r"\\(?:left|right)(?![a-z])"), ""),
    (re.compile(r"\^\s*\{?\\circ\}?"), "°"), (re.compile(r"\\(?:cdot|times)(?![a-z])"), "*"),
    (re.compile(r"\\pi(?![a-z])"), "π"), (re.compile(r"\\([%$])"), r"\1"), (re.compile(r"\{,\}"), ","),
    (re.compile(_SPACE), " "), (re.compile("[×·]"), "*"),
)  # fmt: skip


def folded(text: str) -> str:
    """Unicode's compatibility form, but powers and fractions stay what they are, and typographic signs become plain ones.

    Example:
        >>> folded("10³ − 1½")
        '10^3 - 1 1/2'
    """
    text = _POWER.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = _FRACTION.sub(_spelt, text)
    return unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHY)


def _spelt(found: re.Match[str]) -> str:
    before = found.string[: found.start()][-1:]
    return (" " if before.isdigit() else "") + unicodedata.normalize("NFKC", found[0])


def joined_thousands(text: str) -> str:
    r"""`12\,500` and `12{,}500` as 12500."""
    return _GROUPED.sub(lambda m: _NOT_DIGITS.sub("", m[0]), text)


def plain_maths(text: str) -> str:
    r"""A folded text without LaTeX's own ways to write numbers and spaces; `\frac` and `\sqrt` have braces.

    Example:
        >>> plain_maths(r"\dfrac12 of $1{,}000$, or 5\text{ cm}^{2}")
        '\\frac{1}{2} of $1000$, or 5 cm^2'
    """
    text = joined_thousands(folded(text))
    if any(sign in text for sign in "\\~×·√{^("):
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
        text = _WORDS.sub(r"\1", text)
        text = _FRAC.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
        text = _EXPONENT.sub(r"^\1", text)
        text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3] or m[4]}}}", text)
    return text
