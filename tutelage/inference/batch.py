"""Whole archives through one engine: rows in as slots free up, results to disk as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tutelage import log
from tutelage.engine import Completion, Engine, Sampling, Sequence
from tutelage.engine.beams import search
from tutelage.engine.protocol import EngineProtocol
from tutelage.errors import ConfigError, DataError, Setting, UserError, with_settings
from tutelage.inference.input_file import InputFile, InputRow
from tutelage.inference.output_file import ResumableOutput
from tutelage.inference.prompts import Prompting, PromptRow
from tutelage.train.hooks import duration


class RowKind(Protocol):
    """What the rows of an archive are, and how they are answered."""

    says: str  # for people

    def check(self, entry: InputRow) -> None:
        """Raises `DataError` for a row that cannot be asked, as far as that is known without the model."""

    def failed(self, entry: InputRow, error: UserError) -> dict[str, Any]:
        """The output row of a row that has no answer."""

    def answer(self, job: Job, engine: EngineProtocol, slots: int) -> None:
        """Answers all rows of `job.todo()`, each with one call of `job.take` or `job.refuse`."""


class Job:
    """The rows of an archive that a part file does not hold yet, and where their results go.

    on_error: "stop" raises at the first row that cannot be answered, "skip" writes it with its error.
    """

    def __init__(self, archive: InputFile, kind: RowKind, part: ResumableOutput, rows: int, on_error: str) -> None:
        self.archive, self.kind, self.part, self.on_error = archive, kind, part, on_error
        self.meter = Meter(rows, part.rows)

    def todo(self) -> Iterator[InputRow]:
        for entry in self.archive.entries():
            if self.part.holds(entry.index):
                continue
            if entry.error is None:
                yield entry
            else:
                self.refuse(entry, entry.error)

    def take(self, entry: InputRow, row: dict[str, Any], prompt_tokens: int, answer_tokens: int) -> None:
        self.part.append(entry.index, row, [prompt_tokens, answer_tokens])
        self.meter.add(answer_tokens)

    def refuse(self, entry: InputRow, error: UserError, row: dict[str, Any] | None = None) -> None:
        """A row without an answer; `row` where its output is known already."""
        if self.on_error == "stop":
            raise located(error, self.archive, entry)
        row = row or self.kind.failed(entry, located(error, self.archive, entry))
        self.part.append(entry.index, row, None)
        self.meter.add(0)


def located(error: UserError, archive: InputFile, entry: InputRow) -> DataError:
    """The error with the row's place, and what can be done about a row among many."""
    skip = Setting("on_error", "skip")
    fix = f"{with_settings(error.fix)}; or {skip}" if error.fix and "on_error" not in error.fix else error.fix
    return DataError(
        error.message, file=archive.path, line=entry.line, field=error.field, found=error.found, expected=error.expected,
        fix=fix or f"mend the row, or {skip} to keep it with its error",
    )  # fmt: skip


def one_line(error: UserError) -> str:
    return "; ".join(" ".join(line.split()) for line in str(error).splitlines())


def check(archive: InputFile, kind: RowKind, on_error: str) -> int:
    """Reads the archive once before a model does, so that the last row's mistake is told at once. Returns the number of rows."""
    count = 0
    for entry in archive.entries():
        count += 1
        if on_error == "skip":
            continue
        try:
            if entry.error is not None:
                raise entry.error
            kind.check(entry)
        except DataError as error:
            raise located(error, archive, entry) from None
    if not count:
        raise DataError("no rows in this file", file=archive.path, expected='a row a line, such as {"prompt": "…"}')
    return count


def row_seed(seed: int, index: int) -> int:
    """Of the noise of row `index`: nothing else in the archive has a say."""
    return (seed << 32) + index


@dataclass(slots=True)
class _Open:
    """A row whose answers are in the making."""

    entry: InputRow
    sequences: list[Sequence]
    left: int  # answers not finished


