"""ROUGE-L, also on texts that are none. Published values: tests/golden/test_rouge.py."""

import pytest

from kdbench.evaluation.predictions import Prediction
from kdbench.evaluation.rouge import rouge_l, score


def predicted(text: str, references, stop: str = "eos", tokens: int = 3, cut: bool = False) -> Prediction:
    return Prediction("set/1", "prompt", cut, text, list(references), tokens, stop)


def test_the_best_reference_counts_wherever_it_stands():
    references = [f"wrong answer number {number}" for number in range(24)]
    for place in (0, 11, 24):
        assert rouge_l("the cat sat", [*references[:place], "the cat sat", *references[place:]]) == 1.0
    assert rouge_l("the cat", ["a cat sat there", "the dog"]) == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))


def test_order_of_words_matters():
    assert rouge_l("a b c d", ["d c b a"]) == pytest.approx(0.25)  # the longest common subsequence has one word of four


def test_stemming_is_a_choice():
    assert rouge_l("running dogs", ["run dog"], stemmer=True) == 1.0
    assert rouge_l("running dogs", ["run dog"], stemmer=False) == 0.0


@pytest.mark.parametrize("text", ["", "  \n ", "!?", "日本語"])
def test_an_answer_without_words_scores_nothing(text):
    assert rouge_l(text, ["some words"]) == 0.0
    assert rouge_l("some words", [text]) == 0.0


def test_long_texts():
    words = [f"w{number}" for number in range(3000)]
    assert rouge_l(" ".join(words[::10]), [" ".join(words)]) == pytest.approx(2 * 0.1 / 1.1)


def test_summary_of_a_set():
    predictions = [
        predicted("the cat", ["the cat"], tokens=3),
        predicted(" \n", ["the cat"], tokens=1, cut=True),
        predicted("no", ["the cat"], stop="length", tokens=8, cut=True),
        predicted("the dog", ["the cat"], tokens=4),
    ]
    scores = score(predictions)
    assert scores["rouge_l"] == pytest.approx(100 * (1 + 0 + 0 + 0.5) / 4)
    assert (scores["share_empty"], scores["share_truncated"]) == (0.25, 0.25)
    assert (scores["records"], scores["mean_tokens"], scores["prompts_cut"]) == (4, 4.0, 2)
