"""An OpenAI-compatible server as a client sees it: one chat completion at a time, tried again where that may help."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from tutelage.errors import ConfigError, RewardError

MAX_BYTES = 4 << 20  # of an answer
_AGAIN = (408, 409, 425, 429)  # and all from 500
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 20.0  # seconds before a try; doubled each time


class Endpoint:
    """Asks `model` at `base_url`. Safe to use from several threads."""

    def __init__(
        self, base_url: str, model: str, key: str | None, *, max_tokens: int, timeout_seconds: float, retries: int
    ) -> None:  # fmt: skip
        if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
            raise ConfigError("not the address of a server", field="base_url", found=base_url, expected="http://… or https://…")
        self._url, self._model, self._key = f"{base_url.rstrip('/')}/chat/completions", model, key
        self._max_tokens, self._timeout, self._retries = max_tokens, timeout_seconds, retries

    def __call__(self, messages: Sequence[dict[str, Any]]) -> str:
        """The answer's text. Raises `RewardError` where the server refuses, or fails more often than it may."""
        body = {"model": self._model, "messages": list(messages), "max_tokens": self._max_tokens, "temperature": 0}
        for tries in range(self._retries + 1):
            if tries:
                time.sleep(min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT))
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code not in _AGAIN and error.code < 500:
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
        raise RewardError(
            f"the judge at {self._url} does not answer ({tries + 1} tries)", found=why,
            fix="see that the server runs, serves the model and takes the key; the run goes on from its last checkpoint",
        )  # fmt: skip

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as reply:
            content = json.loads(reply.read(MAX_BYTES))["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("an answer without text")
        return content
