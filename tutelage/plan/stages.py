"""Time and memory of the parts of a stage, from the amounts that it reads and makes. Ranges, each with its formula.

The rates were measured on the two-core machine of docs/log.md with 0.1 to 11 MB each: Python's documentation, questions made
from it, and the stages of a quickstart. A range leaves room for other machines and other texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tutelage.plan.flops import count_flops, generate_flops, train_flops_per_token
from tutelage.plan.memory import HEAD_CHUNK_BYTES, HEAD_COPIES, Memory
from tutelage.plan.memory import cache as keys_and_values
from tutelage.plan.parameters import Shape, count
from tutelage.plan.time import MFU, NOTHING, Span
from tutelage.recipe import Estimate

START = Estimate(Span(0.3, 2), Span(50e6, 90e6), "0.3 to 2 s to start", "50 to 90 MB of Python")
# Importing torch (2 s), compiling our kernels once (10 s), reading a model; less where a stage before has done so.
START_TORCH = Estimate(Span(0.3, 15), Span(200e6, 450e6), "0.3 to 15 s to start torch", "200 to 450 MB of torch")
REPORT = Estimate(Span(0.5, 6), Span(10e6, 160e6), "0.5 to 6 s of tables and curves", "10 to 160 MB")  # 1.3 s, 47 MB

# Bytes a second of one core, of text unless said
COLLECT = {
    "documents": Span(1.5e6, 12e6),  # 4.2 to 5.5M with near duplicates, 9.7 to 11M without
    "conversations": Span(0.4e6, 3e6),  # 1.2M for rows of 150 bytes, 1.4M for ones made from docstrings
}
LEARN = Span(1e6, 6e6)  # 3.9M; with its measurement 2.5M
ENCODE = Span(1.2e6, 4.5e6)  # of JSONL: 2.2M documents, 3.5M conversations, 4.5M where words repeat much (bench/tokens.py)
BASELINES = Span(0.1e6, 0.4e6)  # 0.14M on one core, 0.18M on two
BASELINES_MOST = 32e6  # bytes of training text that they read (evaluate/baselines.py)

# Bytes of memory for each byte
COLLECT_MEMORY = Span(0.05, 1)  # of text, for ids, sketches and lines: 0.1 for pages, more for short records
FILE_MEMORY = Span(2, 6)  # of the largest file, which is held as bytes and as text
LEARN_MEMORY = Span(0.5, 20)  # of text, for words and pairs: 18 at 2 MB, less beyond
ENCODE_MEMORY = Span(60e6, 120e6)  # in all, of a process: 85M
BASELINES_MEMORY = Span(300, 800)  # of training text: 580

READ_TOKENS = 8192  # in one forward pass (evaluate/suite.py)
SLOTS = 32  # answers that are generated at a time (stages/evaluate.py)
LAYER_PASS = Span(1e-3, 6e-3)  # seconds that one more token of all slots costs a layer of a small model: 2 to 5 ms
ANSWER = Span(1 / 10, 1)  # length of an answer as a share of the most: 1/8
PROMPT = Span(10, 200)  # tokens of a question: 15
SAMPLE_PASSES = 2 * 96  # for the samples beside the scores, at most


def bytes_per_token(vocabulary: int) -> Span:
    """UTF-8 bytes of a token of a vocabulary of so many entries. High: the text that it was learnt from (1.4 at 300 entries, 2.1
    at 512, 3.7 at 4096, 4.1 at 10905). Other English text had 0.7 of that; other scripts and code have less."""
    best = min(4.6, 1.3 + 0.7 * math.log2(max(vocabulary, 256) / 256))
    return Span(0.55 * best, 1.05 * best)


def collect(text: Span, kind: str, largest_file: float) -> Estimate:
    """Cleaning, deduplicating, splitting and writing `text` bytes."""
    rate, file = COLLECT["documents" if kind == "documents" else "conversations"], Span(largest_file, largest_file)
    room = f"{text.said('B')} x {COLLECT_MEMORY.said('B')} each"
    room += f" + {file.said('B')} of the largest file x {FILE_MEMORY.said('B')} each" if largest_file else ""
    because = f"{text.said('B')} of text / ({rate.said('B/s')})"
    return Estimate(text / rate, text * COLLECT_MEMORY + file * FILE_MEMORY, because, room)


def learn(text: Span) -> Estimate:
    """Training a tokenizer on `text` bytes and measuring it."""
    because, room = f"{text.said('B')} of text / ({LEARN.said('B/s')})", f"{text.said('B')} x {LEARN_MEMORY.said('B')} each"
    return Estimate(text / LEARN, text * LEARN_MEMORY, because, room)


def encode(lines: Span, workers: int) -> Estimate:
    """Turning `lines` bytes of JSONL into tokens in so many processes."""
    because = f"{lines.said('B')} of records / ({ENCODE.said('B/s')} x {workers} processes) to make tokens"
    room = f"{workers} x {ENCODE_MEMORY.said('B')} to make tokens"
    return Estimate(lines / (ENCODE * workers), ENCODE_MEMORY * workers, because, room)


def compute(flops: Span, peak_flops: float, device: str, what: str) -> Estimate:
    """FLOPs at the measured rate and the share of it that models use (plan/time.py); `what` names them."""
    share = MFU["cuda" if device.startswith("cuda") else "cpu"]
    rate = f"{peak_flops / 1e9:,.0f} GFLOP/s measured x {share.low:.0%} to {share.high:.0%} used"
    return Estimate(flops / (Span(share.low, share.high) * peak_flops), NOTHING, f"{what} / ({rate})", "")


def train(shape: Mapping[str, Any], tokens: Span, row: int, peak_flops: float, device: str, need: Memory) -> Estimate:
    """Training on `tokens` tokens in rows of `row`; `need` is what plan/memory.py says of it."""
    each = train_flops_per_token(shape, row)
    found = compute(tokens * each, peak_flops, device, f"{tokens.said('tokens')} x {each / 1e6:,.1f} MFLOP")
    return found + Estimate(NOTHING, Span(need.low, need.high), "", need.explain())


def read(shape: Mapping[str, Any], tokens: Span, stride: float, peak_flops: float, device: str) -> Estimate:
    """The log-probabilities of `tokens` held-out tokens, in windows that keep the share `stride` of the context."""
    s = Shape.of(shape)
    windows = Span(1, s.context / max(1, round(s.context * (1 - stride))))  # a document within the context is read once
    each = count_flops(shape, s.context).forward
    what = f"{tokens.said('tokens')} x {windows.said('readings')} x {each / 1e6:,.1f} MFLOP"
    values = 8 * s.hidden + 3 * s.intermediate  # of a token, while one layer is computed
    memory = Span(0.8, 1.6) * (4 * (count(s).total + values * READ_TOKENS) + HEAD_COPIES * HEAD_CHUNK_BYTES)
    room = f"{memory.said('B')} of weights and {READ_TOKENS} tokens in one layer"
    return compute(tokens * windows * each, peak_flops, device, what) + Estimate(NOTHING, memory, "", room)


def baselines(train: Span, held_out: Span) -> Estimate:
    """xz and Kneser-Ney n-grams over bytes and tokens, on bytes of training and of held-out text."""
    train = Span(min(train.low, BASELINES_MOST), min(train.high, BASELINES_MOST))
    text = train + held_out
    because = f"{text.said('B')} of text / ({BASELINES.said('B/s')}) for the baselines"
    room = f"{train.said('B')} of text x {BASELINES_MEMORY.said('B')} each for the baselines"
    return Estimate(text / BASELINES, train * BASELINES_MEMORY, because, room)


def answer(shape: Mapping[str, Any], questions: Span, max_tokens: int, peak_flops: float, device: str) -> Estimate:
    """Answers of at most `max_tokens` tokens: passes through the layers, and their FLOPs."""
    s = Shape.of(shape)
    lengths = ANSWER * max_tokens
    ends = ((PROMPT.low, lengths.low), (PROMPT.high, lengths.high))
    flops = Span(*(generate_flops(shape, round(prompt), max(1, round(new))) for prompt, new in ends))
    what = f"{questions.said('questions')} x {flops.said('FLOP')}"
    cache = Span(0.1, 1) * keys_and_values(shape, SLOTS, s.context)
    out = compute(questions * flops, peak_flops, device, what)
    out += Estimate(NOTHING, cache, "", f"{cache.said('B')} of keys and values")
    return out + _passes(questions * (1 / SLOTS) * lengths, s.layers, "answers")


def samples(shape: Mapping[str, Any]) -> Estimate:
    """The samples beside the scores."""
    return _passes(Span(SAMPLE_PASSES / 8, SAMPLE_PASSES), Shape.of(shape).layers, "samples")


def _passes(count: Span, layers: int, what: str) -> Estimate:
    because = f"{count.said('passes')} x {layers} layers x {(LAYER_PASS * 1e3).said('ms')} for {what}"
    return Estimate(count * layers * LAYER_PASS, NOTHING, because, "")
