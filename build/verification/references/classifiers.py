"""Classifiers of several labels, by transformers' pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from build.verification.references.loading import FP32, Classifier, Expected, check_class, package, pretrained


def classifier(checkpoint: str, max_tokens: int) -> Classifier:
    """The classifier in the folder or of the Hub's name `checkpoint`: its labels' probabilities, in order."""
    check_class(checkpoint, "AutoModelForSequenceClassification")
    model = pretrained("AutoModelForSequenceClassification", checkpoint, **FP32)
    tokenizer = pretrained("AutoTokenizer", checkpoint)
    pipeline = package("transformers").pipeline(
        "text-classification", model=model, tokenizer=tokenizer, top_k=None
    )
    cut = {"truncation": True, "max_length": max_tokens}
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]

    def classify(inputs: Sequence[tuple[str, ...]]) -> Expected:
        fed = [tokenizer(*texts, **cut) for texts in inputs]
        # One at a time, so that none is padded.
        found = [pipeline([dict(zip(("text", "text_pair"), one, strict=False))], **cut)[0] for one in inputs]
        rows = [{one["label"]: one["score"] for one in row} for row in found]
        values = np.array([[row[label] for label in labels] for row in rows], np.float32)
        types = [one["token_type_ids"] for one in fed] if "token_type_ids" in fed[0] else None
        return Expected(values, [one["input_ids"] for one in fed], types)

    return classify
