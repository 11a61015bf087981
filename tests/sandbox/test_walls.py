"""The walls: each forbidden act is tried from model-written code, and the proof notices a wall that is missing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tutelage.errors import SandboxError
from tutelage.sandbox import acts, landlock, proof, root
from tutelage.sandbox import sandbox as module
from tutelage.sandbox.limits import Limits, Outcome
from tutelage.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: the sandbox needs Linux")
LIKE_US = {"raise_its_own_limits", "trace_a_process_outside", "make_namespaces"}  # only some users may do this anywhere


def facts(folder: Path, port: int, pid: int) -> dict[str, object]:
    file = folder / "secret.txt"
    file.write_text("secret")
    return {
        "port": port, "file": str(file), "folders": 1, "pid": pid, "user": os.getuid(), "memory": 1 << 20, "disk": 1 << 20,
        "processes": 0, "threads": 2,
    }  # fmt: skip


@pytest.mark.parametrize("act", acts.ACTS, ids=lambda act: act.__name__)
def test_each_act_is_possible_without_walls(act: object, tmp_path: Path) -> None:
    """Guards the proof: an act that fails for a reason of its own would pass for a wall that holds."""
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as other:
        told = json.dumps(facts(tmp_path, server.getsockname()[1], other.pid))
        name = act.__name__  # type: ignore[attr-defined]
        code = f"{Path(acts.__file__).read_text()}\n{name}({told})\nprint('was possible')"
        open_file = os.dup2(os.open(os.devnull, os.O_RDONLY), 77)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, pass_fds=[open_file], check=False
        )
        os.close(open_file)
        other.kill()
    if "was possible" not in done.stdout and name in LIKE_US and os.geteuid() != 0:
        pytest.skip("NOT CHECKED: only root may do this here")
    assert done.stdout.endswith("was possible\n"), done.stderr


def test_the_proof_notices_that_there_are_no_walls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against a proof that is always content: here programs run in a plain Python."""

    def run(parts: tuple[str, ...], limits: Limits) -> Outcome:
        code = "\n".join(parts)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        return Outcome(
            exit=done.returncode, stdout=done.stdout, stderr=done.stderr, reason="done" if not done.returncode else "error"
        )

    with subprocess.Popen(["sleep", "60"]) as other:
        monkeypatch.setattr(proof, "_ACTS", only(tmp_path, "open_a_socket"))
        with pytest.raises(SandboxError, match="could open a socket"):
            proof.prove(run, Limits(), other.pid)
        other.kill()


def only(folder: Path, name: str) -> Path:
    """The acts as a program that tries one of them; the others would touch this machine."""
    path = folder / "one_act.py"
    path.write_text(f"{Path(acts.__file__).read_text()}\nACTS = ({name},)\n")
    return path


