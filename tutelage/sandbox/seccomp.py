"""Which system calls a program may not make: a filter in the kernel's own little language, put together by hand."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from tutelage.sandbox.system import prctl

# name: number on x86_64 and on aarch64, None where it has no such call
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "mount_setattr": (442, 442),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "syslog": (103, 116), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "quotactl": (179, 60), "personality": (135, 92), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "mknod": (133, None),
    "mknodat": (259, 33), "move_pages": (279, 239), "migrate_pages": (256, 238), "mbind": (237, 235),
    "process_madvise": (440, 440), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "uselib": (134, None),
}  # fmt: skip
STARTING: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
_CLONE, _PRCTL, _IOCTL, _CLONE3 = (56, 220), (157, 167), (16, 29), 435
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, the kernel's number
_NEWEST = 450  # later calls do not exist here: the C library knows how to do without
_X32 = 0x40000000  # calls of another kind in the same process

_NAMESPACES, _THREAD = 0x7E020080, 0x00010000  # flags of clone
_PDEATHSIG, _TIOCSTI = 1, 0x5412

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets: of the call, the machine, the lower halves of its arguments
_NO = _ERROR | errno.EPERM
_UNKNOWN = _ERROR | errno.ENOSYS

Step = tuple[int, int, int, int]  # operation, steps to skip if true, if false, operand


def program(forks: bool) -> list[Step]:
    """The filter of this machine; without `forks` a program can start threads, but no processes."""
    column, arch = _MACHINES[platform.machine()]
    steps: list[Step] = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if column == 0:
        steps += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    steps += [(_AT_LEAST, 0, 1, _NEWEST), (_RETURN, 0, 0, _UNKNOWN)]
    for numbers in (DENIED if forks else DENIED | STARTING).values():
        number = numbers[column]
        if number is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NO)]
    steps += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _UNKNOWN)]  # its flags can't be looked at; clone is used instead
    steps += _when(_CLONE[column], [(_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _NAMESPACES), (_RETURN, 0, 0, _NO)]
                   + ([] if forks else [(_ANY_BIT, 1, 0, _THREAD), (_RETURN, 0, 0, _NO)]))  # fmt: skip
    steps += _when(_PRCTL[column], [(_LOAD, 0, 0, _FIRST), (_EQUAL, 0, 1, _PDEATHSIG), (_RETURN, 0, 0, _NO)])
    steps += _when(_IOCTL[column], [(_LOAD, 0, 0, _SECOND), (_EQUAL, 0, 1, _TIOCSTI), (_RETURN, 0, 0, _NO)])
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _when(number: int, steps: list[Step]) -> list[Step]:
    return [(_EQUAL, 0, len(steps) + 1, number), *steps, (_RETURN, 0, 0, _ALLOW)]


def apply(forks: bool) -> None:
    """Puts this thread and all it starts behind the filter, for good. Needs no_new_privs."""
    steps = b"".join(struct.pack("HBBI", *step) for step in program(forks))
    buffer = ctypes.create_string_buffer(steps, len(steps))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps) // 8, ctypes.addressof(buffer)))
    prctl(22, 2, ctypes.addressof(filter_))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
