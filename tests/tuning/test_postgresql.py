"""`search.py` on a PostgreSQL server: workers that share nothing else, one of which is killed; and what is refused."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import psycopg
import pytest
from conftest import TEMPORARY, needed
from optuna.trial import TrialState
from stand_in import LR, flags_of, in_place, parabola, process, refusal, values

from search import main
from tuning import study
from tuning.study import FINISHED

pytestmark = pytest.mark.slow

PASSWORD = "secret"


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server with a role `searcher`, who has a password and may make databases."""

    port: int
    admin: psycopg.Connection

    def url(self, database: str, user: str = f"searcher:{PASSWORD}") -> str:
        """What --storage takes."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def new(self, database: str, owner: str = "searcher") -> str:
        """The URL of a new database."""
        self.admin.execute(f"CREATE DATABASE {database} OWNER {owner}".encode())
        return self.url(database)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this module's own, as root by another user: PostgreSQL refuses to run as root."""
    places = os.pathsep.join(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))))  # where Debian has it
    initdb = Path(needed("postgresql", shutil.which("initdb") or shutil.which("initdb", path=places)))
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = None if os.getuid() else "postgres" if "postgres" in names else "nobody"
    how = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    # Not below pytest's folders, which other users cannot enter.
    with tempfile.TemporaryDirectory(prefix="postgresql-", dir=TEMPORARY) as name:
        place, port = Path(name), free_port()
        if user:
            shutil.chown(place, user)
        data = ["-D", str(place / "data")]
        made = [initdb, *data, "-U", "admin", "--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=place, **how)
        options = f"-F -p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={place}".split()
        running = subprocess.Popen(
            [initdb.with_name("postgres"), *data, *options], cwd=place, stderr=subprocess.DEVNULL, **how
        )
        try:
            with connected(place, port) as admin:
                admin.execute(f"CREATE ROLE searcher LOGIN CREATEDB PASSWORD '{PASSWORD}'".encode())
                yield Server(port, admin)
        finally:
            running.send_signal(signal.SIGINT)  # SIGTERM would wait for all who are connected
            running.wait(30)


def connected(place: Path, port: int) -> psycopg.Connection:
    """A connection to a server that has just been started."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return psycopg.connect(host=str(place), port=port, user="admin", dbname="postgres", autocommit=True)
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def wait_until(holds: Callable[[], object], *running: subprocess.Popen[str]) -> None:
    """Wait until it holds, as long as processes run."""
    deadline = time.monotonic() + 240
    while not holds():
        assert all(each.poll() is None for each in running) and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_killed_in_mid_trial_and_started_again_counts_nothing_twice(server, tmp_path):
    """Each in a folder of its own, as on machines that share no disk: only the server tells them of each other."""
    url = server.new("shared")

    def flags(worker: str) -> list[str]:
        return flags_of(tmp_path, LR, f"--trials 12 --storage {url} --output_dir {tmp_path / worker}")

    def trials() -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="search", storage=url.replace("postgresql", "postgresql+psycopg")).trials

    first, second = process(tmp_path, flags("a"), together=2, hang_at=2), process(tmp_path, flags("b"), together=2)

    def lost() -> list[optuna.trial.FrozenTrial]:
        """Trials of the first worker that run once it has begun the one that does not end."""
        logs = (tmp_path / "a" / "trials").glob("0*.log")
        running = [trial for trial in trials() if trial.state == TrialState.RUNNING] if len(list(logs)) == 3 else []
        return [trial for trial in running if trial.user_attrs.get("signed", {}).get("pid") == first.pid]

    wait_until(lost, first, second)
    (hanging,) = lost()
    first.kill()
    again = process(tmp_path, flags("a"))
    said = [each.communicate(timeout=200) for each in (first, second, again)]
    assert [second.returncode, again.returncode] == [0, 0], said

    found = trials()
    finished = [trial.params["lr"] for trial in found if trial.state in FINISHED]
    assert len(finished) == len(set(finished)) == 12
    assert {trial.state for trial in found} <= {*FINISHED, TrialState.FAIL}
    assert found[hanging.number].state == TrialState.FAIL
    (instead,) = [trial for trial in found if trial.user_attrs.get("instead_of") == hanging.number]
    assert instead.params == hanging.params and instead.state in FINISHED
    lines = [line for out, _ in said for line in out.splitlines() if line.startswith("trial ")]
    assert len(lines) == 12


def test_a_search_goes_on_when_the_server_has_cut_its_connections_in_mid_trial(server, tmp_path):
    def cut_off(config):
        server.admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'searcher'")
        return parabola(config)

    url = server.new("restless")
    with in_place() as train:
        train(cut_off)
        assert len(values(main(flags_of(tmp_path, LR, f"--trials 3 --storage {url}")))) == 3


def test_what_a_server_refuses_is_told_in_one_line_without_the_password(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "POLL_SECONDS", 0)
    server.new("closed", owner="admin")
    wrong = server.url("closed", f"searcher:not{PASSWORD}")
    for url, reason in (
        (wrong, 'password authentication failed for user "searcher"'),
        (server.url("absent"), 'database "absent" does not exist'),
        (server.url("closed"), "permission denied for schema public"),
    ):
        with in_place() as train:
            train()
            said = refusal(flags_of(tmp_path, LR, f"--storage {url}"), capsys)
        assert "searcher:***@127.0.0.1" in said and said.endswith(f"{reason})") and PASSWORD not in said, said
        assert PASSWORD not in (tmp_path / "out" / "search.json").read_text()
