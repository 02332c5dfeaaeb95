"""The whole workflow on real Dolly and S-NI records with the real tokenizers of Qwen1.5, GPT2, LLaMA2 and TinyLLaMA.

Models are a few dimensions wide, but have the real vocabularies. What each stage wrote is compared with the raw files, and with what
transformers, peft and rouge-score say without any code of ours.
"""

import json
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdbench.alignment.pairs import Alignment
from kdbench.data.tokens import Tokens
from tests.shared import SHARED, needs_shared
from tests.workflow.conftest import fresh

pytestmark = [pytest.mark.slow, pytest.mark.workflow, needs_shared]

DATA = {  # name -> file, rows
    "train": ("dolly/train.jsonl", 32),
    "dev": ("dolly/dev.jsonl", 16),
    "dolly": ("dolly/valid.jsonl", 8),
    "sinst": ("sinst/11_/valid.jsonl", 8),
    "dolly_dev": ("dolly/dev.jsonl", 1000),
}
TOKENIZERS = {"qwen": "qwen1.5-1.8b", "gpt2": "gpt2", "llama2": "llama2-7b", "tinyllama": "tinyllama-1.1b-3t"}
VOCABULARIES = {
    "qwen": (151_646, 151_936),
    "gpt2": (50_257, 50_257),
    "llama2": (32_000,) * 2,
    "tinyllama": (32_000,) * 2,
}
PAIRS = {"cross": ("gpt2", "qwen"), "same": ("tinyllama", "llama2")}
MODEL_OF = {
    "teachers/qwen_dolly": "qwen",
    "teachers/llama2_raw": "llama2",
    "cross/methods/sft/seed1": "gpt2",
    "cross/methods/uld/seed1": "gpt2",
    "cross/methods/seqkd/seed1": "gpt2",
    "same/methods/vanilla_kd/seed1": "tinyllama",
    "same/methods/dskd/seed1": "tinyllama",
}
FULL = ["teachers/qwen_dolly", *(run for run in MODEL_OF if run.startswith("cross/"))]
ADAPTERS = [run for run in MODEL_OF if run.startswith("same/")]
EVALUATIONS = [(run, dataset) for run in MODEL_OF for dataset in ("dolly", "sinst")]
MARKER = "### Response:\n"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the workflow that ran; one run for all tests of this file."""
    workflow = fresh(tmp_path_factory.mktemp("real") / "kdbench")
    text = (Path(__file__).parent / "real.yaml").read_text()
    workflow.config = yaml.safe_load(text.replace("SHARED/", f"{SHARED.resolve()}/"))
    workflow.succeed("results/table.csv", "resources/data/dolly_dev/manifest.json", timeout=1500)
    return workflow.folder


@cache
def raw(dataset):
    path, rows = DATA[dataset]
    with open(SHARED / "data" / path, encoding="utf-8") as file:
        return [json.loads(line) for line in file][:rows]


@cache
def tokenizer_of(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / TOKENIZERS[name])


def nfc(text):
    return unicodedata.normalize("NFC", text)


def references(row):
    outputs = row["output"] if isinstance(row["output"], list) else [row["output"]]
    return [nfc(output).strip() for output in outputs]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def load_model(path, name):
    """A model as anybody loads it: transformers, or peft for an adapter."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    cls = AutoPeftModelForCausalLM if (path / "adapter_config.json").exists() else AutoModelForCausalLM
    model = cls.from_pretrained(path).eval()
    assert model.config.vocab_size == VOCABULARIES[name][1]
    return model


def model_folder(folder, run):
    """A teacher that nobody tuned has no folder of its own."""
    return folder / ("resources/models/llama2" if run == "teachers/llama2_raw" else f"results/{run}/model")


