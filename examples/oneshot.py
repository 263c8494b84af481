# SPDX-License-Identifier: Apache-2.0
"""Prune a model in one shot: criteria compared, the worst layers left dense, the mask saved. A few minutes on 2 cores."""

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nmsparse as nms
from hf_nmsparse.cli.assets import demo_text, smollm2
from hf_nmsparse.data import tokenize, windows

base = smollm2()  # or any Hub id or folder of a causal language model
tokenizer = AutoTokenizer.from_pretrained(base)
train, test = (tokenize([demo_text(split)], tokenizer) for split in ("train", "test"))
calibration = windows(train, 512, samples=16, seed=0)


def load():
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


print("dense", nms.perplexity(load(), test[:4096], seq_len=1024).value)

# %% Two criteria. Polish leaves kept weights alone; SparseGPT's mask gets new ones here, fitted in closed form
for criterion, weights in (("polish", "keep"), ("sparsegpt", "refit")):
    model = load()
    report = nms.prune(model, criterion, "2:4", calibration, weights=weights)
    error = sum(layer.relative_error for layer in report.layers) / len(report.layers)
    value = nms.perplexity(model, test[:4096], seq_len=1024).value
    print(f"{criterion}, weights={weights!r}: output error {error:.4f}, perplexity {value:.2f}")

# %% What pruning each layer alone costs, and the tenth of the bytes that had better stay dense
model = load()
sensitivity = nms.sensitivity(model, calibration[:2], "wanda")
dense = sensitivity.keep_dense(0.1)
for layer in sorted(sensitivity.layers, key=lambda layer: -layer.loss_increase)[:5]:
    print(f"{layer.name}: loss {layer.loss_increase:+.4f}")
report = nms.prune(model, "polish", "2:4", calibration, dense_layers=dense)
print(f"{len(dense)} layers dense", nms.perplexity(model, test[:4096], seq_len=1024).value)

# %% The mask as codes, for the base; and the model in packed form
nms.save_mask(model, "runs/oneshot-mask", report=report)
nms.compress(model).save_pretrained("runs/oneshot-packed")
