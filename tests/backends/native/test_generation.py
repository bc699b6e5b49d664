"""Continuing texts: the same tokens as from whole sequences, whatever the batch, the cache and the pieces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.zoo import ZOO
from torch import Tensor, nn
from torch.export import Dim

import sqcompile
from sqcompile.backends.native import _native, kernels
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.lower import lower as lower_program
from sqcompile.backends.native.lower.generation import _RULES
from sqcompile.backends.native.session import NativeSession
from sqcompile.calibration import Calibration
from sqcompile.errors import BackendError, Error, InputError
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import Calibrate, FoldQDQ, FreezeObservers, InsertObservers, QuantizeWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]

# One for each way to look at the past: none but the kernel's, masks of windows, matrices and softmax spelled
# out, positions counted from a mask. The others when time does not matter.
OFTEN = {"llama", "mistral", "gemma2", "opt"}
DECODERS = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow, id=name)
    for name, entry in ZOO.items()
    if entry.family == "decoder"
]
PROMPTS = [[5, 9, 33, 12, 60], [7, 3, 41, 8, 22, 19, 4, 50, 11], [30, 31]]


def _program(name: str, passes: Sequence[Pass] = ()) -> Program:
    entry = ZOO[name]
    program = trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)
    calibration = Calibration([entry.inputs(seed) for seed in range(3)], program.signature)
    PassManager(passes).run(program, PassContext(calibration=calibration))
    return program


@cache
def _llama() -> NativeSession:
    session = BACKEND.load(BACKEND.lower(_program("llama")), threads=2)
    assert isinstance(session, NativeSession)
    return session


def _last_logits(session: NativeSession, tokens: Sequence[int]) -> Tensor:
    """Logits behind a text, from the plan for whole sequences."""
    inputs = [torch.tensor([tokens])]
    if len(session.signature.inputs) > 1:
        inputs.append(torch.ones_like(inputs[0]))
    result: Tensor = session.run(inputs)[0][0, -1]
    return result


def _greedy(session: NativeSession, prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(_last_logits(session, text).argmax()))
    return text


def _check_equal(session: NativeSession, count: int = 16) -> None:
    """Tokens, and the bits of all logits on the way."""
    generator = session.generator(rows=3, capacity=48)
    seen: list[tuple[int, Tensor]] = []

    def watch(row: int, _token: int) -> None:
        seen.append((row, generator.logits(row)))

    found = generator.generate(dict(enumerate(PROMPTS)), count, on_token=watch)
    for row, prompt in enumerate(PROMPTS):
        text = _greedy(session, prompt, count)
        assert prompt + found[row] == text
        for step, (_, logits) in enumerate(item for item in seen if item[0] == row):
            assert torch.equal(logits, _last_logits(session, text[: len(prompt) + step])), (row, step)
    assert len({token for tokens in found.values() for token in tokens}) > 1


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_decoding_is_that_of_whole_sequences(name: str, lower: Lower, load: Load) -> None:
    session = load(lower(_program(name)))
    assert session.model.limit == 48 and session.model.vocabulary == 64
    steps = Counter(name for name, _ in session.model.generation_steps)
    assert steps["append"] == (
        4 if name == "gemma2" else 0
    )  # its scores have a soft cap, which is no kernel's
    assert steps["cached_attention"] == (0 if name == "gemma2" else 2)
    _check_equal(session)


QUANTIZED: dict[str, Sequence[Pass]] = {
    "static": (InsertObservers(), Calibrate(), FreezeObservers(), FoldQDQ()),
    "token": (QuantizeWeights(activation=Format.parse("int8:token:dynamic")),),
    "masked": (
        MaskWeights(sparsity=0.5),
        ApplyMasks(),
        QuantizeWeights(activation=Format.parse("uint8:affine:token:dynamic")),
    ),
    "blocks": (MaskWeights(sparsity=0.6, pattern="1x4"), ApplyMasks(), QuantizeWeights()),
    "int4": (QuantizeWeights(weight=Format.parse("int4:group=32")),),
    "sparse_int4": (
        MaskWeights(sparsity=0.6),
        ApplyMasks(),
        QuantizeWeights(weight=Format.parse("int4:group=32")),
    ),
}


@pytest.mark.parametrize("pipeline", QUANTIZED)
def test_quantized_models_decode_as_whole_sequences_do(pipeline: str, lower: Lower, load: Load) -> None:
    _check_equal(load(lower(_program("llama", QUANTIZED[pipeline]))))


def test_a_scale_of_the_whole_tensor_becomes_one_of_each_token(lower: Lower, load: Load) -> None:
    """With the tensor's own scale, a token would depend on those behind it."""
    tensor, token = (
        load(lower(_program("llama", [QuantizeWeights(activation=Format.parse(text))])))
        for text in ("uint8:affine:dynamic", "uint8:affine:token:dynamic")
    )
    assert tensor.generate(PROMPTS, 12) == token.generate(PROMPTS, 12)


