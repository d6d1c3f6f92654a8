"""Writes ``balance.npz``: transformers' training loss of the mixtures, with its parts.

Run as ``make_mixtures.py``, after it::

    python -m tests.golden.make_balance

For the rows of each ``reference.npz``, the last two padded: the whole ``loss`` with
``router_aux_loss_coef``, its ``aux`` part by ``load_balancing_loss_func``, and the
gradient of the last layer's ``router``.
"""

import json
import pathlib
import warnings

import numpy as np
import torch
import transformers

from tests.golden import make_models
from tests.golden.make_mixtures import EAGER

HERE = pathlib.Path(__file__).parent
NAMES = ("qwen3_moe", "qwen3_moe_mixed", "gpt_oss")
COEFFICIENT = 0.3
LENGTHS = (13, 9, 4)


def balanced(name: str) -> dict[str, torch.Tensor]:
    """Returns the loss, its parts and the router's gradient of one model."""
    settings = json.loads((HERE / name / "config.json").read_text())
    cls = getattr(transformers, settings["architectures"][0])
    model = cls.from_pretrained(HERE / name, router_aux_loss_coef=COEFFICIENT, **EAGER)
    ids = torch.from_numpy(np.load(HERE / name / "reference.npz")["input_ids"])
    mask = (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.where(mask == 1, ids, -100)
    out = model.eval()(
        input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True
    )
    out.loss.backward()
    plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(out.loss, plain + COEFFICIENT * out.aux_loss)
    routers = [
        weight.grad
        for path, weight in model.named_parameters()
        if path.endswith(("gate.weight", "router.weight"))
    ]
    return {"loss": out.loss, "aux": out.aux_loss, "router": routers[-1]}


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    arrays = {
        "lengths": torch.tensor(LENGTHS),
        "coefficient": torch.tensor(COEFFICIENT),
    }
    for name in NAMES:
        arrays |= {
            f"{name}_{key}": value.detach() for key, value in balanced(name).items()
        }
    make_models.write(HERE / "balance.npz", arrays)


if __name__ == "__main__":
    main()
