"""A tiny model and a tokenizer trained on the spot, for the tests of engine and server."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tutelage.chat.render import Renderer
from tutelage.engine import Engine
from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.export import save
from tutelage.models.init import build
from tutelage.tokenizer.train import train

TEXTS = ["the cat sat on the mat, and the dog sat by the door", "naïve café — 日本語 ünïcode 🙂🙃", "one two three four five"] * 4


def config(vocab_size: int, context: int = 128, head: int = 16) -> DecoderConfig:
    """`head` 16 runs on our fused kernels where there is a compiler; 8 is too narrow for them."""
    return tiny.config(
        vocab_size=vocab_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        tie_word_embeddings=False,
        max_position_embeddings=context,
        initializer_range=0.3,
    )


def model(vocab_size: int, context: int = 128, seed: int = 0, head: int = 16) -> Decoder:
    return build(config(vocab_size, context, head), seed).eval()


def renderer(folder: Path) -> Renderer:
    train(TEXTS, vocab_size=320, out=folder)
    return Renderer(folder)


def engine(folder: Path, context: int, slots: int) -> Engine:
    """An engine with its tokenizer, which is trained into `folder`."""
    made = renderer(folder)
    return Engine(model(made.tokenizer.vocab_size, context), made, slots=slots)


def saved(base: Path, name: str, context: int, head: int = 16) -> Path:
    """A model folder `base/name`."""
    made = renderer(base / "tokenizer")
    save(model(made.tokenizer.vocab_size, context, head=head), base / name, base / "tokenizer", stop_ids=made.stop_ids)
    return base / name
