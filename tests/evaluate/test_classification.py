"""What a classifier got right: counts by hand, and scikit-learn's numbers where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.data.groups.examples import Labels
from tutelage.evaluate import classification
from tutelage.evaluate.classified import ClassifiedTexts, add_baseline, joined
from tutelage.evaluate.confusion import picture
from tutelage.evaluate.texts import edits, similarity
from tutelage.records import Example, Span

TRUTH = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 0])
ODDS = (
    np.array([[8, 1, 1], [4, 5, 1], [6, 3, 1], [1, 7, 2], [5, 4, 1], [1, 1, 8], [2, 2, 6], [1, 6, 3], [1, 2, 7], [9, 1, 0]]) / 10
)
NAMES = ("a", "b", "c")


def test_measures_by_hand() -> None:
    """Rows and columns of a confusion matrix that are mixed up: precision for recall."""
    facts = classification.measures(TRUTH, ODDS, NAMES)
    assert facts["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 1, 3]] and facts["accuracy"]["value"] == 0.7
    a, b, c = facts["classes"]
    assert (a["precision"], a["recall"]) == (0.75, 0.75) and (b["precision"], b["recall"]) == (0.3333, 0.5)
    assert (c["precision"], c["recall"], c["texts"]) == (1.0, 0.75, 4)
    assert facts["macro_f1"]["value"] == pytest.approx((0.75 + 0.4 + 6 / 7) / 3)
    assert facts["macro_f1"]["low"] < facts["macro_f1"]["value"] < facts["macro_f1"]["high"] and facts["majority"] == 0.4


def test_calibration_by_hand() -> None:
    """Confidence in bins of its own: four texts at 0.9 of which three are right, two at 0.6 of which both are."""
    found = classification.calibration(np.array([0.9] * 4 + [0.6] * 2), np.array([1, 1, 1, 0, 1, 1]))
    assert found == pytest.approx((4 * 0.15 + 2 * 0.4) / 6, abs=1e-4)


def test_several_classes_count_apart() -> None:
    """A text with one class of two right that counts as right."""
    truth = np.array([[1, 1], [1, 0], [0, 0]])
    facts = classification.many_measures(truth, np.array([[0.9, 0.2], [0.8, 0.1], [0.3, 0.4]]), ("x", "y"))
    assert facts["accuracy"]["value"] == pytest.approx(2 / 3)
    assert [row["f1"] for row in facts["classes"]] == [1.0, 0.0] and facts["macro_f1"]["value"] == 0.5


def test_spans_count_whole_and_by_character() -> None:
    """Spans that count as right with one end right; texts without spans that count as wrong."""
    a, half, other = Span(start=0, end=4, label="P"), Span(start=0, end=2, label="P"), Span(start=6, end=8, label="Q")
    facts = classification.tag_measures([(a, other), (), (a,)], [(half, other), (), (a,)])
    assert facts["span_f1"]["value"] == pytest.approx(2 / 3)
    assert facts["character_f1"]["value"] == pytest.approx((2 * 4 / (4 + 6) + 1 + 1) / 3)


def test_the_same_numbers_as_scikit_learn() -> None:
    """An F1 of our own making."""
    metrics = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn, to compare with its measures")
    rng = np.random.default_rng(0)
    truth, odds = rng.integers(0, 4, 200), rng.dirichlet([1] * 4, 200)
    facts = classification.measures(truth, odds, "abcd")
    assert facts["macro_f1"]["value"] == pytest.approx(metrics.f1_score(truth, odds.argmax(1), average="macro"))
    assert facts["confusion"] == metrics.confusion_matrix(truth, odds.argmax(1)).tolist()
    from tutelage.evaluate.word_counts import WordCounts

    texts = [f"{'sun sea' if i % 2 else 'ice snow'} {i % 7}" for i in range(40)]
    counts = WordCounts(texts, np.arange(40) % 2, 3)
    odds = counts.probabilities(["ice snow 3", "sea sun"])
    assert odds.shape == (2, 3) and odds.argmax(1).tolist() == [0, 1] and counts.chosen


def test_a_baseline_of_texts_without_words_is_said_and_not_computed() -> None:
    """A traceback of scikit-learn (`empty vocabulary`) after hours of training; folds put together as if all had a baseline."""
    pytest.importorskip("sklearn", reason="pip install scikit-learn, for the baseline")
    labels = Labels("class", ("happy", "sad"))
    faces = [
        Example.make(face * (i + 1), source="t", label=name) for i in range(6) for name, face in (("happy", ":)"), ("sad", ":("))
    ]
    odds = [np.array([0.9, 0.1])] * len(faces)
    silent, said = ClassifiedTexts(faces, odds, []), ClassifiedTexts(faces, odds, [])
    add_baseline(silent, faces, labels, wanted=True)
    assert silent.baseline is None and "no training text contains a word" in silent.why_not
    worded = [*faces, *(Example.make(f"{name} day {name}", source="t", label=name) for name in labels.names)]
    add_baseline(said, worded, labels, wanted=True)  # words in two of the texts: no choice of settings by cross-validation
    assert said.baseline is not None and not said.why_not
    both = joined([said, silent])
    assert both.baseline is None and both.why_not == silent.why_not


def test_dollars_in_the_names_of_classes_are_dollars() -> None:
    """A traceback of matplotlib, which reads what stands between two dollars as a formula."""
    pytest.importorskip("matplotlib")
    names = ["price: $5 to $10 $x_$", "$\\frac{$"]
    svg = picture([[1, 0], [0, 1]], names)
    assert svg.count(names[0]) == 2 and svg.count(names[1]) == 2


def test_pictures_and_edits() -> None:
    """A matrix without its numbers; a distance that misses insertions."""
    pytest.importorskip("matplotlib")
    drawn = picture([[3, 1], [0, 2]], ("one <b>", "two"))
    assert drawn.count(">3<") == 1 and "<b>" not in drawn
    for a, b, expected in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("abcd", "d", 3), ("a", "xaxx", 3)):
        assert edits(a, b) == edits(b, a) == expected
    assert similarity("", "") == 1.0 and similarity("abcd", "abce") == 0.75


def test_the_matrix_is_read_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns squeezed to one letter each, or a matrix that is left out without a word."""
    from tutelage.evaluate.classification import show_confusion

    names = [f"a class of letters {chr(97 + i)}" for i in range(12)]
    counts = [[20 + i if i == j else (j == 3) * 7 for j in range(12)] for i in range(12)]
    show_confusion(names, counts)
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80 and "rows: truth" in lines[0]
    assert lines[1].split() == [str(i) for i in range(1, 13)]
    assert lines[2].split()[:6] == ["1", "a", "class", "of", "letters", "a"] and lines[2].split()[6:10] == ["20", ".", ".", "7"]
    show_confusion([f"c{i}" for i in range(60)], [[100] * 60] * 60)
    assert "too many for this terminal" in capsys.readouterr().err
