"""sqcompile: a compiler that makes trained PyTorch models smaller and faster on CPUs, and proves what it did.

compiled = sqcompile.compile(model, passes=[...], example_inputs=(x,))
compiled(x)                  # the model's own call and output structure
print(compiled.report)       # what every pass did, and what it cost
compiled.save("model.onnx")
"""

from sqcompile.api import Compiled, compile, load
from sqcompile.errors import Error
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.remarks import Remark
from sqcompile.report import Report
from sqcompile.tracing import trace

__version__ = "0.1.0"  # the only place: the build reads this line

__all__ = [
    "Compiled",
    "Error",
    "Keeps",
    "Level",
    "Pass",
    "PassContext",
    "PassResult",
    "Program",
    "Remark",
    "Report",
    "compile",
    "load",
    "trace",
]
