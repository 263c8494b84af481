# SPDX-License-Identifier: Apache-2.0
"""Reading a published mask from a folder or repo, strictly (docs/FORMAT.md, sections 3 and 9). No model is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME

from ..adapter import TERMS_DIGEST, NMSparseConfig, check_terms, term_shapes
from ..errors import ConfigError, FormatError, HubError
from ..files import load_json, open_tensors
from ..fingerprint import FINGERPRINT_BYTES, digest
from ..pattern import NMPattern
from .delta import FIELD, MASK_FILES, GeneralMask, check_delta_fits, codes_of_delta
from .remote import local_folder

PREFIX = "base_model.model."  # PEFT's name for the wrapped model, so that its own loaders read the file
PARTS = ("nmsparse_packed", "nmsparse_digest", "nmsparse_base")
DELTA_PARTS = ("nmsparse_changes", "nmsparse_digest", "nmsparse_base")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_LINKS = 8  # deltas to deltas, beyond which it is taken for a circle


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer as stored.

    Args:
        packed (`torch.Tensor`): packed codes, uint8 `[out, bytes]`.
        base (`torch.Tensor`): fingerprint of the base weight, uint8 `[16]`; zero where it was unknown.
        terms (`dict[str, torch.Tensor]`): float tensors of the terms beside the mask, by container name.
        changed (`int`, *optional*): of a delta, the groups that differ from its general mask.
    """

    packed: torch.Tensor
    base: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    changed: int | None = None


@dataclass(frozen=True)
class PublishedMask:
    """A mask read from a folder or repo, checked as far as it can be without its model.

    Args:
        config (`NMSparseConfig`): its configuration.
        layers (`dict[str, LayerMask]`): by module name.
        source (`str`): where it came from.
        file_bytes (`int`): size of the mask file.
        general (`GeneralMask`, *optional*): if it is stored as a delta, where it says that its general mask lies. Its layers
            here are complete all the same.
    """

    config: NMSparseConfig
    layers: dict[str, LayerMask]
    source: str
    file_bytes: int
    general: GeneralMask | None = None

    @property
    def pattern(self) -> NMPattern:
        """The pattern of every layer."""
        return NMPattern(self.config.pattern)


def read_mask(
    source: str | os.PathLike,
    revision: str | None = None,
    task: str | None = None,
    general: str | os.PathLike | PublishedMask | None = None,
) -> PublishedMask:
    """Read and check a published mask: config, header, shapes, digests, codes. No model is needed.

    Args:
        source (`str` or `Path`): folder or Hub repo.
        revision (`str`, *optional*): branch, tag or commit of the repo.
        task (`str`, *optional*): subfolder, where a repo holds masks of several tasks.
        general (`str`, `Path` or `PublishedMask`, *optional*): the general mask of a delta, if it is not where the delta
            says: folder, Hub repo, or what `read_mask` returned.

    Raises:
        FormatError: on anything that `save_mask` cannot have written, naming the tensor; or if the general mask of a delta
            is another one.
        ConfigError: if it is a training checkpoint, or `general` is given for a mask that is no delta.
        HubError: if the repo cannot be fetched.
    """
    return _whole(_read_stored(source, revision, task), general, _MAX_LINKS)


def _whole(stored: _StoredMask, general: str | os.PathLike | PublishedMask | None, links: int) -> PublishedMask:
    """A mask with all of its codes; of a delta at the end of a chain of at most `links` others."""
    if stored.general is None:
        if general is not None:
            raise ConfigError(f"{stored.source} is no delta: it holds all of its codes; leave general= out")
        return _complete(stored)
    if links == 0:
        raise FormatError(
            f"{stored.source} is the end of more than {_MAX_LINKS} deltas to deltas, or of a circle; save the mask again, to a full one"
        )
    try:
        if not isinstance(general, PublishedMask):
            general = _whole(_read_general(stored, general), None, links - 1)
    except (ConfigError, FormatError, HubError) as error:
        raise type(error)(
            f"{stored.source} is a delta, and its general mask cannot be read: {error}; if that moved, pass its place as general="
        ) from error
    return _complete(stored, general)


