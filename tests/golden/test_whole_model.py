"""Methods on whole models, from text to the gradient of every parameter, against the published criteria (group whole_model).

Everything here is what a training runs: records, tokenizers, collator, models, signal, method. Only the weights come from a formula, and
where the published numbers are of a defect, so does what ours computes right: see the tests of those groups.
"""

import pytest
import torch

from kdbench import models
from kdbench.alignment.vocabulary import _closest_stems, closest, texts_of
from kdbench.losses import mcw
from kdbench.losses.cross_entropy import correct, cross_entropy
from kdbench.methods.base import Needs
from kdbench.signals import Step, Vocabulary
from tests.golden import golden, real, test_dskd_cma, test_mcw_kd, test_multilevel_ot
from tests.golden.whole import SIDES, Whole

# Float32 only, and the rounding of the models' own arithmetic enters.
PORT = {
    "f": 1,
    "student_temperature": 2.0,
    "teacher_temperature_mlot": 2.0,
    "top_k": 50,
}  # published defaults of multi-level OT
LOSS_TOLERANCE, GRADIENT_TOLERANCE, ABSOLUTE = 1e-4, 1e-3, 1e-5


def _kd(params, **more):
    found = {"ce_rate": 1 - params["kd_rate"], "kd_rate": params["kd_rate"], "objective": params["kd_objective"]}
    return found | {"temperature": params["kd_temperature"]} | more


def _various_divergence(params):
    options = {"adaptive_kl": {"adaptive_alpha": params["adaptive_kl_alpha"]}}
    options["skewed_forward_kl"] = options["skewed_reverse_kl"] = {"skew_lambda": params["skew_lambda"]}
    return "vanilla_kd", _kd(params, **options.get(params["kd_objective"], {}))


def _universal_logit_distillation(params):
    rate = params["kd_rate"]
    return "uld", {"ce_rate": {"dskd": 1 - rate, "mcw": 1.0}[params["combine"]], "kd_rate": rate}


# Of each published criterion our method with its settings; and of its logged components ours, the sum of the terms named.
CRITERIA = {
    "cross_entropy": (lambda params: ("sft", {}), {"nll_loss": ["ce"]}),
    "various_divergence": (_various_divergence, {"nll_loss": ["ce"], "kd_loss": ["kd"]}),
    "universal_logit_distillation": (_universal_logit_distillation, {"nll_loss": ["ce"], "uld_loss": ["uld"]}),
    "dual_space_kd": (
        lambda params: ("dskd", _kd(params)),
        {
            "nll_loss": ["ce"],
            "t2s_ce_loss": ["t2s_ce"],
            "t2s_kd_loss": ["t2s_kd"],
            "s2t_kd_loss": ["s2t_kd"],
            "kd_loss": ["t2s_ce", "t2s_kd", "s2t_kd"],
            "t2s_acc": ["t2s_correct"],
            "s2t_acc": ["s2t_correct"],
        },
    ),
}


def _of(*criteria):
    """The cases of some criteria."""
    found = [of for of in golden.cases("whole_model") if of.values[0] is None or of.values[0]["criterion"] in criteria]
    return pytest.mark.parametrize("case", found)


def _assert_value(found, want):
    assert found.item() == pytest.approx(want, rel=LOSS_TOLERANCE, abs=ABSOLUTE)


def _assert_gradients(found, want):
    assert set(found) == set(want)
    for name, checksum in want.items():
        golden.assert_checksum(found[name], checksum, GRADIENT_TOLERANCE, ABSOLUTE)


def _assert_all(whole, method, components, want, vocabulary=None):
    """Total, components, accuracy and every gradient."""
    student, terms = whole.run(method, vocabulary)
    values = terms.sums | terms.diagnostics
    assert set(want["components"]) == {*components, "loss", "accuracy"}
    for published, ours in components.items():
        _assert_value(sum(values[name] for name in ours), want["components"][published])
    _assert_value(terms.total, want["loss"])
    logits = models.linear(student.rows.hidden, student.head)
    assert correct(logits, student.rows.targets).sum().item() == want["components"]["accuracy"]
    _assert_gradients(whole.gradients(terms.total, method), want["grads"])


