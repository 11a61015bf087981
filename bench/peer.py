"""Runs a peer's script with the peer's Python, unchanged, and adds to its JSON line the memory before its model was built.

    PEERS/bin/python bench/peer.py SCRIPTS_FOLDER pretrain_hf.py --data D --work W --peer trainer_compile

The libraries that the script will need are imported before that reading, so that only model and training are in the difference.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

IMPORTS = {
    "pretrain_hf.py": ("transformers.trainer", "transformers.models.qwen3.modeling_qwen3"),
    "pretrain_litgpt.py": ("litgpt.pretrain",),
    "sft_trl.py": ("datasets", "trl.trainer.sft_trainer", "transformers.models.qwen3.modeling_qwen3"),
}


def rss_mb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith("VmRSS:"))
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    folder, script = Path(sys.argv[1]), sys.argv[2]
    sys.path[0] = str(folder)  # in place of this file's folder, whose names could hide those of libraries
    sys.argv = [script, *sys.argv[3:]]
    common: Any = importlib.import_module("common")  # sets the offline switches of the Hugging Face libraries first
    for name in IMPORTS.get(script, ()):
        importlib.import_module(name)
    base: list[float] = []

    def measured(build: Any) -> Any:
        def call(*args: Any, **rest: Any) -> Any:
            base.append(rss_mb())
            return build(*args, **rest)

        return call

    def emit(job: str, peer: str, **fields: Any) -> None:
        original(job, peer, base_rss_mb=base[0] if base else None, **fields)

    original = common.emit
    common.emit, common.model = emit, measured(common.model)
    if script == "pretrain_litgpt.py":  # not `setup`: litgpt reads its signature when it saves hyperparameters
        litgpt: Any = importlib.import_module("litgpt.pretrain")
        litgpt.main = measured(litgpt.main)
    runpy.run_path(str(folder / script), run_name="__main__")


if __name__ == "__main__":
    main()
