"""Cleaning and filters: what they change, what they leave out, and what they must not touch."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.clean.filters import FilterOptions, LineCounter, clean, reason_against, repetition, symbol_share, without_lines
from tutelage.errors import ConfigError


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from(" \t\n\r\u00a0\u200b\x00e\u0301ﬁ"), st.characters(codec="utf-8")), max_size=60))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    """Ids come from cleaned text: if cleaning is not idempotent, the same document has two ids."""
    for form in ("NFC", "NFKC", "none"):
        once = clean(text, form)
        assert clean(once, form) == once
        assert form == "none" or unicodedata.is_normalized(form, once)  # type: ignore[arg-type]


def test_cleaning_keeps_layout_that_means_something() -> None:
    """Indentation and tabs are part of code and tables; two empty lines part sections."""
    text = "def f():\n    return 1\n\n\nx\ty"
    assert clean(text) == text
    assert clean("a  \r\nb\x07\u200b\r\n\n\n\n\n\nc\n") == "a\nb\n\n\nc"
    assert clean("e\u0301 \ufb01") == "é \ufb01" and clean("\ufb01", "NFKC") == "fi"


def test_each_filter_gives_its_reason() -> None:
    """A document that disappears without a counted reason cannot be asked about."""
    options = FilterOptions(min_chars=20, max_chars=20_000)
    good = "Text wrapping and filling is what this module does, and it does it one paragraph at a time."
    assert reason_against(good, options) is None
    assert reason_against("", options) == "empty"
    assert reason_against("short", options) == "too_short"
    assert reason_against(good * 1000, options) == "too_long"
    assert reason_against("{}[]()<>--==**" * 5, options) == "symbols"
    assert reason_against("\n".join(["Click here to go on."] * 40), options) == "repeated_lines"
    assert reason_against("buy now cheap " * 100, options) == "repeated_words"
    assert reason_against("buy now cheap " * 100, FilterOptions(repetition=False)) is None
    with pytest.raises(ConfigError, match="normalise"):
        FilterOptions(normalise="NFX")


def test_symbols_are_counted_in_any_script() -> None:
    """A filter that takes every letter outside ASCII for a symbol removes most of the world's languages."""
    assert symbol_share("Привет, как дела") < 0.1 and symbol_share("日本語のテキスト") == 0.0
    assert symbol_share("!!!!") == 1.0


def test_real_text_passes(shared_data: Path) -> None:
    """Thresholds set too tight throw away good text; drama repeats its speakers' names."""
    play = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    assert repetition(play) is None
    assert all(reason_against(play[i : i + 4000], FilterOptions()) is None for i in range(0, len(play), 4000))


def test_lines_shared_by_many_documents_are_found() -> None:
    """Page headers and footers on every page are what a model learns best, and what nobody wants."""
    counter = LineCounter()
    banner = "Subscribe to our newsletter today!"
    pages = [f"{banner}\nThis is page number {i}, with words of its own.\n}}" for i in range(40)]
    for page in pages:
        counter.add(page)
    assert counter.boilerplate() == {banner}
    assert without_lines(pages[3], counter.boilerplate()) == (pages[3].split("\n", 1)[1], 1)
    few = LineCounter()
    for page in pages[:9]:
        few.add(page)
    assert not few.boilerplate()
