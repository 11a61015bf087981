"""A file system with Python's own library and nothing else of this machine: in memory, read-only, for one tree of processes."""

from __future__ import annotations

import os
import sys

from tutelage.sandbox import system

FOLDER = "/tmp"  # of the program, the only place it can write to
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
NOBODY = 65534
INSIDE = 1000  # what the user is called in there
_ALL = (
    system.CLONE_NEWUSER
    | system.CLONE_NEWNS
    | system.CLONE_NEWPID
    | system.CLONE_NEWNET
    | system.CLONE_NEWIPC
    | system.CLONE_NEWUTS
    | system.CLONE_NEWCGROUP
)
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
        system.prctl(system.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root
        system.unshare(_ALL)
        _name_user(processes, NOBODY, NOBODY)
    else:
        user, group = os.geteuid(), os.getegid()
        system.unshare(_ALL)
        processes = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        _name_user(processes, user, group)
        _build()
    os.close(processes)


def _mounts_of_its_own() -> bool:
    try:
        system.unshare(system.CLONE_NEWNS)
    except OSError:  # root of a container, who can't do more than others
        return False
    return True


def _name_user(processes: int, user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("gid_map", f"{INSIDE} {group} 1"), ("uid_map", f"{INSIDE} {user} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=processes)
        os.write(file, text.encode())
        os.close(file)


def _build() -> None:
    system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
    sources = library()
    base = next(p for p in _PLACES if os.path.isdir(p) and not any(s == p or s.startswith(p + "/") for s in sources))
    system.mount("tmpfs", base, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "size=1m,mode=755")
    for source in sources:
        os.makedirs(os.path.dirname(base + source), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), base + source)
        else:
            os.mkdir(base + source)
            system.mount(source, base + source, None, system.MS_BIND | system.MS_REC)
            system.make_readonly(base + source)
    for folder in hidden():
        if os.path.isdir(base + folder):
            system.mount("tmpfs", base + folder, "tmpfs", system.MS_NOSUID | system.MS_NODEV, "size=4k,mode=755")
            system.make_readonly(base + folder)
    os.mkdir(f"{base}/dev")
    for device in DEVICES:
        os.close(os.open(base + device, os.O_CREAT | os.O_WRONLY))
        system.mount(device, base + device, None, system.MS_BIND)
    os.mkdir(base + FOLDER)
    system.make_readonly(base, below=False)  # devices stay devices
    system.change_root(base)
