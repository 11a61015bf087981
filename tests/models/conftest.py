"""Both ways an operation can go: our kernels, and plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tutelage.models import kernels


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Skips the kernels only where there is no compiler: kernels that silently went missing are a failure."""
    if request.param == "torch":
        with kernels.disabled():
            yield "torch"
    elif kernels.available():
        yield "kernel"
    elif any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.fail(f"a compiler is here, but no kernels: {kernels.why_not()}")
    else:
        pytest.skip(kernels.why_not())
