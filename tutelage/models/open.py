"""Opens whatever is in a model folder: our decoder, a model of `transformers` with the same interface, or an adapter on its base.

Nothing is downloaded, no pickle is read, no code from the folder runs, and for our families `transformers` is not imported.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tutelage.artifacts import base_of, is_adapter
from tutelage.errors import ArtifactError
from tutelage.gguf.folder import model_folder
from tutelage.models.adapters.folder import check_base, kind_of, load_adapter
from tutelage.models.adapters.merge import merge
from tutelage.models.config import unsupported
from tutelage.models.folder import DTYPES, StoredFiles, read_config, refuse_code, refuse_quantized, refuse_scorer
from tutelage.models.hf.open import load_hf
from tutelage.models.interface import Model
from tutelage.models.load import load_decoder


def load(
    folder: Path | str, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", adapter: bool = True
) -> Model:
    """The model of `folder`, in evaluation mode, its weights copied to `device` as `dtype`. For an adapter's folder that is the
    base that it names, with the adapter. A GGUF file, or the short name of one in a package, is a model's folder too.

    A model that is not of our families runs on `transformers` (extra `hf`), unless `adapter` is off.
    Raises ArtifactError for a folder that is not a model, and for weights that are missing or of another shape.
    """
    folder, device = model_folder(folder), torch.device(device)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    refuse_scorer(folder)
    if is_adapter(folder):
        return _load_adapted(folder, device, kind)
    raw = read_config(folder)
    reason = unsupported(raw)
    if reason is None:
        return load_decoder(folder, raw, device, kind)
    refuse_code(folder, raw)
    refuse_quantized(folder, raw)
    if not adapter:
        raise ArtifactError(f"our decoder does not run this model: {reason}", file=folder / "config.json")
    StoredFiles.find(folder)
    return load_hf(folder, device=device, dtype=kind)


def _load_adapted(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """The base of an adapter's folder with the adapter. What can be merged is merged, in memory, so that it runs as fast as any
    model; a base that was in 4 bits in training takes the values that it had there."""
    base = base_of(folder)
    check_base(folder, base)
    model = load_adapter(folder, load(base, device=device, dtype=dtype))
    return model.eval() if kind_of(folder) in ("prompt", "prefix") else merge(model, quiet=True)  # type: ignore[no-any-return]
