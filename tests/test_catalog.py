from __future__ import annotations

import pytest

from sqcompile.catalog import JOBS, PIPELINES, YOURS, catalog, find_entry
from sqcompile.errors import PassOptionError, RecipeError
from sqcompile.passes import pipelines
from sqcompile.pipeline import Pass, parse_pass, parse_pipeline, pipeline_text
from sqcompile.recipe import Recipe


def test_every_pass_and_pipeline_is_in_it_once() -> None:
    entries = catalog()
    names = [(entry.job == PIPELINES, entry.name) for entry in entries]
    assert len(set(names)) == len(names)
    assert {entry.name for entry in entries if entry.job == PIPELINES} == {
        name.replace("_", "-") for name in pipelines.PIPELINES
    }
    assert [entry.job for entry in entries] == sorted((entry.job for entry in entries), key=list(JOBS).index)


def test_ours_have_a_job_and_yours_are_apart() -> None:
    assert find_entry("fold-batch-norm").job == "canonicalize"
    assert {entry.home.split(".")[2] for entry in catalog() if entry.job not in (YOURS, PIPELINES)} <= set(
        JOBS
    )


@pytest.mark.parametrize("name", ["int8-static", "int8_static"])
def test_a_named_pipeline_stands_for_its_passes(name: str) -> None:
    expected = pipeline_text(pipelines.int8_static())
    assert pipeline_text(parse_pipeline(name)) == expected
    assert pipeline_text(Recipe.parse(f"passes: [{name}]").passes) == expected


def test_a_named_pipeline_takes_options_and_stands_among_passes() -> None:
    passes = parse_pipeline("remove-noops,weight-only{bits=8,group-size=16,exclude=[fc]},fold-qdq")
    assert pipeline_text(passes) == ",".join(
        [
            "remove-noops",
            pipeline_text(pipelines.weight_only(bits=8, group_size=16, exclude=("fc",))),
            "fold-qdq",
        ]
    )


def test_the_text_of_a_named_pipeline_is_that_of_its_passes() -> None:
    for entry in catalog():
        if entry.job == PIPELINES:
            assert pipeline_text(parse_pipeline(entry.facts["passes"])) == entry.facts["passes"].replace(
                ", ", ","
            )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("int8-static{sparsty=0.5}", ["Pipeline int8-static has no option 'sparsty'", "'sparsity'"]),
        ("int8-static{sparsity=much}", ["'sparsity' of pipeline int8-static", "float or none"]),
        ("weight-only{bits=9}", ["Pipeline weight-only does not take these options", "bits=9", "2 to 8"]),
        ("int8-dynamic{pattern=2:4,sparsity=0.9}", ["int8-dynamic", "sparsity=0.9"]),
    ],
)
def test_wrong_options_of_a_pipeline_are_named(text: str, parts: list[str]) -> None:
    with pytest.raises(PassOptionError) as caught:
        parse_pipeline(text)
    for part in parts:
        assert part in str(caught.value)


def test_a_pipeline_is_no_single_pass() -> None:
    with pytest.raises(RecipeError, match="pipeline of several passes"):
        parse_pass("int8-static")
    with pytest.raises(RecipeError, match="pipeline of several passes"):
        Pass.parse("int8-static")


def test_an_unknown_name_offers_passes_and_pipelines() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_pipeline("int8-statc")
    assert "'int8-static'" in str(caught.value)
    with pytest.raises(RecipeError, match="no pass or pipeline 'nope'"):
        find_entry("nope")
