"""The engine thread of a base model, for requests that wear an adapter."""

from __future__ import annotations

from typing import Any

from tutelage.engine import Sampling
from tutelage.engine.protocol import EngineProtocol
from tutelage.serve.engine_thread import GROUP_TOKENS, EngineThread, Grouped, PendingResponse, T


class WornThread:
    """What a request needs of an `EngineThread`; its answers run in the same batch as the base's own."""

    def __init__(self, base: EngineThread, lora: Any) -> None:
        self.base, self.lora = base, lora

    @property
    def engine(self) -> EngineProtocol:
        return self.base.engine

    @property
    def waiting(self) -> int:
        return self.base.waiting

    async def submit(self, wanted: list[tuple[list[int], Sampling, int]], owner: str = "") -> PendingResponse:
        return await self.base.submit(wanted, owner, self.lora)

    async def grouped(self, prompts: list[list[int]], function: Grouped[T], tokens: int = GROUP_TOKENS) -> list[T]:
        return await self.base.grouped(prompts, function, tokens, self.lora)

    def cancel(self, ticket: PendingResponse) -> None:
        self.base.cancel(ticket)
