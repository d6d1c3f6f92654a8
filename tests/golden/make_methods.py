"""Writes ``tests/golden/methods``: what PEFT makes of the golden Llama by method.

Run at the root, in an environment with torch, transformers and peft (the extra
``bench``):
``python -m tests.golden.make_methods [METHOD ...]``.

``<method>`` is the adapter as PEFT saves it, of a base that PEFT changed converted to
one of the original base. ``<method>.npz`` holds, by module, PEFT's A and B at the start
and once they were changed, and the logits then.
"""

import pathlib
import sys
import warnings

import numpy as np
import peft
import torch
import transformers
from peft.optimizers import lorafa

HERE = pathlib.Path(__file__).parent
TARGET = HERE / "methods"
MODULES = ["q_proj", "down_proj"]
COMMON = {"r": 2, "lora_alpha": 3, "target_modules": MODULES}
CASES = {
    "pissa": peft.LoraConfig(init_lora_weights="pissa", **COMMON),
    "olora": peft.LoraConfig(init_lora_weights="olora", use_rslora=True, **COMMON),
    "lora_ga": peft.LoraConfig(
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale="stable"),
        **COMMON,
    ),
    "eva": peft.LoraConfig(
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0), **COMMON
    ),
    "lora_fa": peft.LoraConfig(**COMMON),
    "vera": peft.VeraConfig(r=5, target_modules=MODULES, projection_prng_key=3),
}


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(
        (HERE / "llama").relative_to(pathlib.Path.cwd()), dtype=torch.float32
    ).eval()


def factors_of(model) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("base_model.model."): value.detach().numpy().copy()
        for name, value in model.named_parameters()
        if "lora_" in name or "vera_" in name
    }


def change(model) -> None:
    """Moves A and B, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "vera_" in name:
                value += 0.1 * torch.randn(value.shape, generator=generator)


def step_lora_fa(model, tokens, arrays: dict[str, np.ndarray]) -> None:
    """Keeps two steps of PEFT's optimizer, in float32, and the gradients it took."""
    lorafa.is_bf16_available = lambda: False
    optimizer = lorafa.create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.1)
    for number in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for key, value in model.named_parameters():
            if "lora_B" in key:
                name = key.removeprefix("base_model.model.")
                arrays[f"gradient{number}/{name}"] = value.grad.numpy().copy()
        optimizer.step()
        arrays |= {f"step{number}/{k}": v for k, v in factors_of(model).items()}


def make(name: str) -> None:
    with np.load(HERE / "llama" / "reference.npz") as arrays:
        tokens = torch.tensor(arrays["input_ids"]).long()
    torch.manual_seed(0)
    model = base()
    if name == "lora_ga":

        def step():
            model(tokens, labels=tokens).loss.backward()

        peft.tuners.lora.loraga.preprocess_loraga(model, CASES[name], step)
    model = peft.get_peft_model(model, CASES[name])
    versions = f"peft {peft.__version__}, torch {torch.__version__}"
    if name == "eva":
        mask = torch.ones_like(tokens)
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
        peft.initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
        arrays = {f"start/{k}": v for k, v in factors_of(model).items()}
        np.savez_compressed(TARGET / "eva.npz", versions=np.array(versions), **arrays)
        return
    arrays = {f"start/{k}": v for k, v in factors_of(model).items()}
    if name == "lora_fa":
        step_lora_fa(model, tokens, arrays)
        arrays["versions"] = np.array(versions)
        np.savez_compressed(TARGET / f"{name}.npz", **arrays)
        return
    if name == "vera":
        change(model)
        with torch.no_grad():
            arrays["logits"] = model(tokens).logits.numpy()
        model.save_pretrained(TARGET / name)
        (TARGET / name / "README.md").unlink()
        np.savez_compressed(
            TARGET / f"{name}.npz", versions=np.array(versions), **arrays
        )
        return
    start = TARGET / "start"
    model.peft_config["default"].init_lora_weights = True  # don't decompose again
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = name
    change(model)
    arrays |= {f"changed/{k}": v for k, v in factors_of(model).items()}
    with torch.no_grad():
        arrays["logits"] = model(tokens).logits.numpy()
    model.save_pretrained(
        TARGET / name, path_initial_model_for_weight_conversion=str(start)
    )
    for file in (*start.iterdir(), TARGET / name / "README.md"):
        file.unlink()
    start.rmdir()
    np.savez_compressed(TARGET / f"{name}.npz", versions=np.array(versions), **arrays)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    TARGET.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        make(name)


if __name__ == "__main__":
    main()
