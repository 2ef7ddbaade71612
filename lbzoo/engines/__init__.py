"""The engines, and the calls that run a recipe on one."""

from lbzoo.engines.run import RunResult, fit, validate

__all__ = ["RunResult", "fit", "validate"]
