"""NovoGrad in a bare accelerate loop: python accelerate_loop.py, or torchrun --nproc_per_node 2 accelerate_loop.py

Data made up on the spot; a few seconds on a CPU. Model and optimizer are prepared in one call, the scheduler is not: a
prepared one steps once a process.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lbzoo

EPOCHS, MICRO_BATCH_SIZE, ACCUMULATION = 5, 64, 4


def main() -> float:
    """Train, and return the last loss."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATION)
    torch.manual_seed(0)
    x = torch.randn(4096, 16)
    y = x[:, :4].sin().sum(1, keepdim=True)
    loader = DataLoader(TensorDataset(x, y), batch_size=MICRO_BATCH_SIZE, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = lbzoo.create_optimizer(model, "novograd", lr=0.05, betas=(0.95, 0.98), weight_decay=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    steps = EPOCHS * -(-len(loader) // ACCUMULATION)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, steps)
    loss = torch.zeros(())
    for epoch in range(EPOCHS):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}, lr {scheduler.get_last_lr()[0]:.2e}")
    return loss.item()


if __name__ == "__main__":
    main()
