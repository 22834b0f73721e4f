# SPDX-License-Identifier: Apache-2.0
"""Inference engines from pip, each in a folder of its own that comes first on the path: FOLDER

The environment's torch serves all of them. llama-cpp-python is built from source, ten minutes on
two cores, with the converter of llama.cpp that its source distribution holds.
"""

import configparser
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LLAMA_CPP = "llama-cpp-python==0.3.36"
CTRANSLATE2 = "ctranslate2==4.8.5"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
BUILD = (
    *("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER"),
    *("MTMD_BUILD", "LLAVA_BUILD", "LLAMA_CURL"),
)


def transformers_bounds() -> tuple[str, str]:
    """Return the lowest and the highest transformers that setup.cfg allows, as pip takes them."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = parser["options.extras_require"]["hf"]
    found = re.search(r"transformers>=([\d.]+),(<\d+)", wanted)
    if not found:
        raise SystemExit(f"setup.cfg has no bounds for transformers in hf: {wanted}")
    return f"transformers=={found[1]}", f"transformers{found[2]}"


def install(folder: Path, *what: str, **env: str) -> None:
    """Install into a new folder; one that is there is whole, and kept."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".new")
    command = [*PIP, "install", "--upgrade", "--target", str(unfinished), *what]
    subprocess.run(command, check=True, env={**os.environ, **env})
    unfinished.rename(folder)


def install_llama_cpp(folder: Path) -> None:
    """Build the runtime, and unpack the converter."""
    if (folder / "llama.cpp").exists() and (folder / "llama-cpp-python").exists():
        return
    source = folder / "source"
    command = [*PIP, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(source)]
    subprocess.run([*command, LLAMA_CPP], check=True)
    (archive,) = source.glob("llama_cpp_python-*.tar.gz")
    options = " ".join(f"-D{name}=OFF" for name in BUILD)
    install(folder / "llama-cpp-python", str(archive), CMAKE_ARGS=options)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "source", filter="data")
    (unpacked,) = (folder / "source").glob("llama_cpp_python-*/vendor/llama.cpp")
    unpacked.rename(folder / "llama.cpp")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lowest, highest = transformers_bounds()
    install(folder / "transformers-lowest", lowest)
    install(folder / "transformers-highest", highest)
    install(folder / "ctranslate2", CTRANSLATE2)
    install_llama_cpp(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
