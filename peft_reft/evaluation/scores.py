"""Metrics, each with a confidence interval. This module knows arrays of numbers, and nothing of tasks or models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .extras import needs_extra


RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A metric and its 95 % confidence interval.

    Args:
        value (`float`, *optional*): The metric, from 0 to 1, or from -1 to 1 for correlations. None: undefined.
        low, high (`float`, *optional*): The interval. None: undefined, for too few examples or constant predictions.
    """

    value: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The fields, for JSON."""
        return asdict(self)


def accuracy(correct: Sequence[bool]) -> Score:
    """The share of correct answers, with Wilson's interval, which is good for few examples and near 0 and 1 too.

    Args:
        correct (`Sequence[bool]`): For each example, whether its answer is correct.

    Raises:
        ValueError: when there is no answer, or scipy is missing.
    """
    if not correct:
        raise ValueError("There is no answer to score.")
    with needs_extra("A confidence interval"):
        from scipy.stats import binomtest
    right = sum(map(bool, correct))
    interval = binomtest(right, len(correct)).proportion_ci(confidence_level=0.95, method="wilson")
    return Score(right / len(correct), float(interval.low), float(interval.high))


def score(metric: str, predicted: Sequence[float], labels: Sequence[float], seed: int = 42) -> Score:
    """A metric of GLUE, with its interval.

    Accuracy has Wilson's interval. The others have a bootstrap interval: the percentiles of the metric over 1,000
    samples of the examples, drawn with replacement.

    Args:
        metric (`str`): `"accuracy"`, `"f1"`, `"matthews"`, `"pearson"` or `"spearman"`.
        predicted, labels (`Sequence[float]`): Predicted and true class or number of each example.
        seed (`int`): Seed of the bootstrap samples.

    Raises:
        ValueError: when the metric is unknown, lengths differ, there is no example, or a library is missing.
    """
    if len(predicted) != len(labels) or not len(labels):
        raise ValueError(f"{len(predicted)} predictions do not fit {len(labels)} labels.")
    if metric == "accuracy":
        return accuracy([one == other for one, other in zip(predicted, labels)])
    function = _metric(metric)
    import numpy as np
    from scipy.stats import bootstrap

    with warnings.catch_warnings():  # of undefined metrics, which are None in the result
        warnings.simplefilter("ignore")
        value = function(predicted, labels)
        if len(labels) < 2 or not math.isfinite(value):
            return Score(_finite(value), None, None)
        interval = bootstrap(
            (np.asarray(predicted), np.asarray(labels)),
            function,
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            confidence_level=0.95,
            method="percentile",
            random_state=seed,
        ).confidence_interval
    return Score(_finite(value), _finite(interval.low), _finite(interval.high))


def _metric(name: str) -> Any:
    with needs_extra("Scoring"):
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import f1_score, matthews_corrcoef
    metrics = {
        "matthews": lambda predicted, labels: float(matthews_corrcoef(labels, predicted)),
        "f1": lambda predicted, labels: float(f1_score(labels, predicted, zero_division=0.0)),
        "pearson": lambda predicted, labels: float(pearsonr(predicted, labels).statistic),
        "spearman": lambda predicted, labels: float(spearmanr(predicted, labels).statistic),
    }
    if name not in metrics:
        raise ValueError(f"There is no metric {name!r}. There are accuracy, {', '.join(metrics)}.")
    return metrics[name]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
