# SPDX-License-Identifier: Apache-2.0
"""`NMSparseConfig`: what a mask adapter is, as stored in `adapter_config.json`."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from .._compat import register_peft_type
from ..errors import ConfigError, FormatError
from ..pattern import NMPattern
from ..relaxations import get_relaxation, get_schedule

FORMAT_VERSION = 1
_MOST = 1 << 31  # no size of a layer comes near it
# Fields that PEFT takes as they are, whatever a file holds: the type of their entries, and whether one may stand alone.
_LISTS: dict[str, tuple[type, bool]] = {
    "target_modules": (str, True),
    "exclude_modules": (str, True),
    "layers_pattern": (str, True),
    "layers_to_transform": (int, True),
    "target_parameters": (str, False),
    "modules_to_save": (str, False),
    "dense_layers": (str, False),
}
# Fields without which the tensors of a published mask mean something else, and no shape tells what.
_MEANING = ("pattern", "slorb_block", "slorb_train_projection", "low_rank", "delta_rank")


@dataclass
class NMSparseConfig(PeftConfig):
    """Configuration of a learnable n:m mask over a frozen model.

    Args:
        pattern (`str`): `"n:m"`, n weights kept of each m consecutive ones along the input dimension; m <= 16.
        relaxation (`str`): how a mask is trained: by logits over the frozen weight, `"candidates"` (one logit a candidate,
            MaskLLM's), `"elementwise"` (one a weight, any pattern) or `"straight_through"` (one a weight, hard masks at all
            times); or by training the weight, of which the adapter then holds its own: `"ast"`, `"pdp"`, `"bdwp"`,
            `"transposable"`. See docs/METHODS.md.
        mask_format (`str`): `"logits"` (trainable checkpoint) or `"packed"` (a published mask: codes only). In the file of a
            mask that is stored as a delta, `"delta"`: only `nms.load_mask` and `nms.read_mask` read it.
        general_mask (`dict`, *optional*): in the file of a delta: where its general mask lies; `None` everywhere else.
        prior (`str`, *optional*): the mask that initialises the logits. `"magnitude"` is computed on the spot; any
            other name, or `None`, leaves the logits to `nms.set_prior`, which also records its name here.
        prior_strength (`float`): distance of the prior from indecision, in units of 0.01 (MaskLLM's alpha).
        prior_confidence (`bool`): scale the prior's strength of each group by how sure the criterion was of it: from 0.25
            for the group that it was least sure of to 1.75, evenly by rank within a layer, 1 on the mean. For priors by
            magnitude, wanda and polish.
        schedule (`str`): how temperature and logit scale go from start to end: `"linear"` (MaskLLM's), `"cosine"`,
            `"exponential"` (the same ratio each step) or `"constant"` (the start's all the time).
        temperature (`tuple[float, float]`, *optional*): at the start and the end of training: of the Gumbel-softmax, by default
            (4.0, 0.05); of `"pdp"`, relative to the mean of w^2, by default (0.25, 0.01).
        logit_scale (`tuple[float, float]`): factor on the logits (kappa) at the start and the end.
        magnitude_regularization (`float`): lambda of the term that rewards keeping large weights; decays to 0.
        resample (`str`): `"micro"`, a fresh mask each micro-step, or `"step"`, one mask per optimizer step, sampled once and
            shared by its micro-batches and recomputed blocks; that holds the bytes of the masked weights until the step.
        seed (`int`): seed of the mask noise.
        logits_dtype (`str`): `"float32"`, or `"bfloat16"`, which halves logits and their gradients and needs an optimizer
            that rounds stochastically, as `nms.MaskAdamW` does; stored in the checkpoint as they are. Of relaxations that
            train the weight: the dtype of that.
        mask_interval (`int`, *optional*): of `"ast"`: optimizer steps from one mask to the next; `None` trains under the prior.
        srste_decay (`float`), srste_ramp (`float`): of `"ast"` and `"straight_through"`: what is added to the gradient of a
            pruned weight is up to `srste_decay` times the weight, after a linear ramp over that share of the steps.
        slorb_block (`int`, *optional*): k: adds SLoRB beside the mask, one value per row and block of k inputs (AST,
            arXiv 2407.20584). Merging it gives a dense weight; `nms.compress` keeps it beside the packed one.
        slorb_init (`str`): `"mean"` or `"sum"` of the pruned weights of each block, renewed with each prior; `"xavier"`, random;
            or `"closed_form"`: starts at zero and waits for `nms.fit_side_branch`.
        slorb_train_projection (`bool`): train SLoRB's projection too (then it is a low-rank term of rank in/k).
        low_rank (`int`, *optional*): r: adds a low-rank term beside the mask, `y += (x A^T) B^T`; see
            `nms.fit_side_branch`.
        delta_rank (`int`, *optional*): r: trains the kept weights by `(W + B A) * M`; merging it is exactly n:m.
        dense_layers (`list[str]`, *optional*): layers to leave unpruned: a full module name or any run of its parts
            ("down_proj", "mlp.up_proj", "layers.0").
        target_modules (`list[str]` or `str`, *optional*): as in PEFT; `None`: all linear layers of the blocks, and their
            fused experts.
        target_parameters (`list[str]`, *optional*): fused expert weights (`[experts, out, in]`), as in PEFT:
            "mlp.experts.gate_up_proj".
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern, trainable_token_indices: as in PEFT.
        init_weights (`bool`): `False` gives random logits, for tests.
        format_version (`int`): version of the stored tensors; a newer one is refused.
        checksum (`str`, *optional*): in the file of a published mask: of the fields that say what its tensors mean
            (docs/FORMAT.md, section 3). Written by `save_pretrained`, compared when it is read.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
        FormatError: if the config was written by a newer hf_nmsparse, or is that of a published mask and damaged.
    """

    pattern: str = field(default="2:4", metadata={"help": "n:m, n kept of m"})
    relaxation: str = field(default="candidates", metadata={"help": "how logits become a mask"})
    mask_format: Literal["logits", "packed"] = field(
        default="logits", metadata={"help": "trainable logits, or the packed codes of a published mask"}
    )
    general_mask: dict[str, str | None] | None = field(
        default=None, metadata={"help": "in the file of a delta: where its general mask lies"}
    )
    prior: str | None = field(default="magnitude", metadata={"help": "mask that initialises the logits"})
    prior_strength: float = field(default=3.0, metadata={"help": "strength of the prior (MaskLLM's alpha)"})
    prior_confidence: bool = field(default=False, metadata={"help": "scale the prior by how sure its criterion was"})
    schedule: str = field(default="linear", metadata={"help": "how temperature and logit scale move"})
    temperature: tuple[float, float] | None = field(default=None, metadata={"help": "start and end temperature"})
    logit_scale: tuple[float, float] = field(default=(100.0, 500.0), metadata={"help": "start and end logit scale"})
    magnitude_regularization: float = field(default=1e-5, metadata={"help": "reward for keeping large weights"})
    resample: Literal["micro", "step"] = field(default="micro", metadata={"help": "how often masks are drawn"})
    seed: int = field(default=0, metadata={"help": "seed of the mask noise"})
    logits_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "dtype of the logits"})
    mask_interval: int | None = field(default=10, metadata={"help": "steps from one mask to the next (ast)"})
    srste_decay: float = field(default=1e-4, metadata={"help": "decay of pruned weights (ast, straight_through)"})
    srste_ramp: float = field(default=0.25, metadata={"help": "share of the steps over which that decay grows"})
    slorb_block: int | None = field(default=None, metadata={"help": "inputs per block of the SLoRB side branch"})
    slorb_init: Literal["mean", "sum", "xavier", "closed_form"] = field(
        default="mean", metadata={"help": "how SLoRB starts"}
    )
    slorb_train_projection: bool = field(default=False, metadata={"help": "train SLoRB's projection"})
    low_rank: int | None = field(default=None, metadata={"help": "rank of the term beside the mask"})
    delta_rank: int | None = field(default=None, metadata={"help": "rank of the change of the kept weights"})
    dense_layers: list[str] | None = field(default=None, metadata={"help": "layers kept unpruned"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to prune, as in PEFT"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "fused expert weights to prune"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to skip, as in PEFT"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained beside the mask"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block indices to prune"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the block list"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "token embeddings trained beside the mask"}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random logits, for tests"})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "version of the stored tensors"})
    checksum: str | None = field(default=None, metadata={"help": "in the file of a published mask: of its fields"})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:  # a task_type that there is not
            raise ConfigError(str(error)) from error
        self.peft_type = register_peft_type("NMSPARSE")
        self._check_version()
        self.pattern = str(NMPattern(self.pattern))
        for name in ("relaxation", "schedule"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r:.80} must be a name")
        relaxation = get_relaxation(self.relaxation)
        get_schedule(self.schedule)
        if self.temperature is None:
            self.temperature = relaxation.default_temperature
        self.temperature = _pair("temperature", self.temperature)
        self.logit_scale = _pair("logit_scale", self.logit_scale)
        self._check_values()
        self._check_terms()
        self._check_targets()
        self._check_lists()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def _check_version(self) -> None:
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise FormatError(
                f"format_version={self.format_version!r} is not a positive integer; the config is damaged"
            )
        if self.format_version > FORMAT_VERSION:
            raise FormatError(
                f"this mask has format version {self.format_version}, this hf_nmsparse reads up to {FORMAT_VERSION}; "
                "upgrade hf-nmsparse"
            )

    def _check_values(self) -> None:
        if self.mask_format == "delta":
            raise ConfigError(
                f"this mask is stored as a delta (general_mask={self.general_mask!r}), which PEFT's and Transformers' own "
                "loaders cannot put together; load it with nms.load_mask(model, <its folder or repo>)"
            )
        choices = {
            "mask_format": ("logits", "packed"),
            "resample": ("micro", "step"),
            "logits_dtype": ("float32", "bfloat16"),
            "slorb_init": ("mean", "sum", "xavier", "closed_form"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, allowed))}")
        if not _is_number(self.prior_strength) or self.prior_strength <= 0:
            raise ConfigError(f"prior_strength={self.prior_strength!r} must be a positive number")
        if not _is_number(self.magnitude_regularization) or self.magnitude_regularization < 0:
            raise ConfigError(f"magnitude_regularization={self.magnitude_regularization!r} must be a number >= 0")
        if (
            not get_relaxation(self.relaxation).takes_prior
            and self.prior != "magnitude"
            and self.mask_format == "logits"
        ):
            raise ConfigError(
                f"prior={self.prior!r}: relaxation {self.relaxation!r} takes its mask from the magnitudes of the weights; leave "
                'prior out, or use relaxation="ast"'
            )
        if not isinstance(self.prior_confidence, bool):
            raise ConfigError(f"prior_confidence={self.prior_confidence!r} must be True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} must be a non-negative integer")
        if isinstance(self.dense_layers, str):
            raise ConfigError(
                f"dense_layers must be a list of names, got the string {self.dense_layers!r}; write [{self.dense_layers!r}]"
            )

    def _check_terms(self) -> None:
        for name in ("slorb_block", "low_rank", "delta_rank", "mask_interval"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST):
                raise ConfigError(f"{name}={value!r:.80} must be a positive integer below {_MOST}, or None for none")
        for name in ("srste_decay", "srste_ramp"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"{name}={value!r} must be a number >= 0")
        if self.delta_rank is not None and self.trains_weight:
            raise ConfigError(
                f"delta_rank={self.delta_rank} changes the frozen weight, and relaxation {self.relaxation!r} trains that weight "
                "itself; leave delta_rank out"
            )
        if self.slorb_train_projection and self.slorb_block is None:
            raise ConfigError("slorb_train_projection=True needs slorb_block, the number of inputs in a block")

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} cannot be used when target_modules is a regular expression; use a list of names"
                    )
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"target_parameters must be a list of names, got the string {self.target_parameters!r}; write "
                f"[{self.target_parameters!r}]"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform, the block indices to prune")
        if self.mask_format == "packed":
            self._check_published_targets()
            self._check_checksum()

    def _check_lists(self) -> None:
        for name, (kind, alone) in _LISTS.items():
            value = getattr(self, name)
            if value is not None and not _all_are(kind, value) and not (alone and _all_are(kind, [value])):
                words = "names" if kind is str else "integers"
                raise ConfigError(f"{name}={value!r:.80} must be a list of {words}, or None")
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
        if tokens is not None and not all(_all_are(int, entries) for entries in lists):
            raise ConfigError(
                f"trainable_token_indices={tokens!r:.80} must be a list of integers, or one for each embedding"
            )

    def _check_published_targets(self) -> None:
        """A published mask names its layers one by one. PEFT would run any regular expression that stands there instead."""
        if isinstance(self.target_modules, str):
            raise FormatError(
                f"target_modules={self.target_modules!r}: a published mask lists the names of its layers; the config is damaged or "
                "hostile, fetch the mask again"
            )
        if self.target_modules is not None and not self.target_modules and not self.target_parameters:
            raise FormatError(
                f"target_modules={self.target_modules!r}: a published mask lists the names of its layers, and has some; the config "
                "is damaged, fetch the mask again"
            )
        for name in ("exclude_modules", "layers_pattern", "layers_to_transform"):
            if getattr(self, name) is not None:
                raise FormatError(
                    f"{name}={getattr(self, name)!r}: a published mask lists the names of its layers and leaves none out; the "
                    "config is damaged or hostile, fetch the mask again"
                )
        for name in ("modules_to_save", "trainable_token_indices"):
            if getattr(self, name):
                raise FormatError(
                    f"{name}={getattr(self, name)!r:.80}: a published mask holds codes and terms, and trains nothing else; the config "
                    "is damaged or hostile, fetch the mask again"
                )

    def _check_checksum(self) -> None:
        if self.checksum not in (None, found := self._checksum()):
            raise FormatError(
                f"checksum={self.checksum!r:.80} of the config of a published mask, but its fields {', '.join(_MEANING)} have "
                f"{found!r}; the config is damaged, fetch the mask again"
            )
        self.checksum = None  # written anew

    def _checksum(self) -> str:
        fields = json.dumps([getattr(self, name) for name in _MEANING])
        return hashlib.blake2b(fields.encode(), digest_size=8, person=b"nmsparse-conf").hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are stored."""
        content = super().to_dict()
        return content | {"checksum": self._checksum()} if self.mask_format == "packed" else content

    @property
    def trains_weight(self) -> bool:
        """Whether the adapter holds a weight of its own, which no mask alone can stand for."""
        return self.mask_format == "logits" and get_relaxation(self.relaxation).trains_weight

    @property
    def has_side_branch(self) -> bool:
        """Whether a term beside the mask is computed, which no n:m weight can hold."""
        return self.slorb_block is not None or self.low_rank is not None


def _is_number(value: object) -> bool:
    limit = sys.float_info.max  # whole numbers may be larger
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -limit <= value <= limit


def _all_are(kind: type, entries: Any) -> bool:
    if not isinstance(entries, (list, tuple, set)):
        return False
    return all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in entries)


def _pair(name: str, value: object) -> tuple[float, float]:
    """A (start, end) pair of positive numbers; JSON gives lists."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(_is_number(v) and v > 0 for v in value):
        raise ConfigError(f"{name}={value!r} must be two positive numbers, (start, end)")
    return float(value[0]), float(value[1])
