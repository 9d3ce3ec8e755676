"""OpenVINO GenAI: optimum-intel traces transformers' model once, OpenVINO compiles and runs it.

optimum-intel 2.2 has no GLM-4 MoE; `list_glm4_moe` adds it from existing parts: Qwen3's inputs, and
experts that compute all tokens and multiply them by their weights, which a trace needs (a loop over
the chosen experts would be traced with the choice of one example).
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",  # the default is 8 bit
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to `request`."""
    list_glm4_moe()
    main_export(
        request["folder"],
        request["work"],
        task="text-generation-with-past",
        ov_config=OVConfig(dtype="fp32"),
        convert_tokenizer=True,
    )
    scheduler = SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False
    pipeline = ContinuousBatchingPipeline(request["work"], scheduler, "CPU", EXACT)
    handles = [
        pipeline.add_request(i, openvino.Tensor(np.array([prompt])), greedy(request["n_tokens"]))
        for i, prompt in enumerate(request["prompts"])
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    answers = [handle.read_all()[0] for handle in handles]
    tokenizer = pipeline.get_tokenizer()
    return {
        "version": f"openvino-genai {openvino_genai.__version__}",
        "encoded": [tokenizer.encode(text).input_ids.data[0].tolist() for text in request["texts"]],
        "chat": tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True),
        "tokens": [list(answer.generated_ids) for answer in answers],
        "logprobs": [list(answer.generated_log_probs) for answer in answers],
    }


def list_glm4_moe() -> None:
    """Register an export recipe for model type glm4_moe."""
    from optimum.exporters.openvino.model_configs import (
        Qwen3OpenVINOConfig,
        register_in_tasks_manager,
    )
    from optimum.exporters.openvino.model_patcher import (
        OVDecoderModelPatcher,
        lfm2_moe_experts_forward,
    )

    glm4_moe: Any = importlib.import_module("transformers.models.glm4_moe.modeling_glm4_moe")

    class Patcher(OVDecoderModelPatcher):
        def __enter__(self) -> None:
            super().__enter__()
            glm4_moe.Glm4MoeNaiveMoe.forward = lfm2_moe_experts_forward

    @register_in_tasks_manager("glm4_moe", "text-generation-with-past", library_name="transformers")
    class Glm4MoeOpenVINOConfig(Qwen3OpenVINOConfig):
        _MODEL_PATCHER = Patcher


def greedy(n_tokens: int) -> GenerationConfig:
    """`n_tokens` greedy tokens, past any end of text."""
    config = GenerationConfig()
    config.max_new_tokens = n_tokens
    config.do_sample = False
    config.ignore_eos = True
    config.logprobs = 1
    return config


if __name__ == "__main__":
    answer = read(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
