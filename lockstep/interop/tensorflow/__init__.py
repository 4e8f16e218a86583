"""Files of TensorFlow, without TensorFlow: checkpoints of every age; and its graphs through tf2onnx in another interpreter."""

from lockstep.interop.tensorflow.bundle import read_checkpoint

__all__ = ["read_checkpoint"]
