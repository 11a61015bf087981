"""Collect: read -> clean -> filter -> deduplicate -> split -> write. The mechanism of the `data` stage.

A text is written as it was read, unless a setting asks for a change; each change is counted and written to changed.jsonl.

Pass 1 reads the sources and writes what survives the filters to a spool on disk. Later passes, each only where it is
asked for, work on the spool: lines that many documents share, near-duplicates, text that stands on both sides of the
split. The last pass copies lines. Memory holds one source file, one offset and one id a record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.data.clean import card, dedup, filters, rows_alike, split
from tutelage.data.clean.account import SAMPLES, Account, Changes
from tutelage.data.clean.spool import Spool
from tutelage.data.sources import readers as reading
from tutelage.data.sources.readers import ReadOptions, Row, source_digest
from tutelage.errors import ConfigError, DataError, Setting
from tutelage.files import write_json
from tutelage.records import (
    RECORD_TYPES,
    SCHEMA_VERSION,
    TURNS,
    Conversation,
    Document,
    Example,
    Preference,
    Prompt,
    Rating,
    content_id,
    to_json,
)  # fmt: skip
from tutelage.unicode import HALF, half_character

__all__ = ["collect", "source_digest"]

IN_WORDS = {  # reasons that do not explain themselves
    "no_difference": "whose answers differ in white space only",
    "prompt_in_train": "whose prompt is in the training part too",
    "found_in_train": "whose text is in the training part too",
}
NEAR_THRESHOLD = 0.8  # Jaccard similarity of word 5-grams
CONTAINED = 0.5  # a held-out document with more of its 5-grams than this in the training text is no test
Judged = Document | Conversation | Preference | Rating | Prompt | Example


def collect(
    sources: list[str],
    out: Path,
    *,
    kind: str = "documents",
    validation_share: float = 0.05,
    split: str = "none",
    chunk_chars: int | None = None,
    text_field: str = "text",
    fields: Mapping[str, str] | None = None,
    format: str = "auto",
    encoding: str = "utf-8",
    min_chars: int = 32,
    max_chars: int | None = 10_000_000,
    normalise: str = "none",
    clean: bool = False,
    boilerplate: str = "keep",
    licence: str | None = None,
    dedup: str = "near",
    on_error: str = "stop",
    max_reject_share: float = 0.05,
    seed: int = 0,
    validation_sources: Iterable[str] = (),
) -> dict[str, Any]:
    """Writes a records artifact into the empty folder `out` and returns its card (the facts of the run).

    Files: train.jsonl, validation.jsonl, rejected.jsonl, card.json, schema.json; changed.jsonl where texts were changed.
    The settings are those of `config.stages.Data`.

    Raises `DataError` for input that cannot be used, `ConfigError` for a setting that means nothing.
    """
    if kind not in RECORD_TYPES:
        raise ConfigError("unknown kind of records", field="kind", found=kind, expected=" | ".join(RECORD_TYPES))
    if dedup not in ("none", "exact", "near"):
        raise ConfigError("unknown deduplication", field="dedup", found=dedup, expected="none | exact | near")
    if boilerplate not in ("keep", "drop"):
        raise ConfigError("unknown wish for shared lines", field="boilerplate", found=boilerplate, expected="keep | drop")
    if not sources:
        raise ConfigError("nothing to read", field="sources", expected="a file, a folder, a glob, python-docs: …")
    limits = filters.FilterOptions(min_chars=min_chars, max_chars=max_chars, normalise=normalise)
    options = ReadOptions(
        kind=kind, text_field=text_field, encoding=encoding, split=split, chunk_chars=chunk_chars, seed=seed,
        fields=dict(fields or {}), format=format,
    )  # fmt: skip
    held_out_sources = list(validation_sources)
    report, changes = Account(out / "rejected.jsonl", on_error, max_reject_share), Changes(out / "changed.jsonl")
    work = _Collection(options, limits, report, changes, Spool(out / ".spool.jsonl"), validation_share, dedup)
    work.licence, work.clean, work.drops_lines = licence, clean, boilerplate == "drop" and kind == "documents"
    try:
        for source in sources:
            work.take(str(source), None if not held_out_sources else False)
        for source in held_out_sources:
            work.take(str(source), True)
        if work.own_split and validation_share > 0:
            log.say(f"{work.own_split:,} records come with a split of their own, which stands; validation_share is for others")
        for what, count in report.notes.most_common():
            log.say(f"{count:,} {what}")
        report.check()
        for name, count in report.other_encodings.items():
            log.say(f"files that are not {encoding.partition(',')[0]}, read as {name}: {count:,} ({report.first[name]})")
        work.select(explicit=bool(held_out_sources))
        facts = work.write(out)
    finally:
        work.spool.close()
        report.close()
        changes.close()
    return facts


class _Collection:
    """One run of `collect`: the spool, the ids seen so far, the counts."""

    def __init__(
        self, options: ReadOptions, limits: filters.FilterOptions, report: Account, changes: Changes, spool: Spool,
        share: float, method: str,
    ) -> None:  # fmt: skip
        self.options, self.limits, self.report, self.changes, self.spool = options, limits, report, changes, spool
        self.clean = self.drops_lines = False
        self.licence: str | None = None
        self.share, self.seed, self.dedup = share, options.seed, method
        self.seen: set[int] = set()
        self.kept_keys: Counter[str] = Counter()  # of rows, which are in `meta` and not learnt from
        self.shared_lines = filters.LineCounter()
        self.boilerplate_lines = self.own_split = self.controls = 0
        self.documents = options.kind == "documents"
        split.check_share(share)

    # Pass 1

    def take(self, source: str, held_out: bool | None) -> None:
        """Reads one source into the spool. `held_out=None`: the record's hash decides."""
        found = 0
        for item in reading.read(source, self.options, self.report):
            found += 1
            record = self._record(item)
            if record is None or self._is_half(record, item):
                continue
            if record.licence is None and self.licence:
                record = replace(record, licence=self.licence)
            record = self._cleaned(record)
            if record is None:
                continue
            row, out = to_json(record), held_out
            if out is None or (not out and "split" in record.meta):
                out = split.side(_family_of(row), record.meta, self.share, self.seed) == split.VALIDATION
                self.own_split += record.meta.get("split") in (split.TRAIN, split.VALIDATION)
            self.spool.append(row, held_out=out)
        if not found:
            raise DataError("this source gave nothing to learn from", file=source,
                            found=_counted(self.report), fix=_way_out(self.report))  # fmt: skip

    def _record(self, item: Row | Document | Conversation | Example) -> Judged | None:
        """The record of an item, or None after it was counted as broken."""
        from tutelage.data.sources import conversations, feedback, labelled, row_keys

        options = self.options
        if not isinstance(item, Row):
            asks = options.kind == "prompts" and isinstance(item, Conversation)
            return Prompt.of(item) if asks else item  # type: ignore[arg-type]
        name = None if options.format == "auto" else options.format
        where: dict[str, Any] = {"file": item.file, "line": item.line, "source": item.source, "fields": options.fields or None}
        try:
            if options.kind == "examples":
                return labelled.read(item.fields, **where)
            if options.kind == "conversations":
                record: Judged = conversations.to_conversation(item.fields, fmt=name, **where)
            else:
                record = feedback.read(options.kind, item.fields, **where)
        except DataError as error:
            self.report.broken(error, source=item.source, excerpt=json.dumps(item.fields, ensure_ascii=False, default=str))
            return None
        self.kept_keys.update(row_keys.kept_keys(item.fields, record.meta))
        return record

    def _is_half(self, record: Judged, item: Row | Document | Conversation | Example) -> bool:
        """Whether the record holds text that no later stage could write or tokenize; it was counted as broken then."""
        at = half_character(to_json(record))
        if at is None:
            return False
        row = item.fields if isinstance(item, Row) else {}
        field = half_character({k: v for k, v in row.items() if k in self.options.fields.values()}) or half_character(row) or at
        field = self.options.text_field if self.documents and at == "text" else field
        file, _, place = record.source.rpartition("#") if "#" in record.source else (record.source, "", "")
        error = DataError(
            HALF, file=file, line=int(place) if place.isdigit() else None, field=field, expected="valid Unicode",
            fix="write the row as valid Unicode: \\ud83d alone is half of an escape such as \\ud83d\\ude00",
        )  # fmt: skip
        self.report.broken(error, source=record.source, excerpt=_text_of(to_json(record)))
        return True

    def _cleaned(self, record: Judged) -> Judged | None:
        """The record as it will be written, or None after it was counted as left out."""
        if isinstance(record, Document):
            text, done = filters.tidied(record.text, self.limits.normalise, clean_layout=self.clean)
            reason = filters.reason_against(text, self.limits)
            if reason is None:
                for what in done:
                    self.changes.add(what, source=record.source, before=record.text, after=text)
            if done:
                record = replace(record, id=content_id(text), text=text)
        else:
            text = _text_of(to_json(record))
            reason = "too_long" if self.limits.max_chars is not None and len(text) > self.limits.max_chars else None
            if isinstance(record, Preference) and _same_but_for_layout(record):
                reason = "no_difference"
        self.controls += not text.isascii() and filters.C1_CONTROLS.search(text) is not None
        if reason is None and self.dedup != "none" and not self._new(record.id):
            reason = "duplicate"
        if reason is not None:
            self._leave_out(reason, record.source, text)
            return None
        if self.drops_lines:
            self.shared_lines.add(text)
        return record

    def _new(self, record_id: str) -> bool:
        number, before = int(record_id, 16), len(self.seen)
        self.seen.add(number)
        return len(self.seen) > before

    def _leave_out(self, reason: str, source: str, text: str) -> None:
        file, _, place = source.partition("#")
        line = int(place) if place.isdigit() else None
        self.report.add(reason, source=source, file=file, line=line, excerpt=text)

    # Later passes

    def select(self, *, explicit: bool) -> None:
        """Marks what the passes over the spool leave out, and sees to it that both sides have something."""
        if self.drops_lines and (unwanted := self.shared_lines.boilerplate()):
            self._strip(unwanted)
        if self.dedup == "near":
            self._drop_near()
        if not any(self.spool.alive):
            fix = self._mend() or "look at the reasons: lower min_chars, or give more text"
            raise DataError("nothing is left after filtering", found=_counted(self.report), fix=fix)
        if self.share > 0 and not explicit:
            self._hold_out_one()
        if self.dedup != "none":
            self._drop_known()
        for held_out, name in ((False, "training"), (True, "validation")):
            wanted = explicit or self.share > 0 if held_out else True
            if wanted and not any(a and h == held_out for a, h in zip(self.spool.alive, self.spool.held_out, strict=True)):
                cut = f"cut long texts ({Setting('chunk_chars', '4000')})"
                fixes = [cut if self.documents else self._mend(), "give more data"]
                none = f", or set {Setting('validation_share', '0')}" if held_out and not explicit else ""
                fix = ", ".join(f for f in fixes if f) + none
                found = f"{sum(self.spool.alive)} records; {_counted(self.report)}"
                raise DataError(f"nothing is left for the {name} part", found=found, fix=fix)

    def _mend(self) -> str:
        """What would keep rows that were left out because their answers do not differ."""
        return "let answers differ in more than white space" if self.report.reasons["no_difference"] else ""

    def _strip(self, unwanted: frozenset[str]) -> None:
        """Takes boilerplate lines out of every document; a changed document passes the filters again."""
        old = self.spool
        new = Spool(old.path.with_name(".spool2.jsonl"))
        self.seen.clear()
        for i, line in old.lines():
            row = json.loads(line)
            text, gone = filters.without_lines(row["text"], unwanted)
            held_out = bool(old.held_out[i])
            if gone:
                self.boilerplate_lines += gone
                self.changes.add("shared lines taken out", source=row["source"], before=row["text"], after=text)
                reason = filters.reason_against(text, self.limits)
                if reason:
                    self._leave_out(reason, row["source"], text)
                    continue
                row["text"] = text
                row["id"] = content_id(text)
            if self.dedup != "none" and not self._new(row["id"]):
                self._leave_out("duplicate", row["source"], text)
                continue
            new.append(row, held_out=held_out)
        old.close()
        self.spool = new

    def _drop_near(self) -> None:
        """Leaves out near-duplicates of an earlier record."""
        if not self.documents:
            numbers = [i for i, line in self.spool.lines() if rows_alike.long_enough(json.loads(line))]
            for i in rows_alike.near_rows(numbers, self.spool.row, NEAR_THRESHOLD):
                self._kill(i, "near_duplicate")
            return
        numbers = [i for i, _ in self._texts()]
        keys = dedup.band_keys(text for _, text in self._texts())
        twins = dedup.near_duplicates(keys, lambda n: _text_of(self.spool.row(numbers[n])), NEAR_THRESHOLD)
        for n in twins:
            self._kill(numbers[n], "near_duplicate")

    def _drop_known(self) -> None:
        """Leaves out of the validation part what the training part holds: over half the 5-grams, or the same prompt."""
        held = [(i, json.loads(line)) for i, line in self.spool.lines(held_out=True)]
        if self.documents:
            if self.dedup != "near":
                return
            train = (text for _, text in self._texts(held_out=False))
            shares = dedup.found_elsewhere([row["text"] for _, row in held], train)
            for (i, _), share in zip(held, shares, strict=True):
                if share > CONTAINED:
                    self._kill(i, "found_in_train")
            return
        prompts = {_prompt_of(row) for _, row in held}
        known = {p for _, line in self.spool.lines(held_out=False) if (p := _prompt_of(json.loads(line))) in prompts}
        for i, row in held:
            if _prompt_of(row) in known:
                self._kill(i, "prompt_in_train")

    def _hold_out_one(self) -> None:
        """A small collection may hash to no held-out record at all: the one with the smallest position is held out then."""
        alive = [i for i in range(len(self.spool)) if self.spool.alive[i]]
        if len(alive) > 1 and not any(self.spool.held_out[i] for i in alive):
            keys = {i: _family_of(self.spool.row(i)) for i in alive}
            first = min(keys.values(), key=lambda key: split.position(key, self.seed))
            chosen = [i for i, key in keys.items() if key == first]
            if len(chosen) < len(alive):
                for i in chosen:
                    self.spool.held_out[i] = 1

    def _texts(self, held_out: bool | None = None) -> Iterator[tuple[int, str]]:
        for i, line in self.spool.lines(held_out=held_out):
            yield i, _text_of(json.loads(line))

    def _kill(self, i: int, reason: str) -> None:
        row = self.spool.row(i)
        self.spool.alive[i] = 0
        self._leave_out(reason, row["source"], _text_of(row))

    # Last pass

    def write(self, out: Path) -> dict[str, Any]:
        """Writes the artifact's files and returns the card."""
        counts = card.CardCounts()
        for name, held_out in (("train", False), ("validation", True)):
            with (out / f"{name}.jsonl").open("wb", buffering=1 << 20) as f:
                for _, line in self.spool.lines(held_out=held_out):
                    f.write(line)
                    row = json.loads(line)
                    counts.add(row, _text_of(row), name)
        facts = counts.card(
            rejected=dict(self.report.reasons.most_common()),
            left_out=self.report.summary(),
            offered=self.report.seen,
            changed_by_readers=dict(self.report.notes.most_common()),
            changed=self.changes.summary(),
            boilerplate_lines_removed=self.boilerplate_lines,
            boilerplate_lines=[{"line": line, "documents": n} for line, n in self.shared_lines.most_shared(SAMPLES)],
            texts_with_c1_controls=self.controls,
            kept_in_meta=dict(self.kept_keys.most_common()),
            unknown_suffixes=dict(self.report.unknown_suffixes.most_common()),
            settings={"kind": self.options.kind, "normalise": self.limits.normalise, "clean": self.clean,
                      "boilerplate": "drop" if self.drops_lines else "keep", "dedup": self.dedup,
                      "min_chars": self.limits.min_chars, "max_chars": self.limits.max_chars, "validation_share": self.share,
                      "chunk_chars": self.options.chunk_chars, "split": self.options.split, "seed": self.seed},
        )  # fmt: skip
        write_json(out / "card.json", facts)
        write_json(out / "schema.json", {"type": RECORD_TYPES[self.options.kind], "version": SCHEMA_VERSION})
        self.spool.close()
        return facts


