"""The tool loop on a real engine: a call that the model writes is run, its result is in the next prompt, and all ids are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.chat.templates import styles
from tutelage.engine import Engine, Sampling
from tutelage.engine.assistant import Assistant
from tutelage.engine.tools import Tool, Transcript, calculator, run_with_tools
from tutelage.errors import ConfigError
from tutelage.tokenizer.train import train

WITH_TOOLS = [name for name, style in styles().items() if style.tools]
ASKED = [{"role": "user", "content": "one two three"}]
SUMS = {"2 + 3": "5", "7 * 6": "42", "1 / 0": "error: "}
EASY = replace(
    calculator, parameters={"type": "object", "properties": {"expression": {"enum": list(SUMS)}}, "required": ["expression"]}
)
"""The calculator for a model that knows no arithmetic."""
OTHER = Tool("meow", "Says meow", {"type": "object", "properties": {}, "additionalProperties": False}, lambda: "meow")


@pytest.fixture(scope="module", params=WITH_TOOLS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("assistant") / request.param
    train(small.TEXTS, vocab_size=320, template=request.param, out=folder)
    renderer = Renderer(folder)
    return Engine(small.model(renderer.tokenizer.vocab_size, 4096), renderer, slots=2)


def checked(assistant: Assistant, done: Transcript, tools: list[Tool]) -> list[dict[str, Any]]:
    """The results that the model was shown: each that of its call, in the prompt of the next answer."""
    first, *results, last = done.messages[1:]
    assert [m["role"] for m in done.messages] == ["user", "assistant", *["tool"] * len(first["tool_calls"]), "assistant"]
    assert (done.rounds, done.finish_reason, last["content"]) == (2, assistant.completions[1].finish_reason, done.content)
    for call, result in zip(first["tool_calls"], results, strict=True):
        (tool,) = [t for t in tools if t.name == call["function"]["name"]]
        assert result["tool_call_id"] == call["id"] and result["content"] == tool.call(call["function"]["arguments"])
    renderer, offered = assistant.engine.renderer, [t.to_json() for t in tools]
    prompts = [renderer.prompt(done.messages[:n], offered) for n in (1, 2 + len(results))]
    assert [list(c.prompt) for c in assistant.completions] == prompts
    return results


def test_a_call_is_forced_run_and_answered(engine: Engine) -> None:
    """A result that the next prompt lacks; a second answer that is forced to call again, for ever; ids that are lost."""
    seen: set[str] = set()
    for seed in range(40):
        if seed > 3 and len(seen) > 1:
            break
        assistant = Assistant(engine, Sampling(160, temperature=1.0, seed=seed, logprobs=0), call_first="calculator")
        done = run_with_tools(assistant, ASKED, [OTHER, EASY])
        results = checked(assistant, done, [OTHER, EASY])
        assert len(results) == 1 and done.messages[1]["tool_calls"][0]["function"]["name"] == "calculator"
        expression = json.loads(done.messages[1]["tool_calls"][0]["function"]["arguments"])["expression"]
        assert results[0]["content"].startswith(SUMS[expression])
        shown = engine.renderer.tokenizer.tokenizer.decode(list(assistant.completions[1].prompt))
        assert results[0]["content"].splitlines()[0] in shown.rpartition(ASKED[0]["content"])[2]
        for answer in assistant.completions:
            scored = engine.score([((*answer.prompt, *answer.ids), len(answer.prompt))])[0]
            assert scored.tolist() == pytest.approx([s.logprob for s in answer.scores], abs=1e-4)
        seen.add(expression)
    assert len(seen) > 1


def test_whatever_a_model_writes_is_shown_its_result_or_its_mistake(engine: Engine) -> None:
    """The built-in calculator as it is, and random weights: mostly errors, which are for the model to read, not for us."""
    for seed in range(2):
        assistant = Assistant(engine, Sampling(700, temperature=1.0, seed=seed), call_first="calculator")
        done = run_with_tools(assistant, ASKED, [calculator])
        checked(assistant, done, [calculator])


def test_any_tool_may_be_forced_and_none(engine: Engine) -> None:
    names: set[str] = set()
    for seed in range(4):
        assistant = Assistant(engine, Sampling(1500, temperature=1.0, seed=seed), call_first=True)
        done = run_with_tools(assistant, ASKED, [OTHER, EASY], max_rounds=1)
        assert (done.finish_reason, done.rounds, len(done.messages)) == ("max_rounds", 1, 2)
        names |= {call["function"]["name"] for call in done.messages[1]["tool_calls"]}
    assert names == {"meow", "calculator"}
    free = Assistant(engine, Sampling(5, temperature=0))
    done = run_with_tools(free, ASKED, [OTHER])
    prompt = engine.renderer.prompt(ASKED, [OTHER.to_json()])
    assert done.content == engine.generate([prompt], free.sampling)[0].text and done.finish_reason == "length"


def test_what_cannot_be_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one answer"):
        Assistant(engine, Sampling(5, n=2))
    with pytest.raises(ConfigError, match="no such tool"):
        run_with_tools(Assistant(engine, Sampling(5), call_first="calculatr"), ASKED, [calculator])
    train(small.TEXTS, vocab_size=320, template="gemma", out=tmp_path / "t")
    renderer = Renderer(tmp_path / "t")
    with pytest.raises(ConfigError, match="no tool calls that can be read back"):
        Assistant(Engine(small.model(renderer.tokenizer.vocab_size), renderer), Sampling(5))
