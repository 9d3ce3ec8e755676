"""Runs llama.cpp's converter with the pre-tokenizer of a tokenizer trained here.

    PYTHON -P train/convert/llama_cpp_converter.py LLAMA_CPP PRE ARGUMENTS OF convert_hf_to_gguf.py

The converter recognizes a tokenizer by a hash of the token ids of a fixed text, so a newly trained
one is unknown; and for some architectures it looks up special tokens that only the tokenizer of the
published model has. PRE is the value of `tokenizer.ggml.pre`, and the vocabulary is written as
byte-level BPE, its actual type, for every architecture.
"""

import sys
from typing import Any


def main(llama_cpp: str, pre: str) -> None:
    """Run the converter in the source tree `llama_cpp` with the remaining arguments in sys.argv."""
    sys.path.insert(0, llama_cpp)
    import convert_hf_to_gguf as converter

    find = converter.get_model_class

    def find_and_tell(name: str, mmproj: bool = False) -> Any:
        model = find(name, mmproj=mmproj)
        model.get_vocab_base_pre = lambda self, tokenizer: pre
        model.set_vocab = model._set_vocab_gpt2
        return model

    converter.get_model_class = find_and_tell
    converter.main()


if __name__ == "__main__":
    _, llama_cpp, pre, *arguments = sys.argv
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    main(llama_cpp, pre)
