"""One section per stage: the settings of its command, of its entry in a recipe and of its Python function, under the same
names. The first line of a docstring is the stage's help."""

from __future__ import annotations

from typing import Any, Literal

from tutelage.config.base import Names, Section, artifact, setting
from tutelage.config.feedback import Preference as Preference
from tutelage.config.feedback import Reward as Reward
from tutelage.config.feedback import Rl as Rl
from tutelage.config.tasks import Classify as Classify
from tutelage.config.tasks import Translate as Translate
from tutelage.config.train import (
    DEVICE,
    Count,
    Derived,
    Positive,
    Schedule,
    Share,
    Train,
    general_documents,
    general_text,
    replay_share,
    replay_weight,
)


class Data(Section):
    """Collect, clean, deduplicate and split text or conversations."""

    # Sources enter the digest by their content (stages/sources.py), so that moving a file changes nothing.
    sources: Names = setting(
        ...,
        "Files, folders or globs; or python-docs:, python-code:, python-questions:, python-areas:, skill:…, hf:org/name.",
        identity=False,
        min_length=1,
    )
    kind: Literal["documents", "conversations", "preferences", "ratings", "prompts", "examples"] = setting(
        "documents",
        "Type of record to make. documents: plain text; conversations: dialogues or prompt/completion pairs; "
        "preferences: a better and a worse answer; ratings: answers with scores; prompts: questions with an "
        "optional expected answer; examples: texts with classes.",
    )
    text_field: str = setting("text", "Field that holds the text in JSONL, CSV and Parquet rows.")
    fields: dict[str, str] = setting(
        {},
        "Names of your fields, such as {prompt: question, completion: answer} or {text: comment, label: toxic}. A "
        "path leads into nested rows, as in {answer: instances.0.output}.",
    )
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "qa"] = setting(
        "auto", "Format of conversation rows; auto detects it row by row."
    )
    encoding: str = setting("utf-8", "Encoding of text files; several, such as utf-8,cp1252, are tried in order on each file.")
    split: Literal["none", "blank_lines", "form_feed", "lines"] = setting("none", "Rule that cuts one text file into documents.")
    chunk_chars: Count | None = setting(
        None, "Size in characters of the pieces that longer documents are cut into, at paragraph borders; null: no cutting."
    )
    min_chars: int = setting(32, "Shortest document that is kept, in characters.", ge=0)
    max_chars: Count = setting(10_000_000, "Longest document that is kept, in characters.")
    normalise: Literal["NFC", "NFKC", "none"] = setting(
        "none", "Unicode normal form of documents; none leaves them byte for byte."
    )
    clean: bool = setting(
        False,
        "Clean documents: line ends become \\n; control characters, spaces at line ends and more than two blank "
        "lines in a row are removed. Changes Markdown's line breaks, patches and tables.",
    )
    boilerplate: Literal["keep", "drop"] = setting(
        "keep",
        "Treatment of lines that at least 10 documents and 10% of all documents share; drop removes them. Not for "
        "code or tables.",
    )
    licence: str | None = setting(None, "Licence of sources that name none, as an SPDX id such as CC-BY-4.0.")
    dedup: Literal["none", "exact", "near"] = setting(
        "near",
        "Deduplication. exact: equal records; near: MinHash with Jaccard similarity 0.8, also across the split. "
        "Rows are compared by question and answer, without text that many rows share.",
    )
    validation_share: Share = setting(0.05, "Share of records held out for validation (0 to 1), chosen by a hash of the record.")
    validation_sources: Names = setting([], "Sources whose records are all held out, instead of a share.", identity=False)
    on_error: Literal["stop", "skip"] = setting(
        "stop", "Reaction to a broken row or file; skipped ones are counted and kept in rejected.jsonl."
    )
    max_reject_share: Share = setting(
        0.05,
        "Largest share of broken rows (0 to 1) that on_error=skip accepts; a file counts as a row, and one file "
        "may always be broken.",
    )
    seed: int = setting(0, "Seed for the split and for generated sources.")


