"""Several models in one server, loaded and unloaded while it runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine import small
from tests.gguf.gguf_files import tiny
from tests.serve.running import Running
from tutelage.engine import Engine, Sampling
from tutelage.models.export import save
from tutelage.serve.app import build_app
from tutelage.serve.keys import KeyRing, add_key
from tutelage.serve.listen import Options, open_engine
from tutelage.serve.state import ServerState

GREEDY: dict[str, Any] = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """allowed/one and allowed/two (other weights), elsewhere/three, and allowed/link to it."""
    base = tmp_path_factory.mktemp("models")
    renderer = small.renderer(base / "tokenizer")
    for seed, where in enumerate(("allowed/one", "allowed/two", "elsewhere/three")):
        model = small.model(renderer.tokenizer.vocab_size, 2048, seed=seed)
        save(model, base / where, base / "tokenizer", stop_ids=renderer.stop_ids)
    (base / "allowed" / "empty").mkdir()
    (base / "allowed" / "link").symlink_to(base / "elsewhere" / "three")
    return base


class House:
    """A server of model "one" whose keys are known."""

    def __init__(self, base: Path, keys: Path) -> None:
        self.loading, self.may_load = threading.Event(), threading.Event()
        self.may_load.set()
        self.engines: list[weakref.ref[Engine]] = []
        self.keys = {scope: add_key(keys, scope, scopes=[scope]) for scope in ("inference", "admin")}
        self.state = ServerState(KeyRing(file=keys), allowed=[base / "allowed"], loader=self._load)
        self.state.models.add("one", *open_engine(base / "allowed" / "one", Options(slots=4)))
        self.running = Running(build_app(self.state))
        self.client = self.running.client(self.keys["inference"])
        auth = {"authorization": f"Bearer {self.keys['admin']}"}
        self.admin = httpx.Client(base_url=self.running.url, headers=auth, timeout=30)

    def _load(self, folder: Path) -> tuple[Engine, Any]:
        self.loading.set()
        assert self.may_load.wait(20)
        engine, renderer = open_engine(folder, Options(slots=4))
        self.engines.append(weakref.ref(engine))
        return engine, renderer

    def load(self, name: str, path: Path | str) -> httpx.Response:
        return self.admin.post("/admin/models", json={"name": name, "path": str(path)})


@pytest.fixture
def house(base: Path, tmp_path: Path) -> Iterator[House]:
    house = House(base, tmp_path / "keys.json")
    yield house
    house.admin.close()
    house.running.close()


def test_models_come_and_go(house: House, base: Path) -> None:
    """A name that answers with another model's weights, and memory that an unloaded model keeps."""
    card = house.load("team/two", base / "allowed" / "two")
    assert card.status_code == 200 and card.json()["id"] == "team/two"
    assert [m.id for m in house.client.models.list()] == ["one", "team/two"]
    assert house.client.models.retrieve("team/two").id == "team/two"
    texts = {m: house.client.completions.create(model=m, **GREEDY).choices[0].text for m in ("one", "team/two")}
    for name, folder in (("one", "one"), ("team/two", "two")):
        alone, _ = open_engine(base / "allowed" / folder, Options(slots=1))
        assert texts[name] == alone.generate(["the cat"], Sampling(12, temperature=0, ignore_eos=True))[0].text
    assert texts["one"] != texts["team/two"]
    gone = house.admin.delete("/admin/models/team/two")
    assert gone.json() == {"id": "team/two", "object": "model", "deleted": True}
    assert house.engines[-1]() is None
    with pytest.raises(openai.NotFoundError):
        house.client.completions.create(model="team/two", **GREEDY)
    assert house.admin.delete("/admin/models/team/two").status_code == 404


def test_only_allowed_folders_are_loaded(house: House, base: Path) -> None:
    """An admin key that opens every folder of the machine, through a link or `..` if need be, or tells what exists."""
    for path in ("elsewhere/three", "allowed/link", "allowed/../elsewhere/three", "no/such/place", "allowed/../../etc"):
        reply = house.load("x", base / path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "path_not_allowed"), path
    assert not house.loading.is_set()


