"""Writes a Hugging Face model folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tutelage import log
from tutelage.files import read_object, whole_folder, write_json
from tutelage.models import families
from tutelage.models.decoder import Decoder
from tutelage.models.folder import DTYPES, INDEX, WEIGHTS, tokenizer_files
from tutelage.models.hf.causal import Wrapped, save_hf
from tutelage.models.names import Stored, stored
from tutelage.models.shard import collected, is_sharded, release
from tutelage.plan.config_json import end_ids

SHARD_BYTES = 5 * 10**9


def save(
    model: nn.Module,
    folder: Path | str,
    tokenizer_folder: Path | str | None = None,
    *,
    stop_ids: Sequence[int] = (),
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `folder` so that `AutoModelForCausalLM.from_pretrained(folder)` gives the same logits.

    `tokenizer_folder`: its tokenizer files are copied. `stop_ids`: tokens that end a generation besides the end of text.
    `dtype`: of the stored weights; the model's own when left out. What was in `folder` is replaced. Of a sharded model every
    rank calls this, and rank 0 writes.
    Raises ArtifactError for a tokenizer folder without a tokenizer, StorageError when the disk refuses.
    """
    folder = Path(folder)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    copied = () if tokenizer_folder is None else tokenizer_files(Path(tokenizer_folder))
    held = collected(tensors(model))
    if is_sharded(model) and log.rank() != 0:
        return
    with whole_folder(folder) as partial:
        if isinstance(model, Decoder):
            _write_decoder(model, held, partial, kind, shard_bytes)
            write_json(partial / "generation_config.json", generation_config(model.config.to_hf(), stop_ids))
        else:
            assert isinstance(model, Wrapped), type(model)
            save_hf(model, held, partial, kind, shard_bytes)
            if stop_ids:
                said = partial / "generation_config.json"  # what starts a target and the like stays as the model has it
                ends = generation_config(model.config.to_hf(), stop_ids)
                write_json(said, {**ends, **(read_object(said) if said.is_file() else {}), "eos_token_id": ends["eos_token_id"]})
        for file in copied:
            shutil.copyfile(file, partial / file.name)


def tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What is stored of a model, a tensor that has several names under each of them where `transformers` does the writing."""
    release(model)
    return model.hf.state_dict(keep_vars=True).items() if isinstance(model, Wrapped) else model.named_parameters()


def generation_config(raw: dict[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    """The object of a generation_config.json: what starts, ends and pads a text."""
    eos = raw.get("eos_token_id")
    ends = list(dict.fromkeys([*([] if eos is None else eos if isinstance(eos, list) else [eos]), *stop_ids]))
    tokens = {"bos_token_id": raw.get("bos_token_id"), "pad_token_id": raw.get("pad_token_id")}
    if ends:
        tokens["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {"_from_model_config": True, **{k: v for k, v in tokens.items() if v is not None}}


def _write_decoder(model: Decoder, held: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    write_folder(model.config.to_hf(), held, folder, dtype or model.dtype, shard_bytes)


def write_folder(
    config: dict[str, Any], held: dict[str, Tensor], folder: Path, kind: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the config.json of a family of ours, and the tensors `held` under the names that it has on disk."""
    write_json(folder / "config.json", {**config, "dtype": str(kind).removeprefix("torch.")})
    rows = stored(families.family(config["model_type"]).disk, list(held))

    def get(name: str) -> Tensor:
        return held[name].to("cpu", kind)

    shards = _shards(rows, {n: p.numel() * kind.itemsize for n, p in held.items()}, shard_bytes)
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({row.name: row.join(get) for row in shard}, folder / name, metadata={"format": "pt"})
        table |= {row.name: name for row in shard}
    if len(shards) > 1:
        total = sum(p.numel() for p in held.values()) * kind.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def _shards(rows: list[Stored], sizes: dict[str, int], limit: int) -> list[list[Stored]]:
    """Tensors in order, a new file where the next would not fit."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for row in rows:
        size = sum(sizes[n] for n in row.ours)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += size
    return shards


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end a generation: those of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = end_ids(read_object(path), path)
            if ids:
                return ids
    return ()
