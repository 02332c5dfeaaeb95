"""The loss of every method: its formula, and what must not change it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.divergences import adaptive_kl, forward_kl, skewed_reverse_kl
from kdbench.models import pack, transformer
from kdbench.signals import Step
from tests.methods.cases import CASES, WITH_SIGNAL, Pair, needs, one_step

every = pytest.mark.parametrize("name", CASES)
EPSILON = 1e-6
# Where the student's states decide something that the gradient takes for given, so that it is not the derivative of the loss.
HELD_FIXED = {
    "vanilla_kd_adaptive": "the weight of the two divergences",
    "mcw_kd": "the plans of transport, and the student's part of the interpolated teacher",
    "mcw_kd_semi_dual": "that part, as in mcw_kd",
    "mcw_kd_debiased": "that part, as in mcw_kd",
}
# Cases without sorting and |q - p|.
SMOOTH = {"sft", "seqkd", "vanilla_kd", "vanilla_kd_adaptive", "dskd", "dskd_skewed"}
# Cases whose formula is written once more below; the others' are tested in files of their own.
plain = pytest.mark.parametrize(
    "name",
    ["sft", "seqkd", "vanilla_kd", "vanilla_kd_adaptive", "dskd", "dskd_skewed", "uld", "uld_byte"],
)


def _ce(logits, targets):
    return F.cross_entropy(logits, targets, reduction="sum")


def _plain(name, method, student, teacher, paired):
    """The formulas of docs/methods.md on whole matrices of logits, for autograd to differentiate."""
    z_s, y, size = student.rows.hidden @ student.head.weight.T, student.rows.targets, student.head.size
    ce = _ce(z_s, y)
    if name in ("sft", "seqkd"):
        return ce
    z_t = teacher.rows.hidden @ teacher.head.weight.T
    if name.startswith("vanilla_kd"):
        if name == "vanilla_kd":
            return 0.5 * ce + 0.5 * forward_kl(z_s[:, :size], z_t[:, :size], 2.0).sum()
        return 0.2 * ce + 0.5 * adaptive_kl(z_s[:, :size], z_t[:, :size]).sum()
    if name.startswith("dskd"):
        kd_rate, objective = {"dskd": (0.5, forward_kl), "dskd_skewed": (1.5, skewed_reverse_kl)}[name]
        t2s = method.t2s(teacher.rows.hidden) @ student.head.weight.detach().T
        s2t = method.s2t(student.rows.hidden) @ teacher.head.weight.T
        kd = _ce(t2s, y) + objective(z_s[:, :size], t2s.detach()[:, :size], 2.0).sum()
        return 0.5 * ce + kd_rate * (kd + forward_kl(s2t[:, :size], z_t[:, :size], 2.0).sum())
    total = ce
    for i, j in paired.tolist():
        q = z_s[i, :size].softmax(0).sort(descending=True).values
        p = z_t[j, : teacher.head.size].softmax(0).sort(descending=True).values
        total = total + {"uld": 1.0, "uld_byte": 1.5}[name] * (F.pad(q, (0, len(p) - len(q))) - p).abs().sum()
    return total


@plain
@pytest.mark.parametrize("elements", [1, 60, 2**24])
def test_loss_and_gradients_are_those_of_the_formula_in_any_chunks(name, elements, monkeypatch):
    monkeypatch.setattr("kdbench.losses.vocabulary._CHUNK_ELEMENTS", {"cpu": elements})
    method, student, teacher, step = one_step(name)
    terms = method(student, teacher, step)
    plain = _plain(name, method, student, teacher, step.pairs)
    torch.testing.assert_close(terms.total, plain, rtol=1e-12, atol=0)
    leaves = [student.rows.hidden, student.head.weight, *method.parameters()]
    for ours, expected in zip(
        torch.autograd.grad(terms.total, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@plain
def test_total_is_the_weighted_sum_of_the_terms(name):
    method, student, teacher, step = one_step(name)
    terms = method(student, teacher, step)
    rates = CASES[name][1]
    ce_rate = rates.get("ce_rate", getattr(method.settings, "ce_rate", 1.0))
    kd_rate = rates.get("kd_rate", getattr(method.settings, "kd_rate", 1.0))
    expected = sum((ce_rate if term == "ce" else kd_rate) * value for term, value in terms.sums.items())
    torch.testing.assert_close(terms.total.detach(), expected)
    assert all(not value.requires_grad for value in [*terms.sums.values(), *terms.diagnostics.values()])


@every
def test_packing_does_not_change_the_loss(name):
    pair = Pair(name)
    rows = [0, 2, 4]
    padded = pair.terms(rows)
    assert pack(pair.student)
    assert pack(pair.teacher)
    packed = pair.terms(rows)
    torch.testing.assert_close(packed.total, padded.total, rtol=1e-12, atol=0)
    for one, other in zip(pair.gradients(packed), pair.gradients(padded), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every
def test_states_of_prompts_do_not_reach_the_loss(name):
    pair = Pair(name)
    pack(pair.student)
    pack(pair.teacher)
    rows = [0, 1, 2, 3]
    before = pair.terms(rows).total

    def disturb(model, side):
        def hook(module, arguments, output):
            keep = torch.zeros(side.input_ids.numel(), dtype=torch.bool)
            keep[side.positions] = True
            noise = 100 * torch.randn_like(output.last_hidden_state)
            output.last_hidden_state = torch.where(keep[:, None], output.last_hidden_state, noise)
            return output

        return transformer(model).register_forward_hook(hook)

    handles = [disturb(model, side) for model, side in zip((pair.student, pair.teacher), pair.sides(rows), strict=True)]
    after = pair.terms(rows).total
    for handle in handles:
        handle.remove()
    assert before == after


@every
def test_micro_batches_add_up_to_the_batch(name):
    pair = Pair(name)
    whole = pair.terms([3, 0, 4, 1, 2])
    parts = [pair.terms([3, 0]), pair.terms([4]), pair.terms([1, 2])]
    for term, value in (whole.sums | whole.diagnostics).items():
        summed = sum((part.sums | part.diagnostics)[term] for part in parts)
        torch.testing.assert_close(summed, value, rtol=1e-12, atol=1e-12)
    expected = pair.gradients(whole)
    found = [pair.gradients(part) for part in parts]
    for index, gradient in enumerate(expected):
        if gradient is None:
            assert all(part[index] is None for part in found)
        else:
            torch.testing.assert_close(sum(part[index] for part in found), gradient, rtol=1e-10, atol=1e-9)


@every
def test_in_bfloat16_the_loss_is_about_the_same_and_gradients_are_float32(name):
    pair, rows = Pair(name, dtype=torch.float32), [0, 1, 2]
    wide = pair.terms(rows)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = pair.terms(rows)
    assert narrow.total.dtype == torch.float32
    assert narrow.total != wide.total
    torch.testing.assert_close(narrow.total, wide.total, rtol=2e-2, atol=0)
    one, other = (torch.cat([g.flatten() for g in pair.gradients(terms) if g is not None]) for terms in (narrow, wide))
    assert one.dtype == torch.float32
    # Sorted distributions and |q - p| have kinks: where rounding turns a sign, the gradient of that rank jumps. With the states of this
    # batch held fixed, 3 of uld_byte's 432 ranks turned, all with |q - p| < 0.002, and their signs account for the loss's share.
    assert torch.cosine_similarity(one, other, dim=0) > (0.999 if name in SMOOTH else 0.98)


@every
def test_everything_that_is_learned_gets_a_gradient(name):
    """And the teacher none."""
    pair = Pair(name)
    pair.teacher.requires_grad_(True)
    pair.terms([0, 1]).total.backward()
    for of, module in {"student": pair.student, "method": pair.method}.items():
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None, (of, parameter_name)
    reached = {parameter_name for parameter_name, p in pair.teacher.named_parameters() if p.grad is not None}
    assert reached == set()


@every
def test_the_order_of_a_batch_does_not_matter(name):
    pair = Pair(name)
    one, other = pair.terms([0, 1, 2, 3, 4]), pair.terms([3, 1, 4, 0, 2])
    torch.testing.assert_close(other.total, one.total, rtol=1e-12, atol=0)
    for gradient, expected in zip(pair.gradients(other), pair.gradients(one), strict=True):
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-9)


@every
def test_a_token_and_a_long_text_in_one_batch(name):
    """Responses of 1 and of 512 tokens, the teacher's also the other way round: finite, and the sum of the two alone."""
    lengths = ((3, 1), (2, 512), (2, 1)), ((4, 1), (3, 500), (2, 40))
    pair = Pair(name, lengths=lengths, positions=520)
    rows = [0, 1, 2]
    whole = pair.terms(rows)
    values = whole.sums | whole.diagnostics
    assert all(value.isfinite() for value in values.values())
    assert all(gradient.isfinite().all() for gradient in pair.gradients(whole) if gradient is not None)
    alone = [pair.terms([row]) for row in rows]
    torch.testing.assert_close(sum(of.total for of in alone), whole.total, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in HELD_FIXED])
