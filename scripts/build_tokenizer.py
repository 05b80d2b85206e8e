"""Door one: train the tokenizer on C4, or on --data SRC, and write tokenizer.json. The same as `khanhllm tokenizer`."""

import sys

from khanhllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", "--data", "c4", *sys.argv[1:]]))