def test_a_gguf_file_is_loaded(house: House, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GGUF file that only the command line takes, or one that is loaded from outside the allowed folders."""
    monkeypatch.setattr("tutelage.gguf.folder._cache_folder", lambda: tmp_path)
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    for place, status in (("allowed", 200), ("elsewhere", 403)):
        file = tiny(base / place / "model.gguf", tokenizer__chat_template=template)
        reply = house.load(f"{place}-file", file)
        assert reply.status_code == status, reply.text
        file.unlink()
    assert house.client.completions.create(model="allowed-file", **GREEDY).usage.completion_tokens == 12
    (base / "allowed" / "cut.gguf").write_bytes(b"GGUF")
    assert house.load("cut", base / "allowed" / "cut.gguf").json()["error"]["param"] == "path"
    (base / "allowed" / "cut.gguf").unlink()


def test_mistakes_of_loading(house: House, base: Path) -> None:
    """Two models of one name, a folder that is no model, names that cannot stand in a log."""
    assert house.load("one", base / "allowed" / "two").status_code == 409
    for path in ("allowed/empty", "allowed/none", "allowed/" + "x" * 300):
        reply = house.load("x", base / path)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "path"), path
    for body in ({"name": "a\nb", "path": "p"}, {"name": "", "path": "p"}, {"name": "x", "path": "a\0b"}, {"name": "x"}, []):
        assert house.admin.post("/admin/models", json=body).status_code == 400
    assert [m.id for m in house.client.models.list()] == ["one"]


def test_a_link_to_itself_is_a_client_error(house: House, base: Path) -> None:
    """Guards against a 500 for a path that cannot be resolved."""
    loop = base / "allowed" / "loop"
    loop.symlink_to(loop)
    try:
        reply = house.load("x", loop)
    finally:
        loop.unlink()
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "path")


def test_loading_times_out(house: House, base: Path) -> None:
    """Guards against an admin request, and a name, that a folder on a stuck disk holds for ever."""
    house.may_load.clear()
    house.state.load_seconds = 0.2
    try:
        reply = house.load("two", base / "allowed" / "two")
    finally:
        house.may_load.set()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading_timed_out")
    house.state.load_seconds = 60
    assert house.load("two", base / "allowed" / "two").status_code == 200


def test_who_may_change_models(house: House, base: Path) -> None:
    """A key for inference, or none, that can take a model away from everybody."""
    inference = {"authorization": f"Bearer {house.keys['inference']}"}
    for headers, status in (({}, 401), (inference, 403)):
        assert httpx.delete(f"{house.running.url}/admin/models/one", headers=headers).status_code == status
        body = {"name": "two", "path": str(base / "allowed" / "two")}
        assert httpx.post(f"{house.running.url}/admin/models", json=body, headers=headers).status_code == status
    assert [m.id for m in house.client.models.list()] == ["one"]


def test_nobody_is_admin_without_keys(base: Path) -> None:
    """A server on loopback whose models any program, or any web page, can swap."""
    state = ServerState(KeyRing(), allowed=[base])
    state.models.add("one", *open_engine(base / "allowed" / "one", Options(slots=1)))
    running = Running(build_app(state))
    try:
        assert httpx.delete(f"{running.url}/admin/models/one").status_code == 403
        assert httpx.get(f"{running.url}/v1/models").status_code == 200
    finally:
        running.close()


def test_unloading_waits_for_what_runs(house: House) -> None:
    """Answers that are cut because somebody else was done with the model."""
    how: dict[str, Any] = {"model": "one", "max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = house.client.completions.create(prompt="x", **how, stream_options={"include_usage": True})
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(house.admin.delete, "/admin/models/one")
        while len(house.state.models):
            assert not unloading.done()
        with pytest.raises(openai.NotFoundError):
            house.client.completions.create(prompt="x", **how)
        assert not unloading.done()
        assert list(stream)[-1].usage.completion_tokens == 1500  # type: ignore[union-attr]
        assert unloading.result(20).status_code == 200


def test_a_loading_model_holds_nobody_up(house: House, base: Path) -> None:
    """A server that stands still for the minute that a model takes to load."""
    house.may_load.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(house.load, "two", base / "allowed" / "two")
        assert house.loading.wait(20)
        with pytest.raises(openai.InternalServerError) as caught:
            house.client.completions.create(model="two", **GREEDY)
        assert caught.value.status_code == 503 and caught.value.code == "model_loading"
        assert caught.value.response.headers["retry-after"]
        assert house.client.completions.create(model="one", **GREEDY).choices[0].text
        assert house.load("two", base / "allowed" / "one").status_code == 409
        assert not loading.done()
        house.may_load.set()
        assert loading.result(20).status_code == 200
    assert house.client.completions.create(model="two", **GREEDY).choices[0].text