class Tokenizer(Section):
    """Train a byte-level BPE tokenizer and measure it."""

    data: str = artifact("Documents or conversations to learn from.", kind="records")
    vocab_size: Count = setting(4096, "Vocabulary size in tokens, including special tokens and the 256 bytes.")
    pattern: str = setting("qwen2", "Pre-tokenization pattern, by llama.cpp's name: gpt-2, llama-bpe, qwen2.")
    template: str = setting("default", "Chat template: default, chatml, llama3, qwen, gemma, mistral, plain.")


class Tokens(Section):
    """Turn records into memory-mapped token shards."""

    data: str = artifact("Documents or conversations to encode.", kind="records")
    tokenizer: str = artifact("Tokenizer or model folder.", kind="tokenizer")
    workers: int = setting(0, "Number of worker processes; 0 uses one per core.", ge=0, identity=False)


class Pretrain(Train):
    """Train a model on plain text, from scratch or from a checkpoint."""

    data: str = artifact("Documents to train on.", kind="records")
    tokenizer: str | None = artifact("Tokenizer folder for a new model; not needed with `model`.", kind="tokenizer", default=None)
    model: str | None = artifact("Checkpoint to continue from; trains from scratch where left out.", kind="model", default=None)
    size: str = setting(
        "3m",
        "Number of parameters of a new model, such as 3m; shape, batch, learning rates and token budget are derived from it.",
    )
    architecture: dict[str, Any] = setting({}, "Keys of config.json that override the derived shape of a new model.")
    too_long: Literal["split", "drop", "left", "right"] = setting(
        "split", "Treatment of a document longer than a row: split it, drop it, or cut its left or right end. Always counted."
    )
    seed: int = setting(0, "Seed for initial weights and data order.")


class Sft(Train):
    """Fine-tune a checkpoint on conversations."""

    model: str = artifact("Checkpoint to start from.", kind="model")
    data: str = artifact("Conversations to train on.", kind="records")
    epochs: float | None = setting(2.0, "Number of passes over the data.", gt=0)
    template: str | None = setting(None, "Chat template for a checkpoint that has none, or to replace its own.")
    general: str | None = general_text()
    replay_share: float = replay_share()
    replay_weight: Positive = replay_weight()
    max_documents: int = general_documents()
    seed: int = setting(0, "Seed for data order.")


class Merge(Section):
    """Merge an adapter into its base, which gives a whole model."""

    adapter: str = artifact("Adapter to merge: a folder that peft wrote, or a run that trained one.", kind="adapter")
    model: str | None = artifact("Base model, where it is not at the place that the adapter names.", kind="model", default=None)
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = setting(
        "stored", "Data type of the written weights; stored keeps the type of the base's folder."
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda or cuda:1. auto takes a GPU where there is one.", identity=False, pattern=DEVICE
    )


class Sample(Section):
    """Sample several answers to each prompt and judge them."""

    model: str = artifact("Model that answers.", kind="model")
    data: str = artifact("Prompts, or conversations whose last question is asked.", kind="records")
    rewards: dict[str, Any] = setting(
        ...,
        "Reward of an answer: a kind and its weight, {exact: 1}; or a name and settings, {right: {kind: maths, weight: 1}}.",
    )
    reward_model: str | None = artifact(
        "Reward model that scores answers for a reward of kind `model`.", kind="model", default=None
    )
    part: Literal["train", "validation"] = setting("train", "Part of the data whose prompts are asked.")
    max_prompts: int = setting(0, "Largest number of prompts; 0: all.", ge=0)
    samples: Count = setting(8, "Number of answers to each prompt.")
    max_tokens: Count = setting(64, "Longest answer in tokens.")
    temperature: Positive = setting(1.0, "Sampling temperature.")
    device: str = setting(
        "auto", "Device: auto, cpu, cuda or cuda:1. auto takes a GPU where there is one.", identity=False, pattern=DEVICE
    )
    threads: int = setting(0, "Number of CPU threads; 0 uses all cores.", ge=0, identity=False)
    kernels: bool = setting(True, "Use the C++ kernels on CPUs.", identity=False)
    seed: int = setting(0, "Seed for sampling.")


