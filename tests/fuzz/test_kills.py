"""A short run of the kills; `python -m tests.fuzz.kills` is a long one."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_a_killed_run_resumes_to_the_same_bits():
    words = ["tests.fuzz.kills", "--runs", "1", "--seed", "0"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kills, \d+ moments too late, 0 faults", done.stdout)
    assert found
    assert int(found[1]) >= 1
