"""The tiny model, data and config of the command line's tests."""

from tests.cli.conftest import compilation_cache, config, data_dir, model_dir

__all__ = ["compilation_cache", "config", "data_dir", "model_dir"]