class Select(Section):
    """Choose among judged answers: good ones to imitate, or pairs of a better and a worse one."""

    answers: str = artifact("Judged answers, as made by `sample`.", kind="records")
    data: str = artifact("Prompts that the answers belong to.", kind="records")
    make: Literal["conversations", "preferences"] = setting(
        "conversations", "Type of record to make: conversations for `sft`, or preferences for `preference`."
    )
    threshold: float = setting(1.0, "Smallest reward of an answer that is kept, with make=conversations.")
    keep: Literal["best", "all"] = setting(
        "best", "Good answers to keep of each prompt, with make=conversations: the best one, or all that differ."
    )
    margin: float = setting(
        0.0, "Smallest difference of rewards within a pair, with make=preferences; 0 accepts any difference.", ge=0.0
    )
    validation_share: Share = setting(0.05, "Share of prompts (0 to 1) whose answers are held out.")
    seed: int = setting(0, "Seed for the split.")


class Rollouts(Section):
    prompts: Count = setting(16, "Number of prompts in a global batch.")
    samples: Count = setting(1, "Number of answers to each prompt.")
    max_tokens: Count = setting(64, "Longest answer in tokens.")
    temperature: Positive = setting(1.0, "Sampling temperature.")
    micro_tokens: Count = setting(
        4096, "Tokens in one forward pass on one device; changes memory, not the result.", identity=False
    )


class Distil(Train):
    """Train a student model to predict what a larger teacher predicts."""

    model: str = artifact("Student: the checkpoint to start from.", kind="model")
    teacher: str = artifact("Teacher model, with the student's vocabulary.", kind="model")
    data: str = artifact("Documents or conversations that both models read; with policy=on, the prompts.", kind="records")
    policy: Literal["off", "on"] = setting(
        "off", "Texts to learn on. off: the given data; on: the student's own answers, generated in each step."
    )
    rollouts: Rollouts = setting(Rollouts(), "Generation of the student's answers, with policy=on.")
    loss: Literal["forward", "reverse", "jsd"] = setting(
        "forward",
        "Divergence between the distributions: KL(teacher||student), KL(student||teacher), or the generalised "
        "Jensen-Shannon divergence.",
    )
    beta: Share | None = setting(None, "Share of the teacher in the mixture (0 to 1), with loss=jsd; null: 0.5.")
    temperature: Positive = setting(1.0, "Temperature that softens both distributions before they are compared.")
    cross_entropy: Share = setting(0.0, "Share of the next-token loss (0 to 1); the rest is the teacher's.")
    top_k: int = setting(
        0,
        "Number of the teacher's likeliest tokens stored before training; 0: all tokens, and the teacher runs in each step.",
        ge=0,
    )
    rest: Literal["bucket", "renormalise"] | None = setting(
        None,
        "Treatment of the tokens outside top_k. bucket: one extra token holds their probability; renormalise: "
        "dropped on both sides; null: bucket.",
    )
    epochs: Positive | None = setting(1.0, "Number of passes over the data.")
    too_long: Literal["split", "drop", "left", "right"] | None = setting(  # type: ignore[assignment]
        None, "Treatment of a text longer than a row; null: split for documents, drop for conversations."
    )
    seed: int = setting(0, "Seed for data order and sampling.")


