"""A script as a user writes it, with `serve.Engine`; alone or under torchrun.

`engine_run.py TP EP OUT.json FOLDER SAME OTHER` generates with FOLDER, with the weights of SAME,
and tries those of OTHER, another model.
"""

import json
import sys
from pathlib import Path

import serve
from configs.errors import UserError

PROMPTS = [[1], [5, 17, 25, 3], list(range(40, 61)), [n * 7 % 96 for n in range(1500)]]
"""The last is no single message: it has more than 1,024 tokens."""


def main(tp: int, ep: int, out: Path, folders: list[str]) -> None:
    first, same, other = folders
    params = serve.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    sampled = serve.SamplingParams(max_tokens=8, seed=3, top_p=0.9, n=2)
    options = serve.EngineOptions(
        kv_tokens=4096, page_size=8, max_batch_tokens=2000, overlap="on",
        absorb_mla="deepseek" in first,
    )  # fmt: skip
    with serve.Engine(first, options, tp=tp, ep=ep) as engine:
        found = [[one.tokens for one in engine.generate(PROMPTS, params)]]
        found.append([one.tokens for one in engine.generate(PROMPTS[:2], sampled)])
        counts = engine.thread.expert_counts().tolist()
        for _ in engine.stream(PROMPTS[0], serve.SamplingParams(max_tokens=500, ignore_eos=True)):
            break  # the rest is cancelled
        engine.update_weights(same)
        found.append([one.tokens for one in engine.generate(PROMPTS[:3], params)])
        try:
            engine.update_weights(other)
        except UserError as error:
            refusal = str(error)
        found.append([one.tokens for one in engine.generate(PROMPTS[:3], params)])
    out.write_text(json.dumps({"tokens": found, "counts": counts, "refusal": refusal}))
    print("the script went on")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
