"""Tokenizing end to end against `tokenizers`' encode_batch alone: from JSONL text on disk to memory-mapped shards.

    python bench/tokens.py [--megabytes 50] [--rounds 5] [--work FOLDER] [--out results.jsonl]

The corpus is Python's own documentation (`pydoc_data.topics` and the standard library's docstrings), paragraph by paragraph,
with a twentieth of the words replaced, up to the wanted size. Each round times, in turn and in changing order, in processes of
their own with nothing cached:

- `encode_batch`: `tokenizers` on strings in memory with all cores, nothing read and nothing written, `Encoding` objects dropped;
- `tutelage`: `tokens.tokenize` from the records folder to shards, workers' start included.

Prints one JSON line: the median of the rounds' ratios (tutelage MB/s over encode_batch MB/s) with the smallest and largest,
and whether all ids are equal.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import pydoc_data.topics
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def paragraphs() -> list[str]:
    texts = list(pydoc_data.topics.topics.values())
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts += [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
    return [p for text in texts for p in text.split("\n\n") if p.strip()]


def corpus(megabytes: float, seed: int) -> Iterator[str]:
    """Paragraphs drawn at random with every twentieth word replaced by another of the same paragraph or of the corpus."""
    rng, base, size = random.Random(seed), paragraphs(), 0
    pool = [w for p in base for w in p.split()]
    pieces = [re.split(r"(\s+)", p) for p in base]
    while size < megabytes * 1e6:
        words = list(rng.choice(pieces))
        for i in range(len(words)):
            if words[i].strip() and rng.random() < 0.05:
                words[i] = rng.choice(pool)
        text = "".join(words)
        size += len(text.encode())
        yield text


def prepare(work: Path, megabytes: float, seed: int, vocabulary: int) -> None:
    from tutelage.files import write_json
    from tutelage.records import Document, dump_line
    from tutelage.tokenizer.train import train

    records = work / "records"
    records.mkdir()
    write_json(records / "schema.json", {"type": "Document", "version": 1})
    (records / "validation.jsonl").write_text("")
    with (records / "train.jsonl").open("w", encoding="utf-8") as f:
        for text in corpus(megabytes, seed):
            f.write(dump_line(Document.make(text, source="bench")) + "\n")
    train(paragraphs(), vocab_size=vocabulary, out=work / "tokenizer", pattern="gpt-2")


def texts_of(work: Path) -> list[str]:
    with (work / "records" / "train.jsonl").open(encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]


def run_peer(work: Path, save: Path | None) -> float:
    """Seconds of encode_batch on strings in memory."""
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json")), texts_of(work)
    begin = time.perf_counter()
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    seconds = time.perf_counter() - begin
    if save is not None:
        np.save(save, np.concatenate([np.array(e.ids, np.uint16) for e in encoded]))
    return seconds


def run_ours(work: Path, out: Path) -> float:
    """Seconds from the records folder to finished shards, imports of the package included."""
    begin = time.perf_counter()
    from tutelage.data.tokens.shards import tokenize

    tokenize(work / "records", work / "tokenizer", out)
    return time.perf_counter() - begin


def equal_ids(out: Path, reference: Path) -> bool:
    """Whether the documents' ids, less the tokens before and after each, are those of encode_batch."""
    from tutelage.data.tokens.shards import Segments

    segments = Segments.open(out / "train")
    ours = np.concatenate([segments.ids(i)[1:-1] for i in range(len(segments))])
    return bool(np.array_equal(ours, np.load(reference)))


def in_process(side: str, work: Path, extra: Path | None) -> float:
    command = [sys.executable, __file__, "--side", side, "--work", str(work), *(["--extra", str(extra)] if extra else [])]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def compare(work: Path, rounds: int) -> dict[str, object]:
    size = sum(len(t.encode()) for t in texts_of(work)) / 1e6
    reference, equal = work / "reference.npy", True
    ours, peer = [], []
    for r in range(rounds):
        out = work / f"out_{r}"
        sides = ["peer", "ours"] if r % 2 == 0 else ["ours", "peer"]
        for side in sides:
            if side == "peer":
                peer.append(size / in_process("peer", work, reference if r == 0 else None))
            else:
                ours.append(size / in_process("ours", work, out))
        equal = equal and equal_ids(out, reference)
        print(f"round {r + 1}: ours {ours[-1]:.2f} MB/s, encode_batch {peer[-1]:.2f} MB/s", file=sys.stderr)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "job": "tokens", "peer": "tokenizers.encode_batch", "megabytes": round(size, 1), "cores": os.cpu_count(),
        "rounds": rounds,
        "ours_mb_per_s": round(statistics.median(ours), 2), "peer_mb_per_s": round(statistics.median(peer), 2),
        "ratio": round(statistics.median(ratios), 3), "ratio_interval": [round(min(ratios), 3), round(max(ratios), 3)],
        "target": 0.95, "ids_equal": equal,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--work", type=Path, help="scratch folder (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="file to append the JSON line to")
    parser.add_argument("--side", choices=["peer", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--extra", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(run_peer(args.work, args.extra) if args.side == "peer" else run_ours(args.work, args.extra))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        prepare(Path(folder), args.megabytes, args.seed, args.vocabulary)
        line = json.dumps(compare(Path(folder), args.rounds))
    print(line)
    if args.out:
        with args.out.open("a") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    main()
