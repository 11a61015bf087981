"""What llama.cpp makes of the real files, recorded in golden_llama_cpp.json. To record it again, with llama-cpp-python installed:

python tests/gguf/golden.py SMOLLM2.gguf GEMMA.gguf
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from strings_2000 import strings

RECORD = Path(__file__).parent / "golden_llama_cpp.json"
POSITIONS = 500


def digests(texts: Sequence[Sequence[int]]) -> str:
    """Four hex digits for the ids of each text."""
    return "".join(f"{zlib.crc32(np.asarray(ids, np.int32).tobytes()) & 0xFFFF:04x}" for ids in texts)


def scored_text() -> str:
    """The text whose tokens are scored: a mixture, so that no token is certain."""
    return "".join(strings(seed=1, count=200))


def tokens(file: Path, special: bool) -> list[list[int]]:
    """llama.cpp's ids of the strings, control tokens read as such or not."""
    from llama_cpp import Llama

    reader = Llama(str(file), vocab_only=True, verbose=False)
    return [reader.tokenize(s.encode(), add_bos=False, special=special) for s in strings()]


def as_float32(file: Path, out: Path) -> Path:
    """The same model with all values unpacked, by the `gguf` package."""
    import gguf

    whole = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, whole.fields["general.architecture"].contents())
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in whole.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in tensor.shape][::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def log_probabilities(file: Path) -> tuple[list[int], list[float]]:
    """llama.cpp's ids of the scored text, and the log-probability of each after those before it. The cache is float32: its
    default, half precision, is off by more than a hundredth."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=512, n_batch=512, logits_all=True, type_k=0, type_v=0, verbose=False)
    adds_bos = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    ids = model.tokenize(scored_text().encode(), add_bos=adds_bos, special=False)[: POSITIONS + 1]
    model.eval(ids)
    scores = np.array(model.scores[: len(ids)], np.float64)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return ids, [round(float(scores[i, token]), 5) for i, token in enumerate(ids[1:])]


def main() -> None:
    record: dict[str, Any] = {}
    for name, file in zip(("smollm2", "gemma"), map(Path, sys.argv[1:]), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            ids, values = log_probabilities(as_float32(file, Path(folder) / "f32.gguf"))
        record[name] = {
            "special": digests(tokens(file, True)), "plain": digests(tokens(file, False)), "ids": ids, "logprobs": values,
        }  # fmt: skip
    RECORD.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
