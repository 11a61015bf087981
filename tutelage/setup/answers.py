"""What stages about answers share: settings left to derive, the reference's log-probabilities, the common part of their work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tutelage import log
from tutelage.artifacts import base_of, whole_of
from tutelage.chat.render import Rendered, coloured_sample
from tutelage.config.train import Loop, Tune
from tutelage.data.groups import dropped
from tutelage.data.groups.dropped import NothingLeft
from tutelage.data.groups.groups import bins, collate
from tutelage.data.groups.source import PromptGroups
from tutelage.data.tokens.shards import Segments
from tutelage.errors import ArtifactError, ConfigError, Setting
from tutelage.files import read_object, whole_file, write_json
from tutelage.models.adapters.attach import adapter_of, attach_heads, attach_to_scorer
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.objectives.answers import answer_logprobs
from tutelage.plan.parameters import count_config
from tutelage.rundir import RunDir
from tutelage.setup.hyperparameters import ranks_sharing, said_rates, tuning_rates
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train.optim import LearningRates


def check_tokens(run: RunDir, name: str) -> None:
    """Raises `ArtifactError` where the model of the input `name` reads other tokens than the one that is trained."""
    TokenizerFolder.open(whole_of(run.input("model"))).check_same(TokenizerFolder.open(whole_of(run.input(name))))


def size_of(model: Any) -> int:
    """Parameters of a model, those that are held in 4 bits included."""
    try:
        return count_config(model.config.to_hf()).total
    except ConfigError:  # of a family that is not ours
        return sum(p.numel() for p in model.parameters())


def wear_under_head(scorer: Any, config: Tune, folder: Path, seed: int) -> Any:
    """Puts the adapter of the settings under a score head. Virtual tokens that the scorer was loaded with from `folder` are
    trained on, since they can't be merged. Raises `ConfigError` where the settings ask for others, and for shards."""
    asked, before = config.adapter, adapter_of(scorer)
    if asked.kind != "none" and ranks_sharing(config) > 1:
        raise ConfigError(
            "an adapter under a score head is not cut over ranks", field="shard", found=config.shard, expected="none"
        )
    if before is None:
        if asked.kind == "none":
            return scorer
        attach_to_scorer(scorer, asked, seed)
        adapter_of(scorer).base = folder  # type: ignore[union-attr]
        return scorer
    for name in ("kind", "tokens"):
        wanted, own = getattr(asked, name), getattr(before.config, name)
        if wanted != own and (name == "kind" or wanted != type(asked).model_fields[name].default):
            raise ConfigError(
                f"{folder} wears virtual tokens, which can't be merged: they are trained on, with the adapter as it is there",
                field=f"adapter.{name}", found=wanted, expected=f"{own}",
                fix=f"set {Setting(f'adapter.{name}', str(own))}, or start from its base",
            )  # fmt: skip
    log.say(f"training on the adapter of {folder} ({before.config.kind})")
    before.base = base_of(folder)
    return attach_heads(scorer)


F = TypeVar("F")
FEW = 20  # held-out prompt groups; at 20 a 95% interval of an accuracy is up to 40 points wide


def say_left_out(report: Mapping[str, float], part: str, length: int, too_long: str) -> None:
    """What of a part is left out or cut, with the settings that change it."""
    cut = f", or set {Setting('too_long', 'left')}" if too_long == "drop" else ""
    fix = f"raise max_length ({length}), give shorter texts{cut}"
    dropped.say_left_out(report, fix=fix, part=part)


def show_first(segments: Segments, words: TokenizerFolder, records: Path, first_kept: int = 0) -> None:
    """What is taught by the first answer that is kept (segment `first_kept`), supervised tokens green (promise 1); and where
    texts are plain though the model has a chat template, that they are: a reward of such texts says little of a chat's."""
    ids, mask = segments.ids(first_kept), segments.mask(first_kept)
    log.console.print(coloured_sample(Rendered(ids, mask, "", ()), words))
    with (records / "train.jsonl").open(encoding="utf-8") as f:
        first = json.loads(f.readline())
    if first.get("style") == "completion" and words.template is not None:
        log.say(
            "these are plain texts, without the chat template that the model has; where it is asked in chats, give the rows as "
            "messages, or name their field question in place of prompt", style="yellow",
        )  # fmt: skip


def held_out(read: Callable[[], F]) -> F | None:
    """What `read` makes of the validation part; None where nothing of it can be read, which is said."""
    try:
        return read()
    except NothingLeft as error:
        numbers = "; ".join(text for text in (str(error.found), error.expected) if text)
        log.say(
            f"validation: nothing of it can be read, so nothing is measured on it ({numbers}); to measure: {error.fix}",
            style="yellow",
        )
        return None


