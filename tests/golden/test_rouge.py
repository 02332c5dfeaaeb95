"""ROUGE-L against the published metric."""

import pytest

from kdbench.evaluation.rouge import score
from tests.evaluation.test_rouge import predicted
from tests.golden import golden


@pytest.mark.parametrize("published", golden.whole("rouge"))
def test_equals_the_published_metric(published):
    pairs = list(zip(published["predictions"], published["references"], strict=True))
    scores = score([predicted(*pair) for pair in pairs], stemmer=True)
    assert [item["rouge_l"] for item in scores["items"]] == [item["rougeL"] for item in published["per_item"]]
    assert round(scores["rouge_l"], 4) == published["aggregate"]["rougeL"]
    assert scores["records"] == len(pairs)
