"""Every method on every family of models: what should learn does, what should not does not, and what is learned lands where it belongs."""

from dataclasses import replace

import pytest
import torch

from kdbench import methods, models
from kdbench.alignment.spelling import spell
from kdbench.errors import UserError
from kdbench.methods.base import Needs, Shape
from kdbench.settings import Hardware, Lora, Training
from kdbench.training import engines
from kdbench.training.checkpoints import Checkpoints
from kdbench.training.distiller import Distiller
from kdbench.training.run import train
from tests import tiny
from tests.methods import relations
from tests.methods.cases import CASES, WITH_SIGNAL, Pair, step
from tests.training import jobs

FAMILIES = {
    "gpt2": tiny.gpt2,
    "llama": tiny.llama,
    "llama_tied": lambda: tiny.llama(tied=True),
    "qwen2": tiny.qwen2,
    "qwen2_tied": lambda: tiny.qwen2(tied=True),
    "mistral": tiny.mistral,
    "opt": tiny.opt,
}
TUNINGS = [
    *((family, "full") for family in FAMILIES),
    ("gpt2", "lora"),
    ("llama", "lora"),
    ("qwen2_tied", "lora"),
    ("opt", "lora"),
]
TIED = {"gpt2", "llama_tied", "qwen2_tied", "opt"}
TRAINING = {"precision": "fp32", "learning_rate": 1e-2, "projector_learning_rate": 1e-2, "weight_decay": 0.0}


def student_of(family, tuning):
    model = FAMILIES[family]()
    return models.add_adapters(model, Lora(rank=2, dropout=0.0)) if tuning == "lora" else model


def one_step(pair, engine):
    """One optimizer step of a batch, as the training loop makes it; the gradient's norm."""
    rows = [0, 1, 2, 3, 4]
    side, teacher_side = pair.sides(rows)
    signal, known = None, relations.relate(Needs(), None, None)
    if pair.name in WITH_SIGNAL:
        with torch.no_grad():
            signal = models.signal(pair.teacher, teacher_side, pair.sizes[1])
        known = step(pair.name, models.rows(torch.zeros(len(side.targets), 1), side), signal.rows)
    with engine.accumulate(True):
        total, _ = engine.net(side, signal, known)
        engine.backward(total / len(side.targets))
    return engine.step(1.0)


def weights_of(*modules):
    return [{name: parameter.detach().clone() for name, parameter in module.named_parameters()} for module in modules]


def check_one_step(pair, tuning):
    """Moves exactly the student's trainable weights and the method's."""
    engine = engines.Plain(
        Distiller(pair.student, pair.method, pair.sizes[0], Training(**TRAINING)),
        Training(**TRAINING),
        Hardware(),
        None,
    )
    modules = pair.student, pair.method, pair.teacher
    before = weights_of(*modules)
    # The second matrix of an adapter starts from 0, so the first one learns in the second step only.
    norms = [one_step(pair, engine) for _ in range(2 if tuning == "lora" else 1)]
    assert all(0 < norm < float("inf") for norm in norms)
    student, method, teacher = (
        {name for name in was if not torch.equal(was[name], now[name])}
        for was, now in zip(before, weights_of(*modules), strict=True)
    )
    assert student == {name for name in before[0] if tuning == "full" or "lora_" in name}
    assert method == set(before[1])
    assert teacher == set()


@pytest.mark.parametrize(("family", "tuning"), TUNINGS, ids=map("-".join, TUNINGS))
@pytest.mark.parametrize("name", CASES)
def test_one_step_moves_what_is_to_learn_and_nothing_else(name, family, tuning):
    check_one_step(Pair(name, torch.float32, student=student_of(family, tuning)), tuning)


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "mistral", "opt"])
@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_every_family_can_teach(name, family):
    teacher = {
        "gpt2": tiny.gpt2,
        "llama_tied": lambda size: tiny.llama(size, tied=True),
        "mistral": tiny.mistral,
        "opt": tiny.opt,
    }[family]
    check_one_step(Pair(name, torch.float32, teacher=teacher), "full")


