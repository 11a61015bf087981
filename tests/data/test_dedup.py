"""Near-duplicates: hashes against plain Python, recall against brute force, and what stands on both sides of a split."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np

from tutelage.data.clean.dedup import band_keys, found_elsewhere, jaccard, near_duplicates, shingles

WORDS = [f"word{i}" for i in range(400)]


def plain_shingles(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def texts(seed: int, count: int, low: int = 1, high: int = 80) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[:30], k=rng.randint(low, high))) for _ in range(count)]


def test_shingles_are_those_of_plain_python() -> None:
    """A hash from prefix sums with an index off by one mixes neighbouring documents."""
    every = [*texts(0, 60), "", "  ", "one", "Ünïcode wörds ärë hërë tôo yes"]
    hashed = shingles(every)
    for a in range(0, len(every), 3):
        assert len(hashed[a]) == len(plain_shingles(every[a]))
        for b in range(0, len(every), 5):
            mine, theirs = plain_shingles(every[a]), plain_shingles(every[b])
            assert jaccard(hashed[a], hashed[b]) == len(mine & theirs) / len(mine | theirs)


def test_shingles_do_not_depend_on_batch_case_or_white_space() -> None:
    """Equal text in another batch or another layout must hash the same."""
    every = texts(1, 30)
    alone = [shingles([t])[0] for t in every]
    assert all(np.array_equal(a, b) for a, b in zip(alone, shingles(every), strict=True))
    assert np.array_equal(shingles(["A b\n\nc  D e f"])[0], shingles(["a b c d e f"])[0])


def test_hashes_are_the_same_in_another_process() -> None:
    """Python's own hash() is salted per process: with it, two runs would drop different documents."""
    program = "from tutelage.data.clean.dedup import band_keys; print(band_keys(['a b c d e f g']).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s}
        ).stdout
        for s in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().strip() == str(band_keys(["a b c d e f g"]).tolist())


def test_near_duplicates_are_the_brute_force_ones() -> None:
    """Buckets with too few bands miss pairs; without verification they drop honest documents."""
    rng = random.Random(2)
    originals = [" ".join(rng.choices(WORDS, k=120)) for _ in range(60)]
    every = list(originals)
    for original in originals:
        for changes in (1, 2, 4, 10):  # 10 changes of 120 words: Jaccard about 0.45
            words = original.split()
            for place in rng.sample(range(120), changes):
                words[place] = "other"
            every.append(" ".join(words))
    rng.shuffle(every)
    sets = [plain_shingles(t) for t in every]
    wanted: set[int] = set()
    for i in range(len(every)):
        if any(j not in wanted and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8 for j in range(i)):
            wanted.add(i)
    found = near_duplicates(band_keys(every), every.__getitem__)
    assert set(found) <= set(range(len(every))) and all(earlier < later for later, earlier in found.items())
    assert len(set(found) ^ wanted) <= 0.02 * len(wanted) and len(wanted) > 60


def test_no_documents_and_one_document() -> None:
    """Empty arrays trip sorting code."""
    assert near_duplicates(band_keys([]), str) == {} and near_duplicates(band_keys(["a"]), lambda i: "a") == {}
    assert found_elsewhere([], ["a"]) == []


def test_share_found_elsewhere() -> None:
    """A held-out page that is a paragraph of a training page has a low Jaccard, but is no test."""
    rng = random.Random(3)
    page = rng.choices(WORDS, k=3000)
    half = page[100:150] + [f"new{i}" for i in range(50)]
    shares = found_elsewhere([" ".join(page[500:600]), " ".join(half), "nothing of this was ever seen before"], [" ".join(page)])
    assert shares[0] == 1.0 and 0.4 < shares[1] < 0.55 and shares[2] == 0.0
