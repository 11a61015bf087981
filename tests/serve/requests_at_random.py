"""Requests for the fuzz: valid ones, built from the server's own schemas, and the same with something wrong in them."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from tutelage.serve.responses.request import ResponsesRequest
from tutelage.serve.routes.embeddings import EmbeddingRequest
from tutelage.serve.routes.models import LoadRequest
from tutelage.serve.routes.tokens import DetokenizeRequest, TokenizeRequest
from tutelage.serve.schema import ChatRequest, CompletionRequest

NAME = "tiny"
KINDS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/admin/models": LoadRequest,
    "/v1/responses": ResponsesRequest,
}
Strategy = st.SearchStrategy[Any]

texts = st.one_of(
    st.text(max_size=12), st.sampled_from(["the cat", "", "🙂" * 3, "\x00", "<|end|>", "a" * 300, "\ufeff", "{{ x }}"])
)
odd_texts = st.one_of(texts, st.text(st.characters(), max_size=8), st.sampled_from(["\ud800", "x\udfff", "é" * 2000]))
tokens = st.lists(st.integers(0, 255), min_size=1, max_size=6)
# Counts that are valid stay small: thousands of answers to one request are valid too, and take their time.
numbers = st.one_of(
    st.integers(-3, 4),
    st.floats(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 1e308, 1e-320, float("inf"), float("nan")]),
)
garbage = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, odd_texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)),
    max_leaves=6,
)
patterns = st.one_of(
    st.sampled_from(["[a-c]{2,5}", r"\d+", "(a+)+b", "(", "a{1000}{1000}"]), st.text("ab()|*+?{}[]0,9\\^$.-&~", max_size=10)
)
schemas = st.recursive(
    st.one_of(
        st.booleans(),
        st.sampled_from([{}, {"type": "string"}, {"type": "integer", "minimum": 0, "maximum": 9}, {"const": 1}, {"$ref": "#"}]),
        st.fixed_dictionaries({"type": st.sampled_from(["string", "number", "null", "object", "any"]), "pattern": patterns}),
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"properties": st.dictionaries(texts, inner, max_size=3), "required": st.lists(texts, max_size=2)}),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "minItems": st.integers(-1, 3)}),
        st.builds(
            lambda key, some: {key: some},
            st.sampled_from(["anyOf", "oneOf", "allOf", "not", "$defs", "enum"]),
            st.lists(inner, max_size=3),
        ),
    ),
    max_leaves=5,
)
grammars = st.one_of(
    st.sampled_from(['start: "a" /[0-9]{2}/', "start: start", 'start: start start | "a"', "start: %json {}", 'start: "\\q"']),
    st.text('start: "abr/[]|()*+?{}~&%\n<>01', max_size=24).map("start: ".__add__),
)
structured = st.one_of(
    st.fixed_dictionaries({"json": schemas}),
    st.fixed_dictionaries({"regex": patterns}),
    st.fixed_dictionaries({"grammar": grammars}),
    st.fixed_dictionaries({"choice": st.lists(texts, max_size=3)}),
    st.just({"json_object": True}),
)
functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["feed", "call vet", "f"])}, optional={"description": texts, "parameters": schemas}
)
tools = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=2)
calls = st.fixed_dictionaries(
    {
        "id": texts,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": texts, "arguments": st.one_of(st.just('{"a": 1}'), odd_texts)}),
    }
)
contents = st.one_of(
    texts, texts, texts, st.lists(st.builds(lambda t: {"type": "text", "text": t}, texts), max_size=2), st.none()
)
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer"]), "content": contents}, optional={"name": texts}
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant")}, optional={"content": contents, "tool_calls": st.lists(calls, max_size=2)}
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": contents, "tool_call_id": texts}),
)

SPECIAL: dict[str, Strategy] = {
    "model": st.just(NAME),
    "name": st.just(NAME),
    "path": texts,
    "messages": st.lists(messages, min_size=1, max_size=4),
    "tools": tools,
    "prompt": st.one_of(texts, tokens, st.lists(texts, max_size=3), st.lists(tokens, max_size=3)),
    "n": st.integers(1, 3),
    "input": st.one_of(texts, tokens, st.lists(texts, max_size=3), st.lists(tokens, max_size=3)),
    "tokens": tokens,
    "max_tokens": st.integers(1, 12),
    "max_completion_tokens": st.integers(1, 12),
    "stop": st.one_of(texts, st.lists(texts, max_size=5)),
    "logit_bias": st.dictionaries(st.one_of(st.integers(0, 400).map(str), odd_texts), st.floats(-100, 100), max_size=3),
    "structured_outputs": structured,
    "modalities": st.just(["text"]),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "response_format": st.one_of(
        st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
        st.builds(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, schemas),
    ),
    "tool_choice": st.sampled_from(
        [
            "none",
            "auto",
            "required",
            {"type": "function", "function": {"name": "feed"}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        ]
    ),
}
"""Fields whose JSON schema says too little, or too much for a short run."""
kept = st.one_of(st.none(), st.floats(0.0, 1.0), st.integers(-1, 3))
RESPONSES: dict[str, Strategy] = {
    "input": st.one_of(texts.filter(bool), st.lists(messages, min_size=1, max_size=3)),
    "max_output_tokens": st.integers(1, 12),
    "text": st.builds(lambda kind: {"format": kind}, SPECIAL["response_format"]),
    "tools": st.lists(functions.map(lambda function: {"type": "function", **function}), max_size=2),
    "include": st.just(["message.output_text.logprobs"]),
} | dict.fromkeys(["temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p"], kept)
"""Fields of `/v1/responses` that are others there, or untyped."""
RARE = {
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "functions",
    "function_call",
    "suffix",
    "dimensions",
    "text",
    "previous_response_id",
}


def of_schema(schema: dict[str, Any]) -> Strategy:
    """Values of a JSON schema as Pydantic writes them."""
    if "anyOf" in schema:
        return st.one_of(*map(of_schema, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = schema.get("minimum", schema.get("exclusiveMinimum", -3)), schema.get("maximum", 3)
    plain: dict[str, Strategy] = {
        "string": texts,
        "integer": st.integers(low, high),
        "number": st.floats(low, high),
        "boolean": st.booleans(),
        "null": st.none(),
        "array": st.lists(garbage, max_size=3),
        "object": st.dictionaries(texts, garbage, max_size=3),
    }
    return plain.get(schema.get("type", ""), garbage)


def bodies(path: str) -> Strategy:
    """Requests to an endpoint that are right, or all but right."""
    schema = KINDS[path].model_json_schema()
    special = SPECIAL | (RESPONSES if path == "/v1/responses" else {})
    fields = {name: special[name] if name in special else of_schema(about) for name, about in schema["properties"].items()}
    needed = {name: fields[name] for name in schema.get("required", ())}
    needed |= {name: fields[name] for name in ("max_tokens", "max_output_tokens") if name in fields}
    rest = {name: value for name, value in fields.items() if name not in needed}
    often = st.lists(st.sampled_from(sorted(rest)), max_size=5, unique=True) if rest else st.just([])
    names = often.map(lambda found: found if len([n for n in found if n in RARE]) < 2 else [n for n in found if n not in RARE])
    return names.flatmap(lambda found: st.fixed_dictionaries(needed | {name: rest[name] for name in found}))


@st.composite
def corrupted(draw: st.DrawFn, path: str) -> Any:
    """A request with up to three things wrong in it, at any depth."""
    body = copy.deepcopy(draw(bodies(path)))
    for _ in range(draw(st.integers(0, 3))):
        node: Any = body
        while isinstance(node, dict | list) and node:
            key: Any = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or draw(st.booleans()):
                break
            node = node[key]
        if not node:
            break
        what = draw(st.sampled_from(["replace", "remove", "add", "deepen"]))
        if what == "replace":
            node[key] = draw(garbage)
        elif what == "remove":
            del node[key]
        elif what == "add" and isinstance(node, dict):
            node[draw(odd_texts)] = draw(garbage)
        elif what == "deepen":
            for _ in range(draw(st.sampled_from([1, 3, 40]))):
                node[key] = draw(st.sampled_from([[node[key]], {"items": node[key]}]))
    return body


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> bytes:
    """A body as bytes: JSON as clients write it, in other encodings, cut short, nested to the reader's limit, or none."""
    text = json.dumps(value)
    how = draw(st.sampled_from(["plain"] * 6 + ["raw", "utf-16", "cut", "deep", "garbage"]))
    if how == "raw":
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if how == "utf-16":
        return text.encode("utf-16")
    if how == "cut":
        return text.encode()[: draw(st.integers(0, len(text)))]
    if how == "deep":
        levels = draw(st.one_of(st.integers(850, 1000), st.sampled_from([100, 100_000])))
        return json.dumps(value, default=str).encode()[:-1] + b', "stop": ' + b"[" * levels + b"]" * levels + b"}"
    return draw(st.binary(max_size=40)) if how == "garbage" else text.encode()