@pytest.mark.parametrize(("family", "tuning"), TUNINGS, ids=map("-".join, TUNINGS))
def test_states_head_and_embeddings_are_those_of_the_model(family, tuning):
    """Logits from the response rows equal the model's own, embeddings too; widths are those that projectors meet."""
    model, tokenizer = student_of(family, tuning), range(38)
    models.check_head(model, tokenizer)
    side = tiny.side(tiny.tokens(38), [0, 2, 3])
    with torch.no_grad():
        found = models.signal(model, side, 38)
        logits = torch.cat([model(input_ids=ids[None]).logits[0] for ids in side.input_ids.split(side.lengths)])
    torch.testing.assert_close(models.linear(found.rows.hidden, found.head), logits[side.positions])
    shape = models.shape(model, tokenizer)
    assert shape == Shape(found.rows.hidden.shape[1], found.embed(torch.tensor(3)).shape[-1], 38)
    tied = found.head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (family in TIED)
    models.check_positions(model, 64)
    with pytest.raises(UserError, match="64 positions"):
        models.check_positions(model, 65)


def test_the_positions_of_opt_start_behind_its_offset():
    model = tiny.opt()
    assert model.get_input_embeddings().weight.shape[1] == 12 != model.config.hidden_size
    assert model.model.decoder.embed_positions.weight.shape[0] == 64 + 2
    assert model(input_ids=torch.arange(64)[None] % 40).logits.isfinite().all()


def job_of(output, folder, method, **training):
    """A tiny training by a method, with everything that it asks for."""
    kind = methods.get(method)
    needs = kind.needs(kind.Settings())
    job = jobs.make_job(output, folder, "uld" if kind.across_tokenizers else "dskd", training={"epochs": 1} | training)
    texts = [[b"%d" % token for token in range(size)] for size in (jobs.VOCABULARY, jobs.TEACHER_VOCABULARY)]
    return replace(
        job,
        method=method,
        method_settings={},
        alignment=jobs.make_alignment(job.train) if needs.alignment == "byte" else None,
        spelling=spell(job.train, *texts) if needs.spelling or needs.alignment == "dtw" else None,
        vocabulary=relations.vocabulary(jobs.VOCABULARY, jobs.TEACHER_VOCABULARY) if needs.vocabulary else None,
    )


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", ["dskd", "dskd_cma", "mcw_kd", "mined"])
def test_projectors_are_in_the_checkpoint_and_not_in_the_model(method, tuning, models_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "remove", lambda self: None)  # they would go when the training is done
    lora = {"tuning": "lora", "lora": {"rank": 2}} if tuning == "lora" else {}
    job = job_of(tmp_path, models_folder, method, **lora)
    train(job)
    kind = methods.get(method)
    built = kind(kind.Settings(), Shape(16, 16, jobs.VOCABULARY), job.teacher_shape, job.vocabulary)
    learned = {f"method.{name}" for name, _ in built.named_parameters()}
    assert len(learned) == {"dskd": 4, "dskd_cma": 6, "mcw_kd": 10, "mined": 0}[method]

    newest = max((tmp_path / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    state = torch.load(newest / "state.pt", weights_only=True)
    saved = set(state["module"])
    assert {name for name in saved if name.startswith("method.")} == learned
    student = {f"student.{name}" for name, _ in models.load(models_folder / "student").named_parameters()}
    trained = saved - learned - {"student.lm_head.weight"}  # the tied head's other name
    if tuning == "full":
        assert trained == student
    else:
        assert saved - learned == trained
        assert all("lora_" in name for name in trained)
    groups = state["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(learned) + len(trained)

    exported = set(jobs.weights(tmp_path / "model"))
    if tuning == "full":
        assert {f"student.{name}" for name in exported} == student
    else:
        assert exported
        assert all("lora_" in name for name in exported)
