"""Dense products in FP8 with a scale per block (NT, NN, TN), in Triton and Gluon, and a linear
layer built on them.
"""
