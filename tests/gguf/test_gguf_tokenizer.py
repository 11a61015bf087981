"""Tokenizers out of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import byte_tokens, tiny

from tutelage.errors import ArtifactError
from tutelage.models.export import read_stop_ids
from tutelage.tokenizer.load import TokenizerFolder


def test_byte_level(tmp_path: Path) -> None:
    """Guards merges, control tokens, and that the words of a document never become one."""
    words = TokenizerFolder.open(tiny(tmp_path / "m.gguf"))
    merged = words.tokenizer.token_to_id("abc")
    assert words.encode_text("abcab") == [merged, words.tokenizer.token_to_id("ab")]
    assert words.tokenizer.encode("abc<|im_end|>").ids == [merged, 1]
    assert len(words.encode_text("<|im_end|>")) == 10 and words.decode(words.encode_text("é<|im_end|>\n")) == "é<|im_end|>\n"
    assert (words.bos_id, words.eos_id, words.adds_bos, words.stop_ids) == (0, 1, False, (0, 1))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ1234", "ĊĠĠ", "Ġx", "'s"]),
        ("smollm", ["Ġ", "1", "2", "3", "4", "ĊĠĠ", "Ġx", "'s"]),
        ("llama-bpe", ["Ġ", "123", "4", "Ċ", "ĠĠ", "Ġx", "'s"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "Ċ", "ĠĠ", "Ġx", "'s"]),
        ("default", ["Ġ", "123", "4", "ĊĠĠ", "Ġx", "'", "s"]),
    ],
)
def test_words_are_cut_as_the_file_says(pre: str, pieces: list[str], tmp_path: Path) -> None:
    """Guards digits and white space: the wrong expression gives other tokens than the model was trained on."""
    words = TokenizerFolder.open(tiny(tmp_path / "m.gguf", tokenizer__ggml__pre=pre))
    assert [text for text, _ in words.tokenizer.pre_tokenizer.pre_tokenize_str(" 1234\n   x's")] == pieces  # type: ignore[union-attr]


def test_whole_words_are_tokens_where_llama_3_says_so(tmp_path: Path) -> None:
    """Guards `ignore_merges`: a word that is a token is it, though no merge makes it."""
    tokens = byte_tokens()
    tokens["tokenizer.ggml.tokens"].append("xyz")
    tokens["tokenizer.ggml.token_type"].append(1)
    found = {}
    for pre in ("llama-bpe", "qwen2"):
        words = TokenizerFolder.open(tiny(tmp_path / f"{pre}.gguf", tokens, tokenizer__ggml__pre=pre))
        found[pre] = (len(words.encode_text("xyz")), words.adds_bos)
    assert found == {"llama-bpe": (1, True), "qwen2": (3, False)}


def _sentencepiece(**changed: Any) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "ab", "▁ab", "▁", "a", "b", "\n\n"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1, 1, 4]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores, **{k.replace("__", "."): v for k, v in changed.items()},
    }  # fmt: skip


def test_sentencepiece(tmp_path: Path) -> None:
    """Guards scores as merges, bytes of unknown characters, the space before a text, and BOS, which is added unless told."""
    words = TokenizerFolder.open(tiny(tmp_path / "m.gguf", _sentencepiece()))
    assert words.tokenizer.encode("ab ab", add_special_tokens=False).tokens == ["▁ab", "▁ab"]
    assert words.tokenizer.encode("é\n\nb", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>", "\n\n", "▁", "b"]
    assert words.tokenizer.encode("b").ids[0] == 1 and words.adds_bos
    assert words.decode(words.encode_text("ab é")) == "ab é"
    bare = _sentencepiece(tokenizer__ggml__add_space_prefix=False, tokenizer__ggml__add_bos_token=False)
    words = TokenizerFolder.open(tiny(tmp_path / "bare.gguf", bare))
    assert words.tokenizer.encode("ab ab").tokens == ["ab", "▁ab"] and not words.adds_bos


def test_tokens_that_end_a_turn(tmp_path: Path) -> None:
    """Guards generation that never stops, and content that ends a turn where a converter called its token an ordinary one."""
    tokens = byte_tokens()
    tokens["tokenizer.ggml.tokens"] += ["<|eot_id|>", "<custom>"]
    tokens["tokenizer.ggml.token_type"] += [4, 1]
    number = len(tokens["tokenizer.ggml.tokens"])
    words = TokenizerFolder.open(tiny(tmp_path / "m.gguf", tokens, tokenizer__ggml__eot_token_id=number - 1))
    assert set(words.stop_ids) == {0, 1, number - 2, number - 1} <= words.control_ids
    assert number - 2 not in words.encode_text("<|eot_id|>")
    assert read_stop_ids(words.folder)[0] == 1


def test_template_and_default_kinds(tmp_path: Path) -> None:
    """Guards the chat template, and files from before kinds of tokens were written."""
    tokens = {k: v for k, v in byte_tokens().items() if not k.endswith("token_type")}
    words = TokenizerFolder.open(tiny(tmp_path / "m.gguf", tokens, tokenizer__chat_template="{{ messages[0]['content'] }}"))
    assert words.template == "{{ messages[0]['content'] }}" and words.control_ids == {0, 1}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokenizer__ggml__pre": "klingon"}, "klingon"),
        ({"tokenizer__ggml__model": "bert"}, "bert"),
        ({"tokenizer__ggml__tokens": []}, "no tokens"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "another length"),
        ({"tokenizer__ggml__merges": []}, "no merges"),
        ({"tokenizer__ggml__merges": ["a zz"]}, "merge of what are no tokens"),
        ({"tokenizer__ggml__eos_token_id": 999999}, "no such token"),
        ({"tokenizer__ggml__scores": [1, 2]}, None),
    ],
)
def test_what_is_no_tokenizer_is_an_error(changed: dict[str, Any], named: str | None, tmp_path: Path) -> None:
    """Guards against ids that are those of another vocabulary."""
    file = tiny(tmp_path / "m.gguf", **changed)
    if named is None:  # byte-level tokenizers have no use for scores
        TokenizerFolder.open(file)
        return
    with pytest.raises(ArtifactError, match=named):
        TokenizerFolder.open(file)
