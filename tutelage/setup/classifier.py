"""What stage `classify` is made of: a tokenizer that marks texts, a model to start from, and one training of it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors

from tutelage import log
from tutelage.config.tasks import SMALL_ENCODER, TEXT_LENGTH, Classify
from tutelage.config.train import Tune
from tutelage.data.groups import dropped
from tutelage.data.groups.examples import ExampleGroups, Labels, TextEncoder
from tutelage.data.groups.source import GroupSource
from tutelage.errors import ArtifactError, ConfigError, Setting
from tutelage.files import read_json, whole_folder, write_json
from tutelage.inference.classifier import longest, separator
from tutelage.models.hf.encoder import POSITIONS, PROBLEM, ClassScorer, load_classifier, new_classifier
from tutelage.models.open import load
from tutelage.models.scorer import Scorer, build_scorer
from tutelage.objectives import objective
from tutelage.records import Example
from tutelage.rundir import RunDir
from tutelage.setup.answers import size_of, wear_under_head
from tutelage.setup.hyperparameters import ADAPTER_RATES, HEADS_APART, RATES, passes, said_rates
from tutelage.setup.trainer import TrainingSpec, run_training, write_scores
from tutelage.tokenizer.load import FILES, TokenizerFolder
from tutelage.train import distributed
from tutelage.train.optim import LearningRates

TUNE_RATE, TUNE_AT = 5e-5, 110e6  # for BERT base, Devlin et al. 2019; smaller encoders take more, by the square root
NEW_RATE = 1e-3  # of a small encoder from scratch
ATTENTION_COPIES = 3.25  # measured: 983 MB more with dropout, at 302 MB of attention of MiniLM's six layers


@dataclass(slots=True, kw_only=True)
class Start:
    """What every classifier of a run begins with."""

    config: Classify
    run: RunDir
    labels: Labels
    tokenizer: Path
    words: TokenizerFolder
    max_length: int
    device: torch.device

    @classmethod
    def of(cls, config: Classify, run: RunDir, labels: Labels, device: torch.device) -> Start:
        """Raises `ConfigError` for what the labels or the model do not allow."""
        given = [name for name in ("encoder", "model", "tokenizer") if getattr(config, name)]
        if config.model and labels.task == "tag":
            raise ConfigError("a decoder does not see what comes after a word", field="model", expected="`encoder`, to tag words")
        folder = marked(run) if config.tokenizer else run.input(given[0])
        start = cls(config=config, run=run, labels=labels, tokenizer=folder, words=TokenizerFolder.open(folder),
                    max_length=TEXT_LENGTH if config.max_length == "derived" else config.max_length, device=device)  # fmt: skip
        most = longest(start.words, start.build())
        if config.max_length != "derived" and start.max_length > most:
            raise ConfigError(
                "longer than the model reads", field="max_length", found=start.max_length, expected=f"{most} or less"
            )
        start.max_length = min(start.max_length, most)
        return start

    def build(self) -> ClassScorer | Scorer:
        """The model before its first step: the same one for the same seed."""
        torch.manual_seed(self.config.seed)
        task: Any = "token" if self.labels.task == "tag" else "class"
        names, many = self.labels.names, self.labels.task == "many"
        if self.config.model:
            return self._wearing(build_scorer(load(self.tokenizer), names, self.config.seed, PROBLEM[many]))
        how: dict[str, Any] = {"many": many, "sep_id": separator(self.words)}
        if self.config.encoder:
            return self._wearing(load_classifier(self.tokenizer, task, names, **how)[0])
        base = {**SMALL_ENCODER, "vocab_size": self.words.vocab_size, POSITIONS: self.max_length,
                "pad_token_id": self.words.pad_id or 0}  # fmt: skip
        return new_classifier(self.config.architecture, task, names, base=base, **how)

    def _wearing(self, part: Any) -> Any:
        return wear_under_head(part, self.config, self.tokenizer, self.config.seed)

    def prompt_groups(self, examples: Sequence[Example]) -> ExampleGroups:
        if self.config.model and any(e.pair is not None for e in examples):
            raise ConfigError("a decoder has no mark between the texts of a pair", field="model", expected="`encoder`, for pairs")
        return ExampleGroups(examples, self._encoder(), self.labels)

    def short_enough(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that are not left out because they are too long."""
        encode = self._encoder()
        return [e for e in examples if self.config.too_long != "drop" or encode(e.text, e.pair) is not None]

    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.words, self.max_length, self.config.too_long)


def marked(run: RunDir, begins: bool = True) -> Path:
    """A copy of a tokenizer under which a text ends with a control token, and begins with one where `begins`, as encoders have
    it. Of several ranks the first one makes it."""
    source = run.input("tokenizer")
    words = TokenizerFolder.open(source)
    if begins and words.special_tokens.get("cls_token") and words.special_tokens.get("sep_token"):
        return source
    end = words.special_tokens.get("eos_token")
    if end is None:
        raise ArtifactError(
            "this tokenizer has no end token to mark a text with", file=source, expected="eos_token, or cls_token and sep_token"
        )
    while log.rank() != 0 and not run.folder("marked").is_dir():
        time.sleep(0.1)  # no process group is open yet
    if run.folder("marked").is_dir():
        return run.folder("marked")
    first = words.special_tokens.get("bos_token", end)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    front = f"{first} " if begins else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{front}$A {end}", pair=f"{front}$A {end} $B:1 {end}:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in dict.fromkeys((first, end))],
    )  # fmt: skip
    marks = {
        **({"cls_token": first, "sep_token": end} if begins else {}),
        "pad_token": words.special_tokens.get("pad_token", end),
    }
    with whole_folder(run.folder("marked")) as out:
        for name in FILES:
            if name not in ("tokenizer.json", "chat_template.jinja") and (source / name).exists():
                shutil.copyfile(source / name, out / name)
        tokenizer.save(str(out / "tokenizer.json"))
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            before = read_json(out / name) if (out / name).exists() else {}
            before.pop("chat_template", None)
            write_json(out / name, {**before, **marks})
    return run.folder("marked")


