"""The engine without Python: sqrun, the C interface, mutated files under sanitizers, and Arm."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_programs import images_program, sounds_program
from support.native_build import SOURCE, run, tool
from torch import Tensor, nn

import sqcompile
from sqcompile.backends.native.backend import BACKEND
from sqcompile.tracing import trace

GOLDEN = Path(__file__).parent / "data" / "golden.sqm"
GENERATION = GOLDEN.with_name("generation.sqm")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's mmap and cross compilers"),
]

Build = Callable[[str], Path]

CLIENT = r"""
#include <sqcompile.h>
#include <stdio.h>

int main(int argc, char** argv) {
  const int64_t ids[6] = {0, 1, 2, 3, 4, 5};
  sqc_tensor input = {SQC_I64, 2, {2, 3}, ids}, output;
  sqc_model* model = NULL;
  sqc_session* session = NULL;
  sqc_status status = sqc_model_open(argv[argc - 1], &model);
  if (status.code == SQC_OK) status = sqc_session_create(model, 2, &session);
  sqc_model_close(model); /* the session keeps what it needs */
  if (status.code == SQC_OK) status = sqc_session_output(session, 0, &output);
  if (status.code == SQC_INVALID_ARGUMENT) status = sqc_session_run(session, &input, 1);
  if (status.code == SQC_OK) status = sqc_session_output(session, 0, &output);
  if (status.code == SQC_OK) {
    for (int i = 0; i < 5; ++i) printf("%.9g ", ((const float*)output.data)[i]);
    status = sqc_session_run(session, &input, 2);
  }
  printf("%d %s\n", (int)status.code, status.message);
  sqc_session_destroy(session);
  return 0;
}
"""


GENERATING_CLIENT = r"""
#include <sqcompile.h>
#include <stdio.h>

static int take(void* user, int64_t row, int64_t token) {
  printf("%d:%d ", (int)row, (int)token);
  return --*(int*)user > 0;
}

int main(int argc, char** argv) {
  const int64_t ids[5] = {10, 4, 5, 6, 0};
  const sqc_text texts[2] = {{0, ids, 5}, {1, ids, 2}};
  const sqc_sampling sampling = {4, 0.0f, 0, 1.0f, 0, NULL, 0};
  const float* logits = NULL;
  int64_t count = 0;
  int left = 5;
  sqc_model* model = NULL;
  sqc_generator* generator = NULL;
  sqc_status status = sqc_model_open(argv[argc - 1], &model);
  if (status.code == SQC_OK) status = sqc_generator_create(model, 2, 2, 9, SQC_KV_I8, &generator);
  if (status.code == SQC_OK) {
    printf("%d %d\n", (int)sqc_model_limit(model), (int)sqc_model_vocabulary(model));
    status = sqc_generator_logits(generator, 0, &logits, &count);
  }
  sqc_model_close(model); /* the generator keeps what it needs */
  if (status.code == SQC_INVALID_ARGUMENT) {
    status = sqc_generator_generate(generator, texts, 2, &sampling, take, &left);
    printf("\n%d %d\n", (int)sqc_generator_length(generator, 0), (int)sqc_generator_length(generator, 1));
  }
  if (status.code == SQC_OK) status = sqc_generator_rewind(generator, 0, 1);
  if (status.code == SQC_OK) status = sqc_generator_feed(generator, texts + 1, 1);
  if (status.code == SQC_OK) status = sqc_generator_logits(generator, 1, &logits, &count);
  for (int i = 0; i < 2 && status.code == SQC_OK; ++i) status = sqc_generator_feed(generator, texts, 2);
  printf("%d %d %s\n", (int)count, (int)status.code, status.message);
  sqc_generator_destroy(generator);
  return 0;
}
"""


class Many(nn.Module):
    """Operators of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.patches = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        ids = (x[:, :, 0] > 0).to(torch.int64)
        mask = (x > 0) & (x < 1)
        return [
            self.table(ids),
            self.patches(x[:, None]),
            x @ x.transpose(1, 2),
            x.gather(1, ids[:, :, None]),
            x[:, ids[0]],
            torch.where(mask, x, 0.0).permute(2, 0, 1)[3:11:2],
            torch.cat([x, x[:, -2:]], 1).reshape(2, 7 * 16),
            x.sum((0, 2)) + x.mean((0, 2)) + x.amax((0, 2)),
            x.argmax(-1) + ids.cumsum(1),
            mask.any(1),
            *x.topk(3, -1),
            x.softmax(1) * x.abs().sqrt().sin(),
            x.unsqueeze(1).expand(2, 3, 5, 16) + torch.arange(3)[:, None, None],
        ]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / "ids.npy"
    np.save(path, (np.arange(12) % 11).reshape(3, 4))
    return path


def expected() -> np.ndarray:
    result: np.ndarray = np.load(GOLDEN.with_name("golden.npy"))
    return result


