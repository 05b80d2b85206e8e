"""Fetch two builds of llama.cpp, against which tests/export compares what we write: one of its own day, and the last
published one that lacks the architecture hy_v3. They come from the npm package @node-llama-cpp/linux-x64 (MIT).

    python scripts/llama_cpp.py [FOLDER]     by default $KHANHLLM_LLAMA_CPP, else ~/.cache/khanhllm/llama.cpp
"""

import hashlib
import io
import os
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
RELEASES = {  # sha256 of the package, of about 10 MB
    "3.19.0": "3ac24ba0c88b388e99c20d772309f1c1cc6c4e184e10f755c917fea95d8f5c7f",
    "3.22.1": "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
}
PARTS = ("libllama.", "libggml.", "libggml-base.", "libggml-cpu-haswell.", "LICENSE")
"""beginnings of the files that are kept; of the libraries for many processors that for AVX2, as that for AMX computes
q8_0 wrongly"""


def fetch(version: str, sha256: str, folder: Path) -> None:
    """Unpack one release into folder/version, whole or not at all."""
    if (folder / version).exists():
        return
    with urllib.request.urlopen(
        f"{REGISTRY}/@node-llama-cpp/linux-x64/-/linux-x64-{version}.tgz", timeout=60
    ) as answer:
        packed = answer.read()
    if hashlib.sha256(packed).hexdigest() != sha256:
        sys.exit(f"llama.cpp {version} is not the file it should be; {REGISTRY} may have changed it")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        new = Path(aside, version)
        new.mkdir()
        for member in archive:
            name = Path(member.name).name
            if member.isfile() and name.startswith(PARTS):
                (new / name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        new.replace(folder / version)


if __name__ == "__main__":
    default = os.environ.get("KHANHLLM_LLAMA_CPP") or Path.home() / ".cache" / "khanhllm" / "llama.cpp"
    target = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    for release, checksum in RELEASES.items():
        fetch(release, checksum, target)
    print(f"llama.cpp is in {target}")
