"""Makes tables and plots from results files, and inserts the tables in the READMEs."""

import importlib
import json
import re
from pathlib import Path

from benchmarks.harness import QUICK, RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("experiments/*/README.md")),
)
MARKS = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def main() -> None:
    """Writes a table and, where defined, a plot beside each results file.

    Also updates the tables in the READMEs.
    """
    from benchmarks import headline, plots  # matplotlib: the extra `experiments`

    for path in sorted(RESULTS.glob("*.json")):
        if path.stem.endswith(QUICK):
            continue
        record = json.loads(path.read_text())
        module = importlib.import_module(f"benchmarks.{record['comparison']}")
        head = (
            f"`{record['command']}` on {record['machine']} ({record['device']}), "
            f"{record['date']}, jax {record['versions']['jax']}, "
            f"commit {record['commit']}:"
        )
        text = f"{head}\n\n{module.table(record['rows'])}\n"
        path.with_suffix(".md").write_text(text)
        plots.draw(record["comparison"], record["rows"], path.with_suffix(".png"))
        print(text)
    headline.main()
    for page in PAGES:
        page.write_text(MARKS.sub(_table, page.read_text()))


def _table(match: re.Match[str]) -> str:
    path = ROOT / match.group(1)
    text = path.read_text().strip() if path.exists() else "not measured yet"
    return f"<!-- table: {match.group(1)} -->\n{text}\n<!-- end -->"
