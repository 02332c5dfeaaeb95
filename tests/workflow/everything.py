"""A method that asks for everything that is computed from the text alone, and makes sure that it gets it."""

import torch

from kdbench.losses.cross_entropy import cross_entropy
from kdbench.losses.vocabulary import over_vocabulary
from kdbench.methods.base import Method, Needs
from kdbench.signals import weighted


class Everything(Method):
    """Cross entropy alone."""

    across_tokenizers = True

    def __init__(self, settings, student, teacher, vocabulary=None):
        super().__init__(settings, student, teacher, vocabulary)
        assert len(vocabulary.nearest) == len(vocabulary.distance) == teacher.vocabulary
        assert vocabulary.nearest.max() < student.vocabulary
        assert len(vocabulary.student_begins_word) == student.vocabulary

    @classmethod
    def needs(cls, settings):
        return Needs(teacher="signal", alignment="dtw", chunks=True, spelling=True, vocabulary=True)

    def forward(self, student, teacher, step):
        ours, theirs = student.rows, teacher.rows
        assert 0 <= step.progress < 1
        i, j = step.pairs.unbind(1)
        assert len(i) > 0
        assert (i.diff() > 0).all()
        assert torch.equal(ours.sequence[i], theirs.sequence[j])
        a, b = step.chunks
        assert (len(a), len(b)) == (len(ours.targets), len(theirs.targets))
        assert torch.equal(a.unique(), b.unique())
        assert a[-1] == b[-1] == len(a.unique()) - 1
        assert step.spelling.shape == (len(ours.counts), ours.counts.max(), theirs.counts.max())
        assert 0 < step.spelling.max() <= 1
        total = over_vocabulary(
            lambda logits, targets: {"ce": cross_entropy(logits, targets)},
            [(ours.hidden, student.head)],
            [ours.targets],
        )
        return weighted({"ce": total.total}, {})
