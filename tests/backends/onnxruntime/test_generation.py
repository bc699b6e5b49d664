"""Language models with a cache: the logits of whole sequences, whatever the pieces, and onnxruntime-genai's folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from support.trained import folder as data_folder
from support.zoo import ZOO
from torch import Tensor, nn
from torch.export import Dim

import sqcompile
from sqcompile.backends.onnxruntime import BACKEND
from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.backends.onnxruntime.generation.generator import TextGenerator
from sqcompile.backends.onnxruntime.generation.rewrite import NoGenerationError, generating
from sqcompile.backends.onnxruntime.generation.sampling import Sampling
from sqcompile.backends.onnxruntime.lower import lower_generating
from sqcompile.backends.onnxruntime.session import OnnxSession
from sqcompile.calibration import Calibration
from sqcompile.errors import BackendError, InputError
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import QuantizeCache, QuantizeWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

OFTEN = {"llama", "mistral", "qwen2", "gpt2"}
# Scores with a soft cap are spelled out as matrices, and positions that are added to scores are no band.
WITHOUT = {"gemma2": "no attention that could keep"}
DECODERS = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow, id=name)
    for name, entry in ZOO.items()
    if entry.family == "decoder" and name not in WITHOUT
]
TEXT = [5, 9, 33, 12, 60, 7, 3, 41, 8, 22, 19, 4, 50, 11, 30, 31]
# The same sums of float32 in other orders: logits of size 1 to 10 over models of width 32 differ by some 1e-6.
CLOSE = 1e-4


def _program(name: str, passes: Sequence[Pass] = ()) -> Program:
    entry = ZOO[name]
    program = trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)
    PassManager(passes).run(program, PassContext())
    return program


@cache
def _llama() -> OnnxSession:
    session = BACKEND.load(BACKEND.lower(_program("llama")), threads=1)
    assert isinstance(session, OnnxSession)
    return session


def _whole(run: Callable[[list[Any]], list[Any]], inputs: int, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of a whole sequence."""
    batch = [torch.tensor([tokens])]
    if inputs > 1:
        batch.append(torch.ones_like(batch[0]))
    with torch.no_grad():
        found: NDArray[np.float32] = run(batch)[0][0].numpy()
    return found


def _in_pieces(generator: TextGenerator, tokens: Sequence[int], pieces: Sequence[int]) -> NDArray[np.float32]:
    """Logits of a text that is fed in pieces of these lengths, the last of them again and again."""
    generator.reset()
    found, place = [], 0
    lengths = list(pieces)
    while place < len(tokens):
        length = lengths.pop(0) if len(lengths) > 1 else lengths[0]
        found.append(generator.feed(np.array(tokens[place : place + length])).copy())
        place += length
    return np.concatenate(found)


@pytest.mark.parametrize("name", DECODERS)
def test_pieces_give_the_logits_of_whole_sequences(
    name: str, load: Callable[[OnnxArtifact], OnnxSession]
) -> None:
    program = _program(name)
    artifact = lower_generating(program)
    operators = Counter(node.op_type for node in artifact.model.graph)
    assert operators["GroupQueryAttention"] == 2 and not operators["Softmax"]
    generator = load(artifact).generator()
    assert generator.generation.vocabulary == 64 and generator.generation.limit == 48
    expected = _whole(program.run, len(program.signature.inputs), TEXT)
    for pieces in ((len(TEXT),), (5, 1), (1, 4, 1), (3, 2)):
        found = _in_pieces(generator, TEXT, pieces)
        assert np.abs(found - expected).max() < CLOSE, pieces


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rows_of_different_lengths_are_padded_on_the_right(
    name: str, load: Callable[[OnnxArtifact], OnnxSession]
) -> None:
    session = load(lower_generating(_program(name)))
    assert session.generation is not None and session.generation.rows_differ
    texts = [TEXT[:9], TEXT[3:8]]
    tokens, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    kept = {
        f"past_key_values.{layer}.{kind}": np.zeros((2, 2, 0, 8), np.float32)
        for layer in range(2)
        for kind in ("key", "value")
    }
    names = [item.name for item in session.inner.get_outputs()]
    generator = session.generator()
    for step in range(4):
        found = dict(
            zip(
                names,
                session.inner.run(names, {"input_ids": tokens, "attention_mask": mask, **kept}),
                strict=True,
            )
        )
        for row, text in enumerate(texts):
            place = len(text) - 1 if step == 0 else 0
            expected = _in_pieces(generator, text, (len(text),))[-1]
            assert np.abs(found["logits"][row, place] - expected).max() < CLOSE
        kept = {
            name.replace("present", "past_key_values"): value
            for name, value in found.items()
            if name != "logits"
        }
        tokens = np.array([[40 + step], [50 - step]])
        texts = [[*text, int(new)] for text, new in zip(texts, tokens[:, 0], strict=True)]
        mask = np.array([[*(place < len(text) for place in range(9 + step + 1))] for text in texts], np.int64)


