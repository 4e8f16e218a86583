"""The other side of `sandbox.run_program`: a fresh interpreter that locks itself in, then runs a program.

Run as a script by `python -I -S`, so it imports nothing of ours. Linux: Landlock lets it write below its folder only,
seccomp takes away sockets, new processes, signals to others and ways to reach into them; elsewhere only the resource limits
hold. Facts: the kernel's user-space API guide, "Landlock" and "Seccomp BPF"; system call numbers from unistd_64.h and
asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
from typing import Any

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LD, _JEQ, _JSET, _RET = 0x20, 0x15, 0x45, 0x06
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_CLONE_THREAD = 0x00010000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused whatever the arguments, by name; the numbers for the two architectures.
_REFUSED = {
    "socket": (41, 198), "socketpair": (53, 199), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "bpf": (321, 280), "io_uring_setup": (425, 425), "keyctl": (250, 219), "setsid": (112, 157),
    "setpgid": (109, 154), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261), "setpriority": (141, 140), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    # What Landlock leaves: modes, owners, times and attributes of files.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL = (56, 220), (435, 435), (62, 129), (234, 131)


def limit_resources(limits: dict[str, Any]) -> None:
    """Processor seconds, address space, size of a file, open files; no core dumps."""
    import resource

    seconds = limits["cpu_s"]
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def confine_files(folder: str) -> bool:
    """Take away every right to change files, but below `folder` and to /dev/null; whether the kernel did."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    # Bits: execute 0, write 1, read 2, list 3, remove 4-5, make 6-12, refer 13 (ABI 2), truncate 14 (ABI 3).
    writing = sum(1 << bit for bit in (1, *range(4, 13), *((13,) if abi >= 2 else ()), *((14,) if abi >= 3 else ())))
    ruleset = libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", writing), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    files_only = (1 << 1) | ((1 << 14) if abi >= 3 else 0)
    for path, rights in ((folder, writing), (os.devnull, files_only)):
        place = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, place), 0):
            return False
        os.close(place)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    is_held = libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return is_held


def _filter(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The BPF program: refuse what `_REFUSED` lists, processes but not threads, signals but to ourselves."""
    column = list(_ARCHITECTURES).index(machine)
    code: list[tuple[int, int, int, int]] = [
        (_LD, 0, 0, 4),
        (_JEQ, 1, 0, _ARCHITECTURES[machine]),
        (_RET, 0, 0, _EPERM),
        (_LD, 0, 0, 0),
    ]
    if machine == "x86_64":
        code += [(_JSET, 0, 1, 0x40000000), (_RET, 0, 0, _EPERM)]  # the x32 table
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [(_JEQ, 0, 1, number), (_RET, 0, 0, _EPERM)]
    code += [(_JEQ, 0, 1, _CLONE3[column]), (_RET, 0, 0, _ENOSYS)]  # libc falls back to clone, whose flags we can see
    code += [(_JEQ, 0, 4, _CLONE[column]), (_LD, 0, 0, 16), (_JSET, 1, 0, _CLONE_THREAD), (_RET, 0, 0, _EPERM)]
    code += [(_RET, 0, 0, _ALLOW)]
    for numbers in (_KILL, _TGKILL):
        code += [(_JEQ, 0, 4, numbers[column]), (_LD, 0, 0, 16), (_JEQ, 1, 0, pid), (_RET, 0, 0, _EPERM)]
        code += [(_RET, 0, 0, _ALLOW)]
    return [*code, (_RET, 0, 0, _ALLOW)]


def confine_calls() -> bool:
    """Take away the system calls that reach beyond this process; whether the kernel did."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return False
    code = b"".join(struct.pack("=HBBI", *line) for line in _filter(machine, os.getpid()))
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0) == 0


def main() -> None:
    """Read the wish from file descriptor 3, lock in, run the program as `__main__`."""
    with os.fdopen(3) as file:
        wish = json.load(file)
    sys.path[:] = [path for path in sys.path if path]
    limit_resources(wish)
    is_confined = False
    if sys.platform == "linux":
        is_confined = confine_files(wish["folder"]) and confine_calls()
    if wish["must_confine"] and not is_confined:
        os.write(2, b"no confinement\n")
        os._exit(125)
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(wish["program"], "program.py", "exec"), names)
    if wish["tests"]:
        exec(compile(wish["tests"], "tests.py", "exec"), names)
    sys.stdout.flush()
    if wish["token"]:
        # Written by what the program's own early exit skips.
        os.write(1, wish["token"].encode())


if __name__ == "__main__":
    main()
