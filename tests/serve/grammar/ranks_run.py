"""Structured output as a script uses it; alone or under torchrun.

`ranks_run.py TP OUT.json FOLDER` generates with `--tp TP`.
"""

import json
import sys
from pathlib import Path

import serve
from serve.grammar import processes
from tests.serve.forked_child import launch_worker
from tests.serve.grammar.conftest import PERSON


def main(tp: int, out: Path, folder: str) -> None:
    processes.launch = launch_worker
    greedy = serve.SamplingParams(max_tokens=120, temperature=0, json_schema=PERSON)
    sampled = serve.SamplingParams(max_tokens=120, seed=3, n=2, json_schema=PERSON)
    with serve.Engine(folder, kv_tokens=2048, tp=tp) as engine:
        found = [[one.text for one in engine.generate("x", params)] for params in (greedy, sampled)]
        n_jumped = engine.core.n_jumped
    out.write_text(json.dumps({"texts": found, "jumped": n_jumped}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
