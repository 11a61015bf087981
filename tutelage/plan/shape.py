"""The size dial: from a number of parameters to a shape, a batch, learning rates and a token budget, each with its reason."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from tutelage.errors import ConfigError
from tutelage.plan.config_json import check_types
from tutelage.plan.flops import train_flops_per_token
from tutelage.plan.parameters import Shape, count_config

if TYPE_CHECKING:
    from rich.table import Table

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
TRAINING = (
    "sequence_length", "tokens", "batch_tokens", "steps", "lr", "matrix_lr", "embedding_lr", "weight_decay", "warmup_steps",
)  # fmt: skip
ROUNDED = 0.05  # a shape further off than this share of the asked size is told to be the nearest


@lru_cache(maxsize=1)
def dial() -> dict[str, Any]:
    """The numbers behind the derivations, from dial.yaml."""
    text = files("tutelage.plan").joinpath("dial.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


@dataclass(frozen=True, slots=True)
class Derived:
    """What a size stands for.

    Example:
        >>> derive("5.8m", 4096).architecture["hidden_size"]
        256
    """

    values: dict[str, Any]  # `architecture`, a config.json object; and the names in `TRAINING`
    because: dict[str, str]  # of each value and each derived key of the architecture: how it came about
    given: frozenset[str] = field(default_factory=frozenset)  # names that were not derived but given

    @property
    def architecture(self) -> dict[str, Any]:
        found: dict[str, Any] = self.values["architecture"]
        return found

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, reason) of everything; what was given is marked with an asterisk."""
        flat = {**self.architecture, **{k: v for k, v in self.values.items() if k != "architecture"}}
        rows = []
        for name, value in flat.items():
            if name in self.because:
                rows.append((name + ("*" if name in self.given else ""), _show(value), self.because[name]))
        rows.append(("parameters", f"{count_config(self.architecture).total:,}", self.because["parameters"]))
        return rows

    def table(self) -> Table:
        """The derivation, for people."""
        from rich.table import Table

        table = Table("name", "value", "because", title="derived (* given)", title_justify="left")
        for row in self.rows():
            table.add_row(*row)
        return table