def test_a_text_in_pieces_is_the_text(lower: Lower, load: Load) -> None:
    generator = _llama().generator(rows=2, capacity=40)
    text = [3, 4, 5, 6, 7, 8, 9, 10]
    generator.feed({0: text, 1: text[:3]})
    for token in text[3:5]:
        generator.feed({1: [token]})
    generator.feed({1: text[5:]})
    assert torch.equal(generator.logits(0), generator.logits(1))
    whole = generator.logits(0)
    generator.feed({0: [1, 2]})
    generator.rewind(0, 5)
    assert generator.length(0) == 5
    with pytest.raises(InputError, match="There are no logits"):
        generator.logits(0)
    generator.feed({0: text[5:]})
    assert torch.equal(generator.logits(0), whole)
    generator.reset()
    assert [generator.length(row) for row in range(2)] == [0, 0]


def test_prompts_longer_than_a_chunk(lower: Lower, load: Load) -> None:
    """More tokens than go through the model together, in rows of several lengths, with and without masks."""
    for window in (None, 70):
        session = load(lower(_long_model(window)))
        generator = session.generator(rows=3, capacity=700)
        texts = [[(7 * i + row) % 61 for i in range(count)] for row, count in enumerate((300, 3, 290))]
        generator.feed(dict(enumerate(texts)))
        for row, text in enumerate(texts):
            assert torch.equal(generator.logits(row), _last_logits(session, text))


class _Attention(nn.Module):
    """One head over a table of tokens, with whatever mask a test wants."""

    def __init__(self, mask: Callable[[Tensor], Tensor | None], causal: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 16)
        self.head = nn.Linear(16, 61, bias=False)
        self.mask, self.causal = mask, causal
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        query = x[:, None]
        places = torch.arange(input_ids.shape[1])
        found = nn.functional.scaled_dot_product_attention(
            query, query.cos(), query.sin(), attn_mask=self.mask(places), is_causal=self.causal
        )
        result: Tensor = self.head(x + found[:, 0])
        return result


def _traced(model: nn.Module, shapes: Any = None) -> Program:
    dims = {"input_ids": {0: Dim("batch", max=8), 1: Dim("sequence", max=1024)}}
    ids = torch.arange(24).reshape(2, 12)
    return trace(model.eval(), {"input_ids": ids}, dynamic_shapes=dims if shapes is None else shapes)


def _causal(places: Tensor) -> Tensor:
    return places[None, :] <= places[:, None]


def _long_model(window: int | None) -> Program:
    def mask(places: Tensor) -> Tensor:
        causal = _causal(places)
        return causal if window is None else causal & (places[None, :] > places[:, None] - window)

    return _traced(_Attention(mask))


def _reason(program: Program) -> str | None:
    plan = lower_program(program).plan
    reason = json.loads(plan.metadata).get("no_generation")
    assert (reason is None) == (plan.generation is not None)
    return reason  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("mask", "good"),
    [
        (_causal, True),
        (lambda p: p[None, :] < p[:, None] + 1, True),
        (lambda p: ~(p[None, :] > p[:, None]), True),
        (lambda p: torch.where(_causal(p), 0.0, -torch.inf), True),
        (lambda p: torch.where(_causal(p), 0.0, torch.finfo(torch.float32).min), True),
        (
            lambda p: torch.zeros(p.shape[0], p.shape[0]).masked_fill(p[None, :] > p[:, None], -torch.inf),
            True,
        ),
        (lambda p: torch.where(_causal(p), 0.0, -1000.0), False),
        (lambda p: p[None, :] <= p[:, None] + 1, False),
        (lambda p: p[None, :] >= p[:, None], False),
        (lambda p: (p[None, :] - p[:, None]).abs() < 4, False),
        (lambda p: None, False),
    ],
    ids="le lt not_gt minus_infinity minimum masked_fill too_weak one_ahead reverse window none".split(),
)
def test_only_masks_that_hide_the_future_are_taken(
    mask: Callable[[Tensor], Tensor | None], good: bool, load: Load, lower: Lower
) -> None:
    program = _traced(_Attention(mask))
    reason = _reason(program)
    if not good:
        assert reason is not None and reason.startswith("it may look at later positions (attention of ")
        return
    assert reason is None
    session = load(lower(program))
    assert session.generate([[5, 6, 7]], 9) == [_greedy(session, [5, 6, 7], 9)]


