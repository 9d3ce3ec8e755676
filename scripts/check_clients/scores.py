"""lm-eval's log-likelihoods over HTTP and with transformers, in fp32."""

import json
import random
import statistics
import sysconfig
from pathlib import Path

from scripts.check_clients.environments import run
from scripts.check_clients.setting import MODEL, Row, Setting

_N_ITEMS = 300
_TOLERANCE = 1e-4
"""Nats per token: sums of logits in another order."""
_TASK = """task: continuations
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""


def check(setting: Setting) -> list[Row]:
    """The same items with `local-completions` on our server and with `hf`."""
    folder = setting.folder
    items = _items()
    (folder / "continuations.yaml").write_text(_TASK)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    with setting.server("fp32", "--dtype", "fp32") as server:
        ours = _evaluate(
            setting,
            "local-completions",
            f"model={MODEL},base_url={server.url}/completions,tokenizer={setting.export},"
            "tokenizer_backend=huggingface,num_concurrent=4,max_retries=1",
        )
    theirs = _evaluate(setting, "hf", f"pretrained={setting.export},dtype=float32")
    errors = [
        abs(a - b) / len(item["target"].encode()) for (a, _), (b, _), item in zip(
            ours, theirs, items, strict=True
        )
    ]  # fmt: skip
    worst = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    same = sum(a == b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    spread = statistics.pstdev(value for value, _ in theirs)
    text = (
        f"{len(items)} log-likelihoods within {worst:.1e} of transformers', "
        f"their standard deviation {spread:.1f}; {same} equal decisions whether greedy"
    )
    good = len(ours) == len(items) and max(errors) <= worst <= _TOLERANCE and same == len(items)
    return [Row("local-completions", text, good)]


def _items() -> list[dict[str, str]]:
    """Pieces of the standard library's source: a context, and a continuation of up to 60
    characters. They are divided before a space, where the tokenizer divides, too."""
    rng = random.Random(0)
    items: list[dict[str, str]] = []
    texts = [
        path.read_text(errors="ignore")
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    ]
    while len(items) < _N_ITEMS:
        text = rng.choice(texts)
        at, n = rng.randrange(max(1, len(text) - 400)), rng.randrange(1, 300)
        end = text.find(" ", at + n)
        context, target = text[at:end].lstrip(), text[end : end + rng.randrange(8, 60)].rstrip()
        if context and not context[-1].isspace() and target[1:2].isalnum():
            items.append({"context": context, "target": target})
    return items


def _evaluate(setting: Setting, model: str, arguments: str) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of every item, in order."""
    out = setting.folder / model
    run(
        setting.python,
        [
            "lm-eval", "--model", model, "--model_args", arguments, "--tasks", "continuations",
            "--include_path", str(setting.folder), "--output_path", str(out), "--log_samples",
            "--batch_size", "1", "--device", "cpu",
        ],
        setting.folder,
        seconds=1800,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(setting.folder / "datasets"),
        OMP_NUM_THREADS=str(setting.threads),
        OPENAI_API_KEY="none",
    )  # fmt: skip
    (file,) = out.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows.sort(key=lambda row: int(row["doc_id"]))
    found = [row["resps"][0][0] for row in rows]
    return [(float(value), str(greedy) == "True") for value, greedy in found]
