"""Knowing before paying: what a training step needs, compiled without its devices.

A part of its own beside `parallel`, because it compiles whole steps of `train`, which
itself builds on `parallel`.
"""
