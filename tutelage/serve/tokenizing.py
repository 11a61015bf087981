"""Threads that tokenize, apart from those that load models; long texts have two of their own: short ones need not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request

from tutelage.log import say
from tutelage.serve.schema import ApiError

LONG = 256 << 10  # bytes of a request whose texts wait for each other
_SHORT, _LONG = ThreadPoolExecutor(6, "texts"), ThreadPoolExecutor(2, "long-texts")
T = TypeVar("T")


async def tokenized(request: Request, function: Callable[[], T]) -> T:
    """What `function` makes of the request's texts. Raises what it raises; `ApiError` 400 where the tokenizer library fails."""
    long = len(await request.body()) > LONG

    def guarded() -> T:
        try:
            return function()
        except Exception:
            raise
        except BaseException as error:  # a panic of the library, which is no `Exception`
            say(f"the tokenizer failed on a text: {type(error).__name__}: {error}"[:500], style="red")
            raise ApiError(400, "the tokenizer cannot read this text", code="tokenizer_failed") from None

    return await asyncio.get_running_loop().run_in_executor(_LONG if long else _SHORT, guarded)
