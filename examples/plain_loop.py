"""LAMB with a global batch of 512 in a plain PyTorch loop, with its trust ratios: python plain_loop.py

Scanned digits that ship with scikit-learn; a few seconds on a CPU.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import lbzoo
from lbzoo.schedules import build_schedule

GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, STEPS = 512, 128, 60


def main() -> float:
    """Train, and return the accuracy on the digits that were held out."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, held_out = torch.randperm(len(x)).tensor_split([1500])

    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
    optimizer = lbzoo.create_optimizer(
        model,
        "lamb",
        lr=0.05,
        weight_decay=0.01,
        param_rules=[{"match": ["*.bias", "1.*"], "weight_decay": 0.0, "adapt": False}],  # biases and LayerNorm
    )
    schedule = build_schedule("cosine", steps=STEPS, steps_per_epoch=1500 / GLOBAL_BATCH_SIZE, warmup_ratio=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule(min(done + 1, STEPS)))

    for step in range(STEPS):
        batch = train[torch.randperm(len(train))[:GLOBAL_BATCH_SIZE]]
        for part in batch.split(MICRO_BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            (loss * len(part) / len(batch)).backward()
        optimizer.track_layer_stats = logged = step % 20 == 19  # costs an extra pass: in logged steps only
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if logged:
            stats = optimizer.layer_stats()
            ratios = dict(zip(stats.names, stats.values["trust_ratio"].tolist(), strict=True))
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name.endswith("weight"))
            print(f"step {step + 1}: loss {loss.item():.3f}, trust ratios: {shown}")

    accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
