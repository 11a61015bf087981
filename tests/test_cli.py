"""The command line: quick to answer, clear to read, and the same run as a recipe or a Python call."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import TRAIN, World, environment, inside, tutelage, world, write_recipe, write_sources  # noqa: F401 (a fixture)
from tutelage import __version__, api, log
from tutelage.cli.spelling import spelled, spelling_of
from tutelage.config.base import known_keys, subsection
from tutelage.config.spec import hyphens
from tutelage.errors import DataError, Setting
from tutelage.files import read_json, write_json
from tutelage.rundir import RunDir
from tutelage.stages import STAGES

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sft", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """A help page that takes seconds, since torch is imported to print it."""
    code = (
        f"import sys; sys.argv = ['tutelage', *{words!r}]\nfrom tutelage.cli.main import main\n"
        "try: main()\nexcept SystemExit as left: assert not left.code\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'tokenizers', 'jinja2', 'fastapi'} & set(sys.modules)))\n"
        "print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    heavy, sections = done.stdout.splitlines()[-2:]
    assert heavy == "[]" and (words == ["sft", "--help"] or sections == "False")


def test_every_stage_is_a_command(capsys: Capture) -> None:
    """A stage that recipes know and the command line does not."""
    said = tutelage(capsys, "--help")
    assert said.code == 0 and all(f" {hyphens(name)} " in said.out for name in STAGES)
    assert tutelage(capsys, "--version").out == f"tutelage {__version__}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_setting(stage: str, capsys: Capture) -> None:
    """A setting that only the source knows; a default or a `[required]` eaten as markup; an option that takes a section."""
    page = " ".join(tutelage(capsys, hyphens(stage), "--help", columns=200).out.replace("│", " ").split())
    section = STAGES[stage].config()
    for key, field in section.model_fields.items():
        if subsection(field) is not None:
            assert f" --{hyphens(key)} " not in page
            assert all(f" --set {inner}=" in page for inner in known_keys(section) if inner.startswith(f"{key}."))
            continue
        assert f" --{hyphens(key)} " in page and (field.description or "") in page, key
        if (
            field.default not in (None, "", [], {})
            and isinstance(field.default, int | str)
            and not isinstance(field.default, bool)
        ):
            assert f"default: {field.default})" in page
    required = [f"--{hyphens(k)} " for k, f in section.model_fields.items() if f.is_required()]
    assert page.index("Required") < min(page.index(r) for r in required)
    if "Settings" in page:
        assert max(page.index(r) for r in required) < page.index("Settings")


@pytest.mark.parametrize("stage", STAGES)
def test_narrow_terminals_show_every_option(stage: str, capsys: Capture) -> None:
    """`--sequen…`: an option's name that nobody can type."""
    page = tutelage(capsys, hyphens(stage), "--help", columns=70).out
    assert all(f"--{hyphens(k)}" in page for k, f in STAGES[stage].config().model_fields.items() if subsection(f) is None)


def test_mistakes(capsys: Capture, tmp_path: Path) -> None:
    """Tracebacks, silent misspellings, and errors without the name that was meant."""
    (tmp_path / "a.txt").write_text("text")
    cases = [
        (["dat"], "Did you mean 'data'"),
        (["data", "--source", "a.txt"], "--sources"),
        (["data", "--sources", "a.txt", "--set", "dedupe=exact"], "did you mean `dedup`?"),
        (["data", "--sources", "a.txt", "--set", "dedup"], "key=value"),
        (["data", "--sources", "a.txt", "--min_chars", "few"], "`min_chars` has a value that does not fit"),
        (["data"], "`sources` is required"),
        (["pretrain", "--data", "x", "--set", "optimiser.lr=1"], "did you mean `optimizer`?"),
        (["pretrain", "--data", "x", "--set", "matrix_lr=1"], "did you mean `optimizer.matrix_lr`?"),
        (["tokenizer", "--data", "$corpus"], "`$corpus` is not a stage of this recipe"),
        (["tokenizer", "--data", "nowhere"], "nowhere: no records there"),
        (["tokenizer", "--data", "/nowhere/at/all"], "/nowhere/at/all: no records there"),
        (["run", "nothing.yaml"], "nothing.yaml: no such file"),
        (["show", "nothing"], "nothing: no run there"),
        (["chat", "nothing"], "nothing: no model there"),
    ]
    with inside(tmp_path):
        for words, says in cases:
            said = tutelage(capsys, *words)
            assert said.code == 2 and says in said.err, (words, said.err)
            assert "Traceback" not in said.err and not Path("runs").exists()


