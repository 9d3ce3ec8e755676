"""Site files: valid ones, and texts that are refused in one line before a script is rendered."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from launch.site import load_site, seconds

FULL = """\
[slurm]
partition = "gpu,long"
account = "lab-1"
qos = "high"
time = "2-00:00:00"
exclude = "n[1-3],n9"
constraint = "h100"
signal_s = 120
[node]
gpu = "H100-80GB"
gpus = 8
cpus = 96
numa_binding = true
interface = "ib0"
scratch = "/scratch/my folder"
[software]
modules = ["cuda/12.8", "gcc"]
activate = "/shared/venv"
container = ["apptainer", "exec", "--nv", "an image.sif"]
environment = ["NCCL_DEBUG=WARN", "EMPTY=", "A=b c; $(d)"]
[faults]
attempts = 5
"""


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return load_site(path)


def test_a_full_site_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(FULL)
    site = load_site(path)
    assert site.node.ranks_per_node == 8 and site.node.gpu_memory_gb == 80
    assert site.slurm.exclude == "n[1-3],n9" and site.faults.attempts == 5
    assert load_site(None).node.ranks_per_node == 1
    assert seconds("2-03:04:05") == ((2 * 24 + 3) * 60 + 4) * 60 + 5 and seconds("0:00:09") == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[slurm]\npartitoin = 'x'", "did you mean slurm.partition?"),
        ("[slurms]\n", "slurms: unknown key; did you mean slurm?"),
        ("[slurm]\ngpus = 8", "did you mean node.gpus?"),
        ("[slurm]\npartition = 3", "must be a string"),
        ("[slurm]\npartition = 'a b'", "slurm.partition = 'a b': must be letters"),
        ("[slurm]\npartition = 'a\\n#SBATCH --uid=0'", "slurm.partition"),
        ('[slurm]\npartition = "a\\n#SBATCH --uid=0"', "slurm.partition"),
        ("[slurm]\npartition = '--wrap=x'", "slurm.partition"),
        ("[slurm]\naccount = '$(id)'", "slurm.account"),
        ("[slurm]\nqos = '`id`'", "slurm.qos"),
        ("[slurm]\nexclude = 'n1;id'", "slurm.exclude"),
        ("[slurm]\nconstraint = 'a|b'", "slurm.constraint"),
        ("[slurm]\ntime = '1 hour'", "slurm.time"),
        ("[slurm]\ntime = ''", "slurm.time"),
        ("[slurm]\ntime = '00:05:00'\nsignal_s = 300", "before the start of a job"),
        ("[slurm]\nsignal_s = 1", "slurm.signal_s = 1: must lie between"),
        ("[node]\ngpu = 'H100'", "did you mean H100-80GB?"),
        ("[node]\ngpu = 'H100-80GB'", "gpus = 0: with gpu = H100-80GB it must be at least 1"),
        ("[node]\ngpus = 8", "gpus = 8: with gpu = none it must be 0"),
        ("[node]\nnuma_binding = true", "numa_binding = true"),
        ("[node]\ninterface = 'eth0; id'", "node.interface"),
        ("[node]\nscratch = 'relative'", "node.scratch"),
        ('[node]\nscratch = "/a\\nid"', "node.scratch"),
        ("[software]\nmodules = ['a; id']", "software.modules: 'a; id'"),
        ("[software]\nactivate = 'venv'", "software.activate"),
        ('[software]\ncontainer = ["a\\nb"]', "software.container"),
        ("[software]\nenvironment = ['1A=b']", "must be NAME=value"),
        ("[software]\nenvironment = ['A;id=b']", "must be NAME=value"),
        ('[software]\nenvironment = ["A=b\\nid"]', "must be NAME=value"),
        ("[software]\nenvironment = ['RANK=1']", "leave it out"),
        ("[software]\nenvironment = ['SLURM_JOB_ID=1']", "leave it out"),
        ("[software]\nenvironment = ['BASH_ENV=/x']", "leave it out"),
        ("[faults]\nattempts = 0", "faults.attempts = 0"),
        ("slurm = 3", "must be a section [slurm]"),
        ("[slurm", "site.toml"),
    ],
)  # fmt: skip
def test_a_wrong_site_file_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    said = str(refused.value)
    assert expected in said and "\n" not in said and "site.toml" in said
