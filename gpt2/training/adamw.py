"""AdamW that does not import torch._dynamo, which would take longer than everything else before the first step.

PyTorch's optimizers import it at their first calls, only to be excluded from compilation. This project compiles models,
never optimizers. This is the only module that depends on how PyTorch excludes them. Checked with PyTorch 2.13.0;
`tests/training/test_adamw.py` fails when it moves.
"""

import inspect

import torch

EXCLUDED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


class AdamW(torch.optim.AdamW):
    """As `torch.optim.AdamW`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update once, without the decorators of PyTorch's method: one imports torch._dynamo, each step adds one."""
        inspect.unwrap(torch.optim.Adam.step)(self, closure)


def start_without_dynamo() -> None:
    """Exclude the methods of all optimizers from compilation without importing torch._dynamo."""
    for name in EXCLUDED:
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        setattr(method, "__dynamo_disable", method)  # where PyTorch keeps the excluded version
