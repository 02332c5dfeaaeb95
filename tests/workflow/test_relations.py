"""What is computed from the text alone is computed once, for the methods that ask for it, and again only for other tokenizers."""

import re
from pathlib import Path

import pytest

from kdbench import files
from tests.workflow.conftest import Workflow, fresh
from tests.workflow.test_scripts import call

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

ALIGN, SPELL, MAP = "align foreign+base train", "spell foreign+base train", "map_vocabulary foreign+base"


def setting(folder: Path) -> Workflow:
    """One experiment across tokenizers."""
    workflow = fresh(folder)
    workflow.change("methods", {"sft": None, "uld": {"alignment": "byte"}, "all": {"method": "everything.py"}})
    cross = workflow.config["experiments"]["cross"]
    workflow.change("experiments", {"cross": cross | {"methods": ["uld", "all"]}})
    (workflow.folder / "everything.py").write_bytes((Path(__file__).parent / "everything.py").read_bytes())
    return workflow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workflow = setting(tmp_path_factory.mktemp("relations") / "kdbench")
    return workflow, workflow.succeed("results/cross/table.csv", cores=2)


@pytest.fixture
def copy(trained, tmp_path):
    return trained[0].copy(tmp_path / "kdbench")


def planned(workflow):
    return workflow.planned("results/cross/table.csv")


def test_each_is_made_for_those_who_ask(tmp_path):
    workflow = setting(tmp_path / "kdbench")
    assert {ALIGN, SPELL, MAP} <= planned(workflow)
    workflow.change("experiments", "cross", "methods", ["uld"])
    assert {ALIGN, SPELL, MAP} & planned(workflow) == {ALIGN}
    workflow.change("methods", "uld", {"alignment": "index"})
    assert not {ALIGN, SPELL, MAP} & planned(workflow)


def test_a_training_gets_all_of_it(trained):
    workflow, _ = trained
    results = workflow.folder / "results"
    assert (results / "cross/methods/all/seed1/model/manifest.json").exists()
    readers = files.read_manifest(results / "tokens/foreign+base/train", "tokens")
    assert files.read_manifest(results / "spellings/foreign+base/train", "spelling")["tokens"] == readers["fingerprint"]
    assert (
        files.read_manifest(results / "vocabularies/foreign+base", "vocabulary")["tokenizers"] == readers["tokenizers"]
    )


def test_the_terminal_tells_how_well_tokens_match(trained):
    workflow, output = trained
    quality = files.read_manifest(workflow.folder / "results/alignments/foreign+base/train", "alignment")["quality"]
    told = (workflow.folder / "logs/align/foreign+base/train.log").read_text().strip()
    assert f"{quality['byte']:.1%} have one of the teacher with the same bytes" in told
    assert f"{quality['index']:.1%} one at the same position" in told
    lines = output.splitlines()
    assert told in lines
    for log in ("spell/foreign+base/train.log", "map_vocabulary/foreign+base.log"):
        assert (workflow.folder / "logs" / log).read_text().splitlines()[-1] in lines


def test_nothing_to_do(copy):
    assert planned(copy) == set()


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        (("training", "epochs", 2), {"distill cross uld 1", "distill cross all 1", "sft_teacher tutor"}),
        (
            ("teachers", "tutor", "training", {"epochs": 2}),
            {"cache_teacher tutor foreign train", "distill cross all 1"},
        ),
        (("experiments", "cross", "seeds", [1, 2]), {"distill cross uld 2", "distill cross all 2"}),
    ],
)
def test_trainings_change_no_text(copy, change, runs):
    copy.change(*change)
    jobs = planned(copy)
    assert runs <= jobs
    assert not {ALIGN, SPELL, MAP} & jobs


def test_another_tokenizer_changes_all_of_it(copy):
    copy.change("models", "foreign", "tokenizer", "vocabulary_size", 310)
    assert {ALIGN, SPELL, MAP, "distill cross all 1"} <= planned(copy)


def test_models_in_the_wrong_order_are_refused(trained, tmp_path):
    folder = trained[0].folder
    options = ["--tokens", "results/tokens/foreign+base/train", "--output", str(tmp_path / "a/manifest.json")]
    refused = call(folder, "spell.py", *options, "--models", "resources/models/base", "resources/models/foreign")
    assert refused.returncode == 2
    assert re.fullmatch(r"error: results/tokens/.* is of other tokenizers than those of .*\n", refused.stderr)
    assert not (tmp_path / "a").exists()


def test_a_map_of_other_tokenizers_is_refused(copy):
    path = copy.folder / "results/vocabularies/foreign+base/manifest.json"
    manifest = files.read_json(path)
    files.write_json(path, manifest | {"tokenizers": manifest["tokenizers"] | {"teacher": "another"}})
    code, output = copy.run("results/cross/table.csv", "--forcerun", "distill")
    assert code != 0
    assert "results/vocabularies/foreign+base/manifest.json is stale" in output
    assert "Traceback" not in output
