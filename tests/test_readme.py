"""The README's code runs as pasted, and its tables are those of the results files."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda code: code.split("\n")[0][:40])
def test_code_runs_as_pasted(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_tables_are_generated():
    found = re.findall(
        r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", README.read_text(), re.S
    )
    assert len(found) == 2
    for path, table in found:
        assert table.strip() == (README.parent / path).read_text().strip(), path
