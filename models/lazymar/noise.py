"""Everything random: the order of prediction, and the head's noise."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.mar import MAR


class Noise(Protocol):
    """A source of randomness for one batch.

    orders: LongTensor [B, L], each row a permutation; tokens are predicted from its end to its beginning.
    """

    orders: Tensor

    def draw(self, step: int, num_tokens: int) -> Tensor:
        """Return noise [S + 1 or more, B, num_tokens, C] for an autoregressive step of S denoising steps.

        Tokens are in ascending position. The first entry is where denoising starts, then comes one per denoising step;
        further ones are not used. A solver uses the first entry alone.
        """


class ImageNoise:
    """Noise that depends on each image's seed alone: not on its batch, its place in it, or the number of processes.

    Args:
        model:     the network to be sampled from.
        seed:      of the run.
        indices:   [B] numbers of the images in the run, at least 0.
        num_draws: noise draws per token at each step: one where denoising starts, and one per ancestral step.
        device:    where noise is drawn; another kind of device draws other noise from the same seed.
    """

    def __init__(
        self,
        model: MAR,
        seed: int,
        indices: Sequence[int],
        num_draws: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.token_dim, self.num_draws, self.device = model.token_dim, num_draws, torch.device(device)
        # One seed for the order, then one per autoregressive step, of which there are at most as many as tokens.
        seeds = [
            np.random.SeedSequence([seed, int(index)]).generate_state(1 + model.seq_len, "u8") for index in indices
        ]
        self.step_seeds = [[int(value >> np.uint64(1)) for value in row] for row in seeds]
        generator = torch.Generator()
        self.orders = torch.stack(
            [torch.randperm(model.seq_len, generator=generator.manual_seed(row[0])) for row in self.step_seeds]
        )

    def draw(self, step: int, num_tokens: int) -> Tensor:
        """Return noise as `Noise.draw` describes it, on `device`."""
        noise = torch.empty(self.num_draws, len(self.step_seeds), num_tokens, self.token_dim, device=self.device)
        generator = torch.Generator(self.device)
        for image, seeds in enumerate(self.step_seeds):
            generator.manual_seed(seeds[1 + step])
            shape = (self.num_draws, num_tokens, self.token_dim)
            noise[:, image] = torch.randn(shape, generator=generator, device=self.device)
        return noise
