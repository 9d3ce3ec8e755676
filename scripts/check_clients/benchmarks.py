"""Load generators of other projects: genai-bench, SGLang's, vLLM's, aiperf.

What is checked is that every request was answered with the requested number of tokens, as the
client counts them; the speeds are of a machine that also runs the client.
"""

import json
from pathlib import Path
from typing import Any

from configs.errors import UserError
from scripts.check_clients.environments import run
from scripts.check_clients.setting import MODEL, Row, Setting, root

_SECONDS = 900.0
_N_IN, _N_OUT, _N_REQUESTS, _AT_ONCE = 100, 16, 20, 4


def check_genai_bench(setting: Setting) -> list[Row]:
    """Chats, streamed, one and four at once."""
    with setting.server("one") as server:
        run(
            setting.python,
            [
                "genai-bench", "benchmark", "--api-backend", "sglang", "--api-base", root(server),
                "--api-key", "none", "--api-model-name", MODEL,
                "--model-tokenizer", str(setting.export), "--task", "text-to-text",
                "--traffic-scenario", f"D({_N_IN},{_N_OUT})",
                "--num-concurrency", "1", "--num-concurrency", str(_AT_ONCE),
                "--max-time-per-run", "2", "--max-requests-per-run", str(_N_REQUESTS),
                "--experiment-base-dir", str(setting.folder),
                "--experiment-folder-name", "run",
            ],
            setting.folder,
            _SECONDS,
            HF_HUB_OFFLINE="1",
        )  # fmt: skip
    rows = []
    for file in sorted((setting.folder / "run").glob("D*.json")):
        found = json.loads(file.read_text())["aggregated_metrics"]
        stats, n_at_once = found["stats"], found["num_concurrency"]
        text = (
            f"{found['num_completed_requests']} of {found['num_requests']} requests, "
            f"{stats['num_output_tokens']['mean']:g} tokens each; TTFT "
            f"{stats['ttft']['mean'] * 1e3:.0f} ms, TPOT {stats['tpot']['mean'] * 1e3:.1f} ms"
        )
        good = (
            found["num_requests"] == found["num_completed_requests"] >= _N_REQUESTS
            and stats["num_output_tokens"]["min"] == stats["num_output_tokens"]["max"] == _N_OUT
        )
        rows.append(Row(f"text-to-text, {n_at_once} at once", text, good))
    if len(rows) != 2:
        raise UserError(f"genai-bench wrote {len(rows)} of 2 results")
    return rows


def check_sglang(setting: Setting) -> list[Row]:
    """Three routes, and prompts with common prefixes."""
    program = str(Path(__file__).with_name("with_sglang_bench.py"))
    kinds = {
        "sglang": ["--dataset-name", "random-ids", "--return-logprob"],
        "sglang-oai": ["--dataset-name", "random-ids"],
        "sglang-oai-chat": ["--dataset-name", "random-ids"],
        "vllm": ["--dataset-name", "random-ids"],
        "sglang, shared prefixes": [
            "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "4",
            "--gsp-prompts-per-group", "5", "--gsp-system-prompt-len", "256",
            "--gsp-question-len", "32", "--gsp-output-len", str(_N_OUT), "--cache-report",
        ],
    }  # fmt: skip
    rows: list[Row] = []
    with setting.server("one") as server:
        for kind, more in kinds.items():
            out = setting.folder / f"{len(rows)}.jsonl"
            run(
                setting.python,
                [
                    "-P", program, "--backend", kind.split(",")[0], "--base-url", root(server),
                    "--model", MODEL, "--tokenizer", str(setting.export),
                    "--num-prompts", str(_N_REQUESTS), "--random-input-len", str(_N_IN),
                    "--random-output-len", str(_N_OUT), "--random-range-ratio", "1",
                    "--max-concurrency", str(_AT_ONCE), "--output-file", str(out),
                    "--disable-tqdm", *more,
                ],
                setting.folder,
                _SECONDS,
                HF_HUB_OFFLINE="1",
                HF_DATASETS_CACHE=str(setting.folder / "datasets"),
                PYTHONNOUSERSITE="1",
            )  # fmt: skip
            found = json.loads(out.read_text().splitlines()[-1])
            text, good = _counted(found, "mean_ttft_ms", "mean_tpot_ms")
            if "--cache-report" in more:
                hits = found["cache_report"]["cache_hit_rate_pct"]
                text, good = f"{text}; {hits:.0f}% of prompt tokens cached", good and hits > 50
            rows.append(Row(kind, text, good))
    return rows


