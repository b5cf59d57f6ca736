"""What pruning and quantization of a linear layer on its inputs share: Hessians, column sweeps, errors.

A batch holds matrices of one shape: weights [B, R, C] of B experts (or 1), whose rows may stack several
matrices with a common input (`splits`: the rows of each), and Gram matrices [B, C, C] of those inputs.
"""
