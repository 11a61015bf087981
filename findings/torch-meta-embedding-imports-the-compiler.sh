#!/usr/bin/env bash
# torch 2.13.0 (CPU). A layer that is made under torch.device("meta") gets no values, so making it should cost nothing.
# nn.Linear does: its uniform_ on meta imports a module or so. nn.Embedding does not: its normal_ on meta imports the decompositions,
# and with them torch._dynamo and torch._inductor. Seen: 821 modules and 3.0 s on two cores, in every process that loads a language
# model the recommended way (meta first, then assign weights). Leaving out the initialisation (skip_init, or a function mode that
# returns the tensor from torch.nn.init) avoids it. Fails when torch no longer does this.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys
import time

import torch
from torch import nn


def cost(layer):
    before, started = set(sys.modules), time.perf_counter()
    with torch.device("meta"):
        layer()
    return len(set(sys.modules) - before), time.perf_counter() - started


linear, linear_seconds = cost(lambda: nn.Linear(8, 8))
embedding, embedding_seconds = cost(lambda: nn.Embedding(8, 8))
print(f"torch {torch.__version__}")
print(f"nn.Linear on meta: {linear} new modules, {linear_seconds:.3f} s")
print(f"nn.Embedding on meta: {embedding} new modules, {embedding_seconds:.3f} s")
print("torch._inductor imported:", "torch._inductor" in sys.modules)
assert linear < 50 < 400 < embedding
assert "torch._dynamo" in sys.modules and "torch._inductor" in sys.modules
PY
