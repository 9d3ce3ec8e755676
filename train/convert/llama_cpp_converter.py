"""llama.cpp's converter, told how a tokenizer trained here cuts words.

    PYTHON -P train/convert/llama_cpp_converter.py LLAMA_CPP PRE ARGUMENTS OF convert_hf_to_gguf.py

The converter recognises a tokenizer by a hash of the token ids it gives a fixed text, so it cannot
know one that was trained yesterday; and for some architectures it looks up special tokens that only
the tokenizer of the published model has. PRE is the value of `tokenizer.ggml.pre`, and the
vocabulary is written as what it is, byte-level BPE, whatever the architecture.
"""

import sys
from typing import Any


def main(llama_cpp: str, pre: str) -> None:
    """Run the converter in the source tree `llama_cpp` with the arguments left in sys.argv."""
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
