"""Running update rules, and what they exchange between the ranks.

An update rule is a generator function over lists of tensors. It does what it can with the parts that this rank holds,
yields the :class:`~lbzoo.optim.elementwise.Norms` of those parts, is sent the norms of the whole tensors, and applies
the step::

    def rule(params, grads, ...):
        partial = sweep(kernel, [params, grads, updates], norms_of=[0, 2])
        param_norms, update_norms = yield partial
        add_scaled_(params, (updates, -lr * trust_ratio(param_norms, update_norms)))

So a rule reads from top to bottom and knows nothing of sharding, and the rules of all groups can run side by side:
each round of yields is one all_reduce for the whole model. Where nothing is sharded the parameters go through the rule
in batches, one after another, so that a step needs little memory beyond the state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lbzoo.optim.batch import Batch
from lbzoo.optim.elementwise import Norms
from lbzoo.optim.layer_stats import LayerStats
from lbzoo.sharding import reduce_over_shards

# What a rule says of its tensors where it is asked to, [tensors] each: "step_norm" |step|; "trust_ratio", or
# "direction_norm" |u| where the rule applies none; and what else it knows.
Report: TypeAlias = dict[str, Tensor]
Rule: TypeAlias = Generator[Norms, Any, Report]


def run_batches(batches: Sequence[Batch], process: Callable[[Batch], Rule]) -> list[tuple[Batch, Report]]:
    """Run ``process`` on every batch: those with sharded parameters side by side, the others one after another."""
    joint = [batch for batch in batches if batch.shards]
    reports = [(batch, _run_alone(process(batch))) for batch in batches if not batch.shards]
    reports += zip(joint, _run_side_by_side(joint, [process(batch) for batch in joint]), strict=True)
    return reports


def _run_alone(rule: Rule) -> Report:
    answer: Tensor | None = None
    try:
        while True:
            request = rule.send(answer)
            answer = request.root(request.parts)
    except StopIteration as end:
        report: Report = end.value
        return report


def _run_side_by_side(batches: Sequence[Batch], rules: Sequence[Rule]) -> list[Report]:
    """Run the rules to their ends. What they yield in a round is exchanged between the ranks at once."""
    reports: dict[int, Report] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(rules)))
    while answers:
        requests: dict[int, Norms] = {}
        for index, answer in answers.items():
            try:
                requests[index] = rules[index].send(answer)
            except StopIteration as end:
                reports[index] = end.value
        answers = _exchange(batches, requests)
    return [reports[index] for index in range(len(rules))]


def _exchange(batches: Sequence[Batch], requests: dict[int, Norms]) -> dict[int, Tensor | None]:
    """The norms of the whole tensors: one all_reduce for all requests over the same shards with the same operation."""
    answers: dict[int, Tensor | None] = {}
    together: dict[Any, list[int]] = {}
    for index, request in requests.items():
        key = (batches[index].shards, request.reduce_op, request.parts.device)
        together.setdefault(key, []).append(index)
    for (shards, op, _), indices in together.items():
        blocks = [_spread(requests[index].parts, batches[index]) for index in indices]
        flat = torch.cat([block.reshape(-1) for block in blocks])
        reduced = reduce_over_shards(flat, shards, op).split([block.numel() for block in blocks])
        for index, block, values in zip(indices, blocks, reduced, strict=True):
            parts = _gather(values.view_as(block), batches[index]).to(requests[index].parts.dtype)
            answers[index] = requests[index].root(parts)
    return answers


def _spread(parts: Tensor, batch: Batch) -> Tensor:
    """[rows, width], the same shape on every rank; 0 where this rank has no gradient."""
    if batch.width == len(batch.columns):
        return parts.double()
    spread = torch.zeros(len(parts), batch.width, dtype=torch.float64, device=parts.device)
    if batch.columns:
        spread[:, batch.columns] = parts.double()
    return spread


def _gather(values: Tensor, batch: Batch) -> Tensor:
    """The columns of this rank's tensors; zeros for the stand-in of a batch that has none."""
    if batch.width == len(batch.columns):
        return values
    return values[:, batch.columns] if batch.columns else values.new_zeros(len(values), 1)


def collect_reports(reports: Sequence[tuple[Batch, Report]], param_groups: Sequence[dict[str, Any]]) -> LayerStats:
    """One row a tensor, in the order of the groups, whatever the order of the batches. Nothing is read back."""
    rows: dict[tuple[int, int], dict[str, Tensor]] = {}
    for batch, report in reports:
        columns = {key: values.unbind() for key, values in report.items()}
        for index, place in enumerate(batch.places):
            rows[place] = {key: values[index] for key, values in columns.items()}
    if not rows:
        return LayerStats()
    places = sorted(rows)
    first = rows[places[0]]
    device = next(iter(first.values())).device
    values = {key: torch.stack([rows[place][key].to(device) for place in places]).float() for key in first}
    return LayerStats([param_name(param_groups, *place) for place in places], values)


def param_name(param_groups: Sequence[dict[str, Any]], group: int, position: int) -> str:
    """As in ``named_parameters`` where the group knows it, else such as "group0.3"."""
    names = param_groups[group].get("param_names")
    return str(names[position]) if names else f"group{group}.{position}"