@dataclass(frozen=True)
class _StoredMask:
    """A mask as its files have it: of a delta, only what it changes."""

    config: NMSparseConfig
    tensors: dict[str, torch.Tensor]
    path: Path
    source: str
    task: str | None
    general: GeneralMask | None


def _read_stored(source: str | os.PathLike, revision: str | None, task: str | None) -> _StoredMask:
    folder = local_folder(source, revision, task, MASK_FILES)  # both of one commit
    for name in MASK_FILES:
        if not (folder / name).is_file():
            raise FormatError(
                f"{source}{f' (task {task!r})' if task else ''} holds no {name}; it is no mask, an incomplete one, or one "
                "of several tasks: then name the subfolder with task="
            )
    config, general = _read_config(folder / CONFIG_NAME)
    path = folder / MASK_FILES[1]
    return _StoredMask(config, _read_tensors(path), path, str(source), task, general)


def _read_general(delta: _StoredMask, given: str | os.PathLike | None) -> _StoredMask:
    """The general mask of a delta: that which was given, else where the delta says."""
    if given is not None:
        return _read_stored(given, None, None)
    if not delta.general.is_path:
        return _read_stored(delta.general.source, delta.general.revision, delta.general.task)
    if Path(delta.source).exists():
        folder = (delta.path.parent / delta.general.source).resolve()
        if not folder.is_dir():
            raise FormatError(f"there is no folder {folder}")
        return _read_stored(folder, None, None)
    root = delta.path.parents[len(Path(delta.task or "").parts)]  # named for the commit, see `fetch`
    place = delta.general.in_repo(delta.source, root.name, delta.task)
    return _read_stored(place.source, place.revision, place.task)


def _complete(stored: _StoredMask, general: PublishedMask | None = None) -> PublishedMask:
    """Check the tensors of a mask, and fill those of a delta up from its general mask."""
    config, source, path = stored.config, stored.source, stored.path
    linear, parameters = config.target_modules, config.target_parameters or []
    if not isinstance(linear, set) or not (linear or parameters):
        raise FormatError(f"{source}: target_modules of the config is no list of layer names; fetch the mask again")
    codes = PARTS if general is None else DELTA_PARTS
    terms = [f"{container}.weight" for container in term_shapes(config, 1, 1)]
    parts = (*codes, *terms, TERMS_DIGEST) if terms else codes
    paths = stored_paths(linear, parameters)
    places = {f"{PREFIX}{place}.{part}": name for name, place in paths.items() for part in parts}
    if unexpected := sorted(set(stored.tensors) - set(places)):
        raise FormatError(
            f"{path}: unexpected tensor {unexpected[0]!r}; the file is damaged, or its layers and those of the config differ"
        )
    if general is not None:
        check_delta_fits(set(paths), NMPattern(config.pattern), general, source)
    layers = {}
    for name, place in paths.items():
        found = _check_parts(path, place, stored.tensors, parts)
        layers[name] = _layer(path, name, found) if general is None else _layer_of_delta(name, found, stored, general)
    return PublishedMask(config, layers, source, path.stat().st_size, stored.general)


def _read_config(path: Path) -> tuple[NMSparseConfig, GeneralMask | None]:
    """The config of a mask; of a delta, as that of the full mask, and where the general mask lies."""
    content = load_json(path, _MAX_CONFIG_BYTES)
    if not isinstance(content, dict) or content.get("peft_type") != "NMSPARSE":
        raise FormatError(f"{path} is not the config of a mask (peft_type NMSPARSE)")
    known = {key: value for key, value in content.items() if key in NMSparseConfig.__dataclass_fields__}
    strange = sorted(content.keys() - known.keys())
    if (
        strange and "checksum" not in content
    ):  # its own name may be what is damaged; later versions of PEFT may add fields
        raise FormatError(
            f"{path}: no config of a mask has a field {strange[0]!r:.80}, and 'checksum' is missing; it is damaged, fetch the mask again"
        )
    general = None
    if content.get("mask_format") == "delta":
        general = GeneralMask.of_json(content.get(FIELD), path)
        known |= {"mask_format": "packed", FIELD: None}
    try:
        config = NMSparseConfig(**{**known, "peft_type": None})
    except TypeError as error:  # a field of another JSON type than any config has
        raise FormatError(f"{path}: {error}; the config is damaged, fetch the mask again") from error
    if config.mask_format != "packed":
        raise ConfigError(
            f"{path.parent} is a training checkpoint (logits), not a published mask; load it with PeftModel.from_pretrained, "
            "and publish it with nms.save_mask"
        )
    return config, general


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}


