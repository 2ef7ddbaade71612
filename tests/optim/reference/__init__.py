"""The update rules once more, in numpy and double precision, one tensor at a time, written from the papers.

Every function takes the tensor ``x``, its gradient ``g``, a dictionary that it may keep state in, and the options under
the names that lbzoo gives them; it returns the new tensor. Nothing of lbzoo or torch is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.bnadamw import bnadamw
from reference.lamb import lamb
from reference.lans import lans
from reference.larc import larc
from reference.lars import lars
from reference.lars2020 import lars2020
from reference.novograd import novograd
from reference.plain import adamw, momentum

Reference = Callable[..., np.ndarray]

REFERENCES: dict[str, Reference] = {
    "bnadamw": bnadamw,
    "lamb": lamb,
    "nlamb": lambda *args, **options: lamb(*args, nesterov="first", **options),
    "nnlamb": lambda *args, **options: lamb(*args, nesterov="both", **options),
    "lans": lans,
    "lars": lars,
    "lars2020": lars2020,
    "novograd": novograd,
    "larc_adamw": larc(adamw),
    "larc_momentum": larc(momentum),
    "larc_lamb": larc(lamb),
}
