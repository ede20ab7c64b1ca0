import pytest

from tokjax.data.prompts import GENERAL, TEMPLATES, expand


def test_every_class_in_every_sentence():
    got = expand(["cat", "{odd} name"], ["a {}.", "{} here"])
    assert got == [["a cat.", "cat here"], ["a {odd} name.", "{odd} name here"]]


def test_the_lists_are_sound():
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)
        assert [len(row) for row in expand(["dog", "cat"], templates)] == [len(templates)] * 2
    assert len(GENERAL) == 7


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "class_names must be one or more strings"),
        ("cat", ["{}"], "class_names must be one or more strings, got 'cat'"),
        (["cat"], [], "templates must be"),
        (["cat"], "{}", "templates must be"),
        (["cat"], ["a {}", "a cat"], "one {} for the name of the class, got 'a cat'"),
        (["cat"], ["{} and {}"], "one {}"),
    ],
)
def test_wrong_arguments(names, templates, message):
    with pytest.raises(ValueError, match=message):
        expand(names, templates)
