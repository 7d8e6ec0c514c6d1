"""Fits the kernels into training frameworks: options, parallelism, ``main_grad``, patches."""
