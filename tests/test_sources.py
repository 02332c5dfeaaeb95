import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdbench import files, models, sources
from kdbench.data import records
from kdbench.errors import UserError
from kdbench.settings import EmbeddedData, HubModel, InitModel, PathModel, TrainedTokenizer
from tests import hub
from tests.shared import ROOT

ARCHITECTURE = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
HUB = HubModel(source="hub", repository="owner/model", revision=hub.REVISION)
PARTS = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    records.prepare(EmbeddedData(source="embedded", split="train", rows=60), "train", folder)
    return folder


def init(seed=1, architecture=ARCHITECTURE, size=300):
    tokenizer = TrainedTokenizer(train_on="train", vocabulary_size=size)
    return InitModel(source="init", architecture=architecture, tokenizer=tokenizer, seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts):
    """A model as another program would have left it: without a manifest of ours."""
    folder = tmp_path_factory.mktemp("models") / "made"
    sources.fetch(init(), folder, texts)
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def own(made, tmp_path):
    """A copy of it to break."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- made from a seed


def test_same_seed_same_bytes(tmp_path, texts):
    sources.fetch(init(), tmp_path / "a", texts)
    torch.manual_seed(99)  # whatever was drawn before
    torch.rand(3)
    sources.fetch(init(), tmp_path / "deeper/b", texts)
    assert content(tmp_path / "a") == content(tmp_path / "deeper/b")
    sources.fetch(init(seed=2), tmp_path / "c", texts)
    first, other = content(tmp_path / "a"), content(tmp_path / "c")
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors", "manifest.json"}
    manifests = [files.read_manifest(tmp_path / name, "model") for name in ("a", "c")]
    assert manifests[0]["fingerprint"] != manifests[1]["fingerprint"]
    assert {key: manifests[0][key] for key in ("architecture", "vocabulary", "vocabulary_rows")} == {
        "architecture": "gpt2",
        "vocabulary": 300,
        "vocabulary_rows": 300,
    }
    assert set(manifests[0]["files"]) == PARTS
    assert sorted(os.listdir(tmp_path)) == ["a", "c", "deeper"]


def test_tokenizer_of_a_folder_and_architecture_of_a_file(tmp_path, made):
    files.write_json(tmp_path / "config.json", ARCHITECTURE | {"n_embd": 32, "vocab_size": 320})
    settings = InitModel(source="init", architecture=str(tmp_path / "config.json"), tokenizer=str(made))
    sources.fetch(settings, tmp_path / "model")
    manifest = files.read_manifest(tmp_path / "model", "model")
    assert (manifest["vocabulary"], manifest["vocabulary_rows"]) == (300, 320)
    ours, theirs = models.load_tokenizer(tmp_path / "model"), models.load_tokenizer(made)
    assert ours.get_vocab() == theirs.get_vocab()
    assert models.load(tmp_path / "model").config.n_embd == 32


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ({"model_type": "gtp2"}, "is not understood"),
        ({}, "is not understood"),
        (ARCHITECTURE | {"vocab_size": 299}, r"vocab_size 299 .* smaller than its tokenizer \(300 tokens\)"),
        ({"model_type": "gpt2", "n_embd": 15, "n_head": 2}, "n_embd|embed"),
    ],
)
def test_impossible_architectures(tmp_path, texts, architecture, what):
    with pytest.raises(UserError, match=what):
        sources.fetch(init(architecture=architecture), tmp_path / "model", texts)
    assert not (tmp_path / "model").exists()


# --- of a folder


def link(own, tmp_path, **settings):
    sources.fetch(PathModel(source="path", path=str(own), **settings), tmp_path / "resources/model")
    return tmp_path / "resources/model"


def test_folder_is_linked_and_moves_with_its_neighbour(own, tmp_path):
    folder = link(own, tmp_path)
    assert all(path.is_symlink() for path in folder.iterdir() if path.name != "manifest.json")
    assert os.readlink(folder / "config.json") == "../../own/config.json"
    assert (folder / "model.safetensors").samefile(own / "model.safetensors")
    manifest = files.read_manifest(folder, "model")
    assert set(manifest["files"]) == PARTS
    assert manifest["architecture"] == "gpt2"
    assert len(models.load_tokenizer(folder)) == models.load(folder).config.vocab_size == 300


def test_relative_path_and_resources_on_another_disk(own, tmp_path, monkeypatch):
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "resources").symlink_to(tmp_path / "disk/deep")
    monkeypatch.chdir(tmp_path)
    sources.fetch(PathModel(source="path", path="own"), "resources/model")
    assert (tmp_path / "resources/model/config.json").samefile(own / "config.json")


def test_linked_model_that_changes_is_noticed(own, tmp_path):
    folder = link(own, tmp_path)
    (own / "config.json").write_text((own / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        files.read_manifest(folder, "model")


def test_only_what_belongs_to_a_model_is_linked(own, tmp_path):
    for name in ("pytorch_model.bin", "README.md", "modeling_own.py", "consolidated.safetensors", "manifest.json"):
        (own / name).write_text("{}")
    (own / "onnx").mkdir()
    assert set(files.read_manifest(link(own, tmp_path), "model")["files"]) == PARTS
    trusted = files.read_manifest(link(own, tmp_path, trust_remote_code=True), "model")
    assert set(trusted["files"]) == PARTS | {"modeling_own.py"}
    assert trusted["trust_remote_code"] is True


def pickled(own):
    (own / "model.safetensors").rename(own / "pytorch_model.bin")


def no_tokenizer(own):
    (own / "tokenizer.json").unlink()
    (own / "tokenizer_config.json").unlink()


def no_config(own):
    (own / "config.json").unlink()


def broken_config(own):
    (own / "config.json").write_text("{")


def larger_tokenizer(own):
    change(own, vocab_size=299)


def own_code(own):
    change(own, model_type="mine", auto_map={"AutoConfig": "modeling.Config"})


def change(own, **keys):
    files.write_json(own / "config.json", files.read_json(own / "config.json") | keys)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (pickled, "no weights in safetensors"),
        (no_tokenizer, "holds no tokenizer"),
        (no_config, "config"),
        (broken_config, "config.json cannot be used"),
        (larger_tokenizer, "vocab_size 299 does not fit its tokenizer, which has 300 tokens"),
        (own_code, "custom code"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_refused_folders(own, tmp_path, damage, what):
    damage(own)
    with pytest.raises(UserError, match=what) as told:
        link(own, tmp_path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "resources/model").exists()


def test_better_attempt_replaces_a_failed_one(own, tmp_path):
    weights = (own / "model.safetensors").read_bytes()
    pickled(own)
    with pytest.raises(UserError):
        link(own, tmp_path)
    (own / "model.safetensors").write_bytes(weights)
    assert set(files.read_manifest(link(own, tmp_path), "model")["files"]) == PARTS


# --- of the hub


@pytest.fixture
def repository(own, monkeypatch):
    """The model with what else lies in a repository of the hub."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(own.parent / "hf"))
    for name in ("pytorch_model.bin", "README.md", "modeling_own.py", "consolidated.safetensors"):
        (own / name).write_text("not wanted")
    (own / "onnx").mkdir()
    (own / "onnx/config.json").write_text("not wanted")
    return own


