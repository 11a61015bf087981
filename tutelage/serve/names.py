"""What clients may call a model, whether the command line or `POST /admin/models` gives the name."""

from __future__ import annotations

MODEL_NAME = r"\w[\w.:/@+-]{0,127}"