class _Other(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = _Attention(lambda places: None, causal=True)
        self.function = function

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.function(self.inner(input_ids))
        return result


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x - x.mean(1, keepdim=True), "it takes in a whole sequence at once (reduce_mean"),
        (lambda x: x.cumsum(1), "it mixes positions (cumsum"),
        (lambda x: x.softmax(1), "it may look at later positions (softmax"),
        (lambda x: torch.cat([x[:, :1], x], 1), "returns no logits"),
        (lambda x: x[:, -1], "returns no logits"),
        (lambda x: x @ (x.transpose(1, 2) @ x), "it may look at later positions (matmul"),
        (lambda x: x + x.shape[1], "iota"),
    ],
    ids="mean cumsum softmax longer last gram length".split(),
)
def test_what_mixes_positions_is_refused_and_still_runs(
    function: Callable[[Tensor], Tensor], reason: str, load: Load, lower: Lower
) -> None:
    program = _traced(_Other(function))
    assert reason in (_reason(program) or "")
    session = load(lower(program))
    ids = torch.arange(10).reshape(2, 5)
    expected = program.run([ids])[0].detach()
    torch.testing.assert_close(
        session.run([ids])[0], expected, rtol=0, atol=2e-6 * float(expected.abs().max())
    )
    with pytest.raises(BackendError, match="does not generate text") as error:
        session.generate(ids, 3)
    assert error.value.seen == _reason(program)


def test_sizes_that_are_fixed_are_named() -> None:
    model = _Attention(lambda places: None, causal=True)
    dims = {"input_ids": {0: Dim("batch", max=8)}}
    assert (
        _reason(_traced(model, dims)) == "its sequences have 12 tokens; trace it with a dynamic dimension 1"
    )
    dims = {"input_ids": {1: Dim("sequence", max=64)}}
    assert _reason(_traced(model, dims)) == "its batches have 2 rows; trace it with a dynamic dimension 0"
    assert "token_type_ids" in str(_reason(_program("bert")))


def test_every_operator_has_a_rule() -> None:
    """A new operator needs a line in lower/generation.py, or models with it stop generating."""
    names = {name for name, _ in _native.operators()}
    made_later = {"norm_rows", "activation_rows", "rope"}  # by fusion, which follows
    assert names - set(_RULES) == {"cached_attention", "append"} | made_later
    assert set(_RULES) <= names


def test_a_file_of_version_2_keeps_its_meaning() -> None:
    """The file and its logits were written when version 2 was made; see docs/file_format.md."""
    folder = Path(__file__).parent / "data"
    session = BACKEND.load(folder / "generation.sqm", threads=1)
    assert isinstance(session, NativeSession)
    steps = Counter(name for name, _ in session.model.generation_steps)
    assert (steps["cached_attention"], steps["append"]) == (2, 2)
    generator = session.generator(rows=2, capacity=16)
    found = generator.generate({0: [1, 2, 3], 1: [10, 4, 5, 6, 0]}, 8)
    expected = np.load(folder / "generation.npy")
    for row in range(2):
        np.testing.assert_allclose(
            generator.logits(row), expected[row], rtol=0, atol=2e-6 * float(np.abs(expected).max())
        )
    assert found == {0: [6, 9, 2, 9, 2, 0, 2, 0], 1: [6, 5, 1, 5, 1, 5, 1, 5]}


def test_models_may_be_deep() -> None:
    """Following a plan backward must not end at Python's limit of recursion."""
    import sys

    class Deep(_Attention):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            for _ in range(400):
                x = (x * 0.5).sin() + x
            result: Tensor = super().forward(input_ids) + self.head(x)
            return result

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(2000)
    try:
        assert _reason(_traced(Deep(lambda places: None, causal=True))) is None
        assert sys.getrecursionlimit() == 2000
    finally:
        sys.setrecursionlimit(limit)


