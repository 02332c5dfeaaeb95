"""ROUGE-L by the rouge-score package, the measure of the published tables."""

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=2)
def _scorer(stemmer: bool):
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)


def rouge_l(prediction: str, references: Sequence[str], stemmer: bool = True) -> float:
    """F1 of the longest common subsequence of words, maximum over the references, 0 to 1 (Lin 2004).

    Args:
        prediction: a model's answer; an empty one scores 0.
        references: at least one.
        stemmer: compare Porter stems.
    """
    return max(_scorer(stemmer).score(reference, prediction)["rougeL"].fmeasure for reference in references)


def score(predictions: Sequence, stemmer: bool = True) -> dict:
    """Scores of one set of answers.

    Args:
        predictions: `kdbench.evaluation.predictions.Prediction`, at least one.
        stemmer: see `rouge_l`.

    Returns:
        `items` with the ROUGE-L (0 to 1) of each record, and of all: `rouge_l` (mean, 0 to 100), `records`, `share_empty`,
        `share_truncated` (stopped by length), `mean_tokens`, `prompts_cut` (how many prompts were too long).
    """
    count = len(predictions)
    items = [{"id": one.id, "rouge_l": rouge_l(one.prediction, one.references, stemmer)} for one in predictions]
    return {
        "items": items,
        "rouge_l": 100 * sum(item["rouge_l"] for item in items) / count,
        "records": count,
        "share_empty": sum(not one.prediction.strip() for one in predictions) / count,
        "share_truncated": sum(one.stop == "length" for one in predictions) / count,
        "mean_tokens": sum(one.tokens for one in predictions) / count,
        "prompts_cut": sum(one.prompt_cut for one in predictions),
    }
