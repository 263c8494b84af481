# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed (SIGKILL) at random moments and started again until they end, held against runs left alone.

    python benchmarks/kills.py --kills 100 --seed 0

`train` and `prune`: the logits and all weights must be equal bit for bit, after however many kills. Writers (`save_mask`, the
folder that `compress` writes, `eval --record`) overwrite one folder again and again with two contents: after a kill it must
hold one of them, whole. Every command runs in a process that is forked from this one after the imports, on a tiny random Llama
that is made on the spot.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from peft import get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timing import write_results
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_nmsparse as nms
from hf_nmsparse import criteria, training  # noqa: F401  (imported before the forks)
from hf_nmsparse.cli.main import main as nmsparse
from hf_nmsparse.cli.recording import Record
from hf_nmsparse.cli.resuming import was_finished
from hf_nmsparse.cli.writing import write_model
from hf_nmsparse.results import RunResults

TRAIN = (
    "train base --data text.txt --output {output} --prior magnitude --sequence-length 32 --max_steps 12 --save_steps 1"
)
TRAIN += " --per_device_train_batch_size 2 --logging_steps 1 --learning_rate 0.05 --report_to none"
PRUNE = "prune base --criterion sparsegpt --calibration text.txt --samples 8 --sequence-length 32 --output {output}"

tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that was killed would keep it, and stop us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="of each command at least; ten times as many of a writer"
    )
    parser.add_argument("--only", nargs="+", default=["train", "prune", *WRITERS], help="what to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file; by default in benchmarks/results")
    arguments = parser.parse_args()
    target = Path(arguments.output).resolve() if arguments.output else None
    torch.set_num_threads(1)  # threads would not survive the forks
    found = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        make_inputs()
        for name in arguments.only:
            begun, choose = time.time(), random.Random(f"{arguments.seed} {name}")
            if name in WRITERS:
                found[name] = kill_writer(name, 10 * arguments.kills, choose)
            else:
                found[name] = kill_command(name, arguments.kills, choose)
            found[name]["seconds"] = round(time.time() - begun, 1)
            print(name, found[name], flush=True)
    write_results("kills", "cpu", {"seed": arguments.seed, "killed": found}, target)


