"""The embedded servers, the supervisor and the command line, with the real binaries."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import minio
import nats as nats_client
import psutil
import pytest

from services.local import errors, nats, places, postgres, process, s3, stack
from services.local.supervisor import Child, Supervisor
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
# A program that is ready when its file is there, and notes its SIGTERM.
FAKE = """
import os, pathlib, signal, sys, time
print("COLOUR is", os.environ.get("COLOUR"), flush=True)
place = pathlib.Path(sys.argv[1])
def term(*_):
    place.with_suffix(".ready").unlink()
    place.with_suffix(".stopped").write_text(str(time.monotonic_ns()))
    sys.exit(0)
signal.signal(signal.SIGTERM, term)
place.with_suffix(".ready").touch()
while True:
    place.with_suffix(".beat").write_text(str(time.monotonic_ns()))
    time.sleep(0.01)
"""


def fake(place: Path, name: str, script: str = FAKE) -> Child:
    ready = place / f"{name}.ready"

    async def probe() -> bool:
        return ready.exists()

    return Child(name, [sys.executable, "-c", script, str(place / name)], {}, probe)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[postgres.Postgres]:
    server = postgres.Postgres(tmp_path)
    await server.start()
    yield server
    await server.destroy()


async def fetch(url: str, query: str) -> object:
    connection = await asyncpg.connect(url, timeout=5)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_postgres_is_durable_and_keeps_its_data_over_kill_and_restart(
    database: postgres.Postgres,
) -> None:
    for setting in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
        assert await fetch(database.url, f"SHOW {setting}") == "on", setting
    await database.create_database("one")
    await database.create_database("one")
    await fetch(database.database_url("one"), "CREATE TABLE t AS SELECT 7 AS n")

    url, first = database.database_url("one"), database.pid
    await database.kill()
    assert not database.running
    await database.start()
    assert database.pid != first
    assert database.database_url("one") == url
    assert await fetch(url, "SELECT n FROM t") == 7
    await database.restart()
    assert await fetch(url, "SELECT n FROM t") == 7

    await database.create_database("two", template="one")
    assert await fetch(database.database_url("two"), "SELECT n FROM t") == 7
    await database.drop_database("two")
    await database.drop_database("two")
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await fetch(database.database_url("two"), "SELECT 1")
    with pytest.raises(errors.LocalError, match="not a database name"):
        await database.create_database('x"; DROP DATABASE one')


async def test_postgres_second_start_is_quick_and_reuses_port_and_password(
    database: postgres.Postgres,
) -> None:
    await database.create_database("kept")
    await database.stop()
    assert database.exit_code == 0
    again = postgres.Postgres(database.data_dir)
    begun = time.monotonic()
    await again.start()
    try:
        assert time.monotonic() - begun < 2
        assert again.url == database.url
        assert await fetch(again.database_url("kept"), "SELECT 1") == 1
    finally:
        await again.stop()
    assert (database.data_dir / "secrets" / "postgres").stat().st_mode & 0o777 == 0o600


async def test_postgres_wants_the_password(database: postgres.Postgres) -> None:
    wrong = database.url.replace(database.password, "wrong")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await fetch(wrong, "SELECT 1")


async def test_a_remembered_port_that_is_taken_is_exchanged(database: postgres.Postgres) -> None:
    await database.stop()
    with socket.create_server((places.HOST, database.port)):
        again = postgres.Postgres(database.data_dir)
        await again.start()
        try:
            assert again.port != database.port
            assert await fetch(again.url, "SELECT 1") == 1
        finally:
            await again.stop()


async def test_a_second_server_on_the_same_directory_is_refused(
    database: postgres.Postgres,
) -> None:
    with pytest.raises(errors.LocalError, match=f"already runs .pid {database.pid}"):
        await postgres.Postgres(database.data_dir).start()
    assert await fetch(database.url, "SELECT 1") == 1


async def test_a_stale_postmaster_file_of_an_innocent_process_does_not_block(
    database: postgres.Postgres,
) -> None:
    cluster = (database.data_dir / "postgres").resolve() / "data"
    content = (cluster / "postmaster.pid").read_text()
    await database.kill()
    # Of the same user: what it may not signal, Postgres ignores anyway.
    user = cluster.stat().st_uid if os.geteuid() == 0 else None
    innocent = await asyncio.create_subprocess_exec("sleep", "60", user=user, cwd="/")
    try:
        _, rest = content.split("\n", 1)
        (cluster / "postmaster.pid").write_text(f"{innocent.pid}\n{rest}")
        await database.start()
        assert await fetch(database.url, "SELECT 1") == 1
    finally:
        innocent.kill()
        await innocent.wait()


async def test_nats_syncs_always_and_keeps_messages_over_kill_and_restart(tmp_path: Path) -> None:
    server = nats.Nats(tmp_path)
    await server.start()
    try:
        varz = await asyncio.to_thread(_varz, server)
        assert varz["jetstream"]["config"]["sync_always"] is True
        assert varz["max_payload"] == 8 * 1024 * 1024
        await _publish(server.url)
        url = server.url
        await server.kill()
        await server.start()
        assert server.url == url
        assert await _count(url) == 1
        await server.stop()
        again = nats.Nats(tmp_path)
        await again.start()
        try:
            assert again.url == url
            assert await _count(url) == 1
        finally:
            await again.stop()
    finally:
        await server.kill()


def _varz(server: nats.Nats) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.monitor_url}/varz", timeout=5) as answer:
        return json.load(answer)


async def _publish(url: str) -> None:
    client = await nats_client.connect(url)
    await client.jetstream().add_stream(name="T", subjects=["t"])
    await client.jetstream().publish("t", b"x")
    await client.close()


async def _count(url: str) -> int:
    client = await nats_client.connect(url)
    info = await client.jetstream().stream_info("T")
    await client.close()
    return info.state.messages


async def test_s3_keeps_objects_over_kill_and_restart(tmp_path: Path) -> None:
    server = s3.S3(tmp_path)
    await server.start()
    try:
        await asyncio.to_thread(_put, server)
        endpoint = server.endpoint
        await server.kill()
        await server.restart()
        assert server.endpoint == endpoint
        assert await asyncio.to_thread(_get, server) == b"film"
        await server.stop()
        again = s3.S3(tmp_path)
        await again.start()
        try:
            assert (again.endpoint, again.secret_key) == (endpoint, server.secret_key)
            assert await asyncio.to_thread(_get, again) == b"film"
        finally:
            await again.stop()
    finally:
        await server.kill()


def _client(server: s3.S3, secret_key: str | None = None) -> minio.Minio:
    return minio.Minio(
        server.endpoint,
        server.access_key,
        secret_key or server.secret_key,
        secure=False,
        region=server.region,
    )


def _put(server: s3.S3) -> None:
    client = _client(server)
    assert not client.bucket_exists("films")
    client.make_bucket("films")
    client.put_object("films", "a/b.mp4", io.BytesIO(b"film"), 4, content_type="video/mp4")
    with pytest.raises(minio.S3Error):
        _client(server, "wrong-key").stat_object("films", "a/b.mp4")


def _get(server: s3.S3) -> bytes:
    answer = _client(server).get_object("films", "a/b.mp4")
    try:
        return answer.read()
    finally:
        answer.close()
        answer.release_conn()


async def test_supervisor_stops_in_reverse_order(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, [fake(tmp_path, "first"), fake(tmp_path, "second")]) as group:
        assert [one.state for one in group.status()] == ["up", "up"]
        pids = [one.pid for one in group.status() if one.pid]
    assert not any(alive(pid) for pid in pids)
    stopped = [int((tmp_path / f"{name}.stopped").read_text()) for name in ("first", "second")]
    assert stopped[1] < stopped[0]


async def test_supervisor_reports_a_death_once_and_restarts_nobody(tmp_path: Path) -> None:
    lines: list[str] = []
    async with Supervisor(tmp_path, [fake(tmp_path, "victim")], report=lines.append) as group:
        assert group.check() == []
        victim = group.get("victim")
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGSEGV)
        assert await group.wait_exit("victim") == -signal.SIGSEGV
        group.check()
        group.check()
        assert len(lines) == 1
        assert "victim was killed by SIGSEGV" in lines[0]
        assert str(victim.log_path) in lines[0]
        assert group.status()[0].state == "died"

        await group.start("victim")
        await group.kill("victim")  # our own doing is no news
        assert group.check() == []


async def test_supervisor_restarts_with_another_environment(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, [fake(tmp_path, "one")]) as group:
        await group.restart("one", env={"COLOUR": "blue"})
        await eventually(lambda: "COLOUR is blue" in group.get("one").log_path.read_text())


async def test_supervisor_pauses_and_resumes(tmp_path: Path) -> None:
    beat = tmp_path / "one.beat"
    async with Supervisor(tmp_path, [fake(tmp_path, "one")]) as group:
        pid = group.get("one").pid
        await eventually(beat.exists)
        group.pause("one")
        await eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        before = beat.read_text()
        group.resume("one")
        await eventually(lambda: beat.read_text() not in {"", before})
        group.pause("one")
    # Stopping also reaches a paused program, gracefully.
    assert (tmp_path / "one.stopped").exists()


async def test_a_program_that_fails_while_starting_is_one_clear_line(tmp_path: Path) -> None:
    broken = fake(tmp_path, "broken", "raise SystemExit('no licence')")
    group = Supervisor(tmp_path, [fake(tmp_path, "good"), broken])
    with pytest.raises(errors.LocalError, match=r"broken ended with exit code 1: no licence"):
        async with group:
            pass
    assert group.get("good").pid is not None
    assert not group.get("good").running


async def test_a_deaf_program_is_killed(tmp_path: Path) -> None:
    deaf = FAKE.replace("signal.SIGTERM, term", "signal.SIGTERM, signal.SIG_IGN")
    child = fake(tmp_path, "deaf", deaf)
    program = process.Service(
        Child(child.name, child.argv, child.env, child.ready_probe, stop_seconds=0.1), tmp_path
    )
    await program.start()
    await program.stop()
    assert program.exit_code == -signal.SIGKILL


async def killed_supervisor(place: Path, programs: str) -> list[int]:
    """Starts these programs under a supervisor of their own, kills it with -9, returns their pids."""
    script = f"""
