"""What a worker gives up before it touches untrusted bytes. Outside Linux only the limits hold."""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_REFUSE_WITH_EPERM = 0x00050001

# Decoding needs no network, no programs and no look into other processes. io_uring is named because
# it would do the same things past this filter.
_DENIED = (
    "socket connect bind execve execveat ptrace process_vm_readv process_vm_writev kill "
    "io_uring_setup pidfd_open pidfd_getfd unshare bpf"
)
_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        dict(
            zip(
                _DENIED.split(),
                (41, 42, 49, 59, 322, 101, 310, 311, 62, 425, 434, 438, 272, 321),
                strict=True,
            )
        ),
    ),
    "aarch64": (
        0xC00000B7,
        dict(
            zip(
                _DENIED.split(),
                (198, 203, 200, 221, 281, 117, 270, 271, 129, 425, 434, 438, 97, 280),
                strict=True,
            )
        ),
    ),
}
_X32_BIT = 0x40000000


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one worker process; CPU seconds count for each request anew."""

    memory_bytes: int = 1536 * 1024 * 1024
    cpu_seconds: int = 60
    file_bytes: int = 2 * 1024 * 1024 * 1024
    open_files: int = 64


def confine(limits: Limits, parent_pid: int) -> None:
    """Irrevocable. Raises OSError when the kernel refuses what it should grant."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)  # the parent died before the line above could notice
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _deny_system_calls()
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    _limit(resource.RLIMIT_NOFILE, limits.open_files)
    _limit(resource.RLIMIT_CORE, 0)


def grant_cpu(limits: Limits) -> None:
    """A new CPU budget for the next request: the kernel's own counter never goes back."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + limits.cpu_seconds, hard))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(option, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def _deny_system_calls() -> None:
    """A seccomp filter. Where the kernel has none (some containers), the other bounds stand."""
    known = _ARCHITECTURES.get(platform.machine())
    if known is None:
        return
    program = _filter(*known)
    buffer = ctypes.create_string_buffer(program)
    # struct sock_fprog: the number of instructions, padding, their address.
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    address = ctypes.create_string_buffer(fprog)
    try:
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(address))
    except OSError:
        return


def _filter(architecture: int, denied: dict[str, int]) -> bytes:
    """Classic BPF over struct seccomp_data: the number at offset 0, the architecture at 4."""
    numbers = sorted(denied.values())
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refuse_from = len(numbers) + 1
    code = [
        (load, 0, 0, 4),
        (equal, 0, len(numbers) + 3, architecture),
        (load, 0, 0, 0),
        (at_least, refuse_from, 0, _X32_BIT),
    ]
    code += [(equal, refuse_from - 1 - i, 0, number) for i, number in enumerate(numbers)]
    code += [(answer, 0, 0, _ALLOW), (answer, 0, 0, _REFUSE_WITH_EPERM)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)
