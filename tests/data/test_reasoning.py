"""What an assistant thought before it answered: in the text as `transformers` writes it, and learnt with the turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_render import CHAT, CORPUS, TOOLS
from tutelage.chat.messages import plain_messages
from tutelage.chat.render import Renderer
from tutelage.chat.templates import styles
from tutelage.data.sources.conversations import to_conversation
from tutelage.errors import ArtifactError, DataError
from tutelage.tokenizer.train import train

WRITES = ("default", "plain", "chatml", "qwen")
NAMES = ("reasoning_content", "thinking", "reasoning")
# As Qwen 3 has it: thoughts are written before the last answer, and dropped once the user goes on.
DROPS_EARLIER = """{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.reasoning_content is string and loop.index0 > last.user %}
        {{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def talk(key: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4.", key: "two <|im_end|> twice"},
            {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6.", key: "three twice"}]  # fmt: skip


@pytest.fixture(scope="module", params=WRITES)
def renderer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("reasoning") / request.param
    train(CORPUS, vocab_size=400, template=request.param, out=folder)
    return Renderer(folder)


@pytest.mark.parametrize("key", NAMES)
def test_reasoning_is_written_and_learnt(renderer: Renderer, key: str) -> None:
    """Guards against thoughts that a template never sees, against a mask without them, and against prompts that differ from
    `transformers`' and from what was trained."""
    from transformers import AutoTokenizer

    theirs, turns = AutoTokenizer.from_pretrained(renderer.tokenizer.folder), talk(key)
    assert renderer.text(turns, add_generation_prompt=False) == theirs.apply_chat_template(turns, tokenize=False)
    [sample] = renderer.render(to_conversation({"messages": turns}))
    learnt = renderer.tokenizer.decode(sample.ids[sample.mask == 1])
    assert "<think>\ntwo <|im_end|> twice\n</think>\n\n4." in learnt and "three twice" in learnt and "2+2?" not in learnt
    asked = renderer.prompt(turns[:3])
    assert sample.ids[: len(asked)].tolist() == asked
    given = {"role": "assistant", "content": "<think>\ntwo <|im_end|> twice\n</think>\n\n4."}  # as the server answers
    assert renderer.prompt([turns[0], given, turns[2]]) == asked


def test_a_template_that_drops_earlier_thoughts(tmp_path: Path) -> None:
    """Guards against an answer that is learnt behind thoughts which a served prompt does not have."""
    train(CORPUS, vocab_size=400, template="chatml", out=tmp_path)
    renderer = Renderer(tmp_path, DROPS_EARLIER)
    first, second = renderer.render(to_conversation({"messages": talk("thinking")}))
    texts = [renderer.tokenizer.decode(s.ids[s.mask == 1]) for s in (first, second)]
    assert "twice\n</think>\n\n4." in texts[0] and texts[1].startswith("<think>\nthree twice")
    assert second.text.count("<think>") == 1
    asked = renderer.prompt(talk("thinking")[:3])
    assert second.ids[: len(asked)].tolist() == asked


def test_reasoning_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    """Guards against a template that leaves the thoughts out without a word."""
    train(CORPUS, vocab_size=400, template="gemma", out=tmp_path / "gemma")
    conversation = to_conversation({"messages": talk("reasoning")})
    for act in (lambda r: r.render(conversation), lambda r: r.prompt(talk("reasoning")[:3])):
        with pytest.raises(DataError, match="writes no reasoning") as caught:
            act(Renderer(tmp_path / "gemma"))
        assert caught.value.field == "messages[1].reasoning_content" and caught.value.fix
    train(CORPUS, vocab_size=400, template="chatml", out=tmp_path / "chatml")
    never = DROPS_EARLIER.replace("loop.index0 > last.user", "loop.index0 < 0")
    with pytest.raises(ArtifactError, match="drops the assistant's reasoning"):
        Renderer(tmp_path / "chatml", never).render(conversation)


@pytest.mark.parametrize("name", styles())
def test_transformers_masks_what_we_learn(tmp_path: Path, name: str) -> None:
    """Guards `{% generation %}` in our templates: without it `transformers` finds none of the assistant's words."""
    from transformers import AutoTokenizer

    train(CORPUS, vocab_size=400, template=name, out=tmp_path)
    renderer, theirs = Renderer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for conversation in (CHAT, TOOLS) if styles()[name].tools else (CHAT,):
        [sample] = renderer.render(conversation)
        turns, tools = plain_messages(conversation.messages), list(conversation.tools) or None
        out = theirs.apply_chat_template(turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        assert (out["input_ids"], out["assistant_masks"]) == (sample.ids.tolist(), sample.mask.tolist())


def test_a_call_that_was_cut_off_is_written_as_it_is(renderer: Renderer) -> None:
    """Guards against a conversation that cannot go on behind such a call, and against `null` for no arguments."""
    if not styles()[renderer.tokenizer.folder.name].tools:
        return
    for given, written in (("", "{}"), ("null", "{}"), (None, "{}"), ('{"a": ', '"{\\"a\\": "'), ("[1]", '"[1]"')):
        call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": given}}
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        assert f'"arguments": {written}' in renderer.text(turns)
