"""Draws of tokens: the generator against published numbers, the kernel against plain torch, samples against the softmax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tutelage.engine.noise import draw, gumbel, philox, words
from tutelage.engine.sampler import choose, likely
from tutelage.engine.sequence import Sampling, Sequence
from tutelage.models import kernels
from tutelage.models.kernels import build, calls
from tutelage.tokenizer.detokenize import TextStream

# kat_vectors of Random123, philox4x32 10: four words of counter, two of key, four that come out.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
SIZES = (1, 15, 16, 63, 64, 65, 200, 1024, 5003)


def hexes(text: str) -> list[int]:
    return [int(x, 16) for x in text.split()]


def signed(x: int, bits: int = 64) -> int:
    return (x + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def make_keys(rows: int, seed: int = 0) -> Tensor:
    """Seeds of all 64 bits, samples, token indexes."""
    made = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=made)
    samples = torch.randint(0, 2**40, (rows,), generator=made)
    return torch.stack([seeds, samples, torch.randint(0, 1000, (rows,), generator=made)], 1)


def needs_kernels() -> None:
    if not kernels.available():
        pytest.skip(kernels.why_not())


def noisy(scores: Tensor, keys: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens of the kernel, and all noisy scores."""
    out = torch.full_like(scores, torch.nan)
    return calls.sample(scores, scores.amax(-1), torch.full((len(scores),), temperature), keys, out), out


def drawn(scores: Tensor, keys: Tensor, temperature: float = 1.0) -> Tensor:
    return draw(scores, scores.amax(-1), torch.full((len(scores),), temperature), keys)


