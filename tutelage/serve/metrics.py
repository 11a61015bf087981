"""What a server tells Prometheus. Names, labels and buckets are vLLM's, so that dashboards made for it work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tutelage.serve.engine_thread import Meter

if TYPE_CHECKING:
    from tutelage.serve.registry import Base

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REASONS = ("stop", "length", "abort", "error")
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
NEXT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LABEL = ["model_name"]


class Metrics:
    """All metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were read.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self.success = Counter(
            "vllm:request_success", "Answers that ended, by reason.", [*LABEL, "finished_reason"], registry=self.registry
        )
        self.replies = Counter("http_requests", "Requests that were answered, by status.", ["status"], registry=self.registry)
        self.first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN)
        self.next_token = self._histogram("inter_token_latency_seconds", "From one token to the next.", NEXT_TOKEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.", REQUEST)
        self.queue = self._histogram("request_queue_time_seconds", "From the request to the step that took it up.", REQUEST)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABEL, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, LABEL, buckets=buckets, registry=self.registry)

    def count_reply(self, status: int) -> None:
        self.replies.labels(str(status)).inc()

    def watch(self, models: Callable[[], Iterable[Base]]) -> None:
        """Adds what is read from the engines themselves at every scrape."""
        self.registry.register(_Live(models))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class ModelMeter(Meter):
    """Counts for one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._generation_tokens = metrics.generation_tokens.labels(model)
        self._success = lambda reason: metrics.success.labels(model, reason)
        for reason in REASONS:
            self._success(reason)  # there from the start, at 0
        self._first_token = metrics.first_token.labels(model)
        self._next_token = metrics.next_token.labels(model)
        self._whole = metrics.whole.labels(model)
        self._queue = metrics.queue.labels(model)

    def started(self, waited: float) -> None:
        self._queue.observe(waited)

    def first_token(self, since_asked: float, prompt_tokens: int) -> None:
        self._first_token.observe(since_asked)
        self._prompt_tokens.inc(prompt_tokens)

    def next_token(self, since_last: float) -> None:
        self._next_token.observe(since_last)

    def generated(self, tokens: int) -> None:
        self._generation_tokens.inc(tokens)

    def embedded(self, waited: float, since_asked: float, prompt_tokens: int) -> None:
        """As vLLM counts its pooling requests: each text is a request whose first token is its last, with reason "stop"."""
        self.started(waited)
        self.first_token(since_asked, prompt_tokens)
        self.finished("stop", since_asked)

    def scored(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def finished(self, reason: str, since_asked: float) -> None:
        self._success(reason).inc()
        self._whole.observe(since_asked)


class _Live(Collector):
    def __init__(self, models: Callable[[], Iterable[Base]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Answers in the batch.", labels=LABEL)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Answers that wait for a place.", labels=LABEL)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Key-value cache in use; 1 is all of it.", labels=LABEL)
        queries = CounterMetricFamily("vllm:prefix_cache_queries", "Prompt tokens looked up.", labels=LABEL)
        hits = CounterMetricFamily("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", labels=LABEL)
        preempted = CounterMetricFamily("vllm:num_preemptions", "Answers that had to wait again for memory.", labels=LABEL)
        for served in self._models():
            label, engine = [served.name], served.thread.engine
            running.add_metric(label, served.thread.running)
            waiting.add_metric(label, served.thread.waiting)
            usage.add_metric(label, engine.cache_usage)
            queries.add_metric(label, engine.prefix_cache_queries)
            hits.add_metric(label, engine.prefix_cache_hits)
            preempted.add_metric(label, engine.preemptions)
        yield from (running, waiting, usage, queries, hits, preempted)
