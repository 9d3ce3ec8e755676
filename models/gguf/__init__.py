"""Reading GGUF files: their layout, the Llama architecture, their tokenizers."""
