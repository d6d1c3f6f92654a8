"""Benchmarks: named shapes, one harness, one file per comparison, one report.

``python -m benchmarks`` lists them; ``python -m benchmarks lora_vs_full`` runs one.
"""