import asyncio, dataclasses, pathlib, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from services.local import nats, postgres, process, supervisor
from test_local_servers import fake
async def main():
    place = pathlib.Path({str(place)!r})
    group = supervisor.Supervisor(place)
    for program in {programs}:
        group.add(program)
    await group.start_all()
    print(*(one.pid for one in group.status()), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    assert supervisor.stdout is not None
    try:
        pids = [int(word) for word in (await supervisor.stdout.readline()).split()]
        assert pids
        assert all(alive(pid) for pid in pids)
    finally:
        supervisor.kill()
        await supervisor.wait()
    return pids


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux")
async def test_nothing_survives_a_killed_supervisor(tmp_path: Path) -> None:
    programs = (
        "[process.Service(fake(place, 'one'), place), postgres.Postgres(place), nats.Nats(place)]"
    )
    try:
        pids = await killed_supervisor(tmp_path, programs)
        await eventually(lambda: not any(alive(pid) for pid in pids))
        again = postgres.Postgres(tmp_path)
        await again.start()
        assert await fetch(again.url, "SELECT 1") == 1
        await again.stop()
    finally:
        await postgres.Postgres(tmp_path).destroy()


async def test_a_start_ends_what_a_dead_supervisor_left(tmp_path: Path) -> None:
    deathless = "dataclasses.replace(fake(place, 'one'), death_signal=signal.SIGCONT)"
    pids = await killed_supervisor(tmp_path, f"[process.Service({deathless}, place)]")
    assert alive(pids[0])
    async with Supervisor(tmp_path, [fake(tmp_path, "one")]) as group:
        assert not alive(pids[0])
        assert group.get("one").pid != pids[0]


async def test_a_busy_fixed_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server((places.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        whole = stack.Stack(tmp_path, gateway_port=port, environ={})
        with pytest.raises(errors.LocalError) as caught:
            await whole.start()
    assert f"port {port} (--gateway-port) is in use by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert not (tmp_path / "log" / "postgres.log").exists()


def run_local(*arguments: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.local", *arguments, "--data-dir", str(data_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_second_up_on_one_directory_is_one_clear_line(tmp_path: Path) -> None:
    with places.held(places.prepare(tmp_path)):
        second = run_local("up", data_dir=tmp_path)
    assert second.returncode == 1
    assert second.stderr == (
        f"framewire: already running on {tmp_path} (pid {os.getpid()}); "
        "stop that one or choose another --data-dir\n"
    )
    with (tmp_path / "lock").open() as file:  # given back
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_status_without_a_running_system_is_one_clear_line(tmp_path: Path) -> None:
    answer = run_local("status", data_dir=tmp_path)
    assert answer.returncode == 1
    assert "nothing runs in" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


async def test_the_stack_runs_servers_and_writes_where_they_are(tmp_path: Path) -> None:
    whole = stack.Stack(tmp_path, services=(), environ={})
    try:
        async with whole:
            content = json.loads((tmp_path / "stack.json").read_text())
            assert (tmp_path / "stack.json").stat().st_mode & 0o777 == 0o600
            assert set(content["programs"]) == {"postgres", "nats", "s3"}
            assert whole.operator_key.startswith("fw_")
            answer = await asyncio.to_thread(run_local, "status", data_dir=tmp_path)
            assert answer.returncode == 0, answer.stdout + answer.stderr
            await whole.supervisor.kill("nats")
            answer = await asyncio.to_thread(run_local, "status", data_dir=tmp_path)
            assert answer.returncode == 1
            assert "down" in answer.stdout
        assert not (tmp_path / "stack.json").exists()
    finally:
        await whole.destroy()


def test_two_stacks_never_choose_the_same_port(tmp_path: Path) -> None:
    """What is chosen is claimed, before anybody listens on it."""
    (tmp_path / "one" / "ports").mkdir(parents=True)
    (tmp_path / "other" / "ports").mkdir(parents=True)
    mine = places.choose_port(tmp_path / "one", "gateway")
    code = (
        "import pathlib, sys; from services.local import places;"
        "print(places.choose_port(pathlib.Path(sys.argv[1]), 'gateway', int(sys.argv[2])))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other"), str(mine)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert int(other.stdout) != mine
