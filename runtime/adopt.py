"""Match the weights that someone else saved to a model of models.py.

found = adopt.adopt(path, content, name=None)     # content of weights.read; name: of the only model to try
found.network, found.model, found.matched, found.notes
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import models
from runtime.weights import WRAPPERS, AmbiguousError, CheckpointError

State = dict[str, torch.Tensor]
Place = tuple[str, ...]  # the keys on the way to a dict within dicts, () for the content itself

DEPTH = 3  # dicts within dicts that are searched
MOST = 100  # dicts of tensors in a file
MOST_TENSORS = 20_000  # in them: each name is looked at many times
COUNTER = "num_batches_tracked"  # of batch norm: evaluation does not use it
NO_LAYER = re.compile(r"(.*[._])?(criterion|loss|metrics?|acc|accuracy)(_?fn)?([._].*)?", re.IGNORECASE)
KINDS = {"weight", "bias", "running_mean", "running_var"}  # last parts of names, which tell what a tensor is for
SHOWN = 12  # tensors in a message
ASSUMED = "its activations are assumed to be those of {}"  # a state_dict does not hold them
ORDER_ASSUMED = "its activations and the order of its layers are assumed to be those of {}"
HOW_TO_ADD = "add its class to models.py (docs/extending.md)"


class Adopted(NamedTuple):
    """A model with someone else's weights in it."""

    model: str
    network: nn.Module
    matched: str  # "by name" or "by order"
    notes: list[str]  # sentences: what was assumed, left out or converted


class Fit(NamedTuple):
    """How a state_dict fits a model."""

    model: str
    weights: State  # by the model's own names
    matched: str
    notes: list[str]


def build(name: str) -> nn.Module:
    """Build a model on the CPU in evaluation mode, without a change to the random numbers of others."""
    with torch.random.fork_rng(devices=[]):
        return models.build(name).eval()


def fill(path: Path, network: nn.Module, weights: State) -> nn.Module:
    """Load weights that have the names and shapes of the network's, and return it.

    Raises CheckpointError where they cannot be used, or differ where the network keeps two names for one tensor.
    """
    network.load_state_dict(weights)
    if found := fault(network):
        raise CheckpointError(f"{path}: {found}")
    _check_ties(path, network.state_dict(), weights)
    return network


