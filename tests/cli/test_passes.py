from __future__ import annotations


def test_lists_passes_by_job_with_a_summary_each(run) -> None:
    result = run("passes")
    assert result.code == 0
    lines = result.out.splitlines()
    headings = [line.partition(":")[0] for line in lines if line and not line.startswith(" ")]
    assert headings.index("Canonicalize") < headings.index("Quantize")
    (line,) = [line for line in lines if line.startswith("  fold-batch-norm ")]
    assert "batch norm" in line.removeprefix("  fold-batch-norm")


def test_every_pass_and_option_is_documented(run) -> None:
    undocumented = []
    for entry in run("passes", "--json").json:
        if entry["job"] == "yours":  # other tests define passes
            continue
        about = run("passes", entry["name"], "--json").json
        if not about["summary"].endswith("."):
            undocumented.append(entry["name"])
        undocumented += [
            f"{entry['name']}{{{option['name']}}}" for option in about["options"] if not option["doc"]
        ]
    assert undocumented == []


def test_shows_one_pass_with_its_options(run) -> None:
    result = run("passes", "quantize-weights")
    assert result.code == 0
    assert "Format of weights" in result.out
    assert "minmax or mse" in result.out
    assert "  InputError if a weight" in result.out


def test_understands_class_names_and_underscores(run) -> None:
    by_name = run("passes", "quantize-weights", "--json").json
    assert run("passes", "QuantizeWeights", "--json").json == by_name
    assert run("passes", "quantize_weights", "--json").json == by_name


def test_an_unknown_name_offers_the_nearest(run) -> None:
    result = run("passes", "quantise-weights")
    assert result.code == 2
    assert "did you mean 'quantize-weights'" in result.err
    assert result.out == ""