@pytest.fixture(autouse=True)
def _real_texts():
    real.require()


@pytest.mark.parametrize("case", golden.cases("whole_model", counted=False))
def test_tokens_and_models(case):
    """Checksums of states and logits at response positions: a difference here is none of the loss."""
    whole = Whole(case)
    assert whole.tokens.student.response_counts.sum() == case["student_label_tokens"]
    for side, signal in zip(SIDES, whole.signals(whole.batch(Needs())), strict=True):
        found = {"last_hidden": signal.rows.hidden, "logits": models.linear(signal.rows.hidden, signal.head)}
        for name in ("last_hidden", "logits"):
            if f"{side}_{name}" in case["forward_check"]:
                golden.assert_checksum(
                    found[name], case["forward_check"][f"{side}_{name}"], GRADIENT_TOLERANCE, ABSOLUTE
                )


@_of(*CRITERIA)
def test_methods_of_one_form(case):
    """Those that compute what was published, as it was published."""
    name_and_settings, components = CRITERIA[case["criterion"]]
    whole = Whole(case)
    method = whole.method(*name_and_settings(case["params"]))
    assert list(case["expected"]) == ["as_published_code"]
    _assert_all(whole, method, components, case["expected"]["as_published_code"]["f32"])


def _published_map(whole) -> Vocabulary:
    """Of each teacher's token the nearest name, the marker of a word's start a letter like others; of equals the one of the lowest id."""
    student, teacher = (texts_of(whole.tokenizer(side)).texts for side in SIDES)
    nearest, distance = _closest_stems(list(teacher), {text: place for place, text in enumerate(student)})
    unread = torch.zeros(0, dtype=torch.long)
    return Vocabulary(torch.from_numpy(nearest), torch.from_numpy(distance), unread, unread, unread)


CMA = CRITERIA["dual_space_kd"][1] | {"max_t2s_prob": ["max_t2s_prob"]}


@_of("dual_space_kd_with_cma")
def test_cross_model_attention(case):
    """Deviations over the batch's response positions, as the method has them; or over all positions, handed in."""
    whole = Whole(case)
    settings = _kd(case["params"], teacher_temperature=case["params"]["teacher_temperature"], deviation="batch")
    for variant, want in case["expected"].items():
        given = {"valid_position_std": None, "as_published_code": published_deviations}[variant]
        method = whole.method(test_dskd_cma._Given if given else "dskd_cma", settings)
        if given:
            method.given = given(whole)
        _assert_all(whole, method, CMA, want["f32"])


def published_deviations(whole):
    """Over prompts and padding too: see test_dskd_cma.py."""
    outputs = whole.published_outputs("teacher")
    fixed = {
        "teacher_embed": whole.models["teacher"].get_input_embeddings().weight,
        "teacher_hidden": outputs["hidden"],
    }
    inputs = {f"teacher_{name}": outputs[name].numpy() for name in ("label", "input_ids")}
    return test_dskd_cma._deviations("as_published_code", fixed, inputs)


@pytest.mark.slow  # compares 150,000 tokens with 50,000
@_of("min_edit_dis_kld")
def test_mined(case):
    """The corrected variant, see test_mined.py. Its map of the vocabularies departs from ours in what it counts as near."""
    whole = Whole(case)
    vocabulary = _published_map(whole)
    method = whole.method("mined", _kd(case["params"], preimage="first"), vocabulary)
    components = {"nll_loss": ["ce"], "forward_kl": ["kd", "one_hot"]}
    _assert_all(whole, method, components, case["expected"]["corrected"]["f32"], vocabulary)
    published = case["expected"]["as_published_code"]["f32"]
    assert published["components"]["forward_kl"] == 0
    alone = (1 - case["params"]["kd_rate"]) * published["components"]["nll_loss"]
    assert published["loss"] == pytest.approx(alone, rel=LOSS_TOLERANCE)
    _assert_ours_is_nearer(whole, vocabulary)


