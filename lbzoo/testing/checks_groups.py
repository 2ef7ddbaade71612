"""Parameter groups: options of their own, state of their own, and read anew at every step."""

from __future__ import annotations

import torch
from torch import nn

from lbzoo.testing.check import check, expect, skip
from lbzoo.testing.example import Example, backward, expect_close, expect_moved, expect_same, train, weights
from lbzoo.testing.subject import Subject

GROUPS = (("embedding0",), ("conv0", "head0"))


def group_parameters(model: Example, group: int) -> list[nn.Parameter]:
    """The parameters of the first or the second half of the example."""
    return [parameter for layer in GROUPS[group] for parameter in model.layers[layer].parameters()]


@check()
def group_options(subject: Subject) -> None:
    """Layer-wise learning rates and "no weight decay for biases" are group options: an optimizer that reads its
    defaults instead trains everything alike.
    """
    for option, values in {"lr": (0.1, 1e-4), "weight_decay": (0.1, 0.3)}.items():
        if not subject.takes(option):
            continue
        pair = [nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]])) for _ in values]
        optimizer = subject.build([{"params": [p], option: v} for p, v in zip(pair, values, strict=True)])
        for _ in range(2):
            for parameter in pair:
                parameter.grad = torch.tensor([[0.3, 0.2, -0.1]])
            optimizer.step()
        expect(not torch.equal(*pair), f"groups with {option}={values[0]} and {option}={values[1]} were trained alike")


@check()
def groups_are_independent(subject: Subject) -> None:
    """A step counter or buffer that groups share advances once a group: bias correction, and so the whole training,
    then depends on how the parameters were sorted.
    """
    together, apart = Example(), Example()
    both = subject.build([{"params": group_parameters(together, group)} for group in (0, 1)])
    train(together, both, range(4))
    separate = [subject.build([{"params": group_parameters(apart, group)}]) for group in (0, 1)]
    for step in range(4):
        backward(apart, step)
        for optimizer in separate:
            optimizer.step()
    expect_same(weights(together), weights(apart), "two groups in one optimizer against two optimizers")


@check()
def parameters_are_read_from_groups(subject: Subject) -> None:
    """accelerate and FSDP2 put other parameters into the groups after construction: an optimizer that kept the ones it
    was given trains tensors that no model uses.
    """
    model = Example()
    start = weights(model)
    optimizer = subject.build([{"params": [nn.Parameter(p.detach().clone()) for p in model.parameters()]}])
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, range(1))
    expect_moved(model, start, "parameters put into the group after construction")


@check()
def late_group(subject: Subject) -> None:
    """Gradual unfreezing adds a group in the middle of training; its moments and bias correction must begin there."""
    model, alone = Example(), Example()
    optimizer = subject.build([{"params": group_parameters(model, 0)}])
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": group_parameters(model, 1)})
    train(model, optimizer, range(2, 5))
    train(alone, subject.build([{"params": group_parameters(alone, 1)}]), range(2, 5))
    before, now = weights(alone), weights(model)
    late = [name for name in before if name.split(".")[1] in GROUPS[1]]
    expect_same({n: now[n] for n in late}, {n: before[n] for n in late}, "a group added after two steps")


@check()
def lr_as_tensor(subject: Subject) -> None:
    """torch.compile and CUDA graphs need the learning rate as a tensor that a scheduler fills in place: an optimizer
    that turns it into a number keeps the first one.
    """
    need_lr(subject)
    model, expected = Example(), Example()
    rate = torch.tensor(0.1)
    optimizer, plain = subject.build(model, lr=rate), subject.build(expected, lr=0.1)
    for step, value in enumerate((0.1, 0.001, 0.01)):
        rate.fill_(value)
        plain.param_groups[0]["lr"] = rate.item()
        for trained, trainer in ((model, optimizer), (expected, plain)):
            backward(trained, step)
            trainer.step()
        # Where the group holds a copy, a scheduler would fill that one.
        rate = next((g["lr"] for g in optimizer.param_groups if isinstance(g["lr"], torch.Tensor)), rate)
    start = weights(Example())
    expect_close(weights(model), weights(expected), start, "lr as a tensor against lr as a number", tolerance=1e-5)


@check()
def lr_scheduler(subject: Subject) -> None:
    """Schedulers write group["lr"] between steps: an optimizer that copied it trains at a constant rate."""
    need_lr(subject)
    model, constant = Example(), Example()
    optimizer = subject.build(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.001**step)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    train(constant, subject.build(constant), range(3))
    for (name, scheduled), unscheduled in zip(model.named_parameters(), constant.parameters(), strict=True):
        expect(not torch.equal(scheduled, unscheduled), f"{name} is what it is without the schedule")


def need_lr(subject: Subject) -> None:
    """Skip the running check for optimizers that find their own learning rate."""
    if not subject.takes("lr"):
        skip("takes no lr")