def run_script(endpoint, folder, **environment):
    """Fetch in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    script = [sys.executable, ROOT / "workflow/scripts/download_model.py", "--source", HUB.model_dump_json()]
    return subprocess.run(
        [*script, "--output", folder / "manifest.json"],
        env=os.environ | {"HF_ENDPOINT": endpoint} | environment,
        capture_output=True,
        text=True,
    )


def test_script_fetches_from_the_hub(repository, made, tmp_path):
    folder = tmp_path / "models/model"
    with hub.serve(repository, token="hf_right") as (endpoint, requests):
        done = run_script(endpoint, folder, HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    assert {path.rsplit("/", 1)[1] for path in requests if path.startswith("GET /owner")} == PARTS
    assert content(folder).items() >= content(made).items()
    assert set(files.read_manifest(folder, "model")["files"]) == PARTS
    assert os.listdir(tmp_path / "models") == ["model"]


@pytest.mark.parametrize(
    ("refuse", "what"),
    [
        ((401, "GatedRepo"), "is gated: ask for access"),
        ((403, "GatedRepo"), "is gated: ask for access"),
        ((401, "RepoNotFound"), "no such model, or it is private"),
        ((404, "RepoNotFound"), "no such model, or it is private"),
        ((404, "RevisionNotFound"), "no such commit"),
        ((401, ""), "cannot be fetched: .*401"),
        ((403, ""), "cannot be fetched: .*403 Forbidden: not for you"),
    ],
)
def test_refusals_of_the_hub_are_one_line(repository, tmp_path, monkeypatch, refuse, what):
    with hub.serve(repository, refuse=refuse) as (endpoint, requests):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(UserError, match=what) as told:
            sources.fetch(HUB, tmp_path / "model")
    assert str(told.value).startswith("owner/model@01234567")
    assert "\n" not in str(told.value)
    assert requests
    assert not (tmp_path / "model").exists()


def test_hub_out_of_reach(repository, tmp_path, monkeypatch):
    with hub.serve(repository) as (endpoint, _):
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
    with pytest.raises(UserError, match="cannot be fetched: ConnectError"):
        sources.fetch(HUB, tmp_path / "model")


@pytest.mark.slow
def test_download_that_breaks_off_goes_on(repository, tmp_path):
    folder = tmp_path / "models/model"
    with hub.serve(repository, broken="model.safetensors") as (endpoint, _):
        done = run_script(endpoint, folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: owner/model@01234567 cannot be fetched: ")
    assert "Traceback" not in done.stderr
    assert not folder.exists()
    with hub.serve(repository) as (endpoint, requests):
        assert run_script(endpoint, folder).returncode == 0
    assert [path.rsplit("/", 1)[1] for path in requests if path.startswith("GET /owner")] == ["model.safetensors"]
    assert set(files.read_manifest(folder, "model")["files"]) == PARTS
    assert os.listdir(tmp_path / "models") == ["model"]
