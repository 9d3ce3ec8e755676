"""Prometheus metrics of one server.

Histograms are of calls over HTTP; gauges and totals are read from the engine when they are scraped.
Names are SGLang's (`sglang:...`); the three gauges that routers of Kubernetes' gateway extension
read have vLLM's names, too.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serve.engine.request import Output, Request
from serve.frontend.client import EngineClient

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """All metrics of a server, labeled with the name of its model."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model_name))
        names = ["model_name"]

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"sglang:{name}", text, names, registry=self.registry, buckets=buckets
            ).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"sglang:{name}", text, names, registry=self.registry).labels(model_name)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From the call to its first token", _LONG
        )
        self.per_token = histogram(
            "time_per_output_token_seconds", "Mean time per token after the first", _SHORT
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice", _SHORT
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From the call to the end of a choice", _LONG
        )
        self.generated = counter("generation_tokens", "Generated tokens")
        self.finished = counter("num_requests", "Choices that finished")
        self.aborted = counter("num_aborted_requests", "Choices that the client or a call ended")
        self.failed = counter("num_failed_requests", "Choices that ended with an error")

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self.engine = engine
        self.model_name = model_name

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats, inputs = self.engine.stats(), self.engine.inputs
        n_running, n_waiting, used = stats.n_running, stats.n_waiting, stats.token_usage
        grammars = inputs.grammars
        n_compiled, n_hits = (grammars.n_compiled, grammars.n_cached) if grammars else (0, 0)
        for name, text, value in (
            ("sglang:num_running_reqs", "Requests computed together", n_running),
            ("sglang:num_queue_reqs", "Requests that wait", n_waiting),
            ("sglang:token_usage", "Share of the KV cache that requests use", used),
            ("sglang:cache_hit_rate", "Cached share of prompt tokens", stats.hit_rate),
            ("sglang:max_total_num_tokens", "Size of the KV cache", inputs.info.capacity),
            ("vllm:num_requests_running", "Requests computed together", n_running),
            ("vllm:num_requests_waiting", "Requests that wait", n_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache that requests use", used),
        ):
            yield self._one(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        for name, text, value in (
            ("sglang:prompt_tokens", "Prompt tokens of admitted requests", stats.n_prompt_tokens),
            ("sglang:cached_tokens", "Those found in the prefix cache", stats.n_cached_tokens),
            ("sglang:num_retractions", "Requests retracted", stats.n_retracted),
            (
                "sglang:num_jump_forward_tokens",
                "Tokens without a forward pass each",
                stats.n_jumped,
            ),
            ("sglang:num_grammar", "Grammars compiled or refused", n_compiled),
            ("sglang:num_grammar_cache_hit", "Requests whose grammar was cached", n_hits),
        ):
            yield self._one(CounterMetricFamily(name, text, labels=["model_name"]), value)
        yield self._expert_load()

    def _expert_load(self) -> Metric:
        """One value per layer, not per expert: a model may have 10,000 of them."""
        family = GaugeMetricFamily(
            "phalanx:expert_load_max_to_mean",
            "Tokens of the busiest expert of a layer, relative to the mean of its experts",
            labels=["model_name", "layer"],
        )
        layers = self.engine.inputs.info.moe_layers
        for layer, counts_E in zip(layers, self.engine.expert_counts(), strict=True):
            if total := int(counts_E.sum()):
                ratio = int(counts_E.max()) * len(counts_E) / total
                family.add_metric([self.model_name, str(layer)], ratio)
        return family

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self.model_name], value)
        return family


class CallTimes:
    """Measures one call. Used in the event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.begun = time.monotonic()
        self.first: dict[Request, float] = {}
        self.last: dict[Request, float] = {}
        self.left: set[Request] = set()

    def begin(self, requests: Sequence[Request]) -> None:
        self.left = set(requests)

    def add(self, output: Output) -> None:
        now, request, metrics = time.monotonic(), output.request, self.metrics
        if output.tokens:
            metrics.generated.inc(len(output.tokens))
            if request not in self.first:
                self.first[request] = now
                if len(self.first) == 1:
                    metrics.first_token.observe(now - self.begun)
            else:
                metrics.inter_token.observe(now - self.last[request])
            self.last[request] = now
        if output.finish_reason == "cancelled":
            self.left.discard(request)
            metrics.aborted.inc()
        elif output.finish_reason is not None:
            self.left.discard(request)
            metrics.finished.inc()
            metrics.whole.observe(now - self.begun)
            if request.n_output > 1:
                metrics.per_token.observe((now - self.first[request]) / (request.n_output - 1))

    def fail(self, request: Request) -> None:
        self.metrics.failed.inc()
        self.left.discard(request)

    def close(self) -> None:
        """The requests that did not finish were aborted."""
        self.metrics.aborted.inc(len(self.left))
        self.left.clear()
