"""Settings on real data: shipped inside Python packages, or read from local copies."""

from mupjax.data.arrays import classification, digits
from mupjax.data.images import Augmentation, cifar10, mix_up, random_resized_crop

__all__ = [
    "Augmentation",
    "cifar10",
    "classification",
    "digits",
    "mix_up",
    "random_resized_crop",
]
