"""A training run in a process of its own, for the test that kills it: DIR LOG fresh|resume [KILL_AT_STEP]."""

import os
import signal
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from slimkernels.train import SlimmableTrainer
from tests.train import stand_in

STEPS = 23


class Noisy(torch.utils.data.Dataset):
    """Augments with the global generator, as many data sets do."""

    def __init__(self) -> None:
        self.x, self.y = stand_in.data(40).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        return self.x[i] + 0.1 * torch.randn(8), self.y[i]


def main(directory: str, log: str, resume: bool, kill_at: int | None) -> None:
    torch.set_num_threads(1)
    stand_in.install()
    model = stand_in.TinyNet(dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def on_step(step, losses):
        with open(log, "a") as file:
            file.write(f"{step} " + " ".join(f"{w!r}:{loss.item().hex()}" for w, loss in losses.items()) + "\n")
            file.flush()
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    SlimmableTrainer(
        model,
        F.cross_entropy,
        optimizer,
        train_loader=DataLoader(Noisy(), batch_size=6, shuffle=True),
        val_loader=DataLoader(stand_in.data(12, 3), batch_size=6),
        validate_every=4,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS),
        ema=0.9,
        clip_grad=1.0,
        checkpoint_dir=directory,
        checkpoint_every=5,
        progress=False,
        on_step=on_step,
    ).fit(steps=STEPS, resume=resume)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "resume", int(sys.argv[4]) if len(sys.argv) > 4 else None)
