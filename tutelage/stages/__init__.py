"""The lifecycle: one short file a stage. Each has `run(config, run) -> facts`; the table below is all there is to know."""

from __future__ import annotations

from tutelage.recipe import Kind

STAGES: dict[str, Kind] = {
    "data": Kind(
        "Data",
        "tutelage.stages.data",
        "collect, clean, deduplicate and split text or conversations",
        "tutelage.stages.estimates:data",
        makes="records",
        outside="tutelage.stages.sources:digest",
    ),
    "tokenizer": Kind(
        "Tokenizer",
        "tutelage.stages.tokenizer",
        "train a byte-level BPE tokenizer and measure it",
        "tutelage.stages.estimates:tokenizer",
        makes="tokenizer",
    ),
    "tokens": Kind(
        "Tokens",
        "tutelage.stages.tokens",
        "turn records into memory-mapped token shards",
        "tutelage.stages.estimates:tokens",
        makes="tokens",
    ),
    "pretrain": Kind(
        "Pretrain",
        "tutelage.stages.pretrain",
        "train on plain text, from scratch or on from a checkpoint",
        "tutelage.stages.estimates:training",
        makes="model",
        ranks=True,
    ),
    "sft": Kind(
        "Sft",
        "tutelage.stages.sft",
        "fine-tune a checkpoint on conversations",
        "tutelage.stages.estimates:training",
        makes="model",
        ranks=True,
    ),
    "prefer": Kind(
        "Prefer",
        "tutelage.stages.prefer",
        "train a model towards preferred answers: DPO and its family",
        "tutelage.stages.estimates:tuning",
        makes="model",
        ranks=True,
    ),
    "rl": Kind(
        "Rl",
        "tutelage.stages.rl",
        "train a model on its own answers, by rewards: GRPO and its family, PPO",
        "tutelage.stages.estimates:rollouts",
        makes="model",
        ranks=True,
    ),
    "classify": Kind(
        "Classify",
        "tutelage.stages.classify",
        "train a classifier of texts, or of their parts, and measure it",
        "tutelage.stages.estimates:classify",
        makes="model",
    ),
    "evaluate": Kind(
        "Evaluate",
        "tutelage.stages.evaluate",
        "measure a model on held-out text and questions",
        "tutelage.stages.estimates:evaluate",
        makes="scores",
    ),
    "report": Kind(
        "Report",
        "tutelage.stages.report",
        "one HTML page about a run and all it came from",
        "tutelage.stages.estimates:report",
        makes="report",
    ),
}
