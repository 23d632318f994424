"""Lets torchvision's CUDA-built wheel be imported beside a CPU-only torch, for tests only.

torchvision's compiled operators are then missing, and its import, which describes two of them
to torch, fails; so would torchmetrics' and Lightning's, which import it wherever it is
installed. Declaring these two is enough for data sets and transforms. ``make vision-test``
puts this file into an environment of its own, where Python imports it when it starts.
"""

import sys

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    # The declarations live as long as this object.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
