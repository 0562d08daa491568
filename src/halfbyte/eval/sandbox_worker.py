"""Owns the inside of a program's process: it gives up every right but to compute, then runs the program.

Only ``sandbox`` starts it, without site packages; it imports nothing of halfbyte. Standard input holds a
secret, seconds, bytes, a line break and the program. The secret is written to standard output if the program
ran to its end.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
import traceback

UNSUPPORTED = 77
OUTPUT_BYTES = 1 << 16
ERROR_CHARS = 2000
EPERM = 1
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 4, 22, 38, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on both architectures
# Number of file rights in each version of Landlock (linux/landlock.h).
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
READ = 1 << 2 | 1 << 3  # of files, of folders
NET_RIGHTS, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals
# System calls that reach beyond the process: processes, sockets, signals, owners and modes of files, limits,
# other processes' memory, the machine. name: (number on x86-64, on ARM64), None where there is none.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203),
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "setrlimit": (160, 164), "prlimit64": (302, 261),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116),
    "iopl": (172, None), "ioperm": (173, None), "quotactl": (179, 60), "acct": (163, 89),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "memfd_create": (319, 279), "mknod": (133, None), "mknodat": (259, 33),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column in DENIED
X32 = 0x40000000  # first call number of x86-64's x32 interface
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF
ALLOW, REFUSE, END = 0x7FFF0000, 0x00050000 | EPERM, 0x80000000


class UnsupportedError(Exception):
    """The kernel cannot confine a program."""


def main() -> None:
    """Read the request, give up all rights, run the program, then write the secret."""
    head, _, source = sys.stdin.buffer.read().partition(b"\n")
    secret, seconds, memory = head.decode().split()
    out, err = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    try:
        _set_limits(float(seconds), int(memory))
        _restrict_files()
        _restrict_calls()
    except (UnsupportedError, OSError, ValueError) as error:
        os.write(err, str(error).encode())
        os._exit(UNSUPPORTED)
    try:
        code = compile(source.decode("utf-8", "surrogatepass"), "program", "exec")
        exec(code, {"__name__": "__main__"})
    except BaseException:
        os.write(err, traceback.format_exc()[-ERROR_CHARS:].encode("utf-8", "replace"))
        os._exit(1)
    os.write(out, secret.encode())
    os._exit(0)


def _set_limits(seconds: float, memory: int) -> None:
    """Limit time, memory and resources of this process."""
    whole = max(1, math.ceil(seconds))
    signal.alarm(whole + 1)  # wall-clock time, for programs that sleep
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
    for limit, value in {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_FSIZE: OUTPUT_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_MEMLOCK: 0,
    }.items():
        resource.setrlimit(limit, (value, value))


def _restrict_files() -> None:
    """Let Landlock allow reading Python's own files, and deny writing, binding and connecting to ports."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise UnsupportedError("the kernel has no Landlock")
    files = (1 << FILE_RIGHTS.get(version, max(FILE_RIGHTS.values()))) - 1
    net, scopes = (NET_RIGHTS if version >= 4 else 0), (SCOPES if version >= 6 else 0)
    ruleset = struct.pack("QQQ", files, net, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(LANDLOCK_CREATE, ruleset[:size], ctypes.c_size_t(size), 0)
    if rules < 0:
        raise UnsupportedError(f"Landlock: error {ctypes.get_errno()}")
    for path in _readable_files():
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = files & (READ if os.path.isdir(path) else 1 << 2)
        rule = struct.pack("=Qi", rights, folder)
        if libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0):
            raise UnsupportedError(f"Landlock: {path}: error {ctypes.get_errno()}")
        os.close(folder)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        raise UnsupportedError(f"Landlock: error {ctypes.get_errno()}")
    os.close(rules)


def _readable_files() -> list[str]:
    """Return where the standard library and the libraries it links to are."""
    standard = os.path.dirname(os.__file__)
    paths = [standard, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    paths += ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom", os.devnull]
    return [path for path in paths if os.path.exists(path)]


def _restrict_calls() -> None:
    """Let seccomp fail system calls that reach beyond the process, with EPERM."""
    if platform.machine() not in MACHINES:
        raise UnsupportedError(f"the processor {platform.machine()} is not supported")
    machine, column = MACHINES[platform.machine()]
    numbers = [number for pair in DENIED.values() if (number := pair[column]) is not None]
    filters = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, END), (LOAD, 0, 0, 0)]
    filters += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE)] if column == 0 else []
    for number in numbers:
        filters += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    filters.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in filters)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=H6xQ", len(filters), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise UnsupportedError(f"seccomp: error {ctypes.get_errno()}")


if __name__ == "__main__":
    main()
