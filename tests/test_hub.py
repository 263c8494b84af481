# SPDX-License-Identifier: Apache-2.0
"""Pushing to and pulling from a Hub on localhost: one commit or none, clear refusals, and everything loads by its id."""

import errno
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import facts, run
from huggingface_hub import HfApi, constants
from local_hub import GUEST_TOKEN, Dropped, File, Refusal, as_the_hub
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import hf_nmsparse as nms
from hf_nmsparse import NMSparseConfig
from hf_nmsparse.adapter import mask_layers
from hf_nmsparse.errors import ConfigError, FormatError, HubError

MASK, PACKED = "user/mask", "user/packed"
MASK_FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "results.json"}


@pytest.fixture
def local_hub(monkeypatch, tmp_path_factory):
    """A hub on localhost in place of the Hub, empty."""
    with as_the_hub(monkeypatch, tmp_path_factory.mktemp("hf_home")) as hub:
        yield hub


@pytest.fixture
def make_masked(base_folder):
    """Builds the base with a mask on it that depends on the seed."""

    def build(seed: int = 1) -> PeftModel:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), NMSparseConfig()).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in mask_layers(model).values():
                layer.nmsparse_logits["default"].weight.normal_(generator=generator)
        return model

    return build


@pytest.fixture
def make_packed(make_llama):
    """Builds a packed model; an odd seed prunes other weights."""

    def build(seed: int = 0) -> torch.nn.Module:
        model = make_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += 0.1 * seed
        nms.prune(model, "magnitude", progress=False)
        return nms.compress(model)

    return build


