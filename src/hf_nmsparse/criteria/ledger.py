# SPDX-License-Identifier: Apache-2.0
"""What was chosen so far, in little memory; and on disk, so that a walk that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import ops
from ..errors import ConfigError, FormatError, PatternError
from ..files import read_json, write_file
from ..fingerprint import digest, fingerprint, to_hex
from ..pattern import NMPattern, Pattern
from .base import Choice
from .report import LayerReport

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


@dataclass
class _Stored:
    """A choice as it is kept: codes of the mask (unstructured: bits), values of kept weights if they changed."""

    shape: tuple[int, int]
    dtype: torch.dtype
    mask: torch.Tensor
    values: torch.Tensor | None = None
    values_file: Path | None = None


class Ledger:
    """Choices by layer name, in CPU memory: a mask takes 0.67 bit a weight (2:4), new values what they take.

    Args:
        pattern (`NMPattern` or `Unstructured`): of all masks.
        folder (`Path`, *optional*): finished blocks are written there; new values are then read back when needed.
    """

    def __init__(self, pattern: Pattern, folder: Path | None = None) -> None:
        self.pattern = pattern
        self.folder = folder
        self.layers: list[LayerReport] = []
        self._stored: dict[str, _Stored] = {}
        self._orders: dict[str, torch.Tensor] = {}
        self._bases: dict[str, torch.Tensor] = {}

    # --- in memory ----------------------------------------------------------------------------------------------------
    def add(self, name: str, choice: Choice, weight: torch.Tensor, report: LayerReport, where: str) -> None:
        """Keep the choice for one layer, whose mask was checked; `weight` is its dense weight, `where` begins an error.

        Raises:
            PatternError: if the mask is no mask of the pattern.
        """
        mask = choice.mask
        values = None
        if choice.weight is not None:
            if choice.weight.shape != weight.shape:
                raise PatternError(
                    f"{where}: got new weights {list(choice.weight.shape)}, expected {list(weight.shape)}"
                )
            values = choice.weight[mask].to(weight.dtype)
            if not bool(values.isfinite().all()):
                raise PatternError(f"{where}: its new weights are not finite; prune with weights='keep'")
            values = values.cpu()
        self._stored[name] = _Stored(tuple(weight.shape), weight.dtype, self._packed(mask, where).cpu(), values)
        self.layers.append(report)

    def add_base(self, name: str, fingerprint: torch.Tensor) -> None:
        """Keep the fingerprint of a dense weight, uint8 `[16]`.

        Raises:
            ConfigError: if the folder is of a run with another one.
        """
        before = self._bases.setdefault(name, fingerprint)
        if not torch.equal(before, fingerprint):
            raise ConfigError(
                f"{name}: checkpoint_folder {self.folder} is of a run with other weights; repeat that run, name another "
                "folder, or remove this one"
            )

    def base(self, name: str) -> torch.Tensor | None:
        """The fingerprint that `add_base` kept."""
        return self._bases.get(name)

    def add_order(self, name: str, order: torch.Tensor) -> None:
        """Keep the order into which the input channels of a layer were brought, int64 `[in]`."""
        self._orders[name] = order

    def order(self, name: str) -> torch.Tensor | None:
        """The order that `add_order` kept."""
        return self._orders.get(name)

    @property
    def permuted(self) -> list[str]:
        """Layers whose input channels were brought into another order."""
        return list(self._orders)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def packed(self, name: str) -> torch.Tensor:
        """The packed codes (unstructured: bits) of a layer, uint8 `[out, bytes]`."""
        return self._stored[name].mask

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a layer."""
        return self._stored[name].shape

    def choice(self, name: str, device: torch.device | str = "cpu") -> Choice:
        """What was chosen for a layer, on `device`; its weight, if there is one, is zero where pruned."""
        stored = self._stored[name]
        mask = self._unpacked(stored.mask.to(device), stored.shape[1], name)
        values = stored.values
        if stored.values_file is not None:
            with safe_open(stored.values_file, framework="pt") as file:
                values = file.get_tensor(f"{name}.values")
        if values is None:
            return Choice(mask)
        weight = torch.zeros(stored.shape, dtype=stored.dtype, device=device)
        weight[mask] = values.to(device)
        return Choice(mask, weight)

    def _packed(self, mask: torch.Tensor, where: str) -> torch.Tensor:
        if isinstance(self.pattern, NMPattern):
            try:
                codes = ops.mask_to_codes(mask, self.pattern)
            except PatternError as error:
                raise PatternError(f"{where}: {error}") from error
            return ops.pack_codes(codes, self.pattern, mask.shape[1])
        if abs(float(mask.float().mean()) - self.pattern.density) > 0.02 + 1 / mask.shape[1]:
            pruned = 1 - float(mask.float().mean())
            raise PatternError(f"{where}: prunes {pruned:.1%} of the weights, expected {self.pattern}")
        return ops.pack_bits(mask)

    def _unpacked(self, packed: torch.Tensor, width: int, name: str) -> torch.Tensor:
        if isinstance(self.pattern, NMPattern):
            return ops.codes_to_mask(ops.unpack_codes(packed, self.pattern, width, name), self.pattern, width)
        return ops.unpack_bits(packed, width)

    def check_readable(self) -> None:
        """Look into the files that hold new values.

        Raises:
            FormatError: naming one that is gone or damaged.
        """
        for path in {stored.values_file for stored in self._stored.values()} - {None}:
            try:
                with safe_open(path, framework="pt"):
                    continue
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path} cannot be read ({error}); prune again") from error

    # --- on disk ------------------------------------------------------------------------------------------------------
    def open_folder(self, run: Mapping[str, object]) -> None:
        """Read the blocks that an earlier walk of the same run has finished.

        Args:
            run (`Mapping[str, object]`): what the choices depend on, as JSON; its "layers" are the names of all layers.

        Raises:
            ConfigError: if the folder belongs to another run.
            FormatError: naming a file that is damaged.
        """
        files = open_run_folder(self.folder, run)
        for file in files:
            self._read_block(file)
        position = {name: index for index, name in enumerate(run["layers"])}
        self.layers.sort(key=lambda layer: position[layer.name])
        self._orders = dict(sorted(self._orders.items(), key=lambda item: position[item[0]]))

    def finish_block(self, key: str, names: list[str], weight_names: Iterable[str]) -> None:
        """Write what was chosen for the layers of one block, if there is a folder, and let go of their new values."""
        if self.folder is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        path = self.folder / f"{key}.safetensors"
        for name in names:
            stored = self._stored[name]
            tensors[f"{name}.mask"] = stored.mask.contiguous()
            if stored.values is not None:
                tensors[f"{name}.values"] = stored.values.contiguous()
            if name in self._orders:
                tensors[f"{name}.order"] = self._orders[name].cpu().contiguous()
        tensors |= {f"{name}.base": self._bases[name] for name in weight_names if name in self._bases}
        about = {
            name: {"shape": self._stored[name].shape, "dtype": str(self._stored[name].dtype).removeprefix("torch.")}
            for name in names
        }
        reports = [dataclasses.asdict(layer) for layer in self.layers if layer.name in about]
        write_file(path, save(tensors, metadata={"layers": json.dumps(about), "reports": json.dumps(reports)}))
        for name in names:
            if self._stored[name].values is not None:
                self._stored[name].values, self._stored[name].values_file = None, path

    def _read_block(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["layers"])
                reports = json.loads(file.metadata()["reports"])
                keys = set(file.keys())
                for name, facts in about.items():
                    changed = path if f"{name}.values" in keys else None
                    self._stored[name] = _Stored(
                        tuple(facts["shape"]),
                        getattr(torch, facts["dtype"]),
                        file.get_tensor(f"{name}.mask"),
                        values_file=changed,
                    )
                    if f"{name}.order" in keys:
                        self._orders[name] = file.get_tensor(f"{name}.order")
                for key in keys:
                    if key.endswith(".base"):
                        self._bases[key.removesuffix(".base")] = file.get_tensor(key)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged ({error}); remove it, and its block is pruned again") from error
        self.layers += [LayerReport(**report) for report in reports]


