"""Pipelines as text: everything that a pass can be asked for survives being written and read."""

from __future__ import annotations

import math
import string
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqcompile.errors import Error, PassOptionError, RecipeError
from sqcompile.pipeline import (
    Pass,
    PassContext,
    PassResult,
    make_pass,
    parse_pass,
    parse_pipeline,
    pipeline_text,
    registry,
)
from sqcompile.pipeline.text import coerce, find_pass, parse_value, type_text, value_text
from sqcompile.program import Program
from sqcompile.quantization import Format, HistogramMSE, MinMax, Observer, Percentile
from sqcompile.sparsity import Pattern


class Colour(Enum):
    RED = "red"
    DARK_BLUE = "dark blue"


class TextProbe(Pass, register=False):
    """Has an option of every type that options may have."""

    number: float = 0.5
    count: int = 3
    flag: bool = False
    word: str = "word"
    maybe: float | None = None
    mode: Literal["fast", "slow", 3] = "fast"
    pattern: Pattern = Pattern()
    format: Format = Format()
    best_format: Format | None = None
    observer: Observer = MinMax()
    colour: Colour = Colour.RED
    folder: Path | None = None
    layers: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    range: tuple[float, float] = (0.0, 1.0)
    formats: tuple[tuple[str, Format], ...] = ()
    ratios: tuple[tuple[str, float | None], ...] = ()
    grid: tuple[tuple[int, int], ...] = ()
    nested: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    either: int | float | str | None = None
    anything: Any = None

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqcompile.pipeline import contract

    monkeypatch.setitem(contract._REGISTRY, "text-probe", TextProbe)


# Names as modules have them, and everything that the grammar itself uses.
texts = st.text(
    st.sampled_from(string.ascii_letters + string.digits + "._*-:,;{}[]()=\"'\\ \t\n|é+"), max_size=12
)
numbers = st.floats(allow_nan=False) | st.sampled_from([1e-5, 0.1, 1 / 3, 5e-324, 1e308])
formats = st.builds(
    Format.parse,
    st.sampled_from(
        [
            "int8",
            "uint8:affine",
            "int4:group=32",
            "int8:channel=0",
            "uint4:group=16@0:affine:narrow",
            "int8:token:dynamic",
        ]
    ),
)
patterns = st.builds(Pattern.parse, st.sampled_from(["unstructured", "2:4", "4:8", "1x4", "16x4"]))
observers = st.sampled_from(
    [MinMax(), Percentile(), Percentile(percentile=99.9, bins=512), HistogramMSE(bins=64)]
)


def table(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(texts, values, max_size=3).map(lambda items: tuple(items.items()))


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "number": numbers,
    "count": st.integers(),
    "flag": st.booleans(),
    "word": texts,
    "maybe": st.none() | numbers,
    "mode": st.sampled_from(["fast", "slow", 3]),
    "pattern": patterns,
    "format": formats,
    "best_format": st.none() | formats,
    "observer": observers,
    "colour": st.sampled_from(Colour),
    "folder": st.none() | texts.filter(lambda text: "\0" not in text).map(Path),
    "layers": st.lists(texts, max_size=3).map(tuple),
    "sizes": st.lists(st.integers(), max_size=3).map(tuple),
    "range": st.tuples(numbers, numbers),
    "formats": table(formats),
    "ratios": table(st.none() | numbers),
    "grid": st.lists(st.tuples(st.integers(), st.integers()), max_size=3).map(tuple),
    "nested": table(table(texts)),
    "either": st.none() | st.integers() | numbers | texts,
}


