"""Experiments on real weights and data, one question each.

`fetch` and `vader` download the models and sentences that experiments, benchmarks and
tests use. They are not part of the library.
"""
