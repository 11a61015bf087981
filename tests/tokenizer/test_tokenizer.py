"""Training, loading, fast encoding and measuring of tokenizers."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tutelage.chat.templates import styles
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.measure import describe, measure
from tutelage.tokenizer.train import PATTERNS, train

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, they'll say; we've 345 reasons.\n",
    "def join(path, *paths):\n    return '/'.join([path, *paths])\n\n\nclass A:\n\tx = 1\n",
    "Überraschung! Der Fuchs springt über 678 Zäune… 漢字とかな. naïve café — “quoted” 😀\r\n",
    "What does `os.path.join` do? It joins path components. What does `len` do? It returns the length.\n",
] * 8
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
SPELT = [
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "'s",
    "'LL",
    "  ",
    "\n\n",
    "\r\n",
    " \n ",
    "٣",
    "½",
    "ſ",
    "K",
    "e\u0301",
    "\U0010ffff",
    "𐍈",
    "\x00",
]
NASTY = st.lists(st.one_of(TEXT, st.sampled_from(SPELT)), max_size=8).map("".join)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenizerFolder]:
    made: dict[tuple[str, str], TokenizerFolder] = {}

    def one(template: str = "default", pattern: str = "qwen2") -> TokenizerFolder:
        key = template, pattern
        if key not in made:
            folder = tmp_path_factory.mktemp("tokenizers") / f"{template}-{pattern}"
            train(CORPUS, vocab_size=420, template=template, pattern=pattern, out=folder)
            made[key] = TokenizerFolder.open(folder)
        return made[key]

    return one


@QUICK
@given(text=NASTY)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_string_comes_back(make: Callable[..., TokenizerFolder], pattern: str, text: str) -> None:
    """Guards against a missing byte, a normaliser or a clean-up that changes text on its way through."""
    tokenizer = make(pattern=pattern)
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


@QUICK
@given(texts=st.lists(NASTY, max_size=4))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fast_encoder_has_equal_ids(make: Callable[..., TokenizerFolder], pattern: str, texts: list[str]) -> None:
    """Guards against a word cut differently by `re` than by the engine of `tokenizers`: silent other ids in a corpus."""
    encoder = _encoder(make(pattern=pattern))
    assert encoder.fast
    assert [i.tolist() for i in encoder.encode_batch(texts)] == make(pattern=pattern).encode_batch(texts)
    flat, lengths = encoder.encode_joined(texts)
    assert flat.tolist() == [i for ids in make(pattern=pattern).encode_batch(texts) for i in ids] and len(lengths) == len(texts)


_ENCODERS: dict[int, object] = {}


def _encoder(tokenizer: TokenizerFolder):  # type: ignore[no-untyped-def]
    return _ENCODERS.setdefault(id(tokenizer), tokenizer.encoder())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fast_encoder_on_every_character(make: Callable[..., TokenizerFolder], pattern: str) -> None:
    """Guards against two engines with tables of different Unicode versions: characters between letters, digits and spaces."""
    characters = [c for c in map(chr, range(0x110000)) if not 0xD800 <= ord(c) < 0xE000]
    characters = [c for i, c in enumerate(characters) if ord(c) < 0x3100 or i % 61 == 0]
    texts = ["".join(f"a{c}b 1{c} .{c}  {c}" for c in characters[i : i + 64]) for i in range(0, len(characters), 64)]
    assert [i.tolist() for i in _encoder(make(pattern=pattern)).encode_batch(texts)] == make(pattern=pattern).encode_batch(texts)


def test_fast_encoder_on_real_text(make: Callable[..., TokenizerFolder], shared_data: Path) -> None:
    """Guards the fast path where it is used: real documents, with the cache filled by earlier ones."""
    texts = (shared_data / "web" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")[:400]
    tokenizer = make()
    assert [i.tolist() for i in tokenizer.encoder().encode_batch(texts)] == tokenizer.encode_batch(texts)


def test_cache_that_is_full_starts_again(make: Callable[..., TokenizerFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against words lost when the cache is emptied in the middle of a corpus."""
    monkeypatch.setattr("tutelage.tokenizer.fast.CACHED_WORDS", 50)
    tokenizer, encoder, rng = make(), make().encoder(), random.Random(0)
    for _ in range(5):
        texts = [" ".join(rng.choices(["fox", "dog", "x" * rng.randint(1, 30), str(rng.random())], k=20)) for _ in range(5)]
        assert [i.tolist() for i in encoder.encode_batch(texts)] == tokenizer.encode_batch(texts)


def _save(folder: Path, tokenizer: Tokenizer, **config: object) -> TokenizerFolder:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerFolder.open(folder)


def _foreign(make: Callable[..., TokenizerFolder]) -> Tokenizer:
    return Tokenizer.from_str(make().tokenizer.to_str())


