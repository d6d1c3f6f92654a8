"""Experiments on real weights and data, each answering one question.

`fetch` and `vader` download the models and data used by experiments, benchmarks and
tests. They are not part of the library.
"""
