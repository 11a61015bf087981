"""`tutelage generate`: whole files answered in order, resumable, with the answers that the engine gives."""

from __future__ import annotations

import gzip
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.guarantees.test_errors import disk  # noqa: F401 (a fixture)
from tests.pipeline import environment, tutelage
from tutelage import api, log
from tutelage.config.spec import hyphens
from tutelage.config.stages import Generate
from tutelage.engine import Engine, Sampling
from tutelage.errors import ConfigError, DataError, StorageError
from tutelage.inference.batch import Meter, row_seed
from tutelage.inference.input_file import InputFile
from tutelage.inference.output_file import ResumableOutput

Capture = pytest.CaptureFixture[str]
ROWS = [{"id": i, "prompt": f"the cat {i} sat {'on the mat ' * (i % 5)}"} for i in range(40)]
HOW: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "seed": 5, "slots": 4}


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(model: Path, tmp_path: Path, source: Path, **settings: Any) -> list[dict[str, Any]]:
    """The output of one run into a new file."""
    output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.jsonl"
    api.generate(model=model, input=source, output=output, **settings)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(output.name + ".")]
    return read(output)


def expected(engine: Engine, prompts: Sequence[Any], **how: Any) -> list[str]:
    """What the engine answers to each prompt with the seed of its row."""
    settings = {"max_tokens": 12, "temperature": 1.2, **how}
    wanted = [Sampling(**settings, seed=row_seed(5, i)) for i in range(len(prompts))]
    return [c.text for c in engine.generate(prompts, wanted)]


def test_the_answers_are_the_engines_in_the_order_of_the_rows(model: Path, engine: Engine, tmp_path: Path) -> None:
    """Answers in the order in which they ended, of another seed than their row's, or without the row's own fields."""
    source = write(tmp_path / "in.jsonl", ROWS)
    got = answers(model, tmp_path, source, **HOW)
    assert [row["completion"] for row in got] == expected(engine, [row["prompt"] for row in ROWS])
    ended = answers(model, tmp_path, source, **HOW, stop=["a", "e"])  # some answers end long before those that began with them
    assert [row["completion"] for row in ended] == expected(engine, [row["prompt"] for row in ROWS], stop=("a", "e"))
    assert [{k: row[k] for k in ("id", "prompt")} for row in got] == ROWS and len({r["completion"] for r in got}) > 30
    assert {row["finish_reason"] for row in got} <= {"stop", "length"}
    assert all(row["usage"]["prompt_tokens"] == len(engine.encode(row["prompt"])) for row in got)
    assert {row["usage"]["completion_tokens"] for row in got if row["finish_reason"] == "length"} == {12}
    assert got == answers(model, tmp_path, source, **{**HOW, "slots": 1})
    assert got != answers(model, tmp_path, source, **{**HOW, "seed": 6})


def test_chats_systems_templates_and_columns(model: Path, engine: Engine, tmp_path: Path) -> None:
    """A setting that is taken and not done: the prompt the model sees is not the one asked for."""
    user, system = {"role": "user", "content": "the cat"}, {"role": "system", "content": "one two"}
    text = write(tmp_path / "text.jsonl", [{"prompt": "the cat", "name": "cat", "count": 2}])
    chats = write(tmp_path / "chats.jsonl", [{"messages": [user]}])
    cases: list[tuple[Path, dict[str, Any], Any]] = [
        (text, {}, "the cat"),
        (text, {"chat": True}, [user]),
        (text, {"system": "one two"}, [system, user]),
        (text, {"column": "name"}, "cat"),
        (text, {"prompt_template": "{{{count}}} {name}s sat"}, "{2} cats sat"),
        (chats, {}, [user]),
        (chats, {"column": "messages", "system": "one two"}, [system, user]),
    ]
    for source, settings, prompt in cases:
        (row,) = answers(model, tmp_path, source, **HOW, **settings)
        assert [row["completion"]] == expected(engine, [prompt]) and row["usage"]["prompt_tokens"] == len(engine.encode(prompt))


