"""`torch.autograd.Function`s in plain PyTorch: the channel term, roots, sums over processes, refused derivatives."""