def test_batches_of_tensors_with_padding_on_either_side() -> None:
    session = _llama()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    result = session.generate(ids, 6, attention_mask=mask)
    assert result.shape == (3, 11) and torch.equal(result[:, :5], ids)
    for row, prompt in enumerate(([5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15])):
        assert result[row, 5:].tolist() == _greedy(session, prompt, 6)[len(prompt) :]
    assert torch.equal(session.generate(ids.numpy(), 6, attention_mask=mask.numpy()), result)
    with pytest.raises(InputError, match="Padding lies between tokens"):
        session.generate(ids, 6, attention_mask=torch.tensor([[1, 0, 1, 1, 1]] * 3))
    with pytest.raises(InputError, match="mask does not fit"):
        session.generate(ids, 6, attention_mask=mask[:2])


def test_rows_end_at_their_own_stops() -> None:
    session = _llama()
    free = [text[len(prompt) :] for text, prompt in zip(session.generate(PROMPTS, 12), PROMPTS, strict=True)]
    stops = [free[0][3], free[1][6]]
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), 12) for row in free]
    assert len(set(ends)) > 1
    found = session.generate(PROMPTS, 12, eos_token_id=stops)
    assert found == [prompt + row[:end] for prompt, row, end in zip(PROMPTS, free, ends, strict=True)]
    padded = session.generate(torch.tensor(PROMPTS[:1] * 2), 12, eos_token_id=stops[0], pad_token_id=63)
    assert padded.shape[1] == 5 + free[0].index(stops[0]) + 1
    assert session.generate(torch.tensor(PROMPTS[:1]), 0).tolist() == PROMPTS[:1]


def test_tokens_come_one_by_one_and_can_be_stopped() -> None:
    session = _llama()
    seen: list[tuple[int, int]] = []

    def take(row: int, token: int) -> bool:
        seen.append((row, token))
        return len(seen) < 5

    found = session.generate(PROMPTS[:2], 9, on_token=take)
    assert [row for row, _ in seen] == [0, 1, 0, 1, 0]
    assert [text[len(prompt) :] for text, prompt in zip(found, PROMPTS, strict=False)] == [
        [token for row, token in seen if row == wanted] for wanted in range(2)
    ]

    def fail(row: int, token: int) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        session.generate(PROMPTS, 9, on_token=fail)
    assert session.generate(PROMPTS, 4) == [_greedy(session, prompt, 4) for prompt in PROMPTS]


def test_sampling_is_what_softmax_says() -> None:
    generator = _llama().generator(capacity=16)
    generator.feed({0: [5, 6]})

    def draws(count: int, **options: Any) -> np.ndarray:
        found = np.zeros(64)
        for seed in range(count):
            generator.rewind(0, 1)
            found[generator.generate({0: [6]}, 1, seed=seed, **options)[0][0]] += 1
        return found

    logits = generator.logits(0).double()
    order = logits.argsort(descending=True)
    for options in (
        {"temperature": 1.5},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.6},
    ):
        expected = (logits / options["temperature"]).softmax(0)
        kept = order[: int(options.get("top_k", 64))]
        inside = (expected[kept] / expected[kept].sum()).cumsum(0)
        kept = kept[: int((inside < options.get("top_p", 1.0)).sum()) + 1]
        wanted = torch.zeros(64, dtype=torch.float64)
        wanted[kept] = expected[kept] / expected[kept].sum()
        count = 2000
        found = draws(count, **options)
        assert found[wanted.numpy() == 0].sum() == 0
        # Five standard deviations of a count, for each of at most 64 tokens: 1 in 27 000 draws' sets is worse.
        spread = 5 * (count * wanted * (1 - wanted)).sqrt()
        assert (np.abs(found - count * wanted.numpy()) <= spread.numpy() + 0.5).all()
    greedy = draws(1)
    assert greedy[int(order[0])] == 1
    for same in (
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1e-4},
    ):
        assert draws(20, **same)[int(order[0])] == 20


def test_draws_depend_on_the_seed_and_not_on_the_batch() -> None:
    session = _llama()
    options = {"temperature": 1.0, "top_p": 0.95}
    together = session.generate(PROMPTS, 20, seed=3, **options)
    assert session.generate(PROMPTS, 20, seed=3, **options) == together
    assert session.generate(PROMPTS, 20, seed=4, **options) != together
    assert session.generate(PROMPTS[:1], 20, seed=3, **options) == together[:1]


