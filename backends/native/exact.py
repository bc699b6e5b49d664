"""The native backend without roundings that the program does not ask for.

The engine's products take activations as 8-bit codes. Where a program quantizes weights only, `native` rounds
activations to 8 bits; here each is the sum of three roundings, of which one is what the one before left over, so
that 24 bits remain, as of float32. Scales of groups stay float32. Products take up to three times as long: to
compare with the reference, token for token, and where the accuracy of 8-bit activations does not suffice.
"""

from __future__ import annotations

from typing import ClassVar

from sqcompile.backends.native.backend import NativeBackend


class ExactNativeBackend(NativeBackend):
    """Lowers programs to plans that round nothing but what the program rounds; files and sessions are the same."""

    name: ClassVar[str] = "native-exact"
    exact: ClassVar[bool] = True


BACKEND = ExactNativeBackend()
