"""What frameworks change in the process, put back after their tests."""

import contextlib
import os

import numpy as np
import torch


@contextlib.contextmanager
def kept():
    """Environment, patched functions, print options, determinism and threads; one thread inside, as maps are tiny."""
    import cv2
    from PIL import Image

    environment, options = dict(os.environ), np.get_printoptions()
    patched = [(torch, "save"), (torch, "load"), (cv2, "imread"), (cv2, "imwrite"), (cv2, "imshow")]
    patched.append((Image, "open"))
    functions = [getattr(module, name) for module, name in patched]
    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        np.set_printoptions(**options)
        torch.set_printoptions(profile="default")
        for (module, name), function in zip(patched, functions, strict=True):
            setattr(module, name, function)
        torch.use_deterministic_algorithms(is_deterministic)
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv2_threads)
