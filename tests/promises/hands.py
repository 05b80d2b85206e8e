"""What each process of `test_processes` runs: one training after the other, so that torch is loaded once.

Its argument is a JSON file: a list of [config, folder, resume].
"""

import json
import sys
from pathlib import Path

import torch

from khanhllm.machine import devices
from khanhllm.schema import Config
from khanhllm.training.run import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    devices._peak = lambda _device: None
    for config, folder, resume in json.loads(Path(sys.argv[1]).read_text()):
        train(Config.model_validate(config), Path(folder), resume)