def test_a_cache_of_8_bits_is_a_quarter_as_large_and_close() -> None:
    session = _llama()
    exact, rounded = (session.generator(capacity=48, kv_cache=kind) for kind in ("float32", "int8"))
    text = list(range(3, 40))
    for generator in (exact, rounded):
        generator.feed({0: text})
    # 8 dimensions are padded to 16 in values, and each has 8 bytes of scales.
    assert rounded.cache_bytes < 0.4 * exact.cache_bytes
    difference = (exact.logits() - rounded.logits()).norm() / exact.logits().norm()
    # Rounding to half of 1 / 127 of a head's largest value, through two layers.
    assert 0 < float(difference) < 0.02
    assert session.generate(PROMPTS, 4, kv_cache="int8")[0][:5] == PROMPTS[0]


def test_mistakes_are_named() -> None:
    session = _llama()
    generator = session.generator(rows=2, capacity=8)
    generator.feed({0: [3, 4, 5]})
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: generator.feed({0: range(6)}),
            "the cache overflows: 6 tokens do not fit behind the 3 of row 0",
        ),
        (
            lambda: generator.generate({0: [3]}, 6),
            "the cache overflows: 1 tokens and 6 new ones do not fit behind",
        ),
        (lambda: generator.feed({2: [3]}), "row 2; the generator has 2"),
        (lambda: generator.feed({-1: [3]}), "row -1; the generator has 2"),
        (lambda: generator.feed({0: []}), "Tokens are whole numbers|row 0 gets no tokens"),
        (lambda: generator.feed({1: [3, 64]}), "token 1 of row 1 is 64; the vocabulary has 64"),
        (lambda: generator.feed({1: [-1]}), "token 0 of row 1 is -1; the vocabulary has 64"),
        (lambda: generator.feed({1: [0.5]}), "Tokens are whole numbers"),
        (lambda: generator.feed({1: [[3]]}), "Tokens are whole numbers"),
        (lambda: generator.rewind(0, 4), "row 0 cannot go back to 4 tokens: it has 3"),
        (lambda: generator.rewind(0, -1), "row 0 cannot go back to -1 tokens"),
        (lambda: generator.generate({1: [3]}, -1), "max_new_tokens is negative"),
        (lambda: generator.generate({1: [3]}, 2, temperature=-1.0), "temperature"),
        (lambda: generator.generate({1: [3]}, 2, temperature=float("nan")), "temperature"),
        (lambda: generator.generate({1: [3]}, 2, top_p=0.0), "top_p"),
        (lambda: generator.generate({1: [3]}, 2, top_k=-1), "top_k"),
        (lambda: session.generator(rows=0), "0 rows; a generator has 1 to 4096"),
        (lambda: session.generator(capacity=0), "a row for 0 tokens; the model takes 1 to 48"),
        (lambda: session.generator(kv_cache="int3"), "There is no such cache"),
        (lambda: session.generate(torch.tensor([3, 4]), 2), "Prompts are rows of tokens"),
        (lambda: session.generate([[3]], 2.5), "max_new_tokens"),  # type: ignore[arg-type]
        (lambda: generator.generate({1: [3]}, 2**63 - 1), "the cache overflows"),
        (lambda: session.generate([[3] * 40], 10), "longer than the model takes"),
    ]
    for number, (call, text) in enumerate(cases):
        with pytest.raises(InputError) as error:
            call()
        assert any(part in str(error.value) for part in text.split("|")), (number, str(error.value))
        assert error.value.what and error.value.next_step
    assert generator.length(0) == 3 and generator.length(1) == 0
    generator.generate({0: [3]}, 5)
    assert generator.length(0) == 8


def test_decoding_reserves_no_more_memory_with_every_token() -> None:
    generator = _llama().generator(capacity=48)
    generator.feed({0: [3, 4, 5]})
    generator.feed({0: [6]})
    reserved = generator.inner.memory_bytes
    for token in range(7, 40):
        generator.feed({0: [token]})
    assert generator.inner.memory_bytes == reserved


