"""Schemas, patterns and grammars made to hurt: each is refused by name or its answer ends, and nobody else waits for it."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import small
from tests.serve.running import Running
from tutelage.engine import Engine, Sampling
from tutelage.serve.app import create_app
from tutelage.structured.grammar import Constraint, Grammar, GrammarCompiler
from tutelage.structured.json_schema import prepare

NAME, SECONDS, TOKENS = "tiny", 1.0, 12
PATIENCE = 200  # seconds after which something hangs
JSON = {"content-type": "application/json"}


def levels(count: int, keyword: str = "items") -> Any:
    schema: Any = {"type": "null"}
    for _ in range(count):
        schema = {keyword: schema}
    return schema


def branches(depth: int, width: int = 3) -> Any:
    return {"type": "null"} if depth == 0 else {"anyOf": [branches(depth - 1, width) for _ in range(width)]}


def chain(count: int) -> Any:
    """Definitions of which each requires the next: the last one first, which is the worst order to find an end in."""
    inner = [{"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}, "required": ["a"]} for i in range(count)]
    return {"$ref": "#/$defs/0", "$defs": {str(i): one for i, one in enumerate([*inner, {"type": "null"}])}}


SCHEMAS: dict[str, Any] = {
    "900 levels": levels(900),
    "30 levels": levels(30),
    "100,000 values": {"enum": list(range(100_000))},
    "1,500 long values": {"enum": ["x" * 30 + str(i) for i in range(1500)]},
    "a cycle of references": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "a reference to itself among others": {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}, {"type": "null"}]},
    "a chain of 240 references": chain(240),
    "243 branches": branches(5),
    "20,000 branches": branches(9),
    "combined branches": {
        "allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(6)]} for i in range(12)]
    },
    "400 properties of anything": {"properties": {f"p{i}": {} for i in range(400)}},
    "a billion items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "nested thousands": {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": levels(2)}},
    "a billion characters": {"type": "string", "minLength": 10**9},
    "10^12 characters": {"type": "string", "maxLength": 10**12},
    "multiples of large primes": {
        "allOf": [{"type": "integer", "multipleOf": 99991}, {"multipleOf": 99989}, {"multipleOf": 1.5}]
    },
    "one large prime": {"type": "integer", "multipleOf": 999_999_937, "minimum": 0},
    "all of 59 patterns": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 60)]},
    "nothing at all": {},
    "huge numbers": {"type": "number", "minimum": -1e308, "maximum": 1e308},
    "five megabytes": {"description": "x" * 5_000_000, "type": "null"},
}
OTHERS: dict[str, tuple[str, str]] = {
    "(a+)+": ("regex", "(a+)+b"),
    "repeats of repeats": ("regex", "(a{1000}){1000}"),
    "an exponential automaton": ("regex", "(a|b)*a(a|b){200}"),
    "optional and then required": ("regex", "(a?){5000}a{5000}"),
    "30,000 groups": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "30,000 stars": ("regex", "a" + "*" * 30_000),
    "letters of all scripts": ("regex", r"(\w{100}\p{L}{100}){40}"),
    "an ambiguous left recursion": ("grammar", 'start: e\ne: e e | e e e | "a" | e "b" e |'),
    "a rule that is itself": ("grammar", 'start: a\na: a | b\nb: b | a | "x"'),
    "rules that double": (
        "grammar",
        "\n".join(["start: r0", *(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(2000)), 'r2000: "x"']),
    ),
    "repeats of a terminal": ("grammar", "start: A\nA: /a{1000}/{1000}"),
    "a billion repeats": ("grammar", "start: /(((a{1000}){1000}){1000})/"),
    "a trillion repeats of a rule": ("grammar", 'start: ((("a"{1000}){1000}){1000}){1000}'),
    "an intersection and a complement": ("grammar", "start: A\nA: /.*a.{100}/ & /.*b.{100}/ & ~/.*c.{100}/"),
    "a schema behind a grammar": ("grammar", 'start: %json {"type": "string", "pattern": "(((a{1000}){1000}){1000})"}'),
    "half a surrogate": ("regex", "\ud800"),
}


class Pinger:
    """Another client, who asks for two tokens again and again. Latency is in processor time of this process, in which the server
    runs: what keeps others waiting takes it, and a machine that does other things does not."""

    def __init__(self, url: str) -> None:
        self.slowest, self.count, self._over = 0.0, 0, threading.Event()
        self._client = httpx.Client(base_url=url, timeout=PATIENCE)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.process_time()
            reply = self._client.post("/v1/completions", json={"model": NAME, "prompt": "the cat", "max_tokens": 2})
            assert reply.status_code == 200
            self.slowest, self.count = max(self.slowest, time.process_time() - began), self.count + 1

    def stop(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    made = small.engine(tmp_path_factory.mktemp("hostile") / "t", context=256, slots=4)
    vocabulary, encode = made.vocabulary, made.renderer.tokenizer.encode_text
    assert vocabulary is not None
    made.codec.grammars = functools.cache(
        lambda: GrammarCompiler(vocabulary, made.codec.ends, made.vocab_size, encode, seconds=SECONDS)
    )
    return made


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Running]:
    started = Running(create_app(engine, engine.renderer, NAME, max_body=8 << 20))
    yield started
    started.close()


@pytest.fixture(scope="module")
def others(running: Running) -> Iterator[Pinger]:
    pinger = Pinger(running.url)
    yield pinger
    pinger.stop()


def resident_mb() -> float:
    file = Path("/proc/self/status")
    return float(file.read_text().split("VmRSS:")[1].split()[0]) / 1024 if file.exists() else 0.0


def ends_well(running: Running, asked: dict[str, Any], param: str | None) -> None:
    """400 naming `param` (None: the body is no JSON), or an answer of at most TOKENS tokens; in bounded time and memory."""
    memory, began = resident_mb(), time.process_time()
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS, **asked}
    reply = httpx.post(f"{running.url}/v1/chat/completions", content=json.dumps(body), headers=JSON, timeout=PATIENCE)
    if reply.status_code == 200:
        choice = reply.json()["choices"][0]
        assert choice["finish_reason"] in ("stop", "length") and reply.json()["usage"]["completion_tokens"] <= TOKENS
    else:
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == param, reply.text
    assert time.process_time() - began < 10 * SECONDS
    assert resident_mb() < memory + 200


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(running: Running, others: Pinger, name: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    ends_well(running, {"response_format": asked}, "response_format")


@pytest.mark.parametrize("name", OTHERS)
def test_patterns_and_grammars(running: Running, others: Pinger, name: str) -> None:
    key, source = OTHERS[name]
    ends_well(running, {"structured_outputs": {key: source}}, None if "\ud800" in source else "structured_outputs")


def test_tools(running: Running, others: Pinger) -> None:
    """Schemas of tools, which become one grammar, and a thousand tools."""
    for schema, count in ((SCHEMAS["multiples of large primes"], 1), (SCHEMAS["a chain of 240 references"], 20), ({}, 1000)):
        tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(count)]
        asked = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "tool_choice": "required"}
        reply = httpx.post(f"{running.url}/v1/chat/completions", timeout=PATIENCE, json={**asked, "tools": tools})
        assert reply.status_code == 400 and reply.json()["error"]["param"] in ("tools", "tool_choice"), reply.text


def test_grammars_that_wait_too_long_may_come_again(running: Running, engine: Engine) -> None:
    """400 would say that there is something wrong with the schema; clients try a 503 again."""
    assert engine.codec.grammars is not None
    free = engine.codec.grammars()._trials._free
    for _ in range(2):
        free.acquire()
    asked = {"model": NAME, "prompt": "x", "max_tokens": 1, "structured_outputs": {"regex": "never seen"}}
    reply = httpx.post(f"{running.url}/v1/completions", json=asked, timeout=PATIENCE)
    for _ in range(2):
        free.release()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "grammars_busy" and reply.headers["retry-after"]


@pytest.mark.parametrize("pattern", [b"\xff\xfe", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
def test_bytes_that_are_no_text(running: Running, pattern: bytes) -> None:
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 1, "structured_outputs": {"regex": "' + pattern + b'"}}'
    reply = httpx.post(f"{running.url}/v1/completions", content=body, headers=JSON, timeout=PATIENCE)
    assert reply.status_code == 400 and "not valid JSON" in reply.json()["error"]["message"]


def test_nobody_else_waited(running: Running, others: Pinger, engine: Engine) -> None:
    """One client's grammar that keeps the event loop, the engine's thread or the interpreter's lock, while it is compiled or at a
    token. Last in this file."""
    others.stop()
    assert others.count > 50 and others.slowest < 5 * SECONDS, (others.count, others.slowest)
    assert engine.idle and engine.scheduler.slots.used == 0


def test_a_grammar_past_its_limits_ends_its_answer_only(engine: Engine) -> None:
    """A token after which the library gives up fails the step, and with it everybody's answers."""
    assert engine.codec.grammars is not None
    compiler, grammar = engine.codec.grammars(), Grammar("lark", OTHERS["rules that double"][1])
    constraint = Constraint(compiler._build(grammar, compiler._text(grammar)), "lark")
    alone = Engine(engine.model, engine.renderer).generate(["the cat"], Sampling(8, seed=1))[0]
    both = Engine(engine.model, engine.renderer)
    assert both.vocabulary is not None
    a = both.vocabulary.bytes.index(b"a")  # after it the library's parser has more items than it may have
    hurt = both.submit(both.encode("x"), Sampling(8, temperature=0, logit_bias={a: 100.0}, grammar=Grammar("regex", "a{8}")))
    hurt.constraint = constraint
    other = both.submit(both.encode("the cat"), Sampling(8, seed=1))
    while not both.idle:
        both.step()
    assert (hurt.finish_reason, hurt.made) == ("length", 1)
    assert other.completion().ids == alone.ids and both.scheduler.slots.used == 0


def test_the_proof_of_an_end_takes_linear_time() -> None:
    """Asking every definition again for each one that is known to end: seconds for a few hundred of them."""
    began = time.process_time()
    prepare(chain(240))
    assert time.process_time() - began < 1
