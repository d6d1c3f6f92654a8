"""Experiments: real weights and data, one question each, numbers with their price.

`fetch` and `vader` bring the models and sentences that the experiments, benchmarks and
tests use; they are no part of the library.
"""
