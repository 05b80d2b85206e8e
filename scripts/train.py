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
        begin += ["khanh-692m"]
        if TOKENIZER.exists() and not any(word.startswith("--from") for word in given):  # that brings its own
            begin += ["--data.tokenizer", str(TOKENIZER)]
    sys.exit(main([*begin, *given]))
