"""From a head's probabilities to what /v1/classify answers. Knows labels, nothing of the engine."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.pooling_schemas import Classified, ClassifiedToken, Entity

#: The class of tokens that are part of nothing.
_OUTSIDE = "O"


def classified_text(
    index: int, values: list[float], labels: Sequence[str], problem_type: str | None
) -> Classified:
    """values: `[labels]`, probabilities, or a regression's numbers."""
    count = len(values)
    if problem_type == "regression":
        return Classified(index=index, values=values, num_classes=count)
    likeliest = max(range(count), key=values.__getitem__)
    chosen = None
    if problem_type == "multi_label_classification":
        chosen = [label for label, p in zip(labels, values, strict=True) if p >= 0.5]
    return Classified(
        index=index, label=labels[likeliest], labels=chosen, probs=values, num_classes=count
    )


def classified_tokens(
    index: int, tokens: Sequence[ClassifiedToken], text: str | None, num_classes: int
) -> Classified:
    """tokens: of the text's own. text: what they are joined to entities of; None: they are not."""
    if text is None:
        return Classified(index=index, tokens=list(tokens), num_classes=num_classes)
    return Classified(index=index, entities=_entities(tokens, text), num_classes=num_classes)


def _entities(tokens: Sequence[ClassifiedToken], text: str) -> list[Entity]:
    """As transformers' pipeline under aggregation_strategy="simple": tokens that follow each other
    and have one class but for a B- or I- before it; B- begins another."""
    groups: list[list[ClassifiedToken]] = []
    for token in tokens:
        begins = token.label.startswith("B-")
        if groups and not begins and _kind(groups[-1][-1].label) == _kind(token.label):
            groups[-1].append(token)
        else:
            groups.append([token])
    entities = []
    for group in groups:
        start, end = group[0].start, group[-1].end
        assert start is not None
        assert end is not None
        if (kind := _kind(group[0].label)) != _OUTSIDE:
            score = sum(token.score for token in group) / len(group)
            entities.append(
                Entity(text=text[start:end], start=start, end=end, label=kind, score=score)
            )
    return entities


def _kind(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


__all__ = ["classified_text", "classified_tokens"]
