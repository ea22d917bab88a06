"""GLUE's tasks from local files, as their authors distribute them or as JSON lines."""

import csv
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from transformers.trainer_utils import EvalPrediction

from support import sentences


class Task(NamedTuple):
    """Where a task's files have what.

    Args:
        texts: columns of the one or two texts; of several names the first that a file has.
        label: column of the label, likewise.
        labels: the classes, in their order.
        tests: names of the files to test on, without their ending.
    """

    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    tests: tuple[str, ...] = ("dev", "validation")


YES = ("0", "1")
MNLI_TESTS = ("dev_matched", "dev_mismatched", "validation_matched", "validation_mismatched")

TASKS = {
    "sst2": Task((("sentence",),), ("label",), YES),
    "mrpc": Task(
        (("sentence1", "#1 String"), ("sentence2", "#2 String")), ("label", "Quality"), YES
    ),
    "qqp": Task((("question1",), ("question2",)), ("label", "is_duplicate"), YES),
    "mnli": Task(
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        ("label", "gold_label"),
        ("entailment", "neutral", "contradiction"),
        MNLI_TESTS,
    ),
    "qnli": Task((("question",), ("sentence",)), ("label",), ("entailment", "not_entailment")),
}

Example = dict[str, Any]
"""`text`, in some tasks `text_pair`, and `label`."""


def load(name: str, folder: Path) -> tuple[list[Example], dict[str, list[Example]]]:
    """Examples to train on, and by the names of their files those to test on.

    Args:
        name: of the task.
        folder: with train and dev files that end in .tsv, .jsonl or .json.

    Raises:
        SystemExit: a file or a column is missing.
    """
    task = TASKS[name]
    tests = {test: path for test in task.tests if (path := _find(folder, test)) is not None}
    train = _find(folder, "train")
    if train is None or not tests:
        raise SystemExit(f"{folder} holds no train and {' or '.join(task.tests)} as .tsv or .jsonl")
    return _read(train, task), {test: _read(path, task) for test, path in tests.items()}


def movie_reviews(path: Path | None, tests: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """A stand-in for SST-2: movie reviews rated above zero, or not (sentences.py)."""
    rated = [{"text": text, "label": label} for text, label in sentences.load(path)]
    random.Random(0).shuffle(rated)
    return rated[tests:], {"reviews": rated[:tests]}


def encode(examples: list[Example], tokenizer: Any, max_length: int) -> Any:
    """The examples as Trainer takes them."""
    return [
        tokenizer(e["text"], e.get("text_pair"), truncation=True, max_length=max_length)
        | {"labels": e["label"]}
        for e in examples
    ]


def measures(predicted: EvalPrediction) -> dict[str, float]:
    """Accuracy and F1 in percent; F1 of the second class where there are two, else their mean."""
    given = predicted.predictions
    logits = torch.as_tensor(given[0] if isinstance(given, tuple) else given)
    labels, classes = torch.as_tensor(predicted.label_ids), logits.shape[1]
    f1 = multiclass_f1_score(logits, labels, classes, average="none")
    accuracy = multiclass_accuracy(logits, labels, classes, average="micro")
    f1 = f1[1] if classes == 2 else f1.mean()
    return {"accuracy": 100 * accuracy.item(), "f1": 100 * f1.item()}


def _find(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{ending}" for ending in (".tsv", ".jsonl", ".json"))
    return next((path for path in paths if path.exists()), None)


def _read(path: Path, task: Task) -> list[Example]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".tsv":
            rows: list[Any] = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            rows = [json.loads(line) for line in file]
    examples = []
    for row in rows:
        texts = [_column(path, row, names) for names in task.texts]
        label = _column(path, row, task.label)
        if label in task.labels:  # MNLI has "-" where its annotators did not agree
            label = task.labels.index(label)
        elif not isinstance(label, int) or label < 0:
            continue
        pair = {"text_pair": texts[1]} if len(texts) == 2 else {}
        examples.append({"text": texts[0], "label": label} | pair)
    return examples


def _column(path: Path, row: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = [row[name] for name in names if row.get(name) is not None]
    if not found:
        raise SystemExit(f"{path} has a line without {' or '.join(names)}, among {list(row)}.")
    return found[0]
