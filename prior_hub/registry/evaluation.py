"""Evaluation results in the Hub's form (model-index), from what people have: a dictionary, a JSON file, `EvalResult`s.

    {"task": "image-classification", "dataset": "uoft-cs/cifar10", "metrics": {"accuracy": 0.91, "nll": 0.31}}

They are of a model that was fine-tuned under the prior; "metrics" may be what `trainer.evaluate()` returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import model_index_to_eval_results

from prior_hub.errors import PriorMetadataError
from prior_hub.registry.markdown import plain, table

__all__ = ["Evaluation", "eval_results", "evaluation_table"]

Evaluation = EvalResult | Mapping[str, Any] | Sequence[EvalResult | Mapping[str, Any]]

_NO_METRICS = {"epoch", "step", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
_NO_METRICS |= {"jit_compilation_time", "num_input_tokens_seen", "samples", "mem_cpu_alloc_delta", "mem_gpu_alloc_delta"}
_PREFIXES = ("eval_", "test_")
_OF_TRAINING = ("train_", "total_flos")
_DESCRIPTION = {"task", "task_name", "dataset", "dataset_name", "config", "split", "revision", "metrics"}
_DESCRIPTION |= {"source_name", "source_url"}
_EXAMPLE = '{"task": "image-classification", "dataset": "org/data", "metrics": {"accuracy": 0.91}}'


def eval_results(evaluation: Evaluation | None, *, dataset: str | None = None, task: str | None = None) -> list[EvalResult]:
    """Evaluation results as the client's own `EvalResult`s.

    Args:
        evaluation: an `EvalResult`; a dictionary with "task", "dataset", "metrics" {name: value} and, if wanted, "split",
            "config", "revision", "dataset_name", "task_name", "source_name", "source_url"; what `trainer.evaluate()` returned,
            with "task" and "dataset" in it or given here; a model-index of the Hub; or a list of these.
        dataset: the data set where a dictionary names none.
        task: the task where a dictionary names none, such as "image-classification".

    Raises:
        PriorMetadataError: something is missing, unknown, or not a finite number or a text.
    """
    if evaluation is None:
        return []
    entries = evaluation if isinstance(evaluation, (list, tuple)) else [evaluation]
    results: list[EvalResult] = []
    for entry in entries:
        if isinstance(entry, EvalResult):
            results.append(entry)
        elif isinstance(entry, Mapping):
            results += _from_index(entry) if "results" in entry else _from_dictionary(entry, dataset, task)
        else:
            raise PriorMetadataError(
                f"an evaluation result is a {type(entry).__name__}, expected a dictionary such as {_EXAMPLE}."
            )
    for result in results:
        result.metric_value = _value(result.metric_type, result.metric_value)
    return results


def _from_index(entry: Mapping[str, Any]) -> list[EvalResult]:
    try:
        return model_index_to_eval_results([dict(entry)])[1]
    except (KeyError, TypeError) as error:
        raise PriorMetadataError(f"the evaluation is no model-index of the Hub: {type(error).__name__}: {error}.") from error


def _from_dictionary(entry: Mapping[str, Any], dataset: str | None, task: str | None) -> list[EvalResult]:
    known = {key: value for key, value in entry.items() if key in _DESCRIPTION}
    rest = {key: value for key, value in entry.items() if key not in _DESCRIPTION}
    metrics = known.pop("metrics", None)
    if metrics is None and any(str(key).startswith(_PREFIXES) for key in rest):  # what trainer.evaluate() returns
        metrics, rest = rest, {}
    if rest:
        raise PriorMetadataError(f"an evaluation result has the keys {sorted(map(str, rest))}, expected one like {_EXAMPLE}.")
    known = {"dataset": dataset, "task": task} | known
    lacking = [key for key in ("task", "dataset") if not isinstance(known[key], str) or not known[key]]
    if lacking or not isinstance(metrics, Mapping):
        raise PriorMetadataError(
            f"an evaluation result lacks {' and '.join([*lacking, *([] if isinstance(metrics, Mapping) else ['metrics'])])}, "
            f"expected one like {_EXAMPLE}; task and data set may also be given as evaluation_task= and evaluation_dataset= "
            "(--evaluation-task, --evaluation-dataset)."
        )
    of_trainer = any(str(key).startswith(_PREFIXES) for key in metrics)
    measured = [key for key in metrics if not (of_trainer and str(key).startswith(_OF_TRAINING))]  # all_results.json has both
    found = {_name(key): metrics[key] for key in measured if _name(key) not in _NO_METRICS}
    twice = sorted({_name(key) for key in measured if sum(_name(other) == _name(key) for other in measured) > 1} & found.keys())
    if twice:
        raise PriorMetadataError(
            f"an evaluation result gives {', '.join(twice)} twice, as eval_ and as test_: give the one that counts, or a "
            'list of two with a "split" each.'
        )
    if not found:
        raise PriorMetadataError(f"an evaluation result has no metric, expected one like {_EXAMPLE}.")
    return [
        EvalResult(
            task_type=known["task"],
            task_name=known.get("task_name"),
            dataset_type=known["dataset"],
            dataset_name=known.get("dataset_name") or known["dataset"],
            dataset_config=known.get("config"),
            dataset_split=known.get("split"),
            dataset_revision=known.get("revision"),
            metric_type=name,
            metric_value=value,
            source_name=known.get("source_name"),
            source_url=known.get("source_url"),
        )
        for name, value in found.items()
    ]


def _name(key: str) -> str:
    """The metric's name: Trainer puts "eval_" or "test_" before it."""
    return str(key).removeprefix("eval_").removeprefix("test_")


def _value(name: str, value: Any) -> float | int | str:
    if hasattr(value, "item"):  # a number of NumPy or torch
        value = value.item()
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise PriorMetadataError(f"the evaluation gives {name} the value {value!r}, expected a finite number or a text.")


def evaluation_table(results: Sequence[EvalResult]) -> str:
    """The results as a table of the card."""
    rows = []
    for result in results:
        parts = ", ".join(part for part in (result.dataset_config, result.dataset_split) if part)
        data = f"{result.dataset_name} ({parts})" if parts else result.dataset_name
        value = result.metric_value
        shown = f"{value:.6g}" if isinstance(value, float) else value
        source = f"[{result.source_name or result.source_url}]({result.source_url})" if result.source_url else ""
        rows.append(
            [
                plain(cell)
                for cell in (
                    result.task_name or result.task_type,
                    data,
                    result.metric_name or result.metric_type,
                    shown,
                    source,
                )
            ]
        )
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    return table(rows, ["task", "data set", "metric", "value", "source"][: len(rows[0])])
