"""The lifecycle: one short file a stage, with `run(config, run) -> facts`, and one row here. See `StageSpec` for what follows
from a stage's name."""

from __future__ import annotations

from tutelage.config.spec import StageSpec

STAGES: dict[str, StageSpec] = {
    "data": StageSpec("Data", makes="records", outside="digest"),
    "tokenizer": StageSpec("Tokenizer", makes="tokenizer"),
    "tokens": StageSpec("Tokens", makes="tokens"),
    "pretrain": StageSpec("Pretrain", makes="model", ranks=True),
    "sft": StageSpec("Sft", makes="model", ranks=True),
    "reward": StageSpec("Reward", makes="model", ranks=True),
    "sample": StageSpec("Sample", makes="records", outside="code"),
    "select": StageSpec("Select", makes="records"),
    "distil": StageSpec("Distil", makes="model", ranks=True),
    "extend_vocab": StageSpec("ExtendVocab", makes="model", ranks=True),
    "adapt": StageSpec("Adapt", makes="model", ranks=True),
    "preference": StageSpec("Preference", makes="model", ranks=True),
    "rl": StageSpec("Rl", makes="model", ranks=True, outside="code"),
    "merge": StageSpec("Merge", makes="model"),
    "classify": StageSpec("Classify", makes="model", ranks=True),
    "translate": StageSpec("Translate", makes="model", ranks=True),
    "evaluate": StageSpec("Evaluate", makes="scores"),
    "report": StageSpec("Report", makes="report"),
}

FILE_COMMANDS: dict[str, StageSpec] = {
    # These turn one file into another: a command and a Python function, but no run, and no stage of a recipe.
    "generate": StageSpec("Generate"),
    "predict": StageSpec("Predict"),
}