def test_the_gradient_is_that_of_the_loss(name):
    """Central differences along random directions of the student's states."""
    method, student, teacher, step = one_step(name)
    hidden = student.rows.hidden
    (gradient,) = torch.autograd.grad(method(student, teacher, step).total, [hidden])
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
        with torch.no_grad():
            forth, back = (
                method(
                    replace(student, rows=replace(student.rows, hidden=hidden + sign * EPSILON * direction)),
                    teacher,
                    step,
                ).total
                for sign in (1, -1)
            )
        assert (gradient * direction).sum().item() == pytest.approx(((forth - back) / (2 * EPSILON)).item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in WITH_SIGNAL if needs(name).alignment != "none"])
def test_without_a_single_pair_the_graph_stays_whole(name):
    method, student, teacher, step = one_step(name)
    terms = method(student, teacher, replace(step, pairs=torch.zeros(0, 2, dtype=torch.long)))
    assert all(value.isfinite() for value in (terms.sums | terms.diagnostics).values())
    (gradient,) = torch.autograd.grad(terms.total, [student.rows.hidden])
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_the_teacher_never_gets_a_gradient(name):
    method, student, teacher, step = one_step(name)
    hidden, weight = teacher.rows.hidden.requires_grad_(), teacher.head.weight.requires_grad_()
    terms = method(student, teacher, step)
    found = torch.autograd.grad(terms.total, [hidden, weight], allow_unused=True)
    assert found == (None, None)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_a_method_that_asks_for_a_signal_insists_on_it(name):
    method, student, _, step = one_step(name)
    with pytest.raises(ValueError, match="asks for a teacher's signal"):
        method(student, None, step)


@pytest.mark.parametrize("name", [name for name in WITH_SIGNAL if needs(name).alignment != "none"])
def test_a_method_that_asks_for_pairs_insists_on_them(name):
    method, student, teacher, step = one_step(name)
    with pytest.raises(ValueError, match="pairs"):
        method(student, teacher, replace(step, pairs=None))


def test_uld_without_a_single_pair_is_fine_tuning():
    method, student, teacher, _ = one_step("uld")
    terms = method(student, teacher, Step(pairs=torch.zeros(0, 2, dtype=torch.long)))
    assert terms.sums["uld"].item() == 0
    torch.testing.assert_close(terms.total.detach(), terms.sums["ce"])
