"""A real PostgreSQL for tests: its own cluster in a temporary directory, on loopback, gone with the session."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

_START_S = 60.0
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # the machine does not lose power here; a killed server loses nothing by it
    "max_connections": "200",
    "shared_buffers": "32MB",
}


def _binary(name: str) -> str | None:
    """Newest of Debian's, who keeps each version's programs in a directory of its own; else the one on the path."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return str(versions[-1]) if versions else shutil.which(name)


def _user() -> str | None:
    """Whom the server runs as: it refuses root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


class PostgreSQL:
    """One server. ``new_database`` gives a URL for the catalog; ``kill`` and ``start`` are what may happen to it."""

    def __init__(self, initdb: str, postgres: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._postgres = postgres
        self._password = secrets.token_hex(16)
        self._user = _user()
        self._databases = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        password = self.root / "password"
        password.write_text(self._password)
        if self._user is not None:
            for path in (self.root, password):
                shutil.chown(path, self._user)
        command = [initdb, "--pgdata", str(self._data), "--username", "test", "--auth", "scram-sha-256"]
        command += ["--pwfile", str(password), "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd=self.root)
        self.start()

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"catalog_{self._databases}"
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{self._dsn(name).removeprefix('postgresql://')}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [self._postgres, "-D", str(self._data), "-p", str(self.port)]
        command += [argument for key, value in _SETTINGS.items() for argument in ("-c", f"{key}={value}")]
        log = (self.root / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._user, cwd=self.root)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self._dsn("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                said = (self.root / "log").read_text()
                assert self._process.poll() is None and time.monotonic() < deadline, f"{error}\n{said}"
                time.sleep(0.05)

    def kill(self) -> None:
        """Kill the server and all who serve its connections, as a crash would."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Stop the server and forget its data."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self.root / "data"

    def _dsn(self, database: str) -> str:
        return f"postgresql://test:{self._password}@127.0.0.1:{self.port}/{database}"


def start_postgres() -> PostgreSQL:
    """A running server; skips the test where PostgreSQL is not installed, unless services are required."""
    initdb, postgres = _binary("initdb"), _binary("postgres")
    if initdb is None or postgres is None:
        missing = "PostgreSQL's initdb and postgres are neither on the path nor under /usr/lib/postgresql"
        if os.environ.get("ADAPTER_ROUTER_REQUIRE_SERVICES") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return PostgreSQL(initdb, postgres)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    """The session's server."""
    server = start_postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a catalog can be made: once on each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/catalog/catalog.db"
    server: PostgreSQL = request.getfixturevalue("postgres")
    return server.new_database()