def test_a_sandbox_without_its_filter_is_refused(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a silent downgrade: with one wall missing no program runs, and the error names what was possible."""
    monkeypatch.setattr(module, "choose", lambda: [("namespaces", "landlock") if landlock.version() else ("namespaces",)])
    with Sandbox() as weak, pytest.raises(SandboxError, match="could open a socket") as caught:
        weak.run("print(1)")
    assert "fix" in str(caught.value)


def test_a_sandbox_that_can_not_be_built_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against running code bare where namespaces are not allowed: here `bwrap` is a program that fails."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "choose", lambda: [("bwrap", "seccomp")])
    with Sandbox() as none, pytest.raises(SandboxError, match="cannot run a harmless program"):
        none.run("print(1)")


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="NOT CHECKED: bwrap is not installed (apt install bubblewrap)")
@pytest.mark.parametrize("more", [("landlock",), ()], ids=["landlock", "bare"])
def test_bwrap_puts_up_the_same_walls(monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    """Guards the other way: root who stays root inside, what only our own namespaces hide. All acts are tried at its start."""
    if more and not landlock.version():
        pytest.skip("NOT CHECKED: no landlock in this kernel")
    monkeypatch.setattr(module, "choose", lambda: [("bwrap", *more, "seccomp")])
    with Sandbox() as walled:
        done = walled.run("import os\nprint(sum(range(10)), os.getuid() != 0)")
        assert (done.reason, done.stdout) == ("done", "45 True\n"), done
        for code, reason in (
            ("import socket; socket.create_connection(('127.0.0.1', 22))", "error"),
            ("open('/etc/passwd').read()", "error"),
            ("import os\nwhile True: os.fork()", "error"),
            ("x = [0] * 10**9", "memory"),
        ):
            assert walled.run(code).reason == reason, code


@pytest.mark.parametrize(
    ("code", "reasons"),
    [
        ("import os\nwhile True: os.fork()", {"error"}),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", {"error"}),
        ("import socket; socket.create_connection(('127.0.0.1', 22))", {"error"}),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1')", {"error"}),
        ("import subprocess; subprocess.run(['ls'])", {"error"}),
        ("import os; os.system('true') and exit(3)", {"exit"}),
        ("open('/etc/passwd').read()", {"error"}),
        ("import pathlib; pathlib.Path.home().joinpath('x').write_text('x')", {"error"}),
        ("import shutil; shutil.rmtree('/usr/lib')", {"error"}),
        ("import os; os.remove(os.__file__)", {"error"}),
        ("import os; os.mkfifo('pipe')\nopen('pipe').read()", {"error", "time"}),
        ("x = [0] * 10**9", {"memory"}),
        ("x = []\nwhile True: x.append('y' * 10**6 + str(len(x)))", {"memory"}),
        ("9**9**9", {"cpu", "memory"}),
        ("print('9' * 10**9)", {"memory"}),
        ("int('9' * 10**8)", {"error"}),
        ("while True: pass", {"cpu"}),
        ("while True: print('x' * 1000)", {"cpu"}),
        ("f = open('big', 'wb')\nwhile True: f.write(b'0' * 10**6)", {"error"}),
        ("import ctypes; ctypes.string_at(0)", {"signal"}),
        ("import os; os.abort()", {"signal"}),
        ("def f(): f()\nf()", {"error"}),
        ("(" * 10**5, {"error", "memory"}),
        ("eval('-' * 10**6 + '1')", {"error", "memory", "signal"}),
        ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", {"cpu"}),
        ("import os, signal; os.kill(-1, signal.SIGKILL)", {"error"}),
        ("import os; os.closerange(0, 100)", {"exit"}),
        ("raise BaseException('\\ud800')", {"error"}),
        ("x = '\x00'", {"error"}),
        ("import sys; sys.settrace(lambda *a: 1 / 0)\ndef f(): pass\nf()", {"error"}),
        ("import builtins; builtins.print = builtins.len = None", {"done"}),
        ("import os; os.write(3, b'0 1 done'); os._exit(0)", {"exit"}),
        ("import ctypes; print(ctypes.CDLL(None).prctl(1, 0)); exit(3)", {"exit"}),
    ],
)  # fmt: skip
def test_hostile_programs(sandbox: Sandbox, code: str, reasons: set[str]) -> None:
    """Guards the machine and the run: each program ends, is told what ended it, and the next one runs as if it had not been."""
    outcome = sandbox.run(code)
    assert outcome.reason in reasons | ({"time"} if "cpu" in reasons else set()), (
        outcome
    )  # a busy machine is slow to use a second
    assert len(outcome.stdout) < 3000
    after = sandbox.run("import os; print(os.listdir('.'), len(os.listdir('/')) > 2)")
    assert (after.reason, after.stdout) == ("done", "[] True\n")


def test_a_program_past_its_time_is_ended_with_all_it_started() -> None:
    """Guards against processes that outlive their program; here it may start some."""
    with Sandbox(Limits(seconds=4, processes=3, threads=2), parallel=1) as short:
        code = "import os, time\nif not os.fork():\n os.setsid()\n if os.fork(): os._exit(0)\n time.sleep(777)\n"
        code += "print('started', flush=True)"
        assert short.run(code).reason == "done"
        assert short.run(f"{code}\ntime.sleep(777)") == Outcome(exit=-9, stdout="started\n", stderr="", reason="time")
        bomb = short.run(
            "import os, time\nfor n in range(99):\n try:\n  if not os.fork(): time.sleep(9)\n except OSError: print(n)\n"
        )
        assert bomb.stdout.split()[0] in ("5", "6")  # those of the limit, threads being processes that share
        launcher = short._idle[0].pid
        inner = int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text())
        assert Path(f"/proc/{inner}/task/{inner}/children").read_text() == ""


def test_what_a_program_writes_is_cut_and_kept(sandbox: Sandbox) -> None:
    """Guards memory here and what the model is shown: how it began, and how it ended."""
    outcome = sandbox.run("import sys\nprint('é' * 5000, end='.')\nsys.stderr.write('\\ud800')")
    assert outcome.stdout == "é" * 500 + "\n[8001 bytes cut]\n" + "\ufffd" + "é" * 499 + "." and outcome.stderr == "\\ud800"
    assert sandbox.run("print('x' * 1999)").stdout == "x" * 1999 + "\n"
    assert sandbox.run("x = " + "9" * 100_000).stderr.strip().split("\n")[-1].startswith("SyntaxError: Exceeds the limit")
    assert sandbox.run("print(input()[::-1])", stdin="abc\n").stdout == "cba\n"
    failed = sandbox.run("x = 1\nx / 0")
    assert (
        failed.exit == 1
        and failed.stderr.startswith("Traceback")
        and "x / 0" in failed.stderr
        and "launcher" not in failed.stderr
    )


def test_parts_share_their_names_and_only_an_end_is_an_end(sandbox: Sandbox) -> None:
    """Guards rewards: a program that leaves before the tests with status 0 has not passed them."""
    assert sandbox.run(["def f(): return 1", "assert f() == 1"]).finished == 2
    assert sandbox.run(["def f(): return 1", "assert f() == 2", "print('not reached')"]) == Outcome(
        exit=1, stdout="", stderr=sandbox.run(["def f(): return 1", "assert f() == 2"]).stderr, reason="error", finished=1
    )
    for leaving in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        outcome = sandbox.run([leaving, "assert False"])
        assert (outcome.exit, outcome.reason, outcome.finished, outcome.done) == (0, "exit", 0, False)


def test_programs_run_beside_one_another_in_their_order(sandbox: Sandbox) -> None:
    """Guards against answers that change places, and against runs that see each other's files or state."""
    codes = [f"import os; open('f{n}', 'w'); print({n}, os.listdir('.'))" for n in range(12)]
    assert [o.stdout for o in sandbox.run_all(codes)] == [f"{n} ['f{n}']\n" for n in range(12)]
    sandbox.run("import json; json.dumps = None")
    assert sandbox.run("import json; print(json.dumps({1, 2} and 3), hash('x'))") == sandbox.run(
        "import json; print(json.dumps({1, 2} and 3), hash('x'))"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: another user, since this is not root")
def test_an_ordinary_user_has_the_same_walls(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards the way without root's rights: a program of `nobody` puts up and proves the walls."""
    python = next((p for p in ("/usr/bin/python3", sys.executable) if readable(p)), None)
    if python is None:
        pytest.skip("NOT CHECKED: no Python 3.11 that another user may run")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "tutelage")
        source = Path(module.__file__).parents[1]
        for name in ("__init__.py", "errors.py", "unicode.py"):
            package.mkdir(exist_ok=True)
            shutil.copy(source / name, package / name)
        shutil.copytree(source / "sandbox", package / "sandbox")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        code = "from tutelage.sandbox.sandbox import Sandbox\nwith Sandbox() as s: print(s.walls[0], s.run('print(1)').reason)"
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, user=root.NOBODY, group=root.NOBODY, extra_groups=[],
            env={"PYTHONPATH": folder}, cwd="/", check=False,
        )  # fmt: skip
    if "was refused" in done.stderr:
        pytest.skip("NOT CHECKED: user namespaces are not allowed here")
    assert done.stdout == "namespaces done\n", done.stderr


def readable(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], user=root.NOBODY, cwd="/", check=False
        )
    except OSError:
        return False
    return done.returncode == 0
