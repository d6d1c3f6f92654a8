"""Loads what lora_jax exports and merges in PEFT and transformers; prints a table.

One command, with ``lora_jax[bench]``, writes the table to ``parity.md``::

    python -m tests.golden.check_peft

Its halves need not share an environment, and may take some models only; `read` replaces
their rows of the table::

    python -m tests.golden.check_peft write DIR [NAME...]  # with lora_jax[train]
    python tests/golden/check_peft.py read DIR     # with torch, transformers 5, PEFT

For every golden model and adapter, `write` imports the adapter, exports it (and makes
it portable where it can be), merges it, and notes our own logits. `read` loads the
exported folder on the base with PEFT and the merged folder with transformers, and
compares their logits with ours and with those PEFT computed from its own file. Any
difference above 2e-4 is a failure.
"""

# ruff: noqa: T201 - a script prints its results

import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np

HERE = pathlib.Path(__file__).parent
LIMIT = 2e-4
INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "pixel_values"),
    "decoder_input_ids",
)


def reference(family: str) -> dict[str, np.ndarray]:
    name = "peft_reference.npz" if family == "bert" else "reference.npz"
    with np.load(HERE / family / name) as arrays:
        return dict(arrays)


def own_adapters(family: str, model):
    """Adapters that PEFT didn't write: what only our models are asked for."""
    from lora_jax import LoRAConfig

    if family == "qwen2":
        yield "own_tied", LoRAConfig(rank=2, alpha=3, targets=["embed", "query"])
        yield "own_biases", LoRAConfig(rank=2, targets=["query"], bias="lora_only")
        yield "own_tokens", LoRAConfig(rank=2, targets=["query"], tokens=[3, 7, 12])
    if family == "llama":
        targets = ["embed", "key"]
        yield "own_dora_embed", LoRAConfig(rank=2, targets=targets, dora=True)
        tokens = {"embed": [12, 3], "head": [7]}
        yield "own_tokens", LoRAConfig(rank=2, targets=["query"], tokens=tokens)
    if family == "vit":
        targets = ["embeddings/patch", "query"]
        yield "own_dora_conv", LoRAConfig(rank=2, targets=targets, dora=True)
    if family in ("gemma4_moe", "gpt_oss", "olmoe"):  # experts and attention
        yield "own_linear", LoRAConfig(rank=2, alpha=3)
        yield "own_router", LoRAConfig(rank=2, targets=["router", "experts/down"])


def write(target: pathlib.Path, names: tuple[str, ...] = ()):
    import jax

    from lora_jax import export_adapter, load_model, save_model

    def save(name, model, inputs, *, portable):
        folder, config = target / name, model.module.config
        logits = jax.jit(model.module.apply)(model.variables, *inputs)
        source = {"pooling": getattr(model.module.model, "pooling", None)}
        export_adapter(folder / "peft", model.variables, config, model)
        if portable:
            export_adapter(
                folder / "portable", model.variables, config, model, portable=True
            )
        merged = model.module.merge(model.variables)
        save_model(folder / "merged", merged, model.path, **source)
        np.savez(folder / "ours.npz", logits=np.asarray(logits))
        print(name, flush=True)

    for home in sorted(path.parent for path in HERE.glob("*/config.json")):
        family, folders = home.name, sorted(home.glob("peft_*/"))
        if not folders or (names and family not in names):
            continue
        batch = reference(family)
        inputs = [batch[name] for name in INPUTS if name in batch]
        for folder in folders:
            model = load_model(home, adapter=folder)
            kind = folder.name.removeprefix("peft_")
            save(
                f"{family}/{kind}", model, inputs, portable=kind in ("plain", "rslora")
            )
        for kind, config in own_adapters(family, home):
            model = load_model(home, lora=config, key=jax.random.key(0))
            trained = {
                name: jax.tree.map(lambda x: x + 0.1, model.variables[name])
                for name in ("lora", "params")
                if name in model.variables
            }
            model = model._replace(variables={**model.variables, **trained})
            save(f"{family}/{kind}", model, inputs, portable=False)


def read(target: pathlib.Path) -> tuple[float, str]:
    import peft
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worst, lines = 0.0, []

    def tell(line):
        print(line, flush=True)
        lines.append(line)

    tell(
        "| model | adapter | PEFT, exported | portable | merged | ours to PEFT's own |"
    )
    tell("|---|---|---|---|---|---|")
    for file in sorted(target.glob("*/*/ours.npz")):
        kind, family = file.parent.name, file.parent.parent.name
        batch = reference(family)
        torch_batch = {k: torch.from_numpy(batch[k]) for k in INPUTS if k in batch}
        ours = np.load(file)["logits"]
        settings = json.loads((HERE / family / "config.json").read_text())
        cls = getattr(transformers, settings["architectures"][0])
        eager = {"attn_implementation": "eager"}
        text = settings.get("text_config") or {}
        if {*settings, *text} & {"num_experts", "num_local_experts"}:
            eager["experts_implementation"] = "eager"  # the others refuse odd sizes

        def logits(model, batch=torch_batch):
            with torch.no_grad():
                found = model.eval()(**batch)
            has_logits = "logits" in found
            return (found.logits if has_logits else found.logits_per_image).numpy()

        errors = []
        for name in ("peft", "portable", "merged"):
            folder = file.parent / name
            if not folder.is_dir():
                errors.append(None)
                continue
            if name == "merged":
                model = cls.from_pretrained(folder, **eager)
            else:
                base = cls.from_pretrained(HERE / family, **eager)
                model = peft.PeftModel.from_pretrained(base, folder)
            errors.append(float(np.abs(logits(model) - ours).max()))
        wanted = batch.get(f"logits_{kind}")
        errors.append(None if wanted is None else float(np.abs(wanted - ours).max()))
        worst = max([worst, *(error for error in errors if error is not None)])
        cells = ["–" if error is None else f"{error:.1e}" for error in errors]
        tell(f"| {family} | {kind} | {' | '.join(cells)} |")
    tell(
        f"\nworst: {worst:.1e}; PEFT {peft.__version__}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}"
    )
    return worst, "\n".join(lines) + "\n"


def update(table: str):
    """Writes the table, with the rows of models that it hasn't as they are."""
    file = HERE / "parity.md"
    old, new = (text.splitlines() for text in (file.read_text(), table))
    names = {line.split("|")[1] for line in new if line.startswith("|")}
    kept = [o for o in old if o.startswith("|") and o.split("|")[1] not in names]
    rows = sorted([*new[2:-2], *kept])
    cells = [cell for row in rows for cell in row.split("|")[3:-1]]
    worst = max(float(cell) for cell in cells if cell.strip() != "–")
    said = new[-1].replace(new[-1].split(";")[0], f"worst: {worst:.1e}")
    file.write_text("\n".join([*new[:2], *rows, "", said]) + "\n")


def main(command: str = "both", directory: str = "", *names: str) -> int:
    if command == "write":
        write(pathlib.Path(directory), names)
        return 0
    if command == "read":
        worst, table = read(pathlib.Path(directory))
        update(table)
        return int(worst > LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder))
        worst, table = read(pathlib.Path(folder))
    (HERE / "parity.md").write_text(table)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
