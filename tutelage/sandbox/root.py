"""A file system that holds Python's own library and nothing of this machine's: read-only, in memory, made for one process tree."""

from __future__ import annotations

import os
import sys

from tutelage.sandbox.system import (
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS, MS_BIND, MS_NODEV,
    MS_NOSUID, MS_PRIVATE, MS_REC, PR_SET_DUMPABLE, change_root, make_readonly, mount, prctl, unshare,
)  # fmt: skip

FOLDER = "/tmp"  # of the program, the only place it can write to
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
NOBODY = 65534
INSIDE = 1000  # what the user is called in there
_ALL = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
_PLACES = ("/mnt", "/media", "/srv", "/opt", "/tmp", "/var", "/home")  # the new root is put over one of them, unseen by others


def library() -> list[str]:
    """Folders that a program may read: Python's library and the shared libraries that its modules load."""
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib"), os.path.dirname(os.__file__)]
    out: list[str] = []
    for path in wanted:
        if os.path.isdir(path) and not any(path == p or path.startswith(p + "/") for p in out):
            out.append(path)
    return out


def hidden() -> list[str]:
    """Folders inside these that hold what people installed, which may be their own work."""
    standard = os.path.dirname(os.__file__)
    folders = [f"{standard}/site-packages", f"{standard}/dist-packages", "/usr/lib/python3/dist-packages"]
    return [f for f in dict.fromkeys(folders) if os.path.isdir(f)]


def enter() -> None:
    """Moves this process into namespaces of its own, with such a root. Raises `OSError` with the step that was refused.

    Root builds the file system first, because its Python may lie where nobody else can look, and then becomes nobody: the kernel
    does not count the processes of root.
    """
    if os.geteuid() == 0 and _mounts_of_its_own():
        processes = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        _build()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        prctl(PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root
        unshare(_ALL)
        _name_user(processes, NOBODY, NOBODY)
    else:
        user, group = os.geteuid(), os.getegid()
        unshare(_ALL)
        processes = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        _name_user(processes, user, group)
        _build()
    os.close(processes)


def _mounts_of_its_own() -> bool:
    try:
        unshare(CLONE_NEWNS)
    except OSError:  # root of a container, who can't do more than others
        return False
    return True


def _name_user(processes: int, user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("gid_map", f"{INSIDE} {group} 1"), ("uid_map", f"{INSIDE} {user} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=processes)
        os.write(file, text.encode())
        os.close(file)


def _build() -> None:
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    sources = library()
    base = next(p for p in _PLACES if os.path.isdir(p) and not any(s == p or s.startswith(p + "/") for s in sources))
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source in sources:
        os.makedirs(os.path.dirname(base + source), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), base + source)
        else:
            os.mkdir(base + source)
            mount(source, base + source, None, MS_BIND | MS_REC)
            make_readonly(base + source)
    for folder in hidden():
        if os.path.isdir(base + folder):
            mount("tmpfs", base + folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
            make_readonly(base + folder)
    os.mkdir(f"{base}/dev")
    for device in DEVICES:
        os.close(os.open(base + device, os.O_CREAT | os.O_WRONLY))
        mount(device, base + device, None, MS_BIND)
    os.mkdir(base + FOLDER)
    make_readonly(base, below=False)  # devices stay devices
    change_root(base)

