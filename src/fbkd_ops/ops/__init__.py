"""One file for each op: its schemas, its fakes, its `torch.autograd.Function`."""
