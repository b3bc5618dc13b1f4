"""Files of the Hugging Face hub, by name."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from common.command import InputError, first_line

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:\\]+))?")
SUFFIXES = (".pt", ".safetensors", ".json")  # of what is a file's name, not a data set's or model's


def names_a_repository(name: str) -> bool:
    """Whether `name` is owner/name or owner/name:file, and no path of this machine. Where a folder
    `owner` is here, owner/name is a path in it that is misspelt."""
    match = NAME.fullmatch(name)
    if not match or Path(name).exists():
        return False
    if match[2]:
        return True
    owner = name.split("/")[0]
    return owner not in (".", "..") and not Path(owner).is_dir() and not name.endswith(SUFFIXES)


def download(name: str, choose: Callable[[Sequence[str], str], str], beside: Sequence[str]) -> Path:
    """Brings a file of owner/name:file onto this machine, into the cache of `huggingface_hub`, and
    those of the names `beside` that lie beside it; returns the file's path. Where no file is named,
    `choose` takes one of the repository's names. Raises `InputError` where there is none to be
    had."""
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"checkpoint: {name} would come from the Hugging Face hub, for which the package"
            " huggingface_hub is missing: pip install huggingface_hub"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it logs it raises too
    identity, _, file = name.partition(":")
    try:
        # unlike a listing of files, it does not try for half a minute where there is no network
        files = [file.rfilename for file in huggingface_hub.model_info(identity).siblings or []]
        file = file or choose(files, identity)
        if file not in files:
            held = ", ".join(sorted(files)[:20]) or "none"
            raise InputError(f"checkpoint: {identity} has no file {file}; its files are {held}")
        folder = PurePosixPath(file).parent
        paths = [file, *(str(folder / other) for other in beside if str(folder / other) in files)]
        here = [Path(huggingface_hub.hf_hub_download(identity, path)) for path in paths]
        return here[0]
    except InputError:
        raise
    except Exception as error:
        # network, access and names: its errors are of many kinds, some of them the network's own
        raise InputError(
            f"checkpoint: nothing is at {identity} here, and from the Hugging Face hub it cannot be"
            f" had ({first_line(error)}); check the name, network and access"
        ) from error