class ExtendVocab(Train):
    """Add tokens to a checkpoint for the texts of a field, and train only their rows."""

    model: str = artifact("Checkpoint whose tokenizer is byte-level BPE.", kind="model")
    data: str = artifact("Documents of the field.", kind="records")
    add: Count = setting(256, "Largest number of new tokens.")
    rows: Literal["mean", "ends", "random"] = setting(
        "mean",
        "Initial values of the new rows of embedding and head. mean: mean of the rows of their old pieces; ends: "
        "the last piece in the embedding and the first in the head; random: random values.",
    )
    train: bool = setting(True, "Train the new rows and freeze everything else; false: only initialise them.")
    steps: Count | Derived = setting(100, "Number of optimizer steps; derived: from tokens or epochs.")
    schedule: Schedule = setting(Schedule(name="constant", warmup=0.1), "Learning-rate schedule.")
    too_long: Literal["split", "drop", "left", "right"] = setting(
        "split", "Treatment of a document longer than a row: split it, drop it, or cut its left or right end. Always counted."
    )
    seed: int = setting(0, "Seed for data order.")


class Adapt(Train):
    """Continue training a checkpoint on the texts of a field, with replay of general text; measure gain and loss."""

    model: str = artifact("Checkpoint to adapt.", kind="model")
    data: str = artifact("Documents of the field.", kind="records")
    general: str | None = artifact(
        "Documents of the kind that the checkpoint knows: a share is replayed, and the held-out part measures forgetting.",
        kind="records",
        default=None,
    )
    replay_share: float = setting(
        0.2,
        "Share of rows that are general text (0 to 1), exact in every 1,000 rows; 0: general text is only measured.",
        ge=0,
        lt=1,
    )
    vocab_add: int = setting(
        0, "Largest number of new tokens learned from the texts of the field (see `tutelage extend-vocab`).", ge=0
    )
    rows: Literal["mean", "ends", "random"] = setting(
        "mean", "Initial values of the rows of new tokens, with vocab_add: mean, ends or random."
    )
    warm_steps: int = setting(
        100, "Number of steps that train the new rows alone before everything is trained, with vocab_add.", ge=0
    )
    epochs: float | None = setting(1.0, "Number of passes over the texts of the field.", gt=0)
    too_long: Literal["split", "drop", "left", "right"] = setting(
        "split", "Treatment of a document longer than a row: split it, drop it, or cut its left or right end. Always counted."
    )
    max_documents: int = setting(
        500, "Largest number of held-out documents of each kind measured before and after; 0: all.", ge=0
    )
    seed: int = setting(0, "Seed for data order.")


class Evaluate(Section):
    """Evaluate a model on held-out documents and questions, next to baselines."""

    model: str = artifact("Model to evaluate.", kind="model")
    documents: str | None = artifact(
        "Records whose validation part is read, for bits per byte and perplexity.", kind="records", default=None
    )
    questions: str | None = artifact("Conversations whose validation part is asked.", kind="records", default=None)
    compare_with: str | None = artifact(
        "Evaluation of another model on the same records, compared question by question and document by document.",
        kind="scores", default=None,
    )  # fmt: skip
    baselines: bool = setting(True, "Measure xz and Kneser-Ney n-grams too, given the same training text.")
    stride: Share = setting(0.5, "Share of the context (0 to 1) kept when a long document is read in windows.")
    max_documents: int = setting(0, "Largest number of held-out documents; 0: all.", ge=0)
    max_questions: int = setting(500, "Largest number of held-out questions; 0: all.", ge=0)
    max_tokens: Count = setting(64, "Longest answer in tokens.")
    scorer: Literal["answer", "exact", "numeric", "maths", "regex", "json_schema", "word_overlap"] | None = setting(
        None, "Grading of answers, as the reward of that name does, or by word overlap; null: a question's meta.scorer, "
"or by the expected answer."
    )  # fmt: skip
    device: str = setting(
        "auto", "Device: auto, cpu, cuda or cuda:1. auto takes a GPU where there is one.", identity=False, pattern=DEVICE
    )
    seed: int = setting(0, "Seed for the bootstrap of intervals and for sampled continuations.")


