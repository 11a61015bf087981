"""Sections of stages that train for one task, on examples or on pairs of texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field as Bound

from tutelage.config.base import artifact, setting
from tutelage.config.train import Count, Derived, Positive, Schedule, Tune

TEXT_LENGTH = 256  # tokens of a text to classify where nothing else is said: cost grows with it, labels seldom hang on the end
SOURCE_LENGTH, TARGET_LENGTH = 512, 128  # tokens of a source and a target where nothing else is said
SMALL_ENCODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
SMALL_T5 = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}


class Classify(Tune):
    """Train a classifier of texts, or of their parts, and measure it beside word counts."""

    data: str = artifact("examples", kind="records")
    encoder: str | None = artifact(
        "folder of an encoder (bert, roberta, modernbert, …) to start from", kind="model", default=None
    )
    model: str | None = artifact("a decoder to start from: a text is judged at its last token", kind="model", default=None)
    tokenizer: str | None = artifact("for a small encoder from scratch", kind="tokenizer", default=None)
    architecture: dict[str, Any] = setting({}, "from scratch: config.json keys that override the small shape")
    schedule: Schedule = setting(Schedule(name="linear", warmup=0.1, final=0.0), "learning rate over time")
    batch: Count = setting(32, "texts in a global batch")
    epochs: Positive | Derived = setting(
        "derived", "passes over the data, where steps are not given; derived: 3, more where those are few steps"
    )
    max_length: Count | Derived = setting("derived", "tokens of a text; derived: what the encoder reads, at most 256")
    too_long: Literal["right", "left", "drop"] = setting(
        "right", "a text that is longer: its right or left end is cut, or it is left out; always counted"
    )
    layout: Literal["packed", "rows"] = setting("packed", "texts one after another, or padded; equal to rounding", identity=False)
    class_weights: Literal["none", "balanced"] | dict[str, Positive] = setting(
        "none",
        "weight in the loss of a text, or of a tagged word; balanced: every class alike, of tags kinds and O; or {COLOUR: 5}",
    )
    label_smoothing: Annotated[float, Bound(ge=0.0, lt=1.0)] = setting(0.0, "share of certainty taken from the right class")
    folds: int = setting(0, "cross-validation of the training part: every text is judged by a model that did not see it", ge=0)
    baseline: bool = setting(True, "also TF-IDF and logistic regression, given the same texts (scikit-learn)")
    seed: int = setting(0, "of new weights, dropout, order and folds")


class Translate(Tune):
    """Train an encoder-decoder to make one text of another: translation, summaries."""

    data: str = artifact("conversations of one prompt and one completion: the source and the target", kind="records")
    model: str | None = artifact("an encoder-decoder (t5, bart, marian, …) to start from", kind="model", default=None)
    tokenizer: str | None = artifact("for a small T5 from scratch", kind="tokenizer", default=None)
    architecture: dict[str, Any] = setting({}, "from scratch: config.json keys that override the small shape")
    batch: Count = setting(32, "pairs in a global batch")
    epochs: Positive | Derived = setting(
        "derived", "passes over the data, where steps are not given; derived: 3, more where those are few steps"
    )
    max_length: Count | Derived = setting("derived", "tokens of a source; derived: what the model reads, at most 512")
    max_target: Count | Derived = setting(
        "derived",
        "tokens of a target; pairs with a longer one are left out, and counted; derived: what the model writes, at most 128",
    )
    too_long: Literal["right", "drop"] = setting("right", "a source that is longer: its end is cut, or the pair is left out")
    layout: Literal["pairs"] = setting(  # type: ignore[assignment]
        "pairs", "a pair is a row of sources and a row of targets", identity=False
    )
    max_questions: int = setting(200, "held-out sources that are translated and compared at the end; 0: all", ge=0)
    seed: int = setting(0, "of new weights, dropout and order")