def close(result: np.ndarray) -> bool:
    """Within the last bits of exp and the like, which are the C library's own."""
    return bool(np.abs(result - expected()).max() <= 2e-6 * np.abs(expected()).max())


def test_sqrun_runs_a_file_on_arrays(native_build: Build, ids: Path, tmp_path: Path) -> None:
    sqrun = native_build("plain") / "sqrun"
    info = run(sqrun, GOLDEN, "--info").splitlines()
    assert info[0] == "input  ids: i64[?, ?]" and info[1].startswith("output ")
    name = info[1].removeprefix("output ").split(":")[0]
    run(sqrun, GOLDEN, ids, "--threads", "2", "--out", tmp_path)
    assert close(np.load(tmp_path / f"{name}.npy"))
    (tmp_path / f"{name}.npy").unlink()
    printed = run(sqrun, GOLDEN, f"ids={ids}", "--out", tmp_path, "--repeat", "3", SQCOMPILE_ISA="scalar")
    assert "median of 3 runs" in printed and "scalar" in printed
    assert close(np.load(tmp_path / f"{name}.npy"))


def test_sqrun_says_what_is_wrong(native_build: Build, ids: Path, tmp_path: Path) -> None:
    sqrun = native_build("plain") / "sqrun"
    cut, wide, wrong = tmp_path / "cut.sqm", tmp_path / "wide.npy", tmp_path / "wrong.npy"
    cut.write_bytes(GOLDEN.read_bytes()[:5000])
    np.save(wide, np.full((1, 3), 11))
    np.save(wrong, np.zeros((1, 3), np.float32))
    cases: list[tuple[list[str | Path], int, str]] = [
        ([], 2, "usage: sqrun"),
        ([GOLDEN, "--threads", "x", ids], 2, "usage: sqrun"),
        ([tmp_path / "none.sqm", ids], 1, "cannot open"),
        ([cut, ids], 1, "the file is damaged: it has 5000 bytes"),
        ([GOLDEN], 1, "0 inputs were given; the model takes 1"),
        ([GOLDEN, tmp_path / "none.npy"], 1, "none.npy: cannot be opened"),
        ([GOLDEN, GOLDEN], 1, "is no .npy file"),
        ([GOLDEN, wrong], 1, "input 'ids' is f32 with 2 dimensions; the model takes i64 with 2"),
        ([GOLDEN, wide], 1, "index 11 is out of range for a dimension of 11"),
        ([GOLDEN, ids, "--out", tmp_path / "missing"], 1, "cannot be written"),
    ]
    for arguments, code, text in cases:
        assert text in run(sqrun, *arguments, code=code)
    assert "no instruction set is called 'avx9'" in run(sqrun, GOLDEN, ids, code=1, SQCOMPILE_ISA="avx9")


def test_the_c_interface_from_c(native_build: Build, tmp_path: Path) -> None:
    folder = native_build("plain")
    source, client = tmp_path / "client.c", tmp_path / "client"
    source.write_text(CLIENT)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{SOURCE / 'include'}"]
    run(tool("cc"), *flags, source, f"-L{folder}", "-lsqcompile", f"-Wl,-rpath,{folder}", "-o", client)
    *numbers, code, message = run(client, GOLDEN).split(maxsplit=6)
    assert np.isfinite([float(number) for number in numbers]).all() and len(numbers) == 5
    assert (code, message.strip()) == ("1", "2 inputs were given; the model takes 1")
    assert run(client, tmp_path / "none.sqm").startswith("6 cannot open")


def test_sqrun_continues_texts(native_build: Build, tmp_path: Path) -> None:
    sqrun = native_build("plain") / "sqrun"
    generator = sqcompile.load(GENERATION, threads=1)
    prompts = [[1, 2, 3], [10, 4, 5, 6, 0]]
    expected = [
        text[len(prompt) :] for text, prompt in zip(generator.generate(prompts, 8), prompts, strict=True)
    ]
    lines = [" ".join(map(str, tokens)) for tokens in expected]
    assert "generates texts of up to 16 tokens" in run(sqrun, GENERATION, "--info")
    printed = run(sqrun, GENERATION, "--generate", "8", "1,2,3", "10,4,5,6,0", "--threads", "2")
    assert printed.splitlines()[:2] == lines and "8 tokens of prompts" in printed
    np.save(tmp_path / "prompt.npy", np.array(prompts[:1]))
    for prompt in ("1,2,3", tmp_path / "prompt.npy"):
        assert lines[0] in run(sqrun, GENERATION, "--generate", "8", prompt, SQCOMPILE_ISA="scalar")
    stop = str(expected[0][2])
    short = lines[0].split(" ")[: expected[0].index(expected[0][2]) + 1]
    assert " ".join(short) + "\n" in run(sqrun, GENERATION, "--generate", "8", "1,2,3", "--stop", stop)
    drawn = ["--temperature", "1.5", "--top-k", "6", "--top-p", "0.9", "--seed", "5"]
    same = generator.generate(prompts[:1], 8, temperature=1.5, top_k=6, top_p=0.9, seed=5)[0][3:]
    assert " ".join(map(str, same)) in run(sqrun, GENERATION, "--generate", "8", "1,2,3", *drawn)
    assert run(sqrun, GENERATION, "--generate", "8", "1,2,3", "--kv", "int8")
    cases: list[tuple[list[str | Path], int, str]] = [
        ([GENERATION, "--generate", "x", "1"], 2, "usage: sqrun"),
        ([GENERATION, "--generate", "3", "--kv", "f64", "1"], 2, "usage: sqrun"),
        ([GENERATION, "--generate", "3"], 1, "there is no prompt"),
        ([GENERATION, "--generate", "3", "1,x"], 1, "a prompt is a list of token ids"),
        ([GENERATION, "--generate", "3", "11"], 1, "token 0 of row 0 is 11; the vocabulary has 11"),
        ([GENERATION, "--generate", "16", "1"], 0, "16 new ones"),
        ([GENERATION, "--generate", "17", "1"], 1, "a row for 17 tokens; the model takes 1 to 16"),
        ([GENERATION, "--generate", "3", "1", "--top-p", "2"], 1, "top_p is not above 0 and at most 1"),
        ([GOLDEN, "--generate", "3", "1"], 1, "the model has no plan that continues texts"),
    ]
    for arguments, code, text in cases:
        assert text in run(sqrun, *arguments, code=code)