QUANTIZED: dict[str, Sequence[Pass]] = {
    "int4": (QuantizeWeights(weight=Format.parse("uint4:group=32:affine")),),
    "int8": (QuantizeWeights(),),
    "token": (QuantizeWeights(activation=Format.parse("uint8:affine:token:dynamic")),),
    "masked": (MaskWeights(sparsity=0.5), ApplyMasks(), QuantizeWeights()),
    "nf4": (QuantizeWeights(weight=Format.parse("int4:mapping=nf:group=32")),),
}


@pytest.mark.parametrize("pipeline", QUANTIZED)
def test_quantized_products_stay_as_they_are(
    pipeline: str, load: Callable[[OnnxArtifact], OnnxSession]
) -> None:
    program = _program("llama", QUANTIZED[pipeline])
    whole = BACKEND.lower(program)
    assert isinstance(whole, OnnxArtifact)
    products = ("MatMulNBits", "MatMulInteger", "DequantizeLinear", "QuantizeLinear")
    one, other = (Counter(node.op_type for node in item.model.graph) for item in (whole, whole.generator()))
    assert {name: one[name] for name in products} == {name: other[name] for name in products}
    if pipeline == "int4":
        assert one["MatMulNBits"] == 15
    session = load(whole)
    expected = _whole(session.run, 1, TEXT)
    # A value that lies between two codes of the activation may be rounded either way: some steps of 1/255.
    bound = CLOSE if pipeline == "nf4" else 0.02 * np.abs(expected).max()
    assert np.abs(_in_pieces(session.generator(), TEXT, (5, 1)) - expected).max() < bound


def test_an_int8_cache_gives_what_the_program_computes(load: Callable[[OnnxArtifact], OnnxSession]) -> None:
    """Keys and values rounded with the same scales, whether they come from the cache or from this call."""
    entry = ZOO["llama"]
    program = trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)
    batches = [(torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1)),)]
    plain = program.snapshot()
    # Tables of weights are multiplied in float32 here, so that nothing else is rounded at run time.
    weights = QUANTIZED["nf4"]
    PassManager(weights).run(plain, PassContext())
    PassManager([*weights, QuantizeCache()]).run(
        program, PassContext(calibration=Calibration(batches, program.signature))
    )
    artifact = BACKEND.lower(program)
    assert isinstance(artifact, OnnxArtifact)
    session = load(artifact)
    generator = session.generator()
    assert {item.dtype for item in generator.generation.caches} == {"int8"}
    whole = _whole(program.run, 1, TEXT)
    bound = 0.01 * np.abs(whole).max()  # a value between two codes may be rounded either way
    for pieces in ((len(TEXT),), (5, 1), (3, 2)):
        assert np.abs(_in_pieces(generator, TEXT, pieces) - whole).max() < bound
    prompts = [TEXT[:5], TEXT[2:9]]
    for row, tokens in enumerate(session.generate(prompts, 12)):
        logits = _whole(program.run, 1, tokens)
        for place in range(len(prompts[row]), len(tokens)):
            assert logits[place - 1].max() - logits[place - 1, tokens[place]] < 2 * bound
    assert not np.allclose(whole, _whole(plain.run, 1, TEXT), atol=1e-6), "rounding keys changes something"


