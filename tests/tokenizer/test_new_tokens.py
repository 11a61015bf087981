"""More tokens for a tokenizer that a checkpoint was trained with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tutelage.errors import ArtifactError, ConfigError
from tutelage.tokenizer.extend import Extension, extend
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.merges import learn
from tutelage.tokenizer.train import PATTERNS, train

GENERAL = ["The quick brown fox jumps over the lazy dog. It's 12 o'clock.\n", "def join(path, *paths):\n    return path\n"] * 8
FIELD = [
    "Thrombocytopenia and neutropenia: 40 mg of dexamethasone, intravenously.",
    "Über Ödeme, naïve; <|user|> <|end|> 漢字",
] * 5
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerFolder, TokenizerFolder, Extension]:
    """A tokenizer, its extension, and what was added."""
    folder = tmp_path_factory.mktemp("extended")
    train(GENERAL, vocab_size=320, out=folder / "old")
    found = extend(folder / "old", iter(FIELD), 40, folder / "new")
    return TokenizerFolder.open(folder / "old"), TokenizerFolder.open(folder / "new"), found


Made = tuple[TokenizerFolder, TokenizerFolder, Extension]


@QUICK
@given(text=st.one_of(TEXT, st.lists(st.sampled_from([*FIELD, *GENERAL]), max_size=3).map("".join)))
def test_new_ids_are_old_ids_with_pieces_joined(made: Made, text: str) -> None:
    """A merge that comes before an old one, or a second way to an old token: texts would read otherwise than in pretraining."""
    old, new, found = made
    ids = new.encode_text(text)
    assert found.old_ids(ids) == old.encode_text(text)
    assert new.decode(ids) == text == new.decode(old.encode_text(text))
    assert new.encoder().fast and new.encoder().encode_batch([text])[0].tolist() == ids


def test_texts_of_the_field_are_shorter_and_nothing_else_moves(made: Made) -> None:
    """Tokens that nothing uses; control tokens with new ids; a chat template that is lost."""
    old, new, found = made
    assert (found.first, found.stop, new.vocab_size) == (old.vocab_size, old.vocab_size + 40, old.vocab_size + 40)
    assert sum(map(len, new.encode_batch(FIELD))) < 0.7 * sum(map(len, old.encode_batch(FIELD)))
    assert all(len(p) > 1 and all(i < found.first for i in p) for p in found.pieces)
    assert all(old.decode(p) == text for p, text in zip(found.pieces, found.texts, strict=True))
    before, after = (t.tokenizer.get_vocab(with_added_tokens=True) for t in (old, new))
    assert before.items() <= after.items()
    for name in ("special_tokens", "template", "history", "stop_ids", "control_ids", "pattern", "start_id", "pad_id"):
        assert getattr(old, name) == getattr(new, name), name
    assert new.control_ids.isdisjoint(new.encode_text("<|user|> <|end|> " + FIELD[1]))
    assert int(new.token_bytes()[new.encode_text(FIELD[0])].sum()) == len(FIELD[0].encode())


def test_transformers_loads_it_equal(made: Made) -> None:
    """A folder that only we read: other ids, template or number of tokens in `transformers`."""
    from transformers import AutoTokenizer

    _, new, _ = made
    theirs = AutoTokenizer.from_pretrained(new.folder)
    for text in (*FIELD[:1], *GENERAL[:2]):
        assert theirs(text, add_special_tokens=False).input_ids == new.encode_text(text)
    assert len(theirs) == new.vocab_size and theirs.chat_template == new.template and theirs.eos_token_id == new.eos_id


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_control_tokens_outside_the_vocabulary_keep_their_ids(tmp_path: Path, kind: str) -> None:
    """Qwen's folders: control tokens come behind the vocabulary, one of them listed in tokenizer_config.json alone. The library
    numbers those by the vocabulary's size, so with more merges each of them would get the id of a new token."""
    from transformers import AutoTokenizer

    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(GENERAL, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    (tmp_path / "old").mkdir()
    inner.save(str(tmp_path / "old" / "tokenizer.json"))
    rows = {
        str(i): {"content": t, "special": True} for i, t in ((300, "<|endoftext|>"), (301, "<|im_start|>"), (302, "<|late|>"))
    }
    config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": rows, "tokenizer_class": kind}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config))
    old = TokenizerFolder.open(tmp_path / "old")
    found = extend(old.folder, FIELD, 20, tmp_path / "new")
    new = TokenizerFolder.open(tmp_path / "new")
    assert old.tokenizer.token_to_id("<|late|>") == 302 and found.first == 303 and new.vocab_size == 323
    for token in ("<|endoftext|>", "<|im_start|>", "<|late|>"):
        assert new.tokenizer.token_to_id(token) == old.tokenizer.token_to_id(token)
    text = FIELD[0] + GENERAL[0] + " e\u0301"
    assert found.old_ids(new.encode_text(text)) == old.encode_text(text) != new.encode_text(text)
    theirs = AutoTokenizer.from_pretrained(new.folder)
    assert theirs(text, add_special_tokens=False).input_ids == new.encode_text(text)
    assert theirs.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|late|>"]) == [300, 301, 302]


def test_merges_are_those_of_a_count_by_hand() -> None:
    """Another pair than the one that occurs most; a word counted once however often it comes; chance in ties."""
    names = {0: "a", 1: "b", 2: "c", 3: "bc"}
    words = Counter({(0, 1, 2): 5, (0, 1): 2, (1, 2): 9, (2, 0): 3, (0, 0, 0): 2, (2, 2): 1})
    # bc is a token already; ab occurs 7 times, then abc 5, aa twice in a word that comes twice, ca 3 times; cc once alone
    assert learn(words, names, 9) == [(0, 1), (4, 2), (0, 0), (2, 0), (6, 0)]
    assert learn(words, names, 2) == [(0, 1), (4, 2)]


def test_words_are_counted_alike_with_and_without_the_cache(made: Made) -> None:
    """The fast way cutting words otherwise than the library, whose own words are what merges stay inside of."""
    encoder = made[1].encoder()
    texts = [*FIELD, *GENERAL, "a\U00050000b", ""]
    fast = encoder.count_words(texts)
    encoder.fast = False
    assert encoder.count_words(texts) == fast and sum(n * len(w) for w, n in fast.items()) == sum(
        map(len, made[1].encode_batch(texts))
    )


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    """SentencePiece taken for byte-level BPE: its pieces are text with marks for spaces, and merges of bytes would be noise."""
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    (tmp_path / "unigram").mkdir()
    inner.save(str(tmp_path / "unigram" / "tokenizer.json"))
    with pytest.raises(
        ArtifactError, match=r"byte-level BPE alone(.|\n)*vocab_add(.|\n)*Unigram, cut by Metaspace(.|\n)*vocab_add=0"
    ):
        extend(tmp_path / "unigram", FIELD, 4, tmp_path / "new")
    train(GENERAL, vocab_size=300, out=tmp_path / "old")
    with pytest.raises(ConfigError, match="no new tokens"):
        extend(tmp_path / "old", ["a b c"], 4, tmp_path / "new")
    assert not (tmp_path / "new").exists()
