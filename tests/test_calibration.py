"""Calibration data: every form that users have, read gently, and refused with batch and input."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.programs import TwoInputs, data, mlp
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sqcompile.calibration import Calibration, as_call, check_data
from sqcompile.errors import CalibrationError
from sqcompile.progress import BarProgress
from sqcompile.signature import Signature
from sqcompile.tracing import trace

SIGNATURE = mlp(dynamic=True).signature


def batches(count: int = 3) -> list[torch.Tensor]:
    return [data(2, 8, seed=seed) for seed in range(count)]


def read(given: Any, signature: Signature = SIGNATURE) -> list[list[Any]]:
    return list(Calibration(given, signature))


class TestForms:
    @pytest.mark.parametrize(
        "form",
        [
            lambda x: x,
            lambda x: x.numpy(),
            lambda x: (x,),
            lambda x: [x],
            lambda x: [x.numpy()],
            lambda x: {"x": x},
            lambda x: {"x": x.numpy()},
            lambda x: UserDict(x=x),  # as a tokenizer's result is
            lambda x: ((x,), {}),
            lambda x: ([], {"x": x}),
        ],
    )
    def test_of_a_batch(self, form: Callable[[torch.Tensor], Any]) -> None:
        found = read([form(x) for x in batches()])
        assert all(torch.equal(flat[0], x) for flat, x in zip(found, batches(), strict=True))

    @pytest.mark.parametrize("wrap", [list, tuple, iter, lambda items: (item for item in items)])
    def test_of_the_whole(self, wrap: Callable[[list[Any]], Any]) -> None:
        assert len(read(wrap(batches()))) == 3

    def test_a_generator_is_read_once_and_serves_every_pass(self) -> None:
        reads: list[int] = []

        def stream() -> Iterator[torch.Tensor]:
            for index, x in enumerate(batches()):
                reads.append(index)
                yield x

        calibration = Calibration(stream(), SIGNATURE)
        assert len(calibration) == 3 == len(list(calibration)) == len(list(calibration))
        assert torch.equal(calibration.first()[0], batches()[0])
        assert reads == [0, 1, 2]

    def test_a_loader_is_neither_copied_nor_started_early(self) -> None:
        started: list[int] = []

        class Loader(DataLoader):  # type: ignore[type-arg]
            def __iter__(self) -> Any:
                started.append(1)
                return super().__iter__()

        loader = Loader(TensorDataset(data(12, 8)), batch_size=4)
        calibration = Calibration(loader, SIGNATURE)
        assert len(calibration) == 3 and started == []  # no workers are started to look at it
        assert len(list(calibration)) == 3 and len(list(calibration)) == 3 and len(started) == 2
        assert calibration._batches is loader

    def test_a_loader_over_a_stream(self) -> None:
        class Stream(IterableDataset):  # type: ignore[type-arg]
            def __iter__(self) -> Iterator[torch.Tensor]:
                yield from data(6, 8)

        calibration = Calibration(DataLoader(Stream(), batch_size=2), SIGNATURE)
        assert len(list(calibration)) == 3
        with pytest.raises(TypeError):
            len(calibration)
        assert len(list(BarProgress().track(calibration, "reading"))) == 3  # a bar without an end

    def test_things_with_items_only(self) -> None:
        class Items:
            def __getitem__(self, index: int) -> torch.Tensor:
                return batches()[index]

        assert len(read(Items())) == 3

    def test_nested_inputs(self) -> None:
        pair = {"left": data(3, 4), "right": data(3, 4)}
        signature = trace(TwoInputs(), (data(3, 4), pair)).signature
        (flat,) = read([((data(3, 4),), {"pair": pair})], signature)
        assert flat[1] is pair["left"] and len(flat) == 3


def refused(given: Any, signature: Signature = SIGNATURE) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        read(given, signature)
    error = caught.value
    assert error.what and error.where and error.seen and error.expected and error.next_step
    return error


class TestMistakes:
    @pytest.mark.parametrize("given", [data(2, 8), np.ones((2, 8)), {"x": data(2, 8)}, "data.npz"], ids=type)
    def test_one_batch_instead_of_several(self, given: Any) -> None:
        error = refused(given)
        assert "iterable of batches" in error.what and "calibration=[batch]" in str(error.next_step)

    @pytest.mark.parametrize("given", [3, None, object()], ids=type)
    def test_nothing_to_read(self, given: Any) -> None:
        assert "cannot be iterated" in refused(given).what

    @pytest.mark.parametrize("given", [[], (), iter([]), DataLoader([], batch_size=2)], ids=type)
    def test_empty(self, given: Any) -> None:
        error = refused(given)
        assert error.what == "Calibration data is empty." and error.seen == "0 batches"

    def test_empty_streams_are_found_when_they_are_read(self) -> None:
        class Empty:
            def __iter__(self) -> Iterator[Any]:
                return iter(())

        calibration = Calibration(Empty(), SIGNATURE)
        for read_all in (calibration.first, lambda: list(calibration)):
            with pytest.raises(CalibrationError, match="is empty"):
                read_all()

    @pytest.mark.parametrize(
        ("bad", "text", "place"),
        [
            (data(2, 9), "wrong size", "input 'x', dimension 1"),
            (data(8), "wrong number of dimensions", "input 'x'"),
            (data(2, 8).double(), "wrong type", "input 'x'"),
            (data(2, 8).numpy().astype(np.float64), "wrong type", "input 'x'"),
            (data(65, 8), "out of its range", "input 'x', dimension 0"),
            ({"y": data(2, 8)}, "no input 'y'", "call of the program"),
            ({}, "'x' is missing", "call of the program"),
            ({"x": [data(2, 8)]}, "nested differently", "call of the program"),
            ((data(2, 8), torch.tensor([1, 2])), "takes 1 input", "call of the program"),
            (torch.empty(1, 8).fill_(torch.nan), "NaN or infinity", "input 'x'"),
            (torch.tensor([[1.0] * 7 + [torch.inf]]), "NaN or infinity", "input 'x'"),
            (7, "type that cannot be an input", ""),
            (None, "type that cannot be an input", ""),
            ("text", "type that cannot be an input", ""),
        ],
    )
    def test_a_batch_that_does_not_fit(self, bad: Any, text: str, place: str) -> None:
        error = refused([data(2, 8), data(2, 8), bad])
        assert text in error.what
        assert str(error.where) == ("calibration batch 2" + (f", {place}" if place else ""))

    def test_labels(self) -> None:
        error = refused(DataLoader(TensorDataset(data(4, 8), torch.arange(4)), batch_size=2))
        assert "labels" in str(error.next_step)

    def test_how_many_values_are_not_finite(self) -> None:
        bad = data(2, 8)
        bad[0, :3] = torch.nan
        assert refused([bad]).seen == "3 of 16 values are not finite, the first at [0, 0]"

    def test_empty_batches(self) -> None:
        with pytest.raises(CalibrationError, match="A calibration batch is empty") as caught:
            check_data(torch.empty(0, 8), "calibration batch 1, input 'x'")
        assert caught.value.where == "calibration batch 1, input 'x'" and caught.value.seen == "shape (0, 8)"

    def test_integers_and_constants_are_finite(self) -> None:
        check_data(torch.tensor([1, 2]), "")
        check_data(None, "")
        check_data(3.0, "")

    def test_later_batches_are_not_read_in_vain(self) -> None:
        """A bad batch is found when its turn comes: the data may be long."""
        calibration = Calibration([data(2, 8), data(2, 9)], SIGNATURE)
        assert calibration.first()[0].shape == (2, 8)


def test_as_call() -> None:
    x = data(2)
    assert as_call((x, x)) == ((x, x), {})
    assert as_call([(x,), {"y": x}]) == ((x,), {"y": x})
    assert as_call({"y": x}) == ((), {"y": x})