def test_dashes_are_underscores(capsys: Capture, tmp_path: Path) -> None:
    """`--vocab-size`, as every other tool spells it, refused."""
    (tmp_path / "a.txt").write_text("text")
    pages = []
    with inside(tmp_path):
        for option in ("--min_chars", "--min-chars"):
            said = tutelage(capsys, "data", "--sources", "a.txt", option, "7", "--dry-run")
            assert said.code == 0 and "min_chars: 7\n" in said.out
            pages.append(said.out)
    assert pages[0] == pages[1]


def test_three_ways_one_run(world: World, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """A command, a recipe and a Python call whose settings look alike and mean different runs."""
    root, corpus, words = tmp_path / "runs", world.made["corpus"], world.made["words"]
    given = {"vocab_size": 300, "data": str(corpus)}
    made = api.tokenizer(runs=root, **given)
    line = [x for k, v in given.items() for x in (f"--{k}", v)]
    said = tutelage(capsys, "tokenizer", *line, "--runs", root)
    assert said.out == f"{made.path}\n" and "tokenizer: hit" in said.err
    assert tutelage(capsys, "tokenizer", "--data", corpus, "--set", "vocab_size=300", "--runs", root).out == f"{made.path}\n"
    assert made.digest == RunDir(words, "", "").facts["digest"]
    architecture = json.dumps({k: v for k, v in world_shape().items()})
    options = [x for k, v in TRAIN.items() for x in (f"--{k}", v)]
    said = tutelage(
        capsys, "pretrain", "--data", corpus, "--tokenizer", words, "--size", "20k", "--architecture", architecture, *options,
        "--runs", root, "--dry-run",
    )  # fmt: skip
    assert said.code == 0 and f"cli/pretrain-{world.made['base'].name.partition('-')[2]}" in said.err


def world_shape() -> dict[str, object]:
    from tests.pipeline import SHAPE

    return SHAPE


def answers(folder: Path, kind: str, row: dict[str, str]) -> Path:
    """Records about answers, made of one row with numbers in it."""
    file = folder / f"{kind}.jsonl"
    rows = [{key: f"{i} {text}".format(i) for key, text in row.items()} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return api.data(sources=[file], kind=kind, dedup="exact", validation_share=0.2, runs=folder / "made").path


def test_dry_run_of_every_stage(world: World, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """A plan that makes folders, or that shows neither where, nor with which settings, nor how long and how much memory."""
    corpus, words, model = (world.made[n] for n in ("corpus", "words", "chat"))
    prefs = answers(tmp_path, "preferences", {"question": "Where?", "chosen": "Here {}.", "rejected": "There {}."})
    adapter = tmp_path / "adapter"
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(model / "model")})
    prompts = answers(tmp_path, "prompts", {"question": "Where?", "answer": "Here {}."})
    asked = {"model": model, "data": prompts, "rewards": {"length": {"maximum": 4}}, "samples": 2, "max_tokens": 4}
    sampled = api.sample(**asked, runs=tmp_path / "made").path
    labelled = answers(tmp_path, "examples", {"text": "one {} two", "label": "a"})
    lines = {
        "data": ["--sources", world.folder / "texts"],
        "tokenizer": ["--data", corpus],
        "tokens": ["--data", corpus, "--tokenizer", words],
        "pretrain": ["--data", corpus, "--tokenizer", words, "--size", "500k"],
        "sft": ["--model", model, "--data", world.made["chats"]],
        "extend_vocab": ["--model", model, "--data", corpus],
        "adapt": ["--model", model, "--data", corpus, "--general", corpus, "--vocab-add", "20"],
        "reward": ["--model", model, "--data", prefs],
        "preference": ["--model", model, "--data", prefs],
        "classify": ["--data", labelled, "--tokenizer", words],
        "translate": ["--data", world.made["chats"], "--tokenizer", words],
        "rl": ["--model", model, "--data", prompts, "--rewards", "{exact: 1}"],
        "sample": ["--model", model, "--data", world.made["chats"], "--rewards", "{exact: 1}"],
        "select": ["--answers", sampled, "--data", prompts],
        "distil": ["--model", model, "--teacher", world.made["base"], "--data", corpus],
        "merge": ["--adapter", adapter],
        "evaluate": ["--model", model, "--documents", corpus],
        "report": ["--run", model],
    }
    assert lines.keys() == STAGES.keys()
    for stage, line in lines.items():
        said = tutelage(capsys, hyphens(stage), *line, "--runs", tmp_path / "runs", "--dry-run", columns=80)
        assert said.code == 0, said.err
        assert STAGES[stage].help in " ".join(said.err.split())
        assert f"{tmp_path}/runs/cli/{stage}-" in said.err and not (tmp_path / "runs").exists()
        assert all(f"{key}:" in said.out for key in STAGES[stage].config().model_fields)
        assert " s - " in said.err and (" MB - " in said.err or " GB - " in said.err) and f"{stage}: 0.3 to " in said.err


def test_dry_run_finds_what_would_fail(world: World, capsys: Capture) -> None:  # noqa: F811
    """A plan without a complaint, and a run that fails at once; for pretraining it was a traceback."""
    for line, says in (
        ([], "`tokenizer` or `model` is required"),
        (["--tokenizer", world.made["words"], "--model", world.made["chat"]], "exclude each other"),
        (["--tokenizer", world.made["words"], "--size", "big"], "not a model size"),
        (["--model", world.made["chat"], "--size", "20k"], "a trained model has its own shape"),
        (["--model", world.made["chat"], "--architecture", '{"hidden_size": 8}'], "a trained model has its own shape"),
    ):
        said = tutelage(capsys, "pretrain", "--data", world.made["corpus"], *line, "--dry-run")
        assert said.code == 2 and says in said.err
    line = ["sft", "--model", world.made["chat"], "--data", world.made["chats"], "--sequence-length", 9999, "--dry-run"]
    said = tutelage(capsys, *line)
    assert said.code == 2 and "rows longer than the model's context" in said.err and "at most 128" in said.err


def test_errors_speak_of_settings_as_they_are_typed(tmp_path: Path, capsys: Capture) -> None:
    """`on_error=skip`, a form that neither the command line nor a recipe takes."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{\n')
    recipe = {"name": "r", "stages": {"corpus": {"stage": "data", "sources": [str(file)]}}}
    runs = ["--runs", tmp_path / "runs"]
    assert "out with --on-error skip" in tutelage(capsys, "data", "--sources", file, *runs).err
    assert "out with on_error: skip" in tutelage(capsys, "run", write_recipe(tmp_path / "r.yaml", recipe), *runs).err
    with pytest.raises(DataError, match="out with on_error=skip"):
        api.data(sources=[file], runs=tmp_path / "runs")
    file.write_text('{"a": "one", "b": "two"}\n')
    said = tutelage(capsys, "data", "--kind", "conversations", "--sources", file, *runs)
    assert "--fields '{prompt: YOUR_KEY, completion: YOUR_KEY}'" in said.err
    assert "--set optimizer.lr=1e-3" in tutelage(capsys, "pretrain", "--data", "x", "--set", "steps").err
    error = DataError(
        "x", fix=f"use {Setting('adapter.kind', 'lora')}, {Setting('too_long', 'left')} or {Setting('by', 'words')}"
    )
    assert spelled(error, "sft").endswith("use --set adapter.kind=lora, --too-long left or by=words")
    assert spelled(error, "run").endswith("use adapter: {kind: lora}, too_long: left or by: words")
    for copy in (error, error.but(line=3), pickle.loads(pickle.dumps(error))):
        assert str(copy).endswith("use adapter.kind=lora, too_long=left or by=words") and copy.fix in str(copy)
        assert "--too-long left" in spelled(copy, "sft")
    log.say(f"use {Setting('too_long', 'left')}")
    with log.spelling(spelling_of("sft")):
        log.say(f"use {Setting('too_long', 'right')}")
    assert capsys.readouterr().err == "use too_long=left\nuse --too-long right\n"


@pytest.mark.parametrize("columns", [40, 300])
def test_runs_and_show(world: World, capsys: Capture, columns: int) -> None:  # noqa: F811
    """A list that hides the directory, which is what one copies from it; a chain that ends before the data."""
    with inside(world.folder):
        said = tutelage(capsys, "runs", columns=columns)
        squeezed = "".join(c for c in said.out if c not in " │\n")
        rows = {p.name for p in world.made.values()}
        assert said.code == 0 and not said.err
        if columns == 300:
            assert all(f"runs/small/{name}" in said.out for name in rows) and "done" in said.out and "tokens" in said.out
        else:
            assert "…" not in said.out.split("┃")[1] and squeezed
        chain = tutelage(capsys, "show", "small/chat", columns=columns).out
    flat = "".join(chain.split()).replace("│", "").replace("└──", "").replace("├──", "")
    assert [flat.index(world.made[n].name) for n in ("chat", "base", "corpus", "words")] and "bits_per_byte_in_run" not in chain
    for name, row in ((n, read_json(p / "run.json")) for n, p in world.made.items()):
        assert world.made[name].name in flat and row["digest"][:12] in flat


def test_a_run_that_goes_on_has_taken_time(tmp_path: Path, capsys: Capture) -> None:
    """A run that has been going for hours and has taken 0 s."""
    run = RunDir(tmp_path / "runs" / "cli" / "data-0123456789ab", "data", "0" * 64)
    with inside(tmp_path), run.attempt({}):
        row = read_json(run.path / "run.json")
        (run.path / "run.json").write_text(json.dumps(row | {"started": "2020-01-01T00:00:00+0000"}))
        said = tutelage(capsys, "runs", columns=300).out
    hours = [float(cell.split()[0]) for cell in said.split("│") if cell.strip().endswith(" h")]
    assert len(hours) == 1 and hours[0] > 1000 and "running" in said


def test_an_unfinished_run_is_shown_and_resumes(tmp_path: Path, capsys: Capture) -> None:
    """A killed run that says `running` for ever; an error text with brackets that breaks the table."""
    run = RunDir(tmp_path / "runs" / "cli" / "data-0123456789ab", "data", "0" * 64)
    with pytest.raises(ValueError), run.attempt({}):
        raise ValueError("[/bold] [red]x: \\[")
    with inside(tmp_path):
        assert "[/bold] [red]x" in tutelage(capsys, "runs").out and "[/bold]" in tutelage(capsys, "show", "cli/data").out
        row = read_json(run.path / "run.json")
        (run.path / "run.json").write_text(json.dumps({**row, "status": "running"}))
        assert (
            "killed (resumes)" in tutelage(capsys, "runs").out and "killed (resumes)" in tutelage(capsys, "show", "cli/data").out
        )
        said = tutelage(capsys, "tokenizer", "--data", "cli/data")
    assert said.code == 2 and "not finished" in said.err and "it resumes" in said.err


def test_pipes_get_whole_lines(tmp_path: Path) -> None:
    """`tutelage runs | grep` that finds nothing: the table was on stderr, or cut at 80 columns."""
    write_sources(tmp_path)
    root = tmp_path / "a" / ("long" * 20)
    api.data(sources=[tmp_path / "texts"], runs=root)
    environ = {k: v for k, v in environment().items() if k != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", "runs", "--runs", str(root)],
        capture_output=True, text=True, env=environ, check=True,
    )  # fmt: skip
    assert str(next(root.glob("cli/data-*"))) in done.stdout


def test_the_package_runs_as_a_module() -> None:
    """`python -m tutelage`, which `torchrun -m` and people without scripts on their path write."""
    done = subprocess.run([sys.executable, "-m", "tutelage", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