def rates(config: Loop, parameters: int, at_7b: float, heads: bool = False) -> LearningRates:
    """The settings' rates; those left to derive from the model's size, said with their reason. `heads`: score heads are trained,
    too."""
    return said_rates(config, tuning_rates(config, at_7b, parameters, heads))


def steps_of(config: Tune, epochs: float, prompt_groups: int) -> int:
    """Steps of a run over so many prompt groups. Raises `ConfigError` for a batch larger than the data."""
    if config.batch > prompt_groups:
        raise ConfigError(
            "a batch is larger than the data",
            field="batch",
            found=config.batch,
            expected=f"at most {prompt_groups}",
            fix="lower batch",
        )
    steps = max(1, math.ceil(epochs * prompt_groups / config.batch)) if config.steps == "derived" else config.steps
    log.say(f"{steps:,} steps of {config.batch} of {prompt_groups:,}: {steps * config.batch / prompt_groups:.2f} epochs")
    return steps


def max_length(config: Tune, model: Any) -> int:
    """Raises `ConfigError` for more than the model's context."""
    most = max_text_tokens(model)
    if config.max_length == "derived":
        return min(most, 2048)
    if config.max_length > most:
        virtual = model.config.max_position_embeddings - most
        raise ConfigError(
            "longer than the model's context", field="max_length", found=config.max_length,
            expected=f"at most {most}{f', behind {virtual} virtual tokens' if virtual else ''}",
        )  # fmt: skip
    return config.max_length


def layout_for(config: Tune, model: Any) -> Any:
    """The layout asked for, or the nearest that the model knows."""
    if config.layout == "tree" and not model.traits.trees:
        log.say("layout: packed, since this model's prompts can't be read once for several answers")
        return "packed"
    steady = model.traits.cache_limit
    if steady is not None and config.layout != "rows" and max_length(config, model) > steady:
        log.say(f"layout: rows, since this model turns its angles by the longest text of a row (above {steady:,} tokens)")
        return "rows"
    return config.layout


def reference_logprobs(
    folder: Path, model: Any, prompt_groups: PromptGroups, config: Tune, layout: Any, device: torch.device
) -> np.ndarray:
    """Log-probabilities [groups, completions] under `model` as it is now. They are computed once and stored in `folder` part by
    part, so that an interrupted run continues where it stopped."""
    sizes = prompt_groups.sizes(layout).tolist()
    groups = bins(sizes, config.micro_tokens)[0]
    done = _Kept(folder, prompt_groups.digest, len(prompt_groups))
    model.eval()
    for number, group in enumerate(log.counted(groups, "log-probabilities of the reference")):
        if not done.has(group):
            with torch.inference_mode():
                found = answer_logprobs(model, collate([prompt_groups[i] for i in group], layout).to(device))
            done.put(group, found.float().cpu().numpy().reshape(len(group), -1), last=number == len(groups) - 1)
    return done.values


class _Kept:
    """Numbers by prompt group in a file that grows whole parts at a time."""

    EVERY = 20  # groups between writings

    def __init__(self, folder: Path, digest: str, count: int) -> None:
        self.folder, self.digest, self.pending = folder, digest, 0
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "about.json"
        self.values = np.full((count, 0), np.nan, np.float32)
        if about.is_file() and read_object(about).get("data") == digest and (folder / "logprobs.npy").is_file():
            try:
                self.values = np.load(folder / "logprobs.npy", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ArtifactError(
                    f"log-probabilities of an attempt before are damaged ({error})", file=folder / "logprobs.npy",
                    fix="remove the file, and run the same command again",
                ) from None  # fmt: skip
        else:
            write_json(about, {"data": digest})
            (folder / "logprobs.npy").unlink(missing_ok=True)

    def has(self, group: list[int]) -> bool:
        return self.values.shape[1] > 0 and not bool(np.isnan(self.values[group]).any())

    def put(self, group: list[int], found: np.ndarray, last: bool) -> None:
        if self.values.shape[1] != found.shape[1]:
            self.values = np.full((len(self.values), found.shape[1]), np.nan, np.float32)
        self.values[group] = found
        self.pending += 1
        if log.rank() == 0 and (last or self.pending >= self.EVERY):  # every rank has all of them
            with whole_file(self.folder / "logprobs.npy", "wb") as f:
                np.save(f, self.values, allow_pickle=False)
            self.pending = 0
