"""The JobSet manifest: against the schema of its API, and its container's command, run by bash."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from configs.errors import ConfigError, UserError
from launch.kubernetes import main, manifest, render
from launch.run_folder import records
from launch.site import KubernetesSite, load_site
from launch.write_examples import FOLDER
from tests.launch.test_render import HOSTILE
from tests.runs import ROOT, TINY, environment, free_port

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
SITE = """\
[node]
ranks = {ranks}
threads = 1
[software]
environment = [{variables}]
[faults]
attempts = 4
[kubernetes]
image = "registry/phalanx:1"
claim = "shared"
mount = "{mount}"
checkout = "{root}"
"""
PYTHON = """#!/bin/bash
exec {python} -S -c '
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
{body}
' "$@"
"""


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a string in `args` or `env`: `$$` is `$`, `$(NAME)` a variable's
    value where there is one (k8s.io/kubernetes, third_party/forked/golang/expansion)."""
    found, i = "", 0
    while i < len(text):
        name = re.match(r"\$\(([^)]*)\)", text[i:])
        if text.startswith("$$", i):
            found, i = found + "$", i + 2
        elif name and name[1] in variables:
            found, i = found + variables[name[1]], i + len(name[0])
        else:
            found, i = found + text[i], i + 1
    return found


class Pod:
    """One pod of a manifest, run on this machine."""

    def __init__(self, text: str, index: int) -> None:
        self.job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = self.job["template"]["spec"]["containers"][0]
        self.env = {"JOB_COMPLETION_INDEX": str(index)}
        for variable in container["env"]:
            self.env[variable["name"]] = expanded(variable["value"], self.env)
        self.words = [expanded(word, self.env) for word in container["command"] + container["args"]]
        self.folder = container["workingDir"]

    def start(self, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words, cwd=self.folder, env=environment() | self.env | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def site_file(folder: Path, ranks: int = 1, variables: tuple[str, ...] = (), more: str = "") -> str:
    path = folder / "site.toml"
    listed = ", ".join(json.dumps(variable) for variable in variables)
    text = SITE.format(ranks=ranks, variables=listed, mount=folder, root=ROOT)
    path.write_text(text + more)
    return f"--site={path}"


def rendered(folder: Path, *words: str, nodes: int = 2, **more: Any) -> str:
    places = [f"--run.dir={folder}/run", f"--data.cache_dir={folder}/cache"]
    return manifest([str(TINY), f"--nodes={nodes}", site_file(folder, **more), *places, *words])


@cache
def example() -> Any:
    """The manifest of `launch/examples`; it is parsed once."""
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


@cache
def validator() -> Any:
    """Of the schema, which is checked once."""
    kind = jsonschema.validators.validator_for(SCHEMA)
    kind.check_schema(SCHEMA)
    return kind(SCHEMA)


def test_the_example_and_another_manifest_fit_the_schema(tmp_path: Path) -> None:
    validator().validate(example())
    job = example()["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 2
    pod = job["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 8, "cpu": 96}
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    name = example()["metadata"]["name"]
    master = {v["name"]: v["value"] for v in pod["containers"][0]["env"]}["MASTER"]
    assert master == f"{name}-node-0-0.{name}" and len(f"{name}-node-0-99999") < 64
    validator().validate(yaml.safe_load(rendered(tmp_path)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/replicas", 1), ("spec/failurePolicy/maxRestarts", "3"),
        ("spec/failurePolicy/rules/0/action", "Restart"), ("apiVersion", "jobset.x-k8s.io/v1"),
        ("spec/replicatedJobs/0/template/spec/completionmode", "Indexed"),
        ("spec/replicatedJobs/0/template/spec/template/spec/restartPolicy", "Sometimes"),
        ("spec/replicatedJobs/0/template/spec/template/spec/containers/0/env/0/value", 3),
        ("spec/replicatedJobs/0/template/spec/template/spec/containers/0/volumeMounts/0/path", "/"),
        ("spec/replicatedJobs/0/template/spec/podFailurePolicy/rules/0/onExitCodes/values", ["75"]),
        ("spec/replicatedJobs/0/template/spec/template/spec/volumes/0/persistentVolumeClaim", {}),
    ],
    ids=lambda value: str(value)[-40:],
)  # fmt: skip
def test_the_schema_refuses_what_the_api_refuses(path: str, value: Any) -> None:
    tree = deepcopy(example())
    *way, last = path.split("/")
    place = tree
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validator().validate(tree)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
def test_hostile_words_reach_the_ranks_unchanged(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    hostile = [word.replace("TRAP", str(trap)) for word in HOSTILE]
    hostile += ["$(MASTER)", "$$(MASTER)", "a: b # c", "é\u2028\x85\U0001f600", "- x"]
    values = [word for word in hostile if word.isprintable()]
    python = tmp_path / "ve nv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, body=""))
    python.chmod(0o755)
    option = site_file(tmp_path, variables=tuple(f"V{i}={v}" for i, v in enumerate(values)))
    path = Path(option.removeprefix("--site="))
    site = load_site(path)
    site = replace(site, software=replace(site.software, activate=str(tmp_path / "ve nv")))
    pod = Pod(render("demo", 1, hostile, site, f"x\n  touch {trap}\x85\u2028\x7f"), 0)
    with pod.start(TMPDIR=str(tmp_path)) as process:
        said, _ = process.communicate(timeout=20)
    arguments, env = json.loads(said)
    assert arguments[arguments.index("train") + 1 :] == hostile
    assert [env[f"V{i}"] for i in range(len(values))] == values
    assert arguments[arguments.index("--master-addr") + 1] == "demo-node-0-0.demo"
    assert process.returncode == 0 and not trap.exists()


ENDS = [
    ("sys.exit(0)", 0), ("sys.exit(3)", 3),
    ('print("  exitcode  : 75 (pid: 9)", file=sys.stderr); sys.exit(1)', 75),
    ('print("  exitcode  : 7 (pid: 75 )", file=sys.stderr); sys.exit(1)', 1),
    ('print("  exitcode  : 2 (pid: 9)", file=sys.stderr); sys.exit(1)', 2),
    ('print("  exitcode  : 12 (pid: 2 )", file=sys.stderr); sys.exit(1)', 1),
]  # fmt: skip
"""What torchrun does, and the exit code of the pod."""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
def test_the_pod_ends_with_the_code_of_its_ranks(tmp_path: Path) -> None:
    """All pods at once, because each sleeps for a second."""
    text = rendered(tmp_path)
    with ExitStack() as stack:
        running = []
        for i, (body, _) in enumerate(ENDS):
            folder = tmp_path / str(i)
            folder.mkdir()
            python = folder / "py"
            python.write_text(PYTHON.format(python=sys.executable, body=body))
            python.chmod(0o755)
            pod = Pod(text.replace('- "python"', f'- "{python}"'), 0)
            running.append(stack.enter_context(pod.start(TMPDIR=str(folder))))
        said = [process.communicate(timeout=20)[0] for process in running]
    found = [(body, process.returncode) for (body, _), process in zip(ENDS, running, strict=True)]
    assert found == ENDS, said


def action_of(manifest: dict[str, Any], code: int | None) -> str:
    """What JobSet does after a pod ended with a code, or was disrupted (None). The messages are
    those of the Job controller (k8s.io/kubernetes, pkg/controller/job/pod_failure_policy.go)."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if code is not None and code in rule.get("onExitCodes", {}).get("values", []):
            what = f"Container torchrun for pod default/x-2 failed with exit code {code}"
        elif code is None and "onPodConditions" in rule:
            what = "Pod default/x-2 has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
        break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return str(rule["action"])
    return "RestartJobSet"


def test_a_user_error_ends_the_job_at_once_and_a_stop_is_not_counted() -> None:
    expected = {2: "FailJobSet", 75: "RestartJobSetAndIgnoreMaxRestarts", 1: "RestartJobSet",
                137: "RestartJobSet", None: "RestartJobSetAndIgnoreMaxRestarts"}  # fmt: skip
    assert {code: action_of(example(), code) for code in expected} == expected


@pytest.mark.slow  # tests/launch/test_local.py stops a training by default
def test_a_terminated_pod_saves_with_the_others_and_a_new_start_continues(
    overrides: list[str], tmp_path: Path
) -> None:
    """Two pods of one rank on this machine; SIGTERM to one shell stops both with code 75."""
    endless = ["--train.steps=100000", "--schedule.steps=100000", "--checkpoint.every=2"]
    kept = [word for word in overrides if not word.startswith(("--run.dir", "--data.cache_dir"))]
    text = rendered(tmp_path, *kept, *endless).replace('- "python"', f'- "{sys.executable}"')
    run = tmp_path / "run"

    def started() -> list[subprocess.Popen[str]]:
        port = str(free_port())
        at = text.replace("--master-port 29500", f"--master-port {port}")
        folders = [tmp_path / f"pod-{i}" for i in range(2)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return [
            Pod(at, i).start(MASTER="127.0.0.1", TMPDIR=str(folder), GLOO_SOCKET_IFNAME="lo")
            for i, folder in enumerate(folders)
        ]

    for starts in (1, 2):
        pods, before = started(), len(list(records(run)))
        deadline = time.monotonic() + 60
        while not any(int(p.name[5:]) > before for p in (run / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline and all(pod.poll() is None for pod in pods)
            time.sleep(0.05)
        os.kill(pods[1].pid, signal.SIGTERM)
        said = [pod.communicate(timeout=60)[0] for pod in pods]
        assert [pod.returncode for pod in pods] == [75, 75], "\n".join(said)
        steps = [record["step"] for record in records(run)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > before
        assert (run / "checkpoints" / f"step-{len(steps):08}" / "manifest.json").is_file()
        assert len(json.loads((run / "environment.json").read_text())) == starts


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        ([], "[slurm]\npartition = 'x'\n", "site file: slurm: has no effect on Kubernetes"),
        ([], "[kubernetes]\n", "site.toml"),  # twice
        (["--run.dir=runs/x"], "", "run.dir = 'runs/x': must be below kubernetes.mount"),
        (["--run.dir={mount}/../x"], "", "must be below kubernetes.mount"),
        (["--data.cache_dir=cache"], "", "data.cache_dir = 'cache': must be below"),
        (["--name=A_b"], "", "--name 'A_b': must be 1 to 40"),
        (["--name=" + "a" * 41], "", "must be 1 to 40"),
        (["--nodes=0"], "", "--nodes 0: must be a number"),
        (["--model.moe.topk=1"], "", "did you mean model.moe.top_k?"),
        (["--parallel.dp_shard=3"], "", "but there are 2 ranks"),
        (["stray"], "", "'stray': neither an option nor"),
    ],
    ids=str,
)
def test_a_wrong_manifest_is_one_line(
    words: list[str], more: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{mount}", str(tmp_path)) for word in words]
    places = [f"--run.dir={tmp_path}/run", f"--data.cache_dir={tmp_path}/cache"]
    file = [str(TINY), "--nodes=2", site_file(tmp_path, more=more)]
    assert main([*file, *places, *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and said.startswith("error: ")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (("image = \"registry/phalanx:1\"", ""), "kubernetes.image: needed for a manifest"),
        (("claim = \"shared\"", ""), "kubernetes.claim: needed for a manifest"),
        (("[software]", "[software]\nmodules = ['cuda']"), "software.modules: has no effect"),
        (("[software]", "[software]\ncontainer = ['x']"), "software.container: has no effect"),
        (("attempts = 4", "exclude_after = 4"), "faults.exclude_after: has no effect"),
        (("\"shared\"", "'a b'"), "kubernetes.claim = 'a b': must be"),
        (("registry/phalanx:1", "$(id)"), "kubernetes.image = '$(id)'"),
        (("[kubernetes]", "[kubernetes]\ngrace_s = 1"), "kubernetes.grace_s = 1: must lie between"),
        (("[kubernetes]", "[kubernetes]\nimagee = 'x'"), "did you mean kubernetes.image?"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_or_useless_site_keys_are_refused(
    changed: tuple[str, str], expected: str, tmp_path: Path
) -> None:
    option = site_file(tmp_path)
    path = tmp_path / "site.toml"
    path.write_text(path.read_text().replace(*changed, 1))
    places = [f"--run.dir={tmp_path}/run", f"--data.cache_dir={tmp_path}/cache"]
    with pytest.raises(UserError) as refused:
        manifest([str(TINY), "--nodes=2", option, *places])
    assert expected in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("image", "possible"),
    [
        ("my-registry.example.org:5000/team/phalanx-train:2.1_rc-1", True),
        ("registry/phalanx@sha256:" + "0f" * 32, True), ("a b", False), ("a\"b", False),
        ("a;b", False), ("-a", False),
    ],
)  # fmt: skip
def test_names_of_images(image: str, possible: bool) -> None:
    if possible:
        assert KubernetesSite(image=image).image == image
    else:
        with pytest.raises(ConfigError, match="must be a name of an image"):
            KubernetesSite(image=image)


def test_an_experiment_that_no_pod_has_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(TINY, outside / "x.toml")
    shared = tmp_path / "shared"
    shared.mkdir()
    option = site_file(shared)
    places = [f"--run.dir={shared}/run", f"--data.cache_dir={shared}/cache"]
    with pytest.raises(UserError, match="pods have the checkout and"):
        manifest([str(outside / "x.toml"), "--nodes=2", option, *places])
    shutil.copy(TINY, shared / "x.toml")
    assert f'- "{shared}/x.toml"' in manifest(
        [str(shared / "x.toml"), "--nodes=2", option, *places]
    )
