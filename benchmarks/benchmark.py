"""What ``kernels benchmark`` times: functions of the package on maps of an 800x1344 image, beside the literal formulas.

The Hub keeps this file without the rest of the repository. So it repeats what it shares with benchmarks/inputs.py: the
shapes, and how far a result may be from the literal formula's.
"""

import torch
from kernels.benchmark import Benchmark

LEVELS = {"P3": (1, 256, 100, 168), "P4": (1, 256, 50, 84), "P5": (1, 256, 25, 42), "P6": (1, 256, 13, 21)}
TOLERANCE = 1e-4  # largest error of an element in float32, relative to its size and the RMS of its tensor
# ``kernels benchmark`` allows errors of 1e-2: that is the tolerance in a tensor of this RMS.
RMS = 1e-2 / TOLERANCE


class FBKDBenchmark(Benchmark):
    """Forward and backward pass of each function; ``out`` is the gradient of the finest map."""

    seed = 0

    def setup_attention_pool(self):
        """P3, the gradients of all four means."""
        function = self.kernel.functional.attention_pool
        self._prepare(lambda x: sum((mean * mean).sum() for mean in function(x)), self._map("P3"))

    def benchmark_attention_pool(self):
        self.out = self._gradient()

    def verify_attention_pool(self):
        return self._literal_gradient()

    def setup_masked_l2_loss(self):
        """P3 and a spatial mask."""
        function, mask = self.kernel.functional.masked_l2_loss, torch.rand(1, *LEVELS["P3"][2:], device=self.device)
        teacher = self._map("P3")
        self._prepare(lambda student: function(student, teacher, mask), self._map("P3"))

    def benchmark_masked_l2_loss(self):
        self.out = self._gradient()

    def verify_masked_l2_loss(self):
        return self._literal_gradient()

    def setup_loss(self):
        """All terms of P4..P6."""
        loss = self.kernel.FBKDLoss(256, num_levels=3, preset="two_stage").to(self.device)
        for parameter in loss.parameters():  # where those of BatchNorm are 0, as at first, its block is the identity
            parameter.data = self._on_grid(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
        finest, *coarser = (self._map(level) for level in ("P4", "P5", "P6"))
        teachers = [self._map(level) for level in ("P4", "P5", "P6")]
        self._prepare(lambda student: sum(loss([student, *coarser], teachers).values()), finest)

    def benchmark_loss(self):
        self.out = self._gradient()

    def verify_loss(self):
        return self._literal_gradient()

    def _map(self, level: str) -> torch.Tensor:
        return self._on_grid(torch.randn(LEVELS[level], device=self.device))

    @staticmethod
    def _on_grid(x: torch.Tensor) -> torch.Tensor:
        """Round to values whose products are exact, so that max-pools have the same winners in every implementation."""
        return (64 * x).round() / 64

    def _prepare(self, function, x: torch.Tensor) -> None:
        """Set the call to be timed, and the gradient at its result that gives the one of ``x`` the RMS above."""
        self.function, self.x, self.upstream = function, x.requires_grad_(), torch.ones((), device=self.device)
        self.upstream = RMS / self._literal_gradient().square().mean().sqrt()

    def _gradient(self) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(self.function(self.x), self.x, self.upstream)
        return gradient

    def _literal_gradient(self) -> torch.Tensor:
        with self.kernel.use_backend("reference"):
            return self._gradient()