def load(base_folder, *arguments, **options):
    return nms.load_mask(AutoModelForCausalLM.from_pretrained(base_folder), *arguments, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- masks ----------------------------------------------------------------------------------------------------------
def test_a_pushed_mask_loads_by_its_id(local_hub, make_masked, base_folder, tokens):
    model = make_masked()
    commit = nms.push_mask(model, MASK, private=True)
    repo = local_hub.repos[MASK]
    assert set(repo.files()) == MASK_FILES and repo.private
    assert repo.history() == ["initial commit", "Publish 2:4 mask"] and commit.oid == repo.branches["main"]
    assert torch.equal(load(base_folder, MASK)(tokens).logits, model(tokens).logits)
    assert (nms.verify(MASK).kind, len(nms.verify(MASK).layers)) == ("mask", 14)
    card = repo.files()["README.md"].decode()
    assert f'nms.load_mask(model, "{MASK}")' in card and "<this repository>" not in card


def test_branches_tags_and_commits_are_revisions(local_hub, make_masked, base_folder, tokens):
    models = {name: make_masked(seed) for seed, name in enumerate(("first", "main", "better"))}
    outputs = {name: model(tokens).logits for name, model in models.items()}
    assert not torch.equal(outputs["first"], outputs["main"]) and not torch.equal(outputs["main"], outputs["better"])
    commit = nms.push_mask(models["first"], MASK, commit_message="First").oid
    HfApi().create_tag(MASK, tag="v1")
    nms.push_mask(models["main"], MASK)
    nms.push_mask(models["better"], MASK, revision="better")
    revisions = {None: "main", "main": "main", "better": "better", "v1": "first", commit: "first"}
    for revision, name in revisions.items():
        assert torch.equal(load(base_folder, MASK, revision=revision)(tokens).logits, outputs[name])
    assert local_hub.repos[MASK].history("better")[-2:] == ["Publish 2:4 mask"] * 2
    for fixed in ("v1", commit):
        with pytest.raises(ConfigError, match="tag or commit"):
            nms.push_mask(models["main"], MASK, revision=fixed)


def test_masks_of_several_tasks_share_a_repo(local_hub, make_masked, base_folder, tokens):
    models = {"law": make_masked(1), "recht/österreich": make_masked(2)}
    for task, model in models.items():
        nms.push_mask(model, MASK, task=task)
    assert local_hub.repos[MASK].history()[1:] == ["Publish 2:4 mask for law", "Publish 2:4 mask for recht/österreich"]
    for task, model in models.items():
        expected = model(tokens).logits
        assert torch.equal(load(base_folder, MASK, task=task)(tokens).logits, expected)
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        assert torch.equal(PeftModel.from_pretrained(base, MASK, subfolder=task)(tokens).logits, expected)
        assert nms.verify(MASK, task=task).ok
        card = local_hub.repos[MASK].files()[f"{task}/README.md"].decode()
        assert f'"{MASK}", task="{task}"' in card and f'"{MASK}", subfolder="{task}"' in card
    for missing in (None, "nothing"):
        with pytest.raises(FormatError, match=r"holds no adapter_config.json.*task="):
            nms.read_mask(MASK, task=missing)
    for wrong in ("../law", "/law", "", "a:b"):
        with pytest.raises(ConfigError, match="names no subfolder"):
            nms.push_mask(models["law"], MASK, task=wrong)


def test_pushing_the_same_mask_twice_makes_one_commit(local_hub, make_masked, caplog):
    first = nms.push_mask(make_masked(), MASK)
    again = nms.push_mask(make_masked(), MASK)
    assert again.oid == first.oid and local_hub.repos[MASK].history() == ["initial commit", "Publish 2:4 mask"]
    assert f"{MASK} holds exactly this mask already" in caplog.text


def test_a_guest_opens_a_pull_request(local_hub, make_masked, monkeypatch):
    nms.push_mask(make_masked(1), MASK)
    before = local_hub.repos[MASK].files()
    monkeypatch.setenv("HF_TOKEN", GUEST_TOKEN)
    with pytest.raises(HubError, match="may not do this"):
        nms.push_mask(make_masked(2), MASK)
    commit = nms.push_mask(make_masked(2), MASK, create_pr=True)
    assert commit.pr_url.startswith(local_hub.endpoint) and local_hub.repos[MASK].files() == before
    assert local_hub.repos[MASK].files(commit.pr_revision) != before
    with pytest.raises(ConfigError, match="pull request goes to 'main'"):
        nms.push_mask(make_masked(2), MASK, create_pr=True, revision="other")


def test_both_files_of_a_mask_come_from_one_commit(local_hub, make_masked):
    nms.push_mask(make_masked(1), MASK)
    expected = local_hub.repos[MASK].files()["adapter_model.safetensors"]

    def pushed_meanwhile(method, path):
        if path.endswith("adapter_config.json") and "resolve" in path:
            local_hub.intercept = None
            repo = local_hub.repos[MASK]
            repo.add("main", {}, "emptied meanwhile", repo.branches["main"])

    local_hub.intercept = pushed_meanwhile
    assert nms.read_mask(MASK).file_bytes == len(expected)
    assert local_hub.repos[MASK].history()[-1] == "emptied meanwhile"


# --- refusals -------------------------------------------------------------------------------------------------------
def test_what_cannot_be_read_is_one_error_that_says_what_to_do(local_hub, make_masked, monkeypatch, tmp_path):
    nms.push_mask(make_masked(), MASK)
    for source, revision, said in (
        (
            "user/nothing",
            None,
            "could not fetch user/nothing: there is no such folder here, and the Hub has no such repo",
        ),
        ("nothing", None, "hf auth login"),
        ("./nothing", None, "no such folder here, and './nothing' is no valid repo id"),
        (tmp_path / "nothing", None, "no such folder here"),
        (MASK, "v9", r"user/mask \(revision 'v9'\): it has no such branch, tag or commit"),
    ):
        for read in (nms.read_mask, nms.verify):
            with pytest.raises(HubError, match=said) as raised:
                read(source, revision=revision)
            assert raised.value.__cause__ is not None
    local_hub.repos[MASK].gated = True
    monkeypatch.setenv("HF_TOKEN", GUEST_TOKEN)
    with pytest.raises(HubError, match="gated; ask for access"):
        nms.read_mask(MASK)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match="token is missing or not valid"):
        nms.read_mask("user/other")

    def out_of_order(method, path):
        raise Refusal(503, "out of order")

    local_hub.intercept = out_of_order
    with pytest.raises(HubError, match=r"the Hub answered 503, .*; try again later"):
        nms.read_mask("user/other")
    with pytest.raises(ConfigError, match="local folder, which has no revision"):
        nms.read_mask(tmp_path, revision="v1")


