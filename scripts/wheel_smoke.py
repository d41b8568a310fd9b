"""What an installed package has to do anywhere: load its library, compute the loss and its gradient, and compile it."""

from pathlib import Path

import torch

import fbkd_ops
from fbkd_ops import _extension, info

TORCH = f"torch {torch.__version__}"


def terms_and_gradient(student, teacher, loss):
    student = student.clone().requires_grad_()
    total = fbkd_ops.sum_losses(loss([student], [teacher]))
    (gradient,) = torch.autograd.grad(total, student)
    return total.detach(), gradient


def main():
    print(info.report())
    assert _extension.cpu.loaded, _extension.cpu.status
    major = (torch.version.cuda or "none").partition(".")[0]
    if list(Path(fbkd_ops.__file__).parent.glob(f"_cuda{major}.*")):
        assert _extension.cuda.loaded, _extension.cuda.status
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 8, 12, 10, dtype=torch.float64)
    loss = fbkd_ops.FBKDLoss(8, num_levels=1).double()
    found = terms_and_gradient(student, teacher, loss)
    with fbkd_ops.use_backend("reference"):
        expected = terms_and_gradient(student, teacher, loss)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    pool = torch.compile(fbkd_ops.functional.attention_pool, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(pool(student), fbkd_ops.functional.attention_pool(student))
    print(f"smoke: the loss equals its literal formula on {TORCH}")


if __name__ == "__main__":
    main()
