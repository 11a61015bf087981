"""Sections, values and YAML: a wrong key or value is named with its place and its mending."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_origin

import pytest

from tutelage.config.base import (
    Section,
    SourceLocations,
    assign,
    build,
    identity_of,
    load_yaml,
    parse_set,
    parse_value,
    subsection,
)
from tutelage.config.stages import Data, Preference, Pretrain, Rl
from tutelage.errors import ConfigError
from tutelage.stages import STAGES


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1e-3", 1e-3), ("-2.5E+4", -2.5e4), (".5", 0.5), ("0.1", 0.1), ("true", True), ("null", None), ("1_000", 1000),
        ("off", "off"), ("on", "on"), ("no", "no"), ("3m", "3m"), ("007", "007"), ("2026-01-02", "2026-01-02"),
        ("12:30", "12:30"),
        ("[a, 1]", ["a", 1]), ("{a: b}", {"a": "b"}), ("python-docs:", "python-docs:"), ("a: b", "a: b"), ("*.txt", "*.txt"),
        ("#x", "#x"), ("", None), ("none", "none"), ("C:\\x", "C:\\x"), ("@home", "@home"),
    ],
)  # fmt: skip
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    """YAML 1.1 makes `compile=off` False, `12:30` 750, a folder named like a date a date and `1e-3` a text."""
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_a_file_reads_values_as_the_command_line_does(tmp_path: Path) -> None:
    """A recipe in which `compile: off` is False while `--compile off` is text."""
    (tmp_path / "a.yaml").write_text("compile: off\nlr: 1e-3\nname: 12:30\nbase: &b {x: 1}\nmore: {<<: *b, y: 2}\n")
    values, lines = load_yaml(tmp_path / "a.yaml")
    assert values["compile"] == "off" and values["lr"] == 1e-3 and values["name"] == "12:30"
    assert values["more"] == {"x": 1, "y": 2}
    assert lines["lr"] == 2 and lines["base.x"] == 4


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [("a: 1\nb: [", 2, "not valid YAML"), ("a: 1\na: 2", 2, "`a` appears twice"), ("- a", None, "a recipe is a mapping")],
)
def test_broken_yaml_is_placed(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    """A parser's traceback; and the silent loss of the first of two equal keys."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(tmp_path / "a.yaml")
    assert (caught.value.file, caught.value.line) == (tmp_path / "a.yaml", line)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    """`tutelage run model.safetensors` or a folder: an error of ours, not Python's."""
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "a.yaml", "not UTF-8"), (tmp_path, "cannot read it"), (tmp_path / "b", "no such file")):
        with pytest.raises(ConfigError, match=message):
            load_yaml(path)


