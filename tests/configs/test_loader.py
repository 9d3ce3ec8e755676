"""Experiments: every shipped file loads, every user error gives a clear one-line message, and torch
is not needed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.__main__ import main as command
from configs.errors import ConfigError
from configs.loader import flatten, from_dict, load, to_toml, unflatten
from configs.parallel_dims import default_world, resolve
from configs.reference import reference
from configs.schema import ParallelConfig
from tests.runs import ROOT, TINY, run

EXPERIMENTS = [*sorted((ROOT / "configs").rglob("*.toml")), TINY]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.name)
def test_every_experiment_loads_and_its_mesh_divides(path: Path) -> None:
    config = load(path)
    parallel_dims = resolve(config, default_world(config))
    assert (
        parallel_dims.dp_shard * parallel_dims.tp
        == parallel_dims.efsdp * parallel_dims.ep * parallel_dims.etp
    )
    assert parallel_dims.world == default_world(config)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.name)
def test_toml_and_flat_forms_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path, ["--train.profile_steps=[1, 2]", "--optimizer.lr=1"])
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load(tmp_path / "again.toml") == config
    assert from_dict(unflatten(flatten(config)), "test") == config
    assert config.train.profile_steps == (1, 2) and config.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--model.moe.topk=3", "--model.moe.topk=3: unknown key; did you mean model.moe.top_k?"),
        ("--train.lr=1e-3", "did you mean optimizer.lr?"),
        ("--trian.steps=3", "did you mean train?"),
        ("--train.steps=many", "--train.steps=many = 'many': must be an integer"),
        ("--train.steps=1.5", "= 1.5: must be an integer"),
        ("--train.steps=true", "= True: must be an integer"),
        ("--train.steps=0", "train.steps = 0: must lie between 1 and"),
        ("--model.tie_embeddings=1", "must be true or false"),
        ("--schedule.kind=cosin", "must be one of wsd, cosine, linear; did you mean cosine?"),
        (
            "--model.moe.top_k=9",
            "model.moe.top_k = 9: a token cannot visit more than n_experts = 8",
        ),
        (
            "--model.moe.top_k=1",
            "model.moe.norm_top_k = true with top_k = 1: one score divided by itself is 1",
        ),
        ("--model.attention.n_kv_heads=3", "must divide n_heads = 4"),
        ("--model.attention.head_dim=7", "must be even"),
        ("--data.validation_fraction=0.9", "must lie between 0.0 and 0.5"),
        ("--train=3", "--section.key=value"),
        ("--train.steps", "--section.key=value"),
        ("--train.steps.more=3", "steps is a key, not a section"),
        ("--train.profile_steps=[99]", "steps are numbered 1 to train.steps = 12"),
        ("--train.profile_steps=3", "must be a list of integers"),
        ("--precision.fp8.warn_below_db=3", "nothing is reported with diagnose_every = 0"),
        ("--precision.fp8.power_of_two=true", "use recipe = 'fp8_blockwise'"),
        ("--run.dir=", "dir is empty"),
        ("--optimizer.lr=nan", "--optimizer.lr=nan = nan: must be a finite number"),
        ("--optimizer.lr=1e400", "must be a finite number"),
        ("--optimizer.beta1=1", "must lie between 0.0 and 0.999999"),
        ("--model.init_std=0", "--model.init_std=0: model.init_std = 0.0: must lie between"),
        ("--model.d_ff=-4", "must lie between 0 and"),
        ("--model.n_layers=100000000", "must lie between 1 and 10000"),
        ("--model.moe.bias_update_rate=2", "must lie between 0 and 1"),
        ("--train.threads=100000", "must lie between 0 and 1024"),
        ("--foo.bar=1", "--foo.bar=1: unknown key"),
    ],
)
def test_a_mistake_is_one_line_with_place_and_remedy(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TINY, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, expected in [
        ("[run", "not valid TOML"),
        ("[run]\n", f"{path}: run.dir: this key is required"),
        ("[run]\ndir = 'x'\n[optimiser]\n", "did you mean optimizer?"),
        ("run = 3", "must be a section [run]"),
        ("[run]\ndir = 'x'\n", f"{path}: model: this section is required"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"mine\.toml") as caught:
            load(path)
        assert expected in str(caught.value)
    with pytest.raises(ConfigError, match=r"demo\.toml"):
        load(tmp_path / "absent.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


def test_experts_with_biases_keep_their_activation() -> None:
    path = ROOT / "configs" / "tiny" / "gpt_oss.toml"
    with pytest.raises(ConfigError, match="not for experts with biases"):
        load(path, ["--parallel.recompute_swiglu=true"])


def test_one_normalised_weight_teaches_nothing_unless_the_model_came_so() -> None:
    top_1 = "--model.moe.top_k=1"
    for fine in ("--model.moe.norm_top_k=false", "--checkpoint.init_from=elsewhere"):
        assert load(TINY, [top_1, fine]).model.moe.top_k == 1
    for name in ("mixtral", "qwen3", "glm4", "gpt_oss", "deepseek_v3"):
        path = ROOT / "configs" / "tiny" / f"{name}.toml"
        with pytest.raises(ConfigError, match=r"norm_top_k = false, or a larger top_k$"):
            load(path, [top_1])


def test_strings_go_without_quotes_and_later_overrides_win() -> None:
    config = load(TINY, ["--run.dir=a=b", "--run.dir='c d'", "--precision.recipe=bf16"])
    assert config.run.dir == "c d" and config.precision.recipe == "bf16"


@pytest.mark.parametrize(
    ("parallel", "world", "expected"),
    [
        (
            ParallelConfig(dp_shard=2),
            3,
            "dp_replicate 1 x dp_shard 2 x tp 1 = 2, but there are 3 ranks",
        ),
        (ParallelConfig(dp_replicate=2), 3, "start a multiple of 2 ranks"),
        (ParallelConfig(dp_replicate=2, dp_shard=1), 4, "set parallel.dp_shard = 2"),
        (
            ParallelConfig(ep=3),
            3,
            "parallel.ep = 3: must divide model.moe.n_experts = 8; use one of 1",
        ),
        (ParallelConfig(ep=4), 2, "dp_shard 2 x tp 1 = 2 has no whole solution; use one of 1, 2"),
        (ParallelConfig(tp=2, ep=8), 4, "efsdp x ep x etp 1 = dp_shard 2 x tp 2 = 4 has no whole"),
        (ParallelConfig(tp=4), 4, "parallel.tp = 4: must divide model.attention.n_kv_heads = 2"),
        (ParallelConfig(tp=3), 3, "parallel.tp = 3: must divide model.attention.n_heads = 4"),
        (ParallelConfig(ep=1), 3, "micro_batch 2 x 3 data ranks = 6; the nearest is 6"),
    ],
)
def test_an_impossible_mesh_shows_its_product(
    parallel: ParallelConfig, world: int, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(replace(load(TINY, ["--train.micro_batch=2"]), parallel=parallel), world)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 4)])
def test_minus_one_takes_what_fits(world: int, ep: int) -> None:
    parallel_dims = resolve(load(TINY, ["--train.micro_batch=2"]), world)
    assert (parallel_dims.dp_shard, parallel_dims.ep, parallel_dims.efsdp) == (world, ep, 1)


def test_the_command_checks_without_torch() -> None:
    code = (
        "import sys; from configs.__main__ import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "configs/demo.toml", "--ranks=2"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ep                2" in done.stdout


def test_the_command_says_what_has_no_effect_and_how_it_is_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command([str(TINY), "--model.n_dense_layers=3"]) == 0
    assert "none of the 3 layers has experts" in capsys.readouterr().out
    assert command(["--help"]) == 0
    assert "FILE.toml [--ranks N]" in capsys.readouterr().out


def test_the_command_fails_in_one_line() -> None:
    done = run("-m", "configs", "configs/demo.toml", "--parallel.ep=3", code=2, fresh=True)
    assert done.stderr.count("\n") == 1 and "parallel.ep = 3" in done.stderr


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == reference(), "run: python -m configs --reference > docs/config.md"
    assert "|  |" not in page, "a key has no documentation"
