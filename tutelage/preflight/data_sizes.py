"""How much a records artifact holds, or will hold: counted where it is there, else from the settings and sources of the stage
that makes it. Nothing is read but sizes and the first megabyte of tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tutelage.config.stages import Data
from tutelage.data.demo import questions, skills
from tutelage.data.sources.readers import READERS, files_of, parse_spec, suffix_of
from tutelage.data.sources.readers_files import Reader, read_csv, read_html, read_json, read_jsonl, read_parquet, read_pdf
from tutelage.files import read_json as load_json
from tutelage.plan.time import NOTHING, Span
from tutelage.recipe import Planned, Unknown

KEPT = Span(0.6, 1)  # of what files hold, after filters and deduplication
KEPT_OF_OURS = Span(0.9, 1)  # the same of what we make
OF_SHARE = Span(0.6, 1.4)  # a share that a hash decides, in a small collection
SAMPLE = 1 << 20  # bytes of a table whose lines are counted

# Bytes of text in a byte of a file, and bytes a second until it is there, measured as in plan/stages.py
TEXT_OF: dict[Reader, Span] = {
    read_jsonl: Span(0.3, 1), read_json: Span(0.3, 1), read_csv: Span(0.3, 1), read_parquet: Span(0.5, 8),
    read_html: Span(0.05, 0.9), read_pdf: Span(0.005, 1),
}  # fmt: skip
SLOW: dict[Reader, Span] = {read_html: Span(0.15e6, 1.5e6), read_pdf: Span(0.5e6, 4e6)}  # 0.36M; 2.0M
GZIP = Span(1.5, 8)
ROW = Span(50, 3000)  # bytes of text in a row, where its lines cannot be counted

# `python-docs:` and `python-questions:` read the standard library once a process: 11 MB of sources in 2 s
DOCS = Span(2e6, 3.5e6)  # 2.3 MB are kept
DOCS_SECONDS = Span(1.2, 6)
FILES = 573  # of the standard library; 5.6 MB of code without comments and docstrings
CODE, CODE_SECONDS = Span(3e3, 20e3), Span(5e-3, 60e-3)  # of a file
FACTS = Span(1.6, 2.0)  # for each function asked about; 1.8
FUNCTIONS = 3500  # about as many there are
OWN_WORDS = 0.05 + 0.95 * 0.3  # held-out questions for each fact (data/demo/questions.py)
AREAS, DOCSTRING = 12, Span(200, 500)  # data/demo/python_areas.yaml; bytes of a docstring
QUESTION, PROBLEM = Span(66, 88), Span(28, 60)  # bytes of a conversation: 76; 39


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSize:
    """What a records artifact holds, by part. Bytes are UTF-8 of the text alone."""

    train: Span  # records
    held_out: Span
    train_bytes: Span
    held_out_bytes: Span
    conversations: bool  # or other records that a chat template writes

    @property
    def lines(self) -> Span:
        """Bytes of both JSONL files: the text with its escapes, and names, marks and ids for each record."""
        return (self.train_bytes + self.held_out_bytes) * Span(1, 1.15) + (self.train + self.held_out) * Span(100, 450)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSize:
    """What one source of a data stage will give."""

    text: Span  # bytes
    records: Span
    seconds: Span = NOTHING  # until the text is there
    largest: int = 0  # bytes of the largest file that is held whole
    share: Span | None = None  # held out by the source itself
    kept: Span = KEPT_OF_OURS


def records_of(planned: Planned, key: str) -> RecordSize:
    """The records that a stage reads. Raises `Unknown` where only a run can tell."""
    if key in planned.inputs:
        return counted(planned.inputs[key].path)
    maker = planned.waits_for[key]
    try:
        return expected(maker)
    except Unknown:
        raise Unknown(f"known after {maker.name}") from None


def counted(folder: Path) -> RecordSize:
    """The amounts of a records artifact: from its card, or by counting lines."""
    conversations = load_json(folder / "schema.json")["type"] != "Document"
    card = folder / "card.json"
    parts = load_json(card).get("parts") if card.exists() else None
    if parts:
        (n, size), (m, held) = ((parts[k]["records"], parts[k]["bytes"]) for k in ("train", "validation"))
        return RecordSize(
            train=Span(n, n), held_out=Span(m, m), train_bytes=Span(size, size), held_out_bytes=Span(held, held),
            conversations=conversations,
        )  # fmt: skip
    rows, sizes = [], []
    for part in ("train", "validation"):
        with (folder / f"{part}.jsonl").open("rb") as f:
            rows.append(sum(1 for _ in f))
            sizes.append(Span(0.1, 1) * f.tell())
    return RecordSize(
        train=Span(rows[0], rows[0]), held_out=Span(rows[1], rows[1]), train_bytes=sizes[0], held_out_bytes=sizes[1],
        conversations=conversations,
    )  # fmt: skip


def expected(planned: Planned) -> RecordSize:
    """What a stage that has not run will make. Raises `Unknown`."""
    config = planned.config
    if not isinstance(config, Data):
        raise Unknown(f"known after {planned.name}")
    sums = dict.fromkeys(("train", "held_out", "train_bytes", "held_out_bytes"), NOTHING)
    for names, all_held in ((config.sources, False), (config.validation_sources, True)):
        for name in names:
            found = source(name, config)
            share = OF_SHARE * (0.0 if config.validation_sources else config.validation_share)
            share = Span(1, 1) if all_held else found.share or share
            rest = Span(max(0.0, 1 - share.high), 1 - min(1.0, share.low))
            for part, of in (("train", rest), ("held_out", Span(share.low, min(1.0, share.high)))):
                sums[part] += found.records * found.kept * of
                sums[f"{part}_bytes"] += found.text * found.kept * of
    return RecordSize(**sums, conversations=config.kind != "documents")


def source(name: str, config: Data) -> SourceSize:
    """The amounts of one source. Raises `Unknown` for a data set that is not here."""
    scheme, parameters, rest = parse_spec(name)
    if scheme == "hf":
        raise Unknown(f"known after reading {name}")
    if scheme == "python-docs":
        return SourceSize(text=DOCS, records=_documents(500, DOCS, config), seconds=DOCS_SECONDS)
    if scheme == "python-code":
        files = min(int(parameters.get("modules", FILES)), FILES)
        return SourceSize(text=CODE * files, records=_documents(files, CODE * files, config), seconds=CODE_SECONDS * files)
    if scheme == "python-questions":
        questions.read(parameters)  # a mistake in them is told now
        facts = FACTS * min(int(parameters.get("functions", 900)), FUNCTIONS)
        asked = facts * (0.95 * int(parameters.get("phrasings", 3)) + OWN_WORDS)
        held = OWN_WORDS * facts.low / asked.low
        return SourceSize(text=asked * QUESTION, records=asked, seconds=Span(0, DOCS_SECONDS.high), share=OF_SHARE * held)
    if scheme == "python-areas":
        made = Span(0.8, 1) * AREAS * int(parameters.get("most", 200))
        return SourceSize(text=made * DOCSTRING, records=made, seconds=Span(0, DOCS_SECONDS.high))
    if scheme == "skill":
        next(skills.read(rest, parameters), None)
        names = len(skills.CHANCE) if rest == "all" else len(rest.split(","))
        count, held = int(parameters.get("count", 1000)), int(parameters.get("held_out", 100))
        made = Span(min(count, 500) + min(held, 50), count + held) * names  # some have few different problems
        return SourceSize(text=made * PROBLEM, records=made, share=OF_SHARE * (held / max(1, count + held)))
    return _files(name, config)


def _documents(files: int, text: Span, config: Data) -> Span:
    """Documents of so many files, cut as the settings say."""
    if config.split != "none":
        return text / Span(20, 2000)
    pieces = text * Span(1 / config.chunk_chars, 2 / config.chunk_chars) if config.chunk_chars else NOTHING
    return Span(max(files, pieces.low), files + pieces.high)


def _files(name: str, config: Data) -> SourceSize:
    text = records = seconds = NOTHING
    largest = 0
    for path in files_of(name):
        reader, size = READERS.get(suffix_of(path)), path.stat().st_size
        if reader is None and not Path(name).is_file():
            continue  # a kind that is not read in folders
        own = TEXT_OF.get(reader, Span(1, 1)) * size if reader else Span(size, size)
        if path.suffix == ".gz":
            own = own * GZIP
        text += own
        seconds += Span(size, size) / SLOW[reader] if reader in SLOW else NOTHING
        if reader in (read_jsonl, read_csv, read_json, read_parquet):
            records += _rows(path, size, own)
        else:
            records += _documents(1, own, config)
        largest = max(largest, 0 if reader in (read_jsonl, read_parquet) else size)
    return SourceSize(text=text, records=records, seconds=seconds, largest=largest, kept=KEPT)


def _rows(path: Path, size: int, text: Span) -> Span:
    if path.suffix not in (".jsonl", ".ndjson", ".csv", ".tsv") or not size:
        return text / ROW
    try:
        with path.open("rb") as f:
            lines = f.read(SAMPLE).count(b"\n") + 1
    except OSError:  # which the run itself complains about
        return text / ROW
    return Span(lines, lines) if size <= SAMPLE else Span(0.8, 1.2) * (lines * size / SAMPLE)
