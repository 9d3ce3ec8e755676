"""AdamW with state by name, its moments in fp32 or bf16, and the learning rate as a function of the
step.
"""
