"""Two random views of an image, as SimCLR and its successors want them.

    random resized crop -> flip -> colour jitter (80 %) -> grey (20 %) -> blur (50 %) -> [0, 1] -> normalised

Source: Chen et al. 2020 (arXiv 2002.05709), appendix A: strength s gives jitter of 0.8 s in brightness, contrast and saturation
and 0.2 s in hue; the blur's kernel is a tenth of the image, its sigma in [0.1, 2]. For CIFAR they take s = 0.5 and no blur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["TwoViews"]

_IMAGE_COLUMNS = ("image", "img", "pixel_values")


class TwoViews:
    """Makes two random views of an image, or of each image of a batch of a `datasets.Dataset`.

        views = TwoViews(32, blur=0.0, strength=0.5)
        views(image)                        # (2, 3, 32, 32): a PIL image, or uint8 (C, H, W)
        images.set_transform(views)         # rows are {"pixel_values": (2, 3, 32, 32)}; Trainer(remove_unused_columns=False)

    Other columns are left out, labels too: nothing that learns from views needs them. Random numbers are torch's own, so
    that `torch.manual_seed` (or Trainer's seed) makes the views again.

    Args:
        size: of the views in pixels: one number, or (height, width).
        scale: least and greatest share of the image's area that a view shows.
        strength: of the colour jitter; 0 leaves it out.
        flip: probability of a horizontal flip.
        jitter: probability of colour jitter.
        grayscale: probability of a grey view.
        blur: probability of a blur.
        mean: subtracted, per channel, from values in [0, 1].
        std: divided by, then.
        column: of the images in a batch; found when None ("image", "img").

    Raises:
        ImportError: torchvision is not installed.
        ValueError: a probability, share or size is out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        strength: float = 1.0,
        flip: float = 0.5,
        jitter: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 0.5,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        column: str | None = None,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"size is {size}, expected pixels, 1 or more.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}, expected two shares of the area, 0 < least <= greatest <= 1.")
        if not strength >= 0:
            raise ValueError(f"strength is {strength}, expected a number >= 0.")
        for name, value in {"flip": flip, "jitter": jitter, "grayscale": grayscale, "blur": blur}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected a probability, 0 to 1.")
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError("TwoViews needs torchvision: pip install 'prior-hub[vision]'") from error
        kernel = [max(3, side // 10 + (side // 10 + 1) % 2) for side in (width, height)]  # odd; torchvision's order
        steps = [v2.RandomResizedCrop((height, width), scale=scale, antialias=True)]
        if flip:
            steps.append(v2.RandomHorizontalFlip(flip))
        if jitter and strength:
            colours = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, min(0.2 * strength, 0.5))
            steps.append(v2.RandomApply([colours], jitter))
        if grayscale:
            steps.append(v2.RandomGrayscale(grayscale))
        if blur:
            steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur))
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        self._view = v2.Compose(steps)
        self._image = v2.Compose([v2.ToImage(), v2.RGB()])
        self.column = column
        self.description: dict[str, Any] = {
            "size": [height, width],
            "scale": list(scale),
            "strength": strength,
            "flip": flip,
            "jitter": jitter,
            "grayscale": grayscale,
            "blur": blur,
        }

    def __call__(self, image: Any) -> Any:
        """Two views (2, 3, height, width) of an image, float32; of a batch {"image": [...]}, {"pixel_values": [views, ...]}.

        Raises:
            KeyError: the batch has no column of images.
        """
        if isinstance(image, Mapping):
            return {"pixel_values": [self(one) for one in image[self._found_column(image)]]}
        # Pictures of four channels may be of any kind; only PIL knows which.
        picture = image.convert("RGB") if hasattr(image, "convert") else image
        whole = self._image(picture)
        return torch.stack([self._view(whole), self._view(whole)])

    def _found_column(self, batch: Mapping[str, Any]) -> str:
        names = _IMAGE_COLUMNS if self.column is None else (self.column,)
        found = next((name for name in names if name in batch), None)
        if found is None:
            raise KeyError(
                f"the batch has columns {list(batch)}, none called {' or '.join(map(repr, names))}: pass TwoViews(column=...), "
                "and remove_unused_columns=False to Trainer, which removes columns that the model's forward does not name."
            )
        return found