def open_run_folder(folder: Path, run: Mapping[str, object]) -> list[Path]:
    """The files of the blocks that an earlier call of the same run has finished; a new folder is made, and told of which run.

    Args:
        folder (`Path`): the folder.
        run (`Mapping[str, object]`): what the results depend on, as JSON.

    Raises:
        ConfigError: if the folder belongs to another run, or to something else.
        FormatError: if its description of the run is damaged.
    """
    wanted = json.loads(json.dumps(run))
    path = folder / RUN_FILE
    found = read_json(path)
    if found is None:
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(f"checkpoint_folder {folder} holds other files; name an empty or new folder")
        write_file(path, json.dumps(wanted, indent=1) + "\n")
        return []
    if different := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
        key = different[0]
        raise ConfigError(
            f"checkpoint_folder {folder} is of another run: its {key} {_difference(found.get(key), wanted.get(key))}; "
            "repeat that run, name another folder, or remove this one"
        )
    files = sorted(folder.glob("*.safetensors"))
    if files:
        logger.info("resumed from %s: %d blocks are finished", folder, len(files))
    return files


def identity_of_batch(batch: Mapping[str, object]) -> dict[str, str]:
    """Digests of the tensors of a batch: a run that goes on must have the same."""
    parts = {key: value for key, value in sorted(batch.items()) if isinstance(value, torch.Tensor)}
    return {key: to_hex(digest(value)) for key, value in parts.items()}


def identity_of(parameters: Iterable[torch.Tensor]) -> str:
    """One digest of samples of all parameters; those that cannot be read (quantised, on disk) are left out."""
    known = (fingerprint(parameter) for parameter in parameters)
    return to_hex(digest(torch.cat([one for one in known if one is not None])))


def check_mask(mask: object, weight: torch.Tensor, where: str) -> None:
    """Refuse what is no bool mask of the shape of `weight`; `where` begins the error.

    Raises:
        PatternError: with what was got and expected.
    """
    expected = f"expected a mask torch.bool {list(weight.shape)}"
    if not isinstance(mask, torch.Tensor):
        raise PatternError(f"{where}: got {type(mask).__name__}, {expected}")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise PatternError(f"{where}: got {mask.dtype} {list(mask.shape)}, {expected}")


def _difference(found: object, wanted: object) -> str:
    """In what two values differ: of lists their first difference, as there may be hundreds of names."""
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            return f"are {len(found)}, now {len(wanted)}"
        number = next(index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        return f"differ at number {number}: {found[number]!r}, now {wanted[number]!r}"
    return f"is {found!r}, now {wanted!r}"


def finished_layers(folder: Path) -> int:
    """How many layers the finished blocks in a checkpoint folder have; a damaged one, which a walk would name, has none."""
    done = 0
    for path in folder.glob("*.safetensors"):
        with suppress(SafetensorError, KeyError, TypeError, ValueError), safe_open(path, framework="pt") as file:
            done += len(json.loads(file.metadata()["layers"]))
    return done