class TestRoundTrip:
    @settings(deadline=None)
    @given(st.fixed_dictionaries({}, optional=OPTIONS))
    @example({"word": "\\"})
    @example({"word": '\\"'})
    @example({"word": ""})
    @example({"word": "true"})
    @example({"word": "0.10"})
    @example({"layers": ("", " a", "re:layer\\.\\d+", "1_0", "007", "1.10")})
    @example({"formats": (("re:blocks\\.[0-9]+$", Format.parse("int8:channel=0")), ("a:b", Format()))})
    @example({"layers": ("a,b", "c]", "{")})
    @example({"ratios": (("x", None), ("none", 1.0))})
    @example({"grid": ((1, 2), (1, 2))})
    @example({"folder": Path("0.10")})
    @example({"folder": Path("a,b}")})
    @example({"either": "3"})
    @example({"either": 3.0})
    def test_one_pass(self, options: dict[str, Any]) -> None:
        item = TextProbe(**options)
        again = parse_pass(str(item))
        assert again == item
        for name in options:
            assert type(getattr(again, name)) is type(getattr(item, name)), name

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.fixed_dictionaries({}, optional=OPTIONS), max_size=3))
    def test_pipelines(self, options: list[dict[str, Any]]) -> None:
        passes = [TextProbe(**item) for item in options]
        assert parse_pipeline(pipeline_text(passes)) == passes

    @settings(deadline=None)
    @given(texts)
    def test_values(self, text: str) -> None:
        assert parse_value(value_text(text)) == text
        assert parse_value(value_text([text, text])) == [text, text]
        assert parse_value(value_text(((text, text),))) == {text: text}

    def test_numbers_that_are_no_numbers(self) -> None:
        for value in (math.inf, -math.inf):
            assert parse_pass(str(TextProbe(number=value))).number == value  # type: ignore[attr-defined]
        assert math.isnan(parse_pass(str(TextProbe(number=math.nan))).number)  # type: ignore[attr-defined]


class TestText:
    def test_defaults_are_left_out(self) -> None:
        assert str(TextProbe()) == "text-probe"
        assert str(TextProbe(number=0.5, layers=())) == "text-probe"

    def test_reads_well(self) -> None:
        item = TextProbe(
            number=0.25,
            pattern=Pattern.parse("2:4"),
            best_format=Format.parse("int4:group=32"),
            observer=Percentile(percentile=99.9),
            layers=("layer1.*", "fc"),
            formats=(("fc", Format.parse("int8:channel=0")), ("re:h.*", Format())),
        )
        assert str(item) == (
            "text-probe{number=0.25,pattern=2:4,best-format=int4:group=32,"
            "observer=percentile{percentile=99.9,bins=2048},layers=[layer1.*,fc],"
            'formats={fc:int8:channel=0,"re:h.*":int8}}'
        )
        assert parse_pass(str(item)) == item

    def test_spaces_and_lines_do_not_count(self) -> None:
        spread = """
            text-probe { number = 0.25 , layers = [ a ,
                b, ] , ratios = { x : 1 , y : none } } ,
            text-probe,
        """
        first, second = parse_pipeline(spread)
        assert first == TextProbe(number=0.25, layers=("a", "b"), ratios=(("x", 1.0), ("y", None)))
        assert second == TextProbe()

    def test_one_value_stands_for_a_list_of_one(self) -> None:
        assert parse_pass("text-probe{layers=fc}") == TextProbe(layers=("fc",))

    def test_names_that_look_like_numbers_stay_names(self) -> None:
        item = parse_pass("text-probe{layers=[0.10,007,1_0,1e3,3],ratios={0.10:1}}")
        assert item == TextProbe(layers=("0.10", "007", "1_0", "1e3", "3"), ratios=(("0.10", 1.0),))

    def test_underscores_and_class_names_are_understood(self) -> None:
        for name in ("text-probe", "text_probe", "TextProbe", " text-probe "):
            assert find_pass(name) is TextProbe
        assert parse_pass("text_probe{best_format=int8}") == TextProbe(best_format=Format())

    def test_passes_read_their_own_text(self) -> None:
        assert Pass.parse("text-probe{count=4}") == TextProbe(count=4)

    def test_every_pass_of_ours_is_known_and_round_trips(self) -> None:
        for name, kind in registry().items():
            assert find_pass(name) is kind
            try:
                item = kind()
            except (TypeError, PassOptionError):
                continue  # has an option without default
            assert parse_pass(str(item)) == item


def refused(text: str, kind: type[Error]) -> Error:
    with pytest.raises(kind) as caught:
        parse_pipeline(text)
    error = caught.value
    assert type(error) is kind
    assert error.what and error.seen and error.expected and error.next_step
    return error


