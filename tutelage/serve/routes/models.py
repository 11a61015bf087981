"""Which models there are, and how they come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from tutelage.gguf.folder import model_folder
from tutelage.models.adapters.lora import is_lora
from tutelage.serve.names import MODEL_NAME
from tutelage.serve.registry import Base
from tutelage.serve.requests import as_api_errors, read_json
from tutelage.serve.schema import ApiError, parse
from tutelage.serve.state import ServerState, state_of

router = APIRouter()


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=rf"^{MODEL_NAME}$")
    path: str = Field(pattern=r"^[^\x00]{1,4096}$")
    base: str | None = None  # of an adapter: the model that wears it; not needed where there is only one


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [served.card for served in state_of(request).models]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    return state_of(request).models.get(name).card


@router.post("/admin/models")
async def load(request: Request) -> dict[str, Any]:
    """Loads a model folder, or an adapter's, and replies with its card once it is served."""
    state = state_of(request)
    asked = parse(LoadRequest, await read_json(request))
    state.refuse_draining()
    folder = _allowed(state, asked.path)
    try:
        with as_api_errors("path"):
            folder = model_folder(folder)
        _check_folder(folder)
        with as_api_errors("path"):
            if not is_lora(folder):
                if asked.base is not None:
                    raise ApiError(400, "only an adapter has a base, and this folder holds none", param="base")
                return (await state.models.load(asked.name, folder, state.load_seconds)).card
            return (await state.models.adapt(asked.name, folder, asked.base or _only_base(state), state.load_seconds)).card
    except OSError as error:
        raise ApiError(400, f"the folder cannot be read: {error.strerror}", param="path") from error


@router.delete("/admin/models/{name:path}")
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Replies when the model's last request is finished and its memory is free."""
    await state_of(request).models.unload(name)
    return {"id": name, "object": "model", "deleted": True}


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ApiError(
            400, "there is no such folder or GGUF file; the path is one of this machine, not a run's name", param="path"
        )
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ApiError(400, "this folder holds neither a model (config.json) nor an adapter (adapter_config.json)", param="path")


def _only_base(state: ServerState) -> str:
    bases = [served.name for served in state.models if isinstance(served, Base)]
    if len(bases) != 1:
        raise ApiError(400, f"an adapter's base is one of {', '.join(map(repr, bases)) or 'no models'}", param="base")
    return bases[0]


def _allowed(state: ServerState, path: str) -> Path:
    """The folder, links followed. Raises `ApiError` 403 for one that is elsewhere, whether it exists or not."""
    try:
        folder = Path(path).resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise ApiError(400, "the path cannot be followed: a link in it leads to itself", param="path") from error
    if not any(folder.is_relative_to(allowed) for allowed in state.allowed):
        raise ApiError(
            403, "models are loaded only by their full path, from folders given by --allow-models", param="path",
            code="path_not_allowed",
            kind="permission_error",
        )  # fmt: skip
    return folder
