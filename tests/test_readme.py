"""The README's code runs as pasted, and its tables are those of the results files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("experiments/*/README.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
MARKS = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda code: code.split("\n")[0][:40])
def test_code_runs_as_pasted(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_those_of_the_results(page):
    tables = re.findall(MARKS, page.read_text())
    assert tables
    for path, table in tables:
        assert table.strip() == (ROOT / path).read_text().strip(), path