def test_other_tokenizers_fall_back(make: Callable[..., TokenizerFolder], tmp_path: Path) -> None:
    """Guards against the word cache being used where words are not independent of their text."""
    lower = _foreign(make)
    lower.normalizer = normalizers.Lowercase()
    spaced = _foreign(make)
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    odd = _foreign(make)
    split = pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated")  # leaves what is between the words
    odd.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    for i, kind in enumerate((lower, spaced, odd)):
        tokenizer = _save(tmp_path / str(i), kind, eos_token="<|endoftext|>")
        encoder = tokenizer.encoder()
        assert not encoder.fast
        assert [x.tolist() for x in encoder.encode_batch(CORPUS[:4])] == tokenizer.encode_batch(CORPUS[:4])


@pytest.mark.parametrize("digits", [r"\p{N}{1,3}+", r"\p{N}{2}?", r"\p{N}{1,}+"])
def test_intervals_that_two_engines_read_differently_fall_back(
    make: Callable[..., TokenizerFolder], tmp_path: Path, digits: str
) -> None:
    """GPT-4's `{1,3}+` is possessive in `re` and "again and again" in `tokenizers`: a corpus with other ids than those served."""
    kind = _foreign(make)
    pattern = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    kind.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = _save(tmp_path / "t", kind, eos_token="<|endoftext|>")
    encoder = tokenizer.encoder()
    texts = ["year 20262027", "12345678 1 22 333 4444", "a1b22c333d4444"]
    assert not encoder.fast and [x.tolist() for x in encoder.encode_batch(texts)] == tokenizer.encode_batch(texts)


def test_ordinary_added_tokens_in_the_fast_encoder(make: Callable[..., TokenizerFolder], tmp_path: Path) -> None:
    """Guards against Qwen's `<think>` (an added token that is no control token) being cut into letters by the word cache."""
    inner = _foreign(make)
    inner.add_tokens(["<think>"])
    tokenizer = _save(tmp_path, inner, eos_token="<|endoftext|>")
    encoder, texts = tokenizer.encoder(), ["a <think>b", "no tag", "<think>", "<|end|>"]
    assert encoder.fast and [i.tolist() for i in encoder.encode_batch(texts)] == tokenizer.encode_batch(texts)
    assert tokenizer.tokenizer.token_to_id("<think>") in encoder.encode_batch(texts)[0]


