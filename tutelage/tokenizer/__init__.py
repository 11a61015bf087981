"""Tokenizers: `train` one, `load` any Hugging Face tokenizer folder, encode a corpus `fast`, `measure` one. No torch."""
