"""The README's code runs as pasted, and its tables are those of the results files."""

import importlib.util
import json
import re
import shlex

import jax
import numpy as np
import pytest

from benchmarks.report import MARKS, PAGES, ROOT
from lora_jax import load_model
from lora_jax.cli.main import main
from lora_jax.cli.parser import COMMANDS
from tests.test_layout import MAY_IMPORT
from tests.tiny_decoder import make_decoder

TEXTS = (*PAGES, ROOT / ".github" / "CONTRIBUTING.md")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda code: code.split("\n")[0][:40])
def test_code_runs_as_pasted(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_it_is_read_in_five_minutes():
    assert len(PAGES[0].read_text()) < 9000


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.parent.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        if name.startswith("http"):
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            target = target / "README.md" if target.is_dir() else target
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h.lower()) for h in headings]
            assert heading in [anchor.replace(" ", "-") for anchor in anchors], link


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.parent.name)
def test_commands_and_modules_that_are_named_exist(page):
    text = page.read_text()
    words = re.findall(r"^lora-jax ([a-z]+)|`lora-jax ([a-z]+)", text, re.MULTILINE)
    assert {a or b for a, b in words} <= set(COMMANDS)
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module


def test_the_guide_names_every_part_in_order_and_files_that_exist():
    text = TEXTS[-1].read_text()
    section = text.split("| part | what it is |")[1].split("\n\n")[0]
    parts = [
        n for row in re.findall(r"^\| (`.*?) \|", section, re.M) for n in quoted(row)
    ]
    assert parts == list(MAY_IMPORT)
    paths = [p for p in quoted(text) if re.match(r"(lora_jax|tests|benchmarks)/\w", p)]
    missing = [p for p in paths if "NAME" not in p and not (ROOT / p).exists()]
    assert len(paths) > 10
    assert missing == []


def quoted(text):
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_those_of_the_results(page):
    tables = re.findall(MARKS, page.read_text())
    assert tables
    for path, table in tables:
        assert table.strip() == (ROOT / path).read_text().strip(), path


@pytest.mark.slow
def test_bring_your_own_model_runs_as_written(tmp_path, monkeypatch, capsys):
    section = PAGES[0].read_text().split("## Bring your own model")[1].split("\n## ")[0]
    config = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)[0]
    commands = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    make_decoder(tmp_path / "my-model")
    # A model of random weights has more to learn than a pretrained one.
    config = config.replace("epochs: 3", "epochs: 15").replace("1e-3", "3e-2")
    (tmp_path / "my.yaml").write_text(config)
    with (tmp_path / "my-data.jsonl").open("w") as file:
        for thing, colour in (("sky", "blue"), ("grass", "green")) * 20:
            asked = {"role": "user", "content": f"what is the {thing}"}
            said = {"role": "assistant", "content": colour}
            file.write(json.dumps({"messages": [asked, said]}) + "\n")
    for command in commands:
        words = shlex.split(command, comments=True)
        capsys.readouterr()
        assert words[0] == "lora-jax"
        assert main(words[1:]) == 0, command
        if words[1] == "generate":
            assert capsys.readouterr().out == "blue\n"
    exported = json.loads((tmp_path / "my-adapter/adapter_config.json").read_text())
    assert exported["peft_type"] == "LORA"
    merged, base = load_model("my-merged"), load_model("my-model")
    ids = np.array([[3, 15, 10, 11, 12]])
    logits = jax.jit(merged.module.apply)(merged.variables, ids)
    before = jax.jit(base.module.apply)(base.variables, ids)
    assert not np.allclose(logits, before, atol=0.1)
    run = load_model("my-model", adapter="my-run")
    adapted = jax.jit(run.module.apply)(run.variables, ids)
    np.testing.assert_allclose(logits, adapted, rtol=1e-4, atol=1e-4)
