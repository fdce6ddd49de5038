"""Whether the samples of a packed row see one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe.packing import Packing

_TOLERANCE, _LOOSE = 1e-4, 5e-2


def signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """How a model is called, as far as its masks may follow from it: with what, and which switches."""
    named = ((name, value if isinstance(value, bool) else None) for name, value in kwargs.items() if value is not None)
    return (len(args), *sorted(named, key=lambda item: item[0]))


@dataclass(eq=False)
class Company:
    """One forward pass over a packed batch, and a look at what each sample's loss depends on.

    At the first values that have a row for each position, an embedding's, the gradient of Σ_b c_b ℓ_b must be c_b times
    that of Σ_b ℓ_b at the positions of sample b, and 0 where a position is nobody's; for numbers c_b that all differ.
    Any attention across a border shows, whichever layers are tapped.
    """

    packing: Packing
    witness: Tensor | None = None
    is_coarse: bool = False  # something is computed in 16 bits

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """While the model runs forward, with gradients."""
        with ExitStack() as stack:
            for module in model.modules():
                if module is not model:
                    stack.callback(module.register_forward_hook(self._look).remove)
            yield

    def _look(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        self.is_coarse = self.is_coarse or output.dtype in (torch.float16, torch.bfloat16)
        if self.witness is None and self.packing.lead(output.shape) and output.ndim > 1:
            if not output.requires_grad:
                output.requires_grad_()  # a frozen embedding's
            self.witness = output

    def check(self, losses: Tensor) -> bool:
        """Whether it could be told: all gradients are finite.

        Args:
            losses: (B,), whose graph is kept.

        Raises:
            RuntimeError: samples see one another.
        """
        witness, self.witness = self.witness, None
        if witness is None or not losses.requires_grad:
            return False
        size = self.packing.size
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        factors = torch.linspace(-1, 1, size)[order].to(losses)
        plain, mixed = (self._at(witness, total) for total in (losses.sum(), (factors * losses).sum()))
        owner = self.packing.seq_idx.flatten().to(plain.device)
        own = torch.where(owner >= 0, factors.to(plain)[owner.clamp(min=0)], 0)
        off, largest = (plain * own[:, None] - mixed).abs().max(), plain.abs().max()
        if not bool(off.isfinite() & largest.isfinite()):
            return False
        is_coarse = self.is_coarse or torch.get_float32_matmul_precision() != "highest"
        if float(off) > (_LOOSE if is_coarse else _TOLERANCE) * float(largest):
            raise RuntimeError(
                "the samples of a packed row see one another: the loss of one depends on another's tokens. Expected "
                "position_ids that start anew at every sample, no attention_mask and use_cache=False, and a model that "
                "keeps samples apart by them; or rows with padding, a sample each"
            )
        return True

    def _at(self, witness: Tensor, total: Tensor) -> Tensor:
        """(R·T, D) of a number's gradient."""
        (found,) = torch.autograd.grad(total, witness, retain_graph=True, allow_unused=True)
        found = torch.zeros_like(witness) if found is None else found
        return self.packing.flat(found).flatten(1).float()