def sequence(seed: int = 0, index: int = 0, ids: tuple[int, ...] = (1,), **how: object) -> Sequence:
    return Sequence(
        list(ids), Sampling(8, **how), TextStream(None), seed=seed, index=index, limit=8, ends=frozenset()  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("counter,key,want", KNOWN)
def test_published_numbers(counter: str, key: str, want: str) -> None:
    """A wrong constant or round still looks random. It is the published generator, in torch and in the kernel."""
    blocks, halves = (torch.tensor(hexes(x)) for x in (counter, key))
    assert [int(w) for w in philox(tuple(blocks), tuple(halves))] == hexes(want)
    needs_kernels()
    many = torch.stack([blocks.int(), torch.zeros(4, dtype=torch.int32), blocks.int()] * 7)  # fills vectors, and one in part
    out = calls.philox(many, signed(hexes(key)[0] + (hexes(key)[1] << 32)))
    assert all([x % 2**32 for x in row] == hexes(want) for row in out[[0, 2, 5, 20]].tolist())


def test_same_integers() -> None:
    """Two generators that agree for the published counters alone: other words of the key, counters beyond 32 bits."""
    needs_kernels()
    made = torch.Generator().manual_seed(1)
    counters = torch.randint(0, 2**32, (1001, 4), generator=made)
    for key in (0, 2**63 - 1, -1, -(2**63), 0x123456789ABCDEF):
        plain = philox(counters.unbind(1), (torch.tensor(key & 0xFFFFFFFF), torch.tensor(key >> 32 & 0xFFFFFFFF)))
        assert torch.equal(calls.philox(counters.int(), key).long() & 0xFFFFFFFF, torch.stack(plain, 1))


def test_where_each_place_finds_its_number() -> None:
    """Answers that change with the width of a processor's vectors, or a seed's upper half or a sample's that has no say."""
    keys = torch.tensor([[signed(0xA1B2C3D4E5F60718), 2**35 + 7, 12]])
    for place, number in enumerate(words(keys, 300)[0].tolist()):
        block = place // 64 * 16 + place % 16
        counter = tuple(torch.tensor(x) for x in (block, 12, 7, 8))
        assert number == philox(counter, (torch.tensor(0xE5F60718), torch.tensor(0xA1B2C3D4)))[place // 16 % 4]


@pytest.mark.parametrize("size", SIZES)
def test_noise_of_the_kernel(size: int) -> None:
    """The kernel's own logarithms, ends of rows that fill no vector, and the largest of the noisy scores, none left out."""
    needs_kernels()
    keys = make_keys(20)
    tokens, out = noisy(torch.zeros(20, size), keys)
    torch.testing.assert_close(out, gumbel(keys, size), rtol=1e-6, atol=1e-6)
    assert torch.equal(tokens, out.argmax(-1)) and torch.equal(tokens, drawn(torch.zeros(20, size), keys))


def test_noise_at_the_ends() -> None:
    """A uniform number of 0 or 1 is infinite noise. The bounds that let places be left out are those of the smallest and the
    largest word, which were searched for among eight milliard."""
    keys, places = torch.tensor([[0, 0, 40866], [0, 0, 42968]]), torch.tensor([[51610], [52578]])
    assert words(keys, 53_000).gather(1, places).tolist() == [[0], [2**32 - 1]]
    ends = 33 * np.log(2.0), -np.log(33 * np.log(2.0))
    plain = gumbel(keys, 53_000)
    np.testing.assert_allclose(plain.gather(1, places)[:, 0].numpy(), ends, rtol=3e-7)
    assert float(plain.min()) > -3.131 and float(plain.max()) < 22.875
    needs_kernels()
    scores = torch.full((2, 53_000), -21.0)  # only the largest noise reaches the top from here
    scores[0, 5] = scores[1, 5] = 0.0
    tokens, out = noisy(scores, keys)
    np.testing.assert_allclose((out - scores).gather(1, places)[:, 0].numpy(), ends, rtol=1e-6)
    assert torch.equal(tokens, out.argmax(-1)) and torch.equal(drawn(scores, keys), tokens) and int(tokens[0]) == 51610


def test_accuracy_of_the_kernel() -> None:
    """Logarithms that are only nearly right: three units in the last place of what float64 gives."""
    needs_kernels()
    keys = make_keys(40, 3)
    out = noisy(torch.zeros(40, 100_000), keys)[1].double()
    exact = -torch.log(-torch.log1p(-(words(keys, 100_000).double() + 0.5) / 2**32))
    assert float((out - exact).abs().div(exact.abs().clamp(min=1)).max()) < 4e-7


def test_the_first_of_equal_scores() -> None:
    """Ties that fall as vectors are wide. At 1e8 noise is rounded to multiples of 8."""
    needs_kernels()
    keys, scores = make_keys(100, 4), torch.full((100, 2000), 1e8)
    tokens, out = tied(scores, keys)
    assert float((out == out.amax(-1, keepdim=True)).sum(-1).float().mean()) > 1.5
    assert torch.equal(tokens, out.argmax(-1)) and torch.equal(tokens, tied(scores, keys, keep=False)[0])


def tied(scores: Tensor, keys: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens and noisy scores without taking the largest score away first."""
    out = torch.empty_like(scores)
    return calls.sample(scores, torch.zeros(len(keys)), torch.ones(len(keys)), keys, out if keep else None), out


@pytest.mark.parametrize("spread,temperature", [(0.01, 1.0), (1.0, 1.0), (3.0, 0.7), (8.0, 1.0), (8.0, 3.0), (40.0, 1.0)])
def test_nothing_that_could_win_is_left_out(spread: float, temperature: float) -> None:
    """A bound of the noise that is too tight: the kernel's token is the largest of its own noisy scores, bit for bit."""
    needs_kernels()
    made = torch.Generator().manual_seed(5)
    for size in (64, 1000, 4099):
        scores = torch.randn(500, size, generator=made) * spread
        keys = make_keys(500, size)
        tokens, out = noisy(scores, keys, temperature)
        assert torch.equal(tokens, out.argmax(-1))
        assert torch.equal(tokens, drawn(scores, keys, temperature))


def test_kernel_and_torch_draw_alike() -> None:
    """Another answer where there is no compiler. Only where two places are all but tied may rounding choose."""
    needs_kernels()
    made, apart, seen = torch.Generator().manual_seed(6), 0, 0
    for size, temperature in ((50, 1.0), (1003, 1.0), (1003, 0.6), (8192, 1.3)):
        scores, keys = torch.randn(2000, size, generator=made) * 3, make_keys(2000, size)
        scores[:, ::7] = -torch.inf
        got = drawn(scores, keys, temperature)
        with kernels.disabled():
            want = drawn(scores, keys, temperature)
        best = (scores - scores.amax(-1, keepdim=True)) / temperature + gumbel(keys, size)
        near = best.topk(2).values.diff()[:, 0].abs() < 1e-5
        assert torch.equal(got[~near], want[~near])
        apart, seen = apart + int((got != want).sum()), seen + int(near.sum())
    assert apart <= 2 and seen < 20


def test_samples_follow_the_softmax() -> None:
    """Noise of the wrong shape. Chi-square over places that are likely and places that hardly ever come, kernel and torch."""
    scores = torch.linspace(0, -7, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    for temperature, seed in ((1.0, 11), (1.7, 2**63 - 5), (0.5, -3)):
        p = (scores / temperature).softmax(-1).double().numpy()
        for by in ("sample", "token", "seed"):
            n = 60_000
            keys = torch.tensor([[seed, 0, 0]]).repeat(n, 1)
            keys[:, ("seed", "sample", "token").index(by)] += torch.arange(n) - (n if seed > 0 and by == "seed" else 0)
            counts = np.bincount(drawn(scores.expand(n, -1), keys, temperature), minlength=40)
            kept = p * n >= 5
            rest = ~kept
            got = np.append(counts[kept], counts[rest].sum()) if rest.any() else counts
            want = np.append(p[kept], p[rest].sum()) * n if rest.any() else p * n
            freedom = len(got) - 1
            square = float(((got - want) ** 2 / want).sum())
            assert abs(square - freedom) < 3.5 * (2 * freedom) ** 0.5, (temperature, by, square, freedom)


def test_a_rare_token_comes_as_often_as_it_should() -> None:
    """Uniform numbers of too few bits: among many places that are each one in a hundred million, none or too many are drawn."""
    size = 50_304
    scores = torch.full((1, size), -14.0)
    scores[0, 17] = 0.0
    share = float((size - 1) * np.exp(-14.0) / (1 + (size - 1) * np.exp(-14.0)))  # 4 in 100, each 8e-7
    n = 3000
    keys = torch.stack([torch.full((n,), 9), torch.zeros(n, dtype=torch.int64), torch.arange(n)], 1)
    rare = int((drawn(scores.expand(n, -1), keys) != 17).sum())
    assert abs(rare - share * n) < 3.5 * (n * share * (1 - share)) ** 0.5


def test_no_two_rows_share_noise() -> None:
    """Seeds, samples or token indexes that fall together, whole or in a shifted row: no correlation between any two."""
    parts = [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (-1, 0, 0), (0, 2**32, 0), (1, 1, 0), (0, 1, 1), (0, 2, 0),
    ]  # fmt: skip
    n = 40_000
    x = gumbel(torch.tensor(parts), n).double().neg().exp().neg().exp()  # uniform again
    assert abs(float(x.mean()) - 0.5) < 4 / (12 * n * len(parts)) ** 0.5
    together = torch.corrcoef(x) - torch.eye(len(parts))
    assert float(together.abs().max()) < 4.5 / n**0.5
    for shift in (1, 2, 16, 48, 64):
        moved = torch.corrcoef(torch.cat([x[:, shift:], x[:, :-shift]]))[: len(parts), len(parts) :]
        assert float(moved.abs().max()) < 4.5 / n**0.5, shift
    assert len(torch.unique(words(torch.tensor(parts), 256))) == len(parts) * 256


def test_company_and_threads_change_nothing() -> None:
    """Noise that comes from the place in a batch, or from the thread that draws it."""
    made = torch.Generator().manual_seed(8)
    scores, keys = torch.randn(24, 6007, generator=made), make_keys(24, 8)
    alone = torch.cat([drawn(scores[i : i + 1], keys[i : i + 1]) for i in range(24)])
    order = torch.randperm(24, generator=made)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(drawn(scores, keys), alone)
            assert torch.equal(drawn(scores[order], keys[order]), alone[order])
            assert torch.equal(drawn(scores[:, :6003], keys), drawn(scores[:, :6003].contiguous(), keys))
            if kernels.available():
                assert torch.equal(noisy(scores, keys)[1][order], noisy(scores[order], keys[order])[1])
            with kernels.disabled():
                assert torch.equal(drawn(scores[order], keys[order]), alone[order])
    finally:
        torch.set_num_threads(before)


def test_choose_and_a_guess_ahead() -> None:
    """`likely` with the noise of another place guesses no better than chance; greedy rows of a mixed batch take their largest."""
    made = torch.Generator().manual_seed(9)
    logits = torch.randn(3, 500, generator=made)
    for on in (True, False):
        kernels.use(on)
        try:
            first = [sequence(seed, temperature=t) for seed, t in ((4, 1.0), (5, 0.0), (6, 0.5))]
            later = [sequence(seed, temperature=t) for seed, t in ((4, 1.0), (5, 0.0), (6, 0.5))]
            for s in later:
                s.ids += [1, 2]
            assert likely(logits, first, ahead=2) == [t.id for t in choose(logits, later, None)]
            assert likely(logits, first, ahead=2)[0] != likely(logits, first, ahead=3)[0]
            assert choose(logits, first, None)[1].id == int(logits[1].argmax())
        finally:
            kernels.use(True)


def test_filters_in_a_mixed_batch() -> None:
    """A row's filter that reaches its neighbours, or scales twice: each row is drawn as it would be alone, and logits stay."""
    made = torch.Generator().manual_seed(10)
    logits = torch.randn(200, 300, generator=made) * 2
    kept = logits.clone()
    ways: list[dict[str, float]] = [
        {}, {"top_k": 5, "temperature": 0.5}, {"top_p": 0.4}, {"min_p": 0.3, "temperature": 2.0}, {"temperature": 0, "top_k": 3},
    ]  # fmt: skip
    made_of = [sequence(i, **ways[i % 5]) for i in range(200)]
    for on in (True, False):
        kernels.use(on)
        try:
            got = [t.id for t in choose(logits, made_of, 290)]
            assert got == [choose(logits[i : i + 1], made_of[i : i + 1], 290)[0].id for i in range(200)]
        finally:
            kernels.use(True)
        assert torch.equal(logits, kept) and max(got) < 290
        for i, token in enumerate(got):
            row = logits[i, :290]
            if i % 5 == 1:
                assert token in row.topk(5).indices.tolist()
            if i % 5 == 4:
                assert token == int(row.argmax())


@pytest.mark.parametrize("temperature", [1e-60, 1e-39, 1e39, 1e300])
def test_temperatures_beyond_float32(temperature: float) -> None:
    """0 / 0, and a token that is ruled out: minus infinity by infinity is not a number either."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.5]]).repeat(40, 1)
    found = set()
    for on in (True, False):
        kernels.use(on)
        try:
            ways = [sequence(i, temperature=temperature, min_tokens=3) for i in range(40)]
            for s in ways:
                s.ends = frozenset({3})
            found.add(frozenset(t.id for t in choose(logits, ways, None)))
        finally:
            kernels.use(True)
    assert found == {frozenset({1}) if temperature < 1 else frozenset({0, 1, 2})}


def test_narrower_vectors_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another answer on another processor: places would take other numbers where vectors are shorter."""
    needs_kernels()
    scores, keys = torch.randn(300, 777, generator=torch.Generator().manual_seed(12)), make_keys(300, 12)
    tokens, want = noisy(scores, keys)
    monkeypatch.setattr(build, "SOURCES", ("sample.cpp",))
    monkeypatch.setattr(build, "CHOICES", (("-pthread",),))
    try:
        kernels.reload(tmp_path)
        assert kernels.available(), kernels.why_not()
        got, out = noisy(scores, keys)
        tokens_tied, out_tied = tied(torch.full((100, 2000), 1e8), make_keys(100, 4))
    finally:
        monkeypatch.undo()
        kernels.reload()
    torch.testing.assert_close(out, want, rtol=1e-6, atol=2e-6)
    assert int((got != tokens).sum()) <= 1
    assert torch.equal(tokens_tied, out_tied.argmax(-1))