def stored_paths(linear: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """Where the tensors of each layer lie in the file: module paths of PEFT, which nests the parameters of one module.

    Args:
        linear (`Iterable[str]`): names of linear layers.
        parameters (`Iterable[str]`): names of fused expert weights, in the order in which their module holds them.

    Returns:
        `dict[str, str]`: layer name -> path. The first of two parameters lies one `base_layer` deeper than the last.
    """
    paths = {name: name for name in sorted(linear)}
    modules: dict[str, list[str]] = {}
    for name in parameters:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in modules.items():
        for depth, name in enumerate(reversed(names)):
            paths[name] = module + ".base_layer" * depth
    return paths


def _check_parts(
    path: Path, place: str, tensors: dict[str, torch.Tensor], parts: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The tensors of a layer by the last part of their names, after a look at their dtypes and shapes."""
    digests = (2, FINGERPRINT_BYTES) if "nmsparse_changes" in parts else (FINGERPRINT_BYTES,)
    shapes = {
        "nmsparse_digest": digests,
        "nmsparse_base": (FINGERPRINT_BYTES,),
        TERMS_DIGEST: (FINGERPRINT_BYTES,),
    }
    dims = {"nmsparse_packed": (2, "[out, bytes]"), "nmsparse_changes": (1, "[bytes]")}
    found = {part: tensors.get(f"{PREFIX}{place}.{part}") for part in parts}
    for part in ("nmsparse_changes", TERMS_DIGEST):  # nothing differs from the general mask; PEFT wrote the file
        if part in found and found[part] is None:
            del found[part]
    for part, tensor in found.items():
        if part in dims:
            fits, expected = tensor is not None and tensor.dim() == dims[part][0], f"uint8 {dims[part][1]}"
        elif part in shapes:
            fits, expected = tensor is not None and tensor.shape == shapes[part], f"uint8 {list(shapes[part])}"
        else:
            fits = tensor is not None and tensor.is_floating_point() and tensor.dim() in (2, 3)
            fits, expected = fits and bool(tensor.isfinite().all()), "finite floats"
        if not fits or (part in (*dims, *shapes) and tensor.dtype != torch.uint8):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(f"{path}: {place}.{part} must be {expected}, got {got}; the file is damaged")
    if TERMS_DIGEST in found:
        check_terms(_terms(found), found[TERMS_DIGEST], f"{path}: {place}")
    return found


def _layer(path: Path, name: str, found: dict[str, torch.Tensor]) -> LayerMask:
    if not torch.equal(digest(found["nmsparse_packed"]), found["nmsparse_digest"]):
        raise FormatError(
            f"{path}: the codes of {name} do not match their digest; the file is damaged, fetch it again"
        )
    return LayerMask(found["nmsparse_packed"], found["nmsparse_base"], _terms(found))


def _layer_of_delta(
    name: str, found: dict[str, torch.Tensor], stored: _StoredMask, general: PublishedMask
) -> LayerMask:
    packed, changed = codes_of_delta(
        found.get("nmsparse_changes"),
        found["nmsparse_digest"],
        general.layers[name].packed,
        general.pattern,
        name,
        (str(stored.path), general.source),
    )
    return LayerMask(packed, found["nmsparse_base"], _terms(found), changed)


def _terms(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        part.removesuffix(".weight"): tensor
        for part, tensor in found.items()
        if part not in (*PARTS, *DELTA_PARTS, TERMS_DIGEST)
    }


def mask_summary(mask: PublishedMask) -> dict[str, object]:
    """Facts about a published mask, for `inspect`."""
    config = {
        key: value for key, value in asdict(mask.config).items() if value is not None and key != "target_modules"
    }
    facts = {"source": mask.source, "layers": len(mask.layers), "file_bytes": mask.file_bytes, "config": config}
    if mask.general is not None:
        facts |= {
            "delta_to": asdict(mask.general),
            "changed_groups": sum(layer.changed for layer in mask.layers.values()),
        }
    return facts