def test_the_way_through_compile_save_and_load(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    compiled = sqcompile.compile(
        entry.make(), passes=[], example_inputs=entry.inputs(), dynamic_shapes=entry.dynamic_shapes
    )
    expected = compiled.generate(PROMPTS, 8)
    assert expected == [_greedy(_llama(), prompt, 8) for prompt in PROMPTS]
    (path,) = compiled.save(tmp_path / "model.sqm")
    assert path.read_bytes()[8] == 2  # the version with a second plan
    assert sqcompile.load(path, threads=1).generate(PROMPTS, 8) == expected
    other = sqcompile.compile(
        entry.make(),
        passes=[],
        example_inputs=entry.inputs(),
        dynamic_shapes=entry.dynamic_shapes,
        backend="reference",
    )
    with pytest.raises(Error, match="does not generate text"):
        other.generate(PROMPTS, 8)


def test_every_instruction_set_writes_the_same_text(lower: Lower, load: Load) -> None:
    model = load(lower(_program("llama", QUANTIZED["int4"]))).model
    found = {}
    for isa in kernels.available_isas():
        generator = _native.Generator(model, 2, isa, 1, 32, True)
        assert generator.isa == isa
        tokens: list[int] = []

        def keep(_row: int, token: int, tokens: list[int] = tokens) -> bool:
            tokens.append(token)
            return True

        prompt = np.array(PROMPTS[1], np.int64)
        generator.generate([(0, prompt)], 12, 0.0, 0, 1.0, 0, [], keep)
        found[isa] = (tuple(tokens), generator.logits(0).tobytes())
    assert len(found) > 1 or kernels.available_isas() == ["scalar"]
    assert len(set(found.values())) == 1


def test_a_model_is_continued_by_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    session = _llama()
    expected = [_greedy(session, prompt, 10) for prompt in PROMPTS]

    def work(prompt: list[int]) -> list[int]:
        generator = session.generator(capacity=32)
        return prompt + generator.generate({0: prompt}, 10)[0]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, PROMPTS)) == expected
        assert list(pool.map(lambda prompt: session.generate([prompt], 10)[0], PROMPTS)) == expected


def _trained(name: str, passes: Sequence[Pass]) -> tuple[Program, NativeSession, list[list[int]]]:
    from support.trained import folder
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder() / name, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokens = torch.from_numpy(np.load(folder() / name / "tokens.npz")["eval"].astype(np.int64))
    dims = {"input_ids": {0: Dim("batch"), 1: Dim("sequence", max=512)}}
    program = trace(model, {"input_ids": tokens[:2, :32]}, dynamic_shapes=dims)
    PassManager(passes).run(program, PassContext())
    session = BACKEND.load(BACKEND.lower(program), threads=2)
    assert isinstance(session, NativeSession)
    return program, session, [tokens[row, : 6 + 5 * row].tolist() for row in range(6)]


@pytest.mark.data
@pytest.mark.parametrize("weight", ["float", "int8", "int4:group=32"])
@pytest.mark.parametrize("name", ["stories260K", "pycode-llama-5m"])
def test_trained_models_write_what_the_reference_writes(name: str, weight: str) -> None:
    """Token for token; where they part, the reference itself cannot tell.

    Whole sequences of the engine agree exactly. PyTorch's sums end in other bits, and codes of activations that
    lie between two steps round the other way: each such step moves logits by about as much as its own noise
    moves the reference (`support.parity`). Weights of 4 bits alone leave activations in float, which the engine
    rounds to 8 bits: its tokens are those of the most likely, or the difference is within that rounding.
    """
    from support.parity import _with_noise

    formats: dict[str, Sequence[Pass]] = {
        "float": [],
        "int8": [QuantizeWeights(activation=Format.parse("int8:token:dynamic"))],
        "int4:group=32": [QuantizeWeights(weight=Format.parse("int4:group=32"))],
    }
    program, session, prompts = _trained(name, formats[weight])
    count = 24
    texts = session.generate(prompts, count)
    parted = 0
    for prompt, text in zip(prompts, texts, strict=True):
        inputs = [torch.tensor([text[:-1]])]
        own = session.run(inputs)[0][0, len(prompt) - 1 :]
        assert own.argmax(-1).tolist() == text[len(prompt) :]
        with torch.no_grad():
            expected = program.run(inputs)[0][0, len(prompt) - 1 :]
        places = (expected.argmax(-1) != own.argmax(-1)).nonzero().flatten().tolist()
        parted += len(places)
        if not places:
            continue
        noise = torch.zeros_like(expected)
        for seed in range(8):
            moved = _with_noise(program, inputs, seed)[0][0, len(prompt) - 1 :]
            noise = torch.maximum(noise, (moved - expected).abs())
        for place in places:
            gap = float(expected[place].max() - expected[place, own[place].argmax()])
            rounding = float((own[place] - expected[place]).abs().max()) if weight.startswith("int4") else 0.0
            assert gap <= 2 * max(float(noise[place].max()), rounding), (place, gap)
    # Of 144 tokens: none in floating point, few where activations are rounded.
    assert parted <= {"float": 0, "int8": 5, "int4:group=32": 10}[weight]
