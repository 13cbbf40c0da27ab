"""Views as they come: what is kept between two of them does not grow with their number."""

from __future__ import annotations

import torch
from torch import Tensor

from restrike.models.cut3r.heads import Predictions
from restrike.models.cut3r.model import CUT3R
from restrike.models.cut3r.sequence import Carry


class Stream:
    """A CUT3R that is given view after view, of one size or of several; without gradients.

    For images alone it says what `CUT3R.forward` says of the whole sequence. It never holds more than one view, the
    state and the memory.

    Args:
        net: In eval mode.
        batch: Scenes that are seen side by side.
        masked_tokens: A view without image gets the masked image token, as in training. The released stream adds
            nothing in its place, which no training has shown the model.
    """

    def __init__(self, net: CUT3R, batch: int = 1, masked_tokens: bool = True) -> None:
        self.net, self.batch, self.masked_tokens = net, batch, masked_tokens
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the scene; the next view's camera becomes the world."""
        self.carry: Carry = self.net.start(self.batch)

    @torch.no_grad()
    def step(self, images: Tensor | None = None, ray_maps: Tensor | None = None, update: bool = True) -> Predictions:
        """What the next view shows, [B, ...].

        Args:
            images: [B, 3, H, W] in [-1, 1]; None asks what one would see from the ray maps' camera.
            ray_maps: [B, H, W, 6], see `restrike.geometry.cut3r_ray_map`.
            update: Let the view change the state; one without image never does.

        Raises:
            ValueError: neither was given, or the first view has no image.
        """
        if images is None and self.carry.is_start:
            raise ValueError("the first view of a scene needs an image: it is what ray maps refer to")
        images, ray_maps = (None if x is None else x[:, None] for x in (images, ray_maps))
        encoded = self.net.encode(images, ray_maps, masked_tokens=self.masked_tokens)
        if not update:
            encoded = encoded._replace(updates=torch.zeros(self.batch, 1, dtype=torch.bool, device=self._device))
        tokens, self.carry = self.net.rollout(encoded, self.carry)
        return Predictions(*(x[:, 0] for x in self.net.predict(tokens, encoded)))

    def query(self, ray_maps: Tensor) -> Predictions:
        """What would be seen from a camera, [B, ...]; the state stays as it is."""
        return self.step(None, ray_maps, update=False)

    @property
    def _device(self) -> torch.device:
        return self.carry.state.device
