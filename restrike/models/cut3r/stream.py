"""Views as they come: what is kept between two of them does not grow with their number."""

from __future__ import annotations

import torch
from torch import Tensor

from restrike.models.cut3r.heads import Predictions
from restrike.models.cut3r.model import CUT3R
from restrike.models.cut3r.sequence import Carry


class Stream:
    """A CUT3R that is given view after view, of one size or of several; without gradients.

    For images alone it says what `CUT3R.forward` says of the whole sequence. It never holds more than the views of a
    call, the state and the memory.

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

    def step(self, images: Tensor | None = None, ray_maps: Tensor | None = None, update: bool = True) -> Predictions:
        """What the next view shows, [B, ...].

        Args:
            images: [B, 3, H, W] in [-1, 1]; None asks what one would see from the ray maps' camera.
            ray_maps: [B, H, W, 6], see `restrike.geometry.cut3r_ray_map`.
            update: Let the view change the state; one without image never does.

        Raises:
            ValueError: neither was given, or the first view has no image.
        """
        image_views, ray_views = (None if x is None else x[:, None] for x in (images, ray_maps))
        return Predictions(*(x[:, 0] for x in self.steps(image_views, ray_views, update=update)))

    @torch.no_grad()
    def steps(
        self,
        images: Tensor | None = None,
        ray_maps: Tensor | None = None,
        image_mask: Tensor | None = None,
        ray_mask: Tensor | None = None,
        update: bool = True,
    ) -> Predictions:
        """What the next few views show, [B, V, ...]: as `step` one after another, but encoded and decoded together.

        Args:
            images: [B, V, 3, H, W].
            ray_maps: [B, V, H, W, 6].
            image_mask: [B, V] bool, views that have an image; None: all, if `images` is given.
            ray_mask: [B, V] bool, views that have a ray map; None: all, if `ray_maps` is given.
            update: As in `step`.

        Raises:
            ValueError: neither was given, or a scene's first view has no image.
        """
        has_first = images is not None and (image_mask is None or bool(image_mask[:, 0].all()))
        if self.carry.is_start and not has_first:
            raise ValueError("the first view of a scene needs an image: it is what ray maps refer to")
        encoded = self.net.encode(images, ray_maps, image_mask, ray_mask, masked_tokens=self.masked_tokens)
        if not update:
            encoded = encoded._replace(updates=torch.zeros(encoded.tokens.shape[:2], dtype=torch.bool).to(self._device))
        tokens, self.carry = self.net.rollout(encoded, self.carry)
        return self.net.predict(tokens, encoded)

    def query(self, ray_maps: Tensor) -> Predictions:
        """What would be seen from a camera, [B, ...]; the state stays as it is."""
        return self.step(None, ray_maps, update=False)

    @property
    def _device(self) -> torch.device:
        return self.carry.state.device
