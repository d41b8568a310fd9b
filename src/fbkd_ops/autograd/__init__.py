"""One ``torch.autograd.Function`` for each op that has kernels."""
