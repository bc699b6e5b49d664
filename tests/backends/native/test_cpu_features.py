"""The C++ detection against what the Linux kernel says about the same CPU."""

import os
import platform
from pathlib import Path

import pytest

from sqcompile.backends.native import cpu_features

CPUINFO = Path("/proc/cpuinfo")

# The kernel's names where ours follow the architecture's.
KERNEL_NAMES = {"avx512_vbmi": "avx512vbmi", "dotprod": "asimddp"}

ARM_FLAGS = {"dotprod", "i8mm", "sve"}


def read_cpuinfo() -> dict[str, str]:
    """The first processor's fields."""
    first = CPUINFO.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines())
    return {key.strip(): value.strip() for key, value in pairs}


needs_cpuinfo = pytest.mark.skipif(not CPUINFO.exists(), reason="needs Linux's /proc/cpuinfo")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 fields of /proc/cpuinfo")


@needs_cpuinfo
@pytest.mark.parametrize("flag", sorted(cpu_features().flags))
def test_flag_agrees_with_the_kernel(flag: str) -> None:
    fields = read_cpuinfo()
    kernel_flags = set((fields.get("flags") or fields.get("Features") or "").split())
    assert kernel_flags, "no flags in /proc/cpuinfo"
    assert cpu_features().flags[flag] == (KERNEL_NAMES.get(flag, flag) in kernel_flags)


def test_other_architectures_flags_are_off() -> None:
    features = cpu_features()
    assert features.architecture == {"AMD64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine(), platform.machine()
    )
    set_flags = {name for name, is_set in features.flags.items() if is_set}
    if features.architecture == "x86_64":
        assert not set_flags & ARM_FLAGS
    else:
        assert set_flags <= ARM_FLAGS


@needs_cpuinfo
@needs_x86
def test_identity_agrees_with_the_kernel() -> None:
    features, fields = cpu_features(), read_cpuinfo()
    assert features.vendor == fields["vendor_id"]
    assert features.family == int(fields["cpu family"])
    assert features.model == int(fields["model"])
    # The kernel squeezes runs of blanks inside the brand string.
    assert " ".join(features.brand.split()) == " ".join(fields["model name"].split())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs an affinity mask")
def test_core_counts_follow_the_affinity_mask() -> None:
    features = cpu_features()
    assert features.logical_cores == len(os.sched_getaffinity(0))
    assert 1 <= features.physical_cores <= features.logical_cores


def test_cache_sizes_agree_with_the_kernel() -> None:
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    expected = {}
    for index in caches.glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            kibibytes = int((index / "size").read_text().rstrip("K\n"))
            expected[int((index / "level").read_text())] = kibibytes * 1024
    if not expected:
        pytest.skip("the kernel lists no caches here")
    features = cpu_features()
    seen = {1: features.l1_bytes, 2: features.l2_bytes, 3: features.l3_bytes}
    assert {level: seen[level] for level in expected} == expected


def test_unknown_flag_is_an_error() -> None:
    with pytest.raises(KeyError):
        cpu_features().flags["avx1024"]
