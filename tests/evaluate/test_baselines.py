"""The baselines are given their best chance, and say what they did."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from tutelage.evaluate import baselines as ys

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def texts(seed: int, count: int, length: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), size=length)) for _ in range(count)]


def encode(text: str) -> list[int]:
    return [WORDS.index(w) for w in text.split()]


def test_all_baselines_count_the_same_bytes() -> None:
    """Bits per byte are only comparable over the same bytes: those of the text, without separators."""
    train, validation = texts(0, 60), texts(1, 9)
    results = ys.measure(train, validation, encode=encode, vocabulary=len(WORDS))
    assert [r.name for r in results] == ["xz", "kn-bytes", "kn-tokens"]
    size = sum(len(v.encode()) for v in validation)
    for result in results:
        assert result.bytes.sum() == size
        assert np.bincount(result.members, minlength=len(result.bits)).sum() == len(validation)
        assert result.details["train_documents"] == 60


def test_random_words_cost_their_entropy() -> None:
    """Nothing can beat log2(12) bits a word here: a baseline below it would be looking at the answers."""
    train, validation = texts(0, 120), texts(1, 30)
    entropy = np.log2(len(WORDS)) * sum(len(v.split()) for v in validation)
    for result in ys.measure(train, validation, encode=encode, vocabulary=len(WORDS)):
        assert result.bits.sum() > entropy * 0.995
        if result.name != "xz":
            assert result.bits.sum() < entropy * 1.10


def test_xz_learns_from_the_training_text_and_earlier_documents() -> None:
    """Compressing the held-out text alone, or with a dictionary smaller than the data, makes xz look far worse than it is."""
    rng = np.random.default_rng(0)
    known = ["".join(map(chr, rng.integers(97, 123, size=3000))) for _ in range(40)]
    seen = ys.xz(known, [known[0], known[20]])
    assert seen.bits.sum() / seen.bytes.sum() < 0.1
    new = "".join(map(chr, rng.integers(97, 123, size=3000)))
    twice = ys.xz(known, [new, new])
    assert twice.bits[1] < twice.bits[0] / 10
    alone = len(lzma.compress(new.encode(), preset=9 | lzma.PRESET_EXTREME)) * 8
    assert twice.bits[0] < alone


def test_xz_groups_add_up_to_the_whole_stream() -> None:
    """Increments of a cut stream must sum to what the uncut stream costs."""
    train, validation = texts(0, 50), texts(1, 30)
    one, eight = ys.xz(train, validation, groups=1), ys.xz(train, validation, groups=8)
    assert eight.bits.sum() == one.bits.sum()
    assert len(eight.bits) == 8 and len(one.bits) == 1


def test_order_is_chosen_without_the_validation_documents() -> None:
    """An order picked on the validation documents would be a leak; here long contexts help only there."""
    train, validation = texts(0, 200), texts(1, 5)
    other = ys.kn_tokens(train, ["mu " * 50 + "mu"], encode, len(WORDS))
    assert ys.kn_tokens(train, validation, encode, len(WORDS)).details["order"] == other.details["order"]


def test_too_much_text_is_sampled_and_said() -> None:
    """Memory stays bounded, and the page can say that the baseline saw less."""
    result = ys.measure(texts(0, 200), texts(1, 5), max_train_bytes=20_000)[1]
    assert result.details["train_bytes"] < 30_000 < result.details["train_bytes_given"]


def test_token_outside_the_vocabulary() -> None:
    """It would silently become another n-gram's key."""
    with pytest.raises(ValueError, match="11 in a vocabulary of 5"):
        ys.kn_tokens(texts(0, 5), texts(1, 2), encode, 5)
