"""The main job, end to end: train on two ranks, export, load in transformers, serve, compare."""

import json
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from configs.loader import from_dict, unflatten
from models.decoder import Decoder
from models.documents import DocumentAttention
from tests.runs import TINY, free_port, run, started
from train.checkpoint import checkpoint
from train.convert.hf_export import export_hf

pytestmark = pytest.mark.long  # the first test trains
N_PROMPTS, N_TOKENS = 9, 20
COMPARE = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
)
ours = load_file(folder + "/ours.check")
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    theirs = model(ours["tokens"]).logits
print(json.dumps({
    "wrong": {key: sorted(map(str, value)) for key, value in info.items() if value},
    "error": float((theirs - ours["logits"]).norm() / theirs.norm()),
    "ids": tokenizer("def value if 7").input_ids,
    "generation": {
        name: getattr(model.generation_config, name + "_token_id") for name in ("bos", "eos", "pad")
    },
    "chat": tokenizer.apply_chat_template(
        [{"role": "user", "content": "def"}], tokenize=False, add_generation_prompt=True
    ),
}))
"""


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, trained until it prefers some tokens, and exported.

    With the usual `init_std` of 0.02 that takes more than a hundred steps.
    """
    folder = tmp_path_factory.mktemp("main-job") / "run"
    run(
        "-m", "train", TINY, f"--data.source={corpus}", f"--run.dir={folder}",
        f"--data.cache_dir={folder.parent / 'cache'}", "--data.seq_len=128", "--train.steps=20",
        "--model.init_std=0.3", "--optimizer.lr=1e-2", "--checkpoint.every=0", ranks=2,
    )  # fmt: skip
    assert f"exported {folder / 'export'}" in run("-m", "scripts.export", folder).stdout
    return folder


def trained_model(folder: Path) -> Decoder:
    """The weights of the last checkpoint in an unsharded model, loaded without the export."""
    manifest = checkpoint.read_manifest(checkpoint.find(folder))
    model = Decoder(from_dict(unflatten(manifest.config), "manifest").model)
    state = {f"model.{name}": t for name, t in model.state_dict(keep_vars=True).items()}
    checkpoint.load(manifest, state)
    return model.eval()


def logits(model: Decoder, tokens_BL: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens_BL.shape[1]).expand(tokens_BL.shape)
    with torch.no_grad():
        out = model(tokens_BL.reshape(-1), positions.reshape(-1), DocumentAttention(positions))
    return out.view(*tokens_BL.shape, -1)


def greedy(model: Decoder, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt; all are padded on the right, where causal attention does
    not look."""
    ends = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(ends.max()) + n_tokens, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))
    for n in range(n_tokens):
        here = logits(model, tokens[:, : int(ends.max()) + n])
        tokens[rows, ends + n] = here[rows, ends + n - 1].argmax(-1)
    return [
        row[end : end + n_tokens].tolist() for row, end in zip(tokens, ends.tolist(), strict=True)
    ]


def test_transformers_loads_the_export_and_agrees(trained: Path) -> None:
    out = trained / "export"
    tokens = torch.randint(0, 320, (3, 101), generator=torch.Generator().manual_seed(0))
    ours = logits(trained_model(trained), tokens)
    save_file({"tokens": tokens, "logits": ours}, out / "ours.check")
    result = json.loads(run("-P", "-c", COMPARE, out).stdout.splitlines()[-1])
    assert result["wrong"] == {}
    assert result["error"] < 1e-5
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert result["ids"] == tokenizer.encode("def value if 7").ids
    own = Tokenizer.from_file(str(trained / "tokenizer" / "tokenizer.json"))
    assert result["generation"] == {"bos": 0, "eos": 0, "pad": own.token_to_id("ÿ")}
    assert result["chat"] == "<|endoftext|>User: def\n\nAssistant:"


def test_export_of_a_chosen_step_in_bf16(trained: Path, tmp_path: Path) -> None:
    folder = checkpoint.find(trained)
    out = export_hf(folder, tmp_path / "half", torch.bfloat16)
    tensors = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items()}
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    bias = [v for k, v in tensors.items() if k.endswith("e_score_correction_bias")]
    assert len(bias) == 2 and all(b.dtype == torch.float32 and b.abs().max() > 0 for b in bias)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    done = run("-m", "scripts.export", trained, "--out", precious, code=2)
    assert "exists and is not an export" in done.stderr and (precious / "file").exists()
    done = run("-m", "scripts.export", tmp_path, code=2)
    assert "holds no checkpoint" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started("-m", "serve", trained / "export", "--port", port) as program:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                assert program.is_running(), program.printed()
                time.sleep(0.1)
        yield url
        program.signal(signal.SIGTERM)
        assert program.finish(30).returncode == 0


def test_served_greedy_equals_trained_greedy(trained: Path, server: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from openai import OpenAI

    model = trained_model(trained)
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer" / "tokenizer.json"))
    words = re.findall(r"\w+", "def return for in if else self value index list dict print range")
    prompts = [" ".join(words[i % 7 : i % 7 + 1 + i % 6]) + f" {i}" for i in range(N_PROMPTS)]
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    name = client.models.list().data[0].id

    def complete(prompt: str) -> str:
        answer = client.completions.create(
            model=name, prompt=prompt, max_tokens=N_TOKENS, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert answer.usage is not None and answer.usage.completion_tokens == N_TOKENS
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(complete, prompts))
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    generated = greedy(model, encoded, N_TOKENS)
    for prompt, text, tokens in zip(prompts, served, generated, strict=True):
        assert text == tokenizer.decode(tokens), prompt
    assert len({token for tokens in generated for token in tokens}) > 10, (
        "a model that repeats one token proves nothing"
    )


def test_streaming_gives_the_same_text(trained: Path, server: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    name = client.models.list().data[0].id
    options = {"model": name, "prompt": "def value", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    stream = client.completions.create(**options, stream=True)  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in stream if c.choices) == whole.choices[0].text
