"""A PostgreSQL server of the tests' own, in a temporary folder, stopped when they end."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "quay seven"


def find_binaries() -> Path | None:
    """Return the folder of the newest initdb and pg_ctl, or None where there is no server."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: p.parts[-3])
    if found:
        return found[-1].parent
    anywhere = shutil.which("initdb")
    return Path(anywhere).resolve().parent if anywhere else None


class PostgresServer:
    """A private cluster: the unix socket trusts its user, 127.0.0.1 asks for PASSWORD."""

    def __init__(self, binaries: Path, folder: Path, *, durable: bool) -> None:
        self._binaries = binaries
        self.folder = folder
        self._fsync = "on" if durable else "off"
        self.data = folder / "data"
        # PostgreSQL refuses to run as root; Debian's package comes with a user for it
        names = {entry.pw_name for entry in pwd.getpwall()}
        unprivileged = "postgres" if "postgres" in names else "nobody"
        self.user = unprivileged if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def create(self) -> None:
        """Make the cluster."""
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            for path in (self.folder, password):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        self._run(
            "initdb", "--no-sync", f"--pgdata={self.data}", "--encoding=UTF8", "--locale=C.UTF-8",
            f"--username={self.user}", f"--pwfile={password}",
            "--auth-local=trust", "--auth-host=scram-sha-256",
        )  # fmt: skip

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-k {self.folder} -h 127.0.0.1 -p {self.port} -c fsync={self._fsync}"
        log = self.folder / "log"
        self._run("pg_ctl", "start", "-w", f"--pgdata={self.data}", f"--log={log}", "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; `immediate` is a crash: the log is replayed at the next start."""
        self._run("pg_ctl", "stop", "-w", f"--pgdata={self.data}", "-m", mode)

    def create_database(self, *options: str) -> str:
        """Make an empty database and return its name."""
        name = f"library_{uuid.uuid4().hex[:12]}"
        place = ["-h", str(self.folder), "-p", str(self.port), "-U", self.user]
        self._run("createdb", *place, *options, name)
        return name

    def url(self, database: str) -> str:
        """Return the URL by the unix socket."""
        place = f"host={self.folder}&port={self.port}"
        return f"postgresql+psycopg://{self.user}@/{database}?{place}"

    def tcp_url(self, database: str, password: str) -> str:
        """Return the URL by 127.0.0.1."""
        return f"postgresql+psycopg://{self.user}:{password}@127.0.0.1:{self.port}/{database}"

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / name), *arguments],
            cwd="/",
            user=self.user if os.geteuid() == 0 else None,
            stdout=subprocess.DEVNULL,  # a pipe would stay open in the server that pg_ctl starts
            stderr=subprocess.PIPE if name != "pg_ctl" else subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, (name, done.stderr)


@contextmanager
def running_server(binaries: Path, *, durable: bool) -> Iterator[PostgresServer]:
    """Yield a server that is stopped and removed afterwards; `durable` ones sync to the disk."""
    memory = Path("/dev/shm")
    in_memory = not durable and memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    folder = Path(tempfile.mkdtemp(prefix="fathom-pg-", dir=memory if in_memory else None))
    server = PostgresServer(binaries, folder, durable=durable)
    try:
        server.create()
        server.start()
        yield server
        if (server.data / "postmaster.pid").exists():
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
