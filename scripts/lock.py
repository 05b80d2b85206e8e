"""What `make lock` keeps of a resolved list: all but torch and the libraries of its CUDA build, which are gigabytes."""

import re
import sys
from pathlib import Path

HEADER = """\
# The exact files that the package stands on, for CPython 3.11 and later on Linux, macOS and Windows: `make lock`.
# torch is not among them: its build depends on the machine. Install it first, then
#   pip install --require-hashes --no-deps -r requirements.lock
"""
BY_MACHINE = r"(torch|triton|nvidia-\S+|cuda-\S+)=="

blocks = re.split(r"^(?=[a-z0-9])", Path(sys.argv[1]).read_text(encoding="utf-8"), flags=re.MULTILINE)
print(HEADER + "".join(block for block in blocks if not re.match(BY_MACHINE, block)), end="")
