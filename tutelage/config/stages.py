"""One section a stage: what a command takes, a recipe's stage holds, and a Python call passes, under the same names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tutelage.config.base import Section, artifact, setting
from tutelage.config.rewards import Rewards
from tutelage.config.tasks import Classify as Classify
from tutelage.config.tasks import Translate as Translate
from tutelage.config.train import DEVICE, Count, Derived, Positive, Schedule, Share, Train, Tune

# One name may stand for a list of one: --set corpus.sources=docs/
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Data(Section):
    """Collect, clean, deduplicate and split text or conversations."""

    # Sources enter the digest by their content (stages/sources.py), so that moving a file changes nothing.
    sources: Names = setting(
        ...,
        "files, folders, globs, python-docs:, python-code:, python-questions:, python-areas:, skill:…, hf:org/name",
        identity=False,
        min_length=1,
    )
    kind: Literal["documents", "conversations", "preferences", "ratings", "prompts", "examples"] = setting(
        "documents",
        "plain text; dialogues or prompt/completion pairs; a better and a worse answer; answers with scores; what is asked; "
        "texts with classes",
    )
    text_field: str = setting("text", "field that holds the text in JSONL, CSV and Parquet rows")
    fields: dict[str, str] = setting(
        {},
        "names of your rows' fields, such as {prompt: question, completion: answer} or {text: comment, label: toxic}; a path"
        " leads into nested rows, as in {answer: instances.0.output}",
    )
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "qa"] = setting(
        "auto", "conversations: the rows' format; auto looks at each row"
    )
    encoding: str = setting("utf-8", "of text files; several, such as utf-8,cp1252, are tried in order on each file")
    split: Literal["none", "blank_lines", "form_feed", "lines"] = setting("none", "how one text file becomes documents")
    chunk_chars: Count | None = setting(None, "cut longer documents at paragraph borders into pieces of about so many characters")
    min_chars: int = setting(32, "shorter documents are rejected", ge=0)
    max_chars: Count = setting(10_000_000, "longer documents are rejected")
    normalise: Literal["NFC", "NFKC", "none"] = setting(
        "none", "documents: Unicode normal form to bring texts to; none leaves them byte for byte"
    )
    clean: bool = setting(
        False,
        "documents: make line ends \\n, take out control characters, spaces at line ends and more than two blank lines in a row; "
        "this changes Markdown's line breaks, patches and tables",
    )
    boilerplate: Literal["keep", "drop"] = setting(
        "keep", "documents: drop takes out lines that 10 documents and 10% of them share; not for code or tables"
    )
    licence: str | None = setting(None, "of sources that name none, as an SPDX id such as CC-BY-4.0")
    dedup: Literal["none", "exact", "near"] = setting(
        "near",
        "near: MinHash, Jaccard 0.8, and none across the split; rows are compared by what is asked and answered, without the "
        "text that many share",
    )
    validation_share: Share = setting(0.05, "share held out, by hash of the document")
    validation_sources: Names = setting([], "sources whose every record is held out, instead of a share", identity=False)
    on_error: Literal["stop", "skip"] = setting(
        "stop", "what a broken row or file does; skipped ones are counted and kept in rejected.jsonl"
    )
    max_reject_share: Share = setting(
        0.05, "with on_error=skip: stop when more than this share of rows is broken; a file is a row, and one may be broken"
    )
    seed: int = setting(0, "of the split and of generated sources")


class Tokenizer(Section):
    """Train a byte-level BPE tokenizer and measure it."""

    data: str = artifact("documents or conversations to learn from", kind="records")
    vocab_size: Count = setting(4096, "entries, special tokens and the 256 bytes included")
    pattern: str = setting("qwen2", "split pattern, by llama.cpp's name: gpt-2, llama-bpe, qwen2")
    template: str = setting("default", "chat template: default, chatml, llama3, qwen, gemma, mistral")


class Tokens(Section):
    """Turn records into memory-mapped token shards."""

    data: str = artifact("documents or conversations", kind="records")
    tokenizer: str = artifact("tokenizer or model folder", kind="tokenizer")
    workers: int = setting(0, "processes; 0: one a core", ge=0, identity=False)


class Pretrain(Train):
    """Train a model on plain text: from scratch, or on from a checkpoint."""

    data: str = artifact("documents", kind="records")
    tokenizer: str | None = artifact("tokenizer folder; not needed with `model`", kind="tokenizer", default=None)
    model: str | None = artifact("checkpoint to go on from; none: from scratch", kind="model", default=None)
    size: str = setting("3m", "from scratch: number of parameters, from which shape, batch, rates and token budget are derived")
    architecture: dict[str, Any] = setting({}, "from scratch: config.json keys that override the derived shape")
    too_long: Literal["split", "drop", "left", "right"] = setting("split", "what happens to a document longer than a row")
    seed: int = setting(0, "of initial weights and data order")


class Sft(Train):
    """Supervised fine-tuning on conversations."""

    model: str = artifact("checkpoint to start from", kind="model")
    data: str = artifact("conversations", kind="records")
    epochs: float | None = setting(2.0, "passes over the data", gt=0)
    template: str | None = setting(None, "chat template to give a checkpoint that has none, or to replace its own")
    seed: int = setting(0, "of the data order")


class Merge(Section):
    """Make an adapter part of its base: a whole model."""

    adapter: str = artifact("the adapter: a folder that peft wrote, or a run that trained one", kind="adapter")
    model: str | None = artifact("its base, where that is not at the place that the adapter names", kind="model", default=None)
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = setting(
        "stored", "type of the written weights; stored: as in the base's folder"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", identity=False, pattern=DEVICE)


class Sample(Section):
    """Have a model answer each prompt several times, and judge the answers."""

    model: str = artifact("the model to ask", kind="model")
    data: str = artifact("prompts, or conversations whose last question is asked", kind="records")
    rewards: dict[str, Any] = setting(
        ...,
        "what answers are worth: a kind and its weight, {exact: 1}; or a name and settings, {right: {kind: maths, weight: 1}}",
    )
    reward_model: str | None = artifact("what a reward of the kind `model` asks", kind="model", default=None)
    part: Literal["train", "validation"] = setting("train", "which prompts of the data are asked")
    max_prompts: int = setting(0, "prompts asked; 0: all", ge=0)
    samples: Count = setting(8, "answers to each prompt")
    max_tokens: Count = setting(64, "longest answer, in tokens")
    temperature: Positive = setting(1.0, "of the answers")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", identity=False, pattern=DEVICE)
    threads: int = setting(0, "CPU threads; 0: all cores", ge=0, identity=False)
    kernels: bool = setting(True, "our own CPU kernels", identity=False)
    seed: int = setting(0, "of every answer")


class Select(Section):
    """Choose among judged answers: the good ones to imitate, or the best and the worst as a preference."""

    answers: str = artifact("judged answers, made by `sample`", kind="records")
    data: str = artifact("the prompts that they answer", kind="records")
    make: Literal["conversations", "preferences"] = setting(
        "conversations", "conversations for `sft`, or preferences for `prefer`"
    )
    threshold: float = setting(1.0, "make=conversations: least reward of an answer that is kept")
    keep: Literal["best", "all"] = setting("best", "make=conversations: of a prompt's good answers the best, or all that differ")
    margin: float = setting(0.0, "make=preferences: least difference of rewards; at 0 any difference will do", ge=0.0)
    validation_share: Share = setting(0.05, "share of the prompts whose answers are held out")
    seed: int = setting(0, "of the split")


class Rollouts(Section):
    prompts: Count = setting(16, "prompts in a global batch")
    samples: Count = setting(1, "answers to each")
    max_tokens: Count = setting(64, "longest answer, in tokens")
    temperature: Positive = setting(1.0, "of the answers")
    micro_tokens: Count = setting(4096, "tokens in one forward pass; changes memory, not the result", identity=False)


class Distil(Train):
    """Train a model to predict what a larger one predicts."""

    model: str = artifact("the student: checkpoint to start from", kind="model")
    teacher: str = artifact("the model to learn from, with the student's vocabulary", kind="model")
    data: str = artifact("documents or conversations that both read; with policy=on what is asked", kind="records")
    policy: Literal["off", "on"] = setting(
        "off", "off: the given texts are read; on: the student's own answers, made in each step"
    )
    rollouts: Rollouts = setting(Rollouts(), "the student's answers, with policy=on")
    loss: Literal["forward", "reverse", "jsd"] = setting(
        "forward", "KL(teacher||student), KL(student||teacher), or the generalised Jensen-Shannon divergence between them"
    )
    beta: Share | None = setting(None, "loss=jsd: the teacher's share of the mixture; none: 0.5")
    temperature: Positive = setting(1.0, "both distributions are softened by it first")
    cross_entropy: Share = setting(0.0, "share of the next-token loss; the rest is the teacher's")
    top_k: int = setting(
        0,
        "so many of the teacher's likeliest tokens are kept in files before the start; 0: all, the teacher runs in each step",
        ge=0,
    )
    rest: Literal["bucket", "renormalise"] | None = setting(
        None, "with top_k, all other tokens are: bucket, one token more; renormalise, left out on both sides; none: bucket"
    )
    epochs: Positive | None = setting(1.0, "passes over the data")
    too_long: Literal["split", "drop", "left", "right"] | None = setting(  # type: ignore[assignment]
        None, "what happens to a text longer than a row; none: split for documents, drop for conversations"
    )
    seed: int = setting(0, "of the data order and of every answer")


class Vocabulary(Train):
    """Give a checkpoint new tokens that shorten the texts of a field, and train the rows of these tokens alone."""

    model: str = artifact("checkpoint whose tokenizer is byte-level BPE", kind="model")
    data: str = artifact("documents of the field", kind="records")
    add: Count = setting(256, "new tokens, at most")
    rows: Literal["mean", "ends", "random"] = setting(
        "mean",
        "what new rows of embedding and head begin with: mean of the rows of their old pieces; ends: of the last piece to read, "
        "of the first to predict; random",
    )
    train: bool = setting(True, "train the new rows, all else frozen; false: only begin them")
    steps: Count | Derived = setting(100, "optimizer steps; derived from tokens or epochs")
    schedule: Schedule = setting(Schedule(name="constant", warmup=0.1), "learning rate over time")
    too_long: Literal["split", "drop", "left", "right"] = setting("split", "what happens to a document longer than a row")
    seed: int = setting(0, "of the data order")


class Adapt(Train):
    """Go on training a checkpoint on the texts of a field, with replay of general text; measure gain and loss."""

    model: str = artifact("checkpoint to adapt", kind="model")
    data: str = artifact("documents of the field", kind="records")
    general: str | None = artifact(
        "documents of the kind the checkpoint knows: a share of them is replayed, and their held-out part measures what is lost",
        kind="records",
        default=None,
    )
    replay_share: float = setting(
        0.2, "share of rows that are general text, exact in every 1,000; 0: it is only measured", ge=0, lt=1
    )
    vocab_add: int = setting(0, "new tokens learnt from the texts of the field, at most (see `tutelage vocabulary`)", ge=0)
    rows: Literal["mean", "ends", "random"] = setting("mean", "vocab_add: what new rows begin with")
    warm_steps: int = setting(100, "vocab_add: steps in which the new rows alone are trained, before everything is", ge=0)
    epochs: float | None = setting(1.0, "passes over the field's texts", gt=0)
    too_long: Literal["split", "drop", "left", "right"] = setting("split", "what happens to a document longer than a row")
    max_documents: int = setting(500, "held-out documents of each kind that are measured before and after; 0: all", ge=0)
    seed: int = setting(0, "of the data order")


class Evaluate(Section):
    """Measure a model on held-out documents and questions, beside honest yardsticks."""

    model: str = artifact("the model", kind="model")
    documents: str | None = artifact("records whose validation part gives bits per byte", kind="records", default=None)
    questions: str | None = artifact("conversations whose validation part is asked", kind="records", default=None)
    before: str | None = artifact(
        "an evaluation of the model as it was, on the same records: what was gained since, in pairs", kind="scores", default=None
    )
    yardsticks: bool = setting(True, "also xz and Kneser-Ney n-grams, given the same training text")
    stride: Share = setting(0.5, "share of the context kept when a long document is read in windows")
    max_documents: int = setting(0, "documents used; 0: all", ge=0)
    max_questions: int = setting(500, "questions asked; 0: all", ge=0)
    max_tokens: Count = setting(64, "longest answer, in tokens")
    scorer: Literal["answer", "exact", "numeric", "maths", "regex", "json_schema", "recognisable"] | None = setting(
        None, "how answers are graded: as the reward of that name does, or by overlap of words; none: `numeric` for worked "
        "solutions that end in a number, else `answer`, and free text by overlap"
    )  # fmt: skip
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", identity=False, pattern=DEVICE)
    seed: int = setting(0, "of the bootstrap")


class Report(Section):
    """One self-contained HTML page about a run and everything it came from."""

    run: str = artifact("the run to report on", kind="run")
    scores: str | None = artifact("an evaluation of it; without one the nearest is looked for", kind="scores", default=None)
    base_scores: str | None = artifact(
        "an evaluation of the model it came from, for what `scores` has not", kind="scores", default=None
    )


class Generate(Section):
    """Answer every row of a file with a model. What was interrupted goes on with the same command."""

    model: str = artifact("a model folder, a run, or recipe/stage", kind="model")
    input: str = setting(
        ..., "JSONL(.gz), JSON, CSV, Parquet; an OpenAI batch file; or text, a prompt a line; - is standard input", identity=False
    )
    output: str = setting(..., "JSON lines: the rows of the input, in their order, with the answers", identity=False)
    column: str | None = setting(None, "field that holds the prompt or the messages; none: `prompt` or `messages`")
    prompt_template: str | None = setting(None, "prompt made from a row's fields, such as 'Describe {name}: {text}'")
    chat: bool = setting(False, "prompts are asked as a user's message; otherwise they are continued as text")
    system: str | None = setting(None, "system prompt of every row; implies chat")
    max_tokens: Count = setting(256, "longest answer in tokens; it ends earlier where the context does")
    temperature: float = setting(0.0, "0: always the likeliest token")
    top_p: float = setting(1.0, "sample from the likeliest tokens that together reach this probability")
    top_k: int = setting(0, "sample from so many of the likeliest tokens; 0: all")
    min_p: float = setting(0.0, "sample from tokens at least this likely relative to the likeliest one")
    n: Count = setting(1, "answers per row; more than one give a list `completions`")
    stop: Names = setting([], "texts that end an answer")
    beams: Count = setting(1, "beginnings of an answer that are searched together for the likeliest whole; 1: no search")
    length_penalty: float = setting(1.0, "of beams: an answer's log-probability is divided by its length to this power")
    early_stopping: bool = setting(False, "of beams: the search ends with as many answers as beams")
    no_repeat_ngram: int = setting(0, "no so many tokens in a row come twice; 0: they may")
    seed: int = setting(0, "of sampling: row i draws from (seed, i), so that neither order nor interruptions change an answer")
    slots: Count = setting(32, "answers in the making at a time", identity=False)
    engine: Literal["tutelage", "vllm"] = setting("tutelage", "vllm, where it is installed: for GPUs")
    on_error: Literal["stop", "skip"] = setting(
        "stop", "what a row that cannot be answered does; skipped ones get a field `error` and are counted", identity=False
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", identity=False, pattern=DEVICE)


class Label(Section):
    """Label every row of a file with a classifier or a tagger."""

    model: str = artifact("a classifier: the folder or the run of `tutelage classify`, or a folder of transformers", kind="model")
    input: str = setting(
        ..., "JSONL(.gz), JSON, CSV or Parquet of rows with a text, and a pair; or plain text, one a line; - is standard input",
        identity=False,
    )  # fmt: skip
    output: str = setting(..., "JSON lines: id or number of each row, its text, what was said and probabilities", identity=False)
    fields: dict[str, str] = setting({}, "names of your fields, where they are not text and pair: {text: comment, pair: title}")
    too_long: Literal["right", "left"] = setting("right", "the end at which a text is cut that is longer than the model reads")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", identity=False, pattern=DEVICE)


class Prefer(Tune):
    """Train a model towards preferred answers, directly: DPO and its family."""

    model: str = artifact("the model to train, usually a fine-tuned one; it is the reference too", kind="model")
    data: str = artifact("preferences", kind="records")
    method: str = setting(
        "dpo", "a row of the table of objectives: dpo, ipo, hinge, robust, orpo, simpo, cpo, … of preferences; kto of ratings"
    )
    beta: Positive | None = setting(None, "how closely the model stays to the reference; the method's own where left out")
    label_smoothing: Share | None = setting(None, "cdpo, robust, exo_pair: share of preferences taken to be the wrong way round")
    offset: float | None = setting(None, "dpo: how much of the data's margins the rewards must differ by", ge=0.0)
    gamma: float | None = setting(None, "simpo: margin that the better answer must have", ge=0.0)
    sft: float | None = setting(None, "simpo, cpo: weight of also learning the chosen answers", ge=0.0)
    tau: Positive | None = setting(None, "discopop: where its two losses meet")
    average: bool | None = setting(None, "ipo: log-probabilities a token (the authors' code) instead of sums (the paper)")
    prompts: bool | None = setting(None, "orpo: also learn prompts, as TRL does, not the chosen answers alone")
    desirable_weight: Positive | None = setting(None, "kto: weight of good answers")
    undesirable_weight: Positive | None = setting(None, "kto: weight of bad answers")
    too_long: Literal["drop", "left", "right"] = setting("drop", "a pair over max_length: left out, or cut; always counted")
    epochs: Positive = setting(1.0, "passes over the data, where steps is not given")
    reference: str | None = artifact("another model to stay close to, instead of the start", kind="model", default=None)
    seed: int = setting(0, "of the data order")


class Reward(Tune):
    """Train a model that scores answers as people did: from preferences, ratings, or verdicts on steps."""

    model: str = artifact("the language model to start from, or a reward model to go on with", kind="model")
    data: str = artifact("preferences or ratings", kind="records")
    method: Literal["reward", "rating", "process"] | None = setting(
        None, "reward: from preferences; rating: from scores by aspect; process: from scores of steps. None: by the data"
    )
    centring: float | None = setting(None, "reward: how strongly the mean of a pair's rewards is held at 0", ge=0.0)
    aspects: Names = setting([], "rating: the aspects to learn, a score each; none: all that the data has")
    loss: Literal["mse", "huber"] | None = setting(None, "rating: the squared error, or one that is linear beyond `delta`")
    delta: Positive | None = setting(None, "rating with loss=huber: where it becomes linear")
    too_long: Literal["drop", "left", "right"] = setting("drop", "a text over max_length: left out, or cut; always counted")
    epochs: Positive = setting(1.0, "passes over the data, where steps is not given")
    seed: int = setting(0, "of the new head and the data order")


class Rl(Tune):
    """Train a model on its own answers, by what they are worth: policy gradients and PPO."""

    model: str = artifact("the model to train, usually a fine-tuned one", kind="model")
    data: str = artifact("prompts, or conversations whose last question is asked", kind="records")
    rewards: Rewards = setting(
        ...,
        "what answers are worth: a kind and its weight, {exact: 1}; or a name and settings, {right: {kind: maths, weight: 1}}",
    )
    method: str = setting("grpo", "a row about rollouts in the table of objectives: grpo, rloo, dapo, ppo, …")
    samples: Count = setting(8, "answers to each prompt")
    max_tokens: Count = setting(64, "longest answer, in tokens")
    temperature: Positive = setting(1.0, "of the answers; the loss is about the same distribution")
    epochs: Positive = setting(1.0, "passes over the prompts, where steps is not given")
    updates: Count = setting(1, "times that each answer is trained on")
    minibatches: Count = setting(1, "steps that one time is made in")
    zero_variance: Literal["keep", "skip", "resample"] = setting(
        "keep", "groups whose answers all have the same reward: keep, skip, or resample other prompts instead; always counted"
    )
    truncated: Literal["keep", "mask", "penalise"] = setting(
        "keep", "answers cut at max_tokens: kept, not trained on, or their reward lowered by `penalty`; always counted"
    )
    penalty: float = setting(1.0, "what truncated=penalise takes off a reward", ge=0.0)
    kl: float = setting(0.0, "weight of staying close to the reference; 0: no reference is kept", ge=0.0)
    kl_in: Literal["loss", "reward"] = setting("loss", "where the weight of `kl` is: a term of the loss, or taken off rewards")
    kl_estimator: Literal["k1", "k2", "k3"] | None = setting(
        None, "of the divergence; the method's own: k3 in the loss, k1 in rewards"
    )
    clip_low: Positive | None = setting(None, "how far below 1 the ratio of a token counts; the method's own where left out")
    clip_high: Positive | None = setting(None, "how far above 1; the method's own where left out")
    delta: Positive | None = setting(None, "largest ratio where the advantage is negative (dual clip); none where left out")
    value_clip: Positive | None = setting(None, "ppo: how far from the old value a new one counts; the method's own: 0.2")
    entropy: float = setting(0.0, "weight of a bonus for uncertainty", ge=0.0)
    old: Literal["derived", "engine", "trainer"] = setting(
        "derived", "whose log-probabilities the ratio starts from; derived: the engine's, but at other temperatures than 1"
    )
    correction: Literal["none", "truncate", "mask"] = setting(
        "none", "of what engine and trainer disagree about, with old=trainer: ratios above the cap cut to it, or left out"
    )
    correction_level: Literal["token", "sequence"] = setting("token", "the ratio is of each token, or of an answer's together")
    correction_cap: Positive = setting(2.0, "largest ratio of trainer to engine")
    reference: str | None = artifact("the model to stay close to, instead of the start", kind="model", default=None)
    value: str | None = artifact(
        "ppo: a reward model that values start from; without one, the start with a new head", kind="model", default=None
    )
    reward_model: str | None = artifact("what a reward of the kind `model` asks", kind="model", default=None)
    gamma: Share = setting(1.0, "ppo: discount of rewards a token later")
    lam: Share = setting(0.95, "ppo: how far advantages look ahead (lambda of GAE)")
    value_weight: Positive = setting(0.5, "ppo: weight of the values' error in the loss")
    tools: Names = setting([], "tools that answers may call: calculator, python (in the sandbox)")
    environment: str | None = setting(None, "a class by import path, such as my_game:Game, that the model talks with")
    environment_seconds: Positive = setting(
        30.0, "for one step of an episode (its start, a reply, its score); an environment past it stops the run", identity=False
    )
    max_rounds: Count = setting(4, "answers of the model in one episode, with tools or an environment")
    probes: int = setting(200, "held-out prompts asked greedily before, during and after; 0: none", ge=0, identity=False)
    seed: int = setting(0, "of the order of prompts and of every answer")
