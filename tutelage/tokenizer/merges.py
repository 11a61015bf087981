"""Learns byte-pair merges on top of those that a tokenizer has (Sennrich et al. 2016, begun from tokens in place of bytes)."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping

Pair = tuple[int, int]
Word = tuple[int, ...]
LEAST = 2  # a merge seen once is not worth a row of the embedding


def learn(words: Mapping[Word, int], names: Mapping[int, str], count: int) -> list[Pair]:
    """The next `count` merges: each time the pair of neighbours inside a word that occurs most. Fewer where no pair is left.

    `words` says how often each word, as ids, occurs; `names` has the text of every id. Merge k makes the id `max(names) + 1 + k`.
    A pair whose joined text is a token already is passed over: a second way to the same token would change the ids of old texts.
    Equal counts go to the smaller ids, so that equal words give equal merges.
    """
    texts, taken = dict(names), set(names.values())
    sequences, times = [list(word) for word in words], list(words.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, sequence in enumerate(sequences):
        for pair in itertools.pairwise(sequence):
            pairs[pair] += times[i]
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    first = max(names) + 1
    while heap and len(merges) < count:
        n, pair = heapq.heappop(heap)
        if pairs[pair] < -n:  # fewer than when it was put there: a merge has taken some
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if -n < LEAST:
            break
        text = texts[pair[0]] + texts[pair[1]]
        if text in taken:
            continue
        new = first + len(merges)
        merges.append(pair)
        texts[new] = text
        taken.add(text)
        fresh: set[Pair] = set()
        for i in places.pop(pair):
            before, after = sequences[i], merged(sequences[i], pair, new)
            for old in itertools.pairwise(before):
                pairs[old] -= times[i]
            for now in itertools.pairwise(after):
                pairs[now] += times[i]
                if new in now:
                    places[now].add(i)
                    fresh.add(now)
            sequences[i] = after
        for now in sorted(fresh):
            heapq.heappush(heap, (-pairs[now], now))
    return merges


def merged(sequence: list[int], pair: Pair, new: int) -> list[int]:
    """The sequence with `new` for every occurrence of the pair, from the left."""
    out: list[int] = []
    for token in sequence:
        if out and out[-1] == pair[0] and token == pair[1]:
            out[-1] = new
        else:
            out.append(token)
    return out
