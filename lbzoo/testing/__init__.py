"""The optimizer conformance kit: what training expects of an optimizer, as checks for anybody's optimizer.

    from lbzoo.testing import check_optimizer
    failed = [result for result in check_optimizer("./mine.py:Mine") if result.status == "failed"]

``lbzoo optim check ./mine.py:Mine`` does the same on the command line.
"""

from __future__ import annotations

from lbzoo.testing.check import Check as Check
from lbzoo.testing.check import CheckResult as CheckResult
from lbzoo.testing.kit import check_optimizer as check_optimizer
from lbzoo.testing.kit import iterate_checks as iterate_checks
from lbzoo.testing.kit import list_checks as list_checks

__all__ = ["Check", "CheckResult", "check_optimizer", "iterate_checks", "list_checks"]
