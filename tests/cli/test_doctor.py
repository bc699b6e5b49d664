from __future__ import annotations

import pytest

from sqcompile import diagnosis
from sqcompile.backend import backend_names
from sqcompile.errors import BackendError


def test_runs_every_backend(run) -> None:
    about = run("doctor", "--json").json
    assert about["healthy"] is True
    assert [state["name"] for state in about["backends"]] == backend_names()
    facts = {state["name"]: state["facts"] for state in about["backends"]}
    assert (
        facts["onnxruntime"]["onnxruntime"] and facts["reference"]["torch"] == about["environment"]["torch"]
    )
    assert {"instruction set", "threads", "kernels chosen by"} <= set(facts["native"])
    result = run("doctor")
    assert result.code == 0 and "native: works" in result.out


def test_names_what_is_broken(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise BackendError(f"The {name} backend cannot be loaded.", seen="no such file", next_step="mend it")

    monkeypatch.setattr("sqcompile.api.get_backend", broken)
    result = run("doctor")
    assert result.code == 1
    assert "native: does not work" in result.out and "mend it" in result.out
    assert "Traceback" not in result.out + result.err


def test_a_backend_that_gives_wrong_numbers(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_TOLERANCE", 0.0)
    result = run("doctor", "--json")
    assert result.code == 1
    assert "wrong numbers" in result.json["backends"][0]["problem"]


def test_says_what_is_missed_without_a_package(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(diagnosis._OPTIONAL, "no-such-package", "flying: pip install wings")
    about = run("doctor", "--json").json
    assert about["packages"]["no-such-package"] == "not installed (flying: pip install wings)"