def fault(network: nn.Module) -> str:
    """Say why the weights of a network, in evaluation mode, cannot be used; "" if they can.

    Its parameters must be finite, and its logits of an image. Buffers may hold infinities, as masks do.
    """
    parameters = dict(network.named_parameters())
    if odd := [key for key, parameter in parameters.items() if not torch.isfinite(parameter).all()]:
        dtype = str(parameters[odd[0]].dtype).removeprefix("torch.")
        return f"it holds weights that are not finite numbers of {dtype}: {_shown(odd)}"
    device = next((each.device for each in parameters.values()), None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        logits = network(torch.linspace(-1, 1, 28 * 28, device=device).reshape(1, 1, 28, 28))
    if isinstance(logits, torch.Tensor) and not torch.isfinite(logits).all():
        return (
            "its logits are not finite numbers: its weights are too large, or a buffer such as running_var is damaged"
        )
    return ""


def _check_ties(path: Path, state: State, weights: State) -> None:
    """Refuse weights that differ where the network keeps two names for one tensor."""
    first: dict[tuple[int, torch.Size], str] = {}
    for key, value in state.items():
        other = first.setdefault((value.data_ptr(), value.shape), key)
        if other != key and value.numel() and not torch.equal(weights[key], weights[other]):
            raise CheckpointError(
                f"{path}: its {other} and {key} differ, but the model here keeps both as one tensor: {HOW_TO_ADD}"
            )


def layout(weights: State) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor."""
    return {key: (tuple(value.shape), value.dtype) for key, value in weights.items()}


def adopt(path: Path, content: Any, name: str | None) -> Adopted:
    """Match someone else's weights, bare or within dicts, to the model `name`, or to the only one that they fit.

    Exact names of any model count first, then names with extras that are no layers, then order and shape.
    Raises CheckpointError where none fits, or where several do.
    """
    if name is not None and name not in models.MODELS:
        raise CheckpointError(f"--model {name[:40]!r}: the models here are {', '.join(models.MODELS)}")
    networks = {each: build(each) for each in ([name] if name else models.MODELS)}
    states = find_states(path, content)
    fits = {place: found for place, state in states.items() if (found := _fits(state, networks))}
    usual = [place for place in states if place[-1:] and place[-1] in WRAPPERS]
    if usual and fits and not any(place in fits for place in usual):  # what the file is for is another network
        others = f"; those under {_shown(list(map(_dotted, fits)))} fit: save them alone, if you mean them"
        raise CheckpointError(f"{path}: {_misfit({usual[0]: states[usual[0]]}, networks)}{others}")
    if not fits:
        rest = {each: build(each) for each in models.MODELS if each not in networks}
        better = dict.fromkeys(fit.model for state in states.values() for fit in _fits(state, rest))
        fitting = f"; it fits {', '.join(better)}" if better else ""
        raise CheckpointError(f"{path}: {_misfit(states, networks)}{fitting}")
    if len(fits) > 1:
        raise CheckpointError(f"{path}: {_several(path, sorted(fits, key=lambda place: place not in usual))}")
    ((place, found),) = fits.items()
    if len(found) > 1:
        names = ", ".join(fit.model for fit in found)
        raise AmbiguousError(f"{path}: fits {names} {found[0].matched.split(' (')[0]}: choose one with --model NAME")
    (fit,) = found
    notes = [
        *([f"found under {_dotted(place)}"] if place else []),
        *fit.notes,
        *_converted(fit.weights, networks[fit.model]),
    ]
    return Adopted(fit.model, fill(path, networks[fit.model], fit.weights), fit.matched, notes)


def find_states(path: Path, content: Any) -> dict[Place, State]:
    """Find the dicts that hold tensors, by their place.

    Raises CheckpointError where there is none.
    """
    found: dict[Place, State] = {}
    level: dict[Place, Any] = {(): content}
    seen: set[int] = set()
    for _ in range(DEPTH + 1):
        within: dict[Place, Any] = {}
        for place, value in level.items():
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            named = {key: each for key, each in value.items() if isinstance(key, str) and key.isprintable()}
            state = {key: each for key, each in named.items() if _is_usable(each)}
            if any(each.dim() for each in state.values()):
                found[place] = state
            within |= {(*place, key): each for key, each in named.items() if isinstance(each, dict)}
        level = within
    if not found:
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a model's state_dict: torch.save(model.state_dict(), "
            "'weights.pt') writes one"
        )
    if len(found) > MOST:
        raise CheckpointError(f"{path}: holds {len(found)} dicts of tensors: torch.save the one of the model alone")
    if sum(map(len, found.values())) > MOST_TENSORS:
        raise CheckpointError(f"{path}: holds more than {MOST_TENSORS:,} tensors: torch.save those of the model alone")
    return found


def _is_usable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _fits(state: State, networks: dict[str, nn.Module]) -> list[Fit]:
    """List how a state_dict fits models: by their exact names, or else with extras, or else by order and shape."""
    ways: tuple[Callable[[str, State, State], Iterator[Fit]], ...] = (_exactly, _with_extras, _by_order)
    for way in ways:
        if found := [fit for name, network in networks.items() for fit in way(name, network.state_dict(), state)]:
            return found
    return []


def _exactly(model: str, own: State, state: State) -> Iterator[Fit]:
    for weights, extras in _by_name(own, state):
        if not extras:
            yield Fit(model, weights, "by name", [ASSUMED.format(model)])


def _with_extras(model: str, own: State, state: State) -> Iterator[Fit]:
    for weights, extras in _by_name(own, state):
        if extras and all(_is_no_layer(key, state[key]) for key in extras):
            yield Fit(model, weights, "by name", [*_ignored(extras), ASSUMED.format(model)])


def _by_name(own: State, state: State) -> Iterator[tuple[State, list[str]]]:
    """Yield the weights under each prefix with which all own names are there, and the names that are left.

    A prefix is what a wrapper puts before every name: "module." of DataParallel, "model." of Lightning.
    """
    first = next((key for key in own if not key.endswith(COUNTER)), "weight")
    prefixes = [key.removesuffix(first) for key in state if key.endswith((f".{first}", first))]
    for prefix in [each for each in prefixes if each[-1:] in ("", ".")][:MOST]:
        theirs = {key: state[prefix + key] for key in own if prefix + key in state}
        if all(key in theirs or key.endswith(COUNTER) for key in own) and _agree(theirs, own):
            yield own | theirs, list(state.keys() - {prefix + key for key in theirs})


def _by_order(model: str, own: State, state: State) -> Iterator[Fit]:
    ours, theirs = ([key for key in each if not key.endswith(COUNTER)] for each in (own, state))
    extras = [key for key in theirs if _is_no_layer(key, state[key])]
    for ignored in ([], extras) if extras else ([],):
        left = [key for key in theirs if key not in ignored]
        pairs = dict(zip(ours, left, strict=False))
        weights = {key: state[other] for key, other in pairs.items()}
        if len(ours) == len(left) and _agree(weights, own) and all(map(_is_same_kind, pairs, left)):
            named = _shown([f"{other} as {key}" for key, other in pairs.items()])
            yield Fit(model, own | weights, "by order", [*_ignored(ignored), named, ORDER_ASSUMED.format(model)])
            return


def _is_same_kind(key: str, other: str) -> bool:
    """Say whether two names may be of one kind: a bias is no weight, and a mean no variance."""
    kinds = {each.rpartition(".")[2] for each in (key, other)}
    return len(kinds) == 1 or not kinds <= KINDS


def _ignored(keys: list[str]) -> list[str]:
    return [f"ignored, as no part of the network: {_shown(keys)}"] if keys else []


def _agree(theirs: State, own: State) -> bool:
    """Say whether tensors have the shapes of the own ones, and dtypes that can be converted to theirs."""
    return all(
        value.shape == own[key].shape and _is_convertible(value, own[key].dtype) for key, value in theirs.items()
    )


def _is_convertible(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Say whether a dtype is a tensor's own, or both are floating-point ones, or integers that keep their values."""
    if value.dtype == dtype or (value.is_floating_point() and dtype.is_floating_point):
        return True
    whole = not any(each.is_floating_point or each.is_complex or each is torch.bool for each in (value.dtype, dtype))
    return whole and torch.equal(value.to(dtype).to(value.dtype), value)


def _is_no_layer(key: str, value: torch.Tensor) -> bool:
    """Say whether a tensor takes no part in a network's answers: a counter, or of a loss or a metric."""
    return not value.is_floating_point() or NO_LAYER.fullmatch(key) is not None


def _converted(weights: State, network: nn.Module) -> list[str]:
    own = network.state_dict()
    found = sorted(
        {(str(value.dtype), str(own[key].dtype)) for key, value in weights.items() if value.dtype != own[key].dtype}
    )
    return [f"converted from {theirs} to {ours}".replace("torch.", "") for theirs, ours in found]


def _several(path: Path, places: list[Place]) -> str:
    last = "".join(f"[{key!r}]" for key in places[0])
    return (
        f"holds the weights of several networks ({_shown(list(map(_dotted, places)))}): save the one you mean alone, "
        f"as in torch.save(torch.load({str(path)!r}, weights_only=True){last}, 'weights.pt')"
    )


def _misfit(states: dict[Place, State], networks: dict[str, nn.Module]) -> str:
    """Say why no model fits the state_dict, or, of several, the one that is most likely meant."""
    known = [place for place in states if place and place[-1] in WRAPPERS]
    place = known[0] if known else max(states, key=lambda each: len(states[each]))
    state, all_names = states[place], ", ".join(networks)
    where = f" under {_dotted(place)}" if place else ""
    for name, network in networks.items():
        for _, extras in _by_name(network.state_dict(), state):
            others = [f"{key} {_shape(state[key])}" for key in extras if not _is_no_layer(key, state[key])]
            return (
                f"has the tensors of {name}{where} and others ({_shown(others)}): if they are layers, {HOW_TO_ADD}; "
                "if not, save it without them"
            )
    lacking = [each for name, network in networks.items() for each in _lacking(name, network.state_dict(), state)]
    if lacking:
        _, said = max(lacking, key=lambda each: each[0])
        return f"{said}{where}: if it is another network, {HOW_TO_ADD}; else save its state_dict as it is"
    tensors = _shown([f"{key} {_shape(value)}" for key, value in state.items()])
    return f"its tensors{where} ({tensors}) are not those of {all_names}: {HOW_TO_ADD}"


def _lacking(model: str, own: State, state: State) -> Iterator[tuple[int, str]]:
    """Say what tensors lack, or what is another, where most names of a model are there, and how many tensors fit."""
    first = next((key for key in own if key.endswith((".weight", ".bias"))), "weight")
    for prefix in [key.removesuffix(first) for key in state if key.endswith(first)][:MOST]:
        there = {key: state[prefix + key] for key in own if prefix + key in state}
        if prefix[-1:] not in ("", ".") or 2 * len(there) < len(own):
            continue
        missing = [key for key in own if key not in there and not key.endswith(COUNTER)]
        other = [key for key, value in there.items() if not _agree({key: value}, own)]
        differing = _shown([f"{key} {_shape(there[key])} instead of {_shape(own[key])}" for key in other])
        said = [f"lacks {_shown(missing)}"] * bool(missing) + [f"has {differing}"] * bool(other)
        fitting = sum(value.shape == own[key].shape for key, value in there.items())
        yield fitting, f"has the names of {model}, but {' and '.join(said)}"


def _dotted(place: Place) -> str:
    return ".".join(place)[:80] or "the file itself"


def _shape(value: torch.Tensor) -> str:
    kind = "" if value.is_floating_point() else f" {value.dtype}".replace("torch.", "")
    return ("x".join(map(str, value.shape)) or "scalar") + kind


def _shown(texts: list[str]) -> str:
    """Write the first of some texts, cut short."""
    rest = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(text if len(text) <= 80 else text[:80] + "…" for text in texts[:SHOWN]) + rest
