"""A tiny export: one layer, random weights with varied outputs, a byte-level BPE of 300 tokens."""

import contextlib
import functools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.files import read_model, write_tensors
from models.hf.table import hf_config
from models.init import initialize
from serve.api import service
from serve.api.app import build_app
from serve.api.http_server import server_config
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.frontend.chat import ChatTemplate
from serve.frontend.client import EngineClient
from serve.frontend.thread import EngineThread
from serve.grammar import processes
from tests.serve.drive import assert_no_page_lost
from tests.serve.forked_child import launch_worker

if TYPE_CHECKING:
    import openai  # takes a second, which only the tests with a client need

VOCAB = 320
TOKENS = 300
"""Vocabulary of the tokenizer; the rest of the model's vocabulary is padding."""
MAX_LENGTH = 192
TEXT = """The quick brown fox jumps over the lazy dog. A model reads tokens, not letters.
def add(a, b):
    return a + b
for number in range(10): print(number, "numbers and more numbers")
日本語のテキスト 🙂 naïve café
"""

TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tag is defined %}{{ tag }}{% endif %}assistant:"
)

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    d_model=64,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, qk_norm="rms"),
    tie_embeddings=False,
    init_std=0.3,  # the usual 0.02 would repeat one token forever
    moe=MoEConfig(
        n_experts=4,
        top_k=2,
        d_expert=32,
        n_shared_experts=1,
        score_func="sigmoid",
        bias_update_rate=0.001,
    ),
)


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def write_export(folder: Path, seed: int = 0, n_layers: int = 1) -> None:
    """Time of a step is that of its layers; where they matter, tests use `two_layers`."""
    folder.mkdir(parents=True)
    made = replace(CONFIG, n_layers=n_layers)
    model = Decoder(made)
    initialize(model, made, seed=seed)
    state = model.state_dict()
    write_tensors(folder, made, lambda name, index: state[name][index], torch.float32)
    config = hf_config(made, max_positions=MAX_LENGTH, eos_token_id=0, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", autouse=True)
def forked_workers() -> Iterator[None]:
    """Workers for grammars are forks: each start of a Python process loads torch for xgrammar. A
    busy machine is no failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "launch", launch_worker)
        patch.setattr(service, "ANSWER_SECONDS", 600)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_ssl_context() -> Iterator[None]:
    """For all clients, which read the certificates of the system otherwise: 40 ms each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    write_export(folder)
    return folder


@pytest.fixture(scope="session")
def export(export_folder: Path) -> Export:
    return open_export(export_folder, device="cpu")


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "two-layers"
    write_export(folder, n_layers=2)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def make_core(export: Export) -> Callable[..., EngineCore]:
    """`make_core(**options)`: a new core, with a small cache by default."""

    def make(**options: Any) -> EngineCore:
        return EngineCore(export, EngineOptions(**{"kv_tokens": 4096, **options}))

    return make


class GreedyReference:
    """Greedy tokens by full forward passes with the training core, without a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = read_model(folder, torch.float32)
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: Sequence[int], n: int) -> list[int]:
        """The `n` tokens that follow the prompt; it is computed alone, unless it is known."""
        self.compute([prompt], n)
        return self._known[tuple(prompt)][:n]

    @torch.no_grad()
    def compute(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Compute `n` tokens after each prompt; the prompts are documents of one sequence."""
        wanted = {tuple(prompt): self._known.setdefault(tuple(prompt), []) for prompt in prompts}
        while short := [prompt for prompt, found in wanted.items() if len(found) < n]:
            rows = [[*prompt, *wanted[prompt]] for prompt in short]
            tokens = torch.tensor([token for row in rows for token in row])
            positions = torch.cat([torch.arange(len(row)) for row in rows])
            logits = self._model(tokens, positions, DocumentAttention(positions[None]))
            ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
            best = logits[ends, :TOKENS].argmax(-1)  # the others are padding
            for prompt, token in zip(short, best.tolist(), strict=True):
                wanted[prompt].append(token)


@pytest.fixture(scope="session")
def greedy_reference(export_folder: Path) -> GreedyReference:
    return GreedyReference(export_folder)


class RunningServer:
    def __init__(self, thread: EngineThread, port: int) -> None:
        self.thread = thread
        self.port = port
        self.core = thread.core
        self.url = f"http://127.0.0.1:{port}"

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Run until no request is left; then assert that no page is in use."""
        deadline = time.monotonic() + seconds
        while self.core.busy or self.thread._cancelled or self.thread._submitted:
            assert time.monotonic() < deadline, "requests are still running"
            time.sleep(0.01)
        assert_no_page_lost(self.core)


@contextlib.contextmanager
def run_app(
    engine: EngineClient, name: str = "tiny", keep_alive: int = 620, **options: Any
) -> Iterator[int]:
    """The server of an engine, which it starts and stops; its port. options: of `build_app`."""
    ready = threading.Event()
    options.setdefault("template", ChatTemplate(TEMPLATE, {}))
    app = build_app(engine, name, ready.set, **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = server_config(app, keep_alive, grace=0)
        server = uvicorn.Server(config)
        worker = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        worker.start()
        assert ready.wait(20), "the server did not start"
        yield listener.getsockname()[1]
        server.should_exit = True
        worker.join(20)
    assert not worker.is_alive()


@contextlib.contextmanager
def run_server(core: EngineCore, **options: Any) -> Iterator[RunningServer]:
    """options: of `run_app`."""
    thread = EngineThread(core)
    with run_app(thread, **options) as port:
        yield RunningServer(thread, port)


@pytest.fixture(scope="module")
def server(export: Export) -> Iterator[RunningServer]:
    with run_server(EngineCore(export, EngineOptions(kv_tokens=4096))) as running:
        yield running


@pytest.fixture
def small_server(export: Export) -> Iterator[RunningServer]:
    """Two requests run, two wait, the fifth is refused."""
    options = EngineOptions(kv_tokens=512, max_running=2, max_waiting=2)
    with run_server(EngineCore(export, options)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator["openai.OpenAI"]:
    """OpenAI's client of the module's `server`."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
