"""`python -m scripts.demo`: the main pipeline from text to served model, in a few minutes.

Trains configs/demo.toml on two ranks (one, if there is one core or one GPU), exports the result,
serves the export, requests completions from the server, and lists the files. Started again it
resumes, or ends at once if all is done; remove runs/demo to start from the beginning.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.loader import load
from configs.paths import local_path

EXPERIMENT = "configs/demo.toml"
REFERENCE: dict[str, Any] = {
    "machine": "2 cores of an AMD EPYC with AVX512-BF16, torch 2.13.0, 2026-11-20",
    "tokens_per_s": 7400,
    "bits_per_byte": 1.96,
}
"""Results of the demo on the machine of the README's figures."""
PROMPTS = (
    "import os\n\ndef read_file(path):\n",
    "class Stack:\n    def __init__(self",
    "for i in ",
)


def main() -> int:
    """Run all stages; the exit code is that of the first that fails."""
    parser = CommandParser(prog="python -m scripts.demo", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="--section.key=value of the experiment")
    _, overrides = parser.parse_known_args()
    try:
        folder = local_path(load(EXPERIMENT, overrides).run.dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    ranks = min(2, _devices())
    train = ["-m", "train", EXPERIMENT, *overrides]
    if ranks > 1:
        train = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *train]
    for title, stage in (
        (f"1/3 train on {ranks} ranks", train),
        ("2/3 export", ["-m", "scripts.export", str(folder)]),
    ):
        print(f"\n== {title} ==", flush=True)
        code = subprocess.run([sys.executable, *stage], env=_environment(ranks)).returncode
        if code:
            return code
    print("\n== 3/3 serve ==", flush=True)
    _serve(folder / "export")
    _list_artifacts(folder, time.monotonic() - began)
    print(comparison(folder, as_shipped=not overrides))
    return 0


def _devices() -> int:
    """Number of GPUs, or of cores if there are none."""
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1


def _environment(ranks: int) -> dict[str, str]:
    """Set the thread count; otherwise torchrun sets one OpenMP thread per rank and prints a
    warning."""
    threads = str(max((os.cpu_count() or 1) // ranks, 1))
    return {"OMP_NUM_THREADS": threads} | os.environ


def _serve(export: Path) -> None:
    """Start the server on a free port, print its output, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "serve", str(export), "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(server, url)
        for prompt in PROMPTS:
            body = {"prompt": prompt, "max_tokens": 64, "temperature": 0.7, "seed": 1}
            text = _call(f"{url}/v1/completions", body)["choices"][0]["text"]
            print(
                f"--- {prompt!r}\n{prompt}\033[1m{text}\033[0m"
                if sys.stdout.isatty()
                else f"--- {prompt!r}\n{prompt}{text}",
                flush=True,
            )
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"error: the server stopped with exit code {server.returncode}")
        try:
            _call(f"{url}/health")
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"error: the server did not answer on {url} within a minute")


def _call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def _list_artifacts(folder: Path, seconds: float) -> None:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    rows = [
        ("loss curve", folder / "loss.png"),
        ("expert load", folder / "experts.png"),
        ("every step's metrics", folder / "metrics.jsonl"),
        ("TensorBoard", folder / "tensorboard"),
        ("resolved config", folder / "config.toml"),
        ("environment", folder / "environment.json"),
        ("tokenizer", folder / "tokenizer"),
        ("newest checkpoint", newest),
        ("Hugging Face export", folder / "export"),
    ]
    print(f"\n== done in {seconds:.0f} s ==")
    for name, path in rows:
        print(f"  {name:<22} {path}")
    print(f"serve it:  python -m serve {folder / 'export'}")


def comparison(folder: Path, *, as_shipped: bool) -> str:
    """Loss and speed of the run compared with those of the reference machine. The corpus, Python's
    own library, differs between versions, and nats per token with it; bits per byte hardly do.

    as_shipped: no setting was changed, so that the loss can be compared as well.
    """
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [m for m in metrics if "validation_loss" in m][-1]
    speed = statistics.median(m["tokens_per_s"] for m in metrics)
    attempt = json.loads((folder / "environment.json").read_text())[-1]
    loss = (
        f"validation loss {held_out['validation_loss']:.3f} nats per token "
        f"({held_out['validation_bits_per_byte']:.3f} bits per byte) after {held_out['step']} steps"
    )
    if as_shipped:
        loss += f"; reference {REFERENCE['bits_per_byte']} bits per byte"
    return (
        f"{loss}\n"
        f"median {speed:,.0f} tokens/s on {attempt['ranks']} ranks, {attempt['cores']} cores, "
        f"{attempt['device']}: {speed / REFERENCE['tokens_per_s']:.2f} times the reference "
        f"({REFERENCE['tokens_per_s']:,} on {REFERENCE['machine']})"
    )


if __name__ == "__main__":
    sys.exit(main())
