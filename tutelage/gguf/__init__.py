"""GGUF files, the format of llama.cpp, as model folders: metadata, tensors, tokenizer and chat template."""