def test_generation_from_c(native_build: Build, tmp_path: Path) -> None:
    folder = native_build("plain")
    source, client = tmp_path / "client.c", tmp_path / "client"
    source.write_text(GENERATING_CLIENT)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{SOURCE / 'include'}"]
    run(tool("cc"), *flags, source, f"-L{folder}", "-lsqcompile", f"-Wl,-rpath,{folder}", "-o", client)
    ports, tokens, lengths, end = run(client, GENERATION).splitlines()
    assert ports == "16 11"
    assert [token.split(":")[0] for token in tokens.split()] == ["0", "1", "0", "1", "0"]
    assert lengths == "7 4"
    message = "the cache overflows: 5 tokens do not fit behind the 6 of row 0, which has room for 9"
    assert end == f"11 1 {message}"
    assert run(client, GOLDEN).endswith("0 2 the model has no plan that continues texts\n")


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the operators that the golden one does not have."""
    model = Many().eval()
    program = trace(model, (torch.linspace(-2, 2, 160).reshape(2, 5, 16),))
    path = tmp_path_factory.mktemp("model") / "operators.sqm"
    BACKEND.lower(program).save(path)
    return path


@pytest.fixture(scope="module")
def files(operators: Path) -> list[Path]:
    """Files that together have every operator: those of images in codes, too."""
    made = []
    for make in (images_program, sounds_program):
        made.append(operators.with_name(f"{make.__name__}.sqm"))
        BACKEND.lower(make()).save(made[-1])
    return [GOLDEN, GENERATION, operators, *made]


@pytest.mark.long
def test_mutated_files_under_sanitizers(native_build: Build, files: list[Path]) -> None:
    """Opened and run, with right checksums, whatever they say: no crash, no byte read outside."""
    folder = native_build("address")
    options = "allocator_may_return_null=1:max_allocation_size_mb=512"
    for path in files:
        printed = run(folder / "sqc_fuzz", path, "20000", ASAN_OPTIONS=options)
        mutations, opened = (int(word) for word in printed.replace(",", "").split() if word.isdigit())
        assert mutations == 20000 and opened > 1000


@pytest.mark.long
def test_files_that_libfuzzer_finds(native_build: Build, files: list[Path], tmp_path: Path) -> None:
    """What mutations at random do not reach: inputs are kept that reach new code, and mutated on."""
    folder = native_build("fuzzer")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in files:
        shutil.copy(path, corpus)
    options = "allocator_may_return_null=1:max_allocation_size_mb=512"
    limits = ("-max_total_time=30", "-max_len=65536", "-rss_limit_mb=4096", "-timeout=20", "-seed=1")
    printed = run(folder / "sqc_fuzz", *limits, f"-artifact_prefix={tmp_path}/", corpus, ASAN_OPTIONS=options)
    kept = [int(found) for found in re.findall(r"corp: (\d+)", printed)]
    assert kept[-1] > 10  # it has gone beyond the files that it was given


@pytest.mark.long
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
def test_arm_runs_the_same_file(native_build: Build, ids: Path, tmp_path: Path) -> None:
    emulator = tool("qemu-aarch64")
    folder = native_build("arm")
    for isa in ("scalar", "neon_dotprod"):
        printed = run(
            emulator, folder / "sqrun", GOLDEN, ids, "--out", tmp_path, "--repeat", "2", SQCOMPILE_ISA=isa
        )
        assert isa in printed
        (path,) = tmp_path.glob("*.npy")
        assert close(np.load(path))
        path.unlink()
