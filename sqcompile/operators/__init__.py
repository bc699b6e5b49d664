"""What a program may hold beside ATen: importing this package registers `torch.ops.sqcompile.*`."""

from sqcompile.operators import library as library
