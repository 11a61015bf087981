"""The same walls by `bwrap`, for machines that let only that program make namespaces. Each run starts Python anew."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.sandbox.root import DEVICES, FOLDER, INSIDE, hidden, library

REQUEST = 4  # the descriptor from which the program's side reads what it is to become
_CODE = "import sys; sys.path.insert(0, '/code'); from tutelage.sandbox.bubblewrap import main; main()"


def command(disk: int, walls: Sequence[str]) -> list[str]:
    """What `bwrap` is called with."""
    python = os.path.realpath(sys.executable)
    out = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    out += ["--unshare-user", "--uid", str(INSIDE), "--gid", str(INSIDE)]  # of root, too, which it would leave as it is
    out += ["--setenv", "PYTHONHASHSEED", "0"]
    for path in library():
        out += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in hidden():
        out += ["--tmpfs", path, "--remount-ro", path]
    out += ["--ro-bind", python, python, "--ro-bind", str(Path(__file__).parent), "/code/tutelage/sandbox"]
    for device in DEVICES:
        out += ["--dev-bind", device, device]
    out += ["--size", str(disk), "--tmpfs", FOLDER, "--remount-ro", "/", "--chdir", FOLDER, "--"]
    return [*out, python, "-s", "-S", "-P", "-c", _CODE, json.dumps(list(walls))]


def start(request: dict[str, Any], token: str, walls: Sequence[str]) -> None:
    """Becomes `bwrap` with the program in it. Raises `OSError` where it can't be started."""
    told = os.memfd_create("request", 0)
    os.write(told, json.dumps({**request, "token": token}).encode())
    os.lseek(told, 0, os.SEEK_SET)
    os.dup2(told, REQUEST, inheritable=True)
    words = command(request["limits"]["disk"], walls)
    os.execvpe(words[0], words, {"PATH": os.environ.get("PATH", os.defpath)})


def main() -> None:
    """The program's side, inside."""
    from tutelage.sandbox import program

    with open(REQUEST, encoding="utf-8") as file:
        request = json.load(file)
    sys.path.pop(0)
    program.become(request, request["token"], json.loads(sys.argv[1]))
