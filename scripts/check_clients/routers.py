"""sglang-router and smg in front of two of our servers.

Both balance load by policies. What the router sends to which server is recorded by relays between
them; the share of cached tokens is what our servers report.
"""

import http.client
import json
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tokenizers import Tokenizer

from configs.errors import UserError
from scripts.bench_serve.servers import Server
from scripts.check_clients.environments import last_line
from scripts.check_clients.relay import Relay, relays
from scripts.check_clients.setting import Row, Setting, root

_GROUPS, _PER_GROUP, _AT_ONCE = 8, 20, 16
_PREFIX_WORDS = 128
_KV_PROMPTS = 6
"""Prompts that fit into the cache of a server: the prefixes of half of the groups, not all."""
_STICKY = 0.75
"""Part of a group that must be on one server; without affinity it is 0.6. smg sends the excess of
a loaded server to the other one."""
_START_SECONDS = 120.0


@dataclass
class Load:
    """Requests, by group, that were answered and that failed."""

    ok: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)


def check_sglang_router(setting: Setting) -> list[Row]:
    """sglang-router 0.3.2."""
    return _check(setting, ["-m", "sglang_router.launch_router"])


def check_smg(setting: Setting) -> list[Row]:
    """Its successor. It polls loads every 10 s by default, longer than a load here lasts, and
    sends a new server requests of other prefixes for a minute."""
    more = ["--load-monitor-interval", "1", "--worker-warmup-secs", "0"]
    return _check(setting, ["-m", "smg", "launch", *more])


def _check(setting: Setting, command: list[str]) -> list[Row]:
    rows = []
    with ExitStack() as stack:
        tokenizer = Tokenizer.from_file(str(setting.export / "tokenizer.json"))
        n_tokens = len(tokenizer.encode(_prompt(0, 0)).ids)
        options = ["--kv-tokens", str(_KV_PROMPTS * n_tokens)]
        servers = [stack.enter_context(setting.server(n, *options)) for n in ("w1", "w2")]
        between = stack.enter_context(relays([root(server) for server in servers]))
        rates: dict[str, float] = {}
        for policy in ("round_robin", "cache_aware"):
            with _router(setting, command, policy, between) as url:
                load = _grouped_load(url)
            rates[policy] = load.hit_rate
            rows.append(_placement(policy, load, between, rates))
            _flush(servers)
        with _router(setting, command, "power_of_two", between) as url:
            load = _grouped_load(url)
        shares = [len(relay.bodies) for relay in between]
        rows.append(
            Row(
                "power_of_two",
                f"{sum(load.ok.values())} answered, {len(load.failed)} failed; {shares} per server",
                not load.failed and min(shares) >= 0.25 * sum(shares),
            )
        )
        with _router(setting, command, "manual", between) as url:
            rows.append(_sessions(url, between))
        with _router(setting, command, "round_robin", between) as url:
            rows.append(_openai_routes(url))
            rows.append(_killed(url, servers[1]))
        statuses: Counter[tuple[str, int]] = sum((r.statuses for r in between), Counter())
    statuses = Counter({key: n for key, n in statuses.items() if not key[0].startswith("PRI ")})
    missing = sorted({f"{name} {code}" for name, code in statuses if code in (404, 405, 501)})
    faults = sorted({f"{name} {code}" for name, code in statuses if code in (400, 422, 500)})
    asked = sorted({name for name, _ in statuses})
    text = f"requests {', '.join(asked)}; not found: {', '.join(missing) or 'none'}"
    return [*rows, Row("routes", "; ".join([text, *faults]), not faults)]


@contextmanager
def _router(
    setting: Setting, command: list[str], policy: str, between: list[Relay]
) -> Iterator[str]:
    """The URL of a router that both servers have joined."""
    for relay in between:
        relay.bodies.clear()
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(str(free.getsockname()[1]))
    words = [
        str(setting.python), *command, "--host", "127.0.0.1", "--port", ports[0],
        "--worker-urls", *(relay.url for relay in between), "--policy", policy,
        "--prometheus-host", "127.0.0.1", "--prometheus-port", ports[1],
        "--worker-startup-check-interval", "1", "--health-check-interval-secs", "2",
    ]  # fmt: skip
    log = setting.folder / f"{policy}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, cwd=setting.folder)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{policy}: no router: {last_line(log.read_text())}")
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/workers", timeout=5) as answer:
            found = json.load(answer)["workers"]
        return len(found) == 2 and all(one["is_healthy"] for one in found)
    except (OSError, ValueError):
        return False


