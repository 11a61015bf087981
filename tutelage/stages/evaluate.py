"""Stage `evaluate`: a model and its baselines on held-out text, and the model's answers to held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.chat.render import Renderer
from tutelage.config.stages import Evaluate
from tutelage.data.demo.skills import CHANCE
from tutelage.engine import Engine, Sampling
from tutelage.errors import ArtifactError
from tutelage.evaluate.suite import Subject, evaluate
from tutelage.files import whole_folder
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.models.open import load
from tutelage.records import Conversation
from tutelage.rundir import RunDir
from tutelage.setup.trainer import choose_device
from tutelage.tokenizer.load import TokenizerFolder


def run(config: Evaluate, run: RunDir) -> dict[str, Any]:
    subject = make_subject(config, run)
    if config.questions and subject.prompt is None:
        raise ArtifactError(
            "the model has no chat template, so it cannot be asked", file=run.input("model"), expected="chat_template.jinja",
            fix="fine-tune it with `tutelage sft --template`, or leave out `questions`",
        )  # fmt: skip
    with whole_folder(run.folder("scores")) as out:
        result = evaluate(
            subject,
            out,
            documents=run.input("documents") if config.documents else None,
            conversations=run.input("questions") if config.questions else None,
            baselines=config.baselines,
            stride=config.stride,
            max_documents=config.max_documents,
            max_questions=config.max_questions,
            max_tokens=config.max_tokens,
            scorer=config.scorer,
            chance=CHANCE,
            seed=config.seed,
            compare_with=run.input("compare_with") if config.compare_with else None,
        )
    return facts_of(result)


def facts_of(result: dict[str, Any]) -> dict[str, Any]:
    """What run.json keeps of scores.json: the headline figures with their intervals, their model and their data."""
    facts: dict[str, Any] = {"model": result["model"]["name"]}
    if "documents" in result:
        found = result["documents"]
        facts |= {"documents": found["data"], "verdict": found["verdict"]["text"], "perplexity": _figure(found["perplexity"])}
        facts["bits_per_byte"] = next(_figure(r["bits_per_byte"]) for r in found["rows"] if r["name"] == "model")
        if "saving" in found["verdict"]:
            facts |= {"saving": _figure(found["verdict"]["saving"]), "baseline": found["verdict"]["baseline_label"]}
    if "questions" in result:
        facts["questions"] = result["questions"]["data"]
        facts["correct"] = {row["task"]: _figure(row["correct"]) for row in result["questions"]["tasks"]}
    if "comparison" in result:
        facts["comparison"] = result["comparison"]
    return facts


def _figure(found: dict[str, Any]) -> dict[str, Any]:
    """A number of scores.json without its definition, which is the same in every run."""
    return {key: value for key, value in found.items() if key != "definition"}


def make_subject(config: Evaluate, run: RunDir) -> Subject:
    """The model with its tokenizer, renderer and engine."""
    folder = run.input("model")
    device = choose_device(config)
    model: Any = load(folder, device=device)
    words = TokenizerFolder.open(folder)
    if words.eos_id is None:
        raise ArtifactError(
            "the tokenizer has no end token, so the end of a document has no cost",
            file=folder,
            fix="add eos_token to tokenizer_config.json",
        )
    renderer = Renderer(folder) if words.template else None

    def prompt(conversation: Conversation) -> Sequence[int]:
        assert renderer is not None
        asked = conversation.messages[:-1]
        if conversation.style == "completion":
            return renderer.prompt_text(asked[-1].content)
        return renderer.prompt(asked, list(conversation.tools) or None)

    engine = Engine(model, renderer, slots=32) if renderer is not None else None

    def generate(prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]:
        assert engine is not None
        wanted = int(sampling.pop("max_tokens"))
        max_text_tokens = [max(1, engine.context_length - len(p)) for p in prompts]  # an answer ends at the end of the context
        seed = sampling.pop("seed", None)  # each prompt has its own random stream
        seeds = [None if seed is None else (int(seed) << 20) + i for i in range(len(prompts))]
        how = [Sampling(max_tokens=min(wanted, r), seed=s, **sampling) for r, s in zip(max_text_tokens, seeds, strict=True)]
        return [c.text for c in engine.generate(prompts, how)]

    return Subject(
        name=run.inputs["model"].run.name if run.inputs["model"].run else folder.name,
        model=model,
        encode=words.encode_text,
        begin=(words.eos_id if words.start_id is None else words.start_id,),
        end=(words.eos_id,),
        vocabulary=model.config.vocab_size,
        context=max_text_tokens(model),
        generate=generate if renderer is not None else None,
        prompt=prompt if renderer is not None else None,
        decode=words.decode,
        device=str(device),
        facts={
            "parameters": sum(p.numel() for p in model.parameters()),
            "path": str(folder),
            "digest": run.inputs["model"].digest,
        },
    )
