"""Answers of providers that the database could not take, on disk until it does: a paid job's id is never lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kit import telemetry

log = telemetry.logger(__name__)


class Spool:
    """One small fsynced file per provider job."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(
        self, attempt_id: str, provider_account: str, provider_job_id: str, fence: int
    ) -> Path | None:
        """Writes it down, durably; None where the disk does not take it either: the caller goes on trying."""
        try:
            return self._write(attempt_id, provider_account, provider_job_id, fence)
        except OSError as error:
            log.error("spool_failed", attempt_id=attempt_id, error=repr(error))
            return None

    def _write(
        self, attempt_id: str, provider_account: str, provider_job_id: str, fence: int
    ) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._directory / f"{attempt_id}-{fence}.json"
        with path.open("w") as file:
            json.dump([attempt_id, provider_account, provider_job_id, fence], file)
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        log.warning("provider_job_spooled", attempt_id=attempt_id, path=str(path))
        return path

    def kept(self) -> list[tuple[Path, str, str, str, int]]:
        """What is waiting: file, attempt, provider account, provider job, fence."""
        found: list[tuple[Path, str, str, str, int]] = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                attempt_id, account, job, fence = json.loads(path.read_text())
            except FileNotFoundError:
                continue  # another process that shares the directory has stored it
            except (TypeError, ValueError):
                log.error("spool_unreadable", path=str(path))
                continue
            found.append((path, attempt_id, account, job, fence))
        return found
