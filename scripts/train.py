"""Door two: train the reference model (on C4, or on --data SRC) with the tokenizer of door one, if it is there.

The same as `khanhllm train khanh-692m`; every option of it can be added, and another preset named first.
"""

import sys
from pathlib import Path

from khanhllm.cli import main
from khanhllm.config import preset_names

given = sys.argv[1:]
preset = [] if given and given[0] in preset_names() else ["khanh-692m"]
tokenizer = ["--data.tokenizer", "tokenizer.json"] if Path("tokenizer.json").exists() and preset else []
sys.exit(main(["train", *preset, *tokenizer, *given]))