def _same_but_for_layout(record: Preference) -> bool:
    """Whether the answers differ in nothing but the white space at ends of lines, which teaches nothing."""
    chosen, rejected = (
        [replace(m, content=filters.clean(m.content)) for m in turns] for turns in (record.chosen, record.rejected)
    )
    return chosen == rejected


def _turns_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for name in TURNS if isinstance(row.get(name), list) for m in row[name]]


def _text_of(row: dict[str, Any]) -> str:
    return str(row["text"]) if "text" in row else "\n".join(_said(m) for m in _turns_of(row))


def _said(message: dict[str, Any]) -> str:
    thought = message.get("reasoning_content")
    return f"{thought}\n{message['content']}" if thought else str(message["content"])


def _prompt_of(row: dict[str, Any]) -> str:
    """What is answered, in lower case and single spaces: of a conversation, everything before its last turn."""
    if "text" in row:
        return " ".join(f"{row['text']} {row.get('pair', '')}".lower().split())
    if isinstance(row.get("prompt"), list):
        turns = row["prompt"]
    else:
        turns = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    return " ".join(" ".join(f"{m['role']}: {m['content']}" for m in turns).lower().split())


def _family_of(row: dict[str, Any]) -> str:
    """What stays on one side of the split: a source's family, a prompt with all its answers, or one document."""
    family = row.get("meta", {}).get("family")
    if family:
        return str(family)
    return str(row["id"]) if "text" in row else content_id(_prompt_of(row))


def _way_out(report: Account) -> str:
    if report.errors:
        return f"mend its rows: run with {Setting('on_error', 'stop')} to see what is wrong with the first"
    return "check that it holds text in a format that is read"


def _counted(report: Account) -> str:
    """What was left out and why, with the place of the first of each."""
    said = [f"{n} {IN_WORDS.get(why, why)} ({report.first[why]})" for why, n in report.reasons.most_common(6)]
    return ", ".join(said) or "no rejected rows"
