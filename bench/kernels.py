"""Our CPU kernels against torch: attention against scaled_dot_product_attention, each operation against eager torch, and a whole
training step of a small Qwen3 against torch.compile. Interleaved rounds in one process; ratios above 1 mean that ours is faster.

    python bench/kernels.py ops             attention and single operations
    python bench/kernels.py step            eager step with our kernels / torch.compile'd step / eager torch step
    python bench/kernels.py memory --of ours|compiled|eager      peak memory of one kind of step, alone in its process
    python bench/kernels.py profile         where the time of our step goes
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.models import kernels, ops
from tutelage.models.attention import Layout, attend, attend_qkv, layout
from tutelage.models.heads import LmHead

ROWS, LENGTH, LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 16, 512, 6, 256, 4, 2, 64, 768, 4096
EPS, SCALE = 1e-6, HEAD_DIM**-0.5
Weights = dict[str, torch.nn.Parameter]


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; one warm-up round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, run in calls.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(title: str, seconds: dict[str, list[float]], ours: str, peers: list[str]) -> None:
    """One JSON line: median and best milliseconds, and the median of the per-round ratios peer / ours."""
    row: dict[str, object] = {"bench": title}
    for name, times in seconds.items():
        row[f"{name}_ms"] = round(statistics.median(times) * 1e3, 2)
        row[f"{name}_best_ms"] = round(min(times) * 1e3, 2)
    for peer in peers:
        row[f"{peer}/{ours}"] = round(statistics.median(p / o for p, o in zip(seconds[peer], seconds[ours], strict=True)), 2)
    print(json.dumps(row), flush=True)


def rotary() -> tuple[Tensor, Tensor]:
    inverse = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(LENGTH)[:, None] * inverse
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def documents(width: int) -> Tensor:
    """Segments of rows packed with documents of `width` tokens."""
    return (torch.arange(LENGTH) // width + 1).int().expand(ROWS, LENGTH).contiguous()


def bench_attention(rounds: int) -> None:
    q, k, v = (torch.randn(ROWS, LENGTH, h, HEAD_DIM, requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS))
    grad = torch.randn(ROWS, LENGTH, HEADS, HEAD_DIM)
    turned = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))

    def sdpa() -> None:
        a, b, c = turned
        out = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, turned, grad.transpose(1, 2))

    def own(where: Layout) -> None:
        torch.autograd.grad(attend(q, k, v, where, scale=SCALE), (q, k, v), grad)

    def regrouped(where: Layout) -> None:
        with kernels.disabled():
            own(where)

    full, packed = layout(torch.ones(ROWS, LENGTH, dtype=torch.int32)), layout(documents(128))
    seconds = interleaved({"ours": lambda: own(full), "sdpa": sdpa}, rounds)
    report(f"attention forward+backward {ROWS}x{LENGTH} causal", seconds, "ours", ["sdpa"])
    calls = {"ours": lambda: own(packed), "torch_regrouped": lambda: regrouped(packed), "sdpa_full": sdpa}
    report("attention, packed 128-token documents", interleaved(calls, rounds), "ours", ["torch_regrouped", "sdpa_full"])


def bench_ops(rounds: int) -> None:
    tokens = ROWS * LENGTH
    cos, sin = rotary()
    x, weight, head = torch.randn(tokens, HIDDEN), torch.randn(HIDDEN), torch.randn(HEAD_DIM)
    q, k = torch.randn(ROWS, LENGTH, HEADS, HEAD_DIM), torch.randn(ROWS, LENGTH, KV_HEADS, HEAD_DIM)
    gate_up, table = torch.randn(tokens, 2 * INNER), torch.randn(VOCABULARY, HIDDEN) * 0.02
    ids = torch.randint(VOCABULARY, (tokens,))

    def case(title: str, run: Callable[..., Tensor], *inputs: Tensor) -> None:
        leaves = [t.clone().requires_grad_() for t in inputs]

        def step() -> None:
            out = run(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        def plain() -> None:
            with kernels.disabled():
                step()

        report(title, interleaved({"ours": step, "torch": plain}, rounds), "ours", ["torch"])

    case("rms_norm", lambda x, w: ops.rms_norm(x, w, EPS), x, weight)
    case("qk_norm_rope", lambda q, k, a, b: torch.cat(ops.qk_norm_rope(q, k, a, b, EPS, cos, sin), 2), q, k, head, head)
    case("silu_mul", ops.silu_mul, gate_up)
    case("embedding", lambda w: ops.embedding(ids, w), table)

    lm_head = LmHead(torch.nn.Parameter(table))

    def loss(h: Tensor) -> Tensor:
        return lm_head(h, ids, torch.ones(tokens))

    case("head loss", loss, x)


def new_weights(seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    w: dict[str, Tensor] = {"embed": torch.randn(VOCABULARY, HIDDEN) * 0.02, "norm": torch.ones(HIDDEN)}
    for i in range(LAYERS):
        w |= {f"norm1.{i}": torch.ones(HIDDEN), f"norm2.{i}": torch.ones(HIDDEN)}
        w |= {f"q_norm.{i}": torch.ones(HEAD_DIM), f"k_norm.{i}": torch.ones(HEAD_DIM)}
        w |= {f"qkv.{i}": torch.randn(width, HIDDEN) * 0.02, f"out.{i}": torch.randn(HIDDEN, HEADS * HEAD_DIM) * 0.02}
        w |= {f"gate_up.{i}": torch.randn(2 * INNER, HIDDEN) * 0.02, f"down.{i}": torch.randn(HIDDEN, INNER) * 0.02}
    return {name: torch.nn.Parameter(x) for name, x in w.items()}


def own_trunk(w: Weights, ids: Tensor, where: Layout, turns: tuple[Tensor, Tensor]) -> Tensor:
    x = ops.embedding(ids, w["embed"])
    for i in range(LAYERS):
        qkv = ops.norm_linear(x, w[f"norm1.{i}"], EPS, [w[f"qkv.{i}"]])
        norms = (w[f"q_norm.{i}"], w[f"k_norm.{i}"])
        mixed = attend_qkv(qkv, where, (HEADS, KV_HEADS), scale=SCALE, norms=norms, eps=EPS, turns=turns)
        x = F.linear(mixed, w[f"out.{i}"]).add_(x)
        gate_up = ops.norm_linear(x, w[f"norm2.{i}"], EPS, [w[f"gate_up.{i}"]])
        x = ops.silu_mul_linear(gate_up, w[f"down.{i}"]).add_(x)
    return ops.rms_norm(x, w["norm"], EPS)


def torch_trunk(w: Weights, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same model in plain torch, written the way torch.compile likes it."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    b, t = ids.shape
    x = F.embedding(ids, w["embed"])
    for i in range(LAYERS):
        qkv = F.linear(norm(x, w[f"norm1.{i}"]), w[f"qkv.{i}"]).view(b, t, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 2)
        q, k = turn(norm(q, w[f"q_norm.{i}"])), turn(norm(k, w[f"k_norm.{i}"]))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, HEADS * HEAD_DIM), w[f"out.{i}"])
        gate, up = F.linear(norm(x, w[f"norm2.{i}"]), w[f"gate_up.{i}"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, w[f"down.{i}"])
    return norm(x, w["norm"])


class Step:
    """A whole training step: forward, backward, clipping, AdamW. `kind` is ours, compiled or eager."""

    def __init__(self, kind: str, micro: int, segments: Tensor, ids: Tensor) -> None:
        self.kind, self.micro, self.ids = kind, micro, ids
        self.weights = new_weights()
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=1e-3, weight_decay=0.1, fused=True)
        self.turns = rotary()
        self.segments = segments
        self.head = LmHead(self.weights["embed"])
        self.trunk = torch.compile(torch_trunk, dynamic=False) if kind == "compiled" else torch_trunk

    def loss(self, ids: Tensor, segments: Tensor) -> Tensor:
        targets = ids.roll(-1, 1)
        supervised = F.pad((segments[:, 1:] == segments[:, :-1]).float(), (0, 1))
        if self.kind == "ours":
            hidden = own_trunk(self.weights, ids, layout(segments), self.turns)
            return self.head(hidden.flatten(0, 1), targets.flatten(), supervised.flatten()) / self.ids.numel()
        hidden = self.trunk(self.weights, ids, *self.turns).flatten(0, 1)
        logits = F.linear(hidden, self.weights["embed"])
        return (F.cross_entropy(logits, targets.flatten(), reduction="none") * supervised.flatten()).sum() / self.ids.numel()

    def __call__(self) -> float:
        total = 0.0
        for ids, segments in zip(self.ids.split(self.micro), self.segments.split(self.micro), strict=True):
            loss = self.loss(ids, segments)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def bench_step(rounds: int, micros: list[int]) -> None:
    ids, segments = torch.randint(VOCABULARY, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.int32)
    steps = {f"ours_micro{m}": Step("ours", m, segments, ids) for m in micros}
    steps |= {kind: Step(kind, ROWS, segments, ids) for kind in ("compiled", "eager")}
    seconds = interleaved(dict(steps), rounds)
    for m in micros:
        ours = f"ours_micro{m}"
        chosen = {name: seconds[name] for name in (ours, "compiled", "eager")}
        report(f"training step {ROWS}x{LENGTH}", chosen, ours, ["compiled", "eager"])
    print({name: round(step(), 4) for name, step in steps.items()})


def bench_memory(kind: str, micro: int, rounds: int) -> None:
    step = Step(kind, micro, torch.ones(ROWS, LENGTH, dtype=torch.int32), torch.randint(VOCABULARY, (ROWS, LENGTH)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(rounds):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"bench": "memory", "of": kind, "micro": micro, "before_mb": round(before), "peak_mb": round(peak)}))


def profile(micro: int) -> None:
    step = Step("ours", micro, torch.ones(ROWS, LENGTH, dtype=torch.int32), torch.randint(VOCABULARY, (ROWS, LENGTH)))
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as prof:
        step()
    print(
        prof.key_averages(group_by_input_shape=True).table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=40)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ops", "step", "memory", "profile"))
    parser.add_argument("--of", default="ours", choices=("ours", "compiled", "eager"))
    parser.add_argument("--micro", type=int, nargs="+", default=[ROWS], help="rows per forward and backward pass")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assert kernels.available(), kernels.why_not()
    if args.what == "ops":
        bench_attention(args.rounds)
        bench_ops(args.rounds)
    elif args.what == "step":
        bench_step(args.rounds, args.micro)
    elif args.what == "memory":
        bench_memory(args.of, args.micro[0], args.rounds)
    else:
        profile(args.micro[0])


if __name__ == "__main__":
    main()
