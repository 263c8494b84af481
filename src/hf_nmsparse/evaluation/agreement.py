# SPDX-License-Identifier: Apache-2.0
"""How far a model says what the dense one says: damage that accuracies, and often perplexity, hide."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import ConfigError
from .perplexity import chunks, cut_windows
from .running import check_vocabulary, each_batch, evaluating, input_device

_LAYER_TOKENS = (
    256  # of which the outputs of all linear layers are held: about 3 MB a token in a model of 7 billion weights
)


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with the dense model on a text.

    Args:
        top1 (`float`): share of tokens after which both hold the same token for the likeliest.
        kl (`float`): mean of KL(dense || this), nats a token.
        top1_standard_error (`float`, *optional*), kl_standard_error (`float`, *optional*): from the spread over windows;
            `None` with a single one.
        tokens (`int`), windows (`int`), seq_len (`int`): what was compared: `windows x (seq_len - 1)` predictions.
        layers (`dict[str, float]`): linear layer -> `||y - y_dense||^2 / ||y_dense||^2` of its output on the first
            `layer_tokens` tokens. Errors of the layers before it are in it.
        layer_tokens (`int`): see `layers`.
    """

    top1: float
    kl: float
    top1_standard_error: float | None
    kl_standard_error: float | None
    tokens: int
    windows: int
    seq_len: int
    layers: dict[str, float]
    layer_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As results have it."""
        found = asdict(self)
        return {**found, "sequence_length": found.pop("seq_len")}


def agreement(
    model: nn.Module,
    tokens: torch.Tensor,
    dense: nn.Module | None = None,
    seq_len: int = 2048,
    batch_size: int | None = None,
    layers: bool = True,
    progress: bool = False,
) -> Agreement:
    """Compare the predictions of a model with those of the dense model on a text, and the outputs of its linear layers.

    Args:
        model (`nn.Module`): masked, packed, merged, or a PEFT model.
        tokens (`torch.Tensor`): integers `[tokens]`, cut into windows without overlap, or `[windows, sequence]`.
        dense (`nn.Module`, *optional*): what to compare with; by default the PEFT model with its adapters off.
        seq_len (`int`): tokens a window; only for tokens that are not cut yet.
        batch_size (`int`, *optional*): windows a forward pass, see `perplexity`.
        layers (`bool`): compare the outputs of linear layers too.
        progress (`bool`): show a progress bar, if standard error is a terminal.

    Raises:
        ConfigError: if there is no dense model, its vocabulary is another one, or the text does not fit.
    """
    cut = cut_windows(tokens, seq_len)
    reference = _Reference(model, dense)
    for one in (model, reference.module):
        check_vocabulary(one, cut)
    with evaluating(model), evaluating(reference.module), torch.no_grad():

        def compare(ids: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, use_cache=False).logits
            with reference as other:
                expected = other(input_ids=ids.to(input_device(other)), use_cache=False).logits
            return _compare(logits[:, :-1], expected[:, :-1].to(logits.device))

        found = []
        with tqdm(total=len(cut), desc="agreement", unit="window", disable=None if progress else True) as bar:
            for pair in each_batch(compare, cut, batch_size, input_device(model)):
                found.append(pair)
                bar.update(len(pair))
        errors = _layer_errors(model, reference, cut[:1, :_LAYER_TOKENS]) if layers else {}
    values = torch.cat(found)  # (windows, 2)
    means, count = values.mean(dim=0).tolist(), len(values)
    spread = (values.std(dim=0) / math.sqrt(count)).tolist() if count > 1 else (None, None)
    return Agreement(
        top1=means[0],
        kl=means[1],
        top1_standard_error=spread[0],
        kl_standard_error=spread[1],
        tokens=count * (cut.shape[1] - 1),
        windows=count,
        seq_len=cut.shape[1],
        layers=errors,
        layer_tokens=min(_LAYER_TOKENS, cut.shape[1]) if layers else 0,
    )


class _Reference:
    """The dense model, and a context within which it computes: another model, or a PEFT model with its adapters off."""

    def __init__(self, model: nn.Module, dense: nn.Module | None):
        self._off = getattr(model, "disable_adapter", None) if dense is None else None
        if dense is None and self._off is None:
            raise ConfigError(
                f"a {type(model).__name__} has no adapter that could be turned off; pass the dense model to compare with"
            )
        self.module = model if dense is None else dense
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> nn.Module:
        if self._off is not None:
            self._stack.enter_context(self._off())
        return self.module

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()


def _compare(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Share of equal likeliest tokens, and mean KL(expected || logits), of each window.

    Args:
        logits (`torch.Tensor`), expected (`torch.Tensor`): `[batch, positions, vocabulary]`, any float dtype.

    Returns:
        float64 `[batch, 2]` on the CPU.
    """
    rows, positions, vocabulary = logits.shape
    if expected.shape != logits.shape:
        raise ConfigError(
            f"the dense model predicts {expected.shape[-1]} tokens, this one {vocabulary}; they have no common vocabulary"
        )
    total = torch.zeros(rows, 2, dtype=torch.float64)
    for part in chunks(positions, rows * vocabulary):
        this, dense = logits[:, part].float(), expected[:, part].float()
        same = this.argmax(-1) == dense.argmax(-1)
        dense_log = F.log_softmax(dense, dim=-1)
        kl = (dense_log.exp() * (dense_log - F.log_softmax(this, dim=-1))).sum(-1)
        total += torch.stack([same.double().sum(1), kl.double().sum(1)], dim=1).cpu()
    return total / positions


# --- layers ---------------------------------------------------------------------------------------------------------
def _layer_errors(model: nn.Module, reference: _Reference, ids: torch.Tensor) -> dict[str, float]:
    """Relative error of the output of each linear layer that both models have, on a few tokens."""
    names = _linear_modules(reference.module).keys() & _linear_modules(model).keys()
    with reference as dense, _outputs(dense, names) as expected:
        dense(input_ids=ids.to(input_device(dense)), use_cache=False)
    errors = {}

    def measured(name: str, output: torch.Tensor) -> None:
        if name in expected:
            dense_output = expected[name].to(output.device, torch.float32)
            norm = dense_output.square().sum()
            error = (output.float() - dense_output).square().sum() / norm
            if norm > 0:
                errors[name] = error.item()

    with _watched(model, names, measured):
        model(input_ids=ids.to(input_device(model)), use_cache=False)
    return {name: errors[name] for name in _linear_modules(model) if name in errors}


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by their names in the plain model: dense, packed, or with an adapter around them."""
    if hasattr(model, "peft_config"):
        model = model.get_base_model()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(outer in found for outer in _parents(name))
        if not inside and (hasattr(module, "out_features") or type(module).__name__ == "Conv1D"):
            found[name] = module
    return found


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


@contextlib.contextmanager
def _watched(model: nn.Module, names: set[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(name, output)` whenever one of these layers has computed."""
    modules = _linear_modules(model)
    handles = [
        modules[name].register_forward_hook(lambda _, __, output, name=name: see(name, output.detach()))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _outputs(model: nn.Module, names: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of these layers, filled while the context lasts."""
    found: dict[str, torch.Tensor] = {}
    with _watched(model, names, found.__setitem__):
        yield found
