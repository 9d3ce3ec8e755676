"""`python -m serve generate EXPORT --prompt TEXT`: completions on the terminal, without a
server."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from configs.paths import read_text
from serve.engine.sampling_params import SamplingParams
from serve.frontend.engine import Engine
from serve.options import engine_options, make_parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is invalid."""
    defaults = SamplingParams(max_tokens=64)
    parser = make_parser("serve generate", "Complete prompts with an exported model.")
    parser.add_argument("--prompt", action="append", required=True, help="may be given again")
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message to the chat template"
    )
    for name, kind, text in (
        ("--max-tokens", int, "most tokens to generate"),
        ("--n", int, "answers to each prompt"),
        ("--temperature", float, "0: always the likeliest token"),
        ("--top-p", float, "sample from the fewest tokens that are so likely together"),
        ("--top-k", int, "sample from so many likely tokens; 0: from all"),
        ("--min-p", float, "sample from tokens this times as likely as the likeliest"),
        ("--presence-penalty", float, "on the logits of tokens the answer has"),
        ("--frequency-penalty", float, "the same, for every time"),
        ("--repetition-penalty", float, "factor on the logits of tokens that were there"),
        ("--seed", int, "the same answer again"),
    ):
        default = getattr(defaults, name[2:].replace("-", "_"))
        parser.add_argument(name, type=kind, default=default, help=text)
    parser.add_argument("--stop", action="append", default=[], help="end before this text")
    parser.add_argument("--json-schema", type=Path, help="file: the answer is JSON that matches it")
    parser.add_argument("--regex", help="the whole answer matches this regular expression")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    parser.add_argument("--json", action="store_true", help="one object per answer")
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> None:
    """Print every completion: a single one as it is generated, several each after its prompt."""
    names = SamplingParams.__dataclass_fields__.keys() & vars(options).keys()
    given = {name: getattr(options, name) for name in names} | {"stop": tuple(options.stop)}
    if options.json_schema is not None:
        given["json_schema"] = read_text(options.json_schema, "--json-schema")
    params = SamplingParams(**given)
    with Engine(
        options.folder, engine_options(options), dtype=options.dtype, device=options.device,
        tp=options.tp, ep=options.ep,
    ) as engine:  # fmt: skip
        prompts = [
            engine.chat_prompt([{"role": "user", "content": prompt}]) if options.chat else prompt
            for prompt in options.prompt
        ]
        if len(prompts) * params.n == 1 and not options.json:
            for output in engine.stream(prompts[0], params):
                print(output.text, end="", flush=True)
            print()
            return
        texts = [prompt for prompt in options.prompt for _ in range(params.n)]
        for prompt, one in zip(texts, engine.generate(prompts, params), strict=True):
            if options.json:
                answer = {"prompt": prompt, "text": one.text, "token_ids": one.tokens}
                print(json.dumps(answer | {"finish_reason": one.finish_reason}))
            else:
                print(f"--- {prompt}\n{one.text}")
