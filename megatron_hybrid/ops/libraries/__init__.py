"""Operations in the kernels of other libraries, for GPUs: chosen by name alone, to compare with and to fall back on.

Each file wraps what it names in the arguments of the specification. What a library cannot do is refused, here by shape and in
``layers.specs`` by device, precision and determinism. None is imported before it is chosen.
"""
