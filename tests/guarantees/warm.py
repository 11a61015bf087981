"""Imported by the fork server alone: what every run imports or computes once, so that its processes start with it."""

from __future__ import annotations

import torch._dynamo  # noqa: F401 (the first optimizer imports it)

from tests.guarantees import tiny
from tutelage.models import kernels
from tutelage.stages import STAGES

kernels.available()
for name in ("tokens", "pretrain", "sft"):
    tiny.code_digest(STAGES[name].module)
