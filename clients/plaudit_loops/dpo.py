"""Direct preference optimisation: from pairs of responses, without a reward model in the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plaudit_model.interrupt import StopRequest

from .config import DpoConfig
from .data import Encoded
from .loop import Done
from .losses import dpo_loss
from .optim import Trainable
from .policy import Policy, Prompted, Reference
from .sft import Supervised, batches


class Dpo(Supervised[DpoConfig]):
    """The stage of `plaudit dpo`."""

    def __init__(self, policy: Policy, trainable: Trainable, rows: Sequence[Encoded], config: DpoConfig) -> None:
        super().__init__(policy, trainable, rows, config)
        self._reference = Reference(policy)

    def take(self, step: int, stop: StopRequest) -> Done:
        config = self._config
        sums = torch.zeros(4, dtype=torch.float64)
        for part in batches(self.trainable.world.share(self._chosen(step)), config.optim.micro_batch):
            loss, won, lost = self._loss(part)
            torch.autograd.backward(loss.sum() / config.batch_size)
            found = (loss, (won > lost).float(), won, lost)
            sums += torch.stack([value.detach().double().sum().cpu() for value in found])
        norm = self.trainable.update()
        everybody = torch.stack(self.trainable.world.gather([sums])).sum(0) / config.batch_size
        loss_mean, accuracy, chosen_mean, rejected_mean = everybody.tolist()
        values = {"loss": loss_mean, "accuracy": accuracy, "rewards/chosen": chosen_mean,
                  "rewards/rejected": rejected_mean, "rewards/margin": chosen_mean - rejected_mean}  # fmt: skip
        return Done({**values, "grad_norm": norm})

    def _loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and implicit rewards `beta log(pi / ref)` of both responses, each (len(rows),)."""
        pairs = [(row.prompt_ids, row.responses[which]) for which in (0, 1) for row in rows]
        with torch.no_grad(), self._reference.module() as module:
            before_B = self._whole(pairs, module)
        now_B = self._whole(pairs)
        half, beta = len(rows), self._config.beta
        loss = dpo_loss(
            now_B[:half], now_B[half:], before_B[:half], before_B[half:],
            beta=beta, label_smoothing=self._config.label_smoothing,
        )  # fmt: skip
        rewards_B = beta * (now_B.detach() - before_B)
        return loss, rewards_B[:half], rewards_B[half:]

    def _whole(self, pairs: Sequence[Prompted], module: torch.nn.Module | None = None) -> Tensor:
        return self.policy.say(pairs, 1.0, module).logprobs_BR.sum(1)
