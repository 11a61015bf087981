"""Adapters behind the API: names of their own in their base's batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine import small
from tests.engine.test_lora import adapted
from tests.serve.running import Running
from tutelage.chat.render import Renderer
from tutelage.engine import Engine, Sampling
from tutelage.models.adapters.lora import read_lora
from tutelage.models.open import load
from tutelage.serve.app import build_app
from tutelage.serve.keys import KeyRing, add_key
from tutelage.serve.listen import Options, open_engine
from tutelage.serve.state import ServerState

ASK: dict[str, Any] = {"prompt": "the cat sat", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and two adapters of it."""
    where = tmp_path_factory.mktemp("adapters")
    small.saved(where, "base", 256)
    for seed, name in enumerate(("poet", "clerk")):
        adapted(where / "base", where / name, seed, r=4)
    return where


class House:
    def __init__(self, folders: Path, keys: Path) -> None:
        auth = {"authorization": f"Bearer {add_key(keys, 'boss', scopes=['admin'])}"}
        self.key = add_key(keys, "user", scopes=["inference"])
        self.state = ServerState(
            KeyRing(file=keys), allowed=[folders], loader=lambda folder: open_engine(folder, Options(slots=8))
        )
        self.state.models.add("base", *open_engine(folders / "base", Options(slots=8)))
        self.running = Running(build_app(self.state))
        self.client = self.running.client(self.key)
        self.admin = httpx.Client(base_url=self.running.url, headers=auth, timeout=30)
        self.folders = folders

    def load(self, name: str, **body: Any) -> httpx.Response:
        return self.admin.post("/admin/models", json={"name": name, "path": str(self.folders / name), **body})

    def text(self, model: str) -> str:
        return self.client.completions.create(model=model, **ASK).choices[0].text


@pytest.fixture
def house(folders: Path, tmp_path: Path) -> Iterator[House]:
    house = House(folders, tmp_path / "keys.json")
    yield house
    house.admin.close()
    house.running.close()


def expected(folders: Path, name: str | None) -> str:
    model = load(folders / "base")
    engine = Engine(model, Renderer(folders / "base"))
    lora = None if name is None else read_lora(folders / name, model)
    return engine.generate(["the cat sat"], Sampling(12, temperature=0, ignore_eos=True), lora)[0].text


def test_each_name_answers_with_its_adapter(house: House) -> None:
    """All three at once, in one batch: an answer in another's clothes."""
    card = house.load("poet")
    assert card.status_code == 200 and card.json()["parent"] == "base"
    assert house.load("clerk", base="base").status_code == 200
    assert [m.id for m in house.client.models.list()] == ["base", "poet", "clerk"]
    names = ["base", "poet", "clerk"] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(house.text, names), strict=True))
    want = {name: expected(house.folders, None if name == "base" else name) for name in found}
    assert found == want and len(set(want.values())) == 3


def test_scores_and_embeddings_wear_it_too(house: House) -> None:
    house.load("poet")
    scored, vectors = [], []
    for name in ("base", "poet"):
        echo = house.client.completions.create(model=name, prompt="the dog sat by", max_tokens=1, logprobs=1, echo=True)
        assert echo.choices[0].logprobs is not None and echo.choices[0].logprobs.token_logprobs is not None
        scored.append(echo.choices[0].logprobs.token_logprobs[1])
        vectors.append(house.client.embeddings.create(model=name, input="the dog").data[0].embedding)
    assert abs(scored[0] - scored[1]) > 1e-3 and vectors[0] != vectors[1]


def test_a_base_stays_while_it_is_worn(house: House) -> None:
    house.load("poet")
    refused = house.admin.delete("/admin/models/base")
    assert refused.status_code == 409 and "poet" in refused.json()["error"]["message"]
    assert house.admin.delete("/admin/models/poet").status_code == 200
    with pytest.raises(openai.NotFoundError):
        house.text("poet")
    assert house.text("base") == expected(house.folders, None)
    assert house.admin.delete("/admin/models/base").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "base", "path": "poet"}, 409, "name"),
        ({"name": "x", "path": "poet", "base": "nobody"}, 404, "model"),
        ({"name": "x", "path": "base", "base": "base"}, 400, "base"),
        ({"name": "x", "path": "tokenizer"}, 400, "path"),
    ],
)
def test_what_cannot_be_loaded_is_said(house: House, body: dict[str, str], status: int, param: str) -> None:
    reply = house.admin.post("/admin/models", json={**body, "path": str(house.folders / body["path"])})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    assert [m.id for m in house.client.models.list()] == ["base"]


def test_metrics_count_for_the_base(house: House) -> None:
    """vLLM's names and labels: an adapter of its own label would double the live gauges."""
    house.load("poet")
    house.text("poet")
    lines = house.state.metrics.text().decode().splitlines()
    assert not any("poet" in line for line in lines)
    assert 'vllm:generation_tokens_total{model_name="base"} 12.0' in lines