def test_what_cannot_be_pushed_is_one_error_and_changes_nothing(local_hub, make_masked, monkeypatch):
    model = make_masked()
    with pytest.raises(HubError, match="no valid repo id"):
        nms.push_mask(model, "./mask")
    with pytest.raises(HubError, match="may not do this"):
        nms.push_mask(model, "somebody/mask")
    with pytest.raises(HubError, match="could not push to user/mask: the token is missing or not valid"):
        nms.push_mask(model, MASK, token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        nms.push_mask(model, MASK)
    assert not local_hub.repos


def test_a_repo_is_not_made_public_or_private_by_a_push(local_hub, make_masked):
    nms.push_mask(make_masked(), MASK)
    with pytest.raises(ConfigError, match="exists and is public"):
        nms.push_mask(make_masked(2), MASK, private=True)
    assert len(local_hub.repos[MASK].history()) == 2


def test_a_mask_does_not_go_beside_a_model(local_hub, make_masked, make_packed):
    make_packed().push_to_hub(PACKED)
    with pytest.raises(ConfigError, match="holds a model at this place"):
        nms.push_mask(make_masked(), PACKED)
    nms.push_mask(make_masked(), PACKED, task="law")
    assert nms.verify(PACKED).kind == "packed model" and nms.verify(PACKED, task="law").kind == "mask"


# --- failures in the middle -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["PUT /objects/", "POST /api/models/user/mask/commit/", "POST /user/mask.git/"])
def test_a_push_that_fails_in_the_middle_changes_nothing_and_can_be_repeated(
    local_hub, make_masked, base_folder, tokens, place
):
    nms.push_mask(make_masked(1), MASK)
    repo = local_hub.repos[MASK]
    before, history = repo.files(), repo.history()

    def failing(method, path):
        if f"{method} {path}".startswith(place):
            raise Refusal(501, "out of order")

    local_hub.intercept = failing
    model = make_masked(2)
    with pytest.raises(HubError, match=r"could not push to user/mask: .*501"):
        nms.push_mask(model, MASK)
    assert (repo.files(), repo.history()) == (before, history)
    local_hub.intercept = None
    nms.push_mask(model, MASK)
    assert repo.history() == [*history, "Publish 2:4 mask"]
    assert torch.equal(load(base_folder, MASK)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("place", "failure", "said"),
    [
        ("POST /api/models/user/mask/commit/", Refusal(401, "revoked"), "the token is missing or not valid"),
        ("PUT /objects/", Dropped(), "could not push to user/mask: .*(disconnected|connection)"),
        ("POST /api/models/user/mask/commit/", Dropped(), "could not push to user/mask: .*(disconnected|connection)"),
    ],
)
def test_a_token_revoked_or_a_connection_dropped_on_the_way_changes_nothing(
    local_hub, make_masked, monkeypatch, place, failure, said
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    nms.push_mask(make_masked(1), MASK)
    repo = local_hub.repos[MASK]
    before, history = repo.files(), repo.history()

    def failing(method, path):
        if f"{method} {path}".startswith(place):
            raise failure

    local_hub.intercept = failing
    with pytest.raises(HubError, match=said):
        nms.push_mask(make_masked(2), MASK)
    assert (repo.files(), repo.history()) == (before, history)
    local_hub.intercept = None
    nms.push_mask(make_masked(2), MASK)
    assert repo.history() == [*history, "Publish 2:4 mask"]


def test_a_connection_that_drops_while_fetching_is_one_error_and_the_next_try_succeeds(
    local_hub, make_masked, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    nms.push_mask(make_masked(), MASK)

    def dropping(method, path):
        if path.endswith("adapter_model.safetensors") or path.startswith("/objects/"):
            raise Dropped

    local_hub.intercept = dropping
    with pytest.raises(HubError, match="could not fetch user/mask"):
        nms.read_mask(MASK)
    local_hub.intercept = None
    assert nms.read_mask(MASK).layers


def test_a_full_disk_while_pulling_leaves_what_was_there(local_hub, make_masked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nms.push_mask(make_masked(1), MASK)
    run("pull user/mask --output mask")
    before = {path.name: path.read_bytes() for path in Path("mask").iterdir()}
    nms.push_mask(make_masked(2), MASK)
    real = shutil.copyfile

    def full(source, target):
        if Path(target).name == "adapter_model.safetensors":
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in run("pull user/mask --output mask", 2).stderr
    assert names_in(tmp_path) == ["mask"]
    assert {path.name: path.read_bytes() for path in Path("mask").iterdir()} == before


def test_a_concurrent_push_is_refused(local_hub, make_masked):
    nms.push_mask(make_masked(1), MASK)
    repo = local_hub.repos[MASK]

    def overtaken(method, path):
        if path.endswith("/commit/main"):
            local_hub.intercept = None
            repo.add("main", dict(repo.commits[repo.branches["main"]].files), "overtook", repo.branches["main"])

    local_hub.intercept = overtaken
    with pytest.raises(HubError, match="someone else has committed since"):
        nms.push_mask(make_masked(2), MASK)
    assert repo.history()[-1] == "overtook"
    nms.push_mask(make_masked(2), MASK)
    assert repo.history()[-1] == "Publish 2:4 mask"


def test_without_a_network_the_cache_serves(local_hub, make_masked, base_folder, tokens, monkeypatch):
    model = make_masked()
    nms.push_mask(model, MASK)
    expected = model(tokens).logits
    assert torch.equal(load(base_folder, MASK)(tokens).logits, expected)

    def check(said):
        assert torch.equal(load(base_folder, MASK)(tokens).logits, expected)
        with pytest.raises(HubError, match=said):
            nms.read_mask("user/other")
        with pytest.raises(HubError, match="could not push to user/mask"):
            nms.push_mask(model, MASK)

    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        check("not in the cache, and the Hub may not be contacted; unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    check("not in the cache, and the Hub is out of reach")


# --- models ---------------------------------------------------------------------------------------------------------
def test_push_to_hub_of_a_packed_model_loads_by_its_id(local_hub, make_packed, tokens):
    model = make_packed()
    model.push_to_hub(PACKED)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(PACKED)(tokens).logits, model(tokens).logits)
    assert (nms.verify(PACKED).kind, nms.verify(PACKED).ok) == ("packed model", True)


def test_peft_pushes_and_loads_a_mask_with_its_base(local_hub, make_llama, tokens, tmp_path):
    make_llama().push_to_hub("user/base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained("user/base"), NMSparseConfig(init_weights=False)
    ).eval()
    nms.push_mask(model, MASK)
    expected = model(tokens).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(MASK)
    assert torch.equal(loaded(tokens).logits, expected)
    loaded.push_to_hub("user/again")
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained("user/again")(tokens).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained("user/again")(tokens).logits, expected)
    assert nms.verify("user/again").kind == "mask"


def test_a_model_in_other_shards_replaces_the_old_ones(local_hub, make_packed, tmp_path, tokens):
    make_packed().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    newer = make_packed(seed=1)
    newer.save_pretrained(tmp_path / "whole")
    for folder in ("whole", "shards", "whole"):
        nms.push_folder(tmp_path / folder, PACKED)
        there = {name for name in local_hub.repos[PACKED].files() if "safetensors" in name}
        assert there == {name for name in names_in(tmp_path / folder) if "safetensors" in name}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(PACKED)(tokens).logits, newer(tokens).logits)


def test_only_what_holds_is_pushed(local_hub, make_llama, make_masked, tmp_path, caplog):
    make_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(FormatError, match="is no 2:4 masked model: no layer is sparse"):
        nms.push_folder(tmp_path / "dense", MASK)
    make_masked().save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="training checkpoint"):
        nms.push_folder(tmp_path / "checkpoint", MASK)
    with pytest.raises(ConfigError, match="no such folder"):
        nms.push_folder(tmp_path / "nothing", MASK)
    assert not local_hub.repos
    folder = nms.save_mask(make_masked(), tmp_path / "mask")
    (folder / "checkpoints").mkdir()
    for name in ("checkpoints/optimizer.pt", "training_args.bin", ".secret", "notes.txt"):
        (folder / name).write_text("x")
    with caplog.at_level(logging.WARNING, logger="hf_nmsparse"):
        nms.push_folder(folder, MASK)
    assert set(local_hub.repos[MASK].files()) == MASK_FILES | {"notes.txt"}
    assert re.search("names '.*' as its base model, which others will not find", caplog.text)


def test_a_masked_model_of_another_pattern_is_checked_against_it(local_hub, make_llama, tmp_path):
    model = make_llama()
    nms.prune(model, "magnitude", "4:8", progress=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError):
        nms.push_folder(tmp_path, "user/masked")
    nms.push_folder(tmp_path, "user/masked", pattern="4:8")
    assert local_hub.repos["user/masked"].history()[-1] == "Publish 4:8 masked model"
    assert nms.verify("user/masked", "4:8").ok


# --- command line ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mask", "packed model"])
def test_push_and_pull_on_the_command_line(local_hub, make_masked, make_packed, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for seed, name in ((0, "made"), (1, "newer")):
        if kind == "mask":
            nms.save_mask(make_masked(seed), name)
        else:
            make_packed(seed).save_pretrained(name)
    dry = facts("push made user/repo --dry-run")
    assert dry["dry_run"] and sorted(dry["files"]) == names_in(Path("made")) and not local_hub.repos
    assert "would push to user/repo" in run("push made user/repo --dry-run").stdout
    pushed = facts("push made user/repo --message Made --private")
    repo = local_hub.repos["user/repo"]
    assert (pushed["kind"], pushed["commit"]) == (kind, repo.branches["main"]) and repo.history()[-1] == "Made"
    assert pushed["url"] in run("push made user/repo").stdout and len(repo.history()) == 2
    pulled = facts("pull user/repo --output pulled")
    assert (pulled["kind"], pulled["commit"], pulled["layers"]) == (kind, pushed["commit"], 14)
    assert {path.name: path.read_bytes() for path in Path("pulled").iterdir() if path.name != "README.md"} == {
        path.name: path.read_bytes() for path in Path("made").iterdir() if path.name != "README.md"
    }
    run("push newer user/repo --revision newer")
    run("pull user/repo --output pulled --revision newer")  # the same kind: replaced
    assert Path("pulled").joinpath(f"{weights(kind)}").read_bytes() == Path(f"newer/{weights(kind)}").read_bytes()
    assert facts("verify pulled")["ok"] and names_in(tmp_path) == ["made", "newer", "pulled"]


def weights(kind: str) -> str:
    return "adapter_model.safetensors" if kind == "mask" else "model.safetensors"


def test_tasks_on_the_command_line(local_hub, make_masked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nms.save_mask(make_masked(), "law")
    run("push law user/masks --task law")
    assert facts("pull user/masks --task law --output pulled")["task"] == "law"
    assert nms.read_mask("pulled").layers.keys() == nms.read_mask("law").layers.keys()
    assert "several tasks" in run("pull user/masks --output x", 2).stderr
    assert "no such folder" in run("pull user/masks --task nothing --output x", 2).stderr


def test_refusals_of_push_and_pull_have_exit_codes_and_write_nothing(
    local_hub, make_masked, make_packed, make_llama, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    nms.save_mask(make_masked(), "mask")
    make_packed().save_pretrained("packed")
    make_llama().save_pretrained("dense")
    Path("other").mkdir()
    run("push mask user/mask")
    run("push packed user/packed")
    make_llama().push_to_hub("user/dense")
    repo = local_hub.repos[PACKED]
    damaged = dict(repo.commits[repo.branches["main"]].files)
    old = damaged["model.safetensors"]
    damaged["model.safetensors"] = File(old.data[:-1] + bytes([old.data[-1] ^ 1]), True)
    repo.add("damaged", damaged, "damaged")
    for line, code, said in (
        ("push nothing user/x", 2, "no such folder"),
        ("push other user/x", 2, "other files"),
        ("push mask ./x", 2, "no valid repo id"),
        ("push mask ./x --dry-run", 2, "no valid repo id"),
        ("push mask somebody/x", 2, "may not do this"),
        ("push dense user/x", 1, "no layer is sparse"),
        ("pull user/nothing --output x", 2, "could not fetch user/nothing"),
        ("pull user/mask --revision v9 --output x", 2, "no such branch"),
        ("pull mask --output x", 2, "is a local folder"),
        ("pull user/dense --output x", 1, "nothing was written"),
        ("pull user/packed --revision damaged --output x", 1, "digest"),
        ("pull user/packed --output mask", 2, "not empty (mask)"),
        ("pull user/mask --output dense", 2, "not empty (model)"),
    ):
        error = run(line, code).stderr
        assert said in " ".join(error.split()) and "Traceback" not in error, line
    assert names_in(tmp_path) == ["dense", "mask", "other", "packed"]
    assert set(local_hub.repos) == {MASK, PACKED, "user/dense"}
    run("pull user/mask --output packed --overwrite")
    assert facts("inspect packed")["kind"] == "mask"


def test_push_and_pull_have_help_with_an_example():
    for verb in ("push", "pull"):
        text = " ".join(run(f"{verb} --help").stdout.split())
        assert f"Example: nmsparse {verb} " in text and "--json" in text and verb in run("--help").stdout


def test_the_hub_of_the_tests_tells_guests_from_owners(local_hub):
    assert HfApi().whoami()["name"] == "user" and HfApi(token=GUEST_TOKEN).whoami()["name"] == "guest"