def check_vllm(setting: Setting) -> list[Row]:
    """Both routes of OpenAI, and prompts with common prefixes."""
    kinds = {
        "openai": ["--endpoint", "/v1/completions", "--dataset-name", "random"],
        "openai-chat": ["--endpoint", "/v1/chat/completions", "--dataset-name", "random"],
        "openai, shared prefixes": [
            "--endpoint", "/v1/completions", "--dataset-name", "prefix_repetition",
            "--prefix-repetition-prefix-len", "256", "--prefix-repetition-suffix-len", "32",
            "--prefix-repetition-num-prefixes", "4",
            "--prefix-repetition-output-len", str(_N_OUT),
        ],
    }  # fmt: skip
    rows: list[Row] = []
    with setting.server("one") as server:
        for kind, more in kinds.items():
            name = f"{len(rows)}.json"
            run(
                setting.python,
                [
                    "vllm", "bench", "serve", "--backend", kind.split(",")[0],
                    "--base-url", root(server), "--model", MODEL,
                    "--tokenizer", str(setting.export), "--num-prompts", str(_N_REQUESTS),
                    "--max-concurrency", str(_AT_ONCE), "--ignore-eos", "--save-result",
                    "--result-dir", str(setting.folder), "--result-filename", name,
                    "--disable-tqdm",
                    *(_random_lengths() if "random" in more else []), *more,
                ],
                setting.folder,
                _SECONDS,
                HF_HUB_OFFLINE="1",
            )  # fmt: skip
            found = json.loads((setting.folder / name).read_text())
            text, good = _counted(found, "mean_ttft_ms", "mean_tpot_ms")
            rows.append(Row(kind, text, good))
    return rows


def check_aiperf(setting: Setting) -> list[Row]:
    """Chats, streamed."""
    with setting.server("one") as server:
        run(
            setting.python,
            [
                "aiperf", "profile", "-m", MODEL, "--tokenizer", str(setting.export),
                "--url", root(server), "--endpoint-type", "chat", "--streaming",
                "--concurrency", str(_AT_ONCE), "--request-count", str(_N_REQUESTS),
                "--synthetic-input-tokens-mean", str(_N_IN),
                "--output-tokens-mean", str(_N_OUT), "--extra-inputs", "ignore_eos:true",
                "--use-server-token-count", "--ui", "none",
                "--output-artifact-dir", str(setting.folder / "out"),
            ],
            setting.folder,
            _SECONDS,
        )  # fmt: skip
    (file,) = (setting.folder / "out").rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(file.read_text())
    n, n_out = found["request_count"]["avg"], found["output_sequence_length"]
    errors = found.get("error_request_count", {}).get("avg", 0)
    text = (
        f"{n:g} of {_N_REQUESTS} requests, {n_out['avg']:g} tokens each, {errors:g} errors; TTFT "
        f"{found['time_to_first_token']['avg']:.0f} ms, "
        f"TPOT {found['inter_token_latency']['avg']:.1f} ms"
    )
    good = n == _N_REQUESTS and not errors and n_out["min"] == n_out["max"] == _N_OUT
    return [Row("chat", text, good)]


def _random_lengths() -> list[str]:
    return ["--random-input-len", str(_N_IN), "--random-output-len", str(_N_OUT)]


def _counted(found: dict[str, Any], ttft: str, tpot: str) -> tuple[str, bool]:
    """What SGLang's and vLLM's benchmark report: the text, and whether all tokens arrived."""
    n, n_out = found["completed"], found["total_output_tokens"]
    text = (
        f"{n} of {_N_REQUESTS} requests, {n_out} tokens; TTFT {found[ttft]:.0f} ms, "
        f"TPOT {found[tpot]:.1f} ms"
    )
    return text, n == _N_REQUESTS and n_out == _N_REQUESTS * _N_OUT
