"""Environments of the user have a process of their own: what breaks there is said here, with its episode."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tutelage.config.base import build
from tutelage.config.stages import Rl
from tutelage.errors import ConfigError, RewardError
from tutelage.preflight.checks import rl as check
from tutelage.recipe import Planned
from tutelage.records import Message, Prompt
from tutelage.rollout.environments import Environments
from tutelage.stages.sources import code

GAMES = Path(__file__).parent / "games.py"
ASKED = Prompt.make([Message(role="user", content="guess a number")], source="test", answer="go")


@pytest.mark.parametrize(
    ("what", "said"),
    [("begin raise", "ValueError: no such number"), ("begin exit", "SystemExit: 3"),
     ("reply raise", "ValueError: no such number"), ("reply end", "ended its process (status 3)"),
     ("reply number", "gave int, not a text or None"),
     ("score none", "TypeError"), ("score nan", "score() gave nan"), ("score end", "ended its process (status 3)")],
)  # fmt: skip
def test_what_breaks_is_said_with_its_episode(what: str, said: str) -> None:
    """Guards against an environment that ends the run without a word, or whose reply is a number that the model reads; the next
    episode is as if nothing had been."""
    lines = GAMES.read_text().split("\n")
    raises = {"raise": lines.index('            raise ValueError("no such number")') + 1,
              "exit": lines.index("            raise SystemExit(3)") + 1}  # fmt: skip
    games = Environments(f"{GAMES}:Breaks")
    other = games.begin(ASKED, 1)
    with pytest.raises(RewardError) as caught:
        own = games.begin(replace(ASKED, answer=what), 0)
        own.reply("seven")
        own.score()
    message = str(caught.value)
    assert caught.value.expected == "replies of text or None, and a finite score, each within 30 s" and "Traceback" not in message
    assert what[6:] not in ("raise", "exit") or f"games.py:{raises[what[6:]]})" in message
    assert said in message and f"{GAMES}:Breaks" in message and "guess a number" in message and ASKED.id in message
    assert ("seven" in message) == (not what.startswith("begin")) and "mend the class" in message
    with pytest.raises(RewardError, match="its process ended between two steps"):
        other.reply("x")  # its state is gone: never another one's, never a fresh one's
    assert games.begin(ASKED, 1).reply("x") == "go on"
    games.close()


@pytest.mark.parametrize("place", ["begin", "reply", "score"])
def test_one_that_hangs_ends(place: str) -> None:
    """Guards against a run that waits for ever, and says which setting gives more time."""
    games = Environments(f"{GAMES}:Breaks", seconds=1.0)
    started = time.monotonic()
    with pytest.raises(RewardError, match="took more than 1 s") as caught:
        own = games.begin(replace(ASKED, answer=f"{place} hang"), 0)
        own.reply("seven")
        own.score()
    assert time.monotonic() - started < 30 and "raise environment_seconds" in str(caught.value)


def test_one_process_has_all_episodes() -> None:
    """Guards against a process an episode, states that are mixed up, and a process that outlives its run."""
    games = Environments(f"{GAMES}:Process")
    prompts = [Prompt.make([Message(role="user", content=f"é {i}\ud800")], source="test", meta={"i": [i]}) for i in range(5)]
    own = [games.begin(p, i) for i, p in enumerate(prompts)]
    assert [e.reply(f"{i}\n") for i, e in enumerate(own)] == [f"é {i}\ud800 {i}\n" for i in range(5)]
    (number,) = {e.score() for e in own}
    assert number != os.getpid()
    games.close()
    assert not Path(f"/proc/{number:.0f}").exists()


@pytest.mark.parametrize("where", ["nothing:Game", "games:Missing", "games", "games:Half", "games.py:number", "missing.py:Game"])
def test_an_environment_that_is_none(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against finding out in the middle of a run."""
    monkeypatch.chdir(GAMES.parent)
    with pytest.raises(ConfigError, match="cannot load the environment") as caught:
        Environments(where)
    assert caught.value.field == "environment" and caught.value.found == where


def test_the_working_folder_has_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the path that users write: a module beside the recipe, or its file."""
    monkeypatch.chdir(GAMES.parent)
    for where in ("games:Echo", "games.py:Echo"):
        games = Environments(where)
        assert games.begin(ASKED, 0).reply("x") == "again 1"
        games.close()


def test_a_time_without_an_environment_is_refused() -> None:
    """Guards against a setting that is taken and does nothing."""
    with pytest.raises(ConfigError) as caught:
        check(Planned("rl", "rl", build(Rl, {"model": "x", "data": "y", "rewards": {"exact": 1}, "environment_seconds": 5.0})))
    assert caught.value.field == "environment_seconds"


def test_an_edit_makes_the_stage_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that is taken from the cache although its game is another one. The command's own process need not be
    able to import it."""
    monkeypatch.chdir(tmp_path)
    rewards = {"mine": {"kind": "function", "path": "my_package.mine:worth"}, "environment": 1}
    config = build(Rl, {"model": "x", "data": "y", "rewards": rewards, "environment": "my_game:Game"})
    (tmp_path / "my_package").mkdir()
    files, seen = (tmp_path / "my_game.py", tmp_path / "my_package" / "mine.py"), set()
    for change in range(2):
        for file in files:
            file.write_text(f"{change} + 1")
            seen.add(code(config))
    assert len(seen) == 4 and None not in seen
