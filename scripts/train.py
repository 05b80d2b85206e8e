"""Door two: train the reference model on C4, or on --data SRC, with the tokenizer of door one if it is there.

The same as `khanhllm train khanh-692m`; every option of it can be added, and another preset named first.
"""

import sys
from pathlib import Path

from khanhllm.cli import main
from khanhllm.settings import preset_names

TOKENIZER = Path("tokenizer.json")

if __name__ == "__main__":  # the processes that prepare data import this file again
    given = sys.argv[1:]
    begin = ["train"]
    if not set(given[:1]) & set(preset_names()):
        begin += ["khanh-692m", *(["--data.tokenizer", str(TOKENIZER)] if TOKENIZER.exists() else [])]
    sys.exit(main([*begin, *given]))
