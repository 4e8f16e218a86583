"""Models of Keras 2 and 3 (`.keras`, `.h5`, weights alone), without Keras, and tuned weights back into the file."""

from lockstep.interop.keras.live import from_keras
from lockstep.interop.keras.reader import read_keras
from lockstep.interop.keras.writer import save_keras

__all__ = ["from_keras", "read_keras", "save_keras"]
