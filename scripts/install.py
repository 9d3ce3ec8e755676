"""Install the dependencies in pyproject.toml: `python -m scripts.install [--dev]`.

The Makefile runs it with the interpreter of `.venv`, which then has only the standard library and
pip. All packages are installed by one `pip install`, so that pip's own configuration (index, proxy,
certificates, PIP_* variables) determines their source. Phalanx itself is not built: it runs from
its checkout.

Torch has several builds. Without a CUDA device the default wheel would install gigabytes of CUDA
packages unnecessarily, so the newest `+cpu` build is used if pip offers one; with a CUDA device the
`+cpu` builds are excluded, because pip ranks `2.13.0+cpu` above `2.13.0`.
"""

import argparse
import compileall
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip"]


def has_cuda() -> bool:
    """Whether this machine has an NVIDIA device (determined before torch is installed)."""
    if Path("/dev/nvidia0").exists():
        return True
    return shutil.which("nvidia-smi") is not None and (
        subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    )


def cpu_builds(requirement: Requirement) -> list[str]:
    """The `+cpu` versions within the range that pip offers here, newest first."""
    listing = subprocess.run([*PIP, "index", "versions", "torch"], capture_output=True, text=True)
    found = dict.fromkeys(re.findall(r"[^\s,()]+\+cpu\b", listing.stdout))  # some are printed twice
    return [version for version in found if requirement.specifier.contains(version)]


def choose_torch(requirement: Requirement, wanted: str) -> str:
    """The requirement for pip. `wanted` is "" (detect the device), "cpu", "cuda" or a
    requirement."""
    if wanted not in ("", "cpu", "cuda"):
        return wanted
    if not wanted:
        try:
            if requirement.specifier.contains(metadata.version("torch")):
                return str(requirement)  # keep the build that is installed
        except metadata.PackageNotFoundError:
            pass
        if sys.platform != "linux":
            return str(requirement)
    offered = cpu_builds(requirement)
    if wanted == "cuda" or (not wanted and has_cuda()):
        return ",".join([str(requirement), *(f"!={version}" for version in offered)])
    if offered:
        return f"torch=={offered[0]}"
    if wanted == "cpu":
        sys.exit("No +cpu build of torch is offered to pip: point PIP_EXTRA_INDEX_URL to an index.")
    print(
        "No CUDA device here, but no +cpu build of torch is offered to pip. The default build\n"
        "brings several GB of CUDA packages; PIP_EXTRA_INDEX_URL=<index of CPU builds> avoids it."
    )
    return str(requirement)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="also what checks and tests need")
    parser.add_argument("--torch", default="", help="cpu, cuda or a requirement; default: look")
    args = parser.parse_args()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"]
    if args.dev:
        requirements = requirements + project["optional-dependencies"]["dev"]
    [torch] = [r for r in map(Requirement, requirements) if r.name == "torch"]
    choice = choose_torch(torch, args.torch)

    log = Path(sys.prefix) / "install.log"
    print(f"Installing {choice} and {len(requirements) - 1} more; pip writes to {log}", flush=True)
    # pip would compile the bytecode on one core; compileall does it on all of them.
    command = [*PIP, "install", "--no-compile", "--progress-bar=off", choice, *requirements]
    with log.open("w") as out:
        failed = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode != 0
    if failed:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        sys.exit(f"{tail}\npip could not install the dependencies; its whole output: {log}")
    compileall.compile_dir(sysconfig.get_paths()["purelib"], quiet=2, workers=0)


if __name__ == "__main__":
    main()