@pytest.mark.parametrize("dataset", DATA)
def test_records(folder, dataset):
    where = folder / "resources/data" / dataset
    records, rows = read_lines(where / "records.jsonl"), raw(dataset)
    assert len(records) == len(rows) == read_manifest(where)["rows"] == DATA[dataset][1]
    for number, (record, row) in enumerate(zip(records, rows, strict=True), 1):
        assert record["id"] == f"{dataset}/{number}"
        assert (record["instruction"], record["input"]) == (nfc(row["instruction"]), nfc(row.get("input") or ""))
        assert record["outputs"] == references(row)
        assert record["prompt"] is None
    assert (max(len(record["outputs"]) for record in records) > 1) == (dataset == "sinst")


@pytest.mark.parametrize("dataset", ["train", "dev"])
@pytest.mark.parametrize("experiment", PAIRS)
def test_tokens(folder, experiment, dataset):
    """Student and teacher read the same text, and it is that of the file unless it was too long."""
    pair = PAIRS[experiment]
    where = folder / "results/tokens" / "+".join(pair) / dataset
    tokens, manifest = Tokens.load(where), read_manifest(where)
    assert manifest["vocabulary"] == {
        side: VOCABULARIES[of][0] for side, of in zip(("student", "teacher"), pair, strict=True)
    }
    assert tokens.same_tokenizer == (experiment == "same")
    sides = [(tokens.student, tokenizer_of(pair[0])), (tokens.teacher, tokenizer_of(pair[1]))]
    cut_prompts = cut_responses = 0
    for index, row in enumerate(raw(dataset)):
        read = []
        for side, tokenizer in sides:
            ids, length = side.row(index), side.prompt_lengths[index]
            assert 0 < length <= 256
            assert length < len(ids) <= 512
            ends = ids[-1] == tokenizer.eos_token_id
            response = ids[length : -1 if ends else None]
            assert tokenizer.eos_token_id not in response
            assert side.response_counts[index] == len(response) + ends
            read.append((decoded(tokenizer, ids[:length]), decoded(tokenizer, response), ends))
        assert read[0] == read[1]
        prompt, response, ends = read[0]
        assert prompt.endswith("\n\n" + MARKER)
        assert prompt.count(MARKER) == 1
        reference = references(row)[0]
        assert response == reference if ends else reference.startswith(response) and 0 < len(response) < len(reference)
        if prompt != nfc(row["prompt"]):
            opening, _, rest = prompt.partition("### Instruction:\n")
            assert row["prompt"].startswith(opening)
            shortened = rest.removesuffix("\n\n" + MARKER)
            assert nfc(row["prompt"]).partition("### Instruction:\n")[2].startswith(shortened)
            cut_prompts += 1
        cut_responses += not ends
    assert (cut_prompts, cut_responses) == (manifest["prompts_cut"], manifest["responses_cut"])


def test_tokens_of_the_teacher_alone(folder):
    tokens = Tokens.load(folder / "results/tokens/qwen/train")
    assert tokens.teacher is None
    assert decoded(tokenizer_of("qwen"), tokens.student.row(0)).endswith(
        references(raw("train")[0])[0] + "<|endoftext|>"
    )


def test_alignment(folder):
    """Paired tokens of GPT2 and Qwen are the same text; TinyLLaMA's and LLaMA2's are all paired."""
    tokens = Tokens.load(folder / "results/tokens/gpt2+qwen/train")
    pairs = Alignment.load(folder / "results/alignments/gpt2+qwen/train")
    students, teachers = tokenizer_of("gpt2"), tokenizer_of("qwen")
    for row in range(tokens.rows):
        ours, theirs = (side.row(row)[side.prompt_lengths[row] :] for side in (tokens.student, tokens.teacher))
        i, j = pairs.row(row)
        assert len(i) > 0
        assert (np.diff(i) > 0).all()
        assert (np.diff(j) > 0).all()
        assert [students.decode([token]) for token in ours[i]] == [teachers.decode([token]) for token in theirs[j]]
    same = read_manifest(folder / "results/alignments/tinyllama+llama2/train")["quality"]
    assert (same["byte"], same["index"]) == (1.0, 1.0)


