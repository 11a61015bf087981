"""Which engine a server has, and what it does not have then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tutelage.config.stages import Generate
from tutelage.errors import ConfigError
from tutelage.serve.listen import Options, serve
from tutelage.stages import generate


@pytest.mark.parametrize(
    ("how", "field"),
    [({"engine": "llama.cpp"}, "engine"), ({"vllm": {"seed": 1}}, "vllm"), ({"engine": "vllm", "speculate": 4}, "speculate"),
     ({"engine": "vllm", "draft": Path("small")}, "draft"), ({"engine": "vllm", "batch_invariant": True}, "batch_invariant")],
)  # fmt: skip
def test_options_of_another_engine_are_refused(how: dict[str, Any], field: str) -> None:
    """Settings that are accepted and ignored; told before anything is loaded."""
    with pytest.raises(ConfigError) as caught:
        serve({"m": Path("nowhere")}, Options(port=0, **how))
    assert caught.value.field == field


def test_vllm_serves_one_model_without_adapters() -> None:
    """A second model that finds no memory, minutes later."""
    for models, adapters, field in ((("a", "b"), (), "engine"), (("a",), ("c",), "adapter")):
        with pytest.raises(ConfigError) as caught:
            serve(dict.fromkeys(models, Path()), Options(port=0, engine="vllm"), dict.fromkeys(adapters, Path()))
        assert caught.value.field == field


def test_generate_leaves_the_device_to_vllm(tmp_path: Path) -> None:
    """A device that is named and not used."""
    model, rows = small.saved(tmp_path, "model", 64), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one"}\n')
    config = Generate(model=str(model), input=str(rows), output=str(tmp_path / "out.jsonl"), engine="vllm", device="cpu")
    with pytest.raises(ConfigError) as caught:
        generate.run(config)
    assert caught.value.field == "device"
