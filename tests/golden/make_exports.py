"""Writes ``tests/golden/exports``: what PEFT computes with adapters that we export.

For every family of encoders, an adapter of the bare model (``bare``), of the model with
its head (``head``), and of the bare model with a head trained here (``trained``). Its
halves need not share an environment::

    python -m tests.golden.make_exports write    # with lora_jax[train]: the adapters
    python -m tests.golden.make_exports read     # with torch, transformers 5, PEFT

`read` opens the base as `AutoPeftModel` finds it in the exported folder, fails if PEFT
misses a tensor, and keeps the outputs in ``reference.npz``: logits, or the mean of the
hidden states of a bare model. The test exports again, and compares both.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import warnings
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
EXPORTS = HERE / "exports"
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
BARE = {
    "bert": "BertModel",
    "dinov2": "Dinov2Model",
    "distilbert": "DistilBertModel",
    "roberta": "RobertaModel",
    "vit": "ViTModel",
}
KINDS = ("bare", "head", "trained")
CASES = [(family, kind) for family in BARE for kind in KINDS]


def inputs(family: str) -> dict[str, np.ndarray]:
    name = "peft_reference.npz" if family == "bert" else "reference.npz"
    with np.load(HERE / family / name) as arrays:
        return {key: arrays[key] for key in INPUTS if key in arrays}


def make_base(family: str, kind: str, target: pathlib.Path) -> pathlib.Path:
    """The golden model, or what its bare class would save of it."""
    from safetensors.numpy import load_file, save_file

    target.mkdir(parents=True)
    config = json.loads((HERE / family / "config.json").read_text())
    tensors = load_file(HERE / family / "model.safetensors")
    if kind != "head":
        config["architectures"] = [BARE[family]]
        for key in ("id2label", "label2id"):
            config.pop(key, None)
        tensors = {
            name.removeprefix(f"{family}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{family}.")
        }
    if kind == "trained":
        config["num_labels"] = 3
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def adapted(family: str, kind: str, base: pathlib.Path):
    """The base with an adapter whose numbers depend on the names alone."""
    import jax

    from lora_jax import LoRAConfig, load_model
    from lora_jax.models.families import FAMILIES
    from lora_jax.tree.paths import flatten, unflatten

    options, train = {}, ()
    if kind == "trained":
        own = FAMILIES[family]
        options = {"num_labels": 3, "pooling": own.head_pooling}
        train = own.head
    config = LoRAConfig(
        rank=2, alpha=3, targets=["query", "mlp/down"], layers=[0], train=train
    )
    model = load_model(base, lora=config, key=jax.random.key(0), **options)

    def fill(tree):
        return unflatten(
            {
                path: np.random.default_rng(zlib.crc32(path.encode()))
                .normal(0, 0.3, leaf.shape)
                .astype(np.float32)
                for path, leaf in flatten(tree).items()
            }
        )

    trained = {
        name: fill(model.variables[name])
        for name in ("lora", "params")
        if name in model.variables
    }
    return model._replace(variables={**model.variables, **trained})


def write():
    from lora_jax import export_adapter

    shutil.rmtree(EXPORTS, ignore_errors=True)
    for family, kind in CASES:
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(family, kind, pathlib.Path(folder) / "base")
            model = adapted(family, kind, base)
            export_adapter(
                EXPORTS / f"{family}_{kind}",
                model.variables,
                model.module.config,
                model,
                base_model="base",
            )


def read():
    import peft
    import torch
    import transformers

    warnings.filterwarnings("error", message="Found missing adapter keys")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    arrays = {}
    for family, kind in CASES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # where the adapter's "base" is
            make_base(family, kind, pathlib.Path(folder) / "base")
            options = {"num_labels": 3} if kind == "trained" else {}
            model = peft.AutoPeftModel.from_pretrained(
                EXPORTS / f"{family}_{kind}", **options
            ).eval()
        batch = {k: torch.from_numpy(v) for k, v in inputs(family).items()}
        with torch.no_grad():
            out = model(**batch)
            if kind == "bare":
                hidden = out.last_hidden_state
                mask = batch.get("attention_mask", torch.ones(hidden.shape[:2]))
                mask = mask[..., None].float()
                found = (hidden * mask).sum(1) / mask.sum(1)
            else:
                found = out.logits
            with model.disable_adapter():
                base = model(**batch)
        shown = base.last_hidden_state if kind == "bare" else base.logits
        against = out.last_hidden_state if kind == "bare" else out.logits
        assert (shown - against).abs().max() > 0.01, (family, kind)
        arrays[f"{family}_{kind}"] = found.numpy()
        print(family, kind, type(model.base_model.model).__name__)  # noqa: T201 - a script prints its results
    versions = {
        "script": "tests/golden/make_exports.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    arrays["metadata"] = np.array(json.dumps(versions))
    np.savez_compressed(EXPORTS / "reference.npz", **arrays)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]]()
