"""Promise 3: the served prompt has the same ids as the trained one, for every template that ships."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.chat.templates import styles
from tutelage.engine import Engine
from tutelage.records import Conversation, Message
from tutelage.serve.app import create_app
from tutelage.tokenizer.train import train

TURNS = [("system", "Be brief."), ("user", "the cat  sat\n"), ("assistant", "on the <|end|> mat"),
         ("user", " naïve 🙂?"), ("assistant", "one two")]  # fmt: skip


def talk(system: bool, turns: int) -> list[Message]:
    rows = TURNS if system else TURNS[1:]
    return [Message(role=r, content=c) for r, c in rows[: turns + system]]


@pytest.fixture(params=sorted(styles()))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    train(small.TEXTS, vocab_size=320, template=request.param, out=tmp_path / "t")
    renderer = Renderer(tmp_path / "t")
    yield Engine(small.model(renderer.tokenizer.vocab_size, context=512), renderer, slots=2)


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("turns", [2, 4])
def test_served_is_trained(engine: Engine, system: bool, turns: int) -> None:
    """A template applied twice, a missing generation prompt, a doubled start token, trimmed spaces: good loss, bad chat."""
    messages = talk(system, turns)
    sample = engine.renderer.render(Conversation.make(messages, source="test"))[-1]
    ids, mask = list(sample.ids), list(sample.mask)
    last = len(mask) - mask[::-1].index(1)  # end of the last answer
    begin = last
    while begin and mask[begin - 1]:
        begin -= 1
    served = served_ids(engine, [{"role": m.role, "content": m.content} for m in messages[:-1]])
    assert served == ids[:begin] and len(served) > 5


def served_ids(engine: Engine, messages: list[dict[str, Any]]) -> list[int]:
    """The ids that the engine gets for an HTTP request."""
    import asyncio

    seen: list[list[int]] = []
    submit = engine.submit

    def spy(prompt: Any, *rest: Any, **more: Any) -> Any:
        seen.append(list(prompt))
        return submit(prompt, *rest, **more)

    async def ask() -> None:
        app = create_app(engine, engine.renderer, "m")
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")
        asked = {"model": "m", "messages": messages, "max_tokens": 1, "temperature": 0}
        async with app.router.lifespan_context(app), client:
            reply = await client.post("/v1/chat/completions", json=asked)
            assert reply.status_code == 200, reply.text

    engine.submit = spy  # type: ignore[method-assign]
    try:
        asyncio.run(ask())
    finally:
        engine.submit = submit  # type: ignore[method-assign]
    assert len(seen) == 1
    return seen[0]
