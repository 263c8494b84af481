# SPDX-License-Identifier: Apache-2.0
"""SparseLLM: the layers of an FFN pruned towards its output, not each towards its own ("SparseLLM: Towards Global Pruning
of Pre-trained Language Models", Bai et al., arXiv 2402.17946).

With `X` the inputs, `Y` the outputs of the dense FFN (both fixed), `z` what goes into the activation and `p` what comes out
of it, both free variables of each token, the problem of a plain FFN (OPT) is

    alpha |z - W1 X - b1|^2 + gamma |p - relu(z)|^2 + beta |Y - W2 p|^2,        W1, W2 sparse,

of a gated one (Llama), with `s` the output of the gate and `z` that of up_proj,

    alpha |s - Wg X|^2 + alpha |z - Wu X|^2 + gamma |p - act(s) z|^2 + beta |Y - Wd p|^2.

One variable after the other is set to its minimum: the weights by least squares and then SparseGPT, `p` and `z` in closed
form, `s` by gradient steps. The bias of the last layer cancels in `Y`.

Two things are ours. *Closing*: the last layer never sees `p`, but what the pruned layers before it give; so at the end of
each epoch it is fitted to that, from its dense weights, and pruned. *Safeguard*: of plain SparseGPT and all epochs the one
with the least true error of the FFN's output on the calibration tokens is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, NMSparseError, UnsupportedError
from ..pattern import Pattern
from .base import BlockInputs, Choice, Criterion, InputStatistics, register_criterion
from .feed_forward import FORMS, FeedForward, find_ffns
from .refit import refit_weights
from .solve import damped_cholesky
from .sparsegpt import SparseGPT
from .sparsellm_updates import hidden_factor, update_gate, update_gated, update_hidden, update_relu

logger = logging.getLogger(__name__)

WEIGHTS = {False: 0.1, True: 5.0}  # of the terms, by "is gated"; the published settings
CHUNK_ELEMENTS = 2**22  # of one temporary of some tokens: 16 MB
MATRIX_ROUNDING = 1e-3  # relative; float32 products may be done in TensorFloat-32


@register_criterion
class SparseLLM(Criterion):
    """SparseGPT with the layers of each FFN pruned jointly, in alternating minimisation.

    FFNs are found by name: `fc1`, ReLU, `fc2` or `gate_proj`, `up_proj`, activation, `down_proj`. All else (attention,
    fused experts, other FFNs) is pruned as by SparseGPT; for layers that aren't attention that logs one line a block.
    Attention is pruned first, and the inputs of FFNs are measured behind it.

    Memory besides the recorded inputs: one float32 `[tokens, hidden]` for a plain FFN, two for a gated one, one
    `[tokens, out]`, and matrices of the size of Hessians.

    Args:
        alpha (`float`, *optional*): weight of the first layers' term. Only the ratios of the three matter.
        beta (`float`, *optional*): weight of the last layer's term.
        gamma (`float`, *optional*): weight of the activation's term. By default all are 0.1 for plain FFNs and 5 for
            gated ones, as published.
        epochs (`int`): how often the weights are pruned; 1 is SparseGPT and one closing.
        damping (`float`): of the Hessians, relative to the mean of their diagonal, also of the least squares.
        refit (`bool`): give kept weights the best values for their mask (`refit_weights`) wherever SparseGPT prunes, in
            attention too. Is not part of the paper. (`prune(..., weights="refit")` instead fits each layer to its own
            dense outputs at the end, and so undoes the joint fit.)

    Raises:
        ConfigError: for values that aren't positive.
    """

    name = "sparsellm"
    needs = "inputs"
    unstructured = True
    updates_weights = True

    def __init__(
        self,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        epochs: int = 4,
        damping: float = 0.01,
        refit: bool = False,
    ) -> None:
        for field, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(
                    f"sparsellm: {field}={value}, expected a positive number; the paper tries 0.01 to 100"
                )
        if epochs < 1:
            raise ConfigError(f"sparsellm: epochs={epochs}, expected 1 or more; the published setting is 4")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.epochs, self.refit = epochs, refit
        self.sparsegpt = SparseGPT(damping)

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> torch.Tensor:
        """A weight alone: as SparseGPT."""
        return self.sparsegpt.mask(weight, statistics, pattern)

    def choose(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> Choice:
        """A weight alone: as SparseGPT, and refitted if wanted."""
        return self._refitted(self.sparsegpt.choose(weight, statistics, pattern), weight, statistics)

    def stages(self, names: list[str], block: nn.Module) -> list[list[str]]:
        joint = {layer for ffn in find_ffns(names, block) for layer in ffn.layers}
        stages = [[name for name in names if name not in joint], [name for name in names if name in joint]]
        return [stage for stage in stages if stage]

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        """Yield (name, choice) of each layer: first those that are in no FFN.

        Raises:
            UnsupportedError: naming an FFN that doesn't compute what its form says.
        """
        ffns = find_ffns(inputs.modules, inputs.block)
        joint = {layer for ffn in ffns for layer in ffn.layers}
        single = {name: module for name, module in inputs.modules.items() if name not in joint}
        others = [name for name in single if "attn" not in name.lower() and "attention" not in name.lower()]
        if others:
            logger.warning(
                "%s (%d such layers in its block) is neither attention nor in an FFN of the form %s; pruned as by "
                "SparseGPT",
                others[0],
                len(others),
                " or ".join(", ".join(form) for form in FORMS),
            )
        weights = {name: inputs.weights[name] for name in single}
        yield from self.choose_singly(replace(inputs, modules=single, weights=weights))
        for ffn in ffns:
            yield from zip(ffn.layers, Descent(ffn, inputs, self).choices(), strict=True)

    def choose_singly(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        """Yield (name, choice) of each layer by itself, by SparseGPT and, if wanted, a refit."""
        for name, choice in self.sparsegpt.choose_block(inputs):
            yield name, self._refitted(choice, inputs.weights[name], inputs.statistics[name])

    def _refitted(self, choice: Choice, weight: torch.Tensor, statistics: InputStatistics) -> Choice:
        if not self.refit:
            return choice
        return Choice(choice.mask, refit_weights(weight, choice.mask, statistics.hessian, self.sparsegpt.damping))

    def term_weights(self, gated: bool) -> tuple[float, float, float]:
        """alpha, beta and gamma for an FFN of this form."""
        alpha, beta, gamma = (WEIGHTS[gated] if w is None else w for w in (self.alpha, self.beta, self.gamma))
        return alpha, beta, gamma


class Descent:
    """The alternating minimisation for one FFN. Dense weights and statistics are only read.

    Args:
        ffn (`FeedForward`): which.
        inputs (`BlockInputs`): of its block.
        settings (`SparseLLM`): the criterion.

    Raises:
        UnsupportedError: if the FFN doesn't compute what its form says.
    """

    def __init__(self, ffn: FeedForward, inputs: BlockInputs, settings: SparseLLM) -> None:
        first, last = ffn.layers[0], ffn.layers[-1]
        self.ffn, self.block_inputs, self.settings = ffn, inputs, settings
        self.alpha, self.beta, self.gamma = settings.term_weights(ffn.gated)
        self.damping = settings.sparsegpt.damping
        self.inputs = inputs.statistics[first].inputs  # [tokens, in]
        self.hessian = inputs.statistics[first].hessian
        self.dense = [inputs.weights[name] for name in ffn.layers]
        self.biases = [getattr(inputs.modules[name], "bias", None) for name in ffn.layers[:-1]]
        weights = [weight.float() for weight in self.dense]
        tokens, device = len(self.inputs), self.inputs.device
        # What goes into the activation (z; s and z), and Y.
        self.before = [torch.empty(tokens, len(weight), device=device) for weight in weights[:-1]]
        self.target = torch.empty(tokens, len(weights[-1]), device=device)
        check = _Check(inputs.statistics[last].inputs)
        for rows in self._rows():
            outputs = self._outputs(rows, weights[:-1])
            for part, output in zip(self.before, outputs, strict=True):
                part[rows] = output
            hidden = ffn.hidden(outputs)
            check.add(rows, hidden)
            self.target[rows] = hidden @ weights[-1].t()
        check.finish(ffn)

    def choices(self) -> list[Choice]:
        """The choices for the layers, in their order: of plain SparseGPT, or of the epoch with the least error."""
        statistics = [self.block_inputs.statistics[name] for name in self.ffn.layers]
        inputs = self._inputs(self.ffn.layers, self.dense, statistics)
        pruned = best = [choice for _, choice in self.settings.sparsegpt.choose_block(inputs)]
        least = self.error(best)
        if self.settings.refit:
            pruned = [choice for _, choice in self.settings.choose_singly(inputs)]
        for epoch in range(self.settings.epochs):
            try:
                if epoch:
                    pruned = self._epoch(pruned)
                candidate = [*pruned[:-1], self._close(pruned)]
                error = self.error(candidate)
            except NMSparseError as reason:
                logger.warning("%s: stopped in epoch %d, the best so far is kept: %s", self.ffn.name, epoch, reason)
                break
            if not math.isfinite(error):
                logger.warning("%s: epoch %d gave NaN or infinity, the best so far is kept", self.ffn.name, epoch)
                break
            if not error >= least:  # also where plain SparseGPT gave NaN
                best, least = candidate, error
        return best

    def error(self, choices: list[Choice]) -> float:
        """`|Y - FFN(X)|^2` over all tokens, with the weights that the model gets from these choices."""
        *first, last = self._weights(choices)

        def error(rows: slice) -> float:
            hidden = self.ffn.hidden(self._outputs(rows, first))
            return float((self.target[rows] - hidden @ last.t()).double().square().sum())

        return sum(error(rows) for rows in self._rows())

    def _epoch(self, pruned: list[Choice]) -> list[Choice]:
        """One epoch: the auxiliary variables for the pruned weights, then weights fitted to them and pruned."""
        *first, last = self._weights(pruned)
        crosses = [torch.zeros_like(weight) for weight in first]
        moments = _Moments(self.dense[-1].float())
        factor = hidden_factor(last, self.beta, self.gamma)
        for rows in self._rows():
            outputs = self._outputs(rows, first)
            p = self._update(rows, outputs, last, factor)
            moments.add(p, self.target[rows])
            x = self.inputs[rows].float()
            for cross, before, output in zip(crosses, self.before, outputs, strict=True):
                cross.addmm_((before[rows] - output).t(), x)
        lower = damped_cholesky(self.hessian, self.damping, self.ffn.layers[0])
        fitted = [
            weight + torch.cholesky_solve(cross.t() / len(self.inputs), lower).t()
            for weight, cross in zip(first, crosses, strict=True)
        ]
        statistics = self.block_inputs.statistics[self.ffn.layers[0]]
        chosen = self._prune(self.ffn.layers[:-1], fitted, [statistics] * len(fitted))
        return [*chosen, self._fit_last(moments)]

    def _close(self, pruned: list[Choice]) -> Choice:
        """The last layer fitted to what the pruned first layers really give it, and pruned."""
        first = self._weights(pruned)[:-1]
        moments = _Moments(self.dense[-1].float())
        for rows in self._rows():
            moments.add(self.ffn.hidden(self._outputs(rows, first)), self.target[rows])
        return self._fit_last(moments)

    def _fit_last(self, moments: _Moments) -> Choice:
        statistics = moments.statistics()
        lower = damped_cholesky(statistics.hessian, self.damping, self.ffn.layers[-1])
        fitted = moments.weight + torch.cholesky_solve(moments.cross.t() / moments.tokens, lower).t()
        return self._prune(self.ffn.layers[-1:], [fitted], [statistics])[0]

    def _prune(
        self, layers: tuple[str, ...], weights: list[torch.Tensor], statistics: list[InputStatistics]
    ) -> list[Choice]:
        return [choice for _, choice in self.settings.choose_singly(self._inputs(layers, weights, statistics))]

    def _inputs(
        self, layers: tuple[str, ...], weights: list[torch.Tensor], statistics: list[InputStatistics]
    ) -> BlockInputs:
        """Some layers with other weights and statistics; those with the same statistics will share a factor."""
        by_name = [dict(zip(layers, values, strict=True)) for values in (weights, statistics)]
        return replace(self.block_inputs, weights=by_name[0], statistics=by_name[1])

    def _update(
        self, rows: slice, outputs: list[torch.Tensor], last: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """Set `z` and `s` of some tokens, and return their `p`."""
        before = [part[rows] for part in self.before]
        activated = self.ffn.hidden(before)
        p = update_hidden(activated, self.target[rows], last, factor, self.beta, self.gamma)
        if self.ffn.gated:
            gate = self.ffn.activation(before[0])
            z = update_gated(p, outputs[1], gate, self.alpha, self.gamma)
            s = update_gate(before[0], p, z, outputs[0], self.ffn.activation, self.alpha, self.gamma)
            updated = [s, z]
        else:
            updated = [update_relu(p, outputs[0], self.alpha, self.gamma)]
        for part, value in zip(before, updated, strict=True):
            part.copy_(value)
        return p

    def _weights(self, choices: list[Choice]) -> list[torch.Tensor]:
        """The pruned weights as the model will have them, rounded to its dtype, in float32."""
        return [choice.masked(weight).float() for choice, weight in zip(choices, self.dense, strict=True)]

    def _outputs(self, rows: slice, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """`X W^T + b` of the first layers, for some tokens."""
        x = self.inputs[rows].float()
        return [
            F.linear(x, weight, None if bias is None else bias.detach().float())
            for weight, bias in zip(weights, self.biases, strict=True)
        ]

    def _rows(self) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // len(self.dense[0]))
        return (slice(start, start + step) for start in range(0, len(self.inputs), step))


class _Check:
    """Whether the dense FFN as written here gives the inputs of the last layer that were recorded, `[tokens, hidden]`."""

    def __init__(self, recorded: torch.Tensor) -> None:
        self.recorded = recorded
        self.difference = self.whole = 0.0

    def add(self, rows: slice, hidden: torch.Tensor) -> None:
        expected = self.recorded[rows]
        if expected.shape != hidden.shape:
            self.difference = math.inf
            return
        self.difference += float((hidden - expected).double().square().sum())
        self.whole += float(expected.double().square().sum())

    def finish(self, ffn: FeedForward) -> None:
        """Raises UnsupportedError if it doesn't, to rounding in the dtype of the model."""
        tolerance = max(MATRIX_ROUNDING, 4 * torch.finfo(self.recorded.dtype).eps)
        if not self.difference <= tolerance**2 * self.whole:
            relative = (self.difference / self.whole) ** 0.5 if self.whole > 0 else math.inf
            raise UnsupportedError(
                f"{ffn.layers[-1]}: its inputs on the calibration data are not what {type(ffn.activation).__name__} makes "
                f"of the layers before it (relative difference {relative:.2g}, expected at most {tolerance:.2g}), so "
                "sparsellm can't prune this FFN; name it in dense_layers, or use criterion 'sparsegpt'"
            )


class _Moments:
    """Sums over tokens for the fit of a last layer: of `p p^T`, and of `(y - W p) p^T` for its dense weights `W`."""

    def __init__(self, weight: torch.Tensor) -> None:
        width = weight.shape[1]
        self.weight = weight
        self.tokens = 0
        self.gram = torch.zeros(width, width, device=weight.device)
        self.cross = torch.zeros_like(weight)

    def add(self, p: torch.Tensor, target: torch.Tensor) -> None:
        self.tokens += len(p)
        self.gram.addmm_(p.t(), p)
        self.cross.addmm_((target - p @ self.weight.t()).t(), p)

    def statistics(self) -> InputStatistics:
        lower = self.gram.tril().div_(self.tokens)
        hessian = lower + lower.tril(-1).t()
        return InputStatistics(self.tokens, hessian.diagonal().clone(), hessian)
