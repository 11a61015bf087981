"""Finished responses in a SQLite file, so that they can be read again and continued, also by the next server.

One connection in one thread does everything, one call after the other: the event loop never waits for the disk, and requests at
the same time cannot get into each other's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tutelage.errors import StorageError
from tutelage.log import say
from tutelage.serve.responses.items import Item
from tutelage.serve.schema import ApiError, unavailable

T = TypeVar("T")

APPLICATION = 0x7475746C  # what SQLite keeps in the file's head to tell ours from others
VERSION = 1
TEND_SECONDS = 3600.0
LOCK_SECONDS = 2.0  # that a call waits for another program's lock
SCHEMA = f"""
BEGIN IMMEDIATE; -- two servers may open a new file at once
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,    -- the key that asked for it, empty where none was needed
    previous TEXT,          -- the response that it continues
    created INTEGER NOT NULL,
    input TEXT NOT NULL,    -- its own items, without those of the responses before it
    response TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_created ON responses (created);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
COMMIT;
"""
CHAIN = """
WITH RECURSIVE chain (id, previous, depth) AS (
    SELECT id, previous, 0 FROM responses WHERE id = ? AND owner = ?
    UNION ALL SELECT r.id, r.previous, depth + 1 FROM responses r JOIN chain c ON r.id = c.previous
)
SELECT r.input, r.response, r.previous FROM responses r JOIN chain c ON r.id = c.id ORDER BY c.depth DESC
"""
EXPIRED = """
DELETE FROM responses WHERE created < :since AND id NOT IN (
    WITH RECURSIVE continued (id) AS (
        SELECT previous FROM responses WHERE created >= :since AND previous IS NOT NULL
        UNION SELECT r.previous FROM responses r JOIN continued c ON r.id = c.id WHERE r.previous IS NOT NULL
    )
    SELECT id FROM continued
)
"""


@dataclass(slots=True, frozen=True)
class Stored:
    """A finished response and what it answered."""

    input: list[Item]
    response: dict[str, Any]
    previous: str | None = None  # id of the response that it continues


class ResponseStore:
    """The responses in one file. An `owner` sees its own only.

    days: how long a response is kept after it was made, or after the last one that continues it.
    Raises `StorageError` for a file that cannot be written or is not such a store.
    """

    def __init__(self, path: Path, days: int = 30) -> None:
        self.path, self.days = path, days
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._locked_until, self._warned = 0.0, -60.0
        try:
            self._database = self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def close(self) -> None:
        self._thread.submit(self._database.close).result()
        self._thread.shutdown()

    async def put(self, stored: Stored, owner: str) -> None:
        """Returns when it is on the disk."""
        made = stored.response
        row = (made["id"], owner, stored.previous, made["created_at"], _text(stored.input), _text(made))
        await self._run(lambda: self._database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row), True)

    async def get(self, response_id: str, owner: str) -> Stored | None:
        rows = await self._rows("SELECT input, response, previous FROM responses WHERE id = ? AND owner = ?", response_id, owner)
        return rows[0] if rows else None

    async def chain(self, response_id: str, owner: str) -> list[Stored]:
        """The conversation up to a response, oldest first. Where one of them was deleted, it begins after that one, whose id the
        first still names as `previous`. Empty where there is no such response."""
        return await self._rows(CHAIN, response_id, owner)

    async def delete(self, response_id: str, owner: str) -> bool:
        """Whether there was one."""
        query = "DELETE FROM responses WHERE id = ? AND owner = ?"
        return bool(await self._run(lambda: self._database.execute(query, (response_id, owner)).rowcount, True))

    async def expire(self) -> int:
        """Removes what is too old, and returns how many."""
        since = int(time.time()) - self.days * 86_400
        return await self._run(lambda: self._database.execute(EXPIRED, {"since": since}).rowcount, True)

    async def _rows(self, query: str, *values: str) -> list[Stored]:
        def read() -> list[Stored]:
            rows = self._database.execute(query, values)
            return [Stored(json.loads(given), json.loads(made), previous) for given, made, previous in rows]

        return await self._run(read)

    async def _run(self, work: Callable[[], T], write: bool = False) -> T:
        """Raises `ApiError` 503 where the file cannot be used now. While another program has it locked, one call in a while waits
        for it, and the others are told at once."""

        def guarded() -> T:
            if write and time.monotonic() < self._locked_until:
                raise unavailable("the store of responses is locked by another program", "store_unavailable")
            try:
                return work()
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    self._locked_until = time.monotonic() + LOCK_SECONDS
                self._warn(error)
                raise unavailable(f"the store of responses cannot be used now: {error}", "store_unavailable") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    def _warn(self, error: sqlite3.Error) -> None:
        """Once a minute: clients try again, and every request would be in the log."""
        now = time.monotonic()
        if now - self._warned >= 60:
            self._warned = now
            say(f"the store of responses {self.path} cannot be used: {error} (said once a minute)", style="red")

    def _open(self) -> sqlite3.Connection:
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # conversations: for the owner of the server alone
            database = sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)  # each statement is a transaction
            self._check(database)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"the store of responses cannot be used: {error}", file=self.path,
                fix="give --store a file in a folder that you may write to",
            ) from error  # fmt: skip
        return database

    def _check(self, database: sqlite3.Connection) -> None:
        """Raises `StorageError` for somebody else's database, which stays as it is."""
        empty = database.execute("SELECT 1 FROM sqlite_schema").fetchone() is None
        (application,), (version,) = (database.execute(f"PRAGMA {n}").fetchone() for n in ("application_id", "user_version"))
        if not empty and (application, version) != (APPLICATION, VERSION):
            raise StorageError(
                "this database is no store of responses that this version can read", file=self.path,
                found=f"application {application:#x}, version {version}", expected=f"{APPLICATION:#x}, version {VERSION}",
                fix="give --store another file",
            )  # fmt: skip


@contextlib.asynccontextmanager
async def tended(store: ResponseStore | None) -> AsyncIterator[None]:
    """Removes what is too old, now and every hour; closes the store at the end."""
    if store is None:
        yield
        return
    task = asyncio.create_task(_tend(store))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.close()


async def _tend(store: ResponseStore) -> None:
    while True:
        try:
            await store.expire()
        except ApiError:  # a full disk, or another program's lock, which is said by now: it may be gone in an hour
            say(f"old responses could not be removed from {store.path}", style="red")
        await asyncio.sleep(TEND_SECONDS)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
