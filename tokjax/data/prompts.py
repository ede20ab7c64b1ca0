"""Sentences for zero-shot classification: a class is the mean of what several of them say (arXiv 2103.00020, 3.1.4)."""

from collections.abc import Sequence

# A handful of plain sentences brings most of what a long list does.
GENERAL = (
    "a photo of a {}.",
    "a blurry photo of the {}.",
    "a close-up of a {}.",
    "a photo of many {}.",
    "a drawing of a {}.",
    "a small {} in the distance.",
    "one {} and nothing else.",
)
# SigLIP was trained on sentences like this one and needs no ensemble.
SIGLIP = ("This is a photo of {}.",)
CLIP = GENERAL[:1]
TEMPLATES = {"clip": CLIP, "siglip": SIGLIP, "general": GENERAL, "name": ("{}",)}


def expand(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The sentences of each class.

    Args:
        class_names: at least one; put in as they are.
        templates: at least one, each with `{}` in the name's place.

    Returns:
        One list for each class, in the order of the templates.

    Raises:
        ValueError: no classes, no templates, a single string in place of several, or a template without exactly one
            `{}`.
    """
    for name, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str) or not values:
            raise ValueError(f"{name} must be one or more strings, got {values!r}")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"a template has one {{}} for the name of the class, got {wrong[0]!r}")
    return [[template.replace("{}", name) for template in templates] for name in class_names]