def test_tools_reach_the_template(model: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools that a row offers and the model never sees."""
    from tutelage.chat.render import Renderer

    tools = [{"type": "function", "function": {"name": "meow", "parameters": {}}}]
    seen: list[Any] = []
    prompt = Renderer.prompt
    monkeypatch.setattr(Renderer, "prompt", lambda self, turns, tools=None: (seen.append(tools), prompt(self, turns))[1])
    answers(model, tmp_path, write(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "x"}], "tools": tools}]))
    assert tools in seen


def test_several_answers_and_stop_texts(model: Path, engine: Engine, tmp_path: Path) -> None:
    """n answers that are one answer n times, or that lose one."""
    source = write(tmp_path / "in.jsonl", ROWS[:5])
    got = answers(model, tmp_path, source, **HOW, n=3)
    want = [
        engine.generate([row["prompt"]], Sampling(12, temperature=1.2, n=3, seed=row_seed(5, i)))
        for i, row in enumerate(ROWS[:5])
    ]
    assert [row["completions"] for row in got] == [[c.text for c in group] for group in want]
    assert [row["finish_reason"] for row in got] == [[c.finish_reason for c in group] for group in want]
    assert got[0]["usage"]["completion_tokens"] == sum(len(c.ids) for c in want[0]) and "completion" not in got[0]
    stop = next(t for t in (row["completions"][0] for row in got) if len(t) > 4)[2:4]
    ended = answers(model, tmp_path, source, **HOW, stop=stop)
    assert not any(stop in row["completion"] for row in ended) and any(row["finish_reason"] == "stop" for row in ended)


def test_beams(model: Path, engine: Engine, tmp_path: Path) -> None:
    """A search that is greedy, whose answers go to other rows, or that one bad row ends."""
    rows: list[dict[str, Any]] = [*ROWS[:9], {"id": 9, "prompt": "cat " * 300}, *ROWS[10:14]]
    how = {"length_penalty": 0.5, "no_repeat_ngram": 2, "n": 2}
    source = write(tmp_path / "in.jsonl", rows)
    got = answers(model, tmp_path, source, max_tokens=12, slots=7, beams=3, on_error="skip", **how)
    assert "longer than the context" in got.pop(9)["error"]
    prompts = [row["prompt"] for row in rows[:9] + rows[10:]]
    want = engine.generate(prompts, Sampling(12, beams=3, **how))
    assert [text for row in got for text in row["completions"]] == [c.text for c in want]
    assert [row["id"] for row in got] == [*range(9), *range(10, 14)]
    assert [row["completions"][0] for row in got] != [c.text for c in engine.generate(prompts, Sampling(12, temperature=0))]


def test_every_format_of_input(model: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that must be converted first; a blank line or a byte-order mark that is a prompt; standard input not read."""
    import pyarrow
    import pyarrow.parquet

    texts = ["the cat sat", "naïve café", "one, two"]
    rows = [{"ask": text} for text in texts]
    lines = "\n\n".join(texts).replace("\n\n", "\r\n \n", 1)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.csv").write_text('ask\nthe cat sat\nnaïve café\n"one, two"\n', encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    want = expected(engine, texts)
    for name in ("a.txt", "a.csv", "a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"):
        settings = {} if name == "a.txt" else {"column": "ask"}
        assert [r["completion"] for r in answers(model, tmp_path, tmp_path / name, **HOW, **settings)] == want, name
    for name, settings in (("a.jsonl", {"column": "ask"}), ("a.txt", {})):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((tmp_path / name).read_bytes())))
        assert [r["completion"] for r in answers(model, tmp_path, Path("-"), **HOW, **settings)] == want


