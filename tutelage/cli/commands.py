"""Commands that use a model: chat, serve, and the keys of a server."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.options import RUNS, Runs


def chat(
    model: Annotated[str, typer.Argument(help="a model folder, a GGUF file, a run, recipe/stage, or smollm2")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="ask once, print the answer, leave")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 128,
    no_history: Annotated[bool, typer.Option("--no-history", help="neither read nor keep what is typed")] = False,
    runs: Runs = RUNS,
) -> None:
    """Talk to a model in the terminal; /help there lists the commands."""
    from tutelage.rundir import find

    folder = find(model, "model", runs).path  # before the heavy imports, so that a mistyped name is told at once
    from tutelage.cli.chat import chat as talk
    from tutelage.engine import Sampling

    sampling = Sampling(max_tokens, temperature=temperature)
    talk(folder, system=system, once=message, sampling=sampling, history=not no_history)


API_KEY = "TUTELAGE_API_KEY"  # environment variable with a key of the server


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="model folders, GGUF files, runs, recipe/stage, or smollm2")
    ],
    host: Annotated[str, typer.Option(help="address to listen on; other machines reach only what you bind")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one")] = 8000,
    name: Annotated[
        list[str], typer.Option(help="what clients call a model, one for each; default: the stage's or the folder's name")
    ] = [],  # noqa: B006
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME=FOLDER", help="serve the first model with this LoRA too, under a name of its own")
    ] = [],  # noqa: B006
    keys: Annotated[Path | None, typer.Option(help="a file of `tutelage keys`: who may do what, and how much")] = None,
    api_key: Annotated[
        list[str], typer.Option("--api-key", help=f"a key without limits for inference; ps shows it: better set {API_KEY}")
    ] = [],  # noqa: B006
    insecure: Annotated[bool, typer.Option("--insecure", help="listen beyond loopback without a key")] = False,
    allow_models: Annotated[
        list[Path], typer.Option(metavar="FOLDER", help="let keys of scope admin load models from here")
    ] = [],  # noqa: B006
    max_waiting: Annotated[int, typer.Option(min=1, help="requests get 429 while so many answers of their model wait")] = 256,
    drain_seconds: Annotated[float, typer.Option(min=0, help="how long answers may go on after SIGTERM")] = 30.0,
    engine: Annotated[str, typer.Option(help="tutelage; or vllm, where it is installed: for GPUs")] = "tutelage",
    slots: Annotated[
        int | None, typer.Option(min=1, help="answers of a model that run at a time; default: 16, or as vLLM sees fit")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of prompt and answer; default: the model's context")] = None,
    cache_gib: Annotated[
        float, typer.Option(min=0.001, help="memory for the keys and values of a model's running answers")
    ] = 2.0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 (the default), or int8: smaller, faster, a little less exact; "
            "vllm: stored (the default), auto, float32, bfloat16, float16"
        ),
    ] = None,
    speculate: Annotated[
        int, typer.Option(min=0, help="tokens guessed ahead by looking them up in the text; changes nothing")
    ] = 0,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a smaller model with the same tokenizer, which makes the guesses")
    ] = None,
    prefix_cache: Annotated[bool, typer.Option(help="start prompts from what earlier ones have in common with them")] = True,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="answers do not depend on what else runs, to the bit")
    ] = False,
    vllm: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="another argument of vLLM, such as tensor_parallel_size=2")
    ] = [],  # noqa: B006
    store: Annotated[
        Path | None, typer.Option(help="a file that keeps what /v1/responses answers; default: nothing is kept")
    ] = None,
    store_days: Annotated[int, typer.Option(min=1, help="days to keep a response that is not continued any more")] = 30,
    runs: Runs = RUNS,
) -> None:
    """Serve models behind the OpenAI API."""
    folders = _named_models(models, name, runs)  # before the heavy imports, so that a mistyped name is told at once
    adapters = _named_adapters(adapter, folders)
    from tutelage.config.base import parse_set
    from tutelage.rundir import find
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
    from tutelage.rundir import find

    found = [find(model, "model", runs) for model in models]
    known = names or [f.name for f in found]
    for name in names:
        _check_name(name, "name")
    if len(known) != len(found) or len(set(known)) != len(known):
        raise ConfigError(
            "every model needs a name of its own", field="name", found=", ".join(known), expected=f"{len(found)} different names",
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
            raise ConfigError("every model and adapter needs a name of its own", field="adapter", found=name)
        out[name] = Path(folder)
    return out


keys_app = typer.Typer(help="Make, list and remove the API keys of a server.", no_args_is_help=True)
KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="a JSON file; it holds hashes, never a key")]


@keys_app.command("add")
def keys_add(
    file: KeyFile,
    name: Annotated[str, typer.Argument(help="whose key it is")],
    scope: Annotated[list[str], typer.Option(help="inference (the default), metrics or admin; repeat it for more")] = [],  # noqa: B006
    requests_per_minute: Annotated[int | None, typer.Option(help="default: no limit")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="of prompts and answers together; default: no limit")] = None,
) -> None:
    """Make a key and print it: this once, it is kept nowhere. A running server takes it at once."""
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
def keys_remove(file: KeyFile, name: Annotated[str, typer.Argument(help="whose key it is")]) -> None:
    """Take a key away. A running server forgets it at once."""
    from tutelage.serve.keys import remove_key

    remove_key(file, name)
