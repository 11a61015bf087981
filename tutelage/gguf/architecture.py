"""The config.json of the model in a GGUF file, and where its tensors are under Hugging Face's names. Imports without torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from tutelage.gguf.reader import Gguf, TensorPlace

FREQUENCIES = "rope_freqs.weight"  # what Llama 3.1's frequencies are divided by
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Meta's models of this rotary scaling have; the file holds the factors that come of it."""


@dataclass(slots=True, frozen=True)
class Stored:
    """A tensor of the file and what makes it Hugging Face's."""

    place: TensorPlace
    heads: int = 0  # rows of so many heads lie in llama.cpp's order of rotation; 0: they are as they should be
    offset: float = 0.0  # added to the values


@cache
def _table() -> dict[str, Any]:
    text = files("tutelage.gguf").joinpath("architectures.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return table


def _family(file: Gguf) -> tuple[str, dict[str, Any]]:
    """The name and the row of a file's architecture. Raises `ArtifactError` for one that is not read, and for parts of models."""
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise file.wrong(
            "one of several files that make a model", "split.count", file.metadata["split.count"], "a model in one file",
            fix="join them: llama-gguf-split --merge FIRST-FILE NEW-FILE",
        )  # fmt: skip
    if file.metadata.get("general.type", "model") != "model":
        raise file.wrong("not a model", "general.type", file.metadata["general.type"], "model", fix="give the model's file")
    name, known = str(file.metadata.get("general.architecture")), _table()["architectures"]
    if name not in known:
        raise file.wrong(
            "no model of a family that is read from GGUF", "general.architecture", name, f"one of {', '.join(known)}",
            fix="use the model's Hugging Face folder (config.json, safetensors)",
        )  # fmt: skip
    return name, known[name]


# The configuration

COUNTS = ("_length", "_count", "head_count_kv")  # ends of keys whose numbers are whole


def config_of(file: Gguf) -> dict[str, Any]:
    """The object of a config.json. Raises `ArtifactError` for an architecture that is not read, and for keys that are missing or
    wrong."""
    name, own = _family(file)
    keys = {**_table()["common"]["keys"], **own.get("keys", {})}
    out: dict[str, Any] = {"model_type": own["model_type"], **own.get("values", {})}
    for key, theirs in keys.items():
        value = _number(file, f"{name}.{theirs}", needed=theirs in _table()["common"]["keys"].values())
        if value is not None:
            out[key] = value
    heads = out["num_attention_heads"]
    out["num_key_value_heads"] = _number(file, f"{name}.attention.head_count_kv") or heads
    width, values = (_number(file, f"{name}.attention.{what}_length") for what in ("key", "value"))
    out["head_dim"] = width or out["hidden_size"] // heads
    if values is not None and values != out["head_dim"]:
        expected = f"{out['head_dim']}, as the keys have"
        raise file.wrong("values of another width than keys are not read", f"{name}.attention.value_length", values, expected)
    turning = _number(file, f"{name}.rope.dimension_count") or out["head_dim"]
    if turning != out["head_dim"]:
        raise file.wrong("heads that turn in part are not read", f"{name}.rope.dimension_count", turning, f"{out['head_dim']}")
    out["vocab_size"] = _tensor(file, "token_embd.weight").shape[0]
    out["tie_word_embeddings"] = "output.weight" not in file.tensors
    if "wide" in own:
        wide = own["wide"] == out["num_hidden_layers"]
        out["query_pre_attn_scalar"] = out["hidden_size"] // heads if wide else out["head_dim"]
    return out | _biases(file, own["model_type"]) | _ropes(file, name, out)


def _biases(file: Gguf, kind: str) -> dict[str, Any]:
    """Which linear layers have biases, where the family leaves it open."""
    out = {}
    for key, tensors in (("attention_bias", ("attn_q", "attn_output")), ("mlp_bias", ("ffn_up",))):
        if kind != "qwen2" and any(f"blk.0.{name}.bias" in file.tensors for name in tensors):
            out[key] = True
    return out


def _number(file: Gguf, key: str, needed: bool = False) -> Any:
    """A number of the metadata; one that is given layer by layer has to be the same for all."""
    value: Any = file.metadata.get(key)
    if isinstance(value, list) and value:
        if len(set(map(str, value))) > 1:
            raise file.wrong("layers of different shapes are not read", key, value, "the same for all layers")
        value = value[0]
    if value is None and not needed:
        return None
    bare = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if not bare or value < 0 or (needed and not value) or (isinstance(value, float) and key.endswith(COUNTS)):
        raise file.wrong("the metadata lacks a number, or has a wrong one", key, value, "a number above 0, whole where it counts")
    return shortest(value) if isinstance(value, float) else value


def shortest(value: float) -> float:
    """The number of fewest digits that is the same in single precision: 1e-05 for 9.999999747378752e-06."""
    single = struct.pack("<f", value)
    return next(x for digits in range(1, 18) if struct.pack("<f", x := float(f"{value:.{digits}g}")) == single)


def _ropes(file: Gguf, name: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary keys of a config.json."""
    key = f"{name}.rope."
    out: dict[str, Any] = {"rope_theta": float(_number(file, f"{key}freq_base") or 10000.0)}
    if FREQUENCIES in file.tensors:
        return out | {"rope_scaling": _of_factors(file, shape, out["rope_theta"])}
    kind = file.metadata.get(f"{key}scaling.type", "none")
    if kind == "none":
        old = _number(file, f"{key}scale_linear")  # the name of the first releases
        return out | ({"rope_scaling": {"rope_type": "linear", "factor": float(old)}} if old not in (None, 0, 1) else {})
    factor = _number(file, f"{key}scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        raise file.wrong("a rotary scaling that is not read", f"{key}scaling.type", kind, "none, linear or yarn, with a factor")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        first = _number(file, f"{key}scaling.original_context_length") or shape["max_position_embeddings"]
        scaling["original_max_position_embeddings"] = first
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if value := _number(file, f"{key}scaling.{theirs}"):
                scaling[ours] = value
        if extra := _number(file, f"{key}scaling.attn_factor"):  # llama.cpp multiplies YaRN's own factor by it
            scaling["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0)
    return out | {"rope_scaling": scaling}


def _of_factors(file: Gguf, shape: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The scaling whose frequencies are divided by the factors of a tensor: Llama 3's where they are its, else `longrope` with
    the same factors for every length."""
    place, count = file.tensors[FREQUENCIES], shape["head_dim"] // 2
    if place.type.name != "F32" or place.shape != (count,):
        raise file.wrong("not the factors of rotary frequencies", FREQUENCIES, f"{place.type.name} {list(place.shape)}",
                         f"F32 [{count}]")  # fmt: skip
    with file.path.open("rb") as f:
        f.seek(place.start)
        factors = struct.unpack(f"<{count}f", f.read(place.size))
    factor = round(max(factors), 4)
    llama3 = {"rope_type": "llama3", "factor": float(factor), **LLAMA3}
    expected = (_llama3_factor(theta ** (-2 * i / shape["head_dim"]), llama3) for i in range(count))
    if factor > 1 and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
        return llama3
    return {
        "rope_type": "longrope", "short_factor": list(factors), "long_factor": list(factors), "attention_factor": 1.0,
        "original_max_position_embeddings": shape["max_position_embeddings"],
    }  # fmt: skip


def _llama3_factor(frequency: float, scaling: Mapping[str, Any]) -> float:
    """What Llama 3.1 divides a frequency by."""
    first, low, high = (scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * math.pi / frequency
    if wavelength < first / high:
        return 1.0
    if wavelength > first / low:
        return float(scaling["factor"])
    blend = (first / wavelength - low) / (high - low)
    return float(1 / ((1 - blend) / scaling["factor"] + blend))


# Tensors


def tensors_of(file: Gguf) -> dict[str, Stored]:
    """The file's tensors by Hugging Face's names; one that is not known keeps its own."""
    name, own = _family(file)
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    common, out = _table()["common"], {}
    layer = {**common["layer"], **own["norms"]}
    for found, place in file.tensors.items():
        if found == FREQUENCIES:
            continue
        stem, _, kind = found.rpartition(".")
        inside = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = inside[2] if inside else stem
        ours = f"model.layers.{inside[1]}.{layer[part]}" if inside and part in layer else common["tensors"].get(stem, stem)
        rows = 0
        if own.get("permuted") and part in heads:
            rows = _number(file, f"{name}.{heads[part]}") or _number(file, f"{name}.attention.head_count", needed=True)
        is_norm = own.get("unit_offset") and part.endswith("_norm")
        out[f"{ours}.{kind}"] = Stored(place, rows, -1.0 if is_norm else 0.0)
    return out


def _tensor(file: Gguf, name: str) -> TensorPlace:
    if name not in file.tensors:
        raise file.wrong("a tensor is missing", name, None, "the table of embeddings")
    return file.tensors[name]
