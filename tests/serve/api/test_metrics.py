"""The metrics of the server: their names, which dashboards use, and what they count."""

import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from tests.serve.conftest import RunningServer, run_server

LIVENESS_S = 60.0
NAMES = {
    "phalanx:expert_load_max_to_mean": "gauge",
    "sglang:num_running_reqs": "gauge",
    "sglang:num_queue_reqs": "gauge",
    "sglang:token_usage": "gauge",
    "sglang:cache_hit_rate": "gauge",
    "sglang:max_total_num_tokens": "gauge",
    "sglang:prompt_tokens": "counter",
    "sglang:cached_tokens": "counter",
    "sglang:generation_tokens": "counter",
    "sglang:num_requests": "counter",
    "sglang:num_aborted_requests": "counter",
    "sglang:num_failed_requests": "counter",
    "sglang:num_retractions": "counter",
    "sglang:num_grammar": "counter",
    "sglang:num_grammar_cache_hit": "counter",
    "sglang:num_jump_forward_tokens": "counter",
    "sglang:time_to_first_token_seconds": "histogram",
    "sglang:time_per_output_token_seconds": "histogram",
    "sglang:inter_token_latency_seconds": "histogram",
    "sglang:e2e_request_latency_seconds": "histogram",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
}
"""A change breaks dashboards and routers: it belongs into CHANGELOG.md and docs/serving.md."""


def test_names_and_types(export: Export) -> None:
    with run_server(EngineCore(export, EngineOptions(kv_tokens=512))) as server:
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200
        text = httpx.get(f"{server.url}/metrics").text
    families = [family for family in text_string_to_metric_families(text) if family.samples]
    made = {family.name: family.type for family in families if not family.name.endswith("_created")}
    assert made == NAMES
    for family in families:
        assert family.documentation
        for sample in family.samples:
            more = {"layer"} if "expert" in family.name else {"le"} & set(sample.labels)
            assert set(sample.labels) == {"model_name"} | more
            assert sample.labels["model_name"] == "tiny"


def metrics_of(server: RunningServer) -> dict[str, float]:
    found = httpx.get(f"{server.url}/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
        if sample.labels.get("le", "+Inf") == "+Inf"
        if sample.labels.get("model_name") == "tiny"
    }


def test_metrics_count_what_happened(export: Export) -> None:
    core = EngineCore(export, EngineOptions(kv_tokens=4096))
    with run_server(core) as server:
        url = f"{server.url}/v1/completions"
        body: dict[str, Any] = {"prompt": [5] * 33, "max_tokens": 6, "ignore_eos": True, "n": 2}
        for stream in (False, True):
            assert httpx.post(url, json=body | {"stream": stream}).status_code == 200
        found = metrics_of(server)
        assert found["sglang:generation_tokens_total"] == 24
        assert found["sglang:prompt_tokens_total"] == 33 * 4
        assert found["sglang:cached_tokens_total"] == 32 * 3
        assert found["sglang:cache_hit_rate"] == pytest.approx(32 * 3 / (33 * 4))
        assert found["sglang:time_to_first_token_seconds_count"] == 2
        assert found["sglang:inter_token_latency_seconds_count"] == 4 * 5
        assert found["sglang:time_per_output_token_seconds_count"] == 4
        assert found["sglang:e2e_request_latency_seconds_count"] == 4
        assert found["sglang:num_requests_total"] == 4
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            assert found[name] == 0
        assert found["vllm:kv_cache_usage_perc"] == found["sglang:token_usage"] == 0
        with httpx.stream("POST", url, json=body | {"max_tokens": 150, "stream": True}) as answer:
            next(answer.iter_lines())
        server.wait_until_idle()
        deadline = time.monotonic() + LIVENESS_S
        while not (count := metrics_of(server)["sglang:num_aborted_requests_total"]):
            assert time.monotonic() < deadline
        assert count == 2