@pytest.mark.parametrize("template", styles())
def test_transformers_loads_it_equal(make: Callable[..., TokenizerFolder], template: str) -> None:
    """Guards promise "a folder is a Hugging Face folder": equal ids, named tokens and template in `transformers`."""
    from transformers import AutoTokenizer

    tokenizer = make(template)
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    for text in CORPUS[:4]:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_text(text)
        assert theirs(text).input_ids == tokenizer.document_prefix + tokenizer.encode_text(text)
        assert theirs.decode(tokenizer.encode_text(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert theirs.chat_template == tokenizer.template and len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("template", styles())
def test_content_never_becomes_control(make: Callable[..., TokenizerFolder], template: str) -> None:
    """Guards against injection: a document that spells `<|im_end|>` must not contain that token."""
    tokenizer = make(template)
    text = " and ".join(tokenizer.control_tokens)
    for ids in (
        tokenizer.encode_text(text),
        tokenizer.encode_batch([text])[0],
        tokenizer.encoder().encode_batch([text])[0].tolist(),
    ):
        assert tokenizer.control_ids.isdisjoint(ids) and tokenizer.decode(ids) == text


def test_unmarked_end_token_is_control(make: Callable[..., TokenizerFolder], tmp_path: Path) -> None:
    """Guards against a folder whose end token is an added token not marked special: `encode_special_tokens` lets it through."""
    inner = _foreign(make)
    inner.add_tokens(["<stop>"])
    tokenizer = _save(tmp_path, inner, eos_token="<stop>")
    assert tokenizer.eos_id in tokenizer.control_ids
    assert (
        tokenizer.eos_id not in tokenizer.encode_text("go <stop>")
        and tokenizer.decode(tokenizer.encode_text("go <stop>")) == "go <stop>"
    )


def test_training_is_deterministic(tmp_path: Path) -> None:
    """Guards cached runs: the same texts must give the same files, or every later digest changes."""
    for name in "ab":
        train(iter(CORPUS), vocab_size=400, out=tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert files == ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "tutelage.json"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert TokenizerFolder.open(tmp_path / "a").digest == TokenizerFolder.open(tmp_path / "b").digest


def test_a_long_text_lets_other_threads_run(make: Callable[..., TokenizerFolder]) -> None:
    """A server that stands still while one client's megabytes are tokenized: the interpreter's lock was kept all that time."""
    tokenizer, over, ticks = make(), threading.Event(), 0
    tokenizer.encode_text("made ready")

    def tick() -> None:
        nonlocal ticks
        while not over.wait(0.001):
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    before = ticks
    ids = tokenizer.encode_text("the quick brown fox " * 50_000)
    seen = ticks - before
    over.set()
    other.join()
    assert len(ids) > 100_000 and seen > 10


def test_digest_sees_the_template(make: Callable[..., TokenizerFolder]) -> None:
    """Guards the cache of token shards: another template is another tokenizer."""
    assert make("default").digest != make("chatml").digest


def test_stop_tokens(make: Callable[..., TokenizerFolder], tmp_path: Path) -> None:
    """Guards "never stops": both the end of a turn and of a document stop it; others say so in generation_config.json."""
    tokenizer = make("chatml")
    names = [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.stop_ids]
    assert sorted(names) == ["<|endoftext|>", "<|im_end|>"]
    other = _save(tmp_path, _foreign(make), eos_token="<|endoftext|>")
    assert other.stop_ids == (other.eos_id,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert TokenizerFolder.open(tmp_path).stop_ids == (0, 5)


def test_pickles_by_path(make: Callable[..., TokenizerFolder]) -> None:
    """Guards worker processes, which get the tokenizer by its folder."""
    again = pickle.loads(pickle.dumps(make()))
    assert again.encode_text("hello fox") == make().encode_text("hello fox")


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"vocab_size": 200}, "vocab_size", "at least 263"),
        ({"vocab_size": 400, "pattern": "gpt2"}, "pattern", "gpt-2"),
        ({"vocab_size": 400, "template": "chatlm"}, "template", "chatml"),
        ({"vocab_size": 400, "specials": [" "]}, "specials", "visible"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, options: dict[str, object], field: str, words: str) -> None:
    """Guards against a Rust panic or a vocabulary without every byte where a setting is wrong."""
    with pytest.raises(ConfigError) as caught:
        train(CORPUS, out=tmp_path / "t", **options)  # type: ignore[arg-type]
    assert caught.value.field == field and words in str(caught.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_corpus_is_an_error(tmp_path: Path, texts: list[str]) -> None:
    """Guards against a tokenizer of bare bytes that nobody asked for."""
    with pytest.raises(DataError, match="no text"):
        train(texts, vocab_size=400, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_missing_and_broken_folders_are_named(tmp_path: Path) -> None:
    """Guards promise 9 for tokenizer folders."""
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        TokenizerFolder.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TokenizerFolder.open(tmp_path)


def test_token_bytes_of_sentencepiece(tmp_path: Path) -> None:
    """Guards bits per byte on models whose pieces are text (`▁the`, `<0x0A>`), not mapped bytes."""
    model = models.BPE(vocab={"<s>": 0, "▁a": 1, "<0x0A>": 2, "é": 3}, merges=[], byte_fallback=True)
    inner = Tokenizer(model)
    inner.decoder = decoders.ByteFallback()
    inner.add_special_tokens(["<s>"])
    assert _save(tmp_path, inner, bos_token="<s>").token_bytes().tolist() == [0, 2, 1, 2]


def test_bytes_per_token_are_printed(make: Callable[..., TokenizerFolder]) -> None:
    """The compression of a tokenizer stood in files alone."""
    report = measure(make(), CORPUS)
    line = describe(report, "the held-out texts of corpus-1")
    assert line.startswith(f"{report['bytes_per_token']:.2f} bytes per token on the held-out texts of corpus-1")
    assert "GPT-2's tokenizer (50,257 tokens) reaches 4.4 on OpenWebText" in line


def test_measure(make: Callable[..., TokenizerFolder]) -> None:
    """Guards the figures of the compression report against each other, on a text that can be counted by hand."""
    report = measure(make(), ["The fox", "", "dog dog"])
    ids = [i for text in ("The fox", "dog dog") for i in make().encode_text(text)]
    assert (report["bytes"], report["words"], report["tokens"], report["round_trip_failures"]) == (14, 4, len(ids), 0)
    assert report["bytes_per_token"] == pytest.approx(14 / len(ids), abs=1e-4)
    assert 0 < report["unused_share"] < 1 and report["tokens_per_word"] == pytest.approx(len(ids) / 4, abs=1e-4)
    with pytest.raises(DataError, match="no text"):
        measure(make(), [])


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("tokenizer_config.json", '{"chat_template": {"a": 1}}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 3}]}', "chat_template"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token"),
        ("tokenizer_config.json", '{"eos_token": {"a": 1}}', "eos_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", "[1]", None),
        ("tokenizer_config.json", "[" * 100_000, None),
        ("tokenizer.json", "[" * 100_000, None),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("tutelage.json", '{"end_of_turn": 7}', "end_of_turn"),
        ("chat_template.jinja", b"\xff", None),
        ("tokenizer.json", b"\xff", None),
    ],
)
def test_a_damaged_file_of_the_folder_is_named(
    make: Callable[..., TokenizerFolder], tmp_path: Path, name: str, content: str | bytes, field: str | None
) -> None:
    """Tracebacks of other libraries for a template that is an object, or for half a file."""
    folder = Path(shutil.copytree(make().folder, tmp_path / "words"))
    for other in ("chat_template.jinja", "tutelage.json"):
        if name != other:
            (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError) as caught:
        TokenizerFolder.open(folder)
    assert caught.value.file == folder / name and caught.value.field == field and caught.value.fix
