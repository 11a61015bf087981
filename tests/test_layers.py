"""The direction of imports, and what must stay importable without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tutelage"

# Left imports right; names on one line may import one another.
LAYERS = [
    {"__main__"},
    {"cli", "api"},
    {"stages"},
    {"setup", "preflight"},
    {"web"},
    {"improve"},
    {"serve", "audit", "explain", "compress"},
    {"annotate", "retrieve", "inference"},
    {"evaluate", "rollout"},
    {"inference", "rewards"},
    {"train", "engine"},
    {"data", "safety", "structured", "objectives"},
    {"chat", "tokenizer"},
    {"models"},
    {"recipe", "plan"},
    {"store", "sandbox", "workers"},
    {"config", "records", "artifacts", "references", "rundir", "gguf", "aside", "digests", "unicode", "files", "log", "errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH_FREE = [
    "cli.main", "cli.show", "recipe", "rundir", "records", "config.stages", "data.clean.collect", "data.tokens.shards",
    "data.tokens.pack", "chat.render", "tokenizer.train", "tokenizer.load", "plan.shape", "plan.time", "plan.memory", 
    "evaluate.baselines",
    "evaluate.intervals", "preflight.estimates", "preflight.checks", "sandbox.sandbox", "config.rewards", "rewards.build",
    "rewards.check", "rewards.judge", "rewards.model",
]  # fmt: skip


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
    return [(line, m) for line, m in found if m.startswith("tutelage.")]


def test_layers() -> None:
    """Guards against cycles: a mechanism that reaches up into stages or the command line."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LEVEL, f"{path} is in no layer"
        for line, module in _imports(path):
            other = module.split(".")[1]
            assert other in LEVEL, f"{path}:{line} imports {module}, which is in no layer"
            if LEVEL[other] < LEVEL[own]:
                wrong.append(f"{path}:{line} ({own}) imports {module}")
    assert not wrong, "\n".join(wrong)


# Circles that are known and about to be opened: setup's learning-rate rules and its trainer.
def _modules() -> dict[str, Path]:
    names = {p: ".".join(("tutelage", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def _graph() -> dict[str, set[str]]:
    """The modules that each module imports, inside functions too, but not for type checkers alone."""
    modules = _modules()
    out = {}
    for own, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        skipped = {id(x) for n in checking for x in ast.walk(n)}
        found = set()
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = (f"{node.module}.{a.name}" for a in node.names)
                found |= {name if name in modules else node.module for name in whole}
        out[own] = (found & set(modules)) - {own}
    return out


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach one another."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        reach[start] = seen
    found: list[set[str]] = []
    for name in graph:
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({other for other in reach[name] if name in reach[other]})
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Guards against an import inside a function that hides a circle: one of the files then knows too much. What opens whatever
    a folder holds has a file above the things that it opens."""
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert not [sorted(circle) for circle in _circles(_graph())]


def test_one_file_knows_how_models_are_sharded() -> None:
    """Guards against FSDP spreading through the trainer, whose calls change from one torch to the next."""
    names = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.device_mesh")
    users = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if any(n in p.read_text("utf-8") for n in names)}
    assert users == {"models/shard.py"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module: str) -> None:
    """Guards start-up: torch costs two seconds, transformers six, and neither is needed to plan or prepare data."""
    code = f"import sys, tutelage.{module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
