"""Commands that use a model: chat, serve, and the keys of a server."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli.options import RUNS, Runs


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, GGUF file, run, recipe/stage, or smollm2.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Ask once, print the answer and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer in tokens.")] = 128,
    no_history: Annotated[
        bool, typer.Option("--no-history", metavar=" ", help="Neither read nor keep the history of typed lines.")
    ] = False,
    runs: Runs = RUNS,
) -> None:
    """Talk to a model in the terminal; /help there lists the commands."""
    from tutelage.references import find

    folder = find(model, "model", runs).path  # before the heavy imports, so that a mistyped name is reported at once
    from tutelage.cli.chat import chat as talk
    from tutelage.engine import Sampling

    sampling = Sampling(max_tokens, temperature=temperature)
    talk(folder, system=system, once=message, sampling=sampling, history=not no_history)


API_KEY = "TUTELAGE_API_KEY"  # environment variable with a key of the server
NETWORK, ACCESS, ENGINE, SPEED, STORE = "Network", "Access", "Engine", "Speed", "Stored responses"


def _option(*names: str, help: str, panel: str, metavar: str | None, **rest: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, **rest)


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Model folders, GGUF files, runs, recipe/stage, or smollm2.")
    ],
    host: Annotated[
        str, _option(help="Address to listen on; other machines reach only what you bind.", panel=NETWORK, metavar="HOST")
    ] = "127.0.0.1",
    port: Annotated[int, _option(help="Port; 0 takes a free one.", panel=NETWORK, metavar="N")] = 8000,
    name: Annotated[
        list[str],
        _option(
            help="Name that clients use, one for each model. Default: the stage's or the folder's name.",
            panel=NETWORK, metavar="NAME",
        ),
    ] = [],  # noqa: B006
    adapter: Annotated[
        list[str],
        _option(help="LoRA to serve on the first model, under its own name. Repeatable.", panel=ENGINE, metavar="NAME=FOLDER"),
    ] = [],  # noqa: B006
    keys: Annotated[
        Path | None, _option(help="File of `tutelage keys`: API keys with scopes and limits.", panel=ACCESS, metavar="FILE")
    ] = None,
    api_key: Annotated[
        list[str],
        _option(
            "--api-key", help=f"API key for inference, without limits. Visible to ps: better set {API_KEY}.", panel=ACCESS,
            metavar="KEY",
        ),
    ] = [],  # noqa: B006
    insecure: Annotated[
        bool, _option("--insecure", help="Listen beyond loopback without a key.", panel=ACCESS, metavar=" ")
    ] = False,
    allow_models: Annotated[
        list[Path],
        _option(help="Folder that keys of scope admin may load models from. Repeatable.", panel=ACCESS, metavar="FOLDER"),
    ] = [],  # noqa: B006
    max_waiting: Annotated[
        int, _option(min=1, help="Waiting answers per model beyond which requests get 429.", panel=NETWORK, metavar="N")
    ] = 256,
    drain_seconds: Annotated[
        float, _option(min=0, help="Seconds that running answers may take after SIGTERM.", panel=NETWORK, metavar="X")
    ] = 30.0,
    engine: Annotated[
        str, _option(help="Inference engine: tutelage; or vllm for GPUs, where it is installed.", panel=ENGINE, metavar="NAME")
    ] = "tutelage",
    slots: Annotated[
        int | None,
        _option(
            min=1, help="Answers of a model generated at a time. Default: 16, or chosen by vLLM.", panel=ENGINE, metavar="N"
        ),
    ] = None,
    max_length: Annotated[
        int | None, _option(help="Longest prompt and answer in tokens. Default: the model's context.", panel=ENGINE, metavar="N")
    ] = None,
    cache_gib: Annotated[
        float, _option(min=0.001, help="Memory in GiB for the KV cache of a model.", panel=ENGINE, metavar="X")
    ] = 2.0,
    device: Annotated[str, _option(help="Device: cpu or cuda.", panel=ENGINE, metavar="NAME")] = "cpu",
    dtype: Annotated[
        str | None,
        _option(
            help="Data type of the weights: float32 (the default), or int8: smaller, faster, a little less exact. With vllm: "
            "stored (the default), auto, float32, bfloat16 or float16.", panel=ENGINE, metavar="NAME",
        ),
    ] = None,
    speculate: Annotated[
        int,
        _option(
            min=0, help="Tokens guessed ahead by looking them up in the text; answers stay the same.", panel=SPEED, metavar="N"
        ),
    ] = 0,
    draft: Annotated[
        str | None,
        _option(help="Smaller model with the same tokenizer that makes the guesses.", panel=SPEED, metavar="MODEL"),
    ] = None,
    prefix_cache: Annotated[
        bool, _option(help="Reuse the KV cache of common prefixes of prompts.", panel=SPEED, metavar=" ")
    ] = True,
    batch_invariant: Annotated[
        bool,
        _option("--batch-invariant", help="Make answers bit-identical whatever else runs.", panel=SPEED, metavar=" "),
    ] = False,
    vllm: Annotated[
        list[str],
        _option(help="Further argument of vLLM, such as tensor_parallel_size=2. Repeatable.", panel=ENGINE, metavar="KEY=VALUE"),
    ] = [],  # noqa: B006
    store: Annotated[
        Path | None,
        _option(help="File that stores the answers of /v1/responses. Default: nothing is stored.", panel=STORE, metavar="FILE"),
    ] = None,
    store_days: Annotated[
        int, _option(min=1, help="Days after which a response that is not continued is deleted.", panel=STORE, metavar="N")
    ] = 30,
    runs: Runs = RUNS,
) -> None:  # fmt: skip
    """Serve models behind the OpenAI API."""
    folders = _named_models(models, name, runs)  # before the heavy imports, so that a mistyped name is reported at once
    adapters = _named_adapters(adapter, folders)
    from tutelage.config.base import parse_set
    from tutelage.references import find
    from tutelage.serve.listen import Options
    from tutelage.serve.listen import serve as listen

    # Not typer's envvar: it takes an empty variable for none, and the server would be open to all.
    api_keys = (*api_key, *((os.environ[API_KEY],) if API_KEY in os.environ else ()))
    options = Options(
        host=host, port=port, keys=keys, api_keys=api_keys, insecure=insecure, allow_models=tuple(allow_models),
        max_waiting=max_waiting, drain_seconds=drain_seconds, slots=slots, max_length=max_length, dtype=dtype,
        speculate=speculate, draft=None if draft is None else find(draft, "model", runs).path, prefix_cache=prefix_cache,
        batch_invariant=batch_invariant, cache_gib=cache_gib, device=device, store=store, store_days=store_days, engine=engine,
        vllm=dict(parse_set(text) for text in vllm),
    )  # fmt: skip
    listen(folders, options, adapters)


def _named_models(models: list[str], names: list[str], runs: Path) -> dict[str, Path]:
    """Folders by the names that clients use. Raises `ConfigError` for names that are not one for each model."""
    from tutelage.errors import ConfigError
    from tutelage.references import find

    found = [find(model, "model", runs) for model in models]
    known = names or [f.name for f in found]
    for name in names:
        _check_name(name, "name")
    if len(known) != len(found) or len(set(known)) != len(known):
        raise ConfigError(
            "every model needs its own name", field="name", found=", ".join(known), expected=f"{len(found)} different names",
            fix="give --name once for each model, in their order",
        )  # fmt: skip
    return {name: f.path for name, f in zip(known, found, strict=True)}


def _check_name(name: str, field: str) -> None:
    """Raises `ConfigError` for a name that could not be given to `POST /admin/models` either."""
    from tutelage.errors import ConfigError
    from tutelage.serve.names import MODEL_NAME

    if not re.fullmatch(MODEL_NAME, name):
        raise ConfigError(
            "not a name for a model", field=field, found=repr(name),
            expected="a letter, digit or _, then up to 127 letters, digits or any of _ . : / @ + -",
            fix="give another, such as my-model",
        )  # fmt: skip


def _named_adapters(given: list[str], models: Collection[str]) -> dict[str, Path]:
    """Folders by the names that clients use. Raises `ConfigError` for one that is no NAME=FOLDER, or whose name is taken."""
    from tutelage.errors import ConfigError

    out: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise ConfigError("an adapter has a name and a folder", field="adapter", found=text, expected="NAME=FOLDER")
        _check_name(name, "adapter")
        if not Path(folder).is_dir():
            raise ConfigError("no such folder", field="adapter", found=folder, expected="a folder that peft wrote")
        if name in out or name in models:
            raise ConfigError("every model and adapter needs its own name", field="adapter", found=name)
        out[name] = Path(folder)
    return out


keys_app = typer.Typer(help="Make, list and remove the API keys of a server.", no_args_is_help=True)
KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="JSON file; it holds hashes, never a key.")]


@keys_app.command("add")
def keys_add(
    file: KeyFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Owner of the key.")],
    scope: Annotated[
        list[str], typer.Option(metavar="SCOPE", help="Scope: inference (the default), metrics or admin. Repeatable.")
    ] = [],  # noqa: B006
    requests_per_minute: Annotated[int | None, typer.Option(metavar="N", help="Requests per minute. Default: no limit.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of prompts and answers per minute. Default: no limit.")
    ] = None,
) -> None:
    """Make a key and print it, this once: it is stored nowhere. A running server accepts it at once."""
    from tutelage.serve.keys import add_key

    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    print(add_key(file, name, scopes=scope or ["inference"], **limits))


@keys_app.command("list")
def keys_list(file: KeyFile) -> None:
    """List the keys: names, scopes, limits."""
    from tutelage.serve.keys import read_keys

    for key in read_keys(file):
        limits = [f"{key.requests_per_minute} requests/min"] if key.requests_per_minute else []
        limits += [f"{key.tokens_per_minute} tokens/min"] if key.tokens_per_minute else []
        made = datetime.fromtimestamp(key.created).date()
        print(f"{key.name}  {','.join(key.scopes)}  {', '.join(limits) or 'no limit'}  made {made}")


@keys_app.command("remove")
def keys_remove(file: KeyFile, name: Annotated[str, typer.Argument(metavar="NAME", help="Owner of the key.")]) -> None:
    """Remove a key. A running server refuses it at once."""
    from tutelage.serve.keys import remove_key

    remove_key(file, name)
