"""Models that have shapes and no values yet, for those whose weights are read or drawn right after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoStart(TorchFunctionMode):
    """Leaves out torch's own first values. On "meta", where they are nothing, each kind of them imports a part of torch's
    compiler: sympy for the uniform ones, all of it for the normal ones, which takes seconds."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules that are made inside are on "meta"."""
    with torch.device("meta"), _NoStart():
        yield
