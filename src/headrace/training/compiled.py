"""A network compiled in place: the same weights under the same names, in fewer kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from headrace.errors import DependencyError


@contextmanager
def compiled(network: nn.Module) -> Iterator[None]:
    """Run ``network`` through torch.compile until the block ends.

    It compiles at the first call, and again for another mode or number of rows. Results round
    differently from eager ones. A copy of the network is not compiled.

    Raises:
        DependencyError: if it cannot be compiled here, for want of a compiler, say.
    """
    from torch._dynamo.exc import TorchDynamoException  # loads much

    network._compiled_call_impl = torch.compile(network._call_impl)
    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise DependencyError(
            f"torch.compile does not work here ({reason}); set compile: false"
        ) from error
    finally:
        network._compiled_call_impl = None
