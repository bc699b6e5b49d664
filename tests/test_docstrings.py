from __future__ import annotations

from sqcompile.docstrings import Docstring, attribute_docs


class Documented:
    """Fold one thing into
    another.

    Why it exists, over
    two lines.

    A second paragraph: with a colon.

    Shapes: x [N, C];
        y [N].
    Rewrites:
        a(b)  ==>  c;
        d  ==>  e.
    Attributes:
        share: The share,
            of one.
        kind (str): The kind.
    """

    share: float = 1.0
    kind: str = ""
    other: int = 0
    """Documented below
    the field."""
    bare: int = 0


def test_takes_a_docstring_apart() -> None:
    doc = Docstring.of(Documented)
    assert doc.summary == "Fold one thing into another."
    assert doc.paragraphs() == ["Why it exists, over two lines.", "A second paragraph: with a colon."]
    assert doc.sections["Shapes"] == "x [N, C];\ny [N]."
    assert doc.sections["Rewrites"] == "a(b)  ==>  c;\nd  ==>  e."
    assert doc.entries("Attributes") == {"share": "The share, of one.", "kind": "The kind."}


def test_reads_the_texts_below_fields() -> None:
    assert attribute_docs(Documented) == {"other": "Documented below the field."}


def test_without_a_docstring_everything_is_empty() -> None:
    class Child(Documented):
        pass

    doc = Docstring.of(Child)  # not its parent's
    assert (doc.summary, doc.body, doc.sections) == ("", "", {})
    assert attribute_docs(int) == {}
