"""Episodes of several turns: what the model wrote is carried as it was made; others' words stand where they would be served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.chat.templates import styles
from tutelage.data.groups.groups import collate
from tutelage.engine import Engine, Sampling
from tutelage.engine.sequence import Completion, TokenScore
from tutelage.engine.tools import calculator
from tutelage.objectives.answers import token_logprobs
from tutelage.records import Conversation, Message, Prompt
from tutelage.rollout.advantage_estimator import group_of
from tutelage.rollout.environments import Environments
from tutelage.rollout.episodes import Episodes
from tutelage.rollout.sampler import Sampler
from tutelage.tokenizer.train import train

ASKED = [Prompt.make([Message(role="user", content=f"one two {n}")], source="test", answer="3") for n in ("three", "four")]


@pytest.fixture(scope="module", params=sorted(styles()))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("episodes") / request.param
    train(small.TEXTS, vocab_size=320, template=request.param, out=folder)
    renderer = Renderer(folder)
    return Engine(small.model(renderer.tokenizer.vocab_size, 1024), renderer, slots=8)


GAMES = Path(__file__).parent / "games.py"


@pytest.fixture(scope="module")
def games() -> Iterator[Environments]:
    found = Environments(f"{GAMES}:Echo")
    yield found
    found.close()


def ending(engine: Engine, tokens: int) -> Sampling:
    """Answers that end at once or soon: a random model seldom makes its end token."""
    return Sampling(tokens, logit_bias={engine.renderer.end_of_turn_id: 6.0})


def test_what_follows_an_answer_is_what_would_be_served(engine: Engine) -> None:
    """Guards against borders of turns that no served conversation has: prompt, answer with its end, and what follows are together
    the prompt of the conversation so far."""
    renderer = engine.renderer
    turns = [Message(role="user", content="one two"), Message(role="assistant", content="three four"),
             Message(role="user", content="five")]  # fmt: skip
    (sample,) = renderer.render(Conversation.make(turns[:2], source="test"))
    answer = sample.ids[sample.mask > 0].tolist()
    assert answer[-1] == renderer.end_of_turn_id
    assert renderer.prompt(turns[:1]) + answer + renderer.following(turns) == renderer.prompt(turns)


def test_an_episode_is_its_turns(engine: Engine, games: Environments) -> None:
    """Guards against turns that are lost or joined: every answer of the model is in the ids, with what followed it, in order."""
    episodes = Episodes(Sampler(engine, ending(engine, 6)), 4, environments=games)
    ended = 0
    for group in episodes.answer(ASKED, 3, seed=0, step=0, version=0):
        for rollout in group:
            prompt = next(p for p in ASKED if p.id == rollout.prompt)
            borders = np.flatnonzero(np.diff([0, *rollout.mask, 0]))
            own = [rollout.ids[a:b] for a, b in zip(borders[0::2], borders[1::2], strict=True)]
            others = [rollout.ids[a:b] for a, b in zip(borders[1::2], borders[2::2], strict=False)]
            said = [m for m in rollout.messages if m.role == "assistant"]
            assert len(own) == len(said) and rollout.text == said[-1].content
            for number, between in enumerate(others):
                so_far = [*prompt.messages, *rollout.messages[: 2 * number + 2]]
                assert list(between) == engine.renderer.following(so_far)
            if rollout.finish_reason == "stop":
                ended += 1
                assert [m.role for m in rollout.messages] == ["assistant", "user"] * 2 + ["assistant"]
                assert rollout.meta["environment"] == 3.0 and rollout.messages[1].content == "again 1"
    assert ended


def test_log_probabilities_are_the_trainers(engine: Engine, games: Environments) -> None:
    """Promise 16 over several turns: the engine's scores of the model's own words are those that training computes from the ids,
    and the words of others are not trained on."""
    episodes = Episodes(Sampler(engine, ending(engine, 6)), 4, environments=games)
    (group,) = episodes.answer(ASKED[:1], 4, seed=1, step=0, version=0)
    found = token_logprobs(engine.model, collate([group_of(group)], "tree")).detach().numpy()
    expected = np.concatenate([[x for x, m in zip(r.logprobs, r.mask, strict=True) if m] for r in group])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert any(0 in r.mask for r in group)


def test_company_changes_nothing(engine: Engine, games: Environments) -> None:
    """Guards against noise that depends on what else is in the batch: an episode alone is the one in company."""
    episodes = Episodes(Sampler(engine, ending(engine, 6)), 3, environments=games)
    together = episodes.answer(ASKED, 2, seed=3, step=5, version=0)
    (alone,) = episodes.answer(ASKED[1:], 2, seed=3, step=5, version=0)
    assert [r.ids for r in alone] == [r.ids for r in together[1]]
    assert len({r.ids for group in together for r in group}) > 1


def test_tools_are_called_and_heard(tmp_path: Path) -> None:
    """Guards against calls that nobody runs: what the model calls is run, and its result stands before the next answer. (A model
    that knows nothing does not call, so its first answer is given.)"""
    name = next(n for n, s in sorted(styles().items()) if s.tools)
    train(small.TEXTS, vocab_size=320, template=name, out=tmp_path / "words")
    renderer = Renderer(tmp_path / "words")
    engine = Engine(small.model(renderer.tokenizer.vocab_size, 4096), renderer, slots=4)
    episodes = Episodes(Sampler(engine, Sampling(200)), 3, [calculator])
    offered = episodes.offered
    call = Message(role="assistant", content="", tool_calls=(
        {"id": "call00001", "type": "function", "function": {"name": "calculator", "arguments": {"expression": "2 + 3"}}},
    ))  # fmt: skip
    asked = [*ASKED[0].messages, call]
    (sample,) = renderer.render(Conversation.make(asked, source="test", tools=offered))
    written = tuple(sample.ids[sample.mask > 0].tolist())

    closing = renderer.text([*asked[:1], Message(role="assistant", content="x")], offered, False).rpartition("x")[2]

    class Scripted:
        """The engine, but for what it says first."""

        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def generate(self, prompts: Any, ways: Any, lora: Any = None) -> list[Completion]:
            self.asked += prompts
            if len(self.asked) > 1:
                return engine.generate(prompts, ways, lora)
            text = renderer.text(asked, offered, False)[len(renderer.text(asked[:1], offered)) :]
            scores = tuple(TokenScore(i, -1.0) for i in written)
            return [Completion(tuple(prompts[0]), written, text.removesuffix(closing), "stop", scores=scores)]

    scripted = Scripted()
    episodes.sampler = replace(episodes.sampler, engine=scripted)  # type: ignore[arg-type]
    ((rollout,),) = episodes.answer(ASKED[:1], 1, seed=0, step=0, version=0)
    assert rollout.prompt_ids == tuple(renderer.prompt(ASKED[0].messages, offered))
    assert [m.role for m in rollout.messages][:2] == ["assistant", "tool"] and rollout.messages[1].content == "5"
    assert scripted.asked[1] == renderer.prompt([*asked, rollout.messages[1]], offered)


def test_the_environment_hears_the_last_answer(engine: Engine) -> None:
    """Guards against a right answer in the last round, or one that was cut, that earns nothing."""
    games = Environments(f"{GAMES}:LastWord")
    episodes = Episodes(Sampler(engine, ending(engine, 6)), 2, environments=games)
    for group in episodes.answer(ASKED, 2, seed=0, step=0, version=0):
        for rollout in group:
            assert rollout.meta["environment"] == sum(m.role == "assistant" for m in rollout.messages) >= 1
    episodes.close()
