"""Fuzzing everything that reads files; see README.md."""