def _assert_ours_is_nearer(whole, published):
    """Spaces aside, our nearest token is never further away than the published one."""
    student, teacher = (texts_of(whole.tokenizer(side)).texts for side in SIDES)
    sample = list(range(100, len(teacher), 997))
    ours, distance = closest([teacher[token] for token in sample], list(student))
    theirs = [student[token] for token in published.nearest[sample].tolist()]
    of_theirs = [closest([teacher[token]], [text])[1][0] for token, text in zip(sample, theirs, strict=True)]
    assert (distance <= of_theirs).all()
    assert (distance < of_theirs).any()
    assert (torch.from_numpy(ours) == published.nearest[sample]).float().mean() > 0.7


@_of("multi_level_ot")
def test_multilevel_ot_as_published(case):
    """The functions of multilevel_ot composed as the port does, over padding too; the cross entropy is the method's."""
    whole, want = Whole(case), case["expected"]["as_published_code"]["f32"]
    student, teacher = (whole.published_outputs(side) for side in SIDES)
    valid = [of["label"] != golden.IGNORED for of in (student, teacher)]
    with_defaults = case | {"params": PORT | case["params"]}
    logits = student["logits"]
    _, terms = whole.run(whole.method("multilevel_ot", {"kd_rate": 0.0}))
    _assert_value(terms.sums["ce"], want["components"]["nll_loss"])
    reference = cross_entropy(logits[valid[0]], student["label"][valid[0]]).sum()
    distillation = test_multilevel_ot._port(with_defaults, logits, teacher["logits"], *valid)
    total = reference + case["params"]["kd_rate"] * distillation
    _assert_value(total, want["loss"])
    _assert_gradients(whole.gradients(total), want["grads"])


@_of("mcw_kd")
def test_multicost_as_published(case):
    """The part of dskd_cma is the method's own; the transports are its functions, composed as test_mcw_kd.py does, over prompts too."""
    whole, want, params = Whole(case), case["expected"]["as_published_code"]["f32"], case["params"]
    method = whole.method("mcw_kd", _kd(params, ce_rate=1.0, teacher_temperature=params["teacher_temperature"]))
    given = published_deviations(whole)
    method.cma.deviations = lambda *_: given
    student, teacher = whole.signals(whole.batch(Needs()))
    terms = method.cma(student, teacher, Step())
    transports = _transports(whole, method)
    components = want["components"]
    for published, ours in (CMA | {"loss_ce": ["ce"]}).items():
        _assert_value(sum((terms.sums | terms.diagnostics)[name] for name in ours), components[published])
    for family, names in test_mcw_kd.MEANS.items():
        _assert_value(transports.loss(family), components[f"ot_loss_{family}"])
        for name, cost in zip(names, transports.costs[family], strict=True):
            _assert_value(mcw.mean_costs(cost, *transports.counts)[-1], components[name])
    total = terms.total + transports.loss("logits") + transports.loss("hidden")
    _assert_value(total, want["loss"])
    _assert_gradients(whole.gradients(total, method), want["grads"])


def _transports(whole, method):
    tensors, inputs, text = {}, {}, []
    for side, prefix in zip(SIDES, ("", "teacher_"), strict=True):
        outputs = whole.published_outputs(side)
        tensors |= {f"{side}_logits": outputs["logits"], f"{side}_hidden": outputs["hidden"]}
        inputs[f"{prefix}input_ids"] = outputs["input_ids"].numpy()
        text.append(outputs["attention_mask"].bool())
    for name, layer in (("proj_ot", method.ot), ("salience", method.salience)):
        tensors |= {f"{name}_weight": layer.weight, f"{name}_bias": layer.bias}
    names = {
        f"{side}_tokens": whole.tokenizer(side).convert_ids_to_tokens(range(whole.size(side, False))) for side in SIDES
    }
    return test_mcw_kd.Transports(whole.case | {"params": whole.case["params"] | names}, inputs, tensors, text)