def train(
    start: Start, run: RunDir, train: Sequence[Example], held: Sequence[Example], *, keep: bool
) -> tuple[Any, dict[str, Any]]:
    """One training in the folder of `run`: the trained part, and its facts. `keep`: it is written, too."""
    config, part = start.config, start.build()
    prompt_groups = start.prompt_groups(train)
    say_report(prompt_groups)
    batch = min(config.batch, len(prompt_groups))
    unit = "examples"
    source = GroupSource(
        prompt_groups, per_step=batch, micro_tokens=config.micro_tokens, layout=config.layout, seed=config.seed, rank=log.rank(),
        world=distributed.world(), unit=unit,
    )  # fmt: skip
    for line in source.describe():
        log.say(line)
    held_out = start.prompt_groups(held) if held else None
    epochs = passes(config, len(prompt_groups))
    steps = config.steps if config.steps != "derived" else max(1, math.ceil(epochs * len(prompt_groups) / batch))
    if config.steps == config.epochs == "derived":
        log.say(f"{steps:,} steps: {epochs:.3g} passes over {len(prompt_groups):,} {unit}")
    peak = rates_of(config, part)
    tokens = int(prompt_groups.sizes(config.layout).sum())
    name = "token" if start.labels.task == "tag" else "class"
    micro = max(1, config.micro_tokens // start.max_length), start.max_length
    work = TrainingSpec(
        parts={name: part},
        source=source,
        objective=objective("tag" if name == "token" else "classify", label_smoothing=config.label_smoothing),
        steps=steps,
        rates=peak,
        shape=shape(part, len(start.labels.names)),
        length=max(1, tokens // len(prompt_groups)),
        micro=micro,
        beside=attention_bytes(part, *micro),
        tokens=steps * batch * tokens / len(prompt_groups),
        numbers={"batch": batch, "max_length": start.max_length, "lr": peak.lr, "classes": start.labels.names},
        write=lambda: write_scores(part, run, start.tokenizer, start.words.stop_ids) if keep else None,
        validation=None
        if held_out is None
        else GroupSource(
            held_out, per_step=1, micro_tokens=config.micro_tokens, layout=config.layout, seed=0, unit=unit
        ).validation(),
    )
    torch.manual_seed(config.seed)  # of dropout
    facts = run_training(config, run, work, start.device)
    return part, facts | {"left_out": dict(prompt_groups.report)}


def attention_bytes(part: ClassScorer | Scorer, rows: int, length: int) -> dict[str, int]:
    """What an encoder's layers keep of their attention, for the plan: with dropout `transformers` has all of it in memory, by the
    square of a text's length."""
    if isinstance(part, Scorer):
        return {}
    names = ("attention_probs_dropout_prob", "attention_dropout")
    if not any(getattr(part.hf.config, name, 0.0) for name in names):
        return {}
    c = part.config
    return {"attention": round(ATTENTION_COPIES * 4 * c.num_hidden_layers * c.num_attention_heads * rows * length**2)}


def say_report(prompt_groups: ExampleGroups) -> None:
    """Nothing is cut or left out silently."""
    dropped.say_left_out(prompt_groups.report, fix=f"raise max_length, set {Setting('too_long', 'right')}, or give shorter texts")


def rates_of(config: Classify, part: torch.nn.Module) -> LearningRates:
    """Peak learning rates, those left to derive with their reason."""
    if config.tokenizer is not None:
        return rates(config, NEW_RATE, "a small encoder from scratch")
    own = scaled(config.adapter.kind, part, TUNE_RATE, TUNE_AT)
    if config.adapter.kind not in HEADS_APART:
        return rates(config, *own)
    heads = scaled("none", part, TUNE_RATE, TUNE_AT)
    return said_rates(config, {"lr": own, "matrix_lr": heads, "embedding_lr": heads})


def scaled(kind: str, model: torch.nn.Module, rate: float, at: float) -> tuple[float, str]:
    """The learning rate of a trained model or of its adapter of a `kind`, from one that is good for all weights of `at`
    parameters, and the reason."""
    factor, power = ADAPTER_RATES.get(kind, (1.0, 0.5))
    size = size_of(model)
    times = "" if factor == 1 else f" x {factor:g}, for adapters of kind {kind},"
    grows = f" x ({at / 1e6:g}M / {size / 1e6:.3g}M parameters)^{power:g}" if power else ""
    return round(rate * factor * (at / size) ** power, 8), f"{rate:g}{times}{grows}"


def rates(config: Tune, rate: float, reason: str) -> LearningRates:
    """The settings' rates; those left to derive are `rate`, which is said with its reason."""
    return said_rates(config, dict.fromkeys(RATES, (rate, reason)))


def shape(part: Any, outputs: int) -> dict[str, Any]:
    """The numbers that operations and memory are counted from, under the names of any family; `outputs` of the head."""
    c = part.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "max_position_embeddings")  # fmt: skip
    of = {"model_type": c.model_type, "architectures": ["ForClassification"], "id2label": dict.fromkeys(range(outputs), "")}
    found = {**of, "tie_word_embeddings": True, **{n: getattr(c, n) for n in names}}
    return found if outputs != c.vocab_size else {k: v for k, v in found.items() if k not in of or k == "model_type"}