def _post(url: str, path: str, body: object, **headers: str) -> dict[str, object]:
    """Raises OSError for an answer that is not 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=300)
    try:
        sent = {"Content-Type": "application/json"} | headers
        connection.request("POST", path, json.dumps(body), sent)
        answer = connection.getresponse()
        data = answer.read()
    except http.client.HTTPException as error:
        raise OSError(repr(error)) from None
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"{answer.status} {data[:200].decode(errors='replace')}")
    found: dict[str, object] = json.loads(data)
    return found


def _prompt(group: int, question: int) -> str:
    """Text of several hundred tokens that starts as all texts of its group do."""
    words = random.Random(group)
    prefix = " ".join(f"<{group}> {words.randrange(10**4)}" for _ in range(_PREFIX_WORDS // 2))
    return f"{prefix} question {question}"


def _grouped_load(url: str) -> Load:
    """Requests of all groups in a random order, several at once."""
    order = [(group, n) for group in range(_GROUPS) for n in range(_PER_GROUP)]
    random.Random(0).shuffle(order)
    load = Load()

    def one(group: int, n: int) -> None:
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        try:
            found = _post(
                url, "/generate", {"text": _prompt(group, n), "sampling_params": sampling}
            )
        except OSError as error:
            load.failed.append(str(error))
            return
        info = found["meta_info"]
        assert isinstance(info, dict)
        load.ok[group] += 1
        load.prompt_tokens += info["prompt_tokens"]
        load.cached_tokens += info["cached_tokens"]

    begin = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda pair: one(*pair), order))
    load.seconds = time.monotonic() - begin
    return load


def _placement(policy: str, load: Load, between: list[Relay], rates: dict[str, float]) -> Row:
    """Where the groups were sent."""
    placed: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for at, relay in enumerate(between):
        for body in relay.bodies:
            placed[json.loads(body)["text"].split()[0]][at] += 1
    total = sum(map(sum, placed.values()))
    sticky = sum(map(max, placed.values())) / max(1, total)
    shares = [len(relay.bodies) / max(1, total) for relay in between]
    text = (
        f"{sum(load.ok.values())} answered, {len(load.failed)} failed; {sticky:.0%} of a group on "
        f"one server, {min(shares):.0%} to {max(shares):.0%} of all per server; "
        f"{load.hit_rate:.0%} of prompt tokens cached; {load.seconds:.1f} s"
    )
    good = not load.failed and min(shares) >= 0.2
    if policy == "cache_aware":
        good = good and sticky >= _STICKY and rates["cache_aware"] > rates["round_robin"]
    return Row(policy, text, good)


def _sessions(url: str, between: list[Relay]) -> Row:
    """The header selects the server: every session stays on one."""
    keys = [f"session-{n % 8}" for n in range(64)]

    def one(key: str) -> None:
        body = {"text": key, "sampling_params": {"max_new_tokens": 2}}
        _post(url, "/generate", body, **{"x-smg-routing-key": key})

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(one, keys))
    places: dict[str, set[int]] = defaultdict(set)
    for at, relay in enumerate(between):
        for body in relay.bodies:
            places[json.loads(body)["text"]].add(at)
    alone = sum(len(where) == 1 for where in places.values())
    used = len({at for where in places.values() for at in where})
    text = f"{alone} of {len(places)} sessions on one server each, {used} servers used"
    return Row("manual, x-smg-routing-key", text, alone == len(places) == 8 and used == 2)


def _openai_routes(url: str) -> Row:
    """Both routes of OpenAI through the router."""
    fields = {"model": "bench", "max_tokens": 4, "temperature": 0}
    messages = [{"role": "user", "content": "Hello"}]
    answers = [
        _post(url, "/v1/completions", {**fields, "prompt": "def f(x):", "logprobs": 1}),
        _post(url, "/v1/chat/completions", {**fields, "messages": messages}),
    ]
    tokens = [answer["usage"]["completion_tokens"] for answer in answers]  # type: ignore[index]
    return Row("completions, chat", f"{tokens} tokens", max(tokens) <= 4 and min(tokens) > 0)


def _killed(url: str, server: Server) -> Row:
    """One server is killed under load: what starts after that is answered by the other one."""
    failed: list[float] = []
    killed = [float("inf")]

    def one(n: int) -> None:
        if n == 24:
            assert server.process is not None
            killed[0] = time.monotonic()
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        begin = time.monotonic()
        sampling = {"max_new_tokens": 16, "ignore_eos": True}
        try:
            _post(url, "/generate", {"text": f"{n} one", "sampling_params": sampling})
        except OSError:
            failed.append(begin)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(96)))
    later = sum(begin > killed[0] for begin in failed)
    text = f"96 requests, {len(failed)} failed, {later} of them sent after the kill"
    return Row("server killed in mid-load", text, later == 0 and len(failed) <= 8)


def _flush(servers: list[Server]) -> None:
    for server in servers:
        urllib.request.urlopen(f"{root(server)}/flush_cache", timeout=60).close()
