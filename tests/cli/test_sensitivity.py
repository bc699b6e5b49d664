from __future__ import annotations

from pathlib import Path

FORMATS = ("-f", "int2:channel=0", "-f", "int8:channel=0", "-f", "int8:channel=0+50%")


def test_measures_each_format_on_each_layer(run, folder: Path) -> None:
    about = run("sensitivity", "net.py:make", "-d", "x.npz", *FORMATS, "--json").json
    assert about["formats"] == list(FORMATS[1::2]) and about["measure"] == "fisher"
    (layer,) = about["layers"]
    assert (layer["name"], layer["weights"]) == ("fc", 80)
    two, eight, sparse = layer["losses"]
    assert two > 100 * eight and sparse > 10 * eight
    assert any("conv" in line for line in about["left_out"])
    shown = run("sensitivity", "net.py:make", "-d", "x.npz", *FORMATS, "--measure", "divergence")
    assert shown.code == 0 and "Loss of the outputs (divergence)" in shown.out and "◀" in shown.out


def test_mistakes(run, folder: Path) -> None:
    for arguments, said in (
        ((), "give a file with --data"),
        (("-d", "x.npz", "--measure", "fischer"), "did you mean 'fisher'?"),
        (("-d", "x.npz", "-f", "int5x"), "no number format is called 'int5x'"),
        (("-d", "x.npz", "-l", "fd"), "fc"),
    ):
        result = run("sensitivity", "net.py:make", *arguments)
        assert result.code != 0 and said in result.err, result.err
        assert "Traceback" not in result.err
