"""arXiv 2006.13484, section 3.1: AdamW on the normalised gradient."""

from __future__ import annotations

from reference.lans import normalised
from reference.plain import adamw


def bnadamw(x, g, state, *, norm_eps=0.0, **options):
    return adamw(x, normalised(g, norm_eps), state, **options)
