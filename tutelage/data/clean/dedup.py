"""Near-duplicates by MinHash (Broder 1997) over word 5-grams, in numpy, and how much of one text stands in others.

In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a unit, and eight of
them are a shingle: about as much text as five words.

Shingles are hashed for many documents at once: a polynomial hash over the bytes, so that the hash of any substring is a
difference of two prefix sums. Candidates come from locality-sensitive buckets and are verified on the exact shingle sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
WORDS = 5  # words in a shingle
CHARACTERS = 8  # units of a shingle that begins with a character of a script without spaces
WORDS_A_CHARACTER = 0.6  # Chinese has 1.5 to 1.8 characters a word
UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9f"
    "\U00020000-\U0003ffff])"
)
BANDS, ROWS = 21, 6  # P(candidate) at Jaccard 0.8: 0.998; at 0.5: 0.28; at 0.3: 0.015
BATCH_BYTES = 1 << 20
BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2**64
INVERSE = pow(BASE, -1, 1 << 64)


def shingles(texts: Sequence[str]) -> list[U64]:
    """For each text the sorted distinct 64-bit hashes of its word 5-grams (of all its words, if it has fewer).

    Case and white space do not count. Deterministic across processes and machines.
    """
    out: list[U64] = []
    for batch in _batches(texts):
        flat, starts = _flat_shingles(batch)
        out += [np.unique(flat[a:b]) for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
    return out


def spaced(text: str) -> str:
    """`text` in lower case with one space between its units: words, or characters of scripts without spaces."""
    text = text.lower()
    return " ".join((text if text.isascii() else UNSPACED.sub(r" \1 ", text)).split())


def word_count(text: str) -> float:
    """Words of the text. Those of scripts without spaces are estimated from its characters."""
    if text.isascii():
        return len(text.split())
    rest, characters = UNSPACED.subn(" ", text)
    return len(rest.split()) + characters * WORDS_A_CHARACTER


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _flat_shingles(texts: Sequence[str]) -> tuple[U64, list[int]]:
    """(shingle hashes of all texts one after the other, where each text's begin). Every text gets at least one."""
    data = [spaced(text).encode("utf-8", "surrogatepass") or b"\0" for text in texts]
    joined = np.frombuffer(b"\n".join(data) + b"\n", dtype=np.uint8)
    prefix, inverse = _prefix_hashes(joined)
    is_break = (joined == 32) | (joined == 10)
    ends = np.flatnonzero(is_break)  # one past the last byte of each word
    begins = np.concatenate(([0], ends[:-1] + 1))
    document = np.cumsum(joined[ends] == 10) - (joined[ends] == 10)  # of each word
    last_word = np.flatnonzero(joined[ends] == 10)  # of each document
    first_word = np.concatenate(([0], last_word[:-1] + 1))
    # A shingle starts at a word if four more follow in its document, or if it is the first word of a short one.
    starting = np.arange(len(ends))
    wanted = starting + np.where(_unspaced(joined, begins, ends), CHARACTERS, WORDS) - 1
    final = np.minimum(wanted, last_word[document])
    keep = (final == wanted) | (starting == first_word[document])
    left, right = begins[keep], ends[final[keep]]
    hashes = _mix((prefix[right] - prefix[left]) * inverse[left])
    starts = np.searchsorted(document[keep], np.arange(len(texts)))
    return hashes, starts.tolist()


def _unspaced(data: NDArray[np.uint8], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which units are single characters of a script without spaces, by the first two of their three or four UTF-8 bytes."""
    first, second = data[begins], data[np.minimum(begins + 1, len(data) - 1)]
    size = ends - begins
    east_asian = ((first >= 0xE3) & (first <= 0xE9)) | (first == 0xEF)
    thai_lao = (first == 0xE0) & (second >= 0xB8) & (second <= 0xBB)
    burmese_khmer = (first == 0xE1) & (((second >= 0x80) & (second <= 0x82)) | (second == 0x9E) | (second == 0x9F))
    return ((size == 3) & (east_asian | thai_lao | burmese_khmer)) | ((size == 4) & (first == 0xF0) & (second >= 0xA0))  # type: ignore[no-any-return]


def _prefix_hashes(data: NDArray[np.uint8]) -> tuple[U64, U64]:
    power, inverse = _powers(1 << max(len(data).bit_length(), 10))
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(_byte_codes()[data] * power[: len(data)], out=prefix[1:])
    return prefix, inverse


@lru_cache(maxsize=2)
def _powers(n: int) -> tuple[U64, U64]:
    def series(base: int) -> U64:
        values = np.full(n, base & (2**64 - 1), dtype=np.uint64)
        values[0] = 1
        return np.multiply.accumulate(values)

    return series(BASE), series(INVERSE)


@lru_cache(maxsize=1)
def _byte_codes() -> U64:
    return _mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(BASE))


def _mix(x: U64) -> U64:
    """The finaliser of splitmix64: every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def band_keys(texts: Iterable[str]) -> U64:
    """[number of texts, BANDS] keys: two texts that share a key in some band are candidates. Reads the texts once."""
    rows = [_band_keys(batch) for batch in _batches(texts)]
    return np.concatenate(rows) if rows else np.zeros((0, BANDS), dtype=np.uint64)


def _band_keys(texts: Sequence[str]) -> U64:
    flat, starts = _flat_shingles(texts)
    constants = _mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(INVERSE))
    keys = np.zeros((len(texts), BANDS), dtype=np.uint64)
    scratch = np.empty_like(flat)
    for j, constant in enumerate(constants):
        np.bitwise_xor(flat, constant, out=scratch)
        np.multiply(scratch, constant | np.uint64(1), out=scratch)
        smallest = np.minimum.reduceat(scratch, starts)
        keys[:, j // ROWS] = _mix(keys[:, j // ROWS] + smallest)
    return keys


def near_duplicates(keys: U64, fetch: Callable[[int], str], threshold: float = 0.8, *, max_bucket: int = 1000) -> dict[int, int]:
    """{document: an earlier kept document whose shingles have a Jaccard similarity >= threshold}.

    The first of a group stays. `fetch(i)` gives text i again, so that no text has to be held. In a bucket, a document is
    compared with the bucket's kept ones (at most `max_bucket`, the earliest).
    """

    @lru_cache(maxsize=256)
    def shingles_of(i: int) -> U64:
        return shingles([fetch(i)])[0]

    return twins(keys, lambda a, b: jaccard(shingles_of(a), shingles_of(b)) >= threshold, max_bucket=max_bucket)


def twins(keys: U64, alike: Callable[[int, int], bool], *, max_bucket: int = 1000) -> dict[int, int]:
    """{item: an earlier kept item that shares a key with it and that `alike(item, earlier)` holds for}."""
    candidates: dict[int, set[int]] = {}
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        ordered = keys[order, band]
        cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        sizes = np.diff(np.concatenate(([0], cuts, [len(ordered)]))) if len(ordered) else np.zeros(0, dtype=int)
        starts = np.concatenate(([0], cuts))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            bucket = order[start : start + size].tolist()  # stable sort: in document order
            for position, document in enumerate(bucket[1:], 1):
                candidates.setdefault(document, set()).update(bucket[: min(position, max_bucket)])

    found: dict[int, int] = {}
    for item in sorted(candidates):
        for earlier in sorted(candidates[item]):
            if earlier not in found and alike(item, earlier):
                found[item] = earlier
                break
    return found


def jaccard(a: U64, b: U64) -> float:
    """Shared over all elements of two sorted arrays of distinct values; 1.0 for two empty ones."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1) if len(a) + len(b) else 1.0


def common_shingles(texts: Iterable[str], least: int) -> U64:
    """Sorted shingles that stand in `least` or more of the texts. Holds 8 bytes a word of all texts."""
    sets = [part for batch in _batches(texts) for part in shingles(batch)]
    if not sets:
        return np.zeros(0, dtype=np.uint64)
    values, counts = np.unique(np.concatenate(sets), return_counts=True)
    return values[counts >= least]  # type: ignore[no-any-return]


def runs_without(text: str, known: U64) -> list[str]:
    """The stretches of `text`, in lower case and with one space between units, that no shingle of the sorted `known` covers."""
    units = spaced(text).split(" ")
    hashes, _ = _flat_shingles([text])
    at = np.minimum(np.searchsorted(known, hashes), max(len(known) - 1, 0))
    hit = known[at] == hashes if len(known) else np.zeros(len(hashes), dtype=bool)
    covered = np.zeros(len(units), dtype=bool)
    for i in np.flatnonzero(hit).tolist():
        covered[i : i + (CHARACTERS if UNSPACED.fullmatch(units[i]) else WORDS)] = True
    runs: list[list[str]] = []
    before = True
    for unit, gone in zip(units, covered.tolist(), strict=True):
        if not gone:
            if before:
                runs.append([])
            runs[-1].append(unit)
        before = gone
    return [" ".join(run) for run in runs if run != [""]]


def found_elsewhere(held_out: Sequence[str], others: Iterable[str]) -> list[float]:
    """For each held-out text the share of its word 5-grams that stand anywhere in `others` (read once, in batches)."""
    own = shingles(held_out)
    if not own:
        return []
    every = np.unique(np.concatenate(own))
    seen = np.zeros(len(every), dtype=bool)
    # Most shingles of most texts stand nowhere else: a table of their low bits says so without a search.
    low_bits = np.uint64((1 << max(16, (4 * len(every)).bit_length())) - 1)
    possible = np.zeros(int(low_bits) + 1, dtype=bool)
    possible[every & low_bits] = True
    for batch in _batches(others):
        flat, _ = _flat_shingles(batch)
        flat = flat[possible[flat & low_bits]]
        at = np.searchsorted(every, flat)
        at[at == len(every)] = 0
        seen[at[every[at] == flat]] = True
    return [float(seen[np.searchsorted(every, s)].mean()) for s in own]
