"""The launcher: ties a program's life to its supervisor's, drops root, becomes the program.

It runs by path and with `-I -S`, so it starts in milliseconds and imports nothing of ours. Doing
this in a fresh interpreter avoids `preexec_fn`, which can deadlock in a process that has threads
(grpc always has some).

Usage: child.py SUPERVISOR_PID DEATH_SIGNAL UID GID PROGRAM [ARGUMENT...]   (UID, GID -1: no change)
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def _die_with_supervisor(supervisor_pid: int, death_signal: int) -> None:
    """Linux only; elsewhere programs survive a killed supervisor, and the next start ends them."""
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    # The supervisor may have died before prctl took effect; then nobody will ever send the signal.
    if os.getppid() != supervisor_pid:
        sys.exit("the supervisor is gone")


def main(arguments: list[str]) -> None:
    supervisor_pid, death_signal, uid, gid = (int(argument) for argument in arguments[:4])
    argv = arguments[4:]
    if uid >= 0:
        # Before prctl: the kernel forgets the death signal when credentials change.
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    _die_with_supervisor(supervisor_pid, death_signal)
    try:
        os.execv(argv[0], argv)  # noqa: S606 (becoming the program is the purpose)
    except OSError as error:
        sys.exit(f"cannot run {argv[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