def test_quality_of_the_alignment(folder):
    """90.4 % by bytes, 29.4 % by index: Qwen1.5 -> GPT2 on whole responses of 1,000 Dolly dev rows (methods.md, measured elsewhere)."""
    limits = json.dumps({"max_prompt_tokens": 1024, "max_tokens": 4096})
    models = ["resources/models/gpt2", "resources/models/qwen"]
    for script, *arguments in (
        ("tokenize_data.py", "--records", "resources/data/dolly_dev", "--models", *models, "--text", limits),
        ("align.py", "--tokens", "whole/tokenize_data"),
    ):
        made = f"whole/{script.removesuffix('.py')}/manifest.json"
        command = [sys.executable, f"workflow/scripts/{script}", *arguments, "--output", made]
        told = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert read_manifest(folder / "whole/tokenize_data")["responses_cut"] == 0
    quality = read_manifest(folder / "whole/align")["quality"]
    assert quality["rows"] == 1000
    assert quality["byte"] == pytest.approx(0.904, abs=0.02)
    assert quality["index"] == pytest.approx(0.294, abs=0.02)
    assert f" {quality['byte']:.1%} have one of the teacher with the same bytes, {quality['index']:.1%} " in told


@pytest.mark.parametrize(
    ("teacher", "student", "dtype", "tolerance"),
    [("qwen_dolly", "gpt2", torch.bfloat16, 2e-2), ("llama2_raw", "tinyllama", torch.float32, 1e-4)],
)
def test_cache(folder, teacher, student, dtype, tolerance):
    """One state for each response token, and the one that the teacher computes."""
    name = MODEL_OF[f"teachers/{teacher}"]
    where = folder / "results/teachers" / teacher / "cache" / student / "train"
    tokens = Tokens.load(folder / "results/tokens" / f"{student}+{name}" / "train").teacher
    parts = [load_file(where / f"part{part}" / "hidden.safetensors") for part in range(8)]
    hidden, head = torch.cat([part["hidden"] for part in parts]), load_file(where / "part0/head.safetensors")
    model = load_model(model_folder(folder, f"teachers/{teacher}"), name)
    assert hidden.dtype == dtype
    assert hidden.shape == (tokens.response_counts.sum(), model.config.hidden_size)
    assert hidden.isfinite().all()
    counts = torch.cat([part["starts"].diff() for part in parts])
    assert counts.tolist() == tokens.response_counts.tolist()
    assert head.keys() == {"weight"}  # embeddings are tied
    assert torch.equal(head["weight"], model.get_output_embeddings().weight)
    for row in (0, 15, 31):
        ids = torch.tensor(tokens.row(row))[None].long()
        with torch.no_grad():
            expected = model.model(input_ids=ids).last_hidden_state[0, tokens.prompt_lengths[row] - 1 : -1]
        found = hidden.split(counts.tolist())[row].float()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_answers(folder):
    """What the student of seqkd learns is what the teacher wrote."""
    where = folder / "results/cross/methods/seqkd"
    records = {record["id"]: record for record in read_lines(folder / "resources/data/train/records.jsonl")}
    answers = read_lines(where / "answers/records.jsonl")
    assert len(answers) + read_manifest(where / "answers")["empty_answers"] == len(records) == 32
    tokens = Tokens.load(where / "tokens")
    assert tokens.rows == len(answers) > 0
    for index, answer in enumerate(answers):
        assert answer | {"outputs": None} == records[answer["id"]] | {"outputs": None}
        (text,) = answer["outputs"]
        assert text == nfc(text).strip() != ""
        ids = tokens.student.row(index)[tokens.student.prompt_lengths[index] :]
        assert decoded(tokenizer_of("gpt2"), ids) == text + "<|endoftext|>"