def test_rows_are_read_as_slots_free_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that is held in memory; slots that wait until a whole batch has ended."""
    source = write(tmp_path / "in.jsonl", ROWS)
    ahead, sizes = [], []
    pulled = kept = 0
    entries, append, step = InputFile.entries, ResumableOutput.append, Engine.step

    def counted(self: InputFile) -> Iterator[Any]:
        nonlocal pulled
        pulled = 0
        for entry in entries(self):
            pulled += 1
            yield entry

    def appended(self: ResumableOutput, *result: Any) -> None:
        nonlocal kept
        kept += 1
        ahead.append(pulled - kept)
        append(self, *result)

    def stepped(self: Engine) -> Any:
        events = step(self)
        sizes.append(len(events))
        return events

    monkeypatch.setattr(InputFile, "entries", counted)
    monkeypatch.setattr(ResumableOutput, "append", appended)
    monkeypatch.setattr(Engine, "step", stepped)
    answers(model, tmp_path, source, **HOW)
    assert len(ahead) == 40 and max(ahead) < 2 * HOW["slots"]
    assert sum(sizes) / len(sizes) > 0.8 * HOW["slots"]


DYING = """
import os, signal, sys
from tutelage.cli import main as cli
from tutelage.inference.output_file import ResumableOutput
append, left = ResumableOutput.append, {count}
def dying(self, *result):
    global left
    left -= 1
    if not left:
        if {torn}:
            self.file.write(b'{{"row": 39, "tokens": [1')
            self.file.flush()
        os.kill(os.getpid(), {signal})
    append(self, *result)
ResumableOutput.append = dying
sys.argv = ["tutelage", *{words!r}]
cli.main()
"""


def die(words: Sequence[object], count: int, how: signal.Signals, torn: bool) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that gets a signal before its `count`th result is kept, or half-way through it."""
    code = DYING.format(count=count, torn=torn, signal=int(how), words=[str(w) for w in words])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)


def line(model: Path, source: Path, output: Path, **more: Any) -> list[object]:
    options = [x for k, v in {**HOW, **more}.items() for x in (f"--{k}", v)]
    return ["generate", model, source, "-o", output, *options]