class TestMistakes:
    def test_unknown_pass(self) -> None:
        error = refused("text-prob{count=4}", RecipeError)
        assert "'text-prob'" in error.what and "'text-probe'" in str(error.next_step)

    def test_unknown_option(self) -> None:
        error = refused("text-probe{best-fromat=int8}", PassOptionError)
        assert "best-fromat" in error.what and "'best-format'" in str(error.next_step)
        assert error.where == "pass text-probe"

    @pytest.mark.parametrize(
        ("option", "expected"),
        [
            ("number=fast", "float"),
            ("number=true", "float"),
            ("number=none", "float"),
            ("count=0.5", "int"),
            ("count=true", "int"),
            ("count=[1]", "int"),
            ("flag=1", "bool"),
            ("flag=yes", "bool"),
            ("word=[a]", "str"),
            ("word=true", "str"),
            ("maybe=low", "float or none"),
            ("mode=quick", "fast or slow or 3"),
            ("mode=3.0", "fast or slow or 3"),
            ("colour=green", "red or dark blue"),
            ("folder=[a]", "Path or none"),
            ("sizes=[1,b]", "list of int"),
            ("range=[1]", "(float, float)"),
            ("range=[1,2,3]", "(float, float)"),
            ("ratios=[a]", "list of (str, float or none)"),
            ("ratios={a:low}", "list of (str, float or none)"),
            ("ratios={a:{b:1}}", "list of (str, float or none)"),
        ],
    )
    def test_wrong_type(self, option: str, expected: str) -> None:
        error = refused(f"text-probe{{{option}}}", PassOptionError)
        assert error.expected == expected
        assert option.partition("=")[0] in str(error.seen) and error.where == "pass text-probe"

    @pytest.mark.parametrize(
        "option", ["format=int9", "pattern=4:2", "observer=percentil", "formats={a:int9}"]
    )
    def test_values_with_a_text_of_their_own(self, option: str) -> None:
        error = refused(f"text-probe{{{option}}}", PassOptionError)
        assert option.partition("=")[0] in error.what

    @pytest.mark.parametrize(
        "text",
        [
            "text-probe{",
            "text-probe{count=4",
            "text-probe{count=4}}",
            "text-probe}",
            "text-probe{count=4}x",
            "text-probe{count}",
            "text-probe{layers=[a}",
            "text-probe{layers=[a,b}]",
            "text-probe{layers=[a,{b]}}",
            'text-probe{word="a}',
            'text-probe{word="a"b}',
            "text-probe{ratios={a}}",
            "text-probe{ratios={a:1,a:2}}",
            "text-probe{count=1,count=2}",
        ],
    )
    def test_syntax(self, text: str) -> None:
        refused(text, RecipeError)

    def test_floats_are_no_names(self) -> None:
        with pytest.raises(PassOptionError, match="layers") as caught:
            make_pass("text-probe", {"layers": [0.1]})
        assert "quotes" in str(caught.value.seen)

    def test_an_option_without_default_must_be_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sqcompile.pipeline import contract

        class NeedsCount(TextProbe, register=False):
            needed: int

        monkeypatch.setitem(contract._REGISTRY, "needs-count", NeedsCount)
        error = refused("needs-count{count=3}", PassOptionError)
        assert "needs the option 'needed'" in error.what
        assert str(NeedsCount(needed=0)) == "needs-count{needed=0}"

    def test_a_pass_that_rejects_its_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sqcompile.pipeline import contract

        class Picky(TextProbe, register=False):
            def __post_init__(self) -> None:
                if self.count < 0:
                    raise self.reject_option("count", "0 or more")
                if self.number < 0:
                    raise ValueError("numbers below zero")

        monkeypatch.setitem(contract._REGISTRY, "picky", Picky)
        error = refused("picky{count=-1}", PassOptionError)
        assert error.seen == "count=-1" and error.expected == "0 or more" and error.where == "pass picky"
        error = refused("picky{number=-1}", PassOptionError)
        assert "numbers below zero" in str(error.seen)


def test_coerce_says_what_cannot_be_read() -> None:
    with pytest.raises(TypeError, match="cannot be read from text"):
        coerce({}, dict[str, int])


def test_types_read_well() -> None:
    assert type_text(tuple[str, ...]) == "list of str"
    assert type_text(float | None) == "float or none"
    assert type_text(tuple[tuple[str, Format], ...]) == "list of (str, Format)"