@pytest.mark.parametrize("run", FULL)
def test_trained_model(folder, run):
    """transformers loads it, and training changed it."""
    from transformers import AutoTokenizer

    name, path = MODEL_OF[run], folder / "results" / run / "model"
    model, before = load_model(path, name), load_model(folder / "resources/models" / name, name)
    assert model.get_output_embeddings().weight.shape == (VOCABULARIES[name][1], 16)
    assert len(AutoTokenizer.from_pretrained(path)) == VOCABULARIES[name][0]
    weights = dict(before.named_parameters())
    for key, value in model.named_parameters():
        assert value.isfinite().all()
        assert not torch.equal(value, weights[key]), key


def test_methods_differ(folder):
    """Each method trains another student from the same beginning."""
    for runs, file in ((FULL[1:], "model.safetensors"), (ADAPTERS, "adapter_model.safetensors")):
        assert len({(folder / "results" / run / "model" / file).read_bytes() for run in runs}) == len(runs)


@pytest.mark.parametrize("run", [*FULL, *ADAPTERS])
def test_dev_loss(folder, run, monkeypatch):
    """The dev loss in the log is the finished model's cross entropy over its whole head, record by record."""
    monkeypatch.chdir(folder)
    name = MODEL_OF[run]
    model = load_model(folder / "results" / run / "model", name)
    readers = "qwen" if run in FULL[:1] else "+".join(PAIRS[run.partition("/")[0]])
    tokens = Tokens.load(folder / "results/tokens" / readers / "dev").student
    total = 0.0
    for row in range(tokens.rows):
        ids, length = torch.tensor(tokens.row(row)).long(), tokens.prompt_lengths[row]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, length - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[length:], reduction="sum").item()
    lines = read_lines(folder / "results" / run / "metrics.jsonl")
    assert len([line for line in lines if "loss" in line]) == 2  # optimizer steps
    assert lines[-1]["dev_loss"] == pytest.approx(total / tokens.response_counts.sum(), rel=1e-4)


