"""lm-evaluation-harness believes our server: the scores it gets over HTTP are the engine's, and those of its own backend.

Weighs hundreds of megabytes, so it runs with `make test-peers`, in an environment that has `lm-eval[api]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tests.serve.running import Running
from tutelage.chat.render import Renderer
from tutelage.engine import Engine
from tutelage.models.export import save
from tutelage.models.open import load
from tutelage.serve.app import create_app

pytestmark = pytest.mark.peers
QUESTIONS = [
    ("the cat sat on", [" the mat", " the dog", " a door"]),
    ("one two three", [" four", " five four", " the cat sat by the door"]),
    ("naïve café", [" ünïcode", " 日本語", " one"]),
]


def test_lm_eval_gets_the_engines_scores(tmp_path: Path) -> None:
    """Log-likelihood evaluations that silently sit at chance (llama.cpp#27174, lm-eval#4158)."""
    pytest.importorskip("lm_eval", reason="lm-eval[api] is not installed here")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    renderer = small.renderer(tmp_path / "tokenizer")
    save(small.model(renderer.tokenizer.vocab_size, context=256), tmp_path / "model", tmp_path / "tokenizer")
    engine = Engine(load(tmp_path / "model").eval(), Renderer(tmp_path / "model"))
    asked = [
        Instance("loglikelihood", {}, (question, answer), i)
        for i, (question, answer) in enumerate((q, a) for q, answers in QUESTIONS for a in answers)
    ]
    running = Running(create_app(engine, engine.renderer, "tiny"))
    try:
        remote = LocalCompletionsAPI(
            base_url=f"{running.url}/v1/completions", model="tiny", tokenizer=str(tmp_path / "model"),
            tokenizer_backend="huggingface", tokenized_requests=True, num_concurrent=1, max_length=256,
        )  # fmt: skip
        over_http = remote.loglikelihood(asked, disable_tqdm=True)
    finally:
        running.close()
    own = HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=2)

    def in_process(harness: Any) -> list[float]:
        """The harness's own tokens: its local backend begins with BOS, the one over HTTP does not."""
        pairs = [harness._encode_pair(*instance.args) for instance in asked]
        return [float(scored.sum()) for scored in engine.score([([*begin, *end], len(begin)) for begin, end in pairs])]

    assert [p for p, _ in over_http] == pytest.approx(in_process(remote), abs=1e-4)
    assert [p for p, _ in own.loglikelihood(asked, disable_tqdm=True)] == pytest.approx(in_process(own), abs=1e-3)
    assert len({round(p, 3) for p in in_process(remote)}) == len(asked)
