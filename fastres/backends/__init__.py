"""Adapters from the kernels to the launch signature of ``csrc/launch.h``; ``reference`` is its meaning."""
