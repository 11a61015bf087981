"""Sections of stages that train for one task, on examples or on pairs of texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field as Bound

from tutelage.config.base import artifact, setting
from tutelage.config.train import Count, Derived, Positive, Schedule, Tune

TEXT_LENGTH = 256  # default length of a text to classify, in tokens: cost grows with it, and labels seldom depend on the end
SOURCE_LENGTH, TARGET_LENGTH = 512, 128  # default lengths of source and target, in tokens
SMALL_ENCODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
SMALL_T5 = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}


class Classify(Tune):
    """Train a classifier of texts or of their parts, and compare it with word counts."""

    data: str = artifact("Examples to train on.", kind="records")
    encoder: str | None = artifact(
        "Folder of an encoder (bert, roberta, modernbert, …) to start from.", kind="model", default=None
    )
    model: str | None = artifact("Decoder to start from; a text is judged at its last token.", kind="model", default=None)
    tokenizer: str | None = artifact("Tokenizer for a small encoder from scratch.", kind="tokenizer", default=None)
    architecture: dict[str, Any] = setting({}, "Keys of config.json that override the small shape of a new model.")
    schedule: Schedule = setting(Schedule(name="linear", warmup=0.1, final=0.0), "Learning-rate schedule.")
    batch: Count = setting(32, "Number of texts in a global batch.")
    epochs: Positive | Derived = setting(
        "derived", "Number of passes over the data, where steps are derived; derived: 3, more where those are few steps."
    )
    max_length: Count | Derived = setting("derived", "Longest text in tokens; derived: what the encoder reads, at most 256.")
    too_long: Literal["right", "left", "drop"] = setting(
        "right", "Treatment of a longer text: cut its right or left end, or drop it. Always counted."
    )
    layout: Literal["packed", "rows"] = setting(
        "packed",
        "Layout of a batch: packed texts one after another, or padded rows. Results are equal to rounding.",
        identity=False,
    )
    class_weights: Literal["none", "balanced"] | dict[str, Positive] = setting(
        "none",
        "Weight in the loss of a text or of a tagged word. balanced: every class counts the same; or weights by "
        "class, such as {COLOUR: 5}.",
    )
    label_smoothing: Annotated[float, Bound(ge=0.0, lt=1.0)] = setting(
        0.0, "Share of probability taken from the right class (0 to 1)."
    )
    folds: int = setting(0, "Number of folds of cross-validation over the training part; 0: none.", ge=0)
    baseline: bool = setting(True, "Train TF-IDF with logistic regression too, on the same texts (scikit-learn).")
    seed: int = setting(0, "Seed for new weights, dropout, data order and folds.")


class Translate(Tune):
    """Train an encoder-decoder for translation or summaries."""

    data: str = artifact("Conversations of one prompt and one completion: the source and the target.", kind="records")
    model: str | None = artifact("Encoder-decoder (t5, bart, marian, …) to start from.", kind="model", default=None)
    tokenizer: str | None = artifact("Tokenizer for a small T5 from scratch.", kind="tokenizer", default=None)
    architecture: dict[str, Any] = setting({}, "Keys of config.json that override the small shape of a new model.")
    batch: Count = setting(32, "Number of pairs in a global batch.")
    epochs: Positive | Derived = setting(
        "derived", "Number of passes over the data, where steps are derived; derived: 3, more where those are few steps."
    )
    max_length: Count | Derived = setting("derived", "Longest source in tokens; derived: what the model reads, at most 512.")
    max_target: Count | Derived = setting(
        "derived",
        "Longest target in tokens; pairs with a longer one are dropped and counted; derived: what the model writes, at most 128.",
    )
    too_long: Literal["right", "drop"] = setting("right", "Treatment of a longer source: cut its right end, or drop the pair.")
    layout: Literal["pairs"] = setting(  # type: ignore[assignment]
        "pairs", "Layout of a batch: rows of sources and rows of targets.", identity=False
    )
    max_questions: int = setting(200, "Largest number of held-out sources translated and compared at the end; 0: all.", ge=0)
    seed: int = setting(0, "Seed for new weights, dropout and data order.")
