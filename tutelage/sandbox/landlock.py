"""Landlock: the kernel refuses files, ports and signals to a process that asked for it, whatever rights it has."""

from __future__ import annotations

import os
import struct

from tutelage.sandbox.system import syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_READ = _READ_FILE | _READ_DIR
_MAKE_AND_REMOVE = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13  # files, folders, links; no devices, sockets, pipes
_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # of file rights that each version knows; later ones 16
_PORTS, _SCOPES = 0b11, 0b11  # TCP bind and connect; abstract sockets and signals


def version() -> int:
    """Of the kernel's landlock; 0 where it has none."""
    try:
        return syscall("landlock_create_ruleset", _CREATE, 0, 0, 1)
    except OSError:
        return 0


def restrict(writable: str, devices: tuple[str, ...] = ()) -> None:
    """From now on this thread and all it starts may read, write below `writable` and to `devices`, and reach no port."""
    known = version()
    handled = (1 << _BITS.get(known, 16)) - 1
    fields = [handled, _PORTS, _SCOPES][: 1 if known < 4 else 2 if known < 6 else 3]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    rules = syscall("landlock_create_ruleset", _CREATE, attributes, len(attributes), 0)
    _allow(rules, "/", _READ & handled)
    _allow(rules, writable, (_READ | _WRITE_FILE | _TRUNCATE | _MAKE_AND_REMOVE) & handled)
    for device in devices:
        _allow(rules, device, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & handled)
    syscall("landlock_restrict_self", _RESTRICT, rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    syscall("landlock_add_rule", _ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)