class Prompts:
    """Rows with a prompt or messages; the output has their own fields and the answer's."""

    def __init__(self, prompting: Prompting, sampling: Sampling, seed: int) -> None:
        self.prompting, self.sampling, self.seed = prompting, sampling, seed
        asks = Setting("chat", "true")
        alone = "asked as a user's message" if prompting.chat else f"continued as text ({asks} asks it as a user's message)"
        self.says = f"messages are answered, a prompt alone is {alone}"

    def check(self, entry: InputRow) -> None:
        self.prompting.ask(entry.fields)

    def failed(self, entry: InputRow, error: UserError) -> dict[str, Any]:
        return {**entry.fields, "error": one_line(error)}

    def answer(self, job: Job, engine: EngineProtocol, slots: int) -> None:
        engine.start()
        if self.sampling.beams > 1:
            self._search(job, engine, slots)
            return
        running: dict[Sequence, _Open] = {}
        todo = job.todo()
        try:
            while True:
                # As many wait as run, so that a slot that frees up is taken at the next step.
                while len(running) < 2 * slots and (entry := next(todo, None)) is not None:
                    running |= self._submit(job, engine, entry)
                if not running:
                    return
                for event in engine.step():
                    if event.finish_reason is not None:
                        row = running.pop(event.sequence)
                        row.left -= 1
                        if not row.left:
                            self._done(job, row.entry, [sequence.completion() for sequence in row.sequences])
        finally:
            for sequence in running:
                engine.cancel(sequence)

    def _search(self, job: Job, engine: EngineProtocol, slots: int) -> None:
        """Beam search, over as many rows as fill the slots a few times."""
        if not isinstance(engine, Engine):
            raise ConfigError("this engine has no beam search", field="beams", found=self.sampling.beams, expected="1")
        todo = job.todo()
        while group := list(islice(todo, max(1, 4 * slots // self.sampling.beams))):
            found = [(entry, first) for entry in group for first in self._asked(job, engine, entry, engine.prepare)]
            answers = iter(search(engine, [first for _, first in found]))
            for entry, _ in found:
                self._done(job, entry, list(islice(answers, self.sampling.n)))

    def _submit(self, job: Job, engine: EngineProtocol, entry: InputRow) -> dict[Sequence, _Open]:
        sequences = self._asked(job, engine, entry, engine.submit, self.sampling.n)
        return dict.fromkeys(sequences, _Open(entry, sequences, len(sequences)))

    def _asked(
        self,
        job: Job,
        engine: EngineProtocol,
        entry: InputRow,
        make: Callable[[list[int], Sampling, int], Sequence],
        count: int = 1,
    ) -> list[Sequence]:
        """The row's sequences, made by `make`; none for a row that cannot be answered."""
        try:
            ids = encode(engine, self.prompting.ask(entry.fields))
            # An answer ends where the context does; a prompt is never cut. An encoder-decoder's prompt takes nothing of it.
            read = engine.model.start if isinstance(engine, Engine) and engine.encodes else ids
            room = max(1, engine.context_length - len(read))
            limit = room if self.sampling.max_tokens is None else min(self.sampling.max_tokens, room)
            sampling = replace(self.sampling, max_tokens=limit, seed=row_seed(self.seed, entry.index))
            return [make(ids, sampling, index) for index in range(count)]
        except DataError as error:
            job.refuse(entry, error)
            return []

    def _done(self, job: Job, entry: InputRow, done: list[Completion]) -> None:
        prompt, made = len(done[0].prompt), sum(len(c.ids) for c in done)
        several = self.sampling.n > 1
        answer = {
            "completions" if several else "completion": [c.text for c in done] if several else done[0].text,
            "finish_reason": [c.finish_reason for c in done] if several else done[0].finish_reason,
            "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
        }
        job.take(entry, {**entry.fields, **answer}, prompt, made)


def encode(engine: EngineProtocol, asked: PromptRow) -> list[int]:
    """Token ids of a row's prompt. Raises `DataError` for messages that the template refuses, `ArtifactError` without one."""
    if asked.tools and asked.chat:
        return list(engine.renderer.prompt(asked.prompt, asked.tools))
    return engine.encode(asked.prompt)


class Meter:
    """Rows done, tokens/s and time left: a live line on a terminal, elsewhere a line every `every` seconds."""

    def __init__(self, rows: int, before: int, every: float = 15.0) -> None:
        self.rows, self.before, self.every = rows, before, every
        self.done = self.tokens = 0
        self.started = self.said_at = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Meter:
        self.started = self.said_at = time.monotonic()
        if log.interactive():
            columns = (TextColumn("rows"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
            self.bar = Progress(*columns, console=log.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("rows", total=self.rows, completed=self.before, text="first rows…")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:  # else the terminal stays without its cursor
            self.bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        if self.bar is not None:
            self.bar.update(self.task, completed=self.before + self.done, text=self.line())
        elif time.monotonic() - self.said_at >= self.every:
            self.said_at = time.monotonic()
            log.say(f"rows {self.line()}")

    def line(self) -> str:
        left = (self.rows - self.before - self.done) * self.seconds / self.done
        return f"{self.before + self.done:,}/{self.rows:,}  {self.tokens / self.seconds:,.0f} tokens/s  {duration(left)} left"
