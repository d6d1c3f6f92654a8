"""Pretrained models as plain Linen modules; how their files are read and written."""
