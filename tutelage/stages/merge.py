"""Stage `merge`: an adapter and its base -> a whole model, read back and compared with the adapted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.artifacts import base_of, whole_of
from tutelage.config.stages import Merge
from tutelage.models.adapters.folder import check_base, load_adapter
from tutelage.models.adapters.merge import check_logits, merge, probe
from tutelage.models.export import read_stop_ids, save
from tutelage.models.folder import DTYPES, TOKENIZER_FILES
from tutelage.models.open import load
from tutelage.plan.config_json import read_config_json
from tutelage.rundir import RunDir
from tutelage.setup.trainer import choose_device


def run(config: Merge, run: RunDir) -> dict[str, Any]:
    folder, device = run.input("adapter"), choose_device(config)
    base = run.input("model") if config.model else base_of(folder)
    check_base(folder, base)
    dtype = stored_dtype(base) if config.dtype == "stored" else config.dtype
    model = load_adapter(folder, load(base, device=device))
    before = probe(model)
    merge(model, None if dtype == "float32" else DTYPES[dtype])
    save(model, run.folder("model"), tokenizer_of(folder, base), stop_ids=read_stop_ids(whole_of(base)))
    del model
    written = load(run.folder("model"), device=device, dtype=dtype)
    difference = check_logits(before, probe(written), f"what was written ({dtype})")
    log.say(f"merged into {run.folder('model')}")
    return {"dtype": dtype, "logit_difference": difference, "logit_spread": float(before.std())}


def stored_dtype(base: Path) -> str:
    """How the base's weights are stored; float32 where its config.json does not say."""
    raw = read_config_json(whole_of(base) / "config.json")
    said = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    return said if said in DTYPES and hasattr(torch, said) else "float32"


def tokenizer_of(folder: Path, base: Path) -> Path:
    """The adapter's own tokenizer, which a template may have changed; else its base's."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES[:1]) else whole_of(base)
