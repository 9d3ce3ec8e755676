"""The engine's greedy tokens equal the training model's, however requests are batched."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from models.documents import DocumentAttention
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.engine.request import RequestError
from tests.models.families import FAMILIES
from tests.models.test_invariance import lively
from tests.serve.conftest import GreedyReference
from tests.serve.drive import assert_no_page_lost, complete, greedy, make_request, run

MakeCore = Callable[..., EngineCore]
LONGEST = 12
"""The most tokens of an answer, but where it is said."""


@pytest.fixture(scope="module")
def export(two_layers: Path) -> Export:
    return open_export(two_layers, device="cpu")


@pytest.fixture(scope="module")
def greedy_reference(two_layers: Path) -> GreedyReference:
    return GreedyReference(two_layers)


def prompts(n: int, seed: int = 0, longest: int = 100) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 320) for _ in range(rng.randint(1, longest))] for _ in range(n)]


@pytest.fixture(autouse=True, scope="module")
def computed(greedy_reference: GreedyReference) -> None:
    """The reference of the prompts that many tests use, computed together."""
    greedy_reference.compute([*prompts(10), *prompts(16, seed=9)], LONGEST)


def test_reference_is_lively(greedy_reference: GreedyReference) -> None:
    together = greedy_reference(prompts(10)[3], LONGEST)
    alone = GreedyReference(greedy_reference.folder)(prompts(10)[3], LONGEST)
    assert together == alone, "documents of one sequence do not affect each other"
    assert all(len(set(greedy_reference(prompt, LONGEST))) > 5 for prompt in prompts(10))


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 1},
        {"max_running": 16},
        {"max_running": 4, "max_batch_tokens": 7, "page_size": 3},
        {"max_running": 8, "kv_tokens": 240, "page_size": 4},
    ],
    ids=["alone", "batched", "chunked", "preempted"],
)
def test_greedy_equals_training_model(
    make_core: MakeCore, greedy_reference: GreedyReference, options: dict[str, int]
) -> None:
    core = make_core(**options)
    texts = prompts(10)
    found = complete(core, texts, greedy(LONGEST))
    assert [one.tokens for one in found] == [greedy_reference(text, LONGEST) for text in texts]
    assert {one.finish_reason for one in found} == {"length"}
    assert bool(core.scheduler.n_retracted) == ("kv_tokens" in options)


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
def test_random_schedules(
    make_core: MakeCore, greedy_reference: GreedyReference, seed: int
) -> None:
    """Random sizes, arrivals and cancellations: remaining requests are correct and no page is
    lost."""
    rng = random.Random(seed)
    core = make_core(
        max_running=rng.randint(1, 6),
        max_batch_tokens=rng.randint(6, 40),
        page_size=rng.choice([1, 2, 5, 16]),
        kv_tokens=rng.randint(150, 300),
    )
    todo = [
        make_request(core, prompt, greedy(rng.randint(1, LONGEST)))
        for prompt in prompts(16, seed=9)
    ]
    alive = list(todo)
    cancelled = set()
    while todo or core.busy:
        if todo and rng.random() < 0.3:
            core.scheduler.add([todo.pop(0)])
        core.step()
        started = [r for r in alive if r.number >= 0 and r.finish_reason is None]
        if started and rng.random() < 0.04:
            cancelled.add(victim := rng.choice(started))
            core.scheduler.finish(victim, "cancelled")
        core.scheduler.check()
    assert_no_page_lost(core)
    for request in alive:
        expected = greedy_reference(request.prompt, LONGEST)[: request.params.max_tokens]
        if request in cancelled:
            assert request.output == expected[: request.n_output]
        else:
            assert request.output == expected


def test_logits_equal_training_core(make_core: MakeCore, export: Export) -> None:
    """Every row that the head computes, prefilled in chunks and decoded, against one full
    forward."""
    core = make_core(max_batch_tokens=24)
    seen: list[Tensor] = []
    inner = core.executor.runner.run

    def spy(*step):  # type: ignore[no-untyped-def]
        seen.append(inner(*step))
        return seen[-1]

    core.executor.runner.run = spy  # type: ignore[method-assign]
    request = make_request(core, prompts(1, seed=3, longest=60)[0] * 2, greedy(8))
    run(core, [request])
    positions = torch.arange(len(request.tokens))
    with torch.no_grad():
        whole = export.model(
            torch.tensor(request.tokens), positions, DocumentAttention(positions[None])
        )
    ours = torch.cat(seen)
    expected = whole[len(request.prompt) - 1 : -1]
    assert ours.shape == expected.shape
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_prompt_scores_survive_chunks_and_preemption(make_core: MakeCore) -> None:
    texts = prompts(4, seed=5)
    params = greedy(16, logprobs=2, echo=True)
    calm = make_core(max_running=1)
    wild = make_core(max_running=4, max_batch_tokens=11, kv_tokens=160, page_size=4)
    results = []
    for core in (calm, wild):
        requests = [make_request(core, text, params) for text in texts]
        run(core, requests)
        results.append(requests)
    assert wild.scheduler.n_retracted
    for one, other in zip(*results, strict=True):
        assert one.output == other.output
        assert [s.token for s in one.prompt_logprobs] == one.prompt[1:]
        a, b = ([s.logprob for s in r.prompt_logprobs] for r in (one, other))
        assert a == pytest.approx(b, abs=1e-4)


def test_end_token_stops(make_core: MakeCore, greedy_reference: GreedyReference) -> None:
    prompt = prompts(1, seed=2)[0]
    expected = greedy_reference(prompt, LONGEST)
    core = make_core()
    core.export = _with_end(core.export, expected[10])
    first = expected.index(expected[10])
    found = complete(core, [prompt], greedy(LONGEST, ignore_eos=False))[0]
    assert found.finish_reason == "stop"
    assert found.tokens == expected[: first + 1]
    assert complete(core, [prompt], greedy(LONGEST))[0].tokens == expected


def _with_end(export: Export, token: int) -> Export:
    return Export(**{**vars(export), "end_tokens": frozenset([token])})


def test_stop_string_cuts_text(make_core: MakeCore) -> None:
    core = make_core()
    text = complete(core, ["def add("], greedy(20))[0].text
    stop = text[12:15]
    found = complete(core, ["def add("], greedy(20, stop=(stop,)))[0]
    assert found.finish_reason == "stop"
    assert found.text == text[: text.index(stop)]


def test_broken_step_fails_its_batch_only(
    make_core: MakeCore, greedy_reference: GreedyReference
) -> None:
    core = make_core()
    inner, prompt = core.executor.runner.run, prompts(1)[0]

    def broken(*step):  # type: ignore[no-untyped-def]
        raise RuntimeError("no")

    core.executor.runner.run = broken  # type: ignore[method-assign]
    assert complete(core, [prompt], greedy(8))[0].finish_reason == "error"
    core.executor.runner.run = inner  # type: ignore[method-assign]
    core.scheduler.check()
    assert complete(core, [prompt], greedy(8))[0].tokens == greedy_reference(prompt, 8)


def test_broken_request_fails_alone(make_core: MakeCore, greedy_reference: GreedyReference) -> None:
    core = make_core()
    good, bad = (make_request(core, prompt, greedy(8)) for prompt in prompts(2))
    assert bad.text is not None

    def broken(token: int, may_stop: bool = True) -> str:
        raise RuntimeError("no")

    bad.text.add = broken  # type: ignore[method-assign]
    run(core, [bad, good])
    assert bad.finish_reason == "error"
    assert good.output == greedy_reference(good.prompt, 8)


def test_nan_logits_fail_alone(make_core: MakeCore, greedy_reference: GreedyReference) -> None:
    """A request with NaN leaves NaN in its pages; the next requests that use these pages are not
    affected."""
    core = make_core(kv_tokens=128, page_size=16)
    inner = core.executor.runner.run

    def poisoned(*step):  # type: ignore[no-untyped-def]
        logits = inner(*step)
        for tensor in core.cache.tensors:
            tensor[:, 1:] = torch.nan
        return logits * torch.nan

    core.executor.runner.run = poisoned  # type: ignore[method-assign]
    short, long = [7, 8, 9], prompts(1, seed=7, longest=40)[0] + [5] * 20
    assert complete(core, [long], greedy(8))[0].finish_reason == "error"
    core.executor.runner.run = inner  # type: ignore[method-assign]
    found = complete(core, [short, long], greedy(20))
    assert [one.tokens for one in found] == [greedy_reference(p, 20) for p in (short, long)]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "empty"),
        ([320], 1, "between 0 and 319"),
        ([-1], 1, "between 0 and 319"),
        ([True], 1, "between 0 and 319"),
        ([1] * 150, 43, "at most 192"),
        ([1] * 192, 1, "at most 192"),
    ],
)
def test_impossible_requests(
    make_core: MakeCore, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        make_request(make_core(), prompt, greedy(max_tokens))


def test_longest_request_fits_exactly(
    make_core: MakeCore, greedy_reference: GreedyReference
) -> None:
    core = make_core(kv_tokens=64, page_size=16)
    prompt = prompts(1, seed=4)[0][:33] + [5] * 8
    with pytest.raises(RequestError, match="at most 65"):
        make_request(core, prompt, greedy(66 - len(prompt)))
    room = 65 - len(prompt)
    assert complete(core, [prompt], greedy(room))[0].tokens == greedy_reference(prompt, room)


def test_absorbed_latents(make_core: MakeCore) -> None:
    """The option is passed to the runner, and is refused if it would have no effect."""
    with pytest.raises(UserError, match="--absorb-mla: the model has no multi-head latent"):
        make_core(absorb_mla=True)
    config = FAMILIES["deepseek-v3"]
    export = Export(
        name="mla",
        model=lively(config, torch.float32),
        tokenizer=None,
        end_tokens=frozenset([0]),
        max_length=96,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    texts = [[1 + token % 95 for token in text] for text in prompts(4, longest=40)]
    found = []
    for absorb in (False, True):
        core = EngineCore(export, EngineOptions(absorb_mla=absorb, kv_tokens=512))
        assert core.executor.runner.absorbed == absorb
        found.append([one.tokens for one in complete(core, texts, greedy(8))])
    assert found[0] == found[1]
