"""Begin from the weights of an earlier training, with some of them frozen.

The file must hold all weights and buffers of the network, by name and shape: a network that learns
from part of another's weights and keeps random ones beside them is nobody's wish unsaid. The digest
of the file is a parameter, so that a stage whose weights were exchanged runs again, and one whose
weights were exchanged unsaid ends here.
"""

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from headrace.errors import ConfigError, nearest
from headrace.storage import digest_bytes
from headrace.training.params import WarmStart
from headrace.training.weights import load_weights, stored_weights

_KEY = "`warm_start"


def start_warm(network: nn.Module, settings: WarmStart) -> None:
    """Load the weights that ``settings`` names into ``network`` and freeze what it says.

    Raises:
        ConfigError: if the file is missing, damaged, another one or of another network, or a
            pattern of ``freeze`` fits no parameter, or all are frozen.
    """
    # With a / in its name: what a model keeps beside its network.
    weights = {name: value for name, value in _read(settings).items() if "/" not in name}
    own = stored_weights(network)
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not in the network" for name in weights if name not in own]
    faults += [
        f"{name} has the shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        raise ConfigError(
            f"{_KEY}.path`, {settings.path}, holds the weights of another network: "
            f"{'; '.join(faults[:5])}{'; …' if len(faults) > 5 else ''}. Set the shape of the "
            f"network to what it was, or remove warm_start"
        )
    load_weights(network, weights)
    _freeze(network, settings.freeze)


def hold_frozen(network: nn.Module) -> None:
    """Put norms whose parameters are frozen in evaluation mode, so that their means stay too."""
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _read(settings: WarmStart) -> dict[str, torch.Tensor]:
    path = Path(settings.path)
    if not path.is_file():
        raise ConfigError(
            f"{_KEY}.path` is {settings.path}, which is no file; give the weights.safetensors of "
            f"an earlier model, copied to a place that no stage writes to"
        )
    content = path.read_bytes()
    if (found := digest_bytes(content)) != settings.digest:
        raise ConfigError(
            f"{_KEY}.digest` is {settings.digest!r}, but {settings.path} has the SHA-256 {found}; "
            f"if that is the file you mean, set the digest to it"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise ConfigError(
            f"{_KEY}.path`, {settings.path}, is no safetensors file ({error})"
        ) from error


def _freeze(network: nn.Module, patterns: tuple[str, ...]) -> None:
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        fitting = [name for name in parameters if fnmatchcase(name, pattern)]
        if not fitting:
            names = ", ".join(parameters)
            raise ConfigError(
                f"{_KEY}.freeze` has {pattern!r}, which fits no parameter"
                f"{nearest(pattern, parameters) or f'; there are: {names}'}"
            )
        for name in fitting:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"{_KEY}.freeze` leaves nothing to learn; remove a pattern")
