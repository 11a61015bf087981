"""API keys: who may do what. A key file holds salted hashes; the key itself is shown once, when it is made."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.errors import ArtifactError, ConfigError, DataError, UserError
from tutelage.files import write_json
from tutelage.log import say
from tutelage.serve.limits import Allowance

Scope = Literal["inference", "metrics", "admin"]
"""inference: everything under /v1, and /tokenize, /detokenize; metrics: /metrics; admin: /admin."""


SHORTEST = 8
"""Characters of a key at least: what is shorter can be guessed over the network, and an unset variable gives an empty one."""


class Key(BaseModel):
    """One row of a key file.

    A key has 256 random bits, so that a single SHA-256 is as good as a slow hash: there is nothing to guess.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")  # SHA-256 of salt and key
    scopes: tuple[Scope, ...] = Field(("inference",), min_length=1)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    created: int  # seconds since 1970

    def opens(self, secret: bytes) -> bool:
        """Whether `secret` is this key. Compared in constant time."""
        return hmac.compare_digest(_digest(self.salt, secret), self.hash)


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()


def make_key(name: str, secret: str, **limits: Any) -> Key:
    """The row for `secret`. Raises `ConfigError` naming the setting."""
    _check_secret(secret, name)
    salt = secrets.token_hex(16)
    try:
        return Key(name=name, salt=salt, hash=_digest(salt, secret.encode()), created=int(time.time()), **limits)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(first["msg"], field=str(first["loc"][0]), found=first["input"]) from error


def _check_secret(secret: str, name: str) -> None:
    """Raises `ConfigError` for what cannot be a Bearer token, and for what is too short to be a secret. Never shows the key."""
    if len(secret) < SHORTEST or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise ConfigError(
            "not a usable API key", field=name, found="an empty one" if not secret else f"one of {len(secret)} characters",
            expected=f"at least {SHORTEST} characters of printable ASCII without spaces",
            fix="check that the variable it comes from is set, or make a key with `tutelage keys add FILE NAME`",
        )  # fmt: skip


def _digest(salt: str, secret: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Raises `ArtifactError` where there is no readable file, `DataError` naming the field that is wrong."""
    fix = "make it with `tutelage keys add FILE NAME`"
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ArtifactError("the key file is not a regular file", file=path, fix=fix)
        file = KeyFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(f"the key file cannot be read: {error.strerror}", file=path, fix=fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or None
        raise DataError(first["msg"], file=path, field=where, found=first["input"], fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})", file=path, fix=fix) from error
    for i, key in enumerate(file.keys):
        if key.opens(b""):
            raise DataError("this is the hash of an empty key", file=path, field=f"keys.{i}.hash", found=key.name, fix=fix)
    return file.keys


def add_key(path: Path, name: str, **limits: Any) -> str:
    """Writes a new key's hash to the file, which is made where there is none. Returns the key, which is kept nowhere."""
    keys = read_keys(path) if path.exists() else ()
    if any(key.name == name for key in keys):
        raise ConfigError("there is a key of this name", file=path, field="name", found=name, fix="remove it first")
    secret = f"tut-{secrets.token_urlsafe(32)}"
    _write(path, (*keys, make_key(name, secret, **limits)))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Raises `ConfigError` when there is no such key."""
    keys = read_keys(path)
    rest = tuple(key for key in keys if key.name != name)
    if len(rest) == len(keys):
        raise ConfigError("no key of this name", file=path, found=name, expected=", ".join(k.name for k in keys) or "no key")
    _write(path, rest)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    write_json(path, KeyFile(keys=keys).model_dump(mode="json"))


@dataclass(slots=True, frozen=True)
class Holder:
    """A key in use, with what it may still use."""

    key: Key
    allowance: Allowance
    owner: str  # of what the key has made: the same after a restart, and for no other key


class KeyRing:
    """The keys of a running server: those given at the start (inference, unlimited) and those of a file.

    The file is read again when it changes, so that a key can be taken away at once. While a changed file is not valid, the keys
    read before stay.
    """

    def __init__(self, api_keys: Sequence[str] = (), file: Path | None = None) -> None:
        """Raises what `read_keys` raises."""
        self.file = file
        self.closed = bool(api_keys) or file is not None  # whether a request needs a key at all
        self._given = [_give(i, key) for i, key in enumerate(api_keys, 1)]
        self._stamp = None if file is None else _stamp(file)
        self._filed = [] if file is None else [_hold(key) for key in read_keys(file)]

    def find(self, header: bytes) -> Holder | None:
        """The holder of the key in an Authorization header."""
        self._refresh()
        scheme, _, secret = header.partition(b" ")
        # Every key is tried: the time says nothing about which one it was.
        secret = secret.strip()
        found = [holder for holder in (*self._given, *self._filed) if holder.key.opens(secret)]
        return found[0] if found and scheme.lower() == b"bearer" and len(secret) >= SHORTEST else None

    def _refresh(self) -> None:
        if self.file is None or (stamp := _stamp(self.file)) == self._stamp:
            return
        self._stamp = stamp
        known = {holder.key: holder for holder in self._filed}  # a key that did not change keeps its buckets
        try:
            self._filed = [known.get(key) or _hold(key) for key in read_keys(self.file)]
        except UserError as error:
            say(f"the keys stay as they were: {error}", style="red")


def _hold(key: Key) -> Holder:
    return Holder(key, Allowance(key.requests_per_minute, key.tokens_per_minute), key.hash)


def _give(number: int, secret: str) -> Holder:
    """A key of the command line. Its salt is new at every start, so what it owns goes by a hash without one: a slow one, for
    people choose such keys themselves."""
    owner = hashlib.pbkdf2_hmac("sha256", secret.encode(), b"tutelage --api-key", 200_000).hex()
    return Holder(make_key(f"--api-key {number}", secret), Allowance(None, None), owner)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