@pytest.mark.parametrize("run", ADAPTERS)
def test_trained_adapter(folder, run, monkeypatch):
    """peft loads it onto its base model, whose weights nobody touched."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(folder)
    path = folder / "results" / run / "model"
    assert not (path / "model.safetensors").exists()
    adapter = json.loads((path / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (4, "resources/models/tinyllama")
    model = load_model(path, "tinyllama")
    base = dict(AutoModelForCausalLM.from_pretrained("resources/models/tinyllama").named_parameters())
    moved = 0
    for key, value in model.named_parameters():
        if "lora_" in key:
            assert 4 in value.shape
            moved += bool(value.any())
        else:
            plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[plain]), key
    assert moved == 4  # A and B of the query and the value projection
    assert len(AutoTokenizer.from_pretrained(path)) == 32_000


@pytest.mark.parametrize(("run", "dataset"), EVALUATIONS)
def test_predictions(folder, run, dataset):
    predictions = read_lines(folder / "results" / run / "evaluation" / dataset / "decode10/predictions.jsonl")
    tokenizer = tokenizer_of(MODEL_OF[run])
    assert [one["id"] for one in predictions] == [f"{dataset}/{number}" for number in range(1, 9)]
    for one, row in zip(predictions, raw(dataset), strict=True):
        assert one["references"] == references(row)
        assert one["prompt"].endswith("\n\n" + MARKER)
        assert one["prompt_cut"] == (one["prompt"] != nfc(row["prompt"]))
        length = len(tokenizer(one["prompt"], add_special_tokens=False)["input_ids"])
        assert length <= 256
        assert 1 <= one["tokens"] <= NEW_TOKENS
        assert one["stop"] == "eos" or one["tokens"] == NEW_TOKENS


@pytest.mark.parametrize("run", MODEL_OF)
def test_greedy_answer(folder, run, monkeypatch):
    """A loop of our own over the loaded model writes the same text, one prompt at a time and without padding or cache."""
    monkeypatch.chdir(folder)
    name = MODEL_OF[run]
    model, tokenizer = load_model(model_folder(folder, run), name), tokenizer_of(name)
    for one in read_lines(folder / "results" / run / "evaluation/dolly/decode10/predictions.jsonl")[:2]:
        ids = tokenizer(one["prompt"], add_special_tokens=False)["input_ids"]
        written = []
        while len(written) < NEW_TOKENS and tokenizer.eos_token_id not in written:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1]
            written.append(int(logits[: len(tokenizer)].argmax()))
        assert one["tokens"] == len(written)
        assert one["prediction"] == tokenizer.decode(
            written, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def scores_of(folder, run, dataset):
    return json.loads((folder / "results" / run / "evaluation" / dataset / "decode10/scores.json").read_text())


def test_scores(folder):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    total = 0.0
    for run, dataset in EVALUATIONS:
        predictions = read_lines(folder / "results" / run / "evaluation" / dataset / "decode10/predictions.jsonl")
        expected = [
            max(scorer.score(text, one["prediction"])["rougeL"].fmeasure for text in one["references"])
            for one in predictions
        ]
        scores = scores_of(folder, run, dataset)
        assert [item["rouge_l"] for item in scores["items"]] == pytest.approx(expected)
        assert scores["rouge_l"] == pytest.approx(100 * sum(expected) / 8)
        assert scores["records"] == 8
        total += sum(expected)
    assert total > 0  # else nothing was compared


def test_table(folder):
    table = pd.read_csv(folder / "results/table.csv", keep_default_na=False)
    keys = ["experiment", "method", "student", "teacher", "objective", "variant"]
    assert list(table.columns) == [
        *keys, "dolly", "dolly_std", "sinst", "sinst_std", "average",
        "dolly_low", "dolly_high", "sinst_low", "sinst_high", "average_low", "average_high",
        "training_seeds", "decode_seeds", "std_over", "interval_over",
    ]  # fmt: skip
    assert table[keys].values.tolist() == [
        ["cross", "teacher", "", "qwen_dolly", "", ""],
        ["cross", "sft", "gpt2", "qwen_dolly", "", "sft"],
        ["cross", "uld", "gpt2", "qwen_dolly", "", "uld"],
        ["cross", "seqkd", "gpt2", "qwen_dolly", "", "seqkd"],
        ["same", "teacher", "", "llama2_raw", "", ""],
        ["same", "vanilla_kd", "tinyllama", "llama2_raw", "forward_kl", "vanilla_kd"],
        ["same", "dskd", "tinyllama", "llama2_raw", "forward_kl", "dskd"],
    ]
    long = pd.read_csv(folder / "results/scores.csv")
    assert len(long) == len(EVALUATIONS)
    for _, row in table.iterrows():
        run = (
            f"teachers/{row['teacher']}"
            if row["method"] == "teacher"
            else f"{row['experiment']}/methods/{row['variant']}/seed1"
        )
        found = [scores_of(folder, run, dataset)["rouge_l"] for dataset in ("dolly", "sinst")]
        assert [row["dolly"], row["sinst"], row["average"]] == pytest.approx([*found, sum(found) / 2], abs=0.0051)
        assert (row["dolly_std"], row["training_seeds"], row["decode_seeds"], row["std_over"]) == ("", 1, 1, "")


def test_page(folder):
    page = (folder / "results/table.md").read_text()
    for words in (
        "## cross",
        "Teacher qwen_dolly, student gpt2.",
        "## same",
        "greedily, in fp32, 8 tokens at most",
        "`alpaca` of 256 tokens at most",
        "Tokens of `gpt2+qwen/train`: 9",
        "Tokens of `tinyllama+llama2/train`: 100.0%",
        "One training run and one decode seed",
    ):
        assert words in page, page
    worst = {}
    for run, dataset in EVALUATIONS:
        key = (dataset, MODEL_OF[run] if "methods" in run else run.removeprefix("teachers/"))
        worst[key] = scores_of(folder, run, dataset)["prompts_cut"]
    (line,) = [line for line in page.splitlines() if "had to be shortened" in line]
    for (dataset, reader), cut in worst.items():
        assert (f"{cut} of 8 of `{dataset}` for {reader}" in line) == (cut > 0)
