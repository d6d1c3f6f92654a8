"""Hostile inputs to all that reads files; see README.md."""