class Report(Section):
    """Write one self-contained HTML page about a run and everything it came from."""

    run: str = artifact("Run to report on.", kind="run")
    scores: str | None = artifact(
        "Evaluation of the run's model; evaluations in the same folder where left out.", kind="scores", default=None
    )
    base_scores: str | None = artifact(
        "Evaluation of a model that the run's model was trained from, shown under that model's name.", kind="scores", default=None
    )


class Generate(Section):
    """Answer every row of a file with a model; the same command resumes what was interrupted."""

    model: str = artifact("Model folder, run, or recipe/stage.", kind="model")
    input: str = setting(
        ...,
        "JSONL(.gz), JSON, CSV, Parquet; an OpenAI batch file; or text with one prompt per line. - reads standard input.",
        identity=False,
    )
    output: str = setting(..., "JSON lines: the rows of the input in their order, with the answers.", identity=False)
    column: str | None = setting(None, "Field that holds the prompt or the messages; `prompt` or `messages` where left out.")
    prompt_template: str | None = setting(None, "Prompt made from a row's fields, such as 'Describe {name}: {text}'.")
    chat: bool = setting(False, "Ask prompts as a user's message; otherwise they are continued as text.")
    system: str | None = setting(None, "System prompt of every row; implies chat.")
    max_tokens: Count = setting(256, "Longest answer in tokens; shorter where the context ends earlier.")
    temperature: float = setting(0.0, "Sampling temperature; 0 always takes the likeliest token.")
    top_p: float = setting(1.0, "Probability mass of the likeliest tokens that are sampled from (0 to 1).")
    top_k: int = setting(0, "Number of likeliest tokens that are sampled from; 0: all.")
    min_p: float = setting(0.0, "Smallest probability of a sampled token relative to the likeliest one (0 to 1).")
    n: Count = setting(1, "Number of answers per row; more than one give a list `completions`.")
    stop: Names = setting([], "Texts that end an answer.")
    beams: Count = setting(1, "Number of beams in beam search; 1: no search.")
    length_penalty: float = setting(
        1.0, "Exponent of the length in beam search: an answer's log-probability is divided by its length to this power."
    )
    early_stopping: bool = setting(False, "End beam search once there are as many answers as beams.")
    no_repeat_ngram: int = setting(0, "Length in tokens of n-grams that may not repeat; 0: no limit.")
    seed: int = setting(
        0, "Seed for sampling: row i draws from (seed, i), so that neither order nor interruptions change an answer."
    )
    slots: Count = setting(32, "Number of answers generated at a time.", identity=False)
    engine: Literal["tutelage", "vllm"] = setting("tutelage", "Inference engine; vllm for GPUs, where it is installed.")
    on_error: Literal["stop", "skip"] = setting(
        "stop", "Reaction to a row that cannot be answered; skipped ones get a field `error` and are counted.", identity=False
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda or cuda:1. auto takes a GPU where there is one.", identity=False, pattern=DEVICE
    )


class Predict(Section):
    """Predict the labels of every row of a file with a classifier or a tagger."""

    model: str = artifact("Classifier: the folder or the run of `tutelage classify`, or a folder of transformers.", kind="model")
    input: str = setting(
        ..., "JSONL(.gz), JSON, CSV or Parquet rows with a text and an optional pair; or plain text, one per line. - "
"reads standard input.",
        identity=False,
    )  # fmt: skip
    output: str = setting(
        ..., "JSON lines: id or number of each row, its text, the predicted label and probabilities.", identity=False
    )
    fields: dict[str, str] = setting({}, "Names of your fields, where they are not text and pair: {text: comment, pair: title}.")
    too_long: Literal["right", "left"] = setting("right", "End at which a text is cut that is longer than the model reads.")
    device: str = setting(
        "auto", "Device: auto, cpu, cuda or cuda:1. auto takes a GPU where there is one.", identity=False, pattern=DEVICE
    )
