"""What must hold of every program after every pass."""

from sqcompile.verify.invariants import check_masks_kept, check_quantization, check_sparsity
from sqcompile.verify.structure import check_interface, check_level, check_signature, check_structure

__all__ = [
    "check_interface",
    "check_level",
    "check_masks_kept",
    "check_quantization",
    "check_signature",
    "check_sparsity",
    "check_structure",
]
