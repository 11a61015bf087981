"""Texts that must be JSON that fits a schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tutelage.config import rewards as config
from tutelage.errors import ConfigError, RewardError
from tutelage.records import Rollout
from tutelage.rewards import TermScore, verify
from tutelage.rewards.schema import check_schema, library
from tutelage.rewards.texts import place, told


class JsonSchema:
    """1 if the text is JSON that fits the schema, else 0. Raises `ConfigError` for a schema that can't be checked, `MissingExtra`
    without `jsonschema`."""

    def __init__(self, settings: config.JsonSchema) -> None:
        self.settings = settings
        library()
        if settings.definition is not None:
            check_schema(settings.definition, "definition")
        self._workers = verify.workers("parsers:json_schema", settings.seconds)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        return verify.judge(self._workers, rollouts, self.settings.tag, self._question, "its schema can't be checked")

    def _question(self, rollout: Rollout, text: str) -> dict[str, Any]:
        schema: Any = self.settings.definition
        if schema is None:
            schema = told(rollout, "schema", "JSON schema")
            try:
                schema = json.loads(schema) if isinstance(schema, str) else schema
                check_schema(schema, "meta.schema")
            except (ValueError, ConfigError) as error:
                raise RewardError(f"the schema of rollout {rollout.id} can't be checked: {error}", **place(rollout)) from error
        return {"schema": schema, "text": text}

    def close(self) -> None:
        self._workers.close()