def test_generate_continues_as_whole_sequences_do() -> None:
    session = _llama()
    prompts = [TEXT[:5], TEXT[2:9], TEXT[:2]]
    found = session.generate(prompts, 12)
    seen: list[tuple[int, int]] = []
    again = session.generate(prompts, 12, on_token=lambda row, token: seen.append((row, token)))
    assert again == found and [token for _, token in seen] == [
        t for row in range(3) for t in found[row][len(prompts[row]) :]
    ]
    for row, prompt in enumerate(prompts):
        assert found[row][: len(prompt)] == prompt and len(found[row]) == len(prompt) + 12
        logits = _whole(session.run, 1, found[row])
        for place in range(len(prompt), len(found[row])):
            # The greatest, or one that is not to be told from it.
            assert logits[place - 1].max() - logits[place - 1, found[row][place]] < CLOSE
    padded = torch.tensor([[0, 0, *TEXT[:5]], TEXT[2:9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    result = session.generate(padded, 12, attention_mask=mask)
    assert result[0, 7:].tolist() == found[0][5:] and result[1, 7:].tolist() == found[1][7:]


def test_generation_stops_and_refuses() -> None:
    session = _llama()
    text = session.generate([TEXT[:5]], 12)[0]
    end = text[7]
    stopped = session.generate(torch.tensor([TEXT[:5]]), 12, eos_token_id=end)[0].tolist()
    assert stopped == text[: text.index(end, 5) + 1]
    assert session.generate([TEXT[:5], TEXT[:3]], 12, on_token=lambda row, token: False) == [
        text[:6],
        TEXT[:3],
    ]
    assert session.generate([TEXT[:5]], 0) == [TEXT[:5]]
    with pytest.raises(InputError, match="longer than the model takes"):
        session.generate([TEXT], 40)
    with pytest.raises(InputError, match="not in the vocabulary"):
        session.generate([[3, 64]], 2)
    with pytest.raises(InputError, match="kv_cache"):
        session.generate([TEXT], 2, kv_cache="int8")
    with pytest.raises(InputError, match="temperature"):
        session.generate([TEXT], 2, temperature=-1.0)


def test_draws_are_those_of_the_native_engine() -> None:
    native = sqcompile.compile(_program("llama"), backend="native", verify="off")
    for options in ({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5}):
        drawn = [
            session.generate([TEXT[:6]], 20, temperature=1.5, seed=3, **options)
            for session in (native.session, _llama())
        ]
        assert drawn[0] == drawn[1]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    drawn = Counter(Sampling(1.0, seed=1).choose(logits, 0, step) for step in range(4000))
    for token, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        # Four standard deviations of a binomial.
        assert abs(drawn[token] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    assert {Sampling(1.0, top_k=2).choose(logits, 0, step) for step in range(50)} == {2, 3}
    assert {Sampling(1.0, top_p=0.8).choose(logits, 0, step) for step in range(99)} == {1, 2, 3}
    assert {Sampling(0.01).choose(logits, 0, step) for step in range(50)} == {3}
    assert Sampling().choose(np.array([np.nan, 1, 0], np.float32), 0, 0) == 1


# --- what does not generate -----------------------------------------------------------------------------


class _Tiny(nn.Module):
    """A model of one attention over embedded tokens."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.mix = mix
        self.embedding = nn.Embedding(16, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        causal = self.mix != "both ways"
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=causal)
        x = x + y.transpose(1, 2).flatten(2)
        if self.mix == "a mean":
            x = x - x.mean(1, keepdim=True)
        elif self.mix == "a sum":
            x = x + x.cumsum(1)
        elif self.mix == "a shift":
            x = x + torch.cat([x[:, :1], x[:, :-1]], 1)
        elif self.mix == "the length":
            x = x * input_ids.shape[1]
        elif self.mix == "a part":
            x = x[:, -1:]
        result: Tensor = self.head(x)
        return result


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        ("both ways", "looks at later positions"),
        ("a mean", "works along the sequence"),
        ("a sum", "works along the sequence"),
        ("a shift", "takes a part of the sequence|works along the sequence"),
        ("the length", "length of the sequence"),
        ("a part", "no logits"),
    ],
)
def test_what_mixes_positions_is_refused(mix: str, reason: str) -> None:
    shapes = {"input_ids": {0: Dim("batch"), 1: Dim("sequence", min=3)}}
    program = trace(_Tiny(mix), {"input_ids": torch.arange(12).reshape(2, 6)}, dynamic_shapes=shapes)
    with pytest.raises(NoGenerationError, match=reason):
        generating(program)
    compiled = sqcompile.compile(program, backend="onnxruntime", verify="off")
    with pytest.raises(BackendError, match=reason):
        compiled.generate([[1, 2, 3]], 2)


def test_the_rewrite_leaves_the_program_as_it_was() -> None:
    program = trace(
        _Tiny(""),
        {"input_ids": torch.arange(12).reshape(2, 6)},
        dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("sequence", min=3)}},
    )
    before = program.text()
    rewritten, generation = generating(program)
    assert program.text() == before
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        # Markers mean in PyTorch what they stand for: attention without a past.
        assert torch.allclose(rewritten.run([tokens])[0], program.run([tokens])[0], atol=1e-6)
    assert generation.caches[0].heads == 4 and generation.limit is None


def test_fixed_lengths_do_not_generate() -> None:
    program = trace(_Tiny(""), {"input_ids": torch.arange(12).reshape(2, 6)})
    with pytest.raises(NoGenerationError, match="dynamic dimension 1"):
        generating(program)


@pytest.mark.parametrize("name", WITHOUT)
def test_decoders_that_spell_attention_out_say_so(name: str) -> None:
    with pytest.raises(NoGenerationError, match=WITHOUT[name]):
        generating(_program(name))


def test_encoders_do_not_generate() -> None:
    name = next(name for name, entry in ZOO.items() if entry.family == "encoder")
    with pytest.raises(NoGenerationError):
        generating(_program(name))


# --- folders ---------------------------------------------------------------------------------------------


def _save_zoo_model(name: str, path: Path) -> Path:
    ZOO[name].make().save_pretrained(path)  # type: ignore[operator]
    return path


def _compiled(source: Path, **options: Any) -> sqcompile.Compiled:
    compiled = sqcompile.compile(
        source,
        example_inputs={"input_ids": torch.randint(3, 60, (2, 12))},
        backend="onnxruntime",
        **options,
    )
    assert isinstance(compiled, sqcompile.Compiled)
    return compiled


def test_a_saved_folder_is_onnxruntime_genais(tmp_path: Path) -> None:
    compiled = _compiled(_save_zoo_model("llama", tmp_path / "source"))
    files = {path.name for path in compiled.save(tmp_path / "saved")}
    assert files >= {
        "model.onnx",
        "genai_config.json",
        "config.json",
        "generation_config.json",
        "report.json",
    }
    described = json.loads((tmp_path / "saved/genai_config.json").read_text())
    model = described["model"]
    assert model["type"] == "llama" and model["vocab_size"] == 64 and model["context_length"] == 64
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 0)
    decoder = model["decoder"]
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size", "hidden_size")
    assert [decoder[size] for size in sizes] == [2, 4, 2, 8, 32]
    inner = onnxruntime.InferenceSession(tmp_path / "saved/model.onnx", providers=["CPUExecutionProvider"])
    names = [
        pattern % layer
        for layer in range(2)
        for pattern in (decoder["inputs"]["past_key_names"], decoder["inputs"]["past_value_names"])
    ]
    assert [item.name for item in inner.get_inputs()] == ["input_ids", "attention_mask", *names]
    outputs = decoder["outputs"]
    names = [
        pattern % layer
        for layer in range(2)
        for pattern in (outputs["present_key_names"], outputs["present_value_names"])
    ]
    assert [item.name for item in inner.get_outputs()] == [outputs["logits"], *names]


def test_a_loaded_folder_is_called_as_the_model_and_generates(tmp_path: Path) -> None:
    compiled = _compiled(_save_zoo_model("llama", tmp_path / "source"))
    compiled.save(tmp_path / "saved")
    session = sqcompile.load(tmp_path / "saved")
    tokens = torch.tensor([TEXT[:7], TEXT[3:10]])
    assert torch.allclose(session(input_ids=tokens).logits, compiled(input_ids=tokens).logits, atol=CLOSE)
    assert session.generate([TEXT[:5]], 9) == compiled.generate([TEXT[:5]], 9)


def test_a_loaded_folder_refuses_padding_before_tokens(tmp_path: Path) -> None:
    compiled = sqcompile.compile(
        _save_zoo_model("qwen2", tmp_path / "source"),
        example_inputs=ZOO["qwen2"].inputs(),
        backend="onnxruntime",
    )
    assert isinstance(compiled, sqcompile.Compiled)
    compiled.save(tmp_path / "saved")
    session = sqcompile.load(tmp_path / "saved")
    tokens = torch.tensor([TEXT[:6], [*TEXT[:4], 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    expected = compiled(input_ids=tokens, attention_mask=mask).logits
    found = session(input_ids=tokens, attention_mask=mask).logits
    assert torch.allclose(found[mask == 1], expected[mask == 1], atol=CLOSE)
    with pytest.raises(InputError, match="from the first place on"):
        session(input_ids=tokens, attention_mask=mask.flip(1))


# --- trained models, and onnxruntime-genai ----------------------------------------------------------------


@cache
def _trained(name: str, bits: int, int8_cache: bool = False) -> sqcompile.Compiled:
    passes: list[Pass] = (
        [QuantizeWeights(weight=Format.parse(f"uint{bits}:group=32:affine"))] if bits < 32 else []
    )
    data = None
    if int8_cache:
        passes.append(QuantizeCache())
        seen = torch.from_numpy(np.load(data_folder() / name / "tokens.npz")["calib"][:8].astype(np.int64))
        data = [{"input_ids": rows} for rows in seen.split(4)]
    return _compiled(data_folder() / name, passes=passes, calibration=data, verify="off")


def _prompt(name: str) -> list[int]:
    tokens = np.load(data_folder() / name / "tokens.npz")["eval"][0, :24]
    return [int(token) for token in tokens]


def _decisive(logits: NDArray[np.float32], bound: float) -> NDArray[np.bool_]:
    """Where the greatest logit is so by more than two errors."""
    ordered = np.sort(logits, -1)
    decisive: NDArray[np.bool_] = ordered[:, -1] - ordered[:, -2] > 2 * bound
    return decisive


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "pycode-llama-5m"])
def test_trained_models_decode_as_the_reference_does(name: str) -> None:
    compiled = _trained(name, 32)
    tokens = [int(token) for token in np.load(data_folder() / name / "tokens.npz")["eval"][0, :96]]
    expected = _whole(compiled.program.run, 1, tokens)
    bound = 1e-3  # float32 sums in other orders, of logits up to 20
    for pieces in ((len(tokens),), (24, 1)):
        found = _in_pieces(compiled.session.generator(), tokens, pieces)  # type: ignore[attr-defined]
        assert np.abs(found - expected).max() < bound
        decisive = _decisive(expected, bound)
        assert decisive.mean() > 0.9
        assert (found.argmax(-1) == expected.argmax(-1))[decisive].all()


@pytest.mark.data
@pytest.mark.parametrize("name", ["stories260K", "pycode-llama-5m"])
def test_trained_models_choose_the_tokens_of_their_program_with_an_int8_cache(name: str) -> None:
    compiled = _trained(name, 4, True)
    prompt = _prompt(name)
    tokens = compiled.generate([prompt], 40)[0]
    logits = _whole(compiled.program.run, 1, tokens)
    bound = 0.02 * float(np.abs(logits).max())  # rounding keys, values and activations at ties
    chosen = logits[np.arange(len(prompt) - 1, len(tokens) - 1), tokens[len(prompt) :]]
    assert (logits[len(prompt) - 1 : -1].max(-1) - chosen < 2 * bound).all()


@pytest.mark.data
@pytest.mark.parametrize(
    ("bits", "int8_cache"),
    [
        pytest.param(32, False, id="32"),
        pytest.param(4, False, id="4"),
        pytest.param(4, True, id="4-int8-cache"),
    ],
)
@pytest.mark.parametrize("name", ["stories260K", "pycode-llama-5m"])
def test_onnxruntime_genai_runs_the_saved_folder(
    name: str, bits: int, int8_cache: bool, tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    compiled = _trained(name, bits, int8_cache)
    compiled.save(tmp_path / "saved")
    prompt = _prompt(name)
    model = genai.Model(str(tmp_path / "saved"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 40, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    ends = json.loads((tmp_path / "saved/genai_config.json").read_text())["model"]["eos_token_id"]
    assert found == compiled.generate([prompt], 40, eos_token_id=ends)[0][: len(found)]
    assert len(found) > len(prompt) + 5


@pytest.mark.data
def test_onnxruntime_genai_reads_the_tokenizer(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    _trained("pycode-llama-5m", 32).save(tmp_path / "saved")
    from transformers import AutoTokenizer

    text = "def fibonacci(n):\n    return"
    ours = AutoTokenizer.from_pretrained(data_folder() / "pycode-llama-5m")
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path / "saved")))
    tokens = [int(token) for token in tokenizer.encode(text)]
    assert tokens == ours(text)["input_ids"]
