import sys

from khanhllm.cli import main

sys.exit(main())