def test_killed_again_and_again_and_resumed_is_never_killed(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """Work lost to kill -9 or Ctrl-C; half a line taken for a result; an output that is there before it is whole."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    straight = tmp_path / "straight.jsonl"
    assert tutelage(capsys, *line(model, source, straight)).out == f"{straight}\n"
    killed = die(line(model, source, output), 11, signal.SIGKILL, torn=True)
    assert killed.returncode == -signal.SIGKILL and not output.exists()
    stopped = die(line(model, source, output), 9, signal.SIGINT, torn=False)
    assert stopped.returncode == 130 and "10 of them there already" in stopped.stderr, stopped.stderr
    assert "interrupted after 18 rows; the same command goes on" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not output.exists()
    said = tutelage(capsys, *line(model, source, output, slots=3))  # as many slots as one likes
    assert said.code == 0 and "18 of them there already" in said.err and said.out == f"{output}\n", said.err
    assert output.read_bytes() == straight.read_bytes()
    assert "40 rows, " in said.err and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "straight.jsonl"]


def test_killed_before_the_last_rename(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that had all answers, and makes them again; the half-written file that stays for ever."""
    source, output = write(tmp_path / "in.jsonl", ROWS[:6]), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(ResumableOutput, "finish", lambda self, rows: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            api.generate(model=model, input=source, output=output, **HOW)
    (tmp_path / ".out.jsonl.partial-1").write_text("{")
    monkeypatch.setattr(Engine, "step", lambda self: pytest.fail("a row was answered again"))
    facts = api.generate(model=model, input=source, output=output, **HOW)
    assert facts["rows"] == len(read(output)) == 6 and facts["prompt_tokens"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_is_there_of_something_else_is_not_gone_on_with(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """Half the answers of one temperature, half of another; a finished file that is overwritten."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    die(line(model, source, output), 5, signal.SIGKILL, torn=False)
    for more, says in (({"temperature": 0.5}, "temperature was 1.2, is 0.5"), ({"seed": 6}, "seed was 5, is 6")):
        said = tutelage(capsys, *line(model, source, output, **more))
        assert said.code == 2 and says in said.err and "--force" in said.err and f"{output}.part" in said.err, said.err
    write(source, ROWS[1:])
    said = tutelage(capsys, *line(model, source, output))
    assert said.code == 2 and "found:    another input" in said.err and not output.exists()
    said = tutelage(capsys, *line(model, source, output), "--force")
    assert said.code == 0 and [row["id"] for row in read(output)] == list(range(1, 40))
    said = tutelage(capsys, *line(model, source, output))
    assert said.code == 2 and "there already" in said.err and "--force" in said.err
    assert tutelage(capsys, *line(model, source, source), "--force").code == 2 and len(read(source)) == 39


def test_progress_says_rows_speed_and_time_left(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours without a sign; a time left that counts rows of an earlier attempt as if they had just been made."""
    monkeypatch.setattr(log, "interactive", lambda: False)
    now = iter([0.0, 0.0, *[10.0] * 8])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Meter(rows=1200, before=1000, every=5.0) as meter:
        meter.started = 0.0
        meter.done, meter.tokens = 49, 4900
        meter.add(100)
    assert "rows 1,050/1,200  500 tokens/s  30s left" in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    """Results of two processes mixed, each row twice."""
    with ResumableOutput(tmp_path / "out.jsonl", {"seed": 0}), pytest.raises(StorageError, match="another process"):
        ResumableOutput(tmp_path / "out.jsonl", {"seed": 0})
    ResumableOutput(tmp_path / "out.jsonl", {"seed": 0}).file.close()


def test_a_full_disk_leaves_a_run_to_go_on_with(model: Path, disk: Path, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """A traceback for a full disk, and hours of answers lost."""
    rows = [{**row, "long": "x" * 3000} for row in ROWS]
    source, output = write(tmp_path / "in.jsonl", rows), disk / "out.jsonl"
    said = tutelage(capsys, *line(model, source, output))
    assert said.code == 2 and "the disk is full" in said.err and "--output" in said.err and "Traceback" not in said.err
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    said = tutelage(capsys, *line(model, source, output))
    assert said.code == 0 and "of them there already" in said.err
    assert [{k: row[k] for k in rows[0]} for row in read(output)] == rows


USER, SAID = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BAD: list[tuple[object, dict[str, Any], tuple[str, ...]]] = [
    ("{", {}, ("in.jsonl:3: not valid JSON", "found:    {")),
    ("[1]", {}, ("in.jsonl:3: a row must be a JSON object",)),
    ({"text": "x"}, {}, ("in.jsonl:3: the row has neither `prompt` nor `messages`", "found:    fields text", "--column")),
    ({"prompt": "x", "messages": [USER]}, {}, ("in.jsonl:3: the row has both", "--column")),
    ({"prompt": 3}, {}, ("in.jsonl:3: not a prompt", "field:    prompt", "found:    3")),
    ({"prompt": "\ud83d"}, {}, ("in.jsonl:3: half a character", "field:    prompt")),
    ({"prompt": "x", "completion": "mine"}, {}, ("in.jsonl:3: the row has a field `completion`", "rename")),
    ({"messages": [USER, SAID]}, {}, ("in.jsonl:3: the conversation ends with the assistant", "messages[1].role")),
    ({"messages": [{"role": "bot", "content": "x"}]}, {}, ("in.jsonl:3: unknown role", "messages[0].role")),
    ({"messages": [{"role": "system", "content": "x"}, USER]}, {"system": "y"}, ("in.jsonl:3: the row has a system prompt",)),
    ({"prompt": "the cat " * 300}, {}, ("in.jsonl:3: the prompt and the answer asked for are longer", "expected: at most 256")),
]


@pytest.mark.parametrize(("row", "settings", "says"), BAD, ids=[says[0].partition(": ")[2] for _, _, says in BAD])
def test_bad_rows_are_named_or_kept_with_their_error(
    model: Path, tmp_path: Path, row: object, settings: dict[str, Any], says: tuple[str, ...]
) -> None:
    """An archive of a million rows that fails without saying at which; a row that is left out without a word."""
    source, output = write(tmp_path / "in.jsonl", [ROWS[0], "", row, ROWS[1]]), tmp_path / "out.jsonl"
    with pytest.raises(DataError) as caught:
        api.generate(model=model, input=source, output=output, **HOW, **settings)
    assert all(text in str(caught.value) for text in says) and "on_error=skip" in str(caught.value), caught.value
    facts = api.generate(model=model, input=source, output=output, on_error="skip", **HOW, **settings)
    first, bad, last = read(output)
    assert facts["rows"] == 3 and facts["errors"] == 1 and says[0].partition(": ")[2] in bad["error"]
    assert "error" not in first and first["completion"] and last["completion"] and "usage" not in bad
    assert not isinstance(row, dict) or {k: bad[k] for k in row if k != "error"} == row


def test_settings_that_mean_nothing(model: Path, tmp_path: Path) -> None:
    """A misspelt field, or a template without one, that gives every row the same prompt."""
    source, output = write(tmp_path / "in.jsonl", [{"prompt": "x", "name": "y"}]), tmp_path / "out.jsonl"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt_template": "Describe {nme}"}, "did you mean `name`?"),
        ({"prompt_template": "Describe it"}, "names no field"),
        ({"prompt_template": "Describe {name.x"}, "not a template"),
        ({"prompt_template": "{name!r}"}, "plain names"),
        ({"prompt_template": "{name}", "column": "name"}, "exclude each other"),
        ({"temprature": 1}, "did you mean `temperature`?"),
        ({"top_p": 2}, "field:    top_p"),
        ({"n": 0}, "`n` has a value"),
        ({"input": tmp_path / "none.jsonl"}, "no such file"),
        ({"input": write(tmp_path / "empty.jsonl", [""])}, "no rows in this file"),
        ({"input": write(tmp_path / "page.html", ["<p>"])}, "prompts are not read from such a file"),
        ({"output": tmp_path}, "the output is a folder"),
    ]
    for settings, says in cases:
        with pytest.raises((ConfigError, DataError)) as caught:
            api.generate(**{"model": model, "input": source, "output": output, **settings})
        assert says in str(caught.value), caught.value
    assert not list(tmp_path.glob("out*"))


def test_dry_run_checks_and_writes_nothing(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """A plan that makes files, or that does not see a row that would fail."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    said = tutelage(capsys, *line(model, source, output), "--dry-run")
    assert said.code == 0 and "40 rows: " in said.err and "temperature: 1.2\n" in said.out and not list(tmp_path.glob("out*"))
    write(source, [*ROWS, {"promt": "x"}])
    said = tutelage(capsys, *line(model, source, output), "--dry-run")
    assert said.code == 2 and f"{source}:41:" in said.err and not list(tmp_path.glob("out*"))


def test_help_lists_every_setting_and_imports_nothing_heavy(capsys: Capture) -> None:
    """A setting that only the source knows; a help page that takes seconds."""
    page = tutelage(capsys, "generate", "--help", columns=200).out
    assert all(f" --{hyphens(key)} " in page or f" {key} " in page for key in Generate.model_fields)
    code = (
        "import sys; sys.argv = ['tutelage', 'generate', '--help']\nfrom tutelage.cli.main import main\n"
        "try: main()\nexcept SystemExit: print(sorted({'torch', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_lines_of_text_are_rows_whatever_ends_them(tmp_path: Path) -> None:
    """A file of an old Mac was one row; U+2028 is a character."""
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.txt").write_bytes(end.join(["One\u2028two", "", "Three"]).encode())
        found = [(e.line, e.fields["prompt"]) for e in InputFile(tmp_path / "a.txt").entries()]
        assert found == [(1, "One\u2028two"), (3, "Three")]


def test_what_a_reader_leaves_out_is_said_once(tmp_path: Path, capsys: Capture) -> None:
    """The input is read several times; a column that goes without a word is worse."""
    (tmp_path / "a.csv").write_text(",prompt\n0,One\n1,Two\n")
    archive = InputFile(tmp_path / "a.csv")
    assert [[e.fields for e in archive.entries()] for _ in range(2)] == [[{"prompt": "One"}, {"prompt": "Two"}]] * 2
    said = capsys.readouterr()
    assert (said.out + said.err).count("2 cells under no column name left out") == 1
