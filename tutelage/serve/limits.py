"""How much a key may use: token buckets, one for requests and one for tokens, refilled evenly."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from tutelage.serve.schema import ApiError


class Bucket:
    """Holds what a minute allows, full at the start. Used by one thread only."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def level(self) -> float:
        """What is left now; below zero after more was spent than there was."""
        now = self._clock()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / 60)
        self._at = now
        return self._level

    def take(self, count: int) -> bool:
        """Takes `count` if it is there."""
        if self.level < count:
            return False
        self.spend(count)
        return True

    def spend(self, count: int) -> None:
        self._level = self.level - count

    def seconds_until(self, level: float) -> float:
        return max(0.0, level - self.level) * 60 / self.limit


class Allowance:
    """What one key may still use. None: no limit."""

    def __init__(
        self, requests_per_minute: int | None, tokens_per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.requests = None if requests_per_minute is None else Bucket(requests_per_minute, clock)
        self.tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute, clock)
        self._reserved = 0  # tokens that running answers may still have

    def take_request(self) -> None:
        """Raises `ApiError` 429 when the minute's requests are used up."""
        if self.requests is not None and not self.requests.take(1):
            raise _exceeded(self.requests, 1, "requests")

    @contextlib.contextmanager
    def admitting(self, tokens: int, answers: int = 0) -> Iterator[None]:
        """Takes the tokens of a prompt and reserves the largest possible `answers`; gives both back if the block fails, since a
        refused request costs nothing. `release` ends the reservation.

        Raises `ApiError` 429 when they are not there. A key's only running request needs just its prompt's tokens, so that a
        limit below one answer still lets answers through, one after another; requests side by side must fit together.
        """
        if self.tokens is not None:
            wanted = tokens + answers + self._reserved if self._reserved else tokens
            if self.tokens.level < wanted:
                raise _exceeded(self.tokens, tokens, "tokens", wanted)
            self.tokens.spend(tokens)
        self._reserved += answers
        try:
            yield
        except BaseException:
            self.release(answers)
            self.spend(-tokens)
            raise

    def release(self, tokens: int) -> None:
        """Gives back what `admitting` reserved and the answers no longer need."""
        self._reserved -= tokens

    def spend(self, tokens: int) -> None:
        """Takes tokens of an answer as they come. An answer is never cut for it; overspending is waited for afterwards."""
        if self.tokens is not None:
            self.tokens.spend(tokens)

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*` as OpenAI's: the limit, what remains, and how long until all of it is there again."""
        out = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                out[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                out[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                out[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.limit))
        return out


UNLIMITED = Allowance(None, None)


def duration(seconds: float) -> str:
    """As OpenAI writes times: 17ms, 8.64s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _exceeded(bucket: Bucket, count: int, unit: str, level: int | None = None) -> ApiError:
    """level: what the bucket must hold; `count` if it is not given."""
    if count > bucket.limit:
        message = f"this request has {count} {unit}; its key may use {bucket.limit} a minute"
        headers = {"x-should-retry": "false"}  # it would never fit
    else:
        wait = math.ceil(max(bucket.seconds_until(min(count if level is None else level, bucket.limit)), 1))
        message = f"the key's limit of {bucket.limit} {unit} a minute is reached; try again in {wait} s"
        headers = {"retry-after": str(wait)}
    return ApiError(429, message, code="rate_limit_exceeded", kind=unit, headers=headers)
