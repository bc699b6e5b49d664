"""Compressing part by part: the same as in one piece, in bounded memory, and not lost in a crash."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sqcompile
from sqcompile.errors import Error, FileError, MemoryLimitError, SelectionError
from sqcompile.passes import ApplyMasks, MaskWeights, RemoveLayers, SparseGPT, Wanda, pipelines
from sqcompile.pipeline import Pass
from sqcompile.program import Program
from sqcompile.streaming import memory

Batches = list[dict[str, Tensor]]


def compiled(model: Any, passes: Any, batches: Batches | None, **options: Any) -> sqcompile.Compiled:
    result = sqcompile.compile(model, passes, calibration=batches, backend="reference", **options)
    assert isinstance(result, sqcompile.Compiled)
    return result


def tensors(result: sqcompile.Compiled) -> dict[str, Tensor]:
    return dict(result.program.tensors())


def equal(left: sqcompile.Compiled, right: sqcompile.Compiled) -> bool:
    mine, other = tensors(left), tensors(right)
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.pt2"))}


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda: SparseGPT(sparsity=0.5, exclude=("lm_head",)), id="sparse-gpt"),
        pytest.param(lambda: SparseGPT(sparsity=0.5, refit=True, exclude=("lm_head",)), id="refit"),
        pytest.param(lambda: Wanda(pattern="2:4", exclude=("lm_head",)), id="wanda"),
        pytest.param(lambda: MaskWeights(sparsity=0.5, exclude=("lm_head",)), id="magnitude"),
    ],
)
def test_is_what_one_piece_would_be(
    choose: Callable[[], Pass], traced: Program, batches: Batches, tmp_path: Path
) -> None:
    passes = [choose(), ApplyMasks()]
    whole = compiled(traced, passes, batches)
    parts = compiled(traced, passes, batches, work_dir=tmp_path / "work")
    assert equal(whole, parts)
    assert whole.report.size == parts.report.size and whole.report.original == parts.report.original
    assert [record.changes for record in whole.report.passes] == [
        record.changes for record in parts.report.passes
    ]
    tokens = batches[0]["input_ids"]
    assert torch.equal(whole(input_ids=tokens).logits, parts(input_ids=tokens).logits)


def test_rounding_to_codes_is_what_one_piece_would_be(
    llama: Path, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    whole = compiled(llama, passes, batches)
    parts = compiled(llama, passes, batches, work_dir=tmp_path / "work")
    codes = [name for name in tensors(whole) if name.endswith("_codes")]
    assert len(codes) == 7 * 3
    assert all(torch.equal(tensors(whole)[name], tensors(parts)[name]) for name in codes)
    assert any("compressed in 5 parts" in note for note in parts.report.notes)
    before, after = whole.report.output_distance, parts.report.output_distance
    # Only the order of sums may differ: constants are folded in one of them.
    assert (
        before is not None and after is not None and after.sqnr_db == pytest.approx(before.sqnr_db, abs=1e-3)
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A child of a process whose operators run on threads of OpenMP would wait for them forever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_was_killed_goes_on_and_gives_the_same(
    traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    wanted = compiled(traced, passes, batches, work_dir=tmp_path / "whole")
    folder = tmp_path / "killed"
    finished = []
    for place in (2, 9, 10, 17, 5):
        run_until_killed(place, traced, passes, batches, folder)
        finished.append(len(list(folder.glob("part-*.json"))))
    # Each run got further than the one before: 7 passes a part, so that 9 are one part and two passes.
    assert finished == [0, 1, 2, 4, 4]
    found = compiled(traced, passes, batches, work_dir=folder)
    assert equal(wanted, found)
    assert contents(folder) == contents(tmp_path / "whole")
    assert not (folder / "values").exists()


def run_until_killed(place: int, model: Program, passes: list[Pass], batches: Batches, folder: Path) -> None:
    """Run in a child that is killed as `kill -9` does, after some passes."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill(item: Pass, before: Program, after: Program) -> None:
            nonlocal count
            count += 1
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            compiled(model, passes, batches, work_dir=folder, instruments=[kill])
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_a_finished_job_does_nothing_again(
    traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    first = compiled(traced, passes, batches, work_dir=tmp_path)
    calls: list[str] = []
    second = compiled(
        traced, passes, batches, work_dir=tmp_path, instruments=[lambda item, *_: calls.append(item.name)]
    )
    assert not calls and equal(first, second)
    assert [record.text for record in second.report.passes] == [str(item) for item in passes]


@pytest.mark.parametrize("change", ["passes", "data", "seed"])
def test_the_folder_of_another_job_is_refused(
    change: str, traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    compiled(traced, passes, batches, work_dir=tmp_path)
    before = contents(tmp_path)
    options: dict[str, Any] = {"passes": passes, "batches": batches, "seed": 0}
    options |= {"passes": [MaskWeights(sparsity=0.5)]} if change == "passes" else {}
    options |= {"batches": batches[:2]} if change == "data" else {}
    options |= {"seed": 1} if change == "seed" else {}
    with pytest.raises(FileError, match="belongs to another job") as caught:
        compiled(traced, work_dir=tmp_path, **options)
    assert f"{change}: " in str(caught.value) and "nothing in it was changed" in str(caught.value)
    assert contents(tmp_path) == before


def test_a_folder_with_parts_of_nobody_knows_what_is_refused(
    traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    (tmp_path / "part-000.pt2").write_bytes(b"precious")
    with pytest.raises(FileError, match="nothing says of which"):
        compiled(traced, passes, batches, work_dir=tmp_path)
    assert (tmp_path / "part-000.pt2").read_bytes() == b"precious"
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(FileError, match="describes no job"):
        compiled(traced, passes, batches, work_dir=tmp_path)


def test_a_full_disk_loses_nothing(
    traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from sqcompile.streaming import values

    wanted = compiled(traced, passes, batches, work_dir=tmp_path / "whole")
    write, written = values.write_tensors, []

    def fill(path: Path, tensors: Any) -> None:
        written.append(path)
        if len(written) > 40:
            path.write_bytes(b"cut o")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    monkeypatch.setattr(values, "write_tensors", fill)
    with pytest.raises(FileError, match="cannot be written") as caught:
        compiled(traced, passes, batches, work_dir=tmp_path / "full")
    assert "free some room" in str(caught.value)
    done = contents(tmp_path / "full")
    assert done
    monkeypatch.undo()
    found = compiled(traced, passes, batches, work_dir=tmp_path / "full")
    assert equal(wanted, found)
    again = contents(tmp_path / "full")
    assert all(again[name] == done[name] for name in done)


def test_memory_that_is_too_little_is_refused_before_any_work(
    traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    with pytest.raises(MemoryLimitError, match="too little") as caught:
        compiled(traced, passes, batches, work_dir=tmp_path, max_memory="50MB")
    assert "allow max_memory='" in str(caught.value)
    assert not list(tmp_path.glob("part-*"))
    enough = memory.resident_bytes() + 500_000_000
    compiled(traced, passes, batches, work_dir=tmp_path, max_memory=enough)


def test_a_peak_above_the_cap_is_an_error_and_loses_nothing(
    traced: Program, batches: Batches, passes: list[Pass], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = compiled(traced, passes, batches, work_dir=tmp_path / "whole")
    cap = memory.resident_bytes() + 10**9
    peaks = iter([cap // 2, cap, cap + 3 * 10**7])
    monkeypatch.setattr(memory, "peak_bytes", lambda: next(peaks))
    with pytest.raises(MemoryLimitError, match="too little") as caught:
        compiled(traced, passes, batches, work_dir=tmp_path / "work", max_memory=cap)
    text = str(caught.value)
    assert f"a peak of {(cap + 3 * 10**7) / 1e9:.2f}GB" in text and "part 'model.layers.1'" in text
    assert "parts that are done stay done" in text
    done = contents(tmp_path / "work")
    assert len(done) == 3
    monkeypatch.undo()
    found = compiled(traced, passes, batches, work_dir=tmp_path / "work", max_memory=4 * cap)
    assert equal(wanted, found) and done.items() <= contents(tmp_path / "work").items()


def test_patterns_that_match_nothing_in_the_whole_model_are_refused(
    traced: Program, batches: Batches, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError, match=r"layers\.7"):
        compiled(traced, [MaskWeights(sparsity=0.5, layers=("model.layers.7",))], batches, work_dir=tmp_path)
    found = compiled(
        traced,
        [MaskWeights(sparsity=0.5, layers=("model.layers.1",)), ApplyMasks()],
        batches,
        work_dir=tmp_path,
    )
    assert {name for name, tensor in tensors(found).items() if (tensor == 0).float().mean() > 0.4} == {
        f"model.layers.1.{name}.weight"
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{word}_proj" for word in ("gate", "up", "down")),
        )
    }


def test_a_pass_over_the_whole_model_is_run_on_the_whole_model(
    traced: Program, batches: Batches, tmp_path: Path
) -> None:
    found = compiled(
        traced, [*pipelines.canonical(), RemoveLayers(blocks=("model.layers.1",))], batches, work_dir=tmp_path
    )
    assert not list(tmp_path.glob("part-*")) and not any("parts" in note for note in found.report.notes)


def test_works_without_data(traced: Program, tmp_path: Path) -> None:
    tokens = torch.arange(16)[None]
    options: dict[str, Any] = {"example_inputs": {"input_ids": tokens}}
    passes = pipelines.weight_only(bits=4, group_size=16)
    whole = compiled(traced, passes, None, **options)
    parts = compiled(traced, passes, None, **options, work_dir=tmp_path)
    assert torch.equal(whole(input_ids=tokens).logits, parts(input_ids=tokens).logits)
    assert whole.report.size.size_bytes >= parts.report.size.size_bytes  # tied codes are stored once


def test_a_model_in_memory_goes_the_same_way(llama: Path, batches: Batches, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model.config.use_cache = False
    passes = [Wanda(sparsity=0.5, exclude=("lm_head",)), ApplyMasks()]
    kept = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    parts = compiled(model, passes, batches, work_dir=tmp_path)
    assert equal(compiled(model, passes, batches), parts)
    assert torch.equal(kept, model.model.layers[0].mlp.up_proj.weight)


def test_the_dense_program_is_loaded_when_it_is_asked_for(
    llama: Path, batches: Batches, tmp_path: Path
) -> None:
    passes = [MaskWeights(sparsity=0.5, exclude=("lm_head",)), ApplyMasks()]
    parts = compiled(llama, passes, batches, work_dir=tmp_path)
    whole = compiled(llama, passes, batches)
    tokens = batches[0]["input_ids"]
    assert torch.equal(parts.original(input_ids=tokens).logits, whole.original(input_ids=tokens).logits)


def test_a_folder_that_lacks_weights_is_refused(
    llama: Path, batches: Batches, passes: list[Pass], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(Error) as caught:
        compiled(folder, passes, batches, work_dir=tmp_path / "work")
    assert str(shard) in str(caught.value) and "ends 10 bytes too early" in str(caught.value)
    shard.unlink()
    with pytest.raises(FileError, match=shard.name):
        compiled(folder, passes, batches, work_dir=tmp_path / "work")


def test_an_encoder_goes_the_same_way(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokens = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.ones_like(tokens)
    padded[1:, 4:] = 0
    data = [
        {"input_ids": rows, "attention_mask": mask}
        for rows, mask in zip(tokens.split(2), padded.split(2), strict=True)
    ]
    passes = [*pipelines.canonical(), SparseGPT(sparsity=0.5), ApplyMasks()]
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in data[0]}
    whole = compiled(tmp_path / "bert", passes, data, dynamic_shapes=shapes)
    parts = compiled(tmp_path / "bert", passes, data, dynamic_shapes=shapes, work_dir=tmp_path / "work")
    wanted, found = (result(**data[0]).last_hidden_state for result in (whole, parts))
    torch.testing.assert_close(found, wanted)  # constants are folded in one of them: other orders of sums
    assert len(list((tmp_path / "work").glob("part-*.pt2"))) == 4