def _show(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def parse_size(size: str | int | float) -> float:
    """Parameters asked for: "3m", "5.8m", "1b", "350k", "5771264". Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmb]?)\s*", str(size).lower())
    if match and float(match[1]) * UNITS[match[2]] >= 1000:
        return float(match[1]) * UNITS[match[2]]
    raise ConfigError("not a model size", field="size", found=size, expected="a number and k, m or b, such as 3m, 125m, 1b")


def optimal_tokens(parameters: float) -> float:
    """Tokens at which neither more parameters nor more data would have been the better use of the FLOPs."""
    law = dial()["scaling_law"]
    return float((law["b"] * law["B"] / (law["a"] * law["A"]) * parameters ** law["a"]) ** (1 / law["b"]))


def derive(
    size: str,
    vocab_size: int,
    *,
    architecture: Mapping[str, Any] | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    corpus_tokens: int | None = None,
    flops_per_second: float | None = None,
    **given: Any,
) -> Derived:
    """Everything that `size` stands for; `given` (names in `TRAINING`) and `architecture` (config.json keys) win.

    The budget is `tokens`, or `minutes` at `flops_per_second` (sustained, not peak), or `epochs` over `corpus_tokens`, or the
    compute-optimal one, held to four passes where `corpus_tokens` says how much text there is. Raises `ConfigError`.
    """
    unknown = [name for name in given if name not in TRAINING]
    if unknown:
        near = difflib.get_close_matches(unknown[0], TRAINING, n=1)
        raise ConfigError(
            f"unknown key `{unknown[0]}`", field=unknown[0], expected=f"one of: {', '.join(TRAINING)}",
            fix=f"did you mean `{near[0]}`?" if near else None,
        )  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    because: dict[str, str] = {}
    shape = find_shape(size, vocab_size, architecture or {}, because)
    parameters = count_config(shape).total
    values: dict[str, Any] = {"architecture": shape}

    def settle(name: str, value: Any, reason: str) -> Any:
        values[name] = given.get(name, value)
        because[name] = "given" if name in given else reason
        return values[name]

    row = settle("sequence_length", _step(dial()["sequence_length"], parameters), f"for {parameters / 1e6:,.1f}M parameters")
    if "max_position_embeddings" in shape and "max_position_embeddings" not in (architecture or {}):
        shape["max_position_embeddings"] = row
        because["max_position_embeddings"] = "the sequence length: positions that training reaches"
    asked = {k: v for k, v in (("tokens", given.get("tokens")), ("minutes", minutes), ("epochs", epochs)) if v is not None}
    if len(asked) > 1:
        raise ConfigError("the budget is given twice", field=", ".join(asked), expected="tokens, minutes or epochs")
    if "steps" in given and not asked:
        budget, reason = _tokens_of_steps(given["steps"], parameters, given.get("batch_tokens")), "steps x batch_tokens"
    else:
        budget, reason = _budget(shape, row, asked, corpus_tokens, flops_per_second)
    settle("tokens", budget, reason)
    _training(values, settle, shape, parameters)
    if "steps" in given and not asked:
        values["tokens"] = given["steps"] * values["batch_tokens"]
    names = frozenset(given) | frozenset(architecture or {})
    return Derived(values, because, names)


def _budget(shape: dict[str, Any], row: int, asked: dict[str, float], corpus: int | None, rate: float | None) -> tuple[int, str]:
    if "tokens" in asked:
        return int(asked["tokens"]), "given"
    if "minutes" in asked:
        if rate is None:
            raise ConfigError(
                "a budget in minutes needs the machine's rate", field="minutes", fix="give tokens or epochs instead"
            )
        per_token = train_flops_per_token(shape, row)
        count = asked["minutes"] * 60 * rate / per_token
        return int(
            count
        ), f"{asked['minutes']:g} min x {rate / 1e9:,.0f} GFLOP/s sustained / {per_token / 1e6:,.1f} MFLOP a token"
    if "epochs" in asked:
        if corpus is None:
            raise ConfigError(
                "a budget in epochs needs the number of tokens in the data", field="epochs", fix="give tokens instead"
            )
        return int(asked["epochs"] * corpus), f"{asked['epochs']:g} epochs x {corpus:,} tokens of data"
    parameters = count_config(shape).total
    best = optimal_tokens(parameters)
    text = f"compute-optimal: {best / parameters:.1f} tokens a parameter (Besiroglu et al. 2024)"
    repeats = dial()["repeats"]
    if corpus is not None and best > repeats * corpus:
        return repeats * corpus, f"{repeats} passes over {corpus:,} tokens of data; {text} would be {best:,.0f} tokens"
    return int(best), text


def _tokens_of_steps(steps: int, parameters: int, batch: int | None) -> int:
    """Tokens of a number of steps; where the batch is open it solves batch = factor (6 N steps batch)^power."""
    rule = dial()["batch"]
    free = (rule["factor"] * (6.0 * parameters * steps) ** rule["power"]) ** (1 / (1 - rule["power"]))
    return int(steps * (batch or min(free, rule["most_tokens"])))


def _training(values: dict[str, Any], settle: Any, shape: dict[str, Any], parameters: int) -> None:
    """Batch, steps and rates from the training FLOPs of the budget."""
    table, row, tokens = dial(), values["sequence_length"], values["tokens"]
    compute = 6.0 * parameters * tokens
    rule = table["batch"]
    wanted = rule["factor"] * compute ** rule["power"]
    rows = max(rule["least_rows"], 2 ** round(math.log2(max(1.0, min(wanted, rule["most_tokens"]) / row))))
    while rows > rule["least_rows"] and tokens / (rows * row) < rule["least_steps"]:
        rows //= 2
    batch = settle(
        "batch_tokens", int(rows * row),
        f"{rule['factor']} x ({compute:.2g} FLOPs)^{rule['power']} = {wanted:,.0f} (DeepSeek LLM 2024), as {rows} rows of {row}",
    )  # fmt: skip
    steps = settle("steps", max(1, math.ceil(tokens / batch)), "tokens / batch_tokens")
    rule = table["lr"]
    free = rule["factor"] * compute ** rule["power"]
    lr = settle(
        "lr", round(min(free, rule["most"]), 6),
        f"{rule['factor']} x FLOPs^{rule['power']} = {free:.2g} (DeepSeek LLM 2024), at most {rule['most']:g}; for AdamW",
    )  # fmt: skip
    rule, width = table["matrix_lr"], Shape.of(shape).hidden
    ratio = lr / round(min(free, table["lr"]["most"]), 6)  # 1 unless lr is given
    text = f"{rule['factor']} x width^{rule['power']}: 0.02 on an orthogonal update (Jordan et al. 2024) at RMS 0.2; for Muon"
    if ratio != 1:
        text = f"{ratio:.3g} x ({text}), as lr is {ratio:.3g} x its derived value"
    settle("matrix_lr", round(rule["factor"] * width ** rule["power"] * ratio, 10 if ratio != 1 else 6), text)
    factor = table["embedding_lr"]["factor"]
    settle("embedding_lr", round(lr * factor, 6) if ratio == 1 else lr * factor, f"{factor:g} x lr")
    settle("weight_decay", table["weight_decay"], "matrices only")
    rule = table["warmup"]
    warmup = min(max(rule["least_steps"], round(rule["share"] * steps)), rule["most_steps"], max(1, steps // 2))
    settle("warmup_steps", warmup, f"{rule['share']:.0%} of the steps, {rule['least_steps']} to {rule['most_steps']}")


# Shape search


def is_complete(config: Mapping[str, Any]) -> bool:
    """True when nothing of a config.json is left to derive, as in that of a checkpoint."""
    try:
        Shape.of(config)
    except ConfigError:
        return False
    return "vocab_size" in config or "text_config" in config


def find_shape(size: str, vocab_size: int, fixed: Mapping[str, Any], because: dict[str, str]) -> dict[str, Any]:
    """The config.json object nearest to `size` parameters, embedding included, with usual proportions.

    Raises `ConfigError` when no shape is within 10%, which is so when the token table alone is too big for the size.
    """
    check_types({**dial()["family"], **fixed}, None, "architecture.", ConfigError)
    if is_complete(fixed):
        counts = count_config(fixed)
        because["parameters"] = f"given; {counts.embedding + counts.head:,} in token table and head"
        return dict(fixed)
    target, rules = parse_size(size), dial()["shape"]
    best: dict[str, Any] | None = None
    least = math.inf
    for width, layers in _grid(fixed, rules):
        found = _fill(width, layers, target, vocab_size, fixed, rules)
        cost = _cost(found, target, rules)
        if cost < least:
            best, least = found, cost
    assert best is not None, "an empty grid of shapes"
    counts = count_config(best)
    off = counts.total / target - 1
    pinned = {"hidden_size", "num_hidden_layers", "intermediate_size"} & set(fixed)
    if abs(off) > rules["tolerance"] and not pinned:
        raise ConfigError(
            f"no shape of {size} parameters with a vocabulary of {vocab_size:,}", field="size", found=size,
            expected=f"within {rules['tolerance']:.0%}; the nearest has {counts.total:,} ({counts.embedding:,} token table)",
            fix="take a smaller vocabulary or a larger size",
        )  # fmt: skip
    _explain_shape(best, fixed, because, rules)
    nearest = ", the nearest shape" if abs(off) > ROUNDED else ""
    because["parameters"] = (
        f"{off:+.1%} of {size}{nearest}, token table included ({counts.embedding + counts.head:,} with the head; "
        f"{counts.without_embedding:,} in the layers)"
    )
    return best


def _grid(fixed: Mapping[str, Any], rules: dict[str, Any]) -> Iterator[tuple[int, int]]:
    widths: list[int] = []
    width = 64
    while width <= rules["width_most"]:
        widths.append(width)
        width += next(step for below, step in rules["width_step"] if below is None or width < below)
    first, last = rules["layers"]
    pinned = "hidden_size" in fixed or "num_hidden_layers" in fixed
    for w in [fixed["hidden_size"]] if "hidden_size" in fixed else widths:
        for n in [fixed["num_hidden_layers"]] if "num_hidden_layers" in fixed else range(first, last + 1):
            if pinned or abs(math.log(w / n / _aspect(w, rules))) < rules["aspect"]["most_off"]:
                yield w, n


def _fill(width: int, layers: int, target: float, vocab: int, fixed: Mapping[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """A whole config.json object for a width and a depth; the feed-forward width takes up what the grid leaves."""
    head_dim = fixed.get("head_dim") or _step(rules["head_dim"], width)
    heads = fixed.get("num_attention_heads") or max(1, width // head_dim)
    found: dict[str, Any] = {
        **dial()["family"],
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(heads, rules),
        "head_dim": head_dim,
        "intermediate_size": 64,
        "tie_word_embeddings": target < rules["tied_below"],
        "max_position_embeddings": 0,
        "rope_theta": 10000.0,
        **fixed,
    }
    if "intermediate_size" not in fixed:
        mlp = rules["mlp"]
        rest = target - count_config({**found, "intermediate_size": 0, "max_position_embeddings": 1}).total
        free = rest / (layers * 3 * width)
        least, most = (64 * max(1, round(mlp[k] * width / 64)) for k in ("least", "most"))
        found["intermediate_size"] = min(max(64 * round(free / 64), least), most)
    found["max_position_embeddings"] = fixed.get("max_position_embeddings", 2048)
    return found


def _kv_heads(heads: int, rules: dict[str, Any]) -> int:
    """A divisor of `heads`: half of them, or from 16 heads on the one nearest to 8."""
    half = max(1, int(heads * rules["kv_heads"]["share"]))
    about = min(half, rules["kv_heads"]["about"])
    divisors = [d for d in range(1, half + 1) if heads % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / about)))


def _cost(found: dict[str, Any], target: float, rules: dict[str, Any]) -> float:
    width, layers, scale = found["hidden_size"], found["num_hidden_layers"], rules["scale"]
    miss = {
        "size": math.log(count_config(found).total / target),
        "aspect": math.log(width / layers / _aspect(width, rules)),
        "mlp": math.log(found["intermediate_size"] / width / rules["mlp"]["ratio"]),
    }
    return sum((value / scale[name]) ** 2 for name, value in miss.items())


def _aspect(width: int, rules: dict[str, Any]) -> float:
    a = rules["aspect"]
    return float(a["ratio"] * (width / a["at_width"]) ** a["power"])


def _step(table: list[list[Any]], value: float) -> Any:
    return next(found for below, found in table if below is None or value < below)


def _explain_shape(shape: dict[str, Any], fixed: Mapping[str, Any], because: dict[str, str], rules: dict[str, Any]) -> None:
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    reasons = {
        "model_type": "the default family",
        "vocab_size": "of the tokenizer",
        "hidden_size": f"searched with the depth: width / layers = {width / layers:.0f}, usual here {_aspect(width, rules):.0f}",
        "num_hidden_layers": "searched with the width",
        "num_attention_heads": "width / head_dim",
        "num_key_value_heads": "half of the heads, about 8 in wide models",
        "head_dim": "32 below width 256, 128 from 2048 on, else 64",
        "intermediate_size": f"{shape['intermediate_size'] / width:.2f} x width (3 is usual), chosen to meet the size",
        "tie_word_embeddings": "head and token table are one below 5b parameters",
        "rope_theta": "for short contexts",
    }
    for name, reason in reasons.items():
        because[name] = "given" if name in fixed else reason
    for name in fixed:
        because[name] = "given"
