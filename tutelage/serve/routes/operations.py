"""For those who run the server: is it alive, is it ready, what is it doing."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tutelage import __version__
from tutelage.serve.metrics import CONTENT_TYPE
from tutelage.serve.state import state_of

router = APIRouter()
LOOK = ["GET", "HEAD"]


@router.api_route("/health", methods=LOOK)
async def health() -> dict[str, str]:
    """200 as long as the process answers: restart it otherwise."""
    return {"status": "ok"}


@router.api_route("/ready", methods=LOOK, response_model=None)
async def ready(request: Request) -> Response:
    """200 when requests are taken; 503 while models load, while the server shuts down, and without a model."""
    status = state_of(request).status
    if status == "ready":
        return JSONResponse({"status": status})
    return JSONResponse({"status": status}, 503, headers={"retry-after": "1"})


@router.api_route("/version", methods=LOOK)
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    return Response(state_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})
