"""A model is found in a folder, a file, an installed package or on the hub."""

import sys

import huggingface_hub
import pytest

from lora_jax.files.fetch import FetchError, find_model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that ships two models, and may not be imported."""
    root = tmp_path / "site" / "demo_models"
    (root / "model").mkdir(parents=True)
    (root / "model" / "f").write_text("")
    (root / "small.gguf").write_text("")
    (root / "__init__.py").write_text("raise SystemExit")
    (tmp_path / "site" / "demo_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_folders_and_gguf_files_are_taken_and_no_other_files(tmp_path):
    for name in ("m.gguf", "m.bin"):
        (tmp_path / name).write_text("")
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match=r"m.bin must be a model folder, a .gg"):
        find_model(tmp_path / "m.bin")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/at/all must be a model"):
        find_model("/nowhere/at/all")


def test_an_installed_package_is_looked_into_and_not_imported(package):
    assert find_model("package:demo_models/model") == package / "model"
    assert find_model("package:demo_models/small.gguf") == package / "small.gguf"
    assert "demo_models" not in sys.modules


def test_a_package_without_that_model_says_what_it_has(package):
    for inside in ("other", "model/f", "__init__.py"):
        with pytest.raises(
            FileNotFoundError,
            match=rf"folder or .gguf file {inside};.*folders are \['model'\]",
        ):
            find_model(f"package:demo_models/{inside}")
    for name in ("demo_module", "no_such_package"):
        with pytest.raises(
            FileNotFoundError, match=f"finds no package {name}. Install"
        ):
            find_model(f"package:{name}/model")


@pytest.mark.parametrize("inside", ["", "/", "/../x", "//etc", "/a/../../x", ".b/c"])
def test_a_model_in_a_package_must_lie_inside_it(package, inside):
    with pytest.raises(
        ValueError, match=r"must be package:NAME/folder: the package.s import"
    ):
        find_model(f"package:demo_models{inside}")


def test_a_hub_id_that_cant_be_downloaded_says_both(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FetchError, match=r"me/bert .*no such folder.*no route"):
        find_model("me/bert")
