"""Programs in which a third-party library reads an export; each runs alone, in that library's venv.

    PYTHON -P scripts/check_readers/with_NAME.py REQUEST.json ANSWER.json

They import none of our modules and share no code, so that no error of ours can be in all of them.
The request: `folder` (the export, or the GGUF), `work` (an empty folder), `texts`, `chat`
(messages), `prompts` (token ids), `n_tokens`. The answer: `version`, `encoded` (each text's ids),
`chat` (the rendered messages), `tokens` and `logprobs` (per prompt, greedy, `n_tokens` long, past
any end of text). All computation is in fp32, the KV cache too.
"""