def test_unknown_keys_name_the_nearest() -> None:
    """A misspelt key that is ignored, the dearest silent error of configuration."""
    base = {"data": "d", "tokenizer": "t"}
    for values, key, hint in (
        ({"step": 3}, "step", "steps"),
        ({"matrix_lr": 1e-3}, "matrix_lr", "optimizer.matrix_lr"),
        ({"optimizer": {"lrr": 1e-3}}, "optimizer.lrr", "optimizer.lr"),
        ({"schedule": {"warm_up": 1}}, "schedule.warm_up", "schedule.warmup"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(Pretrain, {**base, **values})
        assert caught.value.field == key and caught.value.fix == f"did you mean `{hint}`?"
        assert str(caught.value.expected).startswith("one of: ")


def test_a_renamed_key_names_the_new_one() -> None:
    """A recipe of an older release gets a list of 40 keys, or a key that only looks alike."""
    with pytest.raises(ConfigError) as caught:
        build(Rl, {"model": "m", "data": "d", "rewards": {"exact": 1}, "silent": "skip"})
    assert caught.value.fix == "did you mean `zero_variance`?"


@pytest.mark.parametrize(
    ("values", "key", "found", "says"),
    [
        ({"steps": 0}, "steps", 0, "greater than or equal to 1, or Input should be 'derived'"),
        ({"steps": "many"}, "steps", "many", "valid integer"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr", -1, "greater than 0"),
        ({"packing": "tight"}, "packing", "tight", "'best_fit' or 'none'"),
        ({"architecture": 3}, "architecture", 3, "dictionary"),
        ({"optimizer": 3}, "optimizer", 3, "Optimizer"),
    ],
)
def test_wrong_values_say_what_was_expected(values: dict[str, object], key: str, found: object, says: str) -> None:
    """Names of pydantic's inner types (`steps.constrained-int`) that no user can look up."""
    with pytest.raises(ConfigError) as caught:
        build(
            Pretrain,
            {"data": "d", "tokenizer": "t", **values},
            places=SourceLocations(Path("r.yaml"), {"s.steps": 7}),
            prefix="s.",
        )
    error = caught.value
    assert error.field == "s." + key and error.found == found and says in error.message and error.expected
    assert error.line == (7 if key == "steps" else None) and error.file == Path("r.yaml")


def test_required_keys() -> None:
    """A run that starts without its data and fails an hour later."""
    with pytest.raises(ConfigError, match="`data` is required"):
        build(Pretrain, {})
    with pytest.raises(ConfigError, match="`sources`"):
        build(Data, {"sources": []})


def test_text_may_look_like_a_number_and_a_list_may_be_one_name() -> None:
    """`--size 3000000` and `--set corpus.sources=docs/` refused for their type."""
    assert build(Pretrain, {"data": 1, "tokenizer": "t", "size": 3000000}).size == "3000000"
    assert build(Data, {"sources": "docs/"}).sources == ["docs/"]


def test_sections_are_frozen_and_know_what_changes_a_result() -> None:
    """A digest that forgets a nested setting, or that counts the number of threads."""
    one = build(Pretrain, {"data": "d", "tokenizer": "t"})
    with pytest.raises(ValueError):
        one.seed = 3  # type: ignore[misc]
    for other in ({"threads": 7}, {"micro_rows": 2}, {"checkpoint_every": 5}, {"compile": "off"}, {"tokenizer": "elsewhere"}):
        assert identity_of(build(Pretrain, {"data": "d", "tokenizer": "t", **other})) == identity_of(one), other
    for other in ({"seed": 1}, {"optimizer": {"beta2": 0.9}}, {"schedule": {"name": "wsd"}}, {"size": "4m"}, {"kernels": False}):
        assert identity_of(build(Pretrain, {"data": "d", "tokenizer": "t", **other})) != identity_of(one), other


def test_one_key_of_a_nested_section_changes_that_key_alone() -> None:
    """`--set optimizer.lr=1e-4` of a stage whose optimizer is AdamW by default, which turned it into Muon without a word."""
    plain = build(Preference, {"data": "d", "model": "m"})
    changed = build(Preference, {"data": "d", "model": "m", "optimizer": {"lr": 1e-4}, "schedule": {"warmup": 0.3}})
    assert changed.optimizer == plain.optimizer.model_copy(update={"lr": 1e-4}) and changed.optimizer.name == "adamw"
    assert changed.schedule == plain.schedule.model_copy(update={"warmup": 0.3}) and changed.schedule.name == "linear"
    with pytest.raises(ConfigError, match=r"optimizer\.lrr"):
        build(Preference, {"data": "d", "model": "m", "optimizer": {"lrr": 1e-4}})


def test_settings() -> None:
    """`--set` that overwrites a whole section when it should change one key."""
    values: dict[str, object] = {"optimizer": {"beta1": 0.8}, "size": "3m"}
    assign(values, *parse_set("optimizer.lr = 1e-3"))
    assign(values, *parse_set("schedule.name=wsd"))
    assert values == {"optimizer": {"beta1": 0.8, "lr": 1e-3}, "size": "3m", "schedule": {"name": "wsd"}}
    for wrong in ("optimizer.lr", "=3"):
        with pytest.raises(ConfigError, match="key=value"):
            parse_set(wrong)


DEEP = "[" * 3000 + "]" * 3000
WIDE = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("stages:\n  a: &a\n    sources: [*a]\n", 2, "holds itself"),
        ("a: &a {b: *a}\n", 1, "holds itself"),
        (f"a: {DEEP}\n", None, "nested too deeply"),
        (f"a: &a [x, x]\n{WIDE}", None, "by its aliases"),
    ],
)
def test_yaml_without_an_end_is_refused(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    """RecursionError inside a stage; gigabytes out of six lines."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(tmp_path / "a.yaml")
    assert caught.value.file == tmp_path / "a.yaml" and caught.value.fix and (line is None or caught.value.line == line)
    for given in (DEEP, "&a [*a]"):
        with pytest.raises(ConfigError):
            parse_value(given)


def test_keys_are_text(tmp_path: Path) -> None:
    """A stage named `1:`, which is looked for as "1"; and a key `true:` that no message can name."""
    (tmp_path / "a.yaml").write_text("stages:\n  1: {x: 2}\n  true: 3\n  07: 4\n")
    values, lines = load_yaml(tmp_path / "a.yaml")
    assert values["stages"] == {"1": {"x": 2}, "true": 3, "07": 4} and lines["stages.1.x"] == 2


def test_every_setting_with_words_says_which_to_write() -> None:
    """`compile=true`: "should be 'auto', 'on' or 'off'", and no way out."""
    said = {("compile", True): "compile=on", ("compile", "no"): "compile=off", ("checkpointing", False): "checkpointing=none",
            ("compile", "autp"): "compile=auto", ("dtype", "bfloat"): "dtype=bfloat16"}  # fmt: skip
    for (key, value), fix in said.items():
        with pytest.raises(ConfigError) as caught:
            build(Pretrain, {"data": "x", key: value})
        assert f"did you mean {fix}?" == caught.value.fix


def enumerated(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = subsection(field)
        if inner is not None:
            yield from enumerated(inner, f"{prefix}{name}.")
        elif get_origin(field.annotation) is Literal:
            yield prefix + name


@pytest.mark.parametrize("stage", STAGES)
def test_a_word_that_is_none_has_a_fix_everywhere(stage: str) -> None:
    """An enumerated setting whose error leaves the reader to guess."""
    section = STAGES[stage].config()
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    fitting = {"sources": ["x"], "rewards": {"exact": 1}}
    for key in enumerated(section):
        values: dict[str, object] = {name: fitting.get(name, "x") for name in required}
        assign(values, key, "@@")
        with pytest.raises(ConfigError) as caught:
            build(section, values)
        assert caught.value.field == key and f"set {key} to one of: " in str(caught.value.fix), key