def make_inputs() -> None:
    """`base`, a tiny random Llama of three blocks with a tokenizer, and `text.txt`."""
    words = [f"w{index}" for index in range(60)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained("base")
    choose = random.Random(0)
    Path("text.txt").write_text(" ".join(choose.choice(words) for _ in range(3000)))


# --- processes --------------------------------------------------------------------------------------------------------
def forked(work: Callable[[], object], seconds: float | None) -> int | None:
    """Do `work` in a process group of its own, killed after so many seconds; its exit code, `None` if it was killed."""
    process = os.fork()
    if process == 0:
        os.setsid()
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os._exit(code)
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # it has no group yet, or no longer
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def command(line: str, seconds: float | None = None) -> int | None:
    def work() -> None:
        sys.argv = ["nmsparse", *line.split()]
        nmsparse()

    return forked(work, seconds)


# --- commands that go on ----------------------------------------------------------------------------------------------
def kill_command(name: str, kills: int, choose: random.Random) -> dict:
    """Runs of a command, each killed until it ends by itself, until there were so many kills."""
    line, where = {"train": (TRAIN, place_in_training), "prune": (PRUNE, place_in_pruning)}[name]
    begun = time.monotonic()
    left_alone = f"whole-{name}"
    if command(line.format(output=left_alone)) != 0:
        raise SystemExit(Path("log.txt").read_text())
    alone = time.monotonic() - begun
    expected, places, runs, failed, different = result_of(Path(left_alone)), Counter(), 0, [], 0
    while sum(places.values()) < kills:
        runs += 1
        output, longest = Path("cut"), alone
        while True:
            resume = " --resume" if name == "train" and list(output.glob("checkpoints/checkpoint-*")) else ""
            code = command(line.format(output=output) + resume, choose.uniform(0, longest))
            if code is not None:
                break
            places[where(output)] += 1
            longest *= 1.15  # so that it ends on a machine that others slow down, too
        if code != 0:
            failed.append(Path("log.txt").read_text()[-500:])
        elif not same(expected, result_of(output)):
            different += 1
        for left in (output, Path(".cut.unfinished")):
            shutil.rmtree(left, ignore_errors=True)
    return {
        "kills": sum(places.values()),
        "where": dict(places),
        "runs": runs,
        "runs_that_ended_bit_equal": runs - len(failed) - different,
        "runs_that_ended_otherwise": different,
        "runs_that_could_not_go_on": failed,
        "seconds_left_alone": round(alone, 2),
    }


def place_in_training(output: Path) -> str:
    """Where a kill has hit."""
    there = list(output.glob("checkpoints/checkpoint-*"))
    if (output / "adapter_config.json").exists() or list(output.parent.glob(f".{output.name}.new-*")):
        return "while or after the mask was published"
    if any(not was_finished(path) for path in there):
        return "within a checkpoint"
    return "between checkpoints" if there else "before the first checkpoint"


def place_in_pruning(output: Path) -> str:
    """Where a kill has hit."""
    blocks = output.parent / f".{output.name}.unfinished" / "blocks"
    if output.exists() or list(output.parent.glob(f".{output.name}.new-*")):
        return "while or after the model was written"
    if list(blocks.glob(".*.safetensors.*")):
        return "within a block's file"
    return "after the first block" if list(blocks.glob("*.safetensors")) else "before the first block"


def result_of(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of what a command has left: weights, masks, and the logits of the last checkpoint."""
    files = [*output.glob("*.safetensors"), *output.glob("mask/*.safetensors")]
    files += output.glob("checkpoints/checkpoint-12/adapter_model.safetensors")
    return {str(path.relative_to(output)): load_file(path) for path in files}


def same(one: dict, other: dict) -> bool:
    """Whether tensors are equal to the bit."""
    if not one or one.keys() != other.keys() or any(one[file].keys() != other[file].keys() for file in one):
        return False
    pairs = ((value, other[file][key]) for file, tensors in one.items() for key, value in tensors.items())
    return all(value.dtype == now.dtype and torch.equal(value, now) for value, now in pairs)


# --- writers ------------------------------------------------------------------------------------------------------------
def kill_writer(name: str, kills: int, choose: random.Random) -> dict:
    """Overwrite a folder with two contents in turn, until killed; look at it after each kill."""
    folder, write = Path("written"), WRITERS[name]()
    contents = []
    for number in (0, 1, 0, 1):
        begun = time.monotonic()
        write(folder, number)
        longest = 4 * (time.monotonic() - begun)
        contents.append(digest_of(folder))
    if contents[:2] != contents[2:] or contents[0] == contents[1]:
        raise SystemExit(f"{name}: the two contents are not the same each time, or are one")
    held, left = Counter(), 0
    names = ("the first content", "the second content")
    for _ in range(kills):

        def again() -> None:
            number = 0
            while True:
                write(folder, number)
                number = 1 - number

        if forked(again, choose.uniform(0, longest)) is not None:
            raise SystemExit(Path("log.txt").read_text())
        now = digest_of(folder)
        held[names[contents[:2].index(now)] if now in contents else "a mixture"] += 1
        left = max(left, len(list(Path().glob(".written.new-*"))))
    shutil.rmtree(folder)
    return {"kills": kills, "held": dict(held), "most_leftovers_at_a_time": left}


def digest_of(folder: Path) -> str:
    """Of all names and files, but for hidden ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    facts = [(str(path.relative_to(folder)), hashlib.sha256(content_of(path)).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def content_of(path: Path) -> bytes:
    """The bytes of a file; of one of safetensors, whose header has no order, in an order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            about = sorted((file.metadata() or {}).items())
    except SafetensorError:
        return b"damaged"
    return repr(about).encode() + save(tensors)


def masks() -> Callable[[Path, int], object]:
    """`nms.save_mask` of two masks."""
    base = LlamaForCausalLM.from_pretrained("base")
    two = [get_peft_model(copy.deepcopy(base), nms.NMSparseConfig()) for _ in range(2)]
    nms.training.set_prior(two[1], "magnitude")
    for layer in nms.adapter.mask_layers(two[1]).values():
        layer.set_prior_codes("default", 5 - layer.mask_codes("default"))
    return lambda folder, number: nms.save_mask(two[number], folder, results=RunResults(method=f"number {number}"))


def packed_models() -> Callable[[Path, int], object]:
    """What `nmsparse compress` writes, of two masks."""
    two = []
    for number in range(2):
        model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), nms.NMSparseConfig())
        for layer in nms.adapter.mask_layers(model).values():
            codes = layer.mask_codes("default")
            layer.set_prior_codes("default", 5 - codes if number else codes)
        two.append(nms.compress(model))

    def write(folder: Path, number: int) -> None:
        results = RunResults(base_model="base", pattern="2:4", method=f"number {number}")
        write_model(two[number], folder, "base", results, packed=True)

    return write


def records() -> Callable[[Path, int], object]:
    """What `nmsparse eval --record` adds to results and card of a mask, of two measurements."""
    write_mask = masks()
    rows = [
        {
            "sha256": "0" * 64,
            "data": "text",
            "sequence_length": 32,
            "stride": 32,
            "tokens": 31,
            "perplexity": {"model": 10.0 + n},
        }
        for n in range(2)
    ]

    def write(folder: Path, number: int) -> None:
        if not folder.exists():
            write_mask(folder, 0)
        record = Record(RunResults.read(folder / "results.json"), folder)
        record._said = True  # the command line is added once by each process, and would make each content a new one
        record.add(evaluations=[rows[number]])

    return write


WRITERS = {"save_mask": masks, "compress": packed_models, "eval --record": records}


if __name__ == "__main__":
    main()
