"""From a GGUF file's path to the first log-probability of a 100-token text, float32: Tutelage against transformers' reader.

    python bench/gguf_open.py --model smollm2 --rounds 5

Each run is a fresh process, the sides in turn; libraries are imported and our kernels compiled before the clock starts, and the
file is in the page cache. `first` opens the file for the first time, as transformers does every time; `again` finds what an
earlier opening left. Prints medians, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

TOKENS = 100
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 20

OURS = """
import time, torch
from tutelage.models import kernels
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.tokenizer.load import TokenizerFolder
kernels.available()
started, cpu = time.perf_counter(), time.process_time()
ids = TokenizerFolder.open(path).encode_text(text)[:count]
model = load(path)
with torch.no_grad():
    rows = model.logits(Batch.of([ids])).view(count, -1)
"""
THEIRS = """
import os, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.llama.modeling_llama, transformers.modeling_gguf_pytorch_utils, gguf
folder, file = os.path.split(path)
started, cpu = time.perf_counter(), time.process_time()
words = AutoTokenizer.from_pretrained(folder, gguf_file=file)
ids = words(text, add_special_tokens=False).input_ids[:count]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
with torch.no_grad():
    rows = model(torch.tensor([ids])).logits[0]
"""
END = """
first = float(rows[:-1].log_softmax(-1)[0, ids[1]])
import json
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "logprob": first}))
"""


def run(code: str, path: Path) -> dict[str, float]:
    """One process. Raises `SystemExit` with its errors when it fails."""
    head = f"path, text, count = {str(path)!r}, {TEXT!r}, {TOKENS}\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", head + code + END], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def round_of(file: Path) -> dict[str, dict[str, float]]:
    """All sides once. The file gets a name that it has not had, so that nothing of it is kept from before."""
    from tutelage.gguf.folder import model_folder

    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(file)
        found = {"first": run(OURS, link), "again": run(OURS, link), "transformers": run(THEIRS, link)}
        shutil.rmtree(model_folder(link).parent)
    if abs(found["first"]["logprob"] - found["transformers"]["logprob"]) > 1e-2:
        raise SystemExit(f"the sides do not agree: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a GGUF file, or a short name")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from tutelage.gguf.folder import packaged

    file = packaged(args.model) or Path(args.model).resolve()
    rounds = [round_of(file) for _ in range(args.rounds)]
    for side in ("first", "again", "transformers"):
        record = {key: round(statistics.median(r[side][key] for r in rounds), 3) for key in ("seconds", "cpu")}
        if side != "transformers":
            for key in ("seconds", "cpu"):
                ratio = statistics.median(r["transformers"][key] / r[side][key] for r in rounds)
                record[f"times_faster_{key}"] = round(ratio, 1)
        common.emit("gguf_open", side, **record)


if __name__ == "__main__":
    main()
